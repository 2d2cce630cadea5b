// SPDX-License-Identifier: Apache-2.0
// The index, distances and magnitudes through their public header, with the core alone, so that
// sanitisers see them: buffers end where the last element does.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "check.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/similarity.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<float> normals(std::size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

BlockBatch batch_of(const std::vector<float>& values, std::size_t rows, std::size_t cols) {
    return dense_blocks(reinterpret_cast<const std::byte*>(values.data()),
                        values.size() / (rows * cols), rows, cols, Dtype::f32);
}

std::vector<std::int64_t> numbers(std::size_t count, std::int64_t first = 0) {
    std::vector<std::int64_t> ids(count);
    std::iota(ids.begin(), ids.end(), first);
    return ids;
}

struct Found {
    std::vector<std::int64_t> ids;
    std::vector<double> distances;
};

Found query(const L2Index& index, const BlockBatch& blocks, std::size_t k) {
    Found found{std::vector<std::int64_t>(blocks.count * k), std::vector<double>(blocks.count * k)};
    index.query(blocks, k, found.ids, found.distances);
    return found;
}

LshParameters parameters(std::size_t rows, std::size_t cols) {
    return {Dtype::f32, rows, cols, 0.5, 8, 8, 3};
}

// Makes the checksum of changed bytes right again.
void sign_again(std::vector<std::byte>& bytes) {
    std::uint64_t seed;
    std::memcpy(&seed, bytes.data(), sizeof seed);
    const Digest digest = hash_bytes(Bytes(bytes).subspan(24), seed);
    std::memcpy(bytes.data() + 8, &digest, sizeof digest);
}

}  // namespace

TEST(blocks_are_found_in_every_layout) {
    for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{64, 64},
                                     {1, 7},
                                     {9, 1},
                                     {5, 1100},
                                     {3, 300},
                                     {33, 16}}) {
        const std::size_t across = 3;
        const std::size_t width = across * cols + 2;
        const std::vector<float> matrix = normals(2 * rows * width, 5);
        const MatrixRef ref{reinterpret_cast<const std::byte*>(matrix.data()), 2 * rows, width,
                            width * sizeof(float), Dtype::f32};
        const BlockBatch inside = whole_blocks(ref, rows, cols);
        const std::size_t wanted = 2 * (width / cols);
        CHECK(inside.count == wanted);
        std::vector<float> copies;
        for (std::size_t b = 0; b < inside.count; ++b) {
            for (std::size_t r = 0; r < rows; ++r) {
                const auto* row =
                    reinterpret_cast<const float*>(inside.block(b) + r * ref.stride_bytes);
                copies.insert(copies.end(), row, row + cols);
            }
        }
        L2Index one(parameters(rows, cols));
        L2Index other(parameters(rows, cols));
        one.add(inside, numbers(wanted), 1);
        other.add(batch_of(copies, rows, cols), numbers(wanted), 2);
        CHECK(one.save() == other.save());
        const Found found = query(one, batch_of(copies, rows, cols), 1);
        CHECK(std::all_of(found.distances.begin(), found.distances.end(),
                          [](double d) { return d == 0; }));
        std::vector<double> a(wanted);
        std::vector<double> b(wanted);
        block_magnitudes(inside, a);
        block_magnitudes(batch_of(copies, rows, cols), b);
        CHECK(a == b);
        std::vector<Distance> distances(wanted);
        compare_blocks(inside, batch_of(copies, rows, cols), numbers(wanted), numbers(wanted), 0, 0,
                       distances);
        for (const Distance& d : distances) {
            CHECK(d.relative_l2 == 0 && d.greatest == 0 && d.share == 1);
        }
    }
}

TEST(removing_leaves_what_was_never_added) {
    const std::vector<float> values = normals(6000 * 32, 6);
    const BlockBatch all = batch_of(values, 4, 8);
    BlockBatch first = all;
    first.count = 500;
    L2Index once(parameters(4, 8));
    once.add(first, numbers(500));
    L2Index changed(parameters(4, 8));
    changed.add(all, numbers(6000));
    changed.remove(numbers(5500, 500));
    CHECK(changed.size() == 500);
    CHECK(changed.save() == once.save());
    const Found a = query(once, all, 5);
    const Found b = query(changed, all, 5);
    CHECK(a.ids == b.ids && a.distances == b.distances);
    changed.remove(numbers(500));
    CHECK(changed.size() == 0 && changed.ids().empty());
    CHECK(query(changed, first, 1).ids == std::vector<std::int64_t>(500, -1));
}

TEST(blocks_that_come_and_go_by_turns_are_found_while_they_are_there) {
    // A third of the blocks is as another one, so that sketches have several members; few go at a
    // time, so that their places are taken again and nothing is made anew.
    constexpr std::size_t kBlocks = 1500;
    constexpr std::size_t kDistinct = 1000;
    std::vector<float> values = normals(kBlocks * 32, 9);
    std::copy_n(values.begin(), (kBlocks - kDistinct) * 32, values.begin() + kDistinct * 32);
    const BlockBatch all = batch_of(values, 4, 8);
    std::vector<bool> is_there(kBlocks, true);
    L2Index index(parameters(4, 8));
    index.add(all, numbers(kBlocks));
    std::mt19937_64 random(10);
    for (int round = 0; round < 40; ++round) {
        std::vector<std::int64_t> gone;
        std::vector<std::int64_t> come;
        std::vector<float> back;
        for (std::size_t i = 0; i < kBlocks; ++i) {
            if (random() % (is_there[i] ? 8 : 2) != 0) continue;
            (is_there[i] ? gone : come).push_back(static_cast<std::int64_t>(i));
            if (!is_there[i]) {
                back.insert(back.end(), values.begin() + i * 32, values.begin() + (i + 1) * 32);
            }
            is_there[i] = !is_there[i];
        }
        std::shuffle(gone.begin(), gone.end(), random);
        index.remove(gone);
        if (!come.empty()) index.add(batch_of(back, 4, 8), come);
        const auto loaded = L2Index::load(index.save());
        CHECK(loaded->ids() == index.ids());
        for (const L2Index* from : {&std::as_const(index), &std::as_const(*loaded)}) {
            const Found found = query(*from, all, 1);
            for (std::size_t i = 0; i < kDistinct; ++i) {
                const std::size_t twin = i + kDistinct;
                const bool has_twin = twin < kBlocks && is_there[twin];
                CHECK((found.distances[i] == 0) == (is_there[i] || has_twin));
                if (!is_there[i] && !has_twin) continue;
                CHECK(found.ids[i] == static_cast<std::int64_t>(is_there[i] ? i : twin));
            }
        }
    }
}

TEST(what_was_removed_is_not_merged) {
    std::vector<float> values = normals(20 * 32, 11);
    values[3 * 32 + 1] = std::numeric_limits<float>::quiet_NaN();
    L2Index other(parameters(4, 8));
    other.add(batch_of(values, 4, 8), numbers(20));
    other.remove(numbers(4, 2));
    L2Index index(parameters(4, 8));
    index.merge(other);
    CHECK(index.ids() == other.ids());
    CHECK(index.save() == other.save());
}

TEST(loading_gives_the_same_index) {
    std::vector<float> values = normals(300 * 35, 7);
    std::copy_n(values.begin(), 35, values.begin() + 70);
    values[35] = std::numeric_limits<float>::quiet_NaN();
    const BlockBatch blocks = batch_of(values, 5, 7);
    L2Index index(parameters(5, 7));
    index.add(blocks, numbers(300, 17));
    const std::vector<std::byte> saved = index.save();
    const auto loaded = L2Index::load(saved);
    CHECK(loaded->save() == saved);
    CHECK(loaded->ids() == index.ids());
    const Found a = query(index, blocks, 3);
    const Found b = query(*loaded, blocks, 3);
    CHECK(a.ids == b.ids && a.distances == b.distances);
    loaded->remove(numbers(300, 17));
    loaded->add(blocks, numbers(300, 17));
    CHECK(loaded->save() == saved);
}

TEST(damage_that_the_checksum_hides_is_refused_or_harmless) {
    std::vector<float> values = normals(12 * 6, 8);
    values[9] = kInfinity;
    std::fill_n(values.begin() + 12, 6, 0.0F);
    const BlockBatch blocks = batch_of(values, 2, 3);
    L2Index index({Dtype::f32, 2, 3, 0.5, 2, 3, 1});
    index.add(blocks, numbers(12));
    const std::vector<std::byte> saved = index.save();
    std::mt19937 random(9);
    int refused = 0;
    for (std::size_t at = 0; at < saved.size(); ++at) {
        for (int round = 0; round < 3; ++round) {
            std::vector<std::byte> damaged = saved;
            damaged[at] ^= static_cast<std::byte>(1 + random() % 255);
            sign_again(damaged);
            try {
                const auto loaded = L2Index::load(damaged);
                const LshParameters& p = loaded->parameters();
                if (p.rows == 2 && p.cols == 3 && p.dtype == Dtype::f32) {
                    static_cast<void>(query(*loaded, blocks, 4));
                }
                loaded->remove(loaded->ids());
                CHECK(loaded->size() == 0);
            } catch (const Error& error) {
                CHECK(error.code() == ErrorCode::corrupt_page ||
                      error.code() == ErrorCode::unsupported_format);
                ++refused;
            } catch (const std::bad_alloc&) {  // a shape of billions of elements
                ++refused;
            }
        }
    }
    CHECK(refused > 300);
    for (std::size_t length = 0; length < saved.size(); length += 7) {
        std::vector<std::byte> cut(saved.begin(),
                                   saved.begin() + static_cast<std::ptrdiff_t>(length));
        if (length >= 96) sign_again(cut);
        CHECK_THROWS(ErrorCode::corrupt_page, static_cast<void>(L2Index::load(cut)));
    }
}

TEST(an_index_written_by_hand_is_refused_one_beyond_the_format) {
    // Sketches of blocks 0 (and 3, its twin), 1 and 2, which is zero; 4 and 5 are not finite.
    std::vector<float> values = normals(6 * 6, 12);
    std::fill_n(values.begin() + 2 * 6, 6, 0.0F);
    std::copy_n(values.begin(), 6, values.begin() + 3 * 6);
    values[4 * 6] = values[5 * 6] = kInfinity;
    L2Index index({Dtype::f32, 2, 3, 0.5, 2, 3, 1});
    index.add(batch_of(values, 2, 3), numbers(6));
    const std::vector<std::byte> saved = index.save();
    constexpr std::size_t kRms = 96;
    constexpr std::size_t kSketches = kRms + 3 * 8;
    constexpr std::size_t kSketch = 2 * 64;
    constexpr std::size_t kCounts = kSketches + 3 * kSketch;  // 2, 1, 1
    constexpr std::size_t kIds = kCounts + 3;                 // steps 0, 3, -2, 1; 2, 1
    CHECK(saved.size() == kIds + 6);
    const auto loads = [&](const auto& change) {
        std::vector<std::byte> bytes = saved;
        change(bytes);
        const std::uint64_t length = bytes.size();
        std::memcpy(bytes.data() + 24, &length, sizeof length);
        sign_again(bytes);
        try {
            return L2Index::load(bytes)->size() == index.size();
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page);
            return false;
        }
    };
    const auto with = [&](std::size_t at, auto value) {
        return loads([&](std::vector<std::byte>& bytes) {
            std::memcpy(bytes.data() + at, &value, sizeof value);
        });
    };
    using Byte = std::uint8_t;
    CHECK(loads([](const std::vector<std::byte>&) {}));
    for (const std::uint64_t groups : {2U, 4U}) CHECK(!with(64, groups));
    CHECK(!with(64, std::uint64_t{1} << 61));  // times the size of one it is 0
    for (const std::uint64_t members : {3U, 5U}) CHECK(!with(72, members));
    for (const std::uint64_t others : {1U, 3U}) CHECK(!with(80, others));
    CHECK(!with(80, std::uint64_t{1} << 40));  // before memory is asked for
    CHECK(!with(92, std::uint16_t{32}));
    CHECK(!with(95, Byte{1}));
    CHECK(with(kRms, 0.5));
    for (const double rms : {0.0, -0.5, kInfinity, std::nan("")}) CHECK(!with(kRms, rms));
    CHECK(!with(kRms + 16, -0.0));
    CHECK(with(kSketches, std::int16_t{16383}));
    CHECK(!with(kSketches, std::int16_t{16384}));
    CHECK(!with(kSketches, std::int16_t{-16384}));
    CHECK(!loads([](std::vector<std::byte>& bytes) {  // one sketch twice
        std::copy_n(bytes.begin() + kRms, 8, bytes.begin() + kRms + 8);
        std::copy_n(bytes.begin() + kSketches, kSketch, bytes.begin() + kSketches + kSketch);
    }));
    CHECK(with(kCounts, std::array<Byte, 3>{1, 2, 1}));
    CHECK(!with(kCounts, std::array<Byte, 3>{2, 0, 2}));
    CHECK(!with(kCounts, std::array<Byte, 3>{2, 1, 2}));
    CHECK(!loads([](std::vector<std::byte>& bytes) {  // 2, 2^64 - 1 and 3: the sum is 4 again
        std::vector<std::byte> most(9, std::byte{0xFF});
        most.push_back(std::byte{1});
        bytes[kCounts + 2] = std::byte{3};
        bytes.erase(bytes.begin() + kCounts + 1);
        bytes.insert(bytes.begin() + kCounts + 1, most.begin(), most.end());
    }));
    const auto with_first_count = [&](std::vector<Byte> count, std::uint64_t members) {
        return loads([&](std::vector<std::byte>& bytes) {
            std::memcpy(bytes.data() + 72, &members, sizeof members);
            bytes[kCounts] = static_cast<std::byte>(count[0]);
            for (std::size_t i = 1; i < count.size(); ++i) {
                bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(kCounts + i),
                             static_cast<std::byte>(count[i]));
            }
        });
    };
    CHECK(with_first_count({2}, 4));
    // 2^40 blocks, as stated: before memory is asked for.
    CHECK(!with_first_count({0x80, 0x80, 0x80, 0x80, 0x80, 0x20}, (std::uint64_t{1} << 40) + 2));
    // 2^64 + 2, of which 64 bits are left.
    CHECK(!with_first_count({0x82, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2}, 4));
    CHECK(!loads([](std::vector<std::byte>& bytes) {  // a 1 of two bytes
        bytes[kCounts + 2] = std::byte{0x81};
        bytes.insert(bytes.begin() + kCounts + 3, std::byte{0});
    }));
    CHECK(with(kIds + 5, Byte{4}));
    CHECK(!with(kIds + 3, Byte{0}));                     // 1 twice
    CHECK(!with(kIds + 3, std::array<Byte, 2>{3, 10}));  // -1 for 2
    CHECK(!with(kIds + 4, std::array<Byte, 2>{6, 1}));   // 5 before 4
    CHECK(!loads([](std::vector<std::byte>& bytes) { bytes.push_back(std::byte{0}); }));
}

TEST(wrong_calls_change_nothing) {
    const std::vector<float> values = normals(4 * 12, 10);
    const BlockBatch blocks = batch_of(values, 3, 4);
    L2Index index(parameters(3, 4));
    index.add(blocks, numbers(4));
    const auto before = index.save();
    constexpr ErrorCode kWrong = ErrorCode::invalid_argument;
    CHECK_THROWS(kWrong, index.add(blocks, numbers(4)));
    CHECK_THROWS(kWrong, index.add(blocks, numbers(3, 10)));
    CHECK_THROWS(kWrong, index.add(batch_of(values, 4, 3), numbers(4, 10)));
    CHECK_THROWS(kWrong, index.add(blocks, std::vector<std::int64_t>{10, 11, 11, 12}));
    CHECK_THROWS(kWrong, index.add(blocks, std::vector<std::int64_t>{10, 11, -5, 12}));
    CHECK_THROWS(kWrong, index.remove(numbers(5)));
    CHECK_THROWS(kWrong, index.remove(std::vector<std::int64_t>{1, 1}));
    CHECK_THROWS(kWrong, static_cast<void>(query(index, batch_of(values, 2, 6), 1)));
    CHECK_THROWS(kWrong, static_cast<void>(dense_blocks(nullptr, 1, 0, 4, Dtype::f32)));
    CHECK_THROWS(kWrong, static_cast<void>(dense_blocks(nullptr, 1, 4, 4, Dtype::i32)));
    CHECK_THROWS(kWrong,
                 static_cast<void>(dense_blocks(nullptr, ~std::size_t{0}, 4, 4, Dtype::f32)));
    CHECK_THROWS(kWrong,
                 static_cast<void>(dense_blocks(nullptr, 1, ~std::size_t{0}, 4, Dtype::f32)));
    for (const LshParameters& wrong :
         {LshParameters{Dtype::f32, 4, 4, 0, 8, 8, 0}, LshParameters{Dtype::f32, 4, 4, 17, 8, 8, 0},
          LshParameters{Dtype::f32, 4, 4, std::nan(""), 8, 8, 0},
          LshParameters{Dtype::f32, 4, 4, 1, 0, 8, 0}, LshParameters{Dtype::f32, 4, 4, 1, 8, 0, 0},
          LshParameters{Dtype::f32, 4, 4, 1, 64, 9, 0}}) {
        CHECK_THROWS(kWrong, L2Index{wrong});
    }
    std::vector<Distance> distances(1);
    const std::vector<std::int64_t> none{0};
    const std::vector<std::int64_t> beyond{4};
    CHECK_THROWS(kWrong, compare_blocks(blocks, blocks, none, beyond, 0, 1, distances));
    CHECK_THROWS(kWrong, compare_blocks(blocks, blocks, none, none, -1, 1, distances));
    CHECK_THROWS(kWrong, compare_blocks(blocks, blocks, none, none, 0, std::nan(""), distances));
    CHECK(index.save() == before);
}

TEST(results_whose_number_wraps_around_are_refused) {
    // 2 * 2^63 answers are 0 in 64 bits: they were written behind a result without a place.
    constexpr ErrorCode kWrong = ErrorCode::invalid_argument;
    const std::vector<float> values = normals(32, 12);
    L2Index index(parameters(4, 4));
    const BlockBatch two = batch_of(values, 4, 4);
    index.add(two, numbers(2));
    CHECK_THROWS(kWrong, index.query(two, std::size_t{1} << 63, {}, {}));
    BlockBatch many = two;  // the first block, again and again
    many.count = std::size_t{1} << 58;
    many.per_line = many.count;
    many.block_pitch = 0;
    CHECK_THROWS(kWrong, index.query(many, 64, {}, {}));
    CHECK_THROWS(kWrong, index.hashes(many, {}));
}

TEST(rows_that_are_one_row_are_read_like_any_others) {
    // As numpy broadcasts a row. What to prefetch of a large block was found by a division by the
    // distance of its strips, which is 0.
    for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{300, 300}, {2048, 16}}) {
        const std::vector<float> row = normals(cols, 13);
        std::vector<float> full;
        for (std::size_t r = 0; r < rows; ++r) full.insert(full.end(), row.begin(), row.end());
        BlockBatch repeated = batch_of(row, 1, cols);
        repeated.rows = rows;
        repeated.row_stride = 0;
        L2Index index(parameters(rows, cols));
        index.add(batch_of(full, rows, cols), numbers(1));
        index.add(repeated, numbers(1, 1));
        CHECK(query(index, repeated, 3).ids == (std::vector<std::int64_t>{0, 1, -1}));
        CHECK(query(index, repeated, 2).distances == (std::vector<double>{0, 0}));
    }
}

TEST(an_empty_index_answers) {
    const std::vector<float> values = normals(12, 11);
    L2Index index(parameters(3, 4));
    CHECK(query(index, batch_of(values, 3, 4), 2).ids == std::vector<std::int64_t>(2, -1));
    CHECK(!index.contains(0));
    CHECK(L2Index::load(index.save())->size() == 0);
    index.add(batch_of({}, 3, 4), {});
    index.remove({});
    CHECK(index.size() == 0);
}

PYDEDUP_TEST_MAIN
