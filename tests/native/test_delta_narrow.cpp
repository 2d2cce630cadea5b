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

}  // namespace

PYDEDUP_TEST_MAIN
