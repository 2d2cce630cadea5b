// SPDX-License-Identifier: Apache-2.0
#include "gemm/conv_direct.hpp"

#include <memory>
#include <span>
#include <utility>

#include "base/rounding.hpp"
#include "dispatch/dispatch.hpp"
#include "gemm/matmul_sizes.hpp"
#include "gemm/pick_kernel.hpp"

namespace pydedup {
namespace {

// Windows and sums of one row of W stay in a first-level cache of 32 KiB; at most windows take so
// much, and sums four times as much.
constexpr std::size_t kWindowBytes = std::size_t{16} << 10;
constexpr std::size_t kMostWindowBytes = std::size_t{64} << 10;
// Fewer outputs in a row would leave vectors idle.
constexpr std::size_t kLeastColumns = 64;
// Rows of sums that a kernel has in registers: fewer take as long.
constexpr std::size_t kRowsTogether = 4;
// Rows of W in a group, up to which the image is not unfolded for them (measured: with 8, either
// way takes as long).
constexpr std::size_t kMostGroupRows = 4;

template <class T>
[[nodiscard]] RowsKernels::Windows<T> windows_kernel(const RowsKernels& kernels) noexcept {
    if constexpr (sizeof(T) == 4) {
        return kernels.windows_f32;
    } else {
        return kernels.windows_f64;
    }
}

}  // namespace

namespace detail {

std::vector<std::size_t> WindowAxis::places() const {
    std::vector<std::size_t> found;
    for (std::size_t k = 0; k < kernel && found.size() < stride; ++k) {
        const std::size_t place = k * dilation % stride;
        if (std::ranges::find(found, place) == found.end()) found.push_back(place);
    }
    return found;
}

std::optional<WindowLayout> WindowLayout::of(const ConvShape& s, std::size_t element_bytes) {
    const WindowAxis down{s.height, s.pad_top, s.kernel_h, s.stride_h, s.dilation_h, s.out_h()};
    const WindowAxis across{s.width, s.pad_left, s.kernel_w, s.stride_w, s.dilation_w, s.out_w()};
    const std::size_t most = kMostWindowBytes / element_bytes;
    // Each is compared before they are multiplied, so that no product overflows.
    if (std::max({down.kernel, across.kernel, down.reach(), across.reach()}) >= most) return {};
    const std::size_t planes =
        std::min(down.stride, down.kernel) * std::min(across.stride, across.kernel);
    const std::size_t rows_of_one = planes * (down.reach() + 1);
    if (planes >= most || rows_of_one >= most) return {};
    const std::size_t least = across.reach() + std::min(kLeastColumns, across.out);
    // As narrow as it takes for rows that are summed together, or else for one.
    std::size_t widest = kWindowBytes / element_bytes /
                         (planes * (std::min(kRowsTogether, down.out) + down.reach()));
    if (widest < least) widest = most / rows_of_one;
    if (widest < least) return {};
    const std::size_t cols = std::min(widest - across.reach(), across.out);
    const std::size_t fitting = kWindowBytes / element_bytes / (planes * (cols + across.reach()));
    std::size_t rows = fitting > down.reach() ? fitting - down.reach() : 1;
    if (rows > kRowsTogether) rows -= rows % kRowsTogether;
    return WindowLayout(down, across, std::min(rows, down.out), cols);
}

WindowLayout::WindowLayout(const WindowAxis& down, const WindowAxis& across, std::size_t rows,
                           std::size_t cols)
    : down_(down),
      across_(across),
      down_places_(down.places()),
      across_places_(across.places()),
      rows_(rows),
      cols_(cols),
      pitch_(cols + across.reach()),
      plane_((round_up(rows, kWindowRows) + down.reach()) * pitch_) {
    const auto place_of = [](const std::vector<std::size_t>& places, std::size_t at) {
        return static_cast<std::size_t>(std::ranges::find(places, at) - places.begin());
    };
    offsets_.reserve(down.kernel * across.kernel);
    for (std::size_t i = 0; i < down.kernel; ++i) {
        const std::size_t row = i * down.dilation;
        const std::size_t planes =
            place_of(down_places_, row % down.stride) * across_places_.size();
        for (std::size_t j = 0; j < across.kernel; ++j) {
            const std::size_t col = j * across.dilation;
            const std::size_t plane = planes + place_of(across_places_, col % across.stride);
            offsets_.push_back(plane * plane_ + row / down.stride * pitch_ + col / across.stride);
        }
    }
}

void WindowLayout::find_runs(std::size_t row0, std::size_t col0, std::size_t rows,
                             std::vector<Run>& runs) const {
    runs.clear();
    std::size_t plane = 0;
    for (const std::size_t down : down_places_) {
        for (const std::size_t across : across_places_) {
            // Columns [begin, end) of windows are of the image.
            const std::size_t left = col0 * across_.stride + across;
            const std::size_t right = across_.before + across_.size;
            const std::size_t begin =
                left >= across_.before ? 0 : ceil_div(across_.before - left, across_.stride);
            const std::size_t end =
                left >= right ? 0 : std::min(ceil_div(right - left, across_.stride), pitch_);
            // And so are rows [first, last).
            const std::size_t top = row0 * down_.stride + down;
            const std::size_t bottom = down_.before + down_.size;
            const std::size_t first =
                top >= down_.before ? 0 : ceil_div(down_.before - top, down_.stride);
            const std::size_t last = top >= bottom ? 0
                                                   : std::min(ceil_div(bottom - top, down_.stride),
                                                              rows + down_.reach());
            if (begin < end && first < last) {
                const std::size_t row = top + first * down_.stride - down_.before;
                const std::size_t col = left + begin * across_.stride - across_.before;
                runs.push_back({row * across_.size + col, plane + first * pitch_ + begin,
                                last - first, end - begin});
            }
            plane += plane_;
        }
    }
}

template <class T>
Windows<T>::Windows(const WindowLayout& layout)
    : layout_(layout), elements_(layout.elements() + kBeyond) {}

template <class T>
template <class S>
void Windows<T>::fill(const S* x, std::size_t row0, std::size_t col0, std::size_t rows,
                      const RowsKernels& kernels) {
    if (runs_.empty() || row0 != row0_ || col0 != col0_) {
        std::fill_n(elements_.data(), layout_.elements() + kBeyond, T{0});
        layout_.find_runs(row0, col0, rows, runs_);
        row0_ = row0;
        col0_ = col0;
    }
    for (const WindowLayout::Run& run : runs_) {
        pick_kernel<S, T>(kernels)(x + run.from, layout_.down(), layout_.stride(), run.rows,
                                   run.cols, elements_.data() + run.to, layout_.pitch());
    }
}

template <class T>
const std::vector<WindowChain<T>>& Windows<T>::chains(std::size_t begin, std::size_t end,
                                                      const T* weights) {
    const std::size_t apart = layout_.chains_apart();
    if (!chains_.empty() && begin == chains_begin_ && end == chains_end_) {
        for (std::size_t i = 0; i < chains_.size(); ++i) chains_[i].weights = weights + i;
        return chains_;
    }
    chains_begin_ = begin;
    chains_end_ = end;
    chains_.clear();
    for (std::size_t k = begin; k < std::min(end, begin + apart); ++k) {
        const std::size_t length = ceil_div(end - k, apart);
        chains_.push_back(
            {elements_.data() + layout_.offsets()[k], weights + (k - begin), length, apart});
    }
    return chains_;
}

template class Windows<float>;
template class Windows<double>;

}  // namespace detail

template <class T>
std::optional<detail::WindowLayout> Conv2d::Direct<T>::layout_of(const ConvShape& s) {
    if (s.out_channels / s.groups > kMostGroupRows) return {};
    return detail::WindowLayout::of(s, sizeof(T));
}

template <class T>
Conv2d::Direct<T>::Direct(const Problem& problem, detail::WindowLayout layout)
    : Impl(problem),
      layout_(std::move(layout)),
      y_(problem.y_is_bf16 ? nullptr : reinterpret_cast<T*>(problem.y)),
      halves_(problem.y_is_bf16 ? reinterpret_cast<std::uint16_t*>(problem.y) : nullptr) {}

template <class T>
void Conv2d::Direct<T>::convolve(std::span<const BlockView> blocks) {
    const BlockGrid& grid = p_.grid;
    if (y_ == nullptr && grid.grid_cols() > 1) {
        const ConvShape& s = p_.shape;
        wide_y_ = detail::AlignedArray<T>(s.batch * s.out_channels * s.out_h() * s.out_w());
        y_ = wide_y_.data();
    }
    const Work work = work_of(blocks);
    const std::size_t images = work.panels * p_.shape.batch;
    const std::size_t wanted =
        work.threads == 1 ? 1 : detail::ceil_div(detail::kPiecesPerThread * work.threads, images);
    const std::size_t rows = detail::ceil_div(grid.block_rows, wanted);
    const std::size_t cuts = detail::ceil_div(grid.block_rows, rows);
    workers_.each(
        images * cuts, work.threads,
        [&] {
            return Worker{detail::LastBlockReader<T>(kernels().gemm), detail::Windows<T>(layout_)};
        },
        [](Worker& worker) { worker.blocks.forget(); },
        [&](std::size_t i, Worker& worker) {
            const std::size_t panel = work.first + i / (p_.shape.batch * cuts);
            const std::size_t begin = panel * grid.block_rows + i % cuts * rows;
            const std::size_t end =
                std::min({begin + rows, (panel + 1) * grid.block_rows, std::size_t{grid.rows}});
            if (begin < end) {  // else the last row of blocks is lower
                run(blocks, {panel, i / cuts % p_.shape.batch, begin, end}, worker);
            }
        });
}

template <class T>
void Conv2d::Direct<T>::run(std::span<const BlockView> blocks, const Task& task,
                            Worker& worker) const {
    const std::size_t columns = p_.grid.grid_cols();
    const std::size_t group_rows = p_.shape.out_channels / p_.shape.groups;
    const std::size_t begin = std::max(fed_, task.panel * columns);
    const std::size_t end = std::min(fed_ + blocks.size(), (task.panel + 1) * columns);
    for (std::size_t number = begin; number < end; ++number) {
        const BlockView& block = blocks[number - fed_];
        const BlockRect rect = block_rect(p_.grid, number);
        const Numbers w{worker.blocks.read(block), rect.cols, rect.row0, rect.col0,
                        rect.col0 + rect.cols};
        for (std::size_t row = task.begin; row < task.end;) {
            const std::size_t stop = std::min((row / group_rows + 1) * group_rows, task.end);
            add_block(w, task.image, row, stop, worker);
            row = stop;
        }
    }
}

template <class T>
void Conv2d::Direct<T>::add_block(const Numbers& w, std::size_t image, std::size_t begin,
                                  std::size_t end, Worker& worker) const {
    const ConvShape& s = p_.shape;
    const std::size_t filter = s.kernel_h * s.kernel_w;
    const std::size_t group_channels = s.channels / s.groups;
    const std::size_t first = begin / (s.out_channels / s.groups) * group_channels;
    const std::size_t of_row = sums_of_row();
    T* const sums = worker.sums.at_least((end - begin) * of_row);
    const std::size_t out_h = s.out_h();
    const std::size_t out_w = s.out_w();
    const auto fill = [&](std::size_t channel, const Part& part) {
        const std::size_t place = (image * s.channels + first + channel) * s.height * s.width;
        if constexpr (sizeof(T) == 4) {
            if (p_.x_is_bf16) {
                worker.windows.fill(reinterpret_cast<const std::uint16_t*>(p_.x) + place, part.row0,
                                    part.col0, part.rows, kernels().rows);
                return;
            }
        }
        worker.windows.fill(reinterpret_cast<const T*>(p_.x) + place, part.row0, part.col0,
                            part.rows, kernels().rows);
    };
    for (std::size_t row0 = 0; row0 < out_h; row0 += layout_.rows()) {
        for (std::size_t col0 = 0; col0 < out_w; col0 += layout_.cols()) {
            const Part part{row0, col0, std::min(layout_.rows(), out_h - row0),
                            std::min(layout_.cols(), out_w - col0)};
            for (std::size_t row = begin; row < end; ++row) {
                this->begin(row, part, place_of(image, row, part), w.col0 == 0,
                            sums + (row - begin) * of_row);
            }
            for (std::size_t c = w.col0 / filter; c * filter < w.col1; ++c) {
                fill(c, part);
                add_channel(w, c, begin, end, part, worker);
            }
            for (std::size_t row = begin; row < end; ++row) {
                store(part, place_of(image, row, part), w.col1 == p_.grid.cols,
                      sums + (row - begin) * of_row);
            }
        }
    }
}

template <class T>
void Conv2d::Direct<T>::add_channel(const Numbers& w, std::size_t channel, std::size_t begin,
                                    std::size_t end, const Part& part, Worker& worker) const {
    const std::size_t filter = layout_.offsets().size();
    const std::size_t column = channel * filter;
    const std::size_t from = std::max(w.col0, column) - column;
    const std::size_t to = std::min(w.col1, column + filter) - column;
    T* sums = worker.sums.at_least(0);
    for (std::size_t row = begin; row < end; ++row, sums += sums_of_row()) {
        const T* const weights = w.begin + (row - w.row0) * w.ld + (column + from - w.col0);
        const auto& chains = worker.windows.chains(from, to, weights);
        windows_kernel<T>(kernels().rows)(chains.data(), chains.size(), layout_.pitch(), part.rows,
                                          part.cols, sums, sums_pitch());
    }
}

template <class T>
std::size_t Conv2d::Direct<T>::place_of(std::size_t image, std::size_t channel,
                                        const Part& part) const noexcept {
    const ConvShape& s = p_.shape;
    const std::size_t row = (image * s.out_channels + channel) * s.out_h() + part.row0;
    return row * s.out_w() + part.col0;
}

template <class T>
void Conv2d::Direct<T>::begin(std::size_t channel, const Part& part, std::size_t place,
                              bool is_first, T* sums) const noexcept {
    const T* const bias = reinterpret_cast<const T*>(p_.bias);
    std::fill_n(sums, sums_of_row(), is_first && bias != nullptr ? bias[channel] : T{0});
    if (is_first) return;
    detail::pick_kernel<T>(kernels().rows)(y_ + place, p_.shape.out_w(), 1, part.rows, part.cols,
                                           sums, sums_pitch());
}

template <class T>
void Conv2d::Direct<T>::store(const Part& part, std::size_t place, bool is_last,
                              T* sums) const noexcept {
    const std::size_t out_w = p_.shape.out_w();
    if (is_last && p_.activation != Activation::none) {
        for (std::size_t i = 0; i < part.rows; ++i) {
            detail::finish_row<T>(sums + i * sums_pitch(), part.cols, nullptr, p_.activation);
        }
    }
    if constexpr (sizeof(T) == 4) {
        if (is_last && halves_ != nullptr) {
            const auto round = kernels().gemm.f32_to_bf16;
            for (std::size_t i = 0; i < part.rows; ++i) {
                round(sums + i * sums_pitch(), part.cols, halves_ + place + i * out_w);
            }
            return;
        }
    }
    detail::pick_kernel<T>(kernels().rows)(sums, sums_pitch(), 1, part.rows, part.cols, y_ + place,
                                           out_w);
}

std::unique_ptr<Conv2d::Impl> Conv2d::Impl::direct(const Problem& problem) {
    const auto make = [&]<class T>() -> std::unique_ptr<Impl> {
        auto layout = Direct<T>::layout_of(problem.shape);
        if (!layout) return nullptr;
        return std::make_unique<Direct<T>>(problem, *std::move(layout));
    };
    const bool is_double = compute_dtype(problem.weights) == Dtype::f64;
    return is_double ? make.template operator()<double>() : make.template operator()<float>();
}

}  // namespace pydedup
