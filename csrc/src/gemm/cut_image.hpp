// SPDX-License-Identifier: Apache-2.0
// Tiles of a gathered image in f32 (image_tiles.hpp), cut into bf16 numbers for products of numbers
// that are cut on both sides (AMX; GemmTile::tile_nt_cut). Of one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/rounding.hpp"
#include "gemm/ahead.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/packed_x.hpp"
#include "kernels/gemm_kernels.hpp"

namespace pydedup::detail {

/// Rows of W, from one of its columns on.
struct WeightRows {
    const float* begin;
    std::size_t rows, ld;
};

class CutImage {
  public:
    /// Whether it can take the place of `plain`, and that pays, for so many positions in all and
    /// blocks of `rows` x `cols`: not few of either, nor where much has to be filled up.
    [[nodiscard]] static bool pays(const GemmKernels& kernels, const GemmTile<float, float>& plain,
                                   std::size_t positions, std::size_t rows,
                                   std::size_t cols) noexcept {
        const auto& tile = kernels.bf16.tiles[0];
        return tile.tile_nt_cut != nullptr && tile.width == plain.width && rows >= kMinRows &&
               positions >= kMinPositions && 4 * cut_elements(rows, cols) <= 5 * rows * cols;
    }

    /// Cuts an image of so many tiles and columns, which has to stay as it is. What can be cut is
    /// found out for each block of columns, not to depend on how many there are.
    void cut(const GemmKernels& kernels, const float* image, std::size_t tiles, std::size_t columns,
             std::size_t block) {
        image_ = image;
        tiles_ = tiles;
        columns_ = columns;
        block_ = block;
        of_tile_ = round_up(columns, 2) * kLanes;
        std::uint16_t* const to = parts_.at_least(kCutParts * tiles * of_tile_);
        uncut_.clear();
        for (std::size_t c = 0; c < columns; c += block) {
            for (std::size_t t = 0; t < tiles; ++t) {
                uncut_.push_back(kernels.bf16.pair_cut(
                    image + (t * columns + c) * kLanes, std::min(block, columns - c),
                    to + t * of_tile_ + c * kLanes, tiles * of_tile_));
            }
        }
    }

    /// Adds to sums (tiles x w.rows x lanes) the products of a block of n columns, while memory is
    /// asked for what is next.
    void multiply(const GemmKernels& kernels, const GemmTile<float, float>& plain,
                  const WeightRows& w, std::size_t column, std::size_t n,
                  const GemmNext<std::uint16_t>& next, float* sums) {
        const auto& tile = kernels.bf16.tiles[0];
        const std::size_t part = cut_elements(w.rows, n);
        std::uint16_t* const cut = cut_.at_least(kCutParts * part);
        const bool is_cut = kernels.bf16.cut_block(w.begin, w.rows, n, w.ld, cut);
        AheadShares<std::uint16_t> ahead(next, tiles_);
        for (std::size_t c = 0; is_cut && c < n; c += kPass) {
            for (std::size_t t = 0; t < tiles_; ++t) {
                tile.tile_nt_cut(parts_.at_least(0) + t * of_tile_ + (column + c) * kLanes,
                                 tiles_ * of_tile_, cut + cut_elements(w.rows, c), part, w.rows,
                                 std::min(kPass, n - c), ahead.take(), sums + t * w.rows * kLanes);
            }
        }
        for (std::size_t t = 0; t < tiles_; ++t) {
            const std::uint32_t lanes =
                is_cut ? uncut_[column / block_ * tiles_ + t] : ~std::uint32_t{0};
            if (lanes == 0) continue;
            float* const apart = apart_.at_least(w.rows * kLanes);
            std::fill_n(apart, w.rows * kLanes, 0.0F);
            plain.tile_nt(image_ + (t * columns_ + column) * kLanes, w.begin, w.rows, n, w.ld, {},
                          apart);
            float* const to = sums + t * w.rows * kLanes;
            for (std::size_t i = 0; i < w.rows * kLanes; ++i) {
                if ((lanes >> i % kLanes & 1U) != 0) to[i] += apart[i];
            }
        }
    }

  private:
    static constexpr std::size_t kLanes = 32;  // of a tile
    static constexpr std::size_t kMinRows = 32;
    static constexpr std::size_t kMinPositions = 112;
    // Columns of a pass: three parts of 32 lanes fill less than half of a 32 KiB first-level cache.
    static constexpr std::size_t kPass = 64;

    const float* image_ = nullptr;
    std::size_t tiles_ = 0;
    std::size_t columns_ = 0;
    std::size_t block_ = 1;
    std::size_t of_tile_ = 0;  // elements of a tile in one part
    Scratch<std::uint16_t> parts_;
    std::vector<std::uint32_t> uncut_;  // by block and tile, lanes that could not be cut: zero here
    Scratch<std::uint16_t> cut_;        // of W
    Scratch<float> apart_;              // sums of those lanes
};

}  // namespace pydedup::detail
