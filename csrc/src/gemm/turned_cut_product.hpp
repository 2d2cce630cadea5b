// SPDX-License-Identifier: Apache-2.0
// A product of many rows of x in f32, both factors cut into bf16 numbers (AMX), turned as
// turned_product.hpp has it: W is packed and cut, rows of x are cut as they are multiplied. What is
// multiplied with what, and added in which order, is the same as where x is packed, to the bit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/weights.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup::detail {

class TurnedCutProduct {
  public:
    /// Multiplies rows of x, the first and how many, with a group in the other way.
    using Otherwise = std::function<void(std::size_t row, std::size_t rows)>;

    /// x and y in f32; y is nullptr where it is not.
    TurnedCutProduct(const Matmul::Problem& problem, const GemmKernels& kernels, const float* x,
                     float* y, unsigned threads);

    /// Whether it can be, and gains.
    [[nodiscard]] bool gains() const noexcept { return chunk_ != 0; }

    /// The first rows of x, all that fill tiles of the widest kind. Others are summed up in another
    /// order.
    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    /// Those in chunks, by groups of rows of blocks.
    [[nodiscard]] std::size_t chunks() const noexcept { return ceil_div(rows_, chunk_); }
    [[nodiscard]] std::size_t groups() const noexcept {
        return ceil_div(problem_.grid.grid_rows(), panels_);
    }
    /// Rows of blocks of a group: the first, and behind the last.
    [[nodiscard]] std::pair<std::size_t, std::size_t> panels(std::size_t group) const noexcept {
        return {group * panels_, std::min((group + 1) * panels_, problem_.grid.grid_rows())};
    }

    /// A chunk by a group. Rows of x that cannot be cut are given to `otherwise`, or all, if the
    /// group cannot be.
    void multiply(std::size_t chunk, std::size_t group, std::span<const BlockView> blocks,
                  WeightReader<float>& reader, Scratch<std::uint16_t>& packed,
                  Scratch<std::uint16_t>& strips, const Otherwise& otherwise) const;

  private:
    // Rows of x, up to `end`, some columns of W and x, and their number.
    struct Part {
        std::size_t row, end, column, columns;
    };
    // Cuts and packs so many columns of the group. Whether all of it can be cut.
    [[nodiscard]] bool pack(std::span<const BlockView> blocks, std::size_t group, const Part& part,
                            WeightReader<float>& reader, std::uint16_t* to) const;
    // Adds a part to y, and marks strips of x that cannot be cut; those that are marked do not
    // count.
    void multiply_part(const Part& part, std::size_t group, const std::uint16_t* packed,
                       Scratch<std::uint16_t>& strips, std::vector<bool>& uncut) const;
    [[nodiscard]] static std::size_t elements_of_tile(std::size_t columns) noexcept {
        return ceil_div(columns, kCutColumns) * kTurnedCutStep;
    }
    [[nodiscard]] std::size_t tiles_of_panel() const noexcept {
        const BlockGrid& grid = problem_.grid;
        return ceil_div(std::min<std::size_t>(grid.block_rows, grid.rows), kTurnedRows);
    }

    const Matmul::Problem& problem_;
    const Bf16GemmKernels& kernels_;
    const float* x_;
    const float* bias_;
    float* y_;
    std::size_t rows_ = 0;
    std::size_t panels_ = 0;  // rows of blocks of a group
    std::size_t chunk_ = 0;   // rows of x of a chunk
    std::size_t pass_ = 0;    // columns that are multiplied one after another
};

}  // namespace pydedup::detail
