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
#include "gemm/pick_kernel.hpp"
#include "kernels/kernel_table.hpp"
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
    };
    // For one weight of the filter: where a run's first element inside of the image is in its
    // plane, and which positions are inside.
    struct Inside {
        std::size_t from, begin, end;
    };
    std::vector<Run> runs;
    // Of these, for one weight of the filter, or for two that are neighbours.
    std::vector<Inside> inside;
    std::vector<LaneRun> lanes;
    std::vector<PairRun> pairs;
    std::size_t tiles = 0;
    std::size_t empty_lanes = 0;  ///< of the last tile
};

/// Positions are numbered over the batch: image by image, row-major.
class ImageTiles {
  public:
    /// Tiles have at most 32 lanes.
    ImageTiles(const ConvShape& shape, std::size_t width, const KernelTable& kernels)
        : shape_(as_one_row(shape)),
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
                                      (p - p0) / width_, lane});
            p += count;
            ow += count;
            if (ow < out_w_) continue;
            ow = 0;
            if (++oh < out_h_) continue;
            oh = 0;
            ++image;
        }
    }

    /// Columns [c0, c1) of `group` for these positions of images x, into tiles of (c1 - c0) columns
    /// of `width` lanes; empty lanes are zero. S is T, or bf16 numbers are widened.
    template <class S, class T>
    void gather(const S* x, std::size_t group, std::size_t c0, std::size_t c1,
                PositionRuns& positions, T* to) const {
        clear_empty(c1 - c0, 1, positions, to);
        const std::size_t tile = (c1 - c0) * width_;
        for (std::size_t first = c0; first < std::min(c1, c0 + filter_); ++first) {
            // All columns of one weight of the filter: first, first + filter_, ..., a channel each.
            const Weight weight = weight_of(first);
            positions.inside.clear();
            for (const PositionRuns::Run& run : positions.runs) {
                positions.inside.push_back(inside(run, weight));
            }
            const S* const plane = x + channel_of(group, first) * plane_;
            T* const column = to + (first - c0) * width_;
            const std::size_t columns = ceil_div(c1 - first, filter_);
            if constexpr (std::is_same_v<S, float>) {
                if (shape_.stride_w == 1) {
                    list_lanes(tile, positions);
                    kernels_.rows.copy_runs_f32(plane, plane_, columns, positions.lanes.data(),
                                                positions.lanes.size(), column, filter_ * width_);
                    continue;
                }
            }
            for (std::size_t i = 0; i < positions.runs.size(); ++i) {
                const PositionRuns::Run& run = positions.runs[i];
                const PositionRuns::Inside& in = positions.inside[i];
                copy(plane + run.image * shape_.channels * plane_ + in.from, in, run.count, columns,
                     column + run.tile * tile + run.lane);
            }
        }
    }

    /// The same of bf16 numbers in pairs of columns, which lie beside each other in each lane; the
    /// last column of an odd number is in pairs with zeros.
    void gather_pairs(const std::uint16_t* x, std::size_t group, std::size_t c0, std::size_t c1,
                      PositionRuns& positions, std::uint16_t* to) const {
        clear_empty(ceil_div(c1 - c0, 2), 2, positions, to);
        const std::size_t tile = round_up(c1 - c0, 2) * width_;
        // After so many columns the same two weights of the filter come again.
        const std::size_t period = filter_ % 2 == 0 ? filter_ : 2 * filter_;
        for (std::size_t first = c0; first < std::min(c1, c0 + period); first += 2) {
            const std::size_t whole = (c1 - first) / period + ((c1 - first) % period > 1 ? 1 : 0);
            const auto copy = [&](std::size_t from, std::size_t times) {
                kernels_.gemm.bf16.copy_pairs(x + channel_of(group, from) * plane_, shape_.stride_w,
                                              period / filter_ * plane_, times,
                                              positions.pairs.data(), positions.pairs.size(),
                                              to + (from - c0) * width_, period * width_);
            };
            list_pairs(first, tile, positions);
            copy(first, whole);
            if (first + whole * period >= c1) continue;
            for (PairRun& pair : positions.pairs) pair.has_second = 0;
            copy(first + whole * period, 1);
        }
    }

  private:
    // Lanes without a position, in so many rows of lanes of so many elements each.
    template <class T>
    void clear_empty(std::size_t rows, std::size_t elements, const PositionRuns& positions,
                     T* to) const {
        if (positions.empty_lanes == 0) return;
        const std::size_t row = width_ * elements;
        const std::size_t empty = positions.empty_lanes * elements;
        T* end = to + (positions.tiles - 1) * rows * row;
        for (std::size_t i = 0; i < rows; ++i) {
            end += row;
            std::fill_n(end - empty, empty, T{0});
        }
    }

    // The channel of the first image that a column is of.
    [[nodiscard]] std::size_t channel_of(std::size_t group, std::size_t column) const noexcept {
        return group * (shape_.channels / shape_.groups) + column / filter_;
    }

    void list_lanes(std::size_t tile, PositionRuns& positions) const {
        positions.lanes.clear();
        for (std::size_t i = 0; i < positions.runs.size(); ++i) {
            const PositionRuns::Run& run = positions.runs[i];
            const PositionRuns::Inside& in = positions.inside[i];
            positions.lanes.push_back(
                {run.image * shape_.channels * plane_ + in.from, run.tile * tile + run.lane,
                 static_cast<std::uint32_t>(in.begin), static_cast<std::uint32_t>(in.end),
                 static_cast<std::uint32_t>(run.count)});
        }
    }

    // For columns `first` and the next one, from the plane of the first on.
    void list_pairs(std::size_t first, std::size_t tile, PositionRuns& positions) const {
        positions.pairs.clear();
        const Weight one = weight_of(first);
        const Weight other = weight_of(first + 1);
        const std::size_t apart = ((first + 1) / filter_ - first / filter_) * plane_;
        const auto bits_below = [](std::size_t lane) {
            return static_cast<std::uint32_t>((std::uint64_t{1} << lane) - 1U);
        };
        const auto bits = [&](const PositionRuns::Inside& in) {
            return bits_below(in.end) & ~bits_below(in.begin);
        };
        // Where lane 0 would be, even outside of the image.
        const auto lane0 = [&](const PositionRuns::Inside& in, std::size_t from) {
            return static_cast<std::ptrdiff_t>(from + in.from) -
                   static_cast<std::ptrdiff_t>(in.begin * shape_.stride_w);
        };
        for (const PositionRuns::Run& run : positions.runs) {
            const PositionRuns::Inside seen = inside(run, one);
            const PositionRuns::Inside beside = inside(run, other);
            const std::size_t image = run.image * shape_.channels * plane_;
            positions.pairs.push_back({lane0(seen, image), lane0(beside, image + apart),
                                       run.tile * tile + 2 * run.lane, bits(seen), bits(beside),
                                       bits_below(run.count)});
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

    // Of a filter: how far down and across it is from the first one.
    struct Weight {
        std::size_t down, across;
    };
    [[nodiscard]] Weight weight_of(std::size_t column) const noexcept {
        return {column % filter_ / shape_.kernel_w * shape_.dilation_h,
                column % shape_.kernel_w * shape_.dilation_w};
    }

    // What of the run is inside of the image for a weight.
    [[nodiscard]] PositionRuns::Inside inside(const PositionRuns::Run& run,
                                              const Weight& weight) const noexcept {
        const PositionRuns::Inside none{0, run.count, run.count};
        const std::size_t row = run.row + weight.down;
        if (row < shape_.pad_top || row - shape_.pad_top >= shape_.height) return none;
        const std::size_t stride = shape_.stride_w;
        const auto in_strides = [stride](std::size_t elements) {  // most have no stride
            return stride == 1 ? elements : ceil_div(elements, stride);
        };
        const std::size_t col = run.col + weight.across;
        const std::size_t left = shape_.pad_left;
        const std::size_t right = left + shape_.width;
        const std::size_t begin = col >= left ? 0 : in_strides(left - col);
        std::size_t end = run.count;
        if (col + (run.count - 1) * stride >= right) {
            end = col >= right ? 0 : in_strides(right - col);
        }
        if (begin >= end) return none;
        return {(row - shape_.pad_top) * shape_.width + (col + begin * stride - left), begin, end};
    }

    // The lanes of a run in so many columns: zeros, every stride_w-th element, zeros.
    template <class S, class T>
    void copy(const S* from, const PositionRuns::Inside& in, std::size_t lanes, std::size_t columns,
              T* to) const noexcept {
        const std::size_t ld = filter_ * width_;
        for (std::size_t c = 0; c < columns; ++c) {
            std::fill(to + c * ld, to + c * ld + in.begin, T{0});
            std::fill(to + c * ld + in.end, to + c * ld + lanes, T{0});
        }
        if (in.begin == in.end) return;
        pick_kernel<S, T>(kernels_.rows)(from, plane_, shape_.stride_w, columns, in.end - in.begin,
                                         to + in.begin, ld);
    }

    const ConvShape shape_;
    const std::size_t out_h_, out_w_;
    const std::size_t plane_;   // elements of one channel of one image
    const std::size_t width_;   // lanes of a tile
    const std::size_t filter_;  // weights of a filter per channel
    const KernelTable& kernels_;
};

}  // namespace pydedup::detail
