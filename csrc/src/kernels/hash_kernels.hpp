// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

/// Blocks that hash_panel takes at once: their states fill 4 KiB.
inline constexpr std::size_t kPanelBlocks = 16;

struct HashKernels {
    /// Digest of rows x row_bytes bytes, rows stride_bytes apart; out[0] low, out[1] high half. Of
    /// one row, 0 apart, nothing that lies behind is going to be hashed.
    void (*hash_rows)(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                      std::size_t stride_bytes, std::uint64_t seed, std::uint64_t* out) noexcept;

    /// hash_rows of `blocks` (at most kPanelBlocks) equal blocks that lie side by side in a matrix:
    /// block b begins at data + b * row_bytes. out[2 * b] and out[2 * b + 1] are its halves.
    void (*hash_panel)(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                       std::size_t row_bytes, std::size_t stride_bytes, std::uint64_t seed,
                       std::uint64_t* out) noexcept;
};

}  // namespace pydedup
