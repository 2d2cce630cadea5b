// SPDX-License-Identifier: Apache-2.0
// The arithmetic below the delta encodings: it must not depend on a math library or a CPU.
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>

#include "check.hpp"
#include "codec/convert.hpp"
#include "codec/logarithm.hpp"

using namespace pydedup;

namespace {

TEST(logarithms_are_those_of_mathematics) {
    for (std::uint32_t value = 1; value < 100000; value = value * 3 / 2 + 1) {
        const double want = std::log2(static_cast<double>(value)) * 4096;
        const double got = detail::log2_fixed(value);
        CHECK(got <= want + 1e-6 && got > want - 8);
    }
}

TEST(conversions_round_once_to_nearest_even) {
    std::mt19937_64 random(10);
    for (int round = 0; round < 200000; ++round) {
        // Mostly around halves of f16, bf16 and f32.
        std::uint64_t bits = random();
        if (round % 4 != 0) bits &= ~0ULL << (random() % 48);
        const double value = std::bit_cast<double>(bits);
        if (std::isnan(value)) continue;
        std::uint32_t single = 0;
        detail::convert_floats(reinterpret_cast<const std::uint8_t*>(&value), Dtype::f64, 1,
                               reinterpret_cast<std::uint8_t*>(&single), Dtype::f32);
        CHECK(single == std::bit_cast<std::uint32_t>(static_cast<float>(value)));
        double back = 0;
        detail::convert_floats(reinterpret_cast<const std::uint8_t*>(&single), Dtype::f32, 1,
                               reinterpret_cast<std::uint8_t*>(&back), Dtype::f64);
        CHECK(back == static_cast<double>(std::bit_cast<float>(single)));
    }
    for (std::uint32_t half = 0; half < 0x10000; ++half) {
        for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
            const auto word = static_cast<std::uint16_t>(half);
            std::uint32_t single = 0;
            std::uint16_t again = 0;
            detail::convert_floats(reinterpret_cast<const std::uint8_t*>(&word), dtype, 1,
                                   reinterpret_cast<std::uint8_t*>(&single), Dtype::f32);
            const float value = std::bit_cast<float>(single);
            detail::convert_floats(reinterpret_cast<const std::uint8_t*>(&single), Dtype::f32, 1,
                                   reinterpret_cast<std::uint8_t*>(&again), dtype);
            if (!std::isnan(value)) CHECK(again == word);
            if (dtype == Dtype::bf16 && !std::isnan(value)) CHECK(single == half << 16);
        }
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
