// SPDX-License-Identifier: Apache-2.0
// Convolutions whose groups have few output channels, depthwise ones above all: to unfold an image
// for one row of W takes longer than to multiply it. Here each weight of a filter is multiplied
// with the image where it lies, moved by as much as the weight is within the filter.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/conv_impl.hpp"
#include "gemm/weights.hpp"
#include "gemm/workers.hpp"
#include "kernels/rows_kernels.hpp"

namespace pydedup {
namespace detail {

/// One axis of all windows.
struct WindowAxis {
    std::size_t size, before, kernel, stride, dilation, out;

    /// Windows a stride apart see every stride-th element, so elements lie in as many planes: those
    /// that some weight sees, by their place within a stride.
    [[nodiscard]] std::vector<std::size_t> places() const;
    /// Weights between two that see neighbouring elements of a plane; all of them if none do.
    [[nodiscard]] std::size_t neighbours_apart() const noexcept {
        return stride % dilation == 0 ? std::min(stride / dilation, kernel) : kernel;
    }
    /// How far, in strides, the last weight is from the first.
    [[nodiscard]] std::size_t reach() const noexcept { return (kernel - 1) * dilation / stride; }
};

/// How windows of outputs lie in memory, of one channel of one image, with the padding around it: a
/// plane of (rows + reach) x pitch elements for each pair of places. So what a weight sees of all
/// outputs lies one after another, row after row, with what nobody needs at the ends of rows.
class WindowLayout {
  public:
    /// Outputs are cut, so that their windows stay in the first-level cache. None where not even
    /// some of one row would stay in the second.
    [[nodiscard]] static std::optional<WindowLayout> of(const ConvShape& shape,
                                                        std::size_t element_bytes);

    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] std::size_t pitch() const noexcept { return pitch_; }
    /// Elements of a row of the image from one that a weight sees to the next.
    [[nodiscard]] std::size_t stride() const noexcept { return across_.stride; }
    /// The same of a row's first element to that of the next row.
    [[nodiscard]] std::size_t down() const noexcept { return down_.stride * across_.size; }
    [[nodiscard]] std::size_t elements() const noexcept {
        return down_places_.size() * across_places_.size() * plane_;
    }
    /// By weight of the filter, where its first element is.
    [[nodiscard]] const std::vector<std::size_t>& offsets() const noexcept { return offsets_; }
    /// Chains of weights that see neighbouring rows, and how far apart, in weights, these are: the
    /// chain of weight k is k % chains_apart().
    [[nodiscard]] std::size_t chains_apart() const noexcept {
        return down_.neighbours_apart() * across_.kernel;
    }

    /// What of rows of the image, from element `from` of the channel on, is in rows of windows.
    struct Run {
        std::size_t from, to, rows, cols;
    };
    /// All of them, for `rows` rows of outputs from (row0, col0) on.
    void find_runs(std::size_t row0, std::size_t col0, std::size_t rows,
                   std::vector<Run>& runs) const;

  private:
    WindowLayout(const WindowAxis& down, const WindowAxis& across, std::size_t rows,
                 std::size_t cols);

    WindowAxis down_, across_;
    std::vector<std::size_t> down_places_, across_places_;
    std::size_t rows_, cols_;
    std::size_t pitch_, plane_;
    std::vector<std::size_t> offsets_;
};

/// Windows in memory, of one thread.
template <class T>
class Windows {
  public:
    explicit Windows(const WindowLayout& layout);

    /// Has those of `rows` rows of outputs from (row0, col0) on, of a channel x.
    /// bf16 numbers are widened.
    template <class S>
    void fill(const S* x, std::size_t row0, std::size_t col0, std::size_t rows,
              const RowsKernels& kernels);

    /// What weights [begin, end) of the filter see of all outputs, given the first of these
    /// weights.
    [[nodiscard]] const std::vector<WindowChain<T>>& chains(std::size_t begin, std::size_t end,
                                                            const T* weights);

  private:
    static constexpr std::size_t kBeyond = 64 / sizeof(T);  // may be read of the last row

    const WindowLayout& layout_;
    AlignedArray<T> elements_;
    std::vector<WindowChain<T>> chains_;
    std::size_t chains_begin_ = 0, chains_end_ = 0;
    // Of the outputs that were last asked for. Around them the padding is zero already.
    std::vector<WindowLayout::Run> runs_;
    std::size_t row0_ = 0, col0_ = 0;
};

}  // namespace detail

template <class T>
class Conv2d::Direct final : public Conv2d::Impl {
  public:
    /// How windows lie, for a convolution that is faster this way.
    [[nodiscard]] static std::optional<detail::WindowLayout> layout_of(const ConvShape& shape);

    Direct(const Problem& problem, detail::WindowLayout layout);

  protected:
    void convolve(std::span<const BlockView> blocks) override;

  private:
    struct Worker {
        detail::LastBlockReader<T> blocks;
        detail::Windows<T> windows;
        detail::Scratch<T> sums{};
    };
    // Output channels [begin, end) of one image, in one row of blocks.
    struct Task {
        std::size_t panel, image, begin, end;
    };
    // Outputs of one channel.
    struct Part {
        std::size_t row0, col0, rows, cols;
    };
    // Columns of W that a block has, as numbers; `ld` of them in a row, from row0 on.
    struct Numbers {
        const T* begin;
        std::size_t ld, row0, col0, col1;
    };

    void run(std::span<const BlockView> blocks, const Task& task, Worker& worker) const;
    // Rows [begin, end) of W, of one group.
    void add_block(const Numbers& w, std::size_t image, std::size_t begin, std::size_t end,
                   Worker& worker) const;
    void add_channel(const Numbers& w, std::size_t channel, std::size_t begin, std::size_t end,
                     const Part& part, Worker& worker) const;
    // Where in y a part of a channel begins.
    [[nodiscard]] std::size_t place_of(std::size_t image, std::size_t channel,
                                       const Part& part) const noexcept;
    // Sums of an output channel before those of a block are added, and afterwards.
    void begin(std::size_t channel, const Part& part, std::size_t place, bool is_first,
               T* sums) const noexcept;
    void store(const Part& part, std::size_t place, bool is_last, T* sums) const noexcept;

    // Elements from a row of sums to the next, and of the sums of one row of W.
    [[nodiscard]] std::size_t sums_pitch() const noexcept {
        return detail::round_up(layout_.cols(), 64 / sizeof(T));
    }
    [[nodiscard]] std::size_t sums_of_row() const noexcept {
        return detail::round_up(layout_.rows(), kWindowRows) * sums_pitch();
    }

    const detail::WindowLayout layout_;
    // y; where it is wanted in bf16 that is halves_, and sums rest in wide_y_, if they do.
    T* y_;
    std::uint16_t* const halves_;
    detail::AlignedArray<T> wide_y_;
    detail::Workers<Worker> workers_;
};

}  // namespace pydedup
