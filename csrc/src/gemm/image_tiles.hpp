// SPDX-License-Identifier: Apache-2.0
// Tiles of the unfolded image. Unfolding (im2col) makes of an image a matrix with a row per output
// position and a column per weight of a filter; it is kernel_h * kernel_w times as large. A tile is
// `width` rows by some columns of it, gathered from the image into what tile_nt reads: positions
// along the lanes of vectors, a column after the other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "base/rounding.hpp"
#include "gemm/copy_row.hpp"
#include "kernels/rows_kernels.hpp"
#include "pydedup/conv.hpp"

namespace pydedup::detail {

/// What one thread remembers of the positions that it gathers: neighbours in one row of an image
/// and in one tile are a run, and are gathered together.
struct PositionRuns {
    struct Run {
        std::size_t image;     ///< of the batch
        std::size_t row, col;  ///< of its first position's window, in the padded image
        std::size_t count;
        std::size_t tile, lane;
        // For one weight of the filter: where the run's first element inside of the image is in
        // its plane, and which positions are inside.
        std::size_t from, begin, end;
    };
    std::vector<Run> runs;
    std::vector<LaneRun> lanes;  // of these, for one weight of the filter
    std::size_t tiles = 0;
    std::size_t empty_lanes = 0;  ///< of the last tile
};

/// Positions are numbered over the batch: image by image, row-major.
template <class T>
class ImageTiles {
  public:
    /// x are bf16 numbers if so said, else T.
    ImageTiles(const std::byte* x, bool is_bf16, const ConvShape& shape, std::size_t width,
               const RowsKernels& kernels)
        : x_(is_bf16 ? nullptr : reinterpret_cast<const T*>(x)),
          halves_(is_bf16 ? reinterpret_cast<const std::uint16_t*>(x) : nullptr),
          shape_(as_one_row(shape)),
          out_h_(shape_.out_h()),
          out_w_(shape_.out_w()),
          plane_(shape.height * shape.width),
          width_(width),
          filter_(shape.kernel_h * shape.kernel_w),
          kernels_(kernels) {}

    /// Prepares for positions [p0, p1): tile after tile, the last may have empty lanes.
    void find_runs(std::size_t p0, std::size_t p1, PositionRuns& positions) const {
        positions.runs.clear();
        positions.tiles = ceil_div(p1 - p0, width_);
        positions.empty_lanes = positions.tiles * width_ - (p1 - p0);
        std::size_t image = p0 / (out_h_ * out_w_);
        std::size_t oh = p0 / out_w_ % out_h_;
        std::size_t ow = p0 % out_w_;
        for (std::size_t p = p0; p < p1;) {
            const std::size_t lane = (p - p0) % width_;
            const std::size_t count = std::min({out_w_ - ow, p1 - p, width_ - lane});
            positions.runs.push_back({image, oh * shape_.stride_h, ow * shape_.stride_w, count,
                                      (p - p0) / width_, lane, 0, 0, 0});
            p += count;
            ow += count;
            if (ow < out_w_) continue;
            ow = 0;
            if (++oh < out_h_) continue;
            oh = 0;
            ++image;
        }
    }

    /// Columns [c0, c1) of `group` for these positions, into tiles of (c1 - c0) columns of `width`
    /// lanes; empty lanes are zero.
    void gather(std::size_t group, std::size_t c0, std::size_t c1, PositionRuns& positions,
                T* to) const {
        const std::size_t tile = (c1 - c0) * width_;
        if (positions.empty_lanes != 0) {
            T* last = to + (positions.tiles - 1) * tile + (width_ - positions.empty_lanes);
            for (std::size_t c = c0; c < c1; ++c, last += width_) {
                std::fill_n(last, positions.empty_lanes, T{0});
            }
        }
        if constexpr (sizeof(T) == 4) {
            if (halves_ != nullptr) {
                gather_from(halves_, group, c0, c1, positions, to);
                return;
            }
        }
        gather_from(x_, group, c0, c1, positions, to);
    }

  private:
    static constexpr std::size_t kMostLanes = 32;  // of a LaneRun

    template <class S>
    void gather_from(const S* x, std::size_t group, std::size_t c0, std::size_t c1,
                     PositionRuns& positions, T* to) const {
        const std::size_t tile = (c1 - c0) * width_;
        const std::size_t group_channels = shape_.channels / shape_.groups;
        for (std::size_t first = c0; first < std::min(c1, c0 + filter_); ++first) {
            // All columns of one weight of the filter: first, first + filter_, ..., a channel each.
            const std::size_t in_filter = first % filter_;
            for (PositionRuns::Run& run : positions.runs) {
                clip(run, in_filter / shape_.kernel_w, in_filter % shape_.kernel_w);
            }
            const S* plane = x + (group * group_channels + first / filter_) * plane_;
            if constexpr (std::is_same_v<S, float>) {
                // To list the runs takes as long as to copy one column of them.
                const std::size_t columns = ceil_div(c1 - first, filter_);
                if (shape_.stride_w == 1 && width_ <= kMostLanes && columns > 1) {
                    positions.lanes.clear();
                    for (const PositionRuns::Run& run : positions.runs) {
                        positions.lanes.push_back({run.image * shape_.channels * plane_ + run.from,
                                                   run.tile * tile + run.lane,
                                                   static_cast<std::uint32_t>(run.begin),
                                                   static_cast<std::uint32_t>(run.end),
                                                   static_cast<std::uint32_t>(run.count)});
                    }
                    kernels_.copy_runs_f32(plane, plane_, columns, positions.lanes.data(),
                                           positions.lanes.size(), to + (first - c0) * width_,
                                           filter_ * width_);
                    continue;
                }
            }
            for (std::size_t c = first; c < c1; c += filter_, plane += plane_) {
                T* const column = to + (c - c0) * width_;
                for (const PositionRuns::Run& run : positions.runs) {
                    copy(plane + run.image * shape_.channels * plane_ + run.from, run,
                         column + run.tile * tile + run.lane);
                }
            }
        }
    }

    // Windows of one pixel, one beside the other, see no rows: long runs instead of short ones.
    static ConvShape as_one_row(ConvShape shape) noexcept {
        const bool pixels = shape.kernel_h == 1 && shape.kernel_w == 1 && shape.stride_h == 1 &&
                            shape.stride_w == 1 && shape.pad_top == 0 && shape.pad_left == 0 &&
                            shape.pad_bottom == 0 && shape.pad_right == 0;
        if (pixels) {
            shape.width *= shape.height;
            shape.height = 1;
        }
        return shape;
    }

    // Finds what of the run is inside of the image for weight (kh, kw) of the filter.
    void clip(PositionRuns::Run& run, std::size_t kh, std::size_t kw) const noexcept {
        const std::size_t row = run.row + kh * shape_.dilation_h;
        run.from = 0;
        run.begin = run.count;
        run.end = run.count;
        if (row < shape_.pad_top || row - shape_.pad_top >= shape_.height) return;
        const std::size_t stride = shape_.stride_w;
        const std::size_t col = run.col + kw * shape_.dilation_w;
        const std::size_t left = shape_.pad_left;
        const std::size_t right = left + shape_.width;
        const std::size_t begin = col >= left ? 0 : ceil_div(left - col, stride);
        std::size_t end = run.count;
        if (col + (run.count - 1) * stride >= right) {
            end = col >= right ? 0 : ceil_div(right - col, stride);
        }
        if (begin >= end) return;
        run.begin = begin;
        run.end = end;
        run.from = (row - shape_.pad_top) * shape_.width + (col + begin * stride - left);
    }

    // The lanes of a run: zeros, every stride_w-th element, zeros.
    template <class S>
    void copy(const S* from, const PositionRuns::Run& run, T* lanes) const noexcept {
        for (std::size_t i = 0; i < run.begin; ++i) lanes[i] = T{0};
        const std::size_t count = run.end - run.begin;
        T* const middle = lanes + run.begin;
        if (shape_.stride_w != 1) {
            if constexpr (!std::is_same_v<S, T>) {
                pick_row(from, shape_.stride_w, count, middle);
            } else if constexpr (sizeof(T) == 4) {
                kernels_.pick_f32(from, shape_.stride_w, count, middle);
            } else {
                kernels_.pick_f64(from, shape_.stride_w, count, middle);
            }
        } else {
            copy_row(from, count, middle);
        }
        for (std::size_t i = run.end; i < run.count; ++i) lanes[i] = T{0};
    }

    const T* const x_;
    const std::uint16_t* const halves_;
    const ConvShape shape_;
    const std::size_t out_h_, out_w_;
    const std::size_t plane_;   // elements of one channel of one image
    const std::size_t width_;   // lanes of a tile
    const std::size_t filter_;  // weights of a filter per channel
    const RowsKernels& kernels_;
};

}  // namespace pydedup::detail
