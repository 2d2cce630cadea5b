// SPDX-License-Identifier: Apache-2.0
// The avx2 kernels: one translation unit, internal linkage, one exported table.
#include <immintrin.h>

#include "kernels/kernel_table.hpp"

#include "kernels/codec_avx2-inl.hpp"
#include "kernels/gemm_avx2-inl.hpp"
#include "kernels/hash_avx2-inl.hpp"
#include "kernels/rows_avx2-inl.hpp"
#include "kernels/similarity_avx2-inl.hpp"

namespace pydedup {

constinit const KernelTable kAvx2Kernels = {
    "avx2",          isa_avx2::kHash, isa_avx2::kCodec,
    isa_avx2::kGemm, isa_avx2::kRows, isa_avx2::sim::kSimilarity,
};

constinit const DeltaKernels kAvx2DeltaWithoutPdep = isa_avx2::kDelta;

}  // namespace pydedup
