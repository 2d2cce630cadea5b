// SPDX-License-Identifier: Apache-2.0
// Tiles of a gathered image (image_tiles.hpp) whose numbers are bf16 numbers, in pairs of columns
// for products with bf16 weights (AMX; GemmTile::tile_nt_pieces). Of one thread.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
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
        return tile.tile_nt_pieces != nullptr && tile.width == plain.width && tile.group == 2 &&
               tile.sums() == 1;
    }

    /// Takes an image of so many tiles and columns.
    void take(const float* image, std::size_t tiles, std::size_t columns, std::size_t width) {
        tiles_ = tiles;
        width_ = width;
        of_tile_ = round_up(columns, 2) * width;
        auto* to = pairs_.at_least(tiles * of_tile_ / 2);
        for (std::size_t t = 0; t < tiles; ++t) {
            for (std::size_t c = 0; c < columns; c += 2, image += 2 * width, to += width) {
                if (c + 1 == columns) {
                    for (std::size_t i = 0; i < width; ++i) to[i] = bits(image[i]) >> 16;
                    image -= width;
                    continue;
                }
                for (std::size_t i = 0; i < width; ++i) {
                    to[i] = bits(image[i]) >> 16 | (bits(image[width + i]) & 0xFFFF0000U);
                }
            }
        }
    }

    /// Adds to sums (tiles x rows x width) the products of at most kMaxGemmPieces blocks.
    void multiply(const GemmKernels& kernels, std::span<const HalfWeights> blocks, std::size_t rows,
                  float* sums) {
        GemmPiece<std::uint16_t> pieces[kMaxGemmPieces];
        const auto* const x = reinterpret_cast<const std::uint16_t*>(pairs_.at_least(0));
        for (std::size_t t = 0; t < tiles_; ++t) {
            for (std::size_t i = 0; i < blocks.size(); ++i) {
                const HalfWeights& w = blocks[i];
                const auto* const of_block = x + t * of_tile_ + w.column * width_;
                pieces[i] = {of_block, w.begin, w.cols, w.cols, nullptr};
            }
            kernels.bf16.tiles[0].tile_nt_pieces(pieces, blocks.size(), rows, false,
                                                 sums + t * rows * width_);
        }
    }

  private:
    [[nodiscard]] static std::uint32_t bits(float value) noexcept {
        return std::bit_cast<std::uint32_t>(value);
    }

    std::size_t tiles_ = 0;
    std::size_t width_ = 0;
    std::size_t of_tile_ = 0;       // elements of a tile
    Scratch<std::uint32_t> pairs_;  // an even column in the lower half, the next one in the upper
};

}  // namespace pydedup::detail
