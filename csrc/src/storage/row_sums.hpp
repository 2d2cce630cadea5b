// SPDX-License-Identifier: Apache-2.0
// Sums and maxima of rows of one bag, in one column of blocks. Private to storage/.
//
// `inline` is here for the compiler's thresholds: without it, it calls reduce_together for each
// bag and column of blocks, 4 % more instructions for bags of 32 rows.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "dispatch/dispatch.hpp"
#include "gemm/weights.hpp"
#include "pydedup/row_table.hpp"
#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Rows of a bag that one kernel call adds up.
inline constexpr std::size_t kRowsTogether = 256;

/// Rows of one bag, in one column of blocks, for one call of a kernel.
template <class T>
struct Together {
    const std::byte* rows[kRowsTogether];
    T scales[kRowsTogether];
    std::size_t count = 0;
};

template <class T>
void max_row(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t j = 0; j < count; ++j) {
        // Written so that a NaN on either side is kept.
        to[j] = from[j] <= to[j] || std::isnan(to[j]) ? to[j] : from[j];
    }
}

/// Adds up what a kernel reads where it lies; false for other dtypes.
template <class T>
[[nodiscard]] inline bool sum_in_place(const RowsKernels& kernel, const Together<T>& together,
                                       Dtype dtype, const T* scales, std::size_t cols, T* to) {
    const auto rows_as = [&]<class W>(const W*) {
        return reinterpret_cast<const W* const*>(together.rows);
    };
    if constexpr (sizeof(T) == 8) {
        if (dtype != Dtype::f64) return false;
        kernel.sum_f64(rows_as(static_cast<const double*>(nullptr)), together.count, scales, cols,
                       to);
        return true;
    } else {
        switch (dtype) {
            case Dtype::f32:
                kernel.sum_f32(rows_as(static_cast<const float*>(nullptr)), together.count, scales,
                               cols, to);
                return true;
            case Dtype::bf16:
            case Dtype::f16:
                (dtype == Dtype::bf16 ? kernel.sum_bf16 : kernel.sum_f16)(
                    rows_as(static_cast<const std::uint16_t*>(nullptr)), together.count, scales,
                    cols, to);
                return true;
            default:
                return false;
        }
    }
}

/// Adds the rows to `to`, times their scales if `scaled`, or raises it to their maxima.
template <class T>
inline void reduce_together(const Together<T>& together, Dtype dtype, bool scaled, std::size_t cols,
                            BagMode mode, T* to, Scratch<T>& scratch) {
    if (together.count == 0) return;
    const KernelTable& table = kernels();
    const T* const scales = scaled ? together.scales : nullptr;
    if (mode == BagMode::sum && sum_in_place(table.rows, together, dtype, scales, cols, to)) return;
    const bool same = dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64);
    for (std::size_t i = 0; i < together.count; ++i) {
        const T* row = reinterpret_cast<const T*>(together.rows[i]);
        if (!same) {
            T* const wide = scratch.at_least(cols);
            widen(together.rows[i], dtype, cols, wide, table.gemm);
            row = wide;
        }
        if (mode == BagMode::max) {
            max_row(row, cols, to);
        } else if constexpr (sizeof(T) == 4) {
            table.rows.sum_f32(&row, 1, scaled ? scales + i : nullptr, cols, to);
        } else {
            table.rows.sum_f64(&row, 1, scaled ? scales + i : nullptr, cols, to);
        }
    }
}

}  // namespace pydedup::detail
