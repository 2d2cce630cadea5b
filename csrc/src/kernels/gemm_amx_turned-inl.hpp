// SPDX-License-Identifier: Apache-2.0
// Rows of x, as they lie, by packed tiles of W (gemm/turned_product.cpp). The sums of a tile are
// rounded and stored while the next one is multiplied: right after their instruction has stored
// them, whoever reads them waits for it and for all products before it.

// A row of a tile, to y.
inline void put(__m512 first, __m512 second, std::uint16_t* to) noexcept {
    const __m512i upper_halves =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded_to_bf16(first), upper_halves,
                                                      rounded_to_bf16(second)));
}
inline void put(__m512 first, __m512 second, float* to) noexcept {
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + kSide, second);
}

// Sums of a tile on their way to y.
template <class Y>
struct TurnedSums {
    alignas(64) float sums[kTurnedRows * kTurnedRows];
    __m512 bias[2];
    bool has_bias;
    std::size_t left = 0;
    const float* from;
    Y* to;

    void begin(const float* of_columns, __mmask32 columns, std::size_t rows, Y* y) noexcept {
        has_bias = of_columns != nullptr;
        if (has_bias) {
            bias[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns), of_columns);
            bias[1] =
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns >> kSide), of_columns + kSide);
        }
        left = rows;
        from = sums;
        to = y;
    }

    // Sums to begin with: of rows and columns that are not there, whatever.
    void fetch(const Y* y, __mmask32 columns, std::size_t rows, std::size_t ld) noexcept {
        for (std::size_t r = 0; r < rows; ++r, y += ld) {
            const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns), y);
            const __m512 second =
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns >> kSide), y + kSide);
            _mm512_store_ps(sums + r * kTurnedRows, first);
            _mm512_store_ps(sums + r * kTurnedRows + kSide, second);
        }
        order_memory();
    }

    // The next row, with bias.
    void take(__m512& first, __m512& second) noexcept {
        first = _mm512_load_ps(from);
        second = _mm512_load_ps(from + kSide);
        if (has_bias) {
            first = _mm512_add_ps(first, bias[0]);
            second = _mm512_add_ps(second, bias[1]);
        }
        from += 2 * kSide;
        --left;
    }

    void store(std::size_t rows, std::size_t ld) noexcept {
        for (rows = rows < left ? rows : left; rows > 0; --rows, to += ld) {
            __m512 first, second;
            take(first, second);
            put(first, second, to);
        }
    }

    // All rows that are left, of these columns.
    void store_some(__mmask32 columns, std::size_t ld) noexcept {
        for (; left > 0; to += ld) {
            __m512 first, second;
            take(first, second);
            _mm512_mask_storeu_ps(to, static_cast<__mmask16>(columns), first);
            _mm512_mask_storeu_ps(to + kSide, static_cast<__mmask16>(columns >> kSide), second);
        }
    }
};

// The least magnitude, less one, of some columns of rows of x: zero is the largest.
inline __m512i least_magnitude(const Bits* x, std::size_t ldx, __mmask32 some,
                               __m512i least) noexcept {
    for (std::size_t r = 0; r < kTurnedRows; ++r) {
        const __m512i size = _mm512_and_si512(_mm512_maskz_loadu_epi16(some, x + r * ldx),
                                              _mm512_set1_epi16(0x7FFF));
        least = _mm512_min_epu16(least, _mm512_sub_epi16(size, _mm512_set1_epi16(1)));
    }
    return least;
}

template <class Y>
bool turned(const TurnedRows& rows, Y* y, std::size_t ld) noexcept {
    constexpr std::size_t kStride = 2 * kColumns * sizeof(Bits);
    const std::size_t tail = rows.cols % kColumns;
    const std::size_t whole = rows.cols - tail;
    const std::size_t steps = whole / kColumns + (tail == 0 ? 0 : 1);
    const std::size_t at_once = (kTurnedRows + steps - 1) / steps;
    const Bits* const x = rows.x;
    const Bits* const lower = x + kSide * rows.ldx;
    Padded last[2];
    if (tail != 0) {
        last[0].fill(x + whole, kSide, tail, rows.ldx);
        last[1].fill(lower + whole, kSide, tail, rows.ldx);
    }
    const std::size_t lines = rows.next == nullptr ? 0 : kTurnedRows * rows.ldx / kColumns;
    const std::size_t lines_at_once = (lines + rows.tiles * steps - 1) / (rows.tiles * steps);
    std::size_t asked = 0;
    __m512i least = _mm512_set1_epi16(-1);
    TurnedSums<Y> sums[2];
    for (std::size_t t = 0; t < rows.tiles; ++t) {
        TurnedSums<Y>& before = sums[(t + 1) % 2];
        const Bits* w = rows.w + t * rows.step;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::size_t c = 0; c < whole; c += kColumns, w += 2 * kRegister) {
            multiply<2, 2>(x + c, lower + c, rows.ldx * sizeof(Bits), w, w + kColumns, kStride);
            if (t == 0) least = least_magnitude(x + c, rows.ldx, ~__mmask32{0}, least);
            const std::size_t end = asked + lines_at_once < lines ? asked + lines_at_once : lines;
            for (; asked < end; ++asked) __builtin_prefetch(rows.next + asked * kColumns, 0, 2);
            before.store(at_once, ld);
        }
        if (tail != 0) {
            order_memory();
            multiply<2, 2>(last[0].elements, last[1].elements, kColumns * sizeof(Bits), w,
                           w + kColumns, kStride);
            const __mmask32 some = (__mmask32{1} << tail) - 1U;
            if (t == 0) least = least_magnitude(x + whole, rows.ldx, some, least);
            before.store(at_once, ld);
        }
        order_memory();
        store_sums<2, 2>(sums[t % 2].sums);
        order_memory();
        sums[t % 2].begin(rows.bias == nullptr ? nullptr : rows.bias + t * kTurnedRows,
                          ~__mmask32{0}, kTurnedRows, y + t * kTurnedRows);
    }
    sums[(rows.tiles + 1) % 2].store(kTurnedRows, ld);
    return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(0x7F)) != 0;
}
