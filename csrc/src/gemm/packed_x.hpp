// SPDX-License-Identifier: Apache-2.0
// x, packed for tile_nt: cut into strips of columns (one per column of blocks of W), each strip
// into tiles of rows, and in a tile the rows run along the lanes of a vector, `group` columns of
// each. So all that one block is multiplied with lies together. Rows and columns that only fill up
// a tile are zero.
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
    std::size_t row0;   ///< first row of x
    std::size_t rows;   ///< rows of x in it, at most kernel->width
    std::size_t lane0;  ///< lanes of the tiles before it

    [[nodiscard]] std::size_t lanes() const noexcept { return kernel->width * kernel->group; }
};

/// Cuts m rows into tiles, widest first. A wider tile is taken when it wastes at most a quarter.
template <class T>
std::vector<RowTile<T>> cut_rows(std::size_t m, const GemmKernelsOf<T>& kernels) {
    std::vector<RowTile<T>> tiles;
    std::size_t row = 0;
    std::size_t lane = 0;
    while (row < m) {
        const std::size_t left = m - row;
        const auto* pick = &kernels.tiles[0];
        for (const auto& tile : kernels.tiles) {
            if (tile.width == 0) break;
            pick = &tile;
            if (4 * left >= 3 * tile.width) break;
        }
        tiles.push_back({pick, row, std::min(left, pick->width), lane});
        row += tiles.back().rows;
        lane += tiles.back().lanes();
    }
    return tiles;
}

template <class T>
class PackedX {
  public:
    PackedX(const T* x, std::size_t m, std::size_t cols, std::size_t strip,
            const GemmKernelsOf<T>& kernels, unsigned threads)
        : cols_(cols), strip_(std::min(strip, cols)), tiles_(cut_rows(m, kernels)) {
        const std::size_t strips = (cols + strip_ - 1) / strip_;
        places_.reserve(2 * tiles_.size() + 2);
        for (const std::size_t width : {strip_, cols - (strips - 1) * strip_}) {
            std::size_t place = 0;
            for (const RowTile<T>& tile : tiles_) {
                places_.push_back(place);
                place += groups(width, tile) * tile.lanes();
            }
            places_.push_back(place);
        }
        packed_ = AlignedArray<T>((strips - 1) * strip_elements() + places_.back());
        parallel_for(strips, 1, threads, [&](std::size_t begin, std::size_t end) {
            for (std::size_t s = begin; s < end; ++s) {
                for (std::size_t t = 0; t < tiles_.size(); ++t) pack(x, s, t);
            }
        });
    }

    [[nodiscard]] std::size_t n_tiles() const noexcept { return tiles_.size(); }
    [[nodiscard]] const RowTile<T>& tile(std::size_t t) const noexcept { return tiles_[t]; }

    /// Lanes of the tiles before tile t, which may be n_tiles().
    [[nodiscard]] std::size_t lanes_before(std::size_t t) const noexcept {
        if (t < tiles_.size()) return tiles_[t].lane0;
        return tiles_.empty() ? 0 : tiles_.back().lane0 + tiles_.back().lanes();
    }

    /// Tile t of strip s from its column c on, a multiple of the tile's group.
    [[nodiscard]] T* at(std::size_t s, std::size_t t, std::size_t c) const noexcept {
        const bool is_last = cols_ - s * strip_ <= strip_;
        return packed_.data() + s * strip_elements() +
               places_[t + (is_last ? tiles_.size() + 1 : 0)] + c * tiles_[t].kernel->width;
    }

    /// Where tile t of strip s ends.
    [[nodiscard]] const T* end_of(std::size_t s, std::size_t t) const noexcept {
        const bool is_last = cols_ - s * strip_ <= strip_;
        return packed_.data() + s * strip_elements() +
               places_[t + 1 + (is_last ? tiles_.size() + 1 : 0)];
    }

  private:
    [[nodiscard]] static std::size_t groups(std::size_t width, const RowTile<T>& tile) noexcept {
        return (width + tile.kernel->group - 1) / tile.kernel->group;
    }

    // Elements of a strip of full width.
    [[nodiscard]] std::size_t strip_elements() const noexcept { return places_[tiles_.size()]; }

    // A cache line of columns at a time: rows of x may lie a power of two apart, and one element
    // of each would evict the next one's line.
    void pack(const T* x, std::size_t s, std::size_t t) const noexcept {
        constexpr std::size_t kStep = 64 / sizeof(T);
        const RowTile<T>& tile = tiles_[t];
        const std::size_t group = tile.kernel->group;
        const std::size_t width = std::min(strip_, cols_ - s * strip_);
        T* const to = at(s, t, 0);
        if (width % group != 0 || tile.rows < tile.kernel->width) {
            std::fill_n(to, groups(width, tile) * tile.lanes(), T{0});
        }
        for (std::size_t c0 = 0; c0 < width; c0 += kStep) {
            const std::size_t c1 = std::min(width, c0 + kStep);
            for (std::size_t i = 0; i < tile.rows; ++i) {
                const T* const from = x + (tile.row0 + i) * cols_ + s * strip_;
                T* const row = to + i * group;
                if (group == 1) {
                    for (std::size_t c = c0; c < c1; ++c) row[c * tile.lanes()] = from[c];
                    continue;
                }
                for (std::size_t c = c0; c < c1; c += group) {
                    std::copy(from + c, from + std::min(c1, c + group),
                              row + c * tile.kernel->width);
                }
            }
        }
    }

    std::size_t cols_;
    std::size_t strip_;
    std::vector<RowTile<T>> tiles_;
    // Where the tiles of a strip of full width begin, and its end; the same for the last strip.
    std::vector<std::size_t> places_;
    AlignedArray<T> packed_;
};

}  // namespace pydedup::detail
