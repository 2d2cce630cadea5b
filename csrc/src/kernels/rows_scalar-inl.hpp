// SPDX-License-Identifier: Apache-2.0
// The reference. Uses the widening functions of gemm_scalar-inl.hpp, which comes before.
#include "kernels/rows_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {

template <class T, class W, class Widen>
void sum_rows(const W* const* from, std::size_t n, const T* scale, std::size_t count, T* sum,
              Widen widen) noexcept {
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < count; ++j) {
            const T value = widen(from[i][j]);
            sum[j] += scale == nullptr ? value : value * scale[i];
        }
    }
}

template <class T>
void sum_same(const T* const* from, std::size_t n, const T* scale, std::size_t count,
              T* sum) noexcept {
    sum_rows(from, n, scale, count, sum, [](T value) noexcept { return value; });
}

void sum_bf16(const std::uint16_t* const* from, std::size_t n, const float* scale,
              std::size_t count, float* sum) noexcept {
    sum_rows(from, n, scale, count, sum, widen_bf16);
}

void sum_f16(const std::uint16_t* const* from, std::size_t n, const float* scale, std::size_t count,
             float* sum) noexcept {
    sum_rows(from, n, scale, count, sum, widen_f16);
}

template <class T>
void sum_windows(const WindowChain<T>* chains, std::size_t n, std::size_t pitch, std::size_t rows,
                 std::size_t cols, T* sums, std::size_t ld_sums) noexcept {
    for (const WindowChain<T>* chain = chains; chain < chains + n; ++chain) {
        for (std::size_t k = 0; k < chain->length; ++k) {
            const T* const from = chain->from + k * pitch;
            const T weight = chain->weights[k * chain->step];
            for (std::size_t r = 0; r < rows; ++r) {
                for (std::size_t c = 0; c < cols; ++c) {
                    sums[r * ld_sums + c] += from[r * pitch + c] * weight;
                }
            }
        }
    }
}

#include "kernels/rows_runs-inl.hpp"

template <class T>
void pick(const T* from, std::size_t ld, std::size_t stride, std::size_t rows, std::size_t cols,
          T* to, std::size_t ld_to) noexcept {
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) to[i * ld_to + j] = from[i * ld + j * stride];
    }
}

void pick_bf16(const std::uint16_t* from, std::size_t ld, std::size_t stride, std::size_t rows,
               std::size_t cols, float* to, std::size_t ld_to) noexcept {
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) {
            to[i * ld_to + j] = widen_bf16(from[i * ld + j * stride]);
        }
    }
}

constexpr RowsKernels kRows = {
    sum_same<float>,     sum_same<double>, sum_bf16,     sum_f16,   sum_windows<float>,
    sum_windows<double>, pick<float>,      pick<double>, pick_bf16, copy_runs};

}  // namespace
}  // namespace pydedup::isa_scalar
