// SPDX-License-Identifier: Apache-2.0
// What becomes of the products of tiles of positions (image_tiles.hpp): sums of some output
// channels in scratch, `width` positions of one after those of another, that come from y and go
// there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "gemm/activation.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/pick_kernel.hpp"
#include "kernels/kernel_table.hpp"
#include "pydedup/conv.hpp"

namespace pydedup::detail {

struct Range {
    std::size_t begin, end;
    [[nodiscard]] std::size_t size() const noexcept { return end - begin; }
};

template <class T>
class ImageSums {
  public:
    ImageSums(const Conv2d::Problem& problem, std::size_t width, const KernelTable& kernels)
        : kernels_(kernels),
          width_(width),
          channels_(problem.shape.out_channels),
          plane_(problem.shape.out_h() * problem.shape.out_w()),
          positions_(problem.shape.batch * plane_),
          bias_(reinterpret_cast<const T*>(problem.bias)),
          activation_(problem.activation),
          y_(problem.y_is_bf16 ? nullptr : reinterpret_cast<T*>(problem.y)),
          halves_(problem.y_is_bf16 ? reinterpret_cast<std::uint16_t*>(problem.y) : nullptr) {}

    /// Before any store() of sums that are not complete.
    void will_rest() {
        if (y_ != nullptr) return;
        wide_y_ = AlignedArray<T>(channels_ * positions_);
        y_ = wide_y_.data();
    }

    /// Those before any product: the bias of each of these channels.
    void begin(Range channels, T* sums) const noexcept {
        for (std::size_t c = channels.begin; c < channels.end; ++c, sums += width_) {
            std::fill_n(sums, width_, bias_ == nullptr ? T{0} : bias_[c]);
        }
    }

    /// Those of tile t that were stored before they were complete.
    void load(std::size_t t, Range channels, T* sums) const noexcept {
        each_image(t, [&](std::size_t lane, std::size_t n, std::size_t y) {
            pick_kernel<T>(kernels_.rows)(y_ + y + channels.begin * plane_, plane_, 1,
                                          channels.size(), n, sums + lane, width_);
        });
        // Lanes without a position hold what nobody reads, but must hold something.
        for (std::size_t i = 0; i < channels.size(); ++i) {
            std::fill(sums + i * width_ + positions_of(t), sums + (i + 1) * width_, T{0});
        }
    }

    /// Complete ones are changed on the way into what they are wanted as.
    void store(std::size_t t, Range channels, T* sums, bool complete) const noexcept {
        if (complete && activation_ != Activation::none) {
            for (std::size_t i = 0; i < channels.size(); ++i) {
                finish_row<T>(sums + i * width_, positions_of(t), nullptr, activation_);
            }
        }
        each_image(t, [&](std::size_t lane, std::size_t n, std::size_t y) {
            y += channels.begin * plane_;
            if constexpr (sizeof(T) == 4) {
                if (complete && halves_ != nullptr) {
                    for (std::size_t i = 0; i < channels.size(); ++i) {
                        kernels_.gemm.f32_to_bf16(sums + i * width_ + lane, n,
                                                  halves_ + y + i * plane_);
                    }
                    return;
                }
            }
            pick_kernel<T>(kernels_.rows)(sums + lane, width_, 1, channels.size(), n, y_ + y,
                                          plane_);
        });
    }

  private:
    // Positions in tile t: all of its lanes, but for the last tile.
    [[nodiscard]] std::size_t positions_of(std::size_t t) const noexcept {
        return std::min(width_, positions_ - t * width_);
    }

    // Calls use(lane, count, first element in y) for each image that tile t has positions of.
    template <class Use>
    void each_image(std::size_t t, const Use& use) const noexcept {
        const std::size_t p0 = t * width_;
        const std::size_t p1 = p0 + positions_of(t);
        for (std::size_t p = p0; p < p1;) {
            const std::size_t image = p / plane_;
            const std::size_t n = std::min(p1, (image + 1) * plane_) - p;
            use(p - p0, n, image * channels_ * plane_ + p % plane_);
            p += n;
        }
    }

    const KernelTable& kernels_;
    const std::size_t width_;
    const std::size_t channels_;   // of the result
    const std::size_t plane_;      // elements of one of them, of one image
    const std::size_t positions_;  // of the batch
    const T* const bias_;
    const Activation activation_;
    // y; where it is wanted in bf16 that is halves_, and sums rest in wide_y_, if they do.
    T* y_;
    std::uint16_t* const halves_;
    AlignedArray<T> wide_y_;
};

}  // namespace pydedup::detail
