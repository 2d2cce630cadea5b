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
    [[nodiscard]] std::size_t stride() const noexcept { return across_.stride; }
    [[nodiscard]] std::size_t elements() const noexcept {
        return down_places_.size() * across_places_.size() * plane_;
    }
    /// By weight of the filter, where its first element is.
    [[nodiscard]] const std::vector<std::size_t>& offsets() const noexcept { return offsets_; }

    /// What of a row of the image, from element `from` of the channel on, is in a row of windows.
    struct Run {
        std::size_t from, to, count;
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

    /// By weight of the filter, what it sees of the first output; those of the others follow.
    [[nodiscard]] const T* const* seen() const noexcept { return seen_.data(); }

    /// So many may be read beyond what the last weight sees.
    static constexpr std::size_t kBeyond = 64 / sizeof(T);

  private:
    const WindowLayout& layout_;
    AlignedArray<T> elements_;
    std::vector<const T*> seen_;
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
    void load(std::size_t place, const Part& part, T* sums) const noexcept;
    void store(const T* sums, const Part& part, std::size_t place) const noexcept;
    void finish(std::size_t channel, const Part& part, std::size_t place) const noexcept;
    // What store() and finish() do, of y in bf16.
    void finish_halves(std::size_t channel, const Part& part, T* sums,
                       std::size_t place) const noexcept;

    // Sums of one row of W: whole vectors, of which the last may be beyond the last output.
    [[nodiscard]] std::size_t sums_of_row() const noexcept {
        return detail::round_up(layout_.rows() * layout_.pitch(), detail::Windows<T>::kBeyond);
    }

    const detail::WindowLayout layout_;
    // y; where it is wanted in bf16 that is halves_, and sums rest in wide_y_, if they do.
    T* y_;
    std::uint16_t* const halves_;
    detail::AlignedArray<T> wide_y_;
    detail::Workers<Worker> workers_;
};

}  // namespace pydedup
