// SPDX-License-Identifier: Apache-2.0
// Deltas of pruned blocks: masks of what became 0 come back, take what they should, and are refused
// where docs/format.md does not allow them (that by hand: test_delta_format.cpp).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "codec/delta_model.hpp"
#include "deltas.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::uint8_t kMasked = 2;  // version of deltas with a mask

// How elements are chosen that become 0.
enum class Pruned { at_random, least, least_and_some, pattern, rows };

// Sets elements of a block to 0, or to a zero with the sign that they had.
Buffer prune(const Buffer& block, std::size_t cols, Dtype dtype, Pruned how, double share,
             bool keeps_sign, std::mt19937_64& random) {
    const std::size_t item = item_bytes(dtype);
    const std::size_t count = block.size() / item;
    std::vector<std::uint64_t> magnitudes(count);
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(&magnitudes[i], &block[i * item], item);
        if (detail::delta_layout(dtype).ordered)
            magnitudes[i] &= ~(std::uint64_t{1} << (8 * item - 1));
    }
    std::vector<std::uint64_t> sorted = magnitudes;
    std::sort(sorted.begin(), sorted.end());
    const std::uint64_t threshold =
        sorted[static_cast<std::size_t>(share * static_cast<double>(count))];
    std::vector<bool> row_gone((count + cols - 1) / cols);
    for (auto&& gone : row_gone) gone = std::uniform_real_distribution<>()(random) < share;
    Buffer pruned = block;
    for (std::size_t i = 0; i < count; ++i) {
        const bool chance = std::uniform_real_distribution<>()(random) < share;
        const bool least = magnitudes[i] <= threshold;
        const bool gone = how == Pruned::at_random        ? chance
                          : how == Pruned::least          ? least
                          : how == Pruned::least_and_some ? least || i % 101 == 0
                          : how == Pruned::pattern        ? i % 4 >= 2
                                                          : row_gone[i / cols];
        if (!gone) continue;
        const std::uint8_t sign = pruned[i * item + item - 1] & 0x80;
        std::memset(&pruned[i * item], 0, item);
        if (keeps_sign && detail::delta_layout(dtype).ordered) pruned[i * item + item - 1] = sign;
    }
    return pruned;
}

TEST(pruned_blocks_of_every_dtype_and_shape_come_back) {
    std::mt19937_64 random(1);
    std::size_t n_masked = 0;
    for (const Dtype dtype : kDtypes) {
        for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{1, 5},
                                         {1, 8},
                                         {3, 67},
                                         {64, 64},
                                         {1, 4097},
                                         {700, 3}}) {
            for (const Pruned how : {Pruned::at_random, Pruned::least, Pruned::least_and_some,
                                     Pruned::pattern, Pruned::rows}) {
                for (const bool keeps_sign : {false, true}) {
                    const Buffer base = random_bytes(rows * cols * item_bytes(dtype), random);
                    Buffer moved = base;
                    if (keeps_sign) {
                        for (std::size_t i = 0; i < moved.size(); i += item_bytes(dtype)) {
                            moved[i] ^= static_cast<std::uint8_t>(random() % 8);
                        }
                    }
                    const Buffer block = prune(moved, cols, dtype, how, 0.4, keeps_sign, random);
                    const Encoded delta =
                        encode(matrix(block, rows, cols, dtype), matrix(base, rows, cols, dtype));
                    if (delta.bytes.empty()) continue;
                    n_masked += delta.bytes[0] == kMasked ? 1 : 0;
                    CHECK(delta.encoding == Encoding::delta);
                    CHECK(decode(delta, view(base, rows, cols, dtype), dtype) == block);
                }
            }
        }
    }
    CHECK(n_masked > 300);
}

// Bytes of a pruned block of 64 x 64 in `dtype`, nothing else changed, or each element a little.
double bytes_of(Dtype dtype, Pruned how, double share, double moved, std::mt19937_64& random,
                std::optional<double> max_error = std::nullopt) {
    std::vector<double> values = normal(4096, 0.02, random);
    const Buffer base = as_dtype(values, dtype);
    const std::vector<double> noise = normal(4096, moved, random);
    if (moved > 0) {
        for (std::size_t i = 0; i < values.size(); ++i) values[i] += noise[i];
    }
    const Buffer block = prune(as_dtype(values, dtype), 64, dtype, how, share, moved == 0, random);
    const MatrixRef to = matrix(block, 64, 64, dtype);
    const MatrixRef from = matrix(base, 64, 64, dtype);
    const Encoded delta = encode(to, from, max_error);
    const Buffer back = decode(delta, view(base, 64, 64, dtype), dtype);
    if (!max_error) CHECK(back == block);
    const std::vector<double> want = as_doubles(block, dtype);
    const std::vector<double> got = as_doubles(back, dtype);
    for (std::size_t i = 0; i < want.size(); ++i) CHECK(want[i] != 0 || got[i] == 0);
    const auto estimate = static_cast<double>(estimate_delta(to, from, max_error));
    CHECK(estimate < 1.1 * static_cast<double>(delta.bytes.size()) + 600);
    return static_cast<double>(delta.bytes.size());
}

TEST(what_was_pruned_takes_a_bit_an_element_at_most) {
    std::mt19937_64 random(2);
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16}) {
        for (const std::optional<double> bound : {std::optional<double>(), std::optional(0.01)}) {
            CHECK(bytes_of(dtype, Pruned::at_random, 0.5, 0, random, bound) <= 512 + 40);
            CHECK(bytes_of(dtype, Pruned::at_random, 0.9, 0, random, bound) <= 380);
            CHECK(bytes_of(dtype, Pruned::pattern, 0.5, 0, random, bound) <= 40);
            CHECK(bytes_of(dtype, Pruned::rows, 0.3, 0, random, bound) <= 200);
        }
        // The least ones are told by a number, where rounding does not make many equal to it.
        CHECK(bytes_of(dtype, Pruned::least, 0.7, 0, random) <= 40);
        CHECK(bytes_of(dtype, Pruned::least_and_some, 0.7, 0, random) <= 300);
    }
}

TEST(what_was_pruned_and_moved_takes_what_stayed) {
    std::mt19937_64 random(3);
    const double moved = 2e-4;
    const double all = bytes_of(Dtype::f32, Pruned::least, 0.0, moved, random);
    CHECK(bytes_of(Dtype::f32, Pruned::at_random, 0.5, moved, random) < 0.5 * all + 700);
    CHECK(bytes_of(Dtype::f32, Pruned::at_random, 0.9, moved, random) < 0.1 * all + 900);
    // Large elements differ in fewer bits.
    CHECK(bytes_of(Dtype::f32, Pruned::least, 0.9, moved, random) < 0.1 * all + 600);
}

TEST(zeros_that_differ_as_little_as_all_else_take_no_mask) {
    std::mt19937_64 random(4);
    Buffer base(4096);
    Buffer block(4096);
    for (std::size_t i = 0; i < base.size(); ++i) {  // a quantised model, trained on
        base[i] = static_cast<std::uint8_t>(random() % 20);
        block[i] = static_cast<std::uint8_t>(base[i] + random() % 2 - (base[i] > 0 ? 1 : 0));
    }
    const Encoded delta = encode(matrix(block, 64, 64, Dtype::i8), matrix(base, 64, 64, Dtype::i8));
    CHECK(delta.bytes[0] != kMasked);
    CHECK(decode(delta, view(base, 64, 64, Dtype::i8), Dtype::i8) == block);
}

// Bytes of the delta of such a block of 64 x 64 to an int8 or f32 base without zeros, if it has
// one.
std::size_t bytes_off(const Buffer& base, const Buffer& block, Dtype dtype) {
    const Encoded delta = encode(matrix(block, 64, 64, dtype), matrix(base, 64, 64, dtype));
    CHECK(decode(delta, view(base, 64, 64, dtype), dtype) == block);
    return delta.bytes.size();
}

TEST(zeros_are_counted_wherever_they_are) {
    std::mt19937_64 random(6);
    Buffer ints(4096);
    for (std::uint8_t& element : ints) element = static_cast<std::uint8_t>(1 + random() % 255);
    CHECK(bytes_off(ints, Buffer(4096), Dtype::i8) <= 60);  // as many as fill a byte's counts
    const Buffer base = as_dtype(normal(4096, 0.02, random), Dtype::f32);
    for (std::size_t at = 0; at < 16; ++at) {
        Buffer block = base;
        for (std::size_t i = at; i < 4096; i += 16) std::memset(&block[4 * i], 0, 4);
        CHECK(bytes_off(base, block, Dtype::f32) <= 200);
    }
    const Buffer few = prune(base, 64, Dtype::f32, Pruned::at_random, 1.0 / 40, false, random);
    CHECK(bytes_off(base, few, Dtype::f32) <= 200);
    CHECK(estimate_delta(matrix(few, 64, 64, Dtype::f32), matrix(base, 64, 64, Dtype::f32),
                         std::nullopt) <= 300);
}

TEST(elements_apart_from_the_pruned_ones_do_not_spoil_a_mask) {
    std::mt19937_64 random(7);
    std::vector<double> values = normal(4096, 0.02, random);
    for (std::size_t i = 0; i < 4096; i += 512) values[i] = 0;
    const Buffer base = as_dtype(values, Dtype::f32);
    Buffer block = prune(base, 64, Dtype::f32, Pruned::least, 0.7, false, random);
    const std::size_t as_pruned = bytes_off(base, block, Dtype::f32);
    CHECK(as_pruned <= 40);
    CHECK(estimate_delta(matrix(block, 64, 64, Dtype::f32), matrix(base, 64, 64, Dtype::f32),
                         std::nullopt) <= 100);
    const float grown = 0.25F;
    for (std::size_t i = 0; i < 4096; i += 512) std::memcpy(&block[4 * i], &grown, 4);
    CHECK(bytes_off(base, block, Dtype::f32) <= as_pruned + 80);
    // One zero of the other sign.
    block = prune(base, 64, Dtype::f32, Pruned::at_random, 0.5, false, random);
    const std::size_t at_random = bytes_off(base, block, Dtype::f32);
    for (std::size_t i = 0; i < block.size(); i += 4) {
        if (block[i + 3] != 0 || (base[i + 3] & 0x80) == 0) continue;
        block[i + 3] = 0x80;
        break;
    }
    CHECK(bytes_off(base, block, Dtype::f32) <= at_random + 20);
}

TEST(a_mask_is_written_by_every_batch_alike) {
    std::mt19937_64 random(5);
    const std::size_t rows = 256;
    const Buffer base = as_dtype(normal(rows * 64, 0.02, random), Dtype::f32);
    const Buffer block = prune(base, 64, Dtype::f32, Pruned::at_random, 0.5, false, random);
    const BlockGrid grid{rows, 64, 16, 64};
    std::vector<std::int64_t> indices(grid.count());
    for (std::size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<std::int64_t>(i);
    const std::vector<std::int64_t> limits(indices.size(), 2000);
    std::vector<Buffer> arenas;
    for (const unsigned threads : {1U, 3U}) {
        Buffer arena(2000 * indices.size());
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        const BaseBlocks bases{matrix(base, rows, 64, Dtype::f32), grid, indices};
        arena.resize(encode_deltas(matrix(block, rows, 64, Dtype::f32), grid, indices, bases,
                                   limits, std::nullopt, {at(arena), arena.size()}, offsets,
                                   encoded, threads));
        CHECK(arena[0] == kMasked);
        arenas.push_back(arena);
    }
    CHECK(arenas[0] == arenas[1]);
}

}  // namespace

PYDEDUP_TEST_MAIN
