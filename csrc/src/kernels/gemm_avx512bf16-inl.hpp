// SPDX-License-Identifier: Apache-2.0
// Products of two bf16 numbers, two to a lane: twice as many per instruction as of f32. In each
// lane the products of a pair of columns are added to a sum in f32, rounded to nearest each time;
// subnormal numbers count as zero, whatever the rounding mode says (VDPBF16PS).
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_avx512bf16 {
namespace {

using Bits = std::uint16_t;

// 2 * G elements of a row of w, over and over; the n < 2 * G first and zeros.
template <std::size_t G>
__m512i repeat_pairs(const Bits* w) noexcept {
    if constexpr (G == 1) {
        std::int32_t pair;
        __builtin_memcpy(&pair, w, sizeof pair);
        return _mm512_set1_epi32(pair);
    } else if constexpr (G == 2) {
        std::int64_t pairs;
        __builtin_memcpy(&pairs, w, sizeof pairs);
        return _mm512_set1_epi64(pairs);
    } else if constexpr (G == 4) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    } else if constexpr (G == 8) {
        return _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    } else {
        return _mm512_loadu_si512(w);
    }
}

template <std::size_t G>
__m512i repeat_pairs_n(const Bits* w, std::size_t n) noexcept {
    const __m512i some = _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1U, w);
    if constexpr (G == 1) {
        return _mm512_broadcastd_epi32(_mm512_castsi512_si128(some));
    } else if constexpr (G == 2) {
        return _mm512_broadcastq_epi64(_mm512_castsi512_si128(some));
    } else if constexpr (G == 4) {
        return _mm512_broadcast_i32x4(_mm512_castsi512_si128(some));
    } else if constexpr (G == 8) {
        return _mm512_broadcast_i32x8(_mm512_castsi512_si256(some));
    } else {
        return some;
    }
}

// VN vectors of x by R rows of w, as tile_nt_fixed of f32.
template <std::size_t VN, std::size_t R, std::size_t G, bool Ahead>
void tile_pairs_fixed(const Bits* x, const Bits* w, std::size_t cols, std::size_t ldw,
                      const Bits* next, float* acc) noexcept {
    constexpr std::size_t kLanes = VN * 16;
    constexpr std::size_t kColumns = 2 * G;
    __m512 sums[R][VN];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v)
            sums[r][v] = _mm512_loadu_ps(acc + r * kLanes + v * 16);
    }
    const auto multiply = [&](std::size_t r, const __m512i* xs, __m512i ws) noexcept {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) {
            sums[r][v] = _mm512_dpbf16_ps(sums[r][v], reinterpret_cast<__m512bh>(xs[v]),
                                          reinterpret_cast<__m512bh>(ws));
        }
    };
    std::size_t c = 0;
    for (; c + kColumns <= cols; c += kColumns, x += 2 * kLanes) {
        if constexpr (Ahead) {
#pragma GCC unroll 16
            for (std::size_t k = 0; k < R * kColumns; k += 32) __builtin_prefetch(next + k, 0, 2);
            next += R * kColumns;
        }
        __m512i xs[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) xs[v] = _mm512_loadu_si512(x + v * 32);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < R; ++r) multiply(r, xs, repeat_pairs<G>(w + r * ldw + c));
    }
    if (c < cols) {
        __m512i xs[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) xs[v] = _mm512_loadu_si512(x + v * 32);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < R; ++r) {
            multiply(r, xs, repeat_pairs_n<G>(w + r * ldw + c, cols - c));
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v)
            _mm512_storeu_ps(acc + r * kLanes + v * 16, sums[r][v]);
    }
}

template <std::size_t VN, std::size_t R, std::size_t G>
void tile_pairs(const Bits* x, const Bits* w, std::size_t rows, std::size_t cols, std::size_t ldw,
                const Bits* next, float* acc) noexcept {
    constexpr std::size_t kLanes = VN * 16;
    std::size_t r = 0;
    if (next != nullptr) {
        for (; r + R <= rows; r += R) {
            tile_pairs_fixed<VN, R, G, true>(x, w + r * ldw, cols, ldw, next + r * cols,
                                             acc + r * kLanes);
        }
    }
    for (; r + R <= rows; r += R) {
        tile_pairs_fixed<VN, R, G, false>(x, w + r * ldw, cols, ldw, nullptr, acc + r * kLanes);
    }
    for (; r < rows; ++r) {
        tile_pairs_fixed<VN, 1, G, false>(x, w + r * ldw, cols, ldw, nullptr, acc + r * kLanes);
    }
}

constexpr Bf16GemmKernels kGemm = {{{32, tile_pairs<2, 8, 1>, 2, 2},
                                    {16, tile_pairs<2, 8, 2>, 4, 2},
                                    {8, tile_pairs<2, 8, 4>, 8, 2},
                                    {4, tile_pairs<2, 8, 8>, 16, 2},
                                    {2, tile_pairs<2, 8, 16>, 32, 2},
                                    {1, tile_pairs<1, 8, 16>, 32, 2}}};

}  // namespace
}  // namespace pydedup::isa_avx512bf16
