// SPDX-License-Identifier: Apache-2.0
// Rows to columns, for packing x and for taking sums out of tiles.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pydedup::detail {

/// A bf16 number, also one that is kept as a float.
[[nodiscard]] inline std::uint16_t bf16_bits(float value) noexcept {
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}
[[nodiscard]] inline std::uint16_t bf16_bits(std::uint16_t bits) noexcept { return bits; }

namespace transposing {

// Any machine this runs on has vectors of four floats.
using Four = float __attribute__((vector_size(16)));

template <class S>
Four load(const S* from) noexcept {
    Four four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

template <class T>
void store(T* to, Four four) noexcept {
    std::memcpy(to, &four, sizeof four);
}

// Columns of four rows a to d.
template <class T>
void store_columns(Four a, Four b, Four c, Four d, T* to, std::size_t ld_to) noexcept {
    const Four ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    store(to + ld_to, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    store(to + 2 * ld_to, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
    store(to + 3 * ld_to, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

inline void four_by_four(const float* from, std::size_t ld_from, float* to,
                         std::size_t ld_to) noexcept {
    store_columns(load(from), load(from + ld_from), load(from + 2 * ld_from),
                  load(from + 3 * ld_from), to, ld_to);
}

// Eight bf16 numbers, neighbours in one lane.
inline Four four_pairs(const std::uint16_t* from) noexcept { return load(from); }
inline Four four_pairs(const float* from) noexcept {
    using Words = std::uint32_t __attribute__((vector_size(16)));
    const Four low = load(from);
    const Four high = load(from + 4);
    const auto even = reinterpret_cast<Words>(__builtin_shufflevector(low, high, 0, 2, 4, 6));
    const auto odd = reinterpret_cast<Words>(__builtin_shufflevector(low, high, 1, 3, 5, 7));
    return reinterpret_cast<Four>((even >> 16) | (odd & 0xFFFF0000U));
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

/// The same, by cache lines of `to`: for rows of it that may lie a power of two apart.
template <class T>
void transpose_apart(const T* from, std::size_t ld_from, std::size_t rows, std::size_t cols, T* to,
                     std::size_t ld_to) noexcept {
    std::size_t c = 0;
    if constexpr (std::is_same_v<T, float>) {
        for (; c + 4 <= cols; c += 4) {
            std::size_t r = 0;
            for (; r + 4 <= rows; r += 4) {
                transposing::four_by_four(from + r * ld_from + c, ld_from, to + c * ld_to + r,
                                          ld_to);
            }
            for (; r < rows; ++r) {
                for (std::size_t k = 0; k < 4; ++k)
                    to[(c + k) * ld_to + r] = from[r * ld_from + c + k];
            }
        }
    }
    for (; c < cols; ++c) {
        for (std::size_t r = 0; r < rows; ++r) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

/// Pairs of columns of rows of bf16 numbers, or of f32 that are some, by cache lines of `from`:
/// to[c / 2 * ld_to + 2 * r + c % 2] = from[r * ld_from + c], for r < rows and c < cols.
template <class S>
void transpose_pairs(const S* from, std::size_t ld_from, std::size_t rows, std::size_t cols,
                     std::uint16_t* to, std::size_t ld_to) noexcept {
    const auto one_by_one = [=](std::size_t r0, std::size_t r1, std::size_t c0, std::size_t c1) {
        for (std::size_t r = r0; r < r1; ++r) {
            for (std::size_t c = c0; c < c1; ++c) {
                to[c / 2 * ld_to + 2 * r + c % 2] = bf16_bits(from[r * ld_from + c]);
            }
        }
    };
    constexpr std::size_t kLine = 64 / sizeof(S);
    for (std::size_t c0 = 0; c0 < cols; c0 += kLine) {
        const std::size_t c1 = std::min(cols, c0 + kLine);
        const std::size_t eights = c0 + (c1 - c0) / 8 * 8;
        std::size_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            for (std::size_t c = c0; c < eights; c += 8) {
                const S* const at = from + r * ld_from + c;
                // As floats they are only carried.
                transposing::store_columns(
                    transposing::four_pairs(at), transposing::four_pairs(at + ld_from),
                    transposing::four_pairs(at + 2 * ld_from),
                    transposing::four_pairs(at + 3 * ld_from), to + c / 2 * ld_to + 2 * r, ld_to);
            }
            one_by_one(r, r + 4, eights, c1);
        }
        one_by_one(r, rows, c0, c1);
    }
}

}  // namespace pydedup::detail
