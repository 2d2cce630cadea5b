// SPDX-License-Identifier: Apache-2.0
// The neon kernels: one translation unit, internal linkage, one exported table.
#include <arm_neon.h>

#include "kernels/kernel_table.hpp"

#include "kernels/codec_neon-inl.hpp"
#include "kernels/gemm_neon-inl.hpp"
#include "kernels/hash_neon-inl.hpp"
#include "kernels/rows_neon-inl.hpp"
#include "kernels/similarity_neon-inl.hpp"

namespace pydedup {

constinit const KernelTable kNeonKernels = {
    "neon",          isa_neon::kHash, isa_neon::kCodec,
    isa_neon::kGemm, isa_neon::kRows, isa_neon::sim::kSimilarity,
};

}  // namespace pydedup
