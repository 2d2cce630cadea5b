// SPDX-License-Identifier: Apache-2.0
// Tiles of a gathered image (image_tiles.hpp) whose numbers are bf16 numbers, in pairs of columns
// for products with bf16 weights. Of one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/rounding.hpp"
#include "gemm/ahead.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/image_tiles.hpp"
#include "kernels/gemm_kernels.hpp"

namespace pydedup::detail {

/// A block of W from one of its rows on, and where the gathered image has its first column.
struct HalfWeights {
    const std::uint16_t* begin;
    std::size_t cols, column;
};

class PairImage {
  public:
    /// Whether it can take the place of `plain`, if all of the image are bf16 numbers.
    [[nodiscard]] static bool fits(const GemmKernels& kernels,
                                   const GemmTile<float, float>& plain) noexcept {
        const auto& tile = kernels.bf16.tiles[0];
        return tile.width == plain.width && tile.group == 2 && tile.sums() == 1;
    }

    /// Gathers columns [c0, c1) of `group`.
    void gather(const ImageTiles& image, const std::uint16_t* x, std::size_t group, std::size_t c0,
                std::size_t c1, PositionRuns& positions, std::size_t width) {
        tiles_ = positions.tiles;
        width_ = width;
        of_tile_ = round_up(c1 - c0, 2) * width;
        image.gather_pairs(x, group, c0, c1, positions, pairs_.at_least(tiles_ * of_tile_));
    }

    /// Adds to sums (tiles x rows x width) the products of at most kMaxGemmPieces blocks, while
    /// memory is asked for what is next.
    void multiply(const GemmKernels& kernels, std::span<const HalfWeights> blocks, std::size_t rows,
                  const GemmNext<std::uint16_t>& next, float* sums) {
        const auto& tile = kernels.bf16.tiles[0];
        if (tile.tile_nt_pieces == nullptr) {
            for (std::size_t i = 0; i < blocks.size(); ++i) {
                const bool is_last = i + 1 == blocks.size();
                multiply_block(tile, blocks[i], rows, is_last ? next : next_of(blocks[i + 1], rows),
                               sums);
            }
            return;
        }
        GemmPiece<std::uint16_t> pieces[kMaxGemmPieces];
        for (std::size_t t = 0; t < tiles_; ++t) {
            for (std::size_t i = 0; i < blocks.size(); ++i) {
                const HalfWeights& w = blocks[i];
                pieces[i] = {at(t, w.column), w.begin, w.cols, w.cols, nullptr};
            }
            tile.tile_nt_pieces(pieces, blocks.size(), rows, false, sums + t * rows * width_);
        }
    }

  private:
    using Tile = GemmTile<std::uint16_t, float>;
    // Columns of a block that one pass of a tile covers: 32 lanes for them fill half of a 32 KiB
    // first-level cache.
    static constexpr std::size_t kPass = 256;

    void multiply_block(const Tile& tile, const HalfWeights& w, std::size_t rows,
                        const GemmNext<std::uint16_t>& next, float* sums) {
        AheadShares<std::uint16_t> ahead(next, tiles_);
        for (std::size_t c = 0; c < w.cols; c += kPass) {
            for (std::size_t t = 0; t < tiles_; ++t) {
                tile.tile_nt(at(t, w.column + c), w.begin + c, rows, std::min(kPass, w.cols - c),
                             w.cols, ahead.take(), sums + t * rows * width_);
            }
        }
    }

    [[nodiscard]] static GemmNext<std::uint16_t> next_of(const HalfWeights& w,
                                                         std::size_t rows) noexcept {
        return {w.begin, w.begin + rows * w.cols};
    }

    // A tile from one of its columns, an even one, on.
    [[nodiscard]] const std::uint16_t* at(std::size_t tile, std::size_t column) {
        return pairs_.at_least(0) + tile * of_tile_ + column * width_;
    }

    std::size_t tiles_ = 0;
    std::size_t width_ = 0;
    std::size_t of_tile_ = 0;  // elements of a tile
    Scratch<std::uint16_t> pairs_;
};

}  // namespace pydedup::detail
