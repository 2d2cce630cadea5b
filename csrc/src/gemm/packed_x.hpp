// SPDX-License-Identifier: Apache-2.0
// x, packed for tile_nt: cut into strips of columns (one per column of blocks of W), each strip
// into tiles of rows, and in a tile the rows run along the lanes of a vector. So all that one block
// is multiplied with lies together. Rows that only fill up the last tile are zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/parallel.hpp"
#include "gemm/aligned_array.hpp"
#include "kernels/gemm_kernels.hpp"

namespace pydedup::detail {

template <class T>
struct RowTile {
    const typename GemmKernelsOf<T>::Tile* kernel;
    std::size_t
        row0;  ///< first row of x; also the lanes before this tile, as only the last is padded
    std::size_t rows;  ///< rows of x in it, at most kernel->width
};

/// Cuts m rows into tiles, widest first. A wider tile is taken when it wastes at most a quarter.
template <class T>
std::vector<RowTile<T>> cut_rows(std::size_t m, const GemmKernelsOf<T>& kernels) {
    std::vector<RowTile<T>> tiles;
    std::size_t row = 0;
    while (row < m) {
        const std::size_t left = m - row;
        const auto* pick = &kernels.tiles[0];
        for (const auto& tile : kernels.tiles) {
            if (tile.width == 0) break;
            pick = &tile;
            if (4 * left >= 3 * tile.width) break;
        }
        tiles.push_back({pick, row, std::min(left, pick->width)});
        row += tiles.back().rows;
    }
    return tiles;
}

template <class T>
class PackedX {
  public:
    PackedX(const T* x, std::size_t m, std::size_t cols, std::size_t strip,
            const GemmKernelsOf<T>& kernels, unsigned threads)
        : cols_(cols), strip_(std::min(strip, cols)), tiles_(cut_rows(m, kernels)) {
        packed_ = AlignedArray<T>(cols * lanes_before(tiles_.size()));
        const std::size_t strips = (cols + strip_ - 1) / strip_;
        parallel_for(strips, 1, threads, [&](std::size_t begin, std::size_t end) {
            for (std::size_t s = begin; s < end; ++s) {
                for (std::size_t t = 0; t < tiles_.size(); ++t) pack(x, s, t);
            }
        });
    }

    [[nodiscard]] std::size_t n_tiles() const noexcept { return tiles_.size(); }
    [[nodiscard]] const RowTile<T>& tile(std::size_t t) const noexcept { return tiles_[t]; }

    /// Lanes of the tiles before tile t, padding included; t may be n_tiles().
    [[nodiscard]] std::size_t lanes_before(std::size_t t) const noexcept {
        if (t < tiles_.size()) return tiles_[t].row0;
        return tiles_.empty() ? 0 : tiles_.back().row0 + tiles_.back().kernel->width;
    }

    /// Tile t of strip s from its column c on: width elements per column.
    [[nodiscard]] T* at(std::size_t s, std::size_t t, std::size_t c) const noexcept {
        const std::size_t width = std::min(strip_, cols_ - s * strip_);
        return packed_.data() + s * strip_ * lanes_before(tiles_.size()) + tiles_[t].row0 * width +
               c * tiles_[t].kernel->width;
    }

  private:
    // A cache line of columns at a time: rows of x may lie a power of two apart, and one element
    // of each would evict the next one's line.
    void pack(const T* x, std::size_t s, std::size_t t) const noexcept {
        constexpr std::size_t kStep = 64 / sizeof(T);
        const RowTile<T>& tile = tiles_[t];
        const std::size_t lanes = tile.kernel->width;
        const std::size_t width = std::min(strip_, cols_ - s * strip_);
        T* const to = at(s, t, 0);
        for (std::size_t c0 = 0; c0 < width; c0 += kStep) {
            const std::size_t c1 = std::min(width, c0 + kStep);
            for (std::size_t i = 0; i < tile.rows; ++i) {
                const T* const from = x + (tile.row0 + i) * cols_ + s * strip_;
                for (std::size_t c = c0; c < c1; ++c) to[c * lanes + i] = from[c];
            }
            for (std::size_t i = tile.rows; i < lanes; ++i) {
                for (std::size_t c = c0; c < c1; ++c) to[c * lanes + i] = T{0};
            }
        }
    }

    std::size_t cols_;
    std::size_t strip_;
    std::vector<RowTile<T>> tiles_;
    AlignedArray<T> packed_;
};

}  // namespace pydedup::detail
