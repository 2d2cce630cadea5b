// SPDX-License-Identifier: Apache-2.0
// A product of many rows of x, turned: W is packed in pairs, as x is elsewhere (packed_x.hpp), and
// rows of x are read as they lie. So sums are rows of y, not columns. What is multiplied with what,
// and added in which order, is the same in both ways, to the bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/weights.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup::detail {

class TurnedProduct {
  public:
    /// y in f32, or nullptr: then it is wanted in bf16, and goes there.
    TurnedProduct(const Matmul::Problem& problem, const GemmKernels& kernels, float* y,
                  unsigned threads);

    /// Whether it can be, and gains: W is packed for each chunk of rows of x, but not x, nor are
    /// sums turned round.
    [[nodiscard]] bool gains() const noexcept { return chunk_ != 0; }

    /// The first rows of x, all that fill tiles of the widest kind. Others are summed up in another
    /// order, of which so few are left.
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

    /// A chunk by a group. Sets `subnormal`, and is done, where a number of x is; also done if it
    /// is set.
    void multiply(std::size_t chunk, std::size_t group, std::span<const BlockView> blocks,
                  WeightReader<float>& reader, Scratch<std::uint16_t>& packed, Scratch<float>& sums,
                  std::atomic<bool>& subnormal) const;

  private:
    // Some columns of y: the weights for them, all columns of W in pairs.
    struct Columns {
        std::size_t begin, count;
        std::uint16_t* weights;
    };
    // Rows of x, and of y.
    struct Rows {
        std::size_t begin, count;
    };
    [[nodiscard]] std::vector<Columns> pack(std::span<const BlockView> blocks, std::size_t group,
                                            WeightReader<float>& reader,
                                            Scratch<std::uint16_t>& memory) const;
    // By the tiles that the kernel for strips of rows takes, the first ones: how many they are.
    [[nodiscard]] std::size_t multiply_strip(const Rows& rows, std::size_t end,
                                             std::span<const Columns> tiles,
                                             std::atomic<bool>& subnormal) const;
    [[nodiscard]] const std::uint16_t* x_at(std::size_t row) const noexcept {
        return reinterpret_cast<const std::uint16_t*>(problem_.x) + row * problem_.grid.cols;
    }
    void ask_for_y(const Rows& rows, const Columns& columns) const noexcept;
    void store(const Rows& rows, const Columns& columns, float* sums) const noexcept;

    const Matmul::Problem& problem_;
    const GemmKernels& kernels_;
    const GemmTile<std::uint16_t, float>& tile_;
    const float* bias_;
    float* y_;
    std::uint16_t* halves_;
    std::size_t rows_ = 0;
    std::size_t panels_ = 0;  // rows of blocks of a group
    std::size_t chunk_ = 0;   // rows of x of a chunk
};

}  // namespace pydedup::detail
