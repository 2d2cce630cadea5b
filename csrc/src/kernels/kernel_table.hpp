// SPDX-License-Identifier: Apache-2.0
// The only thing kernels share with the rest: tables of pointers to pure functions on raw memory.
// No standard library beyond <cstddef>/<cstdint>, no exceptions, no state (docs/kernels.md).
// Kernels trust their arguments; facades check them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec_kernels.hpp"
#include "kernels/gemm_kernels.hpp"
#include "kernels/hash_kernels.hpp"
#include "kernels/rows_kernels.hpp"
#include "kernels/similarity_kernels.hpp"

namespace pydedup {

struct KernelTable {
    const char* name;
    HashKernels hash;
    CodecKernels codec;
    GemmKernels gemm;
    RowsKernels rows;
    SimilarityKernels similarity;
};

// One per translation unit of this folder; which of them exist is said by PYDEDUP_HAVE_<ISA>.
// All are constants: they are copied while the library is loaded, on whatever CPU that is.
extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kNeonKernels;
// Part of a table, for `codec.delta` of the avx2 one where PDEP is slow.
extern const DeltaKernels kAvx2DeltaWithoutPdep;
// Parts of a table, for `gemm` of the avx512 one on a CPU with AMX, and for `gemm.bf16` of both.
extern const GemmKernels kAvx512GemmAskingSoon;
extern const Bf16GemmKernels kAvx512Bf16GemmKernels;
extern const Bf16GemmKernels kAmxGemmKernels;

}  // namespace pydedup
