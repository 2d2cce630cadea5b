// SPDX-License-Identifier: Apache-2.0
// Huffman decoding by two symbols a lookup. Included INSIDE the namespaces of the vector kernels
// (no guard on purpose).
//
// Looking up one symbol is a chain of shift, load, shift: about 7 cycles that four streams share.
// An entry here holds the second symbol too whenever both codes fit into the bits looked at, so the
// same chain gives almost two symbols as long as codes are short on average (an exponent plane of
// weights takes 2.7 bits a symbol). The symbols are those of the plain decoder: a pair is two of
// its lookups made in advance.

// bits of all its symbols | number of symbols << 8 | first symbol << 16 | second symbol << 24:
// the bits lowest, so that the entry is the shift count as it is.
using PairTable = std::uint32_t[std::size_t{1} << kMaxCodeBits];

inline void build_pair_table(const std::uint16_t* table, unsigned table_bits,
                             PairTable& pairs) noexcept {
    // After a first code of `used` bits, rest[j] is what the plain table says of bits j: every
    // (1 << used)th entry of it, so each level is the even entries of the one before.
    std::uint16_t rest[std::size_t{1} << kMaxCodeBits];
    std::uint32_t tail[std::size_t{1} << (kMaxCodeBits - 1)];
    const std::size_t size = std::size_t{1} << table_bits;
    __builtin_memcpy(rest, table, size * sizeof(*rest));
    std::size_t at = 0;
    // Codes lie in the plain table by length, so one walk visits them in runs of equal length.
    for (unsigned used = 1; used <= table_bits && at < size; ++used) {
        const std::size_t run = size >> used;
        // In place by vectors too: what a step reads lies ahead of all that was written.
#if !defined(__clang__)  // does not know it, and warns
#pragma GCC ivdep
#endif
        for (std::size_t j = 0; j < run; ++j) rest[j] = rest[2 * j];
        if ((table[at] & 0xFFU) != used) continue;
        const unsigned left = table_bits - used;
        for (std::size_t j = 0; j < run; ++j) {
            const std::uint32_t second = rest[j];
            const std::uint32_t bits = second & 0xFFU;
            const std::uint32_t both = (used + bits) | 2U << 8 | (second & 0xFF00U) << 16;
            tail[j] = bits <= left ? both : (used | 1U << 8);
        }
        for (; at < size && (table[at] & 0xFFU) == used; at += run) {
            const std::uint32_t first = (table[at] & 0xFF00U) << 8;
            for (std::size_t j = 0; j < run; ++j) pairs[at + j] = tail[j] | first;
        }
    }
}

struct PairStream {
    BitWindow window;
    std::uint8_t* out;
};

// Always stores two symbols: the caller leaves room, and the next store mends a single one.
inline void take_pair(PairStream& stream, const std::uint32_t* pairs, unsigned shift) noexcept {
    const std::uint32_t entry = pairs[stream.window.bits >> shift];
    const auto symbols = static_cast<std::uint16_t>(entry >> 16);
    __builtin_memcpy(stream.out, &symbols, 2);
    stream.out += entry >> 8 & 0xFFU;
    stream.window.bits <<= entry & 63U;
}

// How often a refill and 56 / table_bits lookups can follow it without reading past `end`
// or writing more than `room` bytes.
inline std::size_t safe_rounds(const std::uint8_t* at, const std::uint8_t* end, std::size_t room,
                               std::size_t round_symbols) noexcept {
    const std::size_t by_input = rounds_in(at, end);
    const std::size_t by_output = room / round_symbols;
    return by_input < by_output ? by_input : by_output;
}

void huffman_decode_pairs(const HuffmanStreams& in, std::size_t count, std::uint8_t* out,
                          std::uint64_t* consumed) noexcept {
    constexpr std::size_t kRound = 5;  // 5 * kMaxCodeBits <= 56
    PairTable pairs;
    build_pair_table(in.table, in.table_bits, pairs);
    const unsigned shift = 64 - in.table_bits;
    const std::size_t segment = (count + 3) / 4;
    const std::uint8_t* stop[4];  // where the output of each stream ends
    for (std::size_t j = 0; j < 4; ++j) {
        stop[j] = out + ((j + 1) * segment < count ? (j + 1) * segment : count);
    }
    PairStream a{{in.begin[0], 1}, out};
    PairStream b{{in.begin[1], 1}, out + segment};
    PairStream c{{in.begin[2], 1}, out + 2 * segment};
    PairStream d{{in.begin[3], 1}, out + 3 * segment};
    PairStream* const streams[4] = {&a, &b, &c, &d};
    for (;;) {
        std::size_t rounds = count;
        for (std::size_t j = 0; j < 4; ++j) {
            const PairStream& s = *streams[j];
            const std::size_t safe = safe_rounds(
                s.window.at, in.end, static_cast<std::size_t>(stop[j] - s.out), 2 * kRound);
            if (safe < rounds) rounds = safe;
        }
        if (rounds == 0) break;
        for (; rounds != 0; --rounds) {
            refill(a.window);
            refill(b.window);
            refill(c.window);
            refill(d.window);
#pragma GCC unroll 8
            for (std::size_t k = 0; k < kRound; ++k) {
                take_pair(a, pairs, shift);
                take_pair(b, pairs, shift);
                take_pair(c, pairs, shift);
                take_pair(d, pairs, shift);
            }
        }
    }
    // Streams whose symbols were longer are finished one by one.
    for (std::size_t j = 0; j < 4; ++j) {
        PairStream& s = *streams[j];
        std::size_t left = static_cast<std::size_t>(stop[j] - s.out);
        for (; safe_rounds(s.window.at, in.end, left, kRound) != 0; left -= kRound) {
            refill(s.window);
            for (std::size_t k = 0; k < kRound; ++k) {
                *s.out++ = take_symbol(s.window, in.table, shift);
            }
        }
        const std::uint64_t position = position_of(s.window, in.begin[j]);
        consumed[j] = decode_tail(in, OneTable{in.table}, in.begin[j], position, 0, left, s.out);
    }
}

// Building the pairs costs as much as decoding this many symbols; and longer codes make few pairs.
constexpr std::size_t kMinPairSymbols = 1024;
constexpr std::size_t kMaxPairBits = 5;  // a symbol, on average

void huffman_decode_fast(const HuffmanStreams& in, std::size_t count, std::uint8_t* out,
                         std::uint64_t* consumed) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(in.begin[3] - in.begin[0]);  // of 3 streams
    if (count >= kMinPairSymbols && bytes * 8 / (count / 4 * 3) < kMaxPairBits) {
        huffman_decode_pairs(in, count, out, consumed);
    } else {
        huffman_decode(in, count, out, consumed);
    }
}
