// SPDX-License-Identifier: Apache-2.0
// The memory that a thread keeps for deltas.
#include "codec/delta_room.hpp"

#include <array>

#include "base/rounding.hpp"

namespace pydedup::detail {

Room::Room(std::size_t count, std::size_t item) {
    const std::size_t wide = item == 8 ? 8 : 4;
    const std::size_t values = count * 8 + 64;
    const auto rounded = [](std::size_t bytes) { return round_up(bytes, 64); };
    const std::array<std::size_t, 7> sizes = {
        rounded(count * item), rounded(values), rounded(count * wide), rounded(count),
        rounded(count),        rounded(count),  rounded(count)};
    std::size_t total = 64;
    for (const std::size_t size : sizes) total += size;
    std::uint8_t* at = nullptr;
    if (total > kKept) {
        own_ = std::make_unique_for_overwrite<std::uint8_t[]>(total);
        at = own_.get();
    } else {
        thread_local std::unique_ptr<std::uint8_t[]> kept;
        if (!kept) kept = std::make_unique_for_overwrite<std::uint8_t[]>(kKept);
        at = kept.get();
    }
    at += (64 - reinterpret_cast<std::uintptr_t>(at) % 64) % 64;
    std::array<std::uint8_t*, 7> parts{};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        parts[i] = at;
        at += sizes[i];
    }
    block = parts[0];
    values_of = parts[1];
    z = parts[2];
    classes = parts[3];
    symbols = parts[4];
    contexts = parts[5];
    features = parts[6];
}

}  // namespace pydedup::detail
