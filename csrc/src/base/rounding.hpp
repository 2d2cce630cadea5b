// SPDX-License-Identifier: Apache-2.0
// Quotients and multiples, rounded up, and even parts. What is added on the way must not overflow.
#pragma once

#include <algorithm>
#include <cstddef>

namespace pydedup::detail {

/// The least n with n * b >= a.
[[nodiscard]] constexpr std::size_t ceil_div(std::size_t a, std::size_t b) noexcept {
    return (a + b - 1) / b;
}

/// The least multiple of `to` that is not below `value`.
[[nodiscard]] constexpr std::size_t round_up(std::size_t value, std::size_t to) noexcept {
    return ceil_div(value, to) * to;
}

/// Where part i of `count` begins, which is cut into so many as even as can be, the larger ones
/// first; of i = parts, its end.
[[nodiscard]] constexpr std::size_t even_part(std::size_t count, std::size_t parts,
                                              std::size_t i) noexcept {
    return i * (count / parts) + std::min(i, count % parts);
}

}  // namespace pydedup::detail
