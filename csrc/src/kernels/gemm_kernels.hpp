// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

struct GemmKernels {
    /// y[i, r] += sum over c of x[i, c] * w[r, c], for an f32 block w of rows x cols (x @ W.T).
    /// Leading dimensions in elements. Row sums are not bit-stable across kernels.
    void (*block_nt_f32)(const float* x, std::size_t ldx, std::size_t m, const float* w,
                         std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                         std::size_t ldy, float* scratch) noexcept;
    /// y[i, c] += sum over r of x[i, r] * w[r, c] (x @ W).
    void (*block_nn_f32)(const float* x, std::size_t ldx, std::size_t m, const float* w,
                         std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                         std::size_t ldy) noexcept;
    void (*bf16_to_f32)(const std::uint16_t* src, std::size_t count, float* dst) noexcept;
    void (*f16_to_f32)(const std::uint16_t* src, std::size_t count, float* dst) noexcept;
};

}  // namespace pydedup
