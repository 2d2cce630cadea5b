// SPDX-License-Identifier: Apache-2.0
// Convolution with a matrix that is never materialised, of an image that is never unfolded: blocks
// of W arrive in order, and what they are multiplied with is gathered from the image a few
// kilobytes at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "pydedup/codec.hpp"
#include "pydedup/gemm.hpp"
#include "pydedup/types.hpp"

namespace pydedup {

/// How a 2-D convolution walks over images of shape (batch, channels, height, width).
struct ConvShape {
    std::size_t batch, channels, height, width;
    std::size_t out_channels;
    std::size_t kernel_h, kernel_w;
    std::size_t stride_h, stride_w;
    std::size_t dilation_h, dilation_w;
    std::size_t pad_top, pad_left, pad_bottom, pad_right;  ///< zeros around the image
    std::size_t groups;

    [[nodiscard]] std::size_t out_h() const noexcept {
        return (height + pad_top + pad_bottom - (kernel_h - 1) * dilation_h - 1) / stride_h + 1;
    }
    [[nodiscard]] std::size_t out_w() const noexcept {
        return (width + pad_left + pad_right - (kernel_w - 1) * dilation_w - 1) / stride_w + 1;
    }
};

/// Throws Error{invalid_argument} naming what is wrong: zero sizes, groups that do not divide the
/// channels, a kernel larger than the padded image, sizes beyond 2^31 - 1, or counts of elements
/// that overflow.
void check_shape(const ConvShape& shape);

/// y = activation(conv(x, W) + bias): cross-correlation, as frameworks call it. W is the matrix
/// view of a weight (out, channels / groups, kernel_h, kernel_w), cut into blocks of any shape.
///
/// Scratch per thread: at most 256 KiB of gathered image, up to one and a half times as much again
/// in bf16 numbers (AMX), 256 KiB of sums, and one block as numbers when it is not stored as such.
/// Sums of a y in bf16 may rest in f32 beside it, all of them, until the last block. Every element
/// of y is summed by one thread in the order of W's columns: the result depends on neither the
/// number of threads nor how the blocks were dealt out to feed(). With bf16 weights, last bits of
/// an image may differ where others beside it are not of bf16 numbers. A product of a padding zero
/// is computed: with an infinite or NaN weight it is NaN.
///
/// x, bias and y are in compute_dtype(weights) (x and y may be in bf16), contiguous, and stay alive
/// and, but for y, unchanged until the last block was fed. Not safe between threads; distinct
/// objects are independent.
class Conv2d {
  public:
    struct Problem {
        BlockGrid grid;  ///< of W: out_channels x channels / groups * kernel_h * kernel_w
        Dtype weights;
        ConvShape shape;
        const std::byte* x;     ///< batch x channels x height x width
        const std::byte* bias;  ///< one element per output channel, or nullptr
        Activation activation;
        std::byte* y;      ///< batch x out_channels x out_h x out_w; written, not read
        unsigned threads;  ///< 0 = one per core
        /// x are bf16 numbers, of sums in f32: the result is that of x as f32.
        bool x_is_bf16 = false;
        /// y takes bf16 numbers, of sums in f32: each is rounded to nearest.
        bool y_is_bf16 = false;
    };

    /// Throws as check_shape does, and when the grid is not that of the shape.
    explicit Conv2d(const Problem& problem);
    ~Conv2d();
    Conv2d(Conv2d&&) noexcept;
    Conv2d& operator=(Conv2d&&) noexcept;

    /// Takes the next blocks, as Matmul::feed does.
    void feed(std::span<const BlockView> blocks);

    /// Blocks fed so far.
    [[nodiscard]] std::size_t fed() const noexcept;

  private:
    class Impl;
    template <class T>
    class Tiled;
    template <class T>
    class Direct;
    std::unique_ptr<Impl> impl_;
};

}  // namespace pydedup
