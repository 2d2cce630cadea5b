// SPDX-License-Identifier: Apache-2.0
// Exact distances: the kernels' one pass, and a careful one in f64 for what their sums cannot hold.
#include <cmath>
#include <limits>
#include <string>

#include "similarity/batch.hpp"

namespace pydedup {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Distance kBeyond{kInfinity, kNan, kNan};

// Sums of squares in this range lost nothing that matters to under- or overflow.
bool is_safe(double squares, Dtype dtype, std::size_t elements) noexcept {
    const bool wide = dtype == Dtype::f64;
    return squares < (wide ? 1e300 : 1e30) &&
           squares > (wide ? 1e-290 : 1e-30) * static_cast<double>(elements);
}

// Whether the kernel's sums may be trusted. Equal entries leave no doubt, whatever their size.
bool is_sure(const Comparison& found, Dtype dtype, std::size_t elements) noexcept {
    if (found.greatest_difference == 0 && found.squared_difference == 0) {
        return found.squares < kInfinity;
    }
    return is_safe(found.squares, dtype, elements) &&
           is_safe(found.squared_difference, dtype, elements);
}

double relative(double squared_difference, double squares) noexcept {
    if (squared_difference == 0) return 0;
    return squares == 0 ? kInfinity : std::sqrt(squared_difference / squares);
}

Distance careful(const std::byte* a, const BlockBatch& a_shape, const std::byte* b,
                 const BlockBatch& b_shape, double eps, double limit) {
    const std::size_t elements = a_shape.rows * a_shape.cols;
    std::vector<double> left(elements);
    std::vector<double> right(elements);
    similarity::widen_block(a, a_shape, left.data());
    similarity::widen_block(b, b_shape, right.data());
    double greatest = 0;
    double largest = 0;
    bool finite = true;
    std::size_t within = 0;
    for (std::size_t i = 0; i < elements; ++i) {
        finite = finite && std::isfinite(left[i]) && std::isfinite(right[i]);
        largest = std::max({largest, std::abs(left[i]), std::abs(right[i])});
        const double difference = std::abs(left[i] - right[i]);
        greatest = std::max(greatest, difference);
        within += difference <= eps ? 1 : 0;  // never of a NaN
    }
    const double share = static_cast<double>(within) / static_cast<double>(elements);
    if (!finite) return limit < kInfinity ? kBeyond : Distance{kInfinity, kInfinity, share};
    int exponent = 0;
    if (largest > 0) static_cast<void>(std::frexp(largest, &exponent));
    double squares = 0;
    double squared_difference = 0;
    for (std::size_t i = 0; i < elements; ++i) {
        const double x = std::ldexp(left[i], -exponent);
        const double d = x - std::ldexp(right[i], -exponent);
        squares += x * x;
        squared_difference += d * d;
    }
    const double distance = relative(squared_difference, squares);
    return distance <= limit ? Distance{distance, greatest, share} : kBeyond;
}

// Rows without gaps and of whole groups are one long row: the same lanes, the same sums.
struct Extent {
    std::size_t rows, cols, a_stride, b_stride;
};

Extent extent_of(const BlockBatch& a, const BlockBatch& b) noexcept {
    const std::size_t row_bytes = a.cols * item_bytes(a.dtype);
    if (a.row_stride == row_bytes && b.row_stride == row_bytes && a.cols % kSimLanes == 0) {
        return {1, a.rows * a.cols, 0, 0};
    }
    return {a.rows, a.cols, a.row_stride, b.row_stride};
}

void check_numbers(const char* name, std::span<const std::int64_t> numbers, std::size_t count) {
    for (const std::int64_t number : numbers) {
        if (static_cast<std::uint64_t>(number) >= count) {
            throw Error(ErrorCode::invalid_argument, std::string(name) + " names block " +
                                                         std::to_string(number) + " of " +
                                                         std::to_string(count));
        }
    }
}

}  // namespace

void compare_blocks(const BlockBatch& a, const BlockBatch& b, std::span<const std::int64_t> left,
                    std::span<const std::int64_t> right, double eps, double limit,
                    std::span<Distance> out, unsigned threads) {
    if (a.dtype != b.dtype || a.rows != b.rows || a.cols != b.cols) {
        throw Error(ErrorCode::invalid_argument, "a and b differ in the shape or dtype of a block");
    }
    if (!(eps >= 0)) throw Error(ErrorCode::invalid_argument, "eps must be a number from 0 on");
    if (!(limit >= 0)) throw Error(ErrorCode::invalid_argument, "limit must be a number from 0 on");
    similarity::check_count(right.size(), left.size(), "blocks of b", "of a");
    similarity::check_count(out.size(), left.size(), "distances", "pairs");
    check_numbers("pairs[0]", left, a.count);
    check_numbers("pairs[1]", right, b.count);
    const ElementKernels& kernel = similarity::element_kernels(a.dtype);
    const Extent extent = extent_of(a, b);
    const std::size_t elements = a.rows * a.cols;
    similarity::for_blocks(
        left.size(), similarity::block_bytes(a), threads, [&](std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i) {
                const std::byte* from = a.block(static_cast<std::size_t>(left[i]));
                const std::byte* to = b.block(static_cast<std::size_t>(right[i]));
                const auto* x = reinterpret_cast<const std::uint8_t*>(from);
                const auto* y = reinterpret_cast<const std::uint8_t*>(to);
                double stop = kInfinity;
                if (limit < kInfinity) {
                    const double squares =
                        kernel.sum_squares(x, extent.a_stride, extent.rows, extent.cols);
                    // A hair more, so that rounding never stops what the last test would accept.
                    if (is_safe(squares, a.dtype, elements)) {
                        stop = limit * limit * squares * (1 + 1e-9);
                    }
                }
                Comparison found{};
                kernel.compare(x, extent.a_stride, y, extent.b_stride, extent.rows, extent.cols,
                               eps, stop, found);
                if (found.squared_difference > stop) {
                    out[i] = kBeyond;
                } else if (is_sure(found, a.dtype, elements)) {
                    const double distance = relative(found.squared_difference, found.squares);
                    out[i] = distance <= limit ? Distance{distance, found.greatest_difference,
                                                          static_cast<double>(found.within) /
                                                              static_cast<double>(elements)}
                                               : kBeyond;
                } else {
                    out[i] = careful(from, a, to, b, eps, limit);
                }
            }
        });
}

}  // namespace pydedup
