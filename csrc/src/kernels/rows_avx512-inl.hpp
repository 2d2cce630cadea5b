// SPDX-License-Identifier: Apache-2.0
// AVX-512: the vector types of gemm_avx512-inl.hpp, which comes before.
#include "kernels/rows_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {

// Both vectors of a run in one go: what is masked out is zero, and not read.
void copy_runs(const float* from, std::size_t ld, std::size_t columns, const LaneRun* runs,
               std::size_t n, float* to, std::size_t ld_to) noexcept {
    const auto below = [](std::uint32_t lane) noexcept { return (std::uint64_t{1} << lane) - 1U; };
    for (std::size_t c = 0; c < columns; ++c, from += ld, to += ld_to) {
        for (const LaneRun* run = runs; run < runs + n; ++run) {
            const std::uint64_t some = below(run->end) & ~below(run->begin);
            const std::uint64_t all = below(run->count);
            const float* const elements = from + run->from - run->begin;
            float* const lanes = to + run->to;
            _mm512_mask_storeu_ps(lanes, static_cast<__mmask16>(all),
                                  _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), elements));
            if (run->count <= 16) continue;
            _mm512_mask_storeu_ps(
                lanes + 16, static_cast<__mmask16>(all >> 16),
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), elements + 16));
        }
    }
}

#include "kernels/rows_vector-inl.hpp"

}  // namespace
}  // namespace pydedup::isa_avx512
