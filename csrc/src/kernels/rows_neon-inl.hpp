// SPDX-License-Identifier: Apache-2.0
// NEON: the vector types of gemm_neon-inl.hpp, which comes before.
#include "kernels/rows_kernels.hpp"

namespace pydedup::isa_neon {
namespace {

#include "kernels/rows_runs-inl.hpp"
#include "kernels/rows_vector-inl.hpp"

}  // namespace
}  // namespace pydedup::isa_neon
