// SPDX-License-Identifier: Apache-2.0
// What every way to convolve has in common: blocks that are checked and counted.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "gemm/activation.hpp"
#include "pydedup/conv.hpp"

namespace pydedup {

class Conv2d::Impl {
  public:
    explicit Impl(const Problem& problem) : p_(problem) {}
    virtual ~Impl() = default;

    /// By tiles of the unfolded image: conv_tiled.cpp.
    [[nodiscard]] static std::unique_ptr<Impl> tiled(const Problem& problem);
    /// Without unfolding it: conv_direct.cpp. nullptr where that would take longer.
    [[nodiscard]] static std::unique_ptr<Impl> direct(const Problem& problem);

    void feed(std::span<const BlockView> blocks);

    [[nodiscard]] std::size_t fed() const noexcept { return fed_; }

  protected:
    // Some blocks, of at least one image.
    virtual void convolve(std::span<const BlockView> blocks) = 0;

    // What blocks are, in rows of blocks from `first` on, and by how many threads they are best
    // multiplied.
    struct Work {
        std::size_t first, panels, weights;
        unsigned threads;
    };
    [[nodiscard]] Work work_of(std::span<const BlockView> blocks) const noexcept;

    const Problem p_;
    std::size_t fed_ = 0;
};

}  // namespace pydedup
