// SPDX-License-Identifier: Apache-2.0
// Binary logarithms in fixed point, from integers alone: estimates that decide what is written must
// not depend on a math library. Private to codec/.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace pydedup::detail {

inline constexpr unsigned kLogBits = 12;  ///< behind the point

namespace logarithm {

constexpr std::uint32_t kKnown = 4096;

// Squares the mantissa once per bit.
constexpr std::uint32_t compute(std::uint32_t value) noexcept {
    const auto whole = static_cast<unsigned>(std::bit_width(value)) - 1;
    std::uint64_t mantissa = std::uint64_t{value} << (31 - whole);  // 1.31 bits
    std::uint32_t result = whole;
    for (unsigned i = 0; i < kLogBits; ++i) {
        mantissa = mantissa * mantissa >> 31;
        result <<= 1;
        if (mantissa >> 32 != 0) {
            mantissa >>= 1;
            result |= 1;
        }
    }
    return result;
}

constexpr std::array<std::uint32_t, kKnown + 1> make_table() noexcept {
    std::array<std::uint32_t, kKnown + 1> table{};
    for (std::uint32_t value = 1; value <= kKnown; ++value) table[value] = compute(value);
    return table;
}

inline constexpr auto kTable = make_table();

}  // namespace logarithm

/// log2(value) << kLogBits, rounded down (further down for large values); 0 of 0.
[[nodiscard]] inline std::uint32_t log2_fixed(std::uint32_t value) noexcept {
    if (value <= logarithm::kKnown) return logarithm::kTable[value];
    const auto shift = static_cast<unsigned>(std::bit_width(value)) - 12;
    return logarithm::kTable[value >> shift] + (shift << kLogBits);
}

/// value * log2(value) << kLogBits.
[[nodiscard]] inline std::uint64_t value_log2(std::uint32_t value) noexcept {
    return std::uint64_t{value} * log2_fixed(value);
}

}  // namespace pydedup::detail
