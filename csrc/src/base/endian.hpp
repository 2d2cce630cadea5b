// SPDX-License-Identifier: Apache-2.0
// Everything on disk is little-endian.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstring>

namespace pydedup {

template <std::integral T>
[[nodiscard]] T load_le(const std::byte* from) noexcept {
    static_assert(std::endian::native == std::endian::little, "big-endian needs byte swaps here");
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <std::integral T>
void store_le(std::byte* to, T value) noexcept {
    std::memcpy(to, &value, sizeof value);
}

}  // namespace pydedup
