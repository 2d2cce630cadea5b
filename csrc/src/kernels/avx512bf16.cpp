// SPDX-License-Identifier: Apache-2.0
// What AVX-512-BF16 adds to the avx512 kernels: a translation unit of its own for its flag, and no
// whole table, since everything else stays as it is (dispatch.cpp puts the two together).
#include <immintrin.h>

#include "kernels/kernel_table.hpp"

#include "kernels/gemm_avx512bf16-inl.hpp"

namespace pydedup {

constinit const Bf16GemmKernels kAvx512Bf16GemmKernels = isa_avx512bf16::kGemm;

}  // namespace pydedup
