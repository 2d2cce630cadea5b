// SPDX-License-Identifier: Apache-2.0
// What is asked of memory while what comes before it is computed with.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/rounding.hpp"
#include "kernels/gemm_kernels.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// Largest block to ask for: it has to stay in the second-level cache until it is used.
inline constexpr std::size_t kMaxAheadBytes = std::size_t{256} << 10;

/// The stored bytes of a block as elements E, if they are worth asking for.
template <class E>
[[nodiscard]] GemmNext<E> ahead_of(const BlockView& block) noexcept {
    if (block.length > kMaxAheadBytes) return {};
    const auto* const begin = reinterpret_cast<const E*>(block.data);
    const std::size_t count = block.length / sizeof(E);
    return {begin, begin + count};
}

/// The same in shares of whole lines, for so many calls of a kernel; later ones ask for nothing.
template <class E>
class AheadShares {
  public:
    AheadShares(const GemmNext<E>& next, std::size_t calls) noexcept
        : at_(next.w),
          end_(next.w_end),
          each_(round_up(ceil_div(static_cast<std::size_t>(end_ - at_), calls), 64 / sizeof(E))) {}

    [[nodiscard]] GemmNext<E> take() noexcept {
        const E* const begin = at_;
        at_ += std::min(each_, static_cast<std::size_t>(end_ - at_));
        return {begin, at_};
    }

  private:
    const E* at_;
    const E* end_;
    std::size_t each_;
};

/// Asks for rows x cols elements that will be written, rows at a distance of ld: where they lie far
/// apart each line is a miss of its own.
template <class E>
void ask_to_write(const E* to, std::size_t ld, std::size_t rows, std::size_t cols) noexcept {
    constexpr std::size_t kLine = 64 / sizeof(E);
    for (std::size_t r = 0; r < rows; ++r, to += ld) {
        for (std::size_t c = 0; c < cols; c += kLine) __builtin_prefetch(to + c, 1, 2);
    }
}

}  // namespace pydedup::detail
