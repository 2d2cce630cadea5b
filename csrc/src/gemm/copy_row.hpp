// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
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

}  // namespace pydedup::detail
