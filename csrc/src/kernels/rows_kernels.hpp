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

/// Weights of a filter, `step` elements apart, that see neighbouring rows of a channel: the first
/// one those from `from` on.
template <class T>
struct WindowChain {
    const T* from;
    const T* weights;
    std::size_t length, step;
};

inline constexpr std::size_t kWindowRows = 8;

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

    /// sums[r * ld_sums + c] += from[(r + k) * pitch + c] * weights[k * step], for all r < rows and
    /// c < cols, and all chains and k < length in order. So may be done for as many rows as fill up
    /// kWindowRows, and as many columns as fill up 64 bytes.
    template <class T>
    using Windows = void (*)(const WindowChain<T>* chains, std::size_t n, std::size_t pitch,
                             std::size_t rows, std::size_t cols, T* sums,
                             std::size_t ld_sums) noexcept;
    Windows<float> windows_f32;
    Windows<double> windows_f64;

    /// to[i * ld_to + j] = from[i * ld + j * stride], for i < rows and j < cols.
    template <class W, class T>
    using Pick = void (*)(const W* from, std::size_t ld, std::size_t stride, std::size_t rows,
                          std::size_t cols, T* to, std::size_t ld_to) noexcept;
    Pick<float, float> pick_f32;
    Pick<double, double> pick_f64;
    Pick<std::uint16_t, float> pick_bf16;  ///< widened
    /// For c < columns all runs: to[c * ld_to + run.to + i] = from[c * ld + run.from + i -
    /// run.begin] for begin <= i < end, and zero for other i < count.
    void (*copy_runs_f32)(const float* from, std::size_t ld, std::size_t columns,
                          const LaneRun* runs, std::size_t n, float* to,
                          std::size_t ld_to) noexcept;
};

}  // namespace pydedup
