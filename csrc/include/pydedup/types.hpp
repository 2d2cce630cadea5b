// SPDX-License-Identifier: Apache-2.0
// Values that every area of the core speaks of. Codes are persisted in pages: never renumber.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pydedup {

enum class Dtype : std::uint8_t {
    f64 = 1,
    f32 = 2,
    f16 = 3,
    bf16 = 4,
    i8 = 5,
    i16 = 6,
    i32 = 7,
    i64 = 8,
    u8 = 9,
    u16 = 10,
    u32 = 11,
    u64 = 12,
    boolean = 13,
    f8_e4m3 = 14,
    f8_e5m2 = 15,
};

/// Bytes of one element, or 0 for a code that is not a dtype.
[[nodiscard]] constexpr std::size_t item_bytes(Dtype dtype) noexcept {
    switch (dtype) {
        case Dtype::f64:
        case Dtype::i64:
        case Dtype::u64:
            return 8;
        case Dtype::f32:
        case Dtype::i32:
        case Dtype::u32:
            return 4;
        case Dtype::f16:
        case Dtype::bf16:
        case Dtype::i16:
        case Dtype::u16:
            return 2;
        case Dtype::i8:
        case Dtype::u8:
        case Dtype::boolean:
        case Dtype::f8_e4m3:
        case Dtype::f8_e5m2:
            return 1;
    }
    return 0;
}

/// 128-bit digest of logical content; little-endian on disk, `lo` first.
struct Digest {
    std::uint64_t lo;
    std::uint64_t hi;
    friend bool operator==(const Digest&, const Digest&) = default;
};

using Bytes = std::span<const std::byte>;

/// A row-major matrix in somebody else's memory. `stride_bytes` is from row to row.
struct MatrixRef {
    const std::byte* data;
    std::size_t rows;
    std::size_t cols;
    std::size_t stride_bytes;
    Dtype dtype;
};

/// Blocks are numbered row-major over the block grid; edge blocks have their true size.
struct BlockGrid {
    std::size_t rows, cols;              // of the matrix
    std::size_t block_rows, block_cols;  // of an inner block
    [[nodiscard]] std::size_t grid_rows() const noexcept {
        return (rows + block_rows - 1) / block_rows;
    }
    [[nodiscard]] std::size_t grid_cols() const noexcept {
        return (cols + block_cols - 1) / block_cols;
    }
    [[nodiscard]] std::size_t count() const noexcept { return grid_rows() * grid_cols(); }
};

/// One block as a rectangle of its matrix.
struct BlockRect {
    std::size_t row0, col0, rows, cols;
};

[[nodiscard]] inline BlockRect block_rect(const BlockGrid& grid, std::size_t index) noexcept {
    const std::size_t row0 = index / grid.grid_cols() * grid.block_rows;
    const std::size_t col0 = index % grid.grid_cols() * grid.block_cols;
    return {row0, col0, grid.rows - row0 < grid.block_rows ? grid.rows - row0 : grid.block_rows,
            grid.cols - col0 < grid.block_cols ? grid.cols - col0 : grid.block_cols};
}

/// One block where it lies in its matrix.
[[nodiscard]] inline MatrixRef block_of(const MatrixRef& matrix, const BlockGrid& grid,
                                        std::size_t index) noexcept {
    const BlockRect rect = block_rect(grid, index);
    return {matrix.data + rect.row0 * matrix.stride_bytes + rect.col0 * item_bytes(matrix.dtype),
            rect.rows, rect.cols, matrix.stride_bytes, matrix.dtype};
}

}  // namespace pydedup
