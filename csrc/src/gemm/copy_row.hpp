// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pydedup::detail {

/// Neighbours in a row of an image: for few, cheaper than a call of memcpy.
template <class T>
void copy_row(const T* from, std::size_t count, T* to) noexcept {
    constexpr std::size_t kStep = 16 / sizeof(T);
    constexpr std::size_t kFew = 128 / sizeof(T);
    if (count > kFew) {
        std::memcpy(to, from, count * sizeof(T));
        return;
    }
    if (count < kStep) {
        for (std::size_t i = 0; i < count; ++i) to[i] = from[i];
        return;
    }
    for (std::size_t i = 0; i + kStep < count; i += kStep) std::memcpy(to + i, from + i, 16);
    std::memcpy(to + count - kStep, from + count - kStep, 16);
}

/// The same of bf16 numbers, widened.
inline void copy_row(const std::uint16_t* from, std::size_t count, float* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        to[i] = std::bit_cast<float>(std::uint32_t{from[i]} << 16);
    }
}

/// Every stride-th of them.
inline void pick_row(const std::uint16_t* from, std::size_t stride, std::size_t count,
                     float* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        to[i] = std::bit_cast<float>(std::uint32_t{from[i * stride]} << 16);
    }
}

}  // namespace pydedup::detail
