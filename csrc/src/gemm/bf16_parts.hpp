// SPDX-License-Identifier: Apache-2.0
// Which f32 numbers are bf16 numbers, or the sum of three (Bf16GemmKernels::cut).
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/parallel.hpp"

namespace pydedup::detail {

/// Of how many bf16 numbers each of x (count) is the sum, so that a product loses nothing. One: all
/// are bf16 numbers, and none is subnormal. Three, if they may be cut: all are zero, not finite, or
/// at least 2^-94, so that no part is subnormal. Else none.
[[nodiscard]] inline unsigned bf16_parts(const float* x, std::size_t count, bool may_cut,
                                         unsigned threads) {
    constexpr std::size_t kPiece = std::size_t{1} << 14;
    constexpr std::uint32_t kLeastNormal = 1U << 23;
    constexpr std::uint32_t kLeastOfThree = (127U - 94U) << 23;
    std::atomic<bool> one{true};
    std::atomic<bool> three{may_cut};
    const auto undecided = [&] {
        return one.load(std::memory_order_relaxed) || three.load(std::memory_order_relaxed);
    };
    parallel_for(count, kPiece, threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t at = begin; at < end && undecided();) {
            std::uint32_t low = 0;
            std::uint32_t subnormal = 0;
            std::uint32_t small = 0;
            for (const std::size_t stop = std::min(end, at + 256); at < stop; ++at) {
                const auto bits = std::bit_cast<std::uint32_t>(x[at]);
                low |= bits << 16;
                const std::uint32_t below = (bits & 0x7FFFFFFFU) - 1U;  // zero: the most there is
                subnormal |= static_cast<std::uint32_t>(below < kLeastNormal - 1U);
                small |= static_cast<std::uint32_t>(below < kLeastOfThree - 1U);
            }
            if ((low | subnormal) != 0) one.store(false, std::memory_order_relaxed);
            if (small != 0) three.store(false, std::memory_order_relaxed);
        }
    });
    if (one) return 1;
    return three ? 3 : 0;
}

/// Whether any of these bf16 numbers is subnormal.
[[nodiscard]] inline bool has_subnormal(const std::uint16_t* x, std::size_t count) noexcept {
    constexpr std::int16_t kLeastNormal = 1 << 7;
    std::int16_t subnormal = 0;  // 16 bits and signs, as any vector unit compares
    for (std::size_t i = 0; i < count; ++i) {
        const auto size = static_cast<std::int16_t>(x[i] & 0x7FFF);
        subnormal |= static_cast<std::int16_t>((size > 0) & (size < kLeastNormal));
    }
    return subnormal != 0;
}

/// The same of many, by threads.
[[nodiscard]] inline bool has_subnormal(const std::uint16_t* x, std::size_t count,
                                        unsigned threads) {
    constexpr std::size_t kPiece = std::size_t{1} << 14;
    std::atomic<bool> found{false};
    parallel_for(count, kPiece, threads, [&](std::size_t begin, std::size_t end) {
        if (has_subnormal(x + begin, end - begin)) found.store(true, std::memory_order_relaxed);
    });
    return found;
}

}  // namespace pydedup::detail
