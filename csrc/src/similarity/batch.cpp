// SPDX-License-Identifier: Apache-2.0
#include "similarity/batch.hpp"

#include <bit>
#include <cmath>
#include <limits>

namespace pydedup {
namespace {

void check_shape(std::size_t rows, std::size_t cols, Dtype dtype) {
    if (!similarity::is_float(dtype)) {
        throw Error(ErrorCode::invalid_argument,
                    "similarity takes blocks of f32, f64, f16 or bf16; integers have no distance "
                    "that could be shared");
    }
    if (rows == 0 || cols == 0) {
        throw Error(ErrorCode::invalid_argument, "block shape (" + std::to_string(rows) + ", " +
                                                     std::to_string(cols) +
                                                     ") must be at least (1, 1)");
    }
    constexpr std::size_t kMost = std::size_t{1} << 31;
    if (rows > kMost || cols > kMost / rows) {
        throw Error(ErrorCode::invalid_argument, "block shape (" + std::to_string(rows) + ", " +
                                                     std::to_string(cols) +
                                                     ") has more than 2**31 elements");
    }
}

}  // namespace

BlockBatch dense_blocks(const std::byte* data, std::size_t count, std::size_t rows,
                        std::size_t cols, Dtype dtype) {
    check_shape(rows, cols, dtype);
    const std::size_t row_bytes = cols * item_bytes(dtype);
    const std::size_t bytes = rows * row_bytes;
    if (count > std::numeric_limits<std::size_t>::max() / bytes) {
        throw Error(ErrorCode::invalid_argument, std::to_string(count) + " blocks of " +
                                                     std::to_string(bytes) + " bytes overflow");
    }
    return {data, count, rows, cols, row_bytes, std::max<std::size_t>(count, 1), bytes, 0, dtype};
}

BlockBatch whole_blocks(const MatrixRef& matrix, std::size_t block_rows, std::size_t block_cols) {
    check_shape(block_rows, block_cols, matrix.dtype);
    const std::size_t across = matrix.cols / block_cols;
    const std::size_t down = matrix.rows / block_rows;
    return {matrix.data,
            across * down,
            block_rows,
            block_cols,
            matrix.stride_bytes,
            std::max<std::size_t>(across, 1),
            block_cols * item_bytes(matrix.dtype),
            block_rows * matrix.stride_bytes,
            matrix.dtype};
}

namespace similarity {
namespace {

template <class T>
T load(const std::byte* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

double widen_f16(std::uint16_t half) noexcept {
    const int exponent = (half >> 10) & 0x1F;
    const int mantissa = half & 0x3FF;
    double value;
    if (exponent == 31) {
        value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
    } else if (exponent == 0) {
        value = mantissa * 0x1p-24;
    } else {
        value = std::ldexp(1024 + mantissa, exponent - 25);
    }
    return (half & 0x8000U) != 0 ? -value : value;
}

}  // namespace

void widen_block(const std::byte* block, const BlockBatch& shape, double* out) {
    const std::size_t item = item_bytes(shape.dtype);
    for (std::size_t r = 0; r < shape.rows; ++r) {
        const std::byte* row = block + r * shape.row_stride;
        for (std::size_t c = 0; c < shape.cols; ++c, ++out) {
            const std::byte* at = row + c * item;
            switch (shape.dtype) {
                case Dtype::f64:
                    *out = load<double>(at);
                    break;
                case Dtype::f16:
                    *out = widen_f16(load<std::uint16_t>(at));
                    break;
                case Dtype::bf16:
                    *out = static_cast<double>(std::bit_cast<float>(
                        static_cast<std::uint32_t>(load<std::uint16_t>(at)) << 16));
                    break;
                default:
                    *out = static_cast<double>(load<float>(at));
                    break;
            }
        }
    }
}

}  // namespace similarity
}  // namespace pydedup
