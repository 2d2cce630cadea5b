// SPDX-License-Identifier: Apache-2.0
// What goes into products of bf16 numbers, in pairs, and their sums back in bf16: written once for
// AVX-512, and compiled where such products are. An -inl file includes this INSIDE its own
// anonymous namespace.

// Sixteen numbers, each rounded to the upper half of its word.
inline __m512i rounded_to_bf16(__m512 values) noexcept {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
}

// Rows to columns, of 16 x 16 words: pairs, fours, then quarters of registers.
inline void transpose_words(__m512i (&w)[16]) noexcept {
    __m512i t[16];
    for (std::size_t i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
    }
    for (std::size_t i = 0; i < 16; i += 4) {
        for (std::size_t j = 0; j < 2; ++j) {
            w[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            w[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    }
    for (std::size_t i = 0; i < 16; i += 8) {
        for (std::size_t j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(w[i + j], w[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(w[i + j], w[i + 4 + j], 0xDD);
        }
    }
    for (std::size_t j = 0; j < 8; ++j) {
        w[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        w[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
    }
}

inline void columns_to_f32(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                           float* dst, std::size_t ld_dst) noexcept {
    constexpr std::size_t kWords = 16;
    const auto first = [](std::size_t n) noexcept {
        return static_cast<__mmask16>(n < kWords ? (1U << n) - 1U : 0xFFFFU);
    };
    for (std::size_t c0 = 0; c0 < cols; c0 += kWords) {
        for (std::size_t r0 = 0; r0 < rows; r0 += kWords) {
            __m512i words[kWords];
            for (std::size_t r = 0; r < kWords; ++r) {
                words[r] = r0 + r < rows ? _mm512_maskz_loadu_epi32(first(cols - c0),
                                                                    src + (r0 + r) * ld_src + c0)
                                         : _mm512_setzero_si512();
            }
            transpose_words(words);
            for (std::size_t c = c0; c < cols && c < c0 + kWords; ++c) {
                _mm512_mask_storeu_epi32(dst + c * ld_dst + r0, first(rows - r0), words[c - c0]);
            }
        }
    }
}

// A word holds neighbours of what becomes a row, so half as many words are moved.
inline void columns_to_bf16(const float* src, std::size_t ld_src, std::size_t rows,
                            std::size_t cols, const float* bias, std::uint16_t* dst,
                            std::size_t ld_dst) noexcept {
    constexpr std::size_t kRows = 32;
    constexpr std::size_t kCols = 16;
    for (std::size_t r0 = 0; r0 < rows; r0 += kRows) {
        const std::size_t n_rows = rows - r0 < kRows ? rows - r0 : kRows;
        const auto some = static_cast<__mmask32>((std::uint64_t{1} << n_rows) - 1U);
        for (std::size_t c0 = 0; c0 < cols; c0 += kCols) {
            const std::size_t n_cols = cols - c0 < kCols ? cols - c0 : kCols;
            const auto there = static_cast<__mmask16>((1U << n_cols) - 1U);
            const auto row = [=](std::size_t r) noexcept {
                if (r >= n_rows) return _mm512_setzero_si512();
                __m512 values = _mm512_maskz_loadu_ps(there, src + (r0 + r) * ld_src + c0);
                if (bias != nullptr) {
                    values = _mm512_add_ps(values, _mm512_set1_ps(bias[r0 + r]));
                }
                return rounded_to_bf16(values);
            };
            __m512i words[kCols];
            for (std::size_t i = 0; i < kCols; ++i) {
                words[i] = _mm512_mask_blend_epi16(0xAAAAAAAAU, _mm512_srli_epi32(row(2 * i), 16),
                                                   row(2 * i + 1));
            }
            transpose_words(words);
            for (std::size_t c = 0; c < n_cols; ++c) {
                _mm512_mask_storeu_epi16(dst + (c0 + c) * ld_dst + r0, some, words[c]);
            }
        }
    }
}

inline void rows_to_bf16(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                         const float* bias, std::uint16_t* dst, std::size_t ld_dst) noexcept {
    constexpr std::size_t kWords = 16;
    for (std::size_t c = 0; c < cols; c += kWords) {
        const auto there =
            static_cast<__mmask16>(cols - c < kWords ? (1U << (cols - c)) - 1U : 0xFFFFU);
        const __m512 added =
            bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, bias + c);
        for (std::size_t r = 0; r < rows; ++r) {
            __m512 values = _mm512_maskz_loadu_ps(there, src + r * ld_src + c);
            if (bias != nullptr) values = _mm512_add_ps(values, added);
            const __m512i words = _mm512_srli_epi32(rounded_to_bf16(values), 16);
            _mm256_mask_storeu_epi16(dst + r * ld_dst + c, there, _mm512_cvtepi32_epi16(words));
        }
    }
}

// Asks for the rows that come next, those of another tile as a rule: a tile reads so little of each
// that no prefetcher of the hardware follows (EPYC, 8192 rows by 384 x 384: 3.6 ms instead of 4.1).
inline bool pack_pairs(const std::uint16_t* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                       std::uint16_t* to, std::size_t ld_to) noexcept {
    constexpr std::size_t kRows = 16;
    constexpr std::size_t kCols = 32;
    constexpr std::size_t kRowsAhead = 32;
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i least = _mm512_set1_epi16(-1);  // of the magnitudes less one: zero is the largest
    for (std::size_t r0 = 0; r0 < rows; r0 += kRows) {
        const std::size_t n_rows = rows - r0 < kRows ? rows - r0 : kRows;
        const auto there = static_cast<__mmask16>((1U << n_rows) - 1U);
        for (std::size_t c0 = 0; c0 < cols; c0 += kCols) {
            const std::size_t n_cols = cols - c0 < kCols ? cols - c0 : kCols;
            const auto some = static_cast<__mmask32>((std::uint64_t{1} << n_cols) - 1U);
            __m512i words[kRows];
            for (std::size_t r = 0; r < kRows; ++r) {
                words[r] = r < n_rows ? _mm512_maskz_loadu_epi16(some, x + (r0 + r) * ldx + c0)
                                      : _mm512_setzero_si512();
                __builtin_prefetch(x + (r0 + r + kRowsAhead) * ldx + c0, 0, 2);
                const __m512i size = _mm512_and_si512(words[r], magnitude);
                least = _mm512_min_epu16(least, _mm512_sub_epi16(size, one));
            }
            transpose_words(words);
            for (std::size_t i = 0; i < (n_cols + 1) / 2; ++i) {
                _mm512_mask_storeu_epi32(to + (c0 / 2 + i) * ld_to + 2 * r0, there, words[i]);
            }
        }
    }
    constexpr int kLeastNormal = 1 << 7;
    return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(kLeastNormal - 1)) != 0;
}

// Elements at a distance, by lane; those that are not there are not read. Stride is the distance,
// if it is 1 or 2, else 0.
template <std::size_t Stride>
__m512i lanes_of(const std::uint16_t* from, std::size_t stride, __mmask32 there) noexcept {
    if constexpr (Stride == 1) {
        return _mm512_maskz_loadu_epi16(there, from);
    } else if constexpr (Stride == 2) {
        alignas(64) static constexpr std::uint16_t kEven[32] = {
            0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
            32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
        const std::uint64_t apart = _pdep_u64(there, 0x5555555555555555U);
        return _mm512_permutex2var_epi16(
            _mm512_maskz_loadu_epi16(static_cast<__mmask32>(apart), from), _mm512_load_si512(kEven),
            _mm512_maskz_loadu_epi16(static_cast<__mmask32>(apart >> 32), from + 32));
    } else {
        alignas(64) std::uint16_t lanes[32] = {};
        for (std::size_t i = 0; i < 32; ++i) {
            if ((there >> i & 1U) != 0) lanes[i] = from[i * stride];
        }
        return _mm512_load_si512(lanes);
    }
}

template <std::size_t Stride>
void copy_pairs_at(const std::uint16_t* from, std::size_t stride, std::size_t ld, std::size_t times,
                   const PairRun* runs, std::size_t n, std::uint16_t* to,
                   std::size_t ld_to) noexcept {
    alignas(64) static constexpr std::uint16_t kBeside[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    constexpr std::size_t kAhead = 4;
    const __m512i lower = _mm512_load_si512(kBeside);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (std::size_t k = 0; k < times; ++k, from += ld, to += ld_to) {
        for (const PairRun* run = runs; run < runs + n; ++run) {
            const __m512i first = lanes_of<Stride>(from + run->first, stride, run->has_first);
            const __m512i second = lanes_of<Stride>(from + run->second, stride, run->has_second);
            std::uint16_t* const pairs = to + run->to;
            if constexpr (Stride == 1) {  // a plane after another: no prefetcher follows
                __builtin_prefetch(from + kAhead * ld + run->first, 0, 3);
                __builtin_prefetch(from + kAhead * ld + run->second, 0, 3);
            }
            _mm512_mask_storeu_epi32(pairs, static_cast<__mmask16>(run->lanes),
                                     _mm512_permutex2var_epi16(first, lower, second));
            if (run->lanes >> 16 == 0) continue;
            _mm512_mask_storeu_epi32(pairs + 32, static_cast<__mmask16>(run->lanes >> 16),
                                     _mm512_permutex2var_epi16(first, upper, second));
        }
    }
}

inline void copy_pairs(const std::uint16_t* from, std::size_t stride, std::size_t ld,
                       std::size_t times, const PairRun* runs, std::size_t n, std::uint16_t* to,
                       std::size_t ld_to) noexcept {
    const auto copy = stride == 1   ? copy_pairs_at<1>
                      : stride == 2 ? copy_pairs_at<2>
                                    : copy_pairs_at<0>;
    copy(from, stride, ld, times, runs, n, to, ld_to);
}
