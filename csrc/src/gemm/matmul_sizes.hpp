// SPDX-License-Identifier: Apache-2.0
// How much of a matrix product is one task, one chunk, one pass: by the sizes of caches, measured.
#pragma once

#include <cstddef>

namespace pydedup::detail {

// Rows of x in one task. At most: their sums for a panel of 64 rows are 128 KiB of f32, which stays
// in the second-level cache beside the block. At least: fewer would read W more often for nothing.
inline constexpr std::size_t kMaxTaskRows = 512;
inline constexpr std::size_t kMinTaskRows = 32;
// Bytes of x that one pass of a tile reads: half of a 32 KiB first-level cache.
inline constexpr std::size_t kPassBytes = std::size_t{16} << 10;
// Bytes of packed x that a task packs for itself; rows that it takes all the same, as W is read
// once for each chunk; and fewer, where threads would have nothing to do otherwise.
inline constexpr std::size_t kChunkBytes = std::size_t{256} << 10;
inline constexpr std::size_t kMinChunkRows = 144;
inline constexpr std::size_t kLeastChunkRows = 96;
// Where W is cut, too: bytes of a chunk; rows that it has at least for each panel, and within what
// bounds.
inline constexpr std::size_t kCutChunkBytes = std::size_t{8} << 20;
inline constexpr std::size_t kCutRowsOfPanel = 4;
inline constexpr std::size_t kLeastCutRows = 48;
inline constexpr std::size_t kEnoughCutRows = 192;
// Packed x of so many bytes is in the second-level cache from one panel to the next.
inline constexpr std::size_t kCachedBytes = std::size_t{256} << 10;
// Sums of the panels that a task takes together: they share the second-level cache with x and the
// blocks. Where blocks are taken together, too (AMX), it is of 2 MiB.
inline constexpr std::size_t kSumBytes = std::size_t{256} << 10;
inline constexpr std::size_t kSumBytesTogether = std::size_t{512} << 10;
// Pieces per thread that a call should have, so that one late thread does not hold up the rest.
inline constexpr std::size_t kPiecesPerThread = 4;

}  // namespace pydedup::detail
