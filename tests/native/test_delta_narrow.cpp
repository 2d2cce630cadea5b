// SPDX-License-Identifier: Apache-2.0
// Deltas of blocks whose floats are those of a narrower dtype.
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "check.hpp"
#include "deltas.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// A block of `narrow` saved in `wide`, and by how much its delta is larger than as it was.
double widening_costs(Dtype narrow, Dtype wide, Dtype base_dtype, std::mt19937_64& random) {
    std::vector<double> values = normal(64 * 64, 0.02, random);
    const Buffer of_base = as_dtype(values, base_dtype);
    const std::vector<double> noise = normal(64 * 64, 2e-4, random);  // some change their sign
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += noise[i];
    const Buffer block = as_dtype(values, narrow);
    const Buffer saved = as_dtype(as_doubles(block, narrow), wide);
    const MatrixRef base = matrix(of_base, 64, 64, base_dtype);
    const Encoded as_it_was = encode(matrix(block, 64, 64, narrow), base);
    const Encoded delta = encode(matrix(saved, 64, 64, wide), base);
    CHECK(decode(delta, view(of_base, 64, 64, base_dtype), wide) == saved);
    const std::size_t estimate = estimate_delta(matrix(saved, 64, 64, wide), base, std::nullopt);
    CHECK(estimate < 1.1 * static_cast<double>(delta.bytes.size()));
    return static_cast<double>(delta.bytes.size()) - static_cast<double>(as_it_was.bytes.size());
}

TEST(a_model_that_was_saved_in_a_wider_dtype_takes_as_much_as_it_did) {
    std::mt19937_64 random(9);
    for (const Dtype base : {Dtype::f64, Dtype::f32, Dtype::bf16}) {
        CHECK(widening_costs(Dtype::bf16, Dtype::f32, base, random) == 2);
        CHECK(widening_costs(Dtype::f16, Dtype::f32, base, random) == 2);
        CHECK(widening_costs(Dtype::bf16, Dtype::f64, base, random) == 2);
        CHECK(widening_costs(Dtype::f32, Dtype::f64, base, random) == 2);
    }
    // All that f16 has: subnormal numbers, infinite ones, NaN whose bits are not kept.
    std::vector<double> values(64 * 64);
    for (std::size_t i = 0; i < values.size(); ++i)
        values[i] =
            std::ldexp(1.0 + 1e-3 * static_cast<double>(i % 9), static_cast<int>(i % 40) - 24);
    values[7] = -HUGE_VAL;
    for (const bool with_nan : {false, true}) {
        Buffer saved = as_dtype(as_doubles(as_dtype(values, Dtype::f16), Dtype::f16), Dtype::f32);
        if (with_nan) {
            const std::uint32_t odd = 0x7F802000;
            std::memcpy(&saved[40], &odd, sizeof odd);
        }
        Buffer base = saved;
        for (std::size_t i = 0; i < base.size(); i += 12) base[i + 2] ^= 0x40;
        const Encoded delta =
            encode(matrix(saved, 64, 64, Dtype::f32), matrix(base, 64, 64, Dtype::f32));
        CHECK(delta.bytes[0] == (with_nan ? 1 : 2));
        CHECK(decode(delta, view(base, 64, 64, Dtype::f32), Dtype::f32) == saved);
    }
}

TEST(a_narrow_block_may_be_a_part_of_rows_that_are_not) {
    std::mt19937_64 random(12);
    const Buffer base = as_dtype(normal(64 * 128, 0.02, random), Dtype::f32);
    Buffer rows = base;
    const Buffer right = as_dtype(
        as_doubles(as_dtype(as_doubles(base, Dtype::f32), Dtype::bf16), Dtype::bf16), Dtype::f32);
    for (std::size_t r = 0; r < 64; ++r) {
        std::memcpy(&rows[(128 * r + 64) * 4], &right[(128 * r + 64) * 4], 64 * 4);
    }
    const MatrixRef block{at(rows) + 64 * 4, 64, 64, 128 * 4, Dtype::f32};
    const MatrixRef of_base{at(base) + 64 * 4, 64, 64, 128 * 4, Dtype::f32};
    const Encoded delta = encode(block, of_base);
    CHECK(delta.bytes.size() <= 40);  // the base, rounded
    CHECK(decode(delta, view(copied(of_base), 64, 64, Dtype::f32), Dtype::f32) == copied(block));
}

TEST(narrow_floats_within_a_tight_bound_take_no_more_than_exact_ones) {
    std::mt19937_64 random(11);
    std::vector<double> values = normal(64 * 64, 0.02, random);
    const Buffer base =
        as_dtype(as_doubles(as_dtype(values, Dtype::bf16), Dtype::bf16), Dtype::f32);
    const std::vector<double> noise = normal(64 * 64, 2e-4, random);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += noise[i];
    const Buffer block =
        as_dtype(as_doubles(as_dtype(values, Dtype::bf16), Dtype::bf16), Dtype::f32);
    const MatrixRef from = matrix(base, 64, 64, Dtype::f32);
    const MatrixRef to = matrix(block, 64, 64, Dtype::f32);
    const Encoded exact = encode(to, from);
    const Encoded bounded = encode(to, from, 1e-4);
    CHECK(bounded.bytes.size() <= exact.bytes.size());
    CHECK(decode(bounded, view(base, 64, 64, Dtype::f32), Dtype::f32) == block);
}

// Adds some of the given numbers to the elements' bits.
Buffer moved(const Buffer& base, Dtype dtype, const std::vector<std::uint64_t>& by,
             std::mt19937_64& random) {
    Buffer block = base;
    const std::size_t item = item_bytes(dtype);
    for (std::size_t i = 0; i < block.size(); i += item) {
        std::uint64_t word = 0;
        std::memcpy(&word, &block[i], item);
        word += by[random() % by.size()];
        std::memcpy(&block[i], &word, item);
    }
    return block;
}

// Two blocks of one batch that need as many bits, so that the second would be planned as the first
// was: a narrow one, and one with few differences, which are larger than a narrow dtype has.
void check_batch(Dtype narrow, Dtype wide, bool narrow_first, unsigned n_differences,
                 std::mt19937_64& random) {
    std::vector<std::uint64_t> small(n_differences);
    std::vector<std::uint64_t> large(n_differences);
    for (unsigned i = 0; i < n_differences; ++i) {
        small[i] = i + 1;
        large[i] = random() >> (67 - 8 * item_bytes(wide)) | 1;
    }
    const Buffer values = as_dtype(normal(64 * 64, 0.02, random), narrow);
    const Buffer base = as_dtype(as_doubles(values, narrow), wide);
    Buffer first = as_dtype(as_doubles(moved(values, narrow, small, random), narrow), wide);
    Buffer second = moved(base, wide, large, random);
    if (!narrow_first) first.swap(second);
    Buffer blocks = first;
    blocks.insert(blocks.end(), second.begin(), second.end());

    const auto limit = static_cast<std::int64_t>(base.size());
    const std::vector<std::int64_t> of_base{0, 0};
    Buffer arena(2 * base.size());
    std::vector<std::int64_t> offsets(2);
    std::vector<EncodedBlock> encoded(2);
    static_cast<void>(encode_deltas(matrix(blocks, 128, 64, wide), {128, 64, 64, 64},
                                    std::vector<std::int64_t>{0, 1},
                                    {matrix(base, 64, 64, wide), {64, 64, 64, 64}, of_base},
                                    std::vector<std::int64_t>{limit, limit}, std::nullopt,
                                    {at(arena), arena.size()}, offsets, encoded, 1));
    for (std::size_t i = 0; i < 2; ++i) {
        CHECK(encoded[i].length > 0);
        const auto from = arena.begin() + offsets[i];
        const Encoded delta{{from, from + encoded[i].length}, encoded[i].encoding};
        CHECK(decode(delta, view(base, 64, 64, wide), wide) == (i == 0 ? first : second));
    }
}

TEST(narrow_blocks_and_others_of_one_batch_come_back) {
    std::mt19937_64 random(10);
    for (unsigned n_differences = 80; n_differences <= 180; n_differences += 5) {
        for (const bool narrow_first : {false, true}) {
            check_batch(Dtype::bf16, Dtype::f32, narrow_first, n_differences, random);
            check_batch(Dtype::f32, Dtype::f64, narrow_first, n_differences, random);
        }
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
