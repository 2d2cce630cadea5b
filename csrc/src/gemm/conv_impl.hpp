// SPDX-License-Identifier: Apache-2.0
// What every way to convolve has in common: blocks that are checked and counted.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "pydedup/conv.hpp"

namespace pydedup {

class Conv2d::Impl {
  public:
    explicit Impl(const Problem& problem) : p_(problem) {}
    virtual ~Impl() = default;

    void feed(std::span<const BlockView> blocks);

    [[nodiscard]] std::size_t fed() const noexcept { return fed_; }

  protected:
    // Some blocks, of at least one image.
    virtual void convolve(std::span<const BlockView> blocks) = 0;

    const Problem p_;
    std::size_t fed_ = 0;
};

}  // namespace pydedup
