// SPDX-License-Identifier: Apache-2.0
// The scalar kernels: one translation unit, internal linkage, one exported table.
#include "kernels/kernel_table.hpp"

#include "kernels/codec_scalar-inl.hpp"
#include "kernels/gemm_scalar-inl.hpp"
#include "kernels/hash_scalar-inl.hpp"
#include "kernels/rows_scalar-inl.hpp"
#include "kernels/similarity_scalar-inl.hpp"

namespace pydedup {

constinit const KernelTable kScalarKernels = {
    "scalar",          isa_scalar::kHash, isa_scalar::kCodec,
    isa_scalar::kGemm, isa_scalar::kRows, isa_scalar::sim::kSimilarity,
};

}  // namespace pydedup
