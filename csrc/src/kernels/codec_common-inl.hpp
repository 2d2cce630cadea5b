// SPDX-License-Identifier: Apache-2.0
// Planes and Huffman decoding in plain C++: the reference, and the tails of the vector kernels.
// Included INSIDE the namespace of each instruction set (no guard on purpose), so that every copy
// has internal linkage.

template <class Word>
inline Word rotate_left_1(Word value) noexcept {
    return static_cast<Word>((value << 1) | (value >> (8 * sizeof(Word) - 1)));
}

template <class Word>
inline Word rotate_right_1(Word value) noexcept {
    return static_cast<Word>((value >> 1) | (value << (8 * sizeof(Word) - 1)));
}

// One row at a time, in plain C++. Words are little-endian in memory (csrc/src/base/endian.hpp
// asserts that the machine is).
struct ScalarRows {
    template <class Word>
    static void split(const std::uint8_t* elements, std::size_t cols, std::size_t plane_bytes,
                      bool rotate, std::uint8_t* planes) noexcept {
        for (std::size_t i = 0; i < cols; ++i) {
            Word word;
            __builtin_memcpy(&word, elements + i * sizeof(Word), sizeof(Word));
            if (rotate) word = rotate_left_1(word);
            for (std::size_t p = 0; p < sizeof(Word); ++p) {
                planes[p * plane_bytes + i] = static_cast<std::uint8_t>(word >> (8 * p));
            }
        }
    }

    template <class Word>
    static void merge(const std::uint8_t* const* planes, std::size_t at, std::size_t cols,
                      bool rotate, std::uint8_t* elements) noexcept {
        for (std::size_t i = 0; i < cols; ++i) {
            Word word = 0;
            for (std::size_t p = 0; p < sizeof(Word); ++p) {
                word = static_cast<Word>(word | (static_cast<Word>(planes[p][at + i]) << (8 * p)));
            }
            if (rotate) word = rotate_right_1(word);
            __builtin_memcpy(elements + i * sizeof(Word), &word, sizeof(Word));
        }
    }
};

template <class Rows, class Word>
void split_matrix(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                  std::size_t cols, bool rotate, std::uint8_t* planes) noexcept {
    const std::size_t count = rows * cols;
    if (stride == cols * sizeof(Word)) {  // one long row has one tail
        Rows::template split<Word>(elements, count, count, rotate, planes);
        return;
    }
    for (std::size_t r = 0; r < rows; ++r) {
        Rows::template split<Word>(elements + r * stride, cols, count, rotate, planes + r * cols);
    }
}

template <class Rows, class Word>
void merge_matrix(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                  bool rotate, std::uint8_t* elements, std::size_t stride) noexcept {
    if (stride == cols * sizeof(Word)) {
        Rows::template merge<Word>(planes, 0, rows * cols, rotate, elements);
        return;
    }
    for (std::size_t r = 0; r < rows; ++r) {
        Rows::template merge<Word>(planes, r * cols, cols, rotate, elements + r * stride);
    }
}

template <class Rows>
void split_planes(const std::uint8_t* from, std::size_t stride, std::size_t rows, std::size_t cols,
                  std::size_t item_bytes, bool rotate, std::uint8_t* planes) noexcept {
    switch (item_bytes) {
        case 8:
            return split_matrix<Rows, std::uint64_t>(from, stride, rows, cols, rotate, planes);
        case 4:
            return split_matrix<Rows, std::uint32_t>(from, stride, rows, cols, rotate, planes);
        case 2:
            return split_matrix<Rows, std::uint16_t>(from, stride, rows, cols, rotate, planes);
        default:
            return split_matrix<Rows, std::uint8_t>(from, stride, rows, cols, false, planes);
    }
}

template <class Rows>
void merge_planes(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                  std::size_t item_bytes, bool rotate, std::uint8_t* to,
                  std::size_t stride) noexcept {
    switch (item_bytes) {
        case 8:
            return merge_matrix<Rows, std::uint64_t>(planes, rows, cols, rotate, to, stride);
        case 4:
            return merge_matrix<Rows, std::uint32_t>(planes, rows, cols, rotate, to, stride);
        case 2:
            return merge_matrix<Rows, std::uint16_t>(planes, rows, cols, rotate, to, stride);
        default:
            return merge_matrix<Rows, std::uint8_t>(planes, rows, cols, false, to, stride);
    }
}

inline std::uint64_t load_be64(const std::uint8_t* from) noexcept {
    std::uint64_t value;
    __builtin_memcpy(&value, from, sizeof value);
    return __builtin_bswap64(value);
}

// Which table the code of element i is looked up in: always the same one, or that of its context.
struct OneTable {
    const std::uint16_t* table;
    [[nodiscard]] const std::uint16_t* of(std::size_t) const noexcept { return table; }
};

struct TableOfContext {
    const std::uint16_t* tables;
    const std::uint8_t* contexts;
    unsigned table_bits;
    [[nodiscard]] const std::uint16_t* of(std::size_t i) const noexcept {
        return tables + (static_cast<std::size_t>(contexts[i]) << table_bits);
    }
};

// Decodes elements i to `end` of one stream from bit `position` on, byte by byte: the end of a
// stream, where eight bytes at once may not be there. Returns the position behind the last code.
template <class Tables>
inline std::uint64_t decode_tail(const HuffmanStreams& in, const Tables& tables,
                                 const std::uint8_t* begin, std::uint64_t position, std::size_t i,
                                 std::size_t end, std::uint8_t* out) noexcept {
    const std::uint64_t available = static_cast<std::uint64_t>(in.end - begin);
    for (; i < end; ++i) {
        const std::uint64_t byte = position >> 3;
        std::uint32_t window = 0;  // 24 bits hold 7 skipped ones and the longest code
        for (std::uint64_t k = 0; k < 3; ++k) {
            window = window << 8 | (byte + k < available ? begin[byte + k] : 0U);
        }
        window = (window << (position & 7)) & 0xFFFFFFU;
        const std::uint16_t entry = tables.of(i)[window >> (24 - in.table_bits)];
        out[i] = static_cast<std::uint8_t>(entry >> 8);
        position += entry & 0xFFU;
    }
    return position;
}

// The state of one stream between refills: `bits` holds the next bits from the top down and, behind
// them, a single 1 as marker. Shifting codes out moves the marker up, so that the number of
// trailing zeros is the number of bits taken since `at`.
struct BitWindow {
    const std::uint8_t* at;
    std::uint64_t bits;
};

inline void refill(BitWindow& window) noexcept {
    const unsigned taken = static_cast<unsigned>(__builtin_ctzll(window.bits));
    window.at += taken >> 3;
    window.bits = (load_be64(window.at) | 1) << (taken & 7);
}

inline std::uint8_t take_symbol(BitWindow& window, const std::uint16_t* table,
                                unsigned shift) noexcept {
    const std::uint16_t entry = table[window.bits >> shift];
    window.bits <<= entry & 63U;
    return static_cast<std::uint8_t>(entry >> 8);
}

inline std::uint64_t position_of(const BitWindow& window, const std::uint8_t* begin) noexcept {
    return static_cast<std::uint64_t>(window.at - begin) * 8 +
           static_cast<std::uint64_t>(__builtin_ctzll(window.bits));
}

// How often a refill and a round of lookups can follow without reading past `end`: a round takes at
// most 7 bytes, and the refill before it reads 8 that begin at most 7 behind `at`.
inline std::size_t rounds_in(const std::uint8_t* at, const std::uint8_t* end) noexcept {
    const std::size_t left = static_cast<std::size_t>(end - at);
    return left < 15 ? 0 : (left - 15) / 7 + 1;
}

// After a refill at least 56 bits are valid: kRound codes of at most 56 / kRound bits.
template <unsigned kRound, class Tables>
inline void decode_rounds(const HuffmanStreams& in, const Tables& tables, std::size_t count,
                          std::uint8_t* out, std::uint64_t* consumed) noexcept {
    const std::size_t segment = (count + 3) / 4;
    const unsigned shift = 64 - in.table_bits;
    BitWindow a{in.begin[0], 1}, b{in.begin[1], 1}, c{in.begin[2], 1}, d{in.begin[3], 1};
    const BitWindow* const windows[4] = {&a, &b, &c, &d};
    // Streams 0 to 2 hold `segment` symbols (fewer only when count < 9), the last the rest.
    std::size_t done = 0;
    const std::size_t shortest = count > 3 * segment ? count - 3 * segment : 0;
    for (;;) {
        std::size_t rounds = (shortest - done) / kRound;
        for (const BitWindow* window : windows) {
            const std::size_t safe = rounds_in(window->at, in.end);
            if (safe < rounds) rounds = safe;
        }
        if (rounds == 0) break;
        for (; rounds != 0; --rounds) {
            refill(a);
            refill(b);
            refill(c);
            refill(d);
#pragma GCC unroll 8
            for (unsigned k = 0; k < kRound; ++k) {
                const auto take = [&](BitWindow& window, std::size_t i) noexcept {
                    out[i] = take_symbol(window, tables.of(i), shift);
                };
                take(a, done + k);
                take(b, done + k + segment);
                take(c, done + k + 2 * segment);
                take(d, done + k + 3 * segment);
            }
            done += kRound;
        }
    }
    for (std::size_t j = 0; j < 4; ++j) {
        const std::size_t first = j * segment < count ? j * segment : count;
        const std::size_t end = count - first < segment ? count : first + segment;
        const std::uint64_t position = position_of(*windows[j], in.begin[j]);
        consumed[j] = decode_tail(in, tables, in.begin[j], position, first + done, end, out);
    }
}

void huffman_decode(const HuffmanStreams& in, std::size_t count, std::uint8_t* out,
                    std::uint64_t* consumed) noexcept {
    const OneTable table{in.table};
    if (in.table_bits > 9) {
        decode_rounds<5>(in, table, count, out, consumed);
    } else if (in.table_bits > 8) {
        decode_rounds<6>(in, table, count, out, consumed);
    } else if (in.table_bits > 7) {
        decode_rounds<7>(in, table, count, out, consumed);
    } else {
        decode_rounds<8>(in, table, count, out, consumed);
    }
}
