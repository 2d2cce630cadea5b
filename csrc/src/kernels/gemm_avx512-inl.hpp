// SPDX-License-Identifier: Apache-2.0
// AVX-512: 32 registers of 16 floats; tails are masked loads and stores.
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {

struct F32 {
    using Elem = float;
    using Reg = __m512;
    static constexpr std::size_t kLanes = 16;
    static __mmask16 first(std::size_t n) noexcept {
        return static_cast<__mmask16>((1U << n) - 1U);
    }
    static Reg zero() noexcept { return _mm512_setzero_ps(); }
    static Reg load(const Elem* p) noexcept { return _mm512_loadu_ps(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return _mm512_maskz_loadu_ps(first(n), p);
    }
    static void store(Elem* p, Reg v) noexcept { _mm512_storeu_ps(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        _mm512_mask_storeu_ps(p, first(n), v);
    }
    static Reg set1(Elem value) noexcept { return _mm512_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm512_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) noexcept { return _mm512_add_ps(a, b); }
    template <std::size_t G>
    static Reg repeat(const Elem* p) noexcept {
        if constexpr (G == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
        if constexpr (G == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
        if constexpr (G == 2) {
            double both;
            __builtin_memcpy(&both, p, sizeof both);
            return _mm512_castpd_ps(_mm512_set1_pd(both));
        }
    }
    template <std::size_t G>
    static Reg repeat_n(const Elem* p, std::size_t n) noexcept {
        const __m256 some = _mm256_maskz_loadu_ps(static_cast<__mmask8>(first(n)), p);
        if constexpr (G == 8) return _mm512_broadcast_f32x8(some);
        if constexpr (G == 4) return _mm512_broadcast_f32x4(_mm256_castps256_ps128(some));
        if constexpr (G == 2) {
            return _mm512_castpd_ps(
                _mm512_broadcastsd_pd(_mm_castps_pd(_mm256_castps256_ps128(some))));
        }
    }
    static Elem sum(Reg v) noexcept { return _mm512_reduce_add_ps(v); }
    static __m256 halves(Reg v) noexcept {
        return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        const __m256 ab = _mm256_hadd_ps(halves(a), halves(b));
        const __m256 cd = _mm256_hadd_ps(halves(c), halves(d));
        const __m256 abcd = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(out,
                      _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
};

struct F64 {
    using Elem = double;
    using Reg = __m512d;
    static constexpr std::size_t kLanes = 8;
    static __mmask8 first(std::size_t n) noexcept { return static_cast<__mmask8>((1U << n) - 1U); }
    static Reg zero() noexcept { return _mm512_setzero_pd(); }
    static Reg load(const Elem* p) noexcept { return _mm512_loadu_pd(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return _mm512_maskz_loadu_pd(first(n), p);
    }
    static void store(Elem* p, Reg v) noexcept { _mm512_storeu_pd(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        _mm512_mask_storeu_pd(p, first(n), v);
    }
    static Reg set1(Elem value) noexcept { return _mm512_set1_pd(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm512_fmadd_pd(a, b, c); }
    static Reg add(Reg a, Reg b) noexcept { return _mm512_add_pd(a, b); }
    template <std::size_t G>
    static Reg repeat(const Elem* p) noexcept {
        if constexpr (G == 4) return _mm512_broadcast_f64x4(_mm256_loadu_pd(p));
        if constexpr (G == 2) return _mm512_broadcast_f64x2(_mm_loadu_pd(p));
    }
    template <std::size_t G>
    static Reg repeat_n(const Elem* p, std::size_t n) noexcept {
        const __m256d some = _mm256_maskz_loadu_pd(first(n), p);
        if constexpr (G == 4) return _mm512_broadcast_f64x4(some);
        if constexpr (G == 2) return _mm512_broadcast_f64x2(_mm256_castpd256_pd128(some));
    }
    static Elem sum(Reg v) noexcept { return _mm512_reduce_add_pd(v); }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        out[0] = sum(a);
        out[1] = sum(b);
        out[2] = sum(c);
        out[3] = sum(d);
    }
};

__m256i load_halves(const std::uint16_t* p) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

__m256i load_halves_n(const std::uint16_t* p, std::size_t n) noexcept {
    return _mm256_maskz_loadu_epi16(F32::first(n), p);
}

__m512 widen_bf16(__m256i bits) noexcept {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

__m512 widen_f16(__m256i bits) noexcept { return _mm512_cvtph_ps(bits); }

__m256i rounded_bf16(__m512 values) noexcept {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

void round_bf16(__m512 values, std::uint16_t* to) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded_bf16(values));
}

void round_bf16_n(__m512 values, std::size_t n, std::uint16_t* to) noexcept {
    _mm256_mask_storeu_epi16(to, F32::first(n), rounded_bf16(values));
}

constexpr std::size_t kDotRows4 = 4;
constexpr std::size_t kNnRows = 6;
constexpr std::size_t kNnVectors = 4;

#include "kernels/gemm_vector-inl.hpp"

template <bool AsksSoon>
constexpr GemmKernels kGemm = {
    {dot_nt<F32, SameWeight<F32>>,
     block_nn<F32>,
     {{32, tile_nt<F32, 2, 8>},
      {16, tile_nt<F32, 2, 8, 2>, 2},
      {8, tile_nt<F32, 2, 8, 4>, 4},
      {4, tile_nt<F32, 2, 8, 8>, 8},
      {2, tile_nt<F32, 2, 8, 16>, 16},
      {1, tile_nt<F32, 1, 8, 16>, 16}},
     1},
    {dot_nt<F64, SameWeight<F64>>,
     block_nn<F64>,
     {{16, tile_nt<F64, 2, 8>},
      {8, tile_nt<F64, 2, 8, 2>, 2},
      {4, tile_nt<F64, 2, 8, 4>, 4},
      {2, tile_nt<F64, 2, 8, 8>, 8},
      {1, tile_nt<F64, 1, 8, 8>, 8}},
     1},
    dot_nt<F32, Bf16Weight, AsksSoon>,
    dot_nt<F32, F16Weight, AsksSoon>,
    widen<Bf16Weight>,
    widen<F16Weight>,
    f32_to_bf16,
};

}  // namespace
}  // namespace pydedup::isa_avx512
