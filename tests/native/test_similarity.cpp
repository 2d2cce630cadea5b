// SPDX-License-Identifier: Apache-2.0
// The index, distances and magnitudes through their public header, with the core alone, so that
// sanitisers see them: buffers end where the last element does.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.hpp"
#include "pydedup/similarity.hpp"
#include "similarity_blocks.hpp"

using namespace pydedup;
using namespace pydedup::testing;

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

TEST(zero_blocks_are_near_to_each_other_alone) {
    // Buckets so wide that all other blocks are in one.
    L2Index index({Dtype::f32, 4, 4, 16, 8, 1, 3});
    std::vector<float> values = normals(6 * 16, 14);
    std::fill_n(values.begin() + 16, 16, 0.0F);
    std::fill_n(values.begin() + 4 * 16, 16, 0.0F);
    const BlockBatch blocks = batch_of(values, 4, 4);
    index.add(blocks, numbers(6));
    const Found found = query(index, blocks, 6);
    for (std::size_t b = 0; b < 6; ++b) {
        std::vector<std::int64_t> ids(found.ids.begin() + static_cast<std::ptrdiff_t>(6 * b),
                                      found.ids.begin() + static_cast<std::ptrdiff_t>(6 * b + 6));
        std::sort(ids.begin(), ids.end());
        const bool zero = b == 1 || b == 4;
        CHECK(ids == (zero ? std::vector<std::int64_t>{-1, -1, -1, -1, 1, 4}
                           : std::vector<std::int64_t>{-1, -1, 0, 2, 3, 5}));
    }
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
