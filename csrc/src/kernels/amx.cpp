// SPDX-License-Identifier: Apache-2.0
// What AMX adds to the avx512 kernels: a translation unit of its own for its flags, and no whole
// table, since everything else stays as it is (dispatch.cpp puts the two together).
#include <immintrin.h>

#include "kernels/kernel_table.hpp"

#include "kernels/gemm_amx-inl.hpp"

namespace pydedup {

constinit const Bf16GemmKernels kAmxGemmKernels = isa_amx::kGemm;

}  // namespace pydedup
