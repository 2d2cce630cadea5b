// SPDX-License-Identifier: Apache-2.0
// Rows of x by packed tiles of W, f32 numbers cut into bf16 numbers on both sides
// (gemm/turned_cut_product.cpp). While one strip of x is multiplied the next one is cut: the matrix
// unit leaves those of vectors idle. Included INSIDE the anonymous namespace of AMX, after products
// of cut numbers and of turned ones.

constexpr std::size_t kTurnedPart = kTurnedRows * kCutColumns;

// One row of kCutColumns columns.
inline bool cut_step(const RowsToCut& rows, std::size_t r, std::size_t step) noexcept {
    Bits* const to = rows.to + step * kTurnedCutStep + r * kCutColumns;
    if (r >= rows.rows) {
        for (std::size_t i = 0; i < 3; ++i) {
            _mm512_store_si512(to + i * kTurnedPart, _mm512_setzero_si512());
        }
        return true;
    }
    const std::size_t c = step * kCutColumns;
    const CutRow row(rows.x + r * rows.ldx + c, first_columns(rows.cols - c),
                     _mm512_setzero_si512());
    for (std::size_t i = 0; i < 3; ++i) _mm512_store_si512(to + i * kTurnedPart, row.parts[i]);
    return may_be_cut(row.most);
}

bool cut_strip(const RowsToCut& rows) noexcept {
    bool all = true;
    for (std::size_t step = 0; step * kCutColumns < rows.cols; ++step) {
        for (std::size_t r = 0; r < kTurnedRows; ++r) all = cut_step(rows, r, step) && all;
    }
    return all;
}

// The lines of what is multiplied next, into the first-level cache.
inline void ask_for(const Bits* step, std::size_t sixth) noexcept {
    constexpr std::size_t kLines = kTurnedCutStep / kColumns / 6;
    for (std::size_t i = 0; i < kLines; ++i) {
        __builtin_prefetch(step + (sixth * kLines + i) * kColumns, 0, 3);
    }
}

// In the order of multiply_cut.
inline void multiply_step(const Bits* x, const Bits* next_x, const Bits* w) noexcept {
    const auto load = [](const Bits* of_x) noexcept {
        _tile_loadd(4, of_x, kColumns * sizeof(Bits));
        _tile_loadd(5, of_x + kRegister, kColumns * sizeof(Bits));
    };
    const auto ask = [=](std::size_t sixth) noexcept {
        ask_for(w + kTurnedCutStep, sixth);
        ask_for(next_x, sixth);
    };
    load_x<2>(w + 2 * kTurnedPart);
    load(x);
    multiply_loaded<2, 2>();
    ask(0);
    load_x<2>(w + kTurnedPart);
    multiply_loaded<2, 2>();
    ask(1);
    load(x + kTurnedPart);
    multiply_loaded<2, 2>();
    ask(2);
    load_x<2>(w);
    multiply_loaded<2, 2>();
    ask(3);
    load(x + 2 * kTurnedPart);
    multiply_loaded<2, 2>();
    ask(4);
    load(x);
    multiply_loaded<2, 2>();
    ask(5);
}

bool turned_cut(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    const RowsToCut& next = given.next;
    const std::size_t steps = up_to(next.cols, kColumns) / kColumns;
    const std::size_t tiles = up_to(given.columns, kTurnedRows) / kTurnedRows;
    const std::size_t stored_at_once = (kTurnedRows + steps - 1) / steps;
    const std::size_t to_cut = next.rows == 0 ? 0 : kTurnedRows;
    const std::size_t cut_at_once = (kTurnedRows + tiles - 1) / tiles;
    bool all = true;
    TurnedSums<float> sums[2];
    const Bits* w = given.w;
    order_memory();
    for (std::size_t t = 0; t < tiles; ++t) {
        TurnedSums<float>& before = sums[(t + 1) % 2];
        const std::size_t cut_from = t * cut_at_once < to_cut ? t * cut_at_once : to_cut;
        const std::size_t cut_end =
            cut_from + cut_at_once < to_cut ? cut_from + cut_at_once : to_cut;
        const std::size_t column = t * kTurnedRows;
        const __mmask32 columns = first_columns(given.columns - column);
        TurnedSums<float>& here = sums[t % 2];
        if (!given.anew) here.fetch(y + column, columns, given.rows, ld);
        begin_sums<2, 2>(given.anew, here.sums);
        const Bits* x = given.x;
        for (std::size_t s = 0; s < steps; ++s, w += kTurnedCutStep) {
            const Bits* const next_x = s + 1 < steps ? x + kTurnedCutStep : given.x;
            multiply_step(x, next_x, w);
            x = next_x;
            for (std::size_t r = cut_from; r < cut_end; ++r) all = cut_step(next, r, s) && all;
            before.store(stored_at_once, ld);
        }
        order_memory();
        store_sums<2, 2>(here.sums);
        order_memory();
        here.begin(given.bias == nullptr ? nullptr : given.bias + column, columns, given.rows,
                   y + column);
    }
    TurnedSums<float>& last = sums[(tiles + 1) % 2];
    if (given.columns % kTurnedRows == 0) {
        last.store(kTurnedRows, ld);
    } else {
        last.store_some(first_columns(given.columns % kTurnedRows), ld);
    }
    return all;
}
