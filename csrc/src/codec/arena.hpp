// SPDX-License-Identifier: Apache-2.0
// Where blocks that were encoded side by side end up. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "pydedup/codec.hpp"

namespace pydedup::detail {

/// Moves blocks together that lie at ascending offsets with gaps; returns the bytes they take.
inline std::size_t close_gaps(std::span<std::byte> arena, std::span<const EncodedBlock> encoded,
                              std::span<std::int64_t> offsets) {
    std::size_t used = 0;
    for (std::size_t i = 0; i < encoded.size(); ++i) {
        const auto from = static_cast<std::size_t>(offsets[i]);
        if (from != used) std::memmove(arena.data() + used, arena.data() + from, encoded[i].length);
        offsets[i] = static_cast<std::int64_t>(used);
        used += encoded[i].length;
    }
    return used;
}

}  // namespace pydedup::detail
