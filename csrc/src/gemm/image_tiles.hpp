// SPDX-License-Identifier: Apache-2.0
// Tiles of the unfolded image. Unfolding (im2col) makes of an image a matrix with a row per output
// position and a column per weight of a filter; it is kernel_h * kernel_w times as large. A tile is
// `width` rows by some columns of it, gathered from the image into what tile_nt reads: positions
// along the lanes of vectors, a column after the other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "pydedup/conv.hpp"

namespace pydedup::detail {

/// Positions are numbered over the batch: image by image, row-major.
template <class T>
class ImageTiles {
  public:
    ImageTiles(const T* x, const ConvShape& shape, std::size_t width)
        : x_(x),
          shape_(shape),
          out_h_(shape.out_h()),
          out_w_(shape.out_w()),
          width_(width),
          filter_(shape.kernel_h * shape.kernel_w) {}

    /// Columns [c0, c1) of `group` for positions [p0, p0 + count), count <= width: column after
    /// column, width elements each, lanes from `count` on zero.
    void gather(std::size_t group, std::size_t c0, std::size_t c1, std::size_t p0,
                std::size_t count, T* to) const {
        if (count < width_) std::fill_n(to, (c1 - c0) * width_, T{0});
        const std::size_t group_channels = shape_.channels / shape_.groups;
        for (std::size_t p = p0; p < p0 + count;) {
            // A run: positions in one row of one image.
            const std::size_t image = p / (out_h_ * out_w_);
            const std::size_t oh = p / out_w_ % out_h_;
            const std::size_t ow = p % out_w_;
            const std::size_t n = std::min(out_w_ - ow, p0 + count - p);
            const T* const planes =
                x_ + (image * shape_.channels + group * group_channels) * plane();
            gather_run(planes, oh, ow, n, c0, c1, to + (p - p0));
            p += n;
        }
    }

  private:
    [[nodiscard]] std::size_t plane() const noexcept { return shape_.height * shape_.width; }

    // Positions (oh, ow) to (oh, ow + n - 1), for columns [c0, c1).
    void gather_run(const T* planes, std::size_t oh, std::size_t ow, std::size_t n, std::size_t c0,
                    std::size_t c1, T* to) const {
        for (std::size_t k = 0; k < std::min(filter_, c1 - c0); ++k) {
            // All columns of this weight of the filter: one per channel.
            const std::size_t first = c0 + k;
            const std::size_t in_filter = first % filter_;
            const std::size_t kh = in_filter / shape_.kernel_w;
            const std::size_t kw = in_filter % shape_.kernel_w;
            const std::size_t row = oh * shape_.stride_h + kh * shape_.dilation_h;
            const bool outside = row < shape_.pad_top || row - shape_.pad_top >= shape_.height;
            const Span inside = outside ? Span{n, n} : columns_inside(ow, n, kw);
            std::size_t at = first / filter_ * plane();
            if (inside.begin < inside.end) {
                at += (row - shape_.pad_top) * shape_.width +
                      ((ow + inside.begin) * shape_.stride_w + kw * shape_.dilation_w -
                       shape_.pad_left);
            }
            T* const lanes = to + k * width_;
            for (std::size_t c = first; c < c1; c += filter_) {
                copy(planes + at, inside, n, lanes + (c - first) * width_);
                at += plane();
            }
        }
    }

    struct Span {
        std::size_t begin, end;
    };

    // Which of the positions ow to ow + n - 1 read inside of the image, for column kw of the
    // filter.
    [[nodiscard]] Span columns_inside(std::size_t ow, std::size_t n,
                                      std::size_t kw) const noexcept {
        const std::size_t stride = shape_.stride_w;
        const std::size_t at = ow * stride + kw * shape_.dilation_w;  // in the padded row
        const std::size_t left = shape_.pad_left;
        const std::size_t right = left + shape_.width;
        const std::size_t begin = at >= left ? 0 : (left - at + stride - 1) / stride;
        const std::size_t end = at >= right ? 0 : (right - at + stride - 1) / stride;
        return {std::min(begin, n), std::max(std::min(end, n), std::min(begin, n))};
    }

    // n lanes: zeros, every stride_w-th element from `from` on, zeros.
    void copy(const T* from, Span inside, std::size_t n, T* lanes) const noexcept {
        for (std::size_t i = 0; i < inside.begin; ++i) lanes[i] = T{0};
        const std::size_t count = inside.end - inside.begin;
        T* const middle = lanes + inside.begin;
        if (shape_.stride_w != 1) {
            for (std::size_t i = 0; i < count; ++i) middle[i] = from[i * shape_.stride_w];
        } else if (count == width_) {
            copy_vectors(from, width_, middle);
        } else {
            std::memcpy(middle, from, count * sizeof(T));
        }
        for (std::size_t i = inside.end; i < n; ++i) lanes[i] = T{0};
    }

    // A multiple of 16 bytes: cheaper than a call of memcpy.
    static void copy_vectors(const T* from, std::size_t count, T* to) noexcept {
        constexpr std::size_t kStep = 16 / sizeof(T);
        for (std::size_t i = 0; i < count; i += kStep) std::memcpy(to + i, from + i, 16);
    }

    const T* const x_;
    const ConvShape shape_;
    const std::size_t out_h_, out_w_;
    const std::size_t width_;   // lanes of a tile
    const std::size_t filter_;  // weights of a filter per channel
};

}  // namespace pydedup::detail
