// SPDX-License-Identifier: Apache-2.0
// Similarity with AVX2: 16 lanes are two registers.
#include "kernels/similarity_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {
namespace sim {

// The first n of 8 lanes, all for n >= 8, none for n <= 0.
__m256i first32(std::ptrdiff_t n) noexcept {
    const int count = n > 8 ? 8 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

__m256i first64(std::ptrdiff_t n) noexcept {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

__m256 sign_bits() noexcept { return _mm256_set1_ps(-0.0F); }

double sum(__m256d x) noexcept {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// 16 lanes of f64.
struct D {
    struct Reg {
        __m256d part[4];
    };
    template <class Op>
    static Reg each(Op op) noexcept {
        return {{op(0), op(1), op(2), op(3)}};
    }
    static Reg zero() noexcept { return set1(0); }
    static Reg set1(double x) noexcept {
        return each([=](int) noexcept { return _mm256_set1_pd(x); });
    }
    static Reg add(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return _mm256_add_pd(a.part[i], b.part[i]); });
    }
    static Reg sub(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return _mm256_sub_pd(a.part[i], b.part[i]); });
    }
    static Reg mul(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return _mm256_mul_pd(a.part[i], b.part[i]); });
    }
    static Reg abs(const Reg& x) noexcept {
        return each(
            [&](int i) noexcept { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.part[i]); });
    }
    static Reg greatest(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return _mm256_max_pd(a.part[i], b.part[i]); });
    }
    static double max_of(const Reg& x) noexcept {
        alignas(32) double lanes[4];
        _mm256_store_pd(lanes, _mm256_max_pd(_mm256_max_pd(x.part[0], x.part[1]),
                                             _mm256_max_pd(x.part[2], x.part[3])));
        double greatest = lanes[0];
        for (const double lane : lanes) greatest = lane > greatest ? lane : greatest;
        return greatest;
    }
    static std::size_t count_within(const Reg& x, const Reg& limit, std::size_t n) noexcept {
        unsigned mask = 0;
        for (int i = 0; i < 4; ++i) {
            const __m256d within = _mm256_cmp_pd(x.part[i], limit.part[i], _CMP_LE_OQ);
            mask |= static_cast<unsigned>(_mm256_movemask_pd(within)) << (4 * i);
        }
        return static_cast<std::size_t>(__builtin_popcount(mask & ((1U << n) - 1U)));
    }
    static Reg load_any(const void* p) noexcept {
        return each(
            [=](int i) noexcept { return _mm256_loadu_pd(static_cast<const double*>(p) + 4 * i); });
    }
    static void store_any(void* p, const Reg& x) noexcept {
        for (int i = 0; i < 4; ++i) _mm256_storeu_pd(static_cast<double*>(p) + 4 * i, x.part[i]);
    }
    static double total(const Reg& x) noexcept {
        const __m256d low = _mm256_add_pd(x.part[0], x.part[2]);
        const __m256d high = _mm256_add_pd(x.part[1], x.part[3]);
        return sum(_mm256_add_pd(low, high));
    }
};

struct V {
    struct Reg {
        __m256 low, high;
    };
    struct Words {
        __m256i low, high;
    };
    struct Move {
        __m256i lanes;
        bool swap;
    };
    static constexpr std::size_t kFoldStrips = 2;

    static Reg zero() noexcept { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Reg set1(double x) noexcept {
        return {_mm256_set1_ps(static_cast<float>(x)), _mm256_set1_ps(static_cast<float>(x))};
    }
    static Reg load(const float* p) noexcept { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
    static void store(float* p, Reg x) noexcept {
        _mm256_store_ps(p, x.low);
        _mm256_store_ps(p + 8, x.high);
    }
    static Reg load_any(const void* p) noexcept {
        const auto* at = static_cast<const float*>(p);
        return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
    }
    static void store_any(void* p, Reg x) noexcept {
        auto* to = static_cast<float*>(p);
        _mm256_storeu_ps(to, x.low);
        _mm256_storeu_ps(to + 8, x.high);
    }
    static Reg add(Reg a, Reg b) noexcept {
        return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
    }
    static Reg sub(Reg a, Reg b) noexcept {
        return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
    }
    static Reg mul(Reg a, Reg b) noexcept {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    static Reg abs(Reg x) noexcept {
        return {_mm256_andnot_ps(sign_bits(), x.low), _mm256_andnot_ps(sign_bits(), x.high)};
    }
    static Reg greatest(Reg a, Reg b) noexcept {
        return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
    }
    static double max_of(Reg x) noexcept {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, _mm256_max_ps(x.low, x.high));
        float greatest = lanes[0];
        for (const float lane : lanes) greatest = lane > greatest ? lane : greatest;
        return greatest;
    }
    static std::size_t count_within(Reg x, Reg limit, std::size_t n) noexcept {
        const auto low =
            static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.low, limit.low, _CMP_LE_OQ)));
        const auto high = static_cast<unsigned>(
            _mm256_movemask_ps(_mm256_cmp_ps(x.high, limit.high, _CMP_LE_OQ)));
        return static_cast<std::size_t>(__builtin_popcount((low | high << 8) & ((1U << n) - 1U)));
    }

    static Words load_words(const std::uint32_t* p) noexcept {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
    }
    static Words shift(Words words, std::size_t n) noexcept {
        const auto by = static_cast<int>(n);
        return {_mm256_slli_epi32(words.low, by), _mm256_slli_epi32(words.high, by)};
    }
    static __m256 flip_half(__m256 x, __m256i words) noexcept {
        return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(words), sign_bits()));
    }
    static Reg flip(Reg x, Words words) noexcept {
        return {flip_half(x.low, words.low), flip_half(x.high, words.high)};
    }
    static Move make_move(std::size_t by) noexcept {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return {_mm256_xor_si256(lanes, _mm256_set1_epi32(static_cast<int>(by & 7))), by >= 8};
    }
    static Reg move(Reg x, Move by) noexcept {
        const __m256 low = _mm256_permutevar8x32_ps(x.low, by.lanes);
        const __m256 high = _mm256_permutevar8x32_ps(x.high, by.lanes);
        return by.swap ? Reg{high, low} : Reg{low, high};
    }

    template <int Apart>
    static __m256 butterfly_half(__m256 x) noexcept {
        __m256 other;
        __m256 high;
        if constexpr (Apart == 1) {
            other = _mm256_permute_ps(x, 0xB1);
            high = _mm256_setr_ps(0.0F, -0.0F, 0.0F, -0.0F, 0.0F, -0.0F, 0.0F, -0.0F);
        } else if constexpr (Apart == 2) {
            other = _mm256_permute_ps(x, 0x4E);
            high = _mm256_setr_ps(0.0F, 0.0F, -0.0F, -0.0F, 0.0F, 0.0F, -0.0F, -0.0F);
        } else {
            other = _mm256_permute2f128_ps(x, x, 0x01);
            high = _mm256_setr_ps(0.0F, 0.0F, 0.0F, 0.0F, -0.0F, -0.0F, -0.0F, -0.0F);
        }
        return _mm256_add_ps(other, _mm256_xor_ps(x, high));
    }
    template <int Apart>
    static Reg butterfly(Reg x) noexcept {
        if constexpr (Apart == 8) {
            return {_mm256_add_ps(x.low, x.high), _mm256_sub_ps(x.low, x.high)};
        } else {
            return {butterfly_half<Apart>(x.low), butterfly_half<Apart>(x.high)};
        }
    }

    static D::Reg widen(Reg x) noexcept {
        return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)),
                 _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
                 _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)),
                 _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
    }
    static Reg narrow(const D::Reg& x) noexcept {
        return {_mm256_set_m128(_mm256_cvtpd_ps(x.part[1]), _mm256_cvtpd_ps(x.part[0])),
                _mm256_set_m128(_mm256_cvtpd_ps(x.part[3]), _mm256_cvtpd_ps(x.part[2]))};
    }
};

struct F32 {
    using Num = V;
    static constexpr std::size_t kBytes = 4;
    static V::Reg value(const std::uint8_t* p) noexcept { return V::load_any(p); }
    static V::Reg value_n(const std::uint8_t* p, std::size_t n) noexcept {
        const auto* at = reinterpret_cast<const float*>(p);
        const auto count = static_cast<std::ptrdiff_t>(n);
        return {_mm256_maskload_ps(at, first32(count)),
                _mm256_maskload_ps(at + 8, first32(count - 8))};
    }
};

// A load of n of 16 16-bit elements: there is no masked one, and reading past them could leave the
// page.
struct Halves {
    __m128i low, high;
    static Halves load(const std::uint8_t* p) noexcept {
        return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16))};
    }
    static Halves load_n(const std::uint8_t* p, std::size_t n) noexcept {
        if (n >= kSimLanes) return load(p);
        std::uint8_t copy[2 * kSimLanes] = {};
        __builtin_memcpy(copy, p, 2 * n);
        return load(copy);
    }
};

struct F16 {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static V::Reg widen(Halves x) noexcept {
        return {_mm256_cvtph_ps(x.low), _mm256_cvtph_ps(x.high)};
    }
    static V::Reg value(const std::uint8_t* p) noexcept { return widen(Halves::load(p)); }
    static V::Reg value_n(const std::uint8_t* p, std::size_t n) noexcept {
        return widen(Halves::load_n(p, n));
    }
};

struct Bf16 {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static __m256 widen_half(__m128i bits) noexcept {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static V::Reg widen(Halves x) noexcept { return {widen_half(x.low), widen_half(x.high)}; }
    static V::Reg value(const std::uint8_t* p) noexcept { return widen(Halves::load(p)); }
    static V::Reg value_n(const std::uint8_t* p, std::size_t n) noexcept {
        return widen(Halves::load_n(p, n));
    }
};

struct F64 {
    using Num = D;
    static constexpr std::size_t kBytes = 8;
    static D::Reg value(const std::uint8_t* p) noexcept { return D::load_any(p); }
    static D::Reg value_n(const std::uint8_t* p, std::size_t n) noexcept {
        const auto* at = reinterpret_cast<const double*>(p);
        const auto count = static_cast<std::ptrdiff_t>(n);
        return D::each(
            [=](int i) noexcept { return _mm256_maskload_pd(at + 4 * i, first64(count - 4 * i)); });
    }
};

// Keys are compared as signed numbers: the highest bit of a magnitude is 0, but a pivot may be
// above all of them. Own gives kLanes, biased() and mask_below().
template <class Own, class K>
struct Keys {
    using Key = K;
    using Reg = __m256i;
    static Reg load(const Key* p) noexcept {
        return Own::biased(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static std::size_t below(Reg a, Reg b) noexcept {
        return static_cast<std::size_t>(__builtin_popcount(Own::mask_below(a, b)));
    }
    static std::size_t store_between(const Key* p, Reg low, Reg high, Key* out,
                                     std::size_t& below) noexcept {
        const Reg x = load(p);
        const unsigned under = Own::mask_below(x, low);
        below += static_cast<std::size_t>(__builtin_popcount(under));
        std::size_t kept = 0;
        for (unsigned left = Own::mask_below(x, high) & ~under; left != 0; left &= left - 1) {
            out[kept++] = p[__builtin_ctz(left)];
        }
        return kept;
    }

  private:
    friend Own;  // no other class is one of these
    Keys() = default;
};

struct Keys32 : Keys<Keys32, std::uint32_t> {
    static constexpr std::size_t kLanes = 8;
    static Reg biased(Reg x) noexcept {
        return _mm256_xor_si256(x, _mm256_set1_epi32(static_cast<int>(0x80000000U)));
    }
    static Reg set1(Key key) noexcept { return biased(_mm256_set1_epi32(static_cast<int>(key))); }
    static unsigned mask_below(Reg a, Reg b) noexcept {
        return static_cast<unsigned>(
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a))));
    }
};

struct Keys64 : Keys<Keys64, std::uint64_t> {
    static constexpr std::size_t kLanes = 4;
    static Reg biased(Reg x) noexcept {
        return _mm256_xor_si256(x, _mm256_set1_epi64x(static_cast<long long>(0x8000000000000000U)));
    }
    static Reg set1(Key key) noexcept {
        return biased(_mm256_set1_epi64x(static_cast<long long>(key)));
    }
    static unsigned mask_below(Reg a, Reg b) noexcept {
        return static_cast<unsigned>(
            _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(b, a))));
    }
};

std::uint64_t sketch_distance(const std::int16_t* a, const std::int16_t* b,
                              std::size_t count) noexcept {
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
    __m256i sums = _mm256_setzero_si256();
    for (std::size_t i = 0; i < count; i += 16) {
        const __m256i d =
            _mm256_sub_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
        const __m256i pairs = _mm256_madd_epi16(d, d);  // below 2^31
        sums = _mm256_add_epi64(sums, _mm256_and_si256(pairs, low));
        sums = _mm256_add_epi64(sums, _mm256_srli_epi64(pairs, 32));
    }
    alignas(32) std::uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#include "kernels/similarity_vector-inl.hpp"

}  // namespace sim
}  // namespace
}  // namespace pydedup::isa_avx2
