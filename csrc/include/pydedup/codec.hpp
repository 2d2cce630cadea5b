// SPDX-License-Identifier: Apache-2.0
// How one block is kept in bytes (docs/format.md, "Block encodings"). Everything here is a pure
// function, safe between threads, and gives the same bytes with every kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "pydedup/types.hpp"

namespace pydedup {

/// Codes are persisted in pages: never renumber. 2 and up are kept for deltas on a base block.
enum class Encoding : std::uint8_t {
    raw = 0,     ///< rows * cols elements, row-major, without gaps
    planes = 1,  ///< byte planes, each raw, constant or Huffman-coded
};

/// Version of the `planes` encoding, persisted in each such block.
inline constexpr std::uint8_t kPlanesVersion = 1;

/// Compression must save at least 1/20 of the raw bytes (5 %). Of a block: less is not worth that
/// the kernels cannot compute on it where it lies. Of a plane: decoding one costs more than reading
/// it, so one that saves less stays raw.
inline constexpr std::size_t kMinPlaneSaving = 20;

/// One stored block. `data` belongs to whoever made the view (a page).
struct BlockView {
    const std::byte* data;
    std::uint32_t length;  ///< bytes at `data`
    Encoding encoding;
    Dtype dtype;
    std::uint32_t rows;
    std::uint32_t cols;
    std::uint64_t base;  ///< id of the block that this one is a delta of; 0 = none

    [[nodiscard]] std::size_t row_bytes() const noexcept { return cols * item_bytes(dtype); }
    [[nodiscard]] std::size_t raw_bytes() const noexcept { return rows * row_bytes(); }
};

struct EncodedBlock {
    Encoding encoding;
    std::uint32_t length;  ///< bytes written
};

/// Encodes a block (one or more elements, below 4 GiB) into `out`, which has room for its raw
/// bytes. `planes` false means raw without trying. Throws Error{invalid_argument}.
[[nodiscard]] EncodedBlock encode_block(const MatrixRef& block, bool planes,
                                        std::span<std::byte> out);

/// Writes the elements of a block to `dst`, rows `dst_stride_bytes` apart. Throws
/// Error{corrupt_page} when the bytes are no such block (whatever they are, nothing but the block's
/// rectangle is written), Error{unsupported_format} for a newer version of the encoding.
void decode_block(const BlockView& block, std::byte* dst, std::size_t dst_stride_bytes);

/// Encodes the blocks `indices` of a matrix into `arena`, one after another without gaps, block i
/// at offsets[i]. `arena` has room for the raw bytes of all of them (raw_bytes_of); returns how
/// many bytes of it were used. `threads` 0 means one per core for large inputs.
[[nodiscard]] std::size_t encode_blocks(const MatrixRef& matrix, const BlockGrid& grid,
                                        std::span<const std::int64_t> indices, bool planes,
                                        std::span<std::byte> arena, std::span<std::int64_t> offsets,
                                        std::span<EncodedBlock> encoded, unsigned threads = 0);

/// Raw bytes of the blocks `indices`. Throws Error{invalid_argument} for an index outside the grid.
[[nodiscard]] std::size_t raw_bytes_of(const MatrixRef& matrix, const BlockGrid& grid,
                                       std::span<const std::int64_t> indices);

}  // namespace pydedup
