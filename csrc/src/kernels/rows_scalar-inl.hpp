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

#include "kernels/rows_runs-inl.hpp"

template <class T>
void pick(const T* from, std::size_t stride, std::size_t count, T* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

constexpr RowsKernels kRows = {sum_same<float>, sum_same<double>, sum_bf16, sum_f16,
                               pick<float>,     pick<double>,     copy_runs};

}  // namespace
}  // namespace pydedup::isa_scalar
