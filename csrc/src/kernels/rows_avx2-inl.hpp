// SPDX-License-Identifier: Apache-2.0
// AVX2: the vector types of gemm_avx2-inl.hpp, which comes before.
#include "kernels/rows_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {

#include "kernels/rows_runs-inl.hpp"
#include "kernels/rows_vector-inl.hpp"

}  // namespace
}  // namespace pydedup::isa_avx2
