// SPDX-License-Identifier: Apache-2.0
// Rows to columns, for packing x and for taking sums out of tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

namespace pydedup::detail {

namespace transposing {

// Any machine this runs on has vectors of four floats.
using Four = float __attribute__((vector_size(16)));

inline Four load(const float* from) noexcept {
    Four four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

inline void store(float* to, Four four) noexcept { std::memcpy(to, &four, sizeof four); }

inline void four_by_four(const float* from, std::size_t ld_from, float* to,
                         std::size_t ld_to) noexcept {
    const Four a = load(from);
    const Four b = load(from + ld_from);
    const Four c = load(from + 2 * ld_from);
    const Four d = load(from + 3 * ld_from);
    const Four ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    store(to + ld_to, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    store(to + 2 * ld_to, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
    store(to + 3 * ld_to, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

}  // namespace transposing

/// to[c * ld_to + r] = from[r * ld_from + c], for r < rows and c < cols. By cache lines of `from`,
/// all of whose rows may lie a power of two apart.
template <class T>
void transpose(const T* from, std::size_t ld_from, std::size_t rows, std::size_t cols, T* to,
               std::size_t ld_to) noexcept {
    constexpr std::size_t kLine = 64 / sizeof(T);
    for (std::size_t c0 = 0; c0 < cols; c0 += kLine) {
        const std::size_t c1 = std::min(cols, c0 + kLine);
        std::size_t r = 0;
        if constexpr (std::is_same_v<T, float>) {
            const std::size_t fours = c0 + (c1 - c0) / 4 * 4;
            for (; r + 4 <= rows; r += 4) {
                for (std::size_t c = c0; c < fours; c += 4) {
                    transposing::four_by_four(from + r * ld_from + c, ld_from, to + c * ld_to + r,
                                              ld_to);
                }
                for (std::size_t c = fours; c < c1; ++c) {
                    for (std::size_t k = 0; k < 4; ++k) {
                        to[c * ld_to + r + k] = from[(r + k) * ld_from + c];
                    }
                }
            }
        }
        for (; r < rows; ++r) {
            for (std::size_t c = c0; c < c1; ++c) to[c * ld_to + r] = from[r * ld_from + c];
        }
    }
}

}  // namespace pydedup::detail
