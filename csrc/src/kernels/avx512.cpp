// SPDX-License-Identifier: Apache-2.0
// The avx512 kernels: one translation unit, internal linkage, one exported table.
#include <immintrin.h>

#include "kernels/kernel_table.hpp"

#include "kernels/codec_avx512-inl.hpp"
#include "kernels/gemm_avx512-inl.hpp"
#include "kernels/hash_avx512-inl.hpp"
#include "kernels/rows_avx512-inl.hpp"
#include "kernels/similarity_avx512-inl.hpp"

namespace pydedup {

constinit const KernelTable kAvx512Kernels = {
    "avx512",           isa_avx512::kHash,
    isa_avx512::kCodec, isa_avx512::kGemm<false>,
    isa_avx512::kRows,  isa_avx512::sim::kSimilarity,
};

constinit const GemmKernels kAvx512GemmAskingSoon = isa_avx512::kGemm<true>;

}  // namespace pydedup
