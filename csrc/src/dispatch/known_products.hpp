// SPDX-License-Identifier: Apache-2.0
// Numbers and questions that products, sums of rows and bf16 share. Private to dispatch/.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/gemm_kernels.hpp"

namespace pydedup {

using Question = std::span<const std::uint8_t>;  // 700 bytes

inline constexpr std::size_t kXRows = 9;
inline constexpr std::size_t kWRows = 23;  // tiles of eight rows, one of four, and single ones
inline constexpr std::size_t kCols = 87;   // four vectors of AVX-512, one, and a tail

template <class T>
struct Products {
    std::array<T, kXRows * kCols> x{};
    std::array<T, kWRows * kCols> w{};

    explicit Products(Question question) noexcept {
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<T>(question[i % question.size()] % 15) - T{7};
        }
        for (std::size_t i = 0; i < w.size(); ++i) {
            w[i] = static_cast<T>(question[(i + 200) % question.size()] % 13) - T{6};
        }
    }
};

// As many columns as x fills and w has, the last group of them in part, `Rows` rows: whole register
// tiles and single rows, with and without what comes next.
template <std::size_t Rows, class E, class A>
bool multiply_tiles(
    std::span<const GemmTile<E, A>> tiles, std::span<const E> x, std::span<const E> w,
    A (*value)(E) = [](E e) { return A{e}; }) noexcept {
    const std::size_t ldw = w.size() / Rows;
    for (const GemmTile<E, A>& tile : tiles) {
        if (tile.width == 0) break;
        const std::size_t sums = tile.sums();
        const std::size_t filled = x.size() / (tile.width * tile.group) * tile.group;
        const std::size_t cols = std::min(filled - (tile.group > 1 ? 1 : 0), ldw);
        if (tile.width * sums > 64 || cols == 0) return false;
        std::array<A, Rows * 64> plain{};
        std::array<A, Rows * 64> ahead{};
        tile.tile_nt(x.data(), w.data(), Rows, cols, ldw, {}, plain.data());
        tile.tile_nt(x.data(), w.data(), Rows, cols, ldw,
                     {w.data(), w.data() + w.size(), x.data(), x.data() + x.size()}, ahead.data());
        std::array<A, Rows * 64> want{};
        for (std::size_t r = 0; r < Rows; ++r) {
            A* const to = &want[r * tile.width * sums];
            for (std::size_t c = 0; c < cols; ++c) {
                const std::size_t in_group = c % tile.group;
                const E* const column = &x[(c - in_group) * tile.width + in_group];
                const A weight = value(w[r * ldw + c]);
                for (std::size_t i = 0; i < tile.width; ++i) {
                    to[i * sums + in_group / tile.per_sum] +=
                        value(column[i * tile.group]) * weight;
                }
            }
        }
        if (plain != want || ahead != want) return false;
    }
    return true;
}

}  // namespace pydedup
