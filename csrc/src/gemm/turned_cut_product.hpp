// SPDX-License-Identifier: Apache-2.0
// A product of many rows of x in f32, both factors cut into bf16 numbers (AMX), turned as
// turned_product.hpp has it: W is packed and cut, rows of x are cut as they are multiplied. What is
// multiplied with what, and added in which order, is the same as where x is packed, to the bit.
//
// W comes in groups of rows of blocks. All threads pack a group, then all multiply with it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>

#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/weights.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup::detail {

class TurnedCutProduct {
  public:
    /// Some rows of x, and of y.
    struct Rows {
        std::size_t begin, count;
    };

    /// x and y in f32; y is nullptr where it is not.
    TurnedCutProduct(const Matmul::Problem& problem, const GemmKernels& kernels, const float* x,
                     float* y, unsigned threads);

    /// Whether it can be, and gains.
    [[nodiscard]] bool gains() const noexcept { return panels_ != 0; }

    [[nodiscard]] std::size_t groups() const noexcept {
        return ceil_div(problem_.grid.grid_rows(), panels_);
    }
    /// Rows of blocks of a group: the first, and behind the last.
    [[nodiscard]] std::pair<std::size_t, std::size_t> panels(std::size_t group) const noexcept {
        return {group * panels_, std::min((group + 1) * panels_, problem_.grid.grid_rows())};
    }
    /// Elements of the largest group, packed.
    [[nodiscard]] std::size_t packed_elements() const noexcept {
        return panels_ * tiles_of_panel() * elements_of_tile();
    }
    /// Cuts and packs a block to where its group begins. False, and nothing of use, where some of
    /// it cannot be cut.
    [[nodiscard]] bool pack(const BlockView& block, std::size_t number, std::size_t group,
                            WeightReader<float>& reader, std::uint16_t* packed) const;

    /// The rows of x, all that fill tiles of the widest kind, in chunks. Others are summed up in
    /// another order.
    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::size_t chunks() const noexcept { return ceil_div(rows_, chunk_); }
    [[nodiscard]] Rows rows_of(std::size_t chunk) const noexcept {
        const std::size_t begin = chunk * chunk_;
        return {begin, std::min(chunk_, rows_ - begin)};
    }
    /// Rows of x by a group that is packed. Rows that cannot be cut are given to `otherwise`.
    void multiply(const Rows& rows, std::size_t group, const std::uint16_t* packed,
                  Scratch<std::uint16_t>& strips,
                  const std::function<void(const Rows&)>& otherwise) const;

  private:
    [[nodiscard]] std::size_t elements_of_tile() const noexcept {
        return ceil_div(problem_.grid.cols, kCutColumns) * kTurnedCutStep;
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
    std::size_t panels_ = 0;  // rows of blocks of a group
    std::size_t rows_ = 0;
    std::size_t chunk_ = 0;
};

}  // namespace pydedup::detail
