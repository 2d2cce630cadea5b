// SPDX-License-Identifier: Apache-2.0
#include "codec/transposed.hpp"

#include <algorithm>
#include <cstring>

namespace pydedup::detail {
namespace {

// Elements of a tile's side: its lines, and those that it is written to, stay in the first cache.
constexpr std::size_t kTile = 16;

template <std::size_t kItem>
void transpose_items(const std::uint8_t* from, std::size_t rows, std::size_t cols,
                     std::uint8_t* to) noexcept {
    for (std::size_t top = 0; top < rows; top += kTile) {
        const std::size_t bottom = std::min(top + kTile, rows);
        for (std::size_t left = 0; left < cols; left += kTile) {
            const std::size_t right = std::min(left + kTile, cols);
            for (std::size_t col = left; col < right; ++col) {
                for (std::size_t row = top; row < bottom; ++row) {
                    std::memcpy(to + (col * rows + row) * kItem, from + (row * cols + col) * kItem,
                                kItem);
                }
            }
        }
    }
}

}  // namespace

void transpose(const std::uint8_t* from, std::size_t rows, std::size_t cols, std::size_t item_bytes,
               std::uint8_t* to) noexcept {
    switch (item_bytes) {
        case 1:
            return transpose_items<1>(from, rows, cols, to);
        case 2:
            return transpose_items<2>(from, rows, cols, to);
        case 4:
            return transpose_items<4>(from, rows, cols, to);
        default:
            return transpose_items<8>(from, rows, cols, to);
    }
}

}  // namespace pydedup::detail
