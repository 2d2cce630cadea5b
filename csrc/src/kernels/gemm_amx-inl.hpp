// SPDX-License-Identifier: Apache-2.0
// Products of bf16 numbers in the matrix registers of AMX: 16 rows of w (as they lie in their
// page) by 16 rows of x (packed in pairs of columns) by 32 columns per instruction. The products of
// even and of odd columns are summed apart, then both are added to the sum in f32, rounded to
// nearest; subnormal numbers count as zero (TDPBF16PS).
//
// Intel's SDM, volume 1, chapter 18. The registers' shape is set once per thread and task (enter):
// that takes as long as a block of 64 x 64 does. So there is one shape, and what is smaller is
// copied into zeros.
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_amx {
namespace {

using Bits = std::uint16_t;

constexpr std::size_t kSide = 16;       // rows of a register
constexpr std::size_t kColumns = 32;    // columns of w that one instruction takes
constexpr std::size_t kRegister = 512;  // elements of a register of bf16

struct alignas(64) Shape {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};
constexpr Shape kShape;

void enter() noexcept { _tile_loadconfig(&kShape); }
void leave() noexcept { _tile_release(); }

// The instructions below are opaque to the compiler: what C++ wrote has to be in memory before they
// read it, what they wrote must not be read earlier, and what they have yet to read must not be
// written over (GCC's loads do not say that they read memory).
inline void order_memory() noexcept { asm volatile("" ::: "memory"); }

// Rows of w, or of pairs of x, in zeros up to a whole register.
struct alignas(64) Padded {
    Bits elements[kRegister];

    void fill(const Bits* from, std::size_t rows, std::size_t cols, std::size_t ld) noexcept {
        order_memory();
        const __mmask32 some = cols >= kColumns ? ~__mmask32{0} : (__mmask32{1} << cols) - 1U;
        for (std::size_t r = 0; r < kSide; ++r) {
            const __m512i row =
                r < rows ? _mm512_maskz_loadu_epi16(some, from + r * ld) : _mm512_setzero_si512();
            _mm512_store_si512(elements + r * kColumns, row);
        }
    }
};

// Registers: sums of 2 x 2 in 0 to 3, rows of w in 4 and 5, rows of x in 6 and 7.
template <std::size_t R, std::size_t X>
void begin_sums(bool anew, const float* acc) noexcept {
    if (anew) {
        _tile_zero(0);
        if constexpr (X == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && X == 2) _tile_zero(3);
        return;
    }
    constexpr std::size_t kStride = X * kSide * sizeof(float);
    _tile_loadd(0, acc, kStride);
    if constexpr (X == 2) _tile_loadd(1, acc + kSide, kStride);
    if constexpr (R == 2) _tile_loadd(2, acc + kSide * X * kSide, kStride);
    if constexpr (R == 2 && X == 2) _tile_loadd(3, acc + kSide * X * kSide + kSide, kStride);
}

template <std::size_t R, std::size_t X>
void store_sums(float* acc) noexcept {
    constexpr std::size_t kStride = X * kSide * sizeof(float);
    _tile_stored(0, acc, kStride);
    if constexpr (X == 2) _tile_stored(1, acc + kSide, kStride);
    if constexpr (R == 2) _tile_stored(2, acc + kSide * X * kSide, kStride);
    if constexpr (R == 2 && X == 2) _tile_stored(3, acc + kSide * X * kSide + kSide, kStride);
}

template <std::size_t R, std::size_t X>
void multiply(const Bits* w0, const Bits* w1, std::size_t w_stride, const Bits* x0, const Bits* x1,
              std::size_t x_stride) noexcept {
    _tile_loadd(6, x0, x_stride);
    _tile_loadd(4, w0, w_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (X == 2) {
        _tile_loadd(7, x1, x_stride);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
        _tile_loadd(5, w1, w_stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (X == 2) _tile_dpbf16ps(3, 5, 7);
    }
}

using Piece = GemmPiece<Bits>;

// The last columns of x, fewer than a register takes.
template <std::size_t X>
struct LastColumns {
    Padded x[X];
    std::size_t count;

    void fill(const Piece& piece) noexcept {
        count = piece.cols % kColumns;
        if (count == 0) return;
        const Bits* const from = piece.x + (piece.cols - count) * X * kSide;
        for (std::size_t i = 0; i < X; ++i) {
            x[i].fill(from + i * kColumns, (count + 1) / 2, kColumns, X * kColumns);
        }
    }
};

// The 2 * 16 rows of w from row r on, or 16.
template <std::size_t R, std::size_t X>
void whole_rows(const Piece* pieces, std::size_t n_pieces, std::size_t r,
                const LastColumns<X>* last, bool anew, float* acc) noexcept {
    begin_sums<R, X>(anew, acc + r * X * kSide);
    for (std::size_t p = 0; p < n_pieces; ++p) {
        const std::size_t ldw = pieces[p].ldw;
        const Bits* x = pieces[p].x;
        const Bits* w = pieces[p].w + r * ldw;
        const Bits* next =
            pieces[p].next == nullptr ? nullptr : pieces[p].next + r * pieces[p].cols;
        for (std::size_t c = 0; c + kColumns <= pieces[p].cols; c += kColumns) {
            if (next != nullptr) {
                for (std::size_t k = 0; k < R * kRegister; k += 32) {
                    __builtin_prefetch(next + k, 0, 2);
                }
                next += R * kRegister;
            }
            multiply<R, X>(w, w + kSide * ldw, ldw * sizeof(Bits), x, x + kColumns,
                           X * kColumns * sizeof(Bits));
            w += kColumns;
            x += X * kRegister;
        }
        if (last[p].count != 0) {
            Padded rows[R];
            for (std::size_t i = 0; i < R; ++i) {
                rows[i].fill(w + i * kSide * ldw, kSide, last[p].count, ldw);
            }
            order_memory();
            multiply<R, X>(rows[0].elements, rows[R - 1].elements, kColumns * sizeof(Bits),
                           last[p].x[0].elements, last[p].x[X - 1].elements,
                           kColumns * sizeof(Bits));
        }
    }
    store_sums<R, X>(acc + r * X * kSide);
}

// The rows of w from row r on, fewer than a register takes.
template <std::size_t X>
void last_rows(const Piece* pieces, std::size_t n_pieces, std::size_t r, std::size_t rows,
               const LastColumns<X>* last, bool anew, float* acc) noexcept {
    constexpr std::size_t kSums = X * kSide;
    alignas(64) float sums[kSide * kSums] = {};
    if (!anew) __builtin_memcpy(sums, acc + r * kSums, (rows - r) * kSums * sizeof(float));
    order_memory();
    begin_sums<1, X>(anew, sums);
    Padded some;
    for (std::size_t p = 0; p < n_pieces; ++p) {
        const Bits* x = pieces[p].x;
        for (std::size_t c = 0; c < pieces[p].cols; c += kColumns, x += X * kRegister) {
            const bool whole = c + kColumns <= pieces[p].cols;
            some.fill(pieces[p].w + r * pieces[p].ldw + c, rows - r,
                      whole ? kColumns : last[p].count, pieces[p].ldw);
            order_memory();
            if (whole) {
                multiply<1, X>(some.elements, nullptr, kColumns * sizeof(Bits), x, x + kColumns,
                               X * kColumns * sizeof(Bits));
            } else {
                multiply<1, X>(some.elements, nullptr, kColumns * sizeof(Bits),
                               last[p].x[0].elements, last[p].x[X - 1].elements,
                               kColumns * sizeof(Bits));
            }
        }
    }
    store_sums<1, X>(sums);
    order_memory();
    __builtin_memcpy(acc + r * kSums, sums, (rows - r) * kSums * sizeof(float));
}

// X * 16 rows of x.
template <std::size_t X>
void tile_pieces(const Piece* pieces, std::size_t n_pieces, std::size_t rows, bool anew,
                 float* acc) noexcept {
    LastColumns<X> last[kMaxGemmPieces];
    for (std::size_t p = 0; p < n_pieces; ++p) last[p].fill(pieces[p]);
    order_memory();
    std::size_t r = 0;
    for (; r + 2 * kSide <= rows; r += 2 * kSide) {
        whole_rows<2, X>(pieces, n_pieces, r, last, anew, acc);
    }
    if (r + kSide <= rows) {
        whole_rows<1, X>(pieces, n_pieces, r, last, anew, acc);
        r += kSide;
    }
    if (r < rows) last_rows<X>(pieces, n_pieces, r, rows, last, anew, acc);
    order_memory();
}

template <std::size_t X>
void tile_nt(const Bits* x, const Bits* w, std::size_t rows, std::size_t cols, std::size_t ldw,
             const GemmNext<Bits>& next, float* acc) noexcept {
    for (const Bits* at = next.w; at < next.w_end; at += 32) __builtin_prefetch(at, 0, 2);
    const Piece piece = {x, w, cols, ldw, nullptr};
    tile_pieces<X>(&piece, 1, rows, false, acc);
}

void cut(const float* x, std::size_t count, float* high, float* middle, float* low) noexcept {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i infinity = _mm512_set1_epi32(0x7F800000);
    const __m512i quiet = _mm512_set1_epi32(0x00400000);
    const __m512i exponent32 = _mm512_set1_epi32(32 << 23);
    const auto truncated = [=](__m512 value) noexcept {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), upper));
    };
    for (std::size_t i = 0; i < count; i += 16) {
        const std::size_t left = count - i;
        const auto some = static_cast<__mmask16>(left < 16 ? (1U << left) - 1U : 0xFFFFU);
        const __m512 number = _mm512_maskz_loadu_ps(some, x + i);
        const __m512i bits = _mm512_castps_si512(number);
        const __m512i size = _mm512_and_si512(bits, magnitude);
        const __mmask16 is_some = _mm512_test_epi32_mask(size, size);
        const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(size, infinity);
        const __mmask16 is_endless = _mm512_cmpge_epi32_mask(size, infinity);
        const __m512 first = truncated(number);
        const __m512 rest = _mm512_sub_ps(number, first);
        const __m512 second = truncated(rest);
        const __m512i top = _mm512_castps_si512(first);
        const __m512i tiny = _mm512_mask_sub_epi32(bits, is_some, top, exponent32);
        // A NaN may have its bits in the lower half alone.
        const __m512i endless = _mm512_mask_or_epi32(top, is_nan, top, quiet);
        const auto store = [=](float* to, __m512 part) noexcept {
            const __m512i exact = _mm512_castps_si512(part);
            const __mmask16 is_gone = _mm512_testn_epi32_mask(exact, magnitude);
            const __m512i finite = _mm512_mask_mov_epi32(exact, is_gone, tiny);
            _mm512_mask_storeu_epi32(to, some, _mm512_mask_mov_epi32(finite, is_endless, endless));
        };
        store(high + i, first);
        store(middle + i, second);
        store(low + i, _mm512_sub_ps(rest, second));
    }
}

#include "kernels/gemm_pairs-inl.hpp"
// What it has of the file before:
#include "kernels/gemm_amx_cut-inl.hpp"
#include "kernels/gemm_amx_turned-inl.hpp"
#include "kernels/gemm_amx_turned_cut-inl.hpp"

constexpr Bf16GemmKernels kGemm = {{{2 * kSide, tile_nt<2>, 2, 2, tile_pieces<2>, tile_nt_cut<2>},
                                    {kSide, tile_nt<1>, 2, 2, tile_pieces<1>, tile_nt_cut<1>}},
                                   cut,
                                   enter,
                                   leave,
                                   pack_pairs,
                                   columns_to_f32,
                                   columns_to_bf16,
                                   rows_to_bf16,
                                   copy_pairs,
                                   pack_cut,
                                   pair_cut,
                                   cut_block,
                                   turned<std::uint16_t>,
                                   turned<float>,
                                   cut_strip,
                                   turned_cut};

}  // namespace
}  // namespace pydedup::isa_amx
