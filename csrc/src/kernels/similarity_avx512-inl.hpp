// SPDX-License-Identifier: Apache-2.0
// Similarity with AVX-512: 16 lanes are one register.
#include "kernels/similarity_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {
namespace sim {

__mmask16 first(std::size_t n) noexcept { return static_cast<__mmask16>((1U << n) - 1U); }

// 16 lanes of f64.
struct D {
    struct Reg {
        __m512d low, high;
    };
    static Reg zero() noexcept { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
    static Reg set1(double x) noexcept { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
    static Reg add(Reg a, Reg b) noexcept {
        return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
    }
    static Reg sub(Reg a, Reg b) noexcept {
        return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)};
    }
    static Reg mul(Reg a, Reg b) noexcept {
        return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)};
    }
    static Reg abs(Reg x) noexcept { return {_mm512_abs_pd(x.low), _mm512_abs_pd(x.high)}; }
    static Reg greatest(Reg a, Reg b) noexcept {
        return {_mm512_max_pd(a.low, b.low), _mm512_max_pd(a.high, b.high)};
    }
    static double max_of(Reg x) noexcept {
        return _mm512_reduce_max_pd(_mm512_max_pd(x.low, x.high));
    }
    static std::size_t count_within(Reg x, Reg limit, std::size_t n) noexcept {
        const unsigned low = _mm512_cmp_pd_mask(x.low, limit.low, _CMP_LE_OQ);
        const unsigned high = _mm512_cmp_pd_mask(x.high, limit.high, _CMP_LE_OQ);
        return static_cast<std::size_t>(__builtin_popcount((low | high << 8) & first(n)));
    }
    static Reg load_any(const void* p) noexcept {
        const auto* at = static_cast<const double*>(p);
        return {_mm512_loadu_pd(at), _mm512_loadu_pd(at + 8)};
    }
    static void store_any(void* p, Reg x) noexcept {
        auto* to = static_cast<double*>(p);
        _mm512_storeu_pd(to, x.low);
        _mm512_storeu_pd(to + 8, x.high);
    }
    static double total(Reg x) noexcept {
        const __m512d eight = _mm512_add_pd(x.low, x.high);
        const __m256d four =
            _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
        const __m128d two =
            _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
};

struct V {
    using Reg = __m512;
    using Words = __m512i;
    using Move = __m512i;
    static constexpr std::size_t kFoldStrips = 4;

    static Reg zero() noexcept { return _mm512_setzero_ps(); }
    static Reg set1(double x) noexcept { return _mm512_set1_ps(static_cast<float>(x)); }
    static Reg load(const float* p) noexcept { return _mm512_load_ps(p); }
    static void store(float* p, Reg x) noexcept { _mm512_store_ps(p, x); }
    static Reg load_any(const void* p) noexcept { return _mm512_loadu_ps(p); }
    static void store_any(void* p, Reg x) noexcept { _mm512_storeu_ps(p, x); }
    static Reg add(Reg a, Reg b) noexcept { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) noexcept { return _mm512_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) noexcept { return _mm512_mul_ps(a, b); }
    static Reg abs(Reg x) noexcept { return _mm512_abs_ps(x); }
    static Reg greatest(Reg a, Reg b) noexcept { return _mm512_max_ps(a, b); }
    static double max_of(Reg x) noexcept { return _mm512_reduce_max_ps(x); }
    static std::size_t count_within(Reg x, Reg limit, std::size_t n) noexcept {
        const __mmask16 within = _mm512_mask_cmp_ps_mask(first(n), x, limit, _CMP_LE_OQ);
        return static_cast<std::size_t>(__builtin_popcount(within));
    }

    static Words load_words(const std::uint32_t* p) noexcept { return _mm512_loadu_si512(p); }
    static Words shift(Words words, std::size_t n) noexcept {
        return _mm512_slli_epi32(words, static_cast<unsigned>(n));
    }
    static Reg flip(Reg x, Words words) noexcept {
        const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000U));
        // x ^ (words & sign)
        return _mm512_castsi512_ps(
            _mm512_ternarylogic_epi32(_mm512_castps_si512(x), words, sign, 0x78));
    }
    static Move make_move(std::size_t by) noexcept {
        const __m512i lanes =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_xor_si512(lanes, _mm512_set1_epi32(static_cast<int>(by)));
    }
    static Reg move(Reg x, Move by) noexcept { return _mm512_permutexvar_ps(by, x); }

    template <int Apart>
    static Reg butterfly(Reg x) noexcept {
        Reg other;
        __mmask16 high;
        if constexpr (Apart == 1) {
            other = _mm512_permute_ps(x, 0xB1);
            high = 0xAAAA;
        } else if constexpr (Apart == 2) {
            other = _mm512_permute_ps(x, 0x4E);
            high = 0xCCCC;
        } else if constexpr (Apart == 4) {
            other = _mm512_shuffle_f32x4(x, x, 0xB1);
            high = 0xF0F0;
        } else {
            other = _mm512_shuffle_f32x4(x, x, 0x4E);
            high = 0xFF00;
        }
        const __m512i sign = _mm512_maskz_set1_epi32(high, static_cast<int>(0x80000000U));
        const __m512i turned = _mm512_xor_si512(_mm512_castps_si512(x), sign);
        return _mm512_add_ps(other, _mm512_castsi512_ps(turned));
    }

    static D::Reg widen(Reg x) noexcept {
        return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
    }
    static Reg narrow(D::Reg x) noexcept {
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)),
                                  _mm512_cvtpd_ps(x.high), 1);
    }
};

struct F32 {
    using Num = V;
    static constexpr std::size_t kBytes = 4;
    static __m512 value(const std::uint8_t* p) noexcept { return V::load_any(p); }
    static __m512 value_n(const std::uint8_t* p, std::size_t n) noexcept {
        return _mm512_maskz_loadu_ps(first(n), p);
    }
};

struct F16 {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static __m512 value(const std::uint8_t* p) noexcept {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static __m512 value_n(const std::uint8_t* p, std::size_t n) noexcept {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
    }
};

struct Bf16 {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static __m512 widen(__m256i bits) noexcept {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m512 value(const std::uint8_t* p) noexcept {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static __m512 value_n(const std::uint8_t* p, std::size_t n) noexcept {
        return widen(_mm256_maskz_loadu_epi16(first(n), p));
    }
};

struct F64 {
    using Num = D;
    static constexpr std::size_t kBytes = 8;
    static D::Reg value(const std::uint8_t* p) noexcept { return D::load_any(p); }
    static D::Reg value_n(const std::uint8_t* p, std::size_t n) noexcept {
        const unsigned mask = first(n);
        return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p),
                _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8), p + 64)};
    }
};

// Own gives kLanes, mask_below() and compress().
template <class Own, class K>
struct Keys {
    using Key = K;
    using Reg = __m512i;
    static Reg load(const Key* p) noexcept { return _mm512_loadu_si512(p); }
    static std::size_t below(Reg a, Reg b) noexcept {
        return static_cast<std::size_t>(__builtin_popcount(Own::mask_below(a, b)));
    }
    static std::size_t store_between(const Key* p, Reg low, Reg high, Key* out,
                                     std::size_t& below) noexcept {
        const Reg x = load(p);
        const unsigned under = Own::mask_below(x, low);
        const unsigned kept = Own::mask_below(x, high) & ~under;
        below += static_cast<std::size_t>(__builtin_popcount(under));
        // A whole register is stored: as many keys were read as that is behind `out`, at least.
        // (Compressing into memory takes a hundred cycles on Zen 4.)
        _mm512_storeu_si512(out, Own::compress(kept, x));
        return static_cast<std::size_t>(__builtin_popcount(kept));
    }

  private:
    friend Own;  // no other class is one of these
    Keys() = default;
};

struct Keys32 : Keys<Keys32, std::uint32_t> {
    static constexpr std::size_t kLanes = 16;
    static Reg set1(Key key) noexcept { return _mm512_set1_epi32(static_cast<int>(key)); }
    static unsigned mask_below(Reg a, Reg b) noexcept { return _mm512_cmplt_epu32_mask(a, b); }
    static Reg compress(unsigned kept, Reg x) noexcept {
        return _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), x);
    }
};

struct Keys64 : Keys<Keys64, std::uint64_t> {
    static constexpr std::size_t kLanes = 8;
    static Reg set1(Key key) noexcept { return _mm512_set1_epi64(static_cast<long long>(key)); }
    static unsigned mask_below(Reg a, Reg b) noexcept { return _mm512_cmplt_epu64_mask(a, b); }
    static Reg compress(unsigned kept, Reg x) noexcept {
        return _mm512_maskz_compress_epi64(static_cast<__mmask8>(kept), x);
    }
};

std::uint64_t sketch_distance(const std::int16_t* a, const std::int16_t* b,
                              std::size_t count) noexcept {
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
    __m512i sums = _mm512_setzero_si512();
    for (std::size_t i = 0; i < count; i += 32) {
        const __m512i d = _mm512_sub_epi16(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
        const __m512i pairs = _mm512_madd_epi16(d, d);  // below 2^31
        sums = _mm512_add_epi64(sums, _mm512_and_si512(pairs, low));
        sums = _mm512_add_epi64(sums, _mm512_srli_epi64(pairs, 32));
    }
    return static_cast<std::uint64_t>(_mm512_reduce_add_epi64(sums));
}

#include "kernels/similarity_vector-inl.hpp"

}  // namespace sim
}  // namespace
}  // namespace pydedup::isa_avx512
