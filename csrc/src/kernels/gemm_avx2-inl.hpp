// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C: 16 registers of 8 floats; tails are masked loads and stores.
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {

struct F32 {
    using Elem = float;
    using Reg = __m256;
    static constexpr std::size_t kLanes = 8;
    static __m256i first(std::size_t n) noexcept {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Reg zero() noexcept { return _mm256_setzero_ps(); }
    static Reg load(const Elem* p) noexcept { return _mm256_loadu_ps(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return _mm256_maskload_ps(p, first(n));
    }
    static void store(Elem* p, Reg v) noexcept { _mm256_storeu_ps(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        _mm256_maskstore_ps(p, first(n), v);
    }
    static Reg set1(Elem value) noexcept { return _mm256_set1_ps(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm256_fmadd_ps(a, b, c); }
    static Reg add(Reg a, Reg b) noexcept { return _mm256_add_ps(a, b); }
    template <std::size_t G>
    static Reg repeat(const Elem* p) noexcept {
        if constexpr (G == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
        if constexpr (G == 2) {
            double both;
            __builtin_memcpy(&both, p, sizeof both);
            return _mm256_castpd_ps(_mm256_set1_pd(both));
        }
    }
    template <std::size_t G>
    static Reg repeat_n(const Elem* p, std::size_t n) noexcept {
        const __m128 some = _mm_maskload_ps(p, _mm256_castsi256_si128(first(n)));
        if constexpr (G == 4) return _mm256_broadcast_ps(&some);
        if constexpr (G == 2) return _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_castps_pd(some)));
    }
    static Elem sum(Reg v) noexcept {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(out,
                      _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
};

struct F64 {
    using Elem = double;
    using Reg = __m256d;
    static constexpr std::size_t kLanes = 4;
    static __m256i first(std::size_t n) noexcept {
        return _mm256_cmpgt_epi64(_mm256_set1_epi64x(static_cast<long long>(n)),
                                  _mm256_setr_epi64x(0, 1, 2, 3));
    }
    static Reg zero() noexcept { return _mm256_setzero_pd(); }
    static Reg load(const Elem* p) noexcept { return _mm256_loadu_pd(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return _mm256_maskload_pd(p, first(n));
    }
    static void store(Elem* p, Reg v) noexcept { _mm256_storeu_pd(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        _mm256_maskstore_pd(p, first(n), v);
    }
    static Reg set1(Elem value) noexcept { return _mm256_set1_pd(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return _mm256_fmadd_pd(a, b, c); }
    static Reg add(Reg a, Reg b) noexcept { return _mm256_add_pd(a, b); }
    template <std::size_t G>
    static Reg repeat(const Elem* p) noexcept {
        if constexpr (G == 2) return _mm256_broadcast_pd(reinterpret_cast<const __m128d*>(p));
    }
    template <std::size_t G>
    static Reg repeat_n(const Elem* p, std::size_t) noexcept {
        if constexpr (G == 2) {
            const __m128d some = _mm_load_sd(p);  // n is 1
            return _mm256_broadcast_pd(&some);
        }
    }
    static Elem sum(Reg v) noexcept {
        const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
        return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
    }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        const __m256d ab = _mm256_hadd_pd(a, b);  // a01 b01 a23 b23
        const __m256d cd = _mm256_hadd_pd(c, d);
        _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20),
                                            _mm256_permute2f128_pd(ab, cd, 0x31)));
    }
};

// A load of fewer than 8 16-bit elements: there is no masked one, and reading past them could
// leave the page.
__m128i load_halves_n(const std::uint16_t* p, std::size_t n) noexcept {
    std::uint16_t copy[8] = {};
    for (std::size_t i = 0; i < n && i < 8; ++i) copy[i] = p[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(copy));
}

__m128i load_halves(const std::uint16_t* p) noexcept {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

__m256 widen_bf16(__m128i bits) noexcept {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

__m256 widen_f16(__m128i bits) noexcept { return _mm256_cvtph_ps(bits); }

void round_bf16(__m256 values, std::uint16_t* to) noexcept {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}

void round_bf16_n(__m256 values, std::size_t n, std::uint16_t* to) noexcept {
    std::uint16_t all[F32::kLanes];
    round_bf16(values, all);
    for (std::size_t i = 0; i < n; ++i) to[i] = all[i];
}

constexpr std::size_t kDotRows4 = 2;  // 8 sums, 4 of x, 1 of w: 16 sums would not fit
constexpr std::size_t kNnRows = 6;
constexpr std::size_t kNnVectors = 2;

#include "kernels/gemm_vector-inl.hpp"

constexpr GemmKernels kGemm = {
    {dot_nt<F32, SameWeight<F32>>,
     block_nn<F32>,
     {{16, tile_nt<F32, 2, 6>},
      {8, tile_nt<F32, 2, 6, 2>, 2},
      {4, tile_nt<F32, 2, 6, 4>, 4},
      {2, tile_nt<F32, 2, 6, 8>, 8},
      {1, tile_nt<F32, 1, 8, 8>, 8}},
     1},
    {dot_nt<F64, SameWeight<F64>>,
     block_nn<F64>,
     {{8, tile_nt<F64, 2, 6>},
      {4, tile_nt<F64, 2, 6, 2>, 2},
      {2, tile_nt<F64, 2, 6, 4>, 4},
      {1, tile_nt<F64, 1, 8, 4>, 4}},
     1},
    dot_nt<F32, Bf16Weight>,
    dot_nt<F32, F16Weight>,
    widen<Bf16Weight>,
    widen<F16Weight>,
    f32_to_bf16,
};

}  // namespace
}  // namespace pydedup::isa_avx2
