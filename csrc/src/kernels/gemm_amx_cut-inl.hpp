// SPDX-License-Identifier: Apache-2.0
// Products of f32 numbers by AMX: each number is the sum of three bf16 numbers, so each product is
// that of nine, of which the six largest count; what is left out is below 2^-24 of it, as the
// rounding of f32 is. Six of these take less than half as long as one product of f32 by AVX-512.
//
// Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations (arXiv 1904.06376), the decomposition of FP32 into three. Included
// INSIDE the anonymous namespace of AMX.

constexpr std::size_t up_to(std::size_t value, std::size_t of) noexcept {
    return (value + of - 1) / of * of;
}

// Sixteen numbers rounded to bf16, as f32: half way away from zero.
inline __m512 nearest_bf16(__m512 values) noexcept {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(values), half), upper));
}

alignas(64) constexpr auto kUpperHalves = [] {
    struct {
        Bits at[kColumns];
    } of{};
    for (Bits i = 0; i < kColumns; ++i) of.at[i] = static_cast<Bits>(2 * i + 1);
    return of;
}();

// Up to 32 numbers, cut: each part is what is left, rounded. The largest of each lane of their
// magnitudes, and of `most`, which are those before.
struct CutRow {
    __m512i parts[3];
    __m512i most;

    CutRow(const float* from, __mmask32 some, __m512i most_before) noexcept {
        const __m512i upper_halves = _mm512_load_si512(kUpperHalves.at);
        const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
        __m512 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), from);
        __m512 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), from + 16);
        const __m512i of_a = _mm512_and_si512(_mm512_castps_si512(a), magnitude);
        const __m512i of_b = _mm512_and_si512(_mm512_castps_si512(b), magnitude);
        most = _mm512_max_epu32(most_before, _mm512_max_epu32(of_a, of_b));
        const auto halves = [=](__m512 of_first, __m512 of_second) noexcept {
            return _mm512_permutex2var_epi16(_mm512_castps_si512(of_first), upper_halves,
                                             _mm512_castps_si512(of_second));
        };
        for (std::size_t i = 0; i < 2; ++i) {
            const __m512 high_a = nearest_bf16(a);
            const __m512 high_b = nearest_bf16(b);
            parts[i] = halves(high_a, high_b);
            a = _mm512_sub_ps(a, high_a);
            b = _mm512_sub_ps(b, high_b);
        }
        parts[2] = halves(a, b);
    }
};

__mmask32 first_columns(std::size_t n) noexcept {
    return n < kColumns ? (__mmask32{1} << n) - __mmask32{1} : ~__mmask32{0};
}

// Whether numbers may be cut of which this is the largest magnitude.
bool may_be_cut(__m512i most) noexcept {
    const std::uint32_t largest = _mm512_reduce_max_epu32(most);
    return largest < kTooLargeToCut && (largest == 0 || largest >= kLeastToCut);
}

bool cut_block(const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
               Bits* to) noexcept {
    const std::size_t all_rows = up_to(rows, kSide);
    const std::size_t part = all_rows * up_to(cols, kColumns);
    __m512i most = _mm512_setzero_si512();
    for (std::size_t c = 0; c < cols; c += kColumns) {
        const __mmask32 some = first_columns(cols - c);
        for (std::size_t r = 0; r < rows; ++r, to += kColumns) {
            const CutRow row(w + r * ldw + c, some, most);
            most = row.most;
            for (std::size_t i = 0; i < 3; ++i) _mm512_store_si512(to + i * part, row.parts[i]);
        }
        for (std::size_t r = rows; r < all_rows; ++r, to += kColumns) {
            for (std::size_t i = 0; i < 3; ++i) {
                _mm512_store_si512(to + i * part, _mm512_setzero_si512());
            }
        }
    }
    return may_be_cut(most);
}

// Pairs of numbers, each cut: of sixteen lanes, those of `there`. The largest magnitude of each
// lane, and of `most`.
inline __m512i cut_pair(__m512 a, __m512 b, __m512i most, Bits* to, std::size_t part,
                        __mmask16 there) noexcept {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(a), magnitude));
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(b), magnitude));
    const auto store = [=](std::size_t i, __m512 of_a, __m512 of_b) noexcept {
        const __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(of_a), 16),
                                              _mm512_and_si512(_mm512_castps_si512(of_b), upper));
        _mm512_mask_storeu_epi32(to + i * part, there, pairs);
    };
    for (std::size_t i = 0; i < 2; ++i) {
        const __m512 high_a = nearest_bf16(a);
        const __m512 high_b = nearest_bf16(b);
        store(i, high_a, high_b);
        a = _mm512_sub_ps(a, high_a);
        b = _mm512_sub_ps(b, high_b);
    }
    store(2, a, b);
    return most;
}

// The lanes of sixteen that may not be cut, of which these are the largest magnitudes: they become
// zeros, in so many pairs.
inline std::uint32_t clear_uncut(__m512i most, std::size_t pairs, Bits* to, std::size_t part,
                                 std::size_t ld_to) noexcept {
    const auto tiny =
        static_cast<__mmask16>(_mm512_cmplt_epu32_mask(most, _mm512_set1_epi32(kLeastToCut)) &
                               _mm512_test_epi32_mask(most, most));
    const auto unfit = static_cast<__mmask16>(
        tiny | _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(kTooLargeToCut)));
    for (std::size_t i = 0; unfit != 0 && i < 3; ++i) {
        for (std::size_t k = 0; k < pairs; ++k) {
            _mm512_mask_storeu_epi32(to + i * part + k * ld_to, unfit, _mm512_setzero_si512());
        }
    }
    return unfit;
}

std::uint32_t pack_cut(const float* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                       Bits* to, std::size_t part, std::size_t ld_to) noexcept {
    std::uint32_t uncut = 0;
    for (std::size_t r0 = 0; r0 < rows; r0 += kSide) {
        const std::size_t n_rows = rows - r0 < kSide ? rows - r0 : kSide;
        const auto there = static_cast<__mmask16>((1U << n_rows) - 1U);
        Bits* const of_rows = to + 2 * r0;
        __m512i most = _mm512_setzero_si512();
        for (std::size_t c0 = 0; c0 < cols; c0 += kSide) {
            const std::size_t left = cols - c0 < kSide ? cols - c0 : kSide;
            const auto some = static_cast<__mmask16>((1U << left) - 1U);
            __m512i words[kSide] = {};
            for (std::size_t r = 0; r < n_rows; ++r) {
                words[r] = _mm512_maskz_loadu_epi32(some, x + (r0 + r) * ldx + c0);
            }
            transpose_words(words);
            for (std::size_t k = 0; k < (left + 1) / 2; ++k) {
                most = cut_pair(_mm512_castsi512_ps(words[2 * k]),
                                _mm512_castsi512_ps(words[2 * k + 1]), most,
                                of_rows + (c0 / 2 + k) * ld_to, part, there);
            }
        }
        // Lanes of no row are zeros.
        uncut |= clear_uncut(most, (cols + 1) / 2, of_rows, part, ld_to) << r0;
    }
    return uncut;
}

std::uint32_t pair_cut(const float* x, std::size_t cols, Bits* to, std::size_t part) noexcept {
    constexpr std::size_t kLanes = 2 * kSide;
    std::uint32_t uncut = 0;
    for (std::size_t half = 0; half < 2; ++half) {
        const float* const lanes = x + half * kSide;
        Bits* const of_lanes = to + half * kColumns;
        __m512i most = _mm512_setzero_si512();
        for (std::size_t c = 0; c < cols; c += 2) {
            const __m512 a = _mm512_loadu_ps(lanes + c * kLanes);
            const __m512 b =
                c + 1 < cols ? _mm512_loadu_ps(lanes + (c + 1) * kLanes) : _mm512_setzero_ps();
            most = cut_pair(a, b, most, of_lanes + c * kLanes, part, __mmask16{0xFFFF});
        }
        uncut |= clear_uncut(most, (cols + 1) / 2, of_lanes, part, 2 * kLanes) << (half * kSide);
    }
    return uncut;
}

template <std::size_t R>
void load_w(const Bits* w) noexcept {
    _tile_loadd(4, w, kColumns * sizeof(Bits));
    if constexpr (R == 2) _tile_loadd(5, w + kRegister, kColumns * sizeof(Bits));
}

template <std::size_t X>
void load_x(const Bits* x) noexcept {
    constexpr std::size_t kStride = X * kColumns * sizeof(Bits);
    _tile_loadd(6, x, kStride);
    if constexpr (X == 2) _tile_loadd(7, x + kColumns, kStride);
}

template <std::size_t R, std::size_t X>
void multiply_loaded() noexcept {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (X == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R == 2 && X == 2) _tile_dpbf16ps(3, 5, 7);
}

// Each of the six pairs of parts shares one part with the pair before.
template <std::size_t R, std::size_t X>
void multiply_cut(const Bits* w, std::size_t w_part, const Bits* x, std::size_t x_part) noexcept {
    load_w<R>(w + 2 * w_part);
    load_x<X>(x);
    multiply_loaded<R, X>();
    load_w<R>(w + w_part);
    multiply_loaded<R, X>();
    load_x<X>(x + x_part);
    multiply_loaded<R, X>();
    load_w<R>(w);
    multiply_loaded<R, X>();
    load_x<X>(x + 2 * x_part);
    multiply_loaded<R, X>();
    load_x<X>(x);
    multiply_loaded<R, X>();
}

// What is asked for ahead, evenly over so many steps.
class Lines {
  public:
    Lines(const Bits* begin, const Bits* end, std::size_t steps) noexcept
        : at_(begin), each_((static_cast<std::size_t>(end - begin) / 32 + steps - 1) / steps) {}

    // The same of memory so far away, n times.
    void ask(std::size_t n, std::size_t apart) noexcept {
        for (std::size_t i = 0; i < each_; ++i, at_ += 32) {
            for (std::size_t k = 0; k < n; ++k) __builtin_prefetch(at_ + k * apart, 0, 2);
        }
    }

  private:
    const Bits* at_;
    std::size_t each_;
};

template <std::size_t X>
void tile_nt_cut(const Bits* x, std::size_t x_part, const Bits* w, std::size_t w_part,
                 std::size_t rows, std::size_t cols, const GemmNext<Bits>& next,
                 float* acc) noexcept {
    constexpr std::size_t kSums = X * kSide;
    constexpr std::size_t kOfX = X * kRegister;
    order_memory();
    // Beyond the last columns x is of something else.
    alignas(64) Bits last[3 * kOfX];
    const std::size_t whole = cols / kColumns * kColumns;
    if (whole != cols) {
        const std::size_t pairs = (cols - whole + 1) / 2;
        for (std::size_t i = 0; i < 3; ++i) {
            const Bits* const from = x + i * x_part + whole * kSums;
            for (std::size_t k = 0; k < kOfX; k += 32) {
                const bool is_there = k < pairs * 2 * kSums;
                _mm512_store_si512(last + i * kOfX + k, is_there ? _mm512_loadu_si512(from + k)
                                                                 : _mm512_setzero_si512());
            }
        }
    }
    const std::size_t w_step = up_to(rows, kSide) * kColumns;
    const std::size_t steps =
        up_to(rows, 2 * kSide) / (2 * kSide) * (up_to(cols, kColumns) / kColumns);
    Lines next_w(next.w, next.w_end, steps);
    Lines next_x(next.x, next.x_end, steps);
    const auto multiply_rows = [&]<std::size_t R>(std::size_t r, float* sums) noexcept {
        order_memory();
        begin_sums<R, X>(false, sums);
        const Bits* of_w = w + r * kColumns;
        for (std::size_t c = 0; c < cols; c += kColumns, of_w += w_step) {
            next_w.ask(1, 0);
            next_x.ask(3, x_part);
            if (c < whole) {
                multiply_cut<R, X>(of_w, w_part, x + c * kSums, x_part);
            } else {
                multiply_cut<R, X>(of_w, w_part, last, kOfX);
            }
        }
        store_sums<R, X>(sums);
        order_memory();
    };
    std::size_t r = 0;
    for (; r + 2 * kSide <= rows; r += 2 * kSide) {
        multiply_rows.template operator()<2>(r, acc + r * kSums);
    }
    if (r + kSide <= rows) {
        multiply_rows.template operator()<1>(r, acc + r * kSums);
        r += kSide;
    }
    if (r == rows) return;
    alignas(64) float sums[kSide * kSums] = {};
    __builtin_memcpy(sums, acc + r * kSums, (rows - r) * kSums * sizeof(float));
    multiply_rows.template operator()<1>(r, sums);
    __builtin_memcpy(acc + r * kSums, sums, (rows - r) * kSums * sizeof(float));
}
