// SPDX-License-Identifier: Apache-2.0
// The serialised index: it comes back, and what docs/format.md does not allow is refused, whatever
// the checksum says.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <vector>

#include "check.hpp"
#include "pydedup/error.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/similarity.hpp"
#include "similarity_blocks.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// Makes the checksum of changed bytes right again.
void sign_again(std::vector<std::byte>& bytes) {
    std::uint64_t seed;
    std::memcpy(&seed, bytes.data(), sizeof seed);
    const Digest digest = hash_bytes(Bytes(bytes).subspan(24), seed);
    std::memcpy(bytes.data() + 8, &digest, sizeof digest);
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
    for (const std::size_t more : {0U, 100U}) {  // ids; there is room for as many as are stated
        CHECK(!loads([&](std::vector<std::byte>& bytes) {  // 2, 2^64 - 1 and 3: the sum is 4 again
            std::vector<std::byte> most(9, std::byte{0xFF});
            most.push_back(std::byte{1});
            bytes[kCounts + 2] = std::byte{3};
            bytes.erase(bytes.begin() + kCounts + 1);
            bytes.insert(bytes.begin() + kCounts + 1, most.begin(), most.end());
            bytes.insert(bytes.end(), more, std::byte{2});
        }));
    }
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

}  // namespace

PYDEDUP_TEST_MAIN
