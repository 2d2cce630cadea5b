// SPDX-License-Identifier: Apache-2.0
// Kernels that gather: sums of rows that lie anywhere in memory, and elements at a distance.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

/// Up to 32 lanes: [begin, end) of them have elements, side by side from `from` on, the others
/// zero.
struct LaneRun {
    std::size_t from, to;
    std::uint32_t begin, end, count;
};

struct RowsKernels {
    /// sum[j] += from[i][j], or from[i][j] * scale[i] unless `scale` is nullptr, for i < n in
    /// order and j < count. W is T, or a 16-bit float that is widened as it is read.
    template <class T, class W>
    using Sum = void (*)(const W* const* from, std::size_t n, const T* scale, std::size_t count,
                         T* sum) noexcept;
    Sum<float, float> sum_f32;
    Sum<double, double> sum_f64;
    Sum<float, std::uint16_t> sum_bf16;
    Sum<float, std::uint16_t> sum_f16;

    /// to[i] = from[i * stride], for i < count.
    void (*pick_f32)(const float* from, std::size_t stride, std::size_t count, float* to) noexcept;
    void (*pick_f64)(const double* from, std::size_t stride, std::size_t count,
                     double* to) noexcept;
    /// For c < columns all runs: to[c * ld_to + run.to + i] = from[c * ld + run.from + i -
    /// run.begin] for begin <= i < end, and zero for other i < count.
    void (*copy_runs_f32)(const float* from, std::size_t ld, std::size_t columns,
                          const LaneRun* runs, std::size_t n, float* to,
                          std::size_t ld_to) noexcept;
};

}  // namespace pydedup
