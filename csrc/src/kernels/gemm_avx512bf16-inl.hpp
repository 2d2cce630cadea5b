// SPDX-License-Identifier: Apache-2.0
// Products of two bf16 numbers, two to a lane: twice as many per instruction as of f32. In each
// lane the products of a pair of columns are added to a sum in f32, rounded to nearest each time;
// subnormal numbers count as zero, whatever the rounding mode says (VDPBF16PS).
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_avx512bf16 {
namespace {

struct Pairs {
    using Elem = std::uint16_t;
    using Reg = __m512i;
    static constexpr std::size_t kLanes = 16;
    static Reg load(const Elem* p) noexcept { return _mm512_loadu_si512(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1U, p);
    }
    static __m512 load(const float* p) noexcept { return _mm512_loadu_ps(p); }
    static void store(float* p, __m512 sums) noexcept { _mm512_storeu_ps(p, sums); }
    static __m512 fma(Reg x, Reg w, __m512 sums) noexcept {
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }
    template <std::size_t G>
    static Reg repeat(const Elem* p) noexcept {
        if constexpr (G == 2) {
            std::int32_t pair;
            __builtin_memcpy(&pair, p, sizeof pair);
            return _mm512_set1_epi32(pair);
        } else if constexpr (G == 4) {
            std::int64_t pairs;
            __builtin_memcpy(&pairs, p, sizeof pairs);
            return _mm512_set1_epi64(pairs);
        } else if constexpr (G == 8) {
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        } else {
            static_assert(G == 16);
            return _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        }
    }
    template <std::size_t G>
    static Reg repeat_n(const Elem* p, std::size_t n) noexcept {
        const Reg some = load_n(p, n);
        if constexpr (G == 2) return _mm512_broadcastd_epi32(_mm512_castsi512_si128(some));
        if constexpr (G == 4) return _mm512_broadcastq_epi64(_mm512_castsi512_si128(some));
        if constexpr (G == 8) return _mm512_broadcast_i32x4(_mm512_castsi512_si128(some));
        if constexpr (G == 16) return _mm512_broadcast_i32x8(_mm512_castsi512_si256(some));
    }
};

#include "kernels/gemm_pairs-inl.hpp"
#include "kernels/gemm_tile-inl.hpp"

constexpr Bf16GemmKernels kGemm = {{{32, tile_nt<Pairs, 2, 8, 2>, 2, 2},
                                    {16, tile_nt<Pairs, 2, 8, 4>, 4, 2},
                                    {8, tile_nt<Pairs, 2, 8, 8>, 8, 2},
                                    {4, tile_nt<Pairs, 2, 8, 16>, 16, 2},
                                    {2, tile_nt<Pairs, 2, 8, 32>, 32, 2},
                                    {1, tile_nt<Pairs, 1, 8, 32>, 32, 2}},
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   pack_pairs,
                                   columns_to_f32,
                                   columns_to_bf16,
                                   rows_to_bf16,
                                   copy_pairs};

}  // namespace
}  // namespace pydedup::isa_avx512bf16
