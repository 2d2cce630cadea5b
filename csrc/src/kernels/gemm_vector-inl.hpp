// SPDX-License-Identifier: Apache-2.0
// Bodies of the vector kernels, written once over a vector type V and compiled once per instruction
// set: an -inl file of an ISA defines its vector types, then includes this file INSIDE its own
// anonymous namespace. So no include guard and no include here, and every name has internal
// linkage.
//
// V:      Elem, Reg, kLanes, zero(), load(p), load_n(p, n), store(p, v), store_n(p, v, n), set1(e),
//         fma(a, b, c) = a*b+c, add(a, b), sum(v), sum4(a, b, c, d, out[4]).
//         load_n reads only the first n < kLanes elements and fills with zeros. And what
//         gemm_tile-inl.hpp asks for.
// Weight: Elem (as stored), load(p), load_n(p, n) giving a V::Reg.
// Also load_halves(p), load_halves_n(p, n): F32::kLanes 16-bit elements, or the n first and zeros;
// and widen_bf16, widen_f16: of these to an F32::Reg; round_bf16, round_bf16_n: the other way, at a
// pointer, all or the n first.
//
// Tails: columns beyond the last whole vector go through load_n, for x as for w, so no lane ever
// multiplies a made-up zero with a stored NaN or infinity. Lanes of x that only pad a tile may hold
// such products; nobody reads them.

#include "kernels/gemm_tile-inl.hpp"

template <class V>
struct SameWeight {
    using Elem = typename V::Elem;
    static typename V::Reg load(const Elem* p) noexcept { return V::load(p); }
    static typename V::Reg load_n(const Elem* p, std::size_t n) noexcept { return V::load_n(p, n); }
};

struct Bf16Weight {
    using Elem = std::uint16_t;
    static F32::Reg load(const Elem* p) noexcept { return widen_bf16(load_halves(p)); }
    static F32::Reg load_n(const Elem* p, std::size_t n) noexcept {
        return widen_bf16(load_halves_n(p, n));
    }
};

struct F16Weight {
    using Elem = std::uint16_t;
    static F32::Reg load(const Elem* p) noexcept { return widen_f16(load_halves(p)); }
    static F32::Reg load_n(const Elem* p, std::size_t n) noexcept {
        return widen_f16(load_halves_n(p, n));
    }
};

template <class Weight>
void widen(const std::uint16_t* src, std::size_t count, float* dst) noexcept {
    std::size_t i = 0;
    for (; i + F32::kLanes <= count; i += F32::kLanes) F32::store(dst + i, Weight::load(src + i));
    if (i < count) F32::store_n(dst + i, Weight::load_n(src + i, count - i), count - i);
}

void f32_to_bf16(const float* src, std::size_t count, std::uint16_t* dst) noexcept {
    std::size_t i = 0;
    for (; i + F32::kLanes <= count; i += F32::kLanes) round_bf16(F32::load(src + i), dst + i);
    if (i < count) round_bf16_n(F32::load_n(src + i, count - i), count - i, dst + i);
}

// How far ahead of its use a single row of x asks memory for w: two pages of 4 KiB, at whose ends
// the hardware's prefetchers stop. Blocks lie one after another on a page, so what comes later is,
// most often, the next block (EPYC, 4096 x 4096 f32 in memory: 37 GB/s without and 49 with it, two
// threads 64 and 75; 2 KiB ahead brings nothing, 4 KiB half of it).
constexpr std::size_t kDotAheadBytes = 8192;
// Rows of 16-bit numbers are half as long: kDotAheadBytes ahead they are asked for into the
// second-level cache; and, AsksSoon, this far ahead into the first, too, which a Xeon gains by (201
// MB of them in memory: 10 ms without, 7.8 with it) and an EPYC loses by (a tenth). f32 gains
// nothing on either.
constexpr std::size_t kDotSoonBytes = 1024;
// Rows of w that a single row of x takes two at a time; and those of 16-bit numbers, however long,
// which one sum at a time is too slow for: each step waits for a conversion as well (AVX2: half as
// fast from the second-level cache, no faster from memory).
constexpr std::size_t kShortRowBytes = 256;

// M rows of x by R rows of w: M*R running sums of kLanes lanes, folded at the end of the block. A
// single row of x takes only 2 of w: the more rows are in flight, the sooner the hardware's
// prefetchers lose track (EPYC, one core, 64 x 64 blocks in memory: 11 GB/s with 8 rows, 15 with 4,
// 23 with 2), and where rows are long, 1 (the same, 64 x 128: 14 GB/s with 2 rows, 22 with 1).
template <class V, class Weight, bool AsksSoon, std::size_t M, std::size_t R>
void dot_nt_fixed(const typename V::Elem* x, std::size_t ldx, const typename Weight::Elem* w,
                  std::size_t cols, std::size_t ldw, typename V::Elem* y,
                  std::size_t ldy) noexcept {
    using Reg = typename V::Reg;
    constexpr std::size_t kLine = 64 / sizeof(typename Weight::Elem);
    constexpr bool kIsHalf = sizeof(typename Weight::Elem) == 2;
    Reg sums[M * R];
#pragma GCC unroll 16
    for (std::size_t k = 0; k < M * R; ++k) sums[k] = V::zero();
    std::size_t c = 0;
    for (; c + V::kLanes <= cols; c += V::kLanes) {
        Reg xs[M];
#pragma GCC unroll 8
        for (std::size_t i = 0; i < M; ++i) xs[i] = V::load(x + i * ldx + c);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) {
            if constexpr (M == 1) {
                if (V::kLanes >= kLine || c % kLine == 0) {
                    const auto* const at = w + r * ldw + c;
                    __builtin_prefetch(at + kLine * (kDotAheadBytes / 64), 0, kIsHalf ? 2 : 3);
                    if constexpr (kIsHalf && AsksSoon) {
                        __builtin_prefetch(at + kLine * (kDotSoonBytes / 64));
                    }
                }
            }
            const Reg ws = Weight::load(w + r * ldw + c);
#pragma GCC unroll 8
            for (std::size_t i = 0; i < M; ++i)
                sums[i * R + r] = V::fma(xs[i], ws, sums[i * R + r]);
        }
    }
    if (const std::size_t rest = cols - c; rest != 0) {
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) {
            const Reg ws = Weight::load_n(w + r * ldw + c, rest);
#pragma GCC unroll 8
            for (std::size_t i = 0; i < M; ++i) {
                sums[i * R + r] = V::fma(V::load_n(x + i * ldx + c, rest), ws, sums[i * R + r]);
            }
        }
    }
    if constexpr (M * R % 4 == 0) {
        typename V::Elem folded[4];
#pragma GCC unroll 16
        for (std::size_t k = 0; k < M * R; k += 4) {
            V::sum4(sums[k], sums[k + 1], sums[k + 2], sums[k + 3], folded);
#pragma GCC unroll 4
            for (std::size_t j = 0; j < 4; ++j) y[(k + j) / R * ldy + (k + j) % R] += folded[j];
        }
    } else {
#pragma GCC unroll 16
        for (std::size_t k = 0; k < M * R; ++k) y[k / R * ldy + k % R] += V::sum(sums[k]);
    }
}

template <class V, class Weight, bool AsksSoon, std::size_t M, std::size_t R>
void dot_nt_rows(const typename V::Elem* x, std::size_t ldx, const typename Weight::Elem* w,
                 std::size_t rows, std::size_t cols, std::size_t ldw, typename V::Elem* y,
                 std::size_t ldy) noexcept {
    std::size_t r = 0;
    for (; r + R <= rows; r += R) {
        dot_nt_fixed<V, Weight, AsksSoon, M, R>(x, ldx, w + r * ldw, cols, ldw, y + r, ldy);
    }
    for (; r < rows; ++r) {
        dot_nt_fixed<V, Weight, AsksSoon, M, 1>(x, ldx, w + r * ldw, cols, ldw, y + r, ldy);
    }
}

template <class V, class Weight, bool AsksSoon = true>
void dot_nt(const typename V::Elem* x, std::size_t ldx, std::size_t m,
            const typename Weight::Elem* w, std::size_t rows, std::size_t cols, std::size_t ldw,
            typename V::Elem* y, std::size_t ldy) noexcept {
    for (; m >= 4; m -= 4, x += 4 * ldx, y += 4 * ldy) {
        dot_nt_rows<V, Weight, false, 4, kDotRows4>(x, ldx, w, rows, cols, ldw, y, ldy);
    }
    switch (m) {
        case 3:
            dot_nt_rows<V, Weight, false, 3, 4>(x, ldx, w, rows, cols, ldw, y, ldy);
            break;
        case 2:
            dot_nt_rows<V, Weight, false, 2, 4>(x, ldx, w, rows, cols, ldw, y, ldy);
            break;
        case 1:
            if (sizeof(typename Weight::Elem) < sizeof(float) ||
                cols * sizeof(typename Weight::Elem) <= kShortRowBytes) {
                dot_nt_rows<V, Weight, AsksSoon, 1, 2>(x, ldx, w, rows, cols, ldw, y, ldy);
            } else {
                dot_nt_rows<V, Weight, AsksSoon, 1, 1>(x, ldx, w, rows, cols, ldw, y, ldy);
            }
            break;
        default:
            break;
    }
}

// R rows of x by VN vectors along the columns of w; `last` is the number of columns in the last
// vector, below kLanes only when Tail.
template <class V, std::size_t R, std::size_t VN, bool Tail>
void block_nn_fixed(const typename V::Elem* x, std::size_t ldx, const typename V::Elem* w,
                    std::size_t rows, std::size_t ldw, typename V::Elem* y, std::size_t ldy,
                    std::size_t last) noexcept {
    using Reg = typename V::Reg;
    const auto load = [last](const typename V::Elem* p, std::size_t v) noexcept {
        if (Tail && v == VN - 1) return V::load_n(p + v * V::kLanes, last);
        return V::load(p + v * V::kLanes);
    };
    Reg sums[R][VN];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) sums[i][v] = load(y + i * ldy, v);
    }
    for (std::size_t r = 0; r < rows; ++r) {
        Reg ws[VN];
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) ws[v] = load(w + r * ldw, v);
#pragma GCC unroll 16
        for (std::size_t i = 0; i < R; ++i) {
            const Reg xs = V::set1(x[i * ldx + r]);
#pragma GCC unroll 4
            for (std::size_t v = 0; v < VN; ++v) sums[i][v] = V::fma(xs, ws[v], sums[i][v]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < VN; ++v) {
            typename V::Elem* to = y + i * ldy + v * V::kLanes;
            if (Tail && v == VN - 1) {
                V::store_n(to, sums[i][v], last);
            } else {
                V::store(to, sums[i][v]);
            }
        }
    }
}

template <class V, std::size_t R>
void block_nn_rows(const typename V::Elem* x, std::size_t ldx, const typename V::Elem* w,
                   std::size_t rows, std::size_t cols, std::size_t ldw, typename V::Elem* y,
                   std::size_t ldy) noexcept {
    constexpr std::size_t kStep = kNnVectors * V::kLanes;
    std::size_t c = 0;
    for (; c + kStep <= cols; c += kStep) {
        block_nn_fixed<V, R, kNnVectors, false>(x, ldx, w + c, rows, ldw, y + c, ldy, V::kLanes);
    }
    for (; c + V::kLanes <= cols; c += V::kLanes) {
        block_nn_fixed<V, R, 1, false>(x, ldx, w + c, rows, ldw, y + c, ldy, V::kLanes);
    }
    if (c < cols) block_nn_fixed<V, R, 1, true>(x, ldx, w + c, rows, ldw, y + c, ldy, cols - c);
}

template <class V>
void block_nn(const typename V::Elem* x, std::size_t ldx, std::size_t m, const typename V::Elem* w,
              std::size_t rows, std::size_t cols, std::size_t ldw, typename V::Elem* y,
              std::size_t ldy) noexcept {
    std::size_t i = 0;
    for (; i + kNnRows <= m; i += kNnRows) {
        block_nn_rows<V, kNnRows>(x + i * ldx, ldx, w, rows, cols, ldw, y + i * ldy, ldy);
    }
    for (; i + 2 <= m; i += 2) {
        block_nn_rows<V, 2>(x + i * ldx, ldx, w, rows, cols, ldw, y + i * ldy, ldy);
    }
    if (i < m) block_nn_rows<V, 1>(x + i * ldx, ldx, w, rows, cols, ldw, y + i * ldy, ldy);
}
