// SPDX-License-Identifier: Apache-2.0
// How one block is kept in bytes (docs/format.md, "Block encodings"): by itself, or as a delta on a
// base block. Everything here is a pure function, safe between threads, and gives the same bytes
// with every kernel. Which block is whose base, and where it is stored, is for callers to know.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "pydedup/types.hpp"

namespace pydedup {

/// Codes are persisted in pages: never renumber.
enum class Encoding : std::uint8_t {
    raw = 0,        ///< rows * cols elements, row-major, without gaps
    planes = 1,     ///< byte planes, each raw, constant or Huffman-coded
    delta = 2,      ///< exact difference to a base block
    quantised = 3,  ///< difference to a base block within an error bound
};

/// Whether a block of this encoding says nothing without its base. A base is never itself one.
[[nodiscard]] constexpr bool is_delta(Encoding encoding) noexcept {
    return encoding == Encoding::delta || encoding == Encoding::quantised;
}

/// Version of the `planes` encoding, persisted in each such block.
inline constexpr std::uint8_t kPlanesVersion = 1;

/// Compression must save at least 1/20 of the raw bytes (5 %). Of a block: less is not worth that
/// the kernels cannot compute on it where it lies. Of a plane: decoding one costs more than reading
/// it, so one that saves less stays raw.
inline constexpr std::size_t kMinPlaneSaving = 20;

struct BlockView;

/// Keeps what a block decodes to for those who want it again.
class BlockKeeper {
  public:
    BlockKeeper() = default;
    /// Copies the elements of `block`, whose rows are `stride_bytes` apart. Called on any thread.
    virtual void keep(const BlockView& block, const std::byte* rows,
                      std::size_t stride_bytes) noexcept = 0;

  protected:
    BlockKeeper(const BlockKeeper&) = default;
    BlockKeeper& operator=(const BlockKeeper&) = default;
    ~BlockKeeper() = default;
};

/// One stored block. `data` belongs to whoever made the view (a page).
struct BlockView {
    const std::byte* data;
    std::uint32_t length;  ///< bytes at `data`
    Encoding encoding;
    Dtype dtype;
    std::uint32_t rows;
    std::uint32_t cols;
    std::uint64_t base;  ///< tag of the block that this one is a delta of; 0 = none
    /// That block itself, which decoding needs. Whoever gives out a delta sets it, and keeps it
    /// alive.
    const BlockView* base_block = nullptr;
    /// Who is given the elements once they were decoded, and outlives that; or nobody.
    BlockKeeper* keeper = nullptr;
    /// Bytes in front of `data`, of the same page, that a delta may refer to.
    std::uint32_t before = 0;

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

/// Writes the elements of a block to `dst`, rows `dst_stride_bytes` apart; those of a delta with
/// the help of its base_block. Throws Error{corrupt_page} when the bytes are no such block
/// (whatever they are, nothing but the block's rectangle is written) or are a delta without its
/// base, Error{unsupported_format} for a newer version of the encoding.
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

/// Encodes a block as a delta on `base`, which has its shape and dtype, or another dtype where both
/// are among f64, f32, f16 and bf16 (the base is first rounded to the block's dtype, or, for an
/// exact delta, to a narrower one that all of the block's elements have). Without
/// `max_rel_error` (above 0, below 1), or where no quantised delta keeps it or is smaller, the
/// delta is exact. With it, |decoded - block| <= max_rel_error * |block| in Euclidean norm, and
/// elements that are 0 stay 0 (their sign may be lost). Returns nullopt when the delta takes more
/// than out.size() bytes or is no smaller than the raw block, factors aside. Throws
/// Error{invalid_argument}.
[[nodiscard]] std::optional<EncodedBlock> encode_delta(const MatrixRef& block,
                                                       const MatrixRef& base,
                                                       std::optional<double> max_rel_error,
                                                       std::span<std::byte> out);

/// About how many bytes encode_delta() would write, from a sample of the elements: for choosing
/// among several bases. At most the block's raw bytes.
[[nodiscard]] std::size_t estimate_delta(const MatrixRef& block, const MatrixRef& base,
                                         std::optional<double> max_rel_error);

/// Writes the elements of a delta to `dst`, rows `dst_stride_bytes` apart. `base` is the block that
/// it was made from, in whatever encoding but a delta's. Throws as decode_block() does, also
/// Error{corrupt_page} for another base.
void decode_delta(const BlockView& delta, const BlockView& base, std::byte* dst,
                  std::size_t dst_stride_bytes);

/// The base of one block of a matrix: block `index` of a matrix of bases, whose grid may be
/// another's.
struct BaseBlocks {
    MatrixRef matrix;
    BlockGrid grid;
    std::span<const std::int64_t> indices;  ///< one for each block
};

/// By how much relatives of low rank differ: element (i, j) of block b's base is moved by
/// 2^exponent * sum over k below rank of of_rows[row_of[b]][k][i] * of_cols[col_of[b]][k][j], which
/// is exact, and then rounded to the dtype; what is not finite, or where that sum is 0, stays. Rank
/// is 1 to 64, the exponent -900 to 900, numbers are below 2^23.
struct LowRankFactors {
    unsigned rank;
    int exponent;
    std::span<const std::int32_t> of_rows;  ///< any number of rank * rows of a block
    std::span<const std::int32_t> of_cols;  ///< any number of rank * columns of a block
    std::span<const std::int64_t> row_of;   ///< one for each block
    std::span<const std::int64_t> col_of;   ///< one for each block
};

/// encode_delta() for blocks `indices` of a matrix, into `arena`, one after another without gaps,
/// block i at offsets[i]. Up to eight in a row are coded alike where that takes hardly more room,
/// which saves time: so their bytes may differ from those of encode_delta(), but not by `threads`.
/// limits[i] is the most bytes that block i may take; encoded[i].length is 0 where that is not
/// enough. `arena` has room for the sum of the limits; returns how many bytes of it were used.
/// `threads` 0 means one per core for large inputs. Where `is_transposed`, blocks are deltas on
/// their bases transposed. With `factors`, blocks of floats, all of one shape, are deltas
/// on bases that these moved.
[[nodiscard]] std::size_t encode_deltas(
    const MatrixRef& matrix, const BlockGrid& grid, std::span<const std::int64_t> indices,
    const BaseBlocks& bases, std::span<const std::int64_t> limits,
    std::optional<double> max_rel_error, std::span<std::byte> arena,
    std::span<std::int64_t> offsets, std::span<EncodedBlock> encoded, unsigned threads = 0,
    const LowRankFactors* factors = nullptr, bool is_transposed = false);

/// Whether a block is a delta with factors.
[[nodiscard]] bool has_factors(const BlockView& block) noexcept;

/// Bytes of a block away from its page: more than its length where it refers to factors of another
/// block of that page.
[[nodiscard]] std::size_t encoded_bytes(const BlockView& block);

/// Copies a block as it is encoded, encoded_bytes() to `out`: with its factors, wherever they lie.
void copy_encoded(const BlockView& block, std::span<std::byte> out);

/// estimates[i] = estimate_delta() of block indices[i] and its base.
void estimate_deltas(const MatrixRef& matrix, const BlockGrid& grid,
                     std::span<const std::int64_t> indices, const BaseBlocks& bases,
                     std::optional<double> max_rel_error, std::span<std::int64_t> estimates,
                     unsigned threads = 0);

}  // namespace pydedup
