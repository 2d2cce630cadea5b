// SPDX-License-Identifier: Apache-2.0
// Symbols and raw bits of a delta, to streams and back; shares the bit reader of
// codec_common-inl.hpp. Included by delta_common-inl.hpp alone, inside the namespace of each
// instruction set (no guard on purpose).

inline void store_be64(std::uint8_t* to, std::uint64_t value) noexcept {
    value = __builtin_bswap64(value);
    __builtin_memcpy(to, &value, sizeof value);
}

inline std::uint64_t load_le64(const std::uint8_t* from) noexcept {
    std::uint64_t value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

std::uint8_t* delta_write_symbols(const std::uint8_t* symbols, const std::uint8_t* contexts,
                                  std::size_t count, DeltaCodes codes, std::uint8_t* to) noexcept {
    static_assert(5 * kMaxCodeBits + 7 <= 63);
    std::uint64_t bits = 0;  // the lowest `pending` ones are yet to be written
    unsigned pending = 0;
    const auto flush = [&] {
        store_be64(to, bits << (63 - pending) << 1);
        to += pending / 8;
        pending %= 8;
    };
    std::size_t i = 0;
    for (; i + 5 <= count; i += 5) {
#pragma GCC unroll 5
        for (std::size_t k = 0; k < 5; ++k) {
            const std::uint32_t code =
                codes[static_cast<std::size_t>(contexts[i + k]) << 8 | symbols[i + k]];
            bits = bits << (code & 63) | code >> 8;
            pending += code & 63;
        }
        flush();
    }
    for (; i < count; ++i) {
        const std::uint32_t code = codes[static_cast<std::size_t>(contexts[i]) << 8 | symbols[i]];
        bits = bits << (code & 63) | code >> 8;
        pending += code & 63;
        flush();
    }
    return to + (pending != 0 ? 1 : 0);
}

// Raw bits on their way to memory; stores run up to 8 bytes ahead.
struct RawSink {
    std::uint8_t* to;
    std::uint64_t bits = 0;
    unsigned pending = 0;  // below 8 between elements

    // `value` has `width` bits, 56 at most.
    void put(std::uint64_t value, unsigned width) noexcept {
        bits |= value << pending;
        __builtin_memcpy(to, &bits, sizeof bits);
        const unsigned held = pending + width;
        to += held / 8;
        bits >>= held & 0x38U;
        pending = held % 8;
    }
    // `width` is 62 at most.
    void put_long(std::uint64_t value, unsigned width) noexcept {
        if (pending + width < 64) {
            put(value, width);
            return;
        }
        bits |= value << pending;  // pending is not 0
        __builtin_memcpy(to, &bits, sizeof bits);
        to += 8;
        bits = value >> (64 - pending);
        pending = pending + width - 64;
    }
    [[nodiscard]] std::uint8_t* finish() const noexcept {
        if (pending == 0) return to;
        *to = static_cast<std::uint8_t>(bits);
        return to + 1;
    }
};

template <class Wide>
inline void put_raw(RawSink& sink, const Wide* z, const std::uint8_t* symbols, std::size_t count,
                    const std::uint8_t* widths) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const unsigned width = widths[symbols[i]];
        const std::uint64_t value =
            static_cast<std::uint64_t>(z[i]) & ((std::uint64_t{1} << width) - 1);
        if (sizeof(Wide) == 8) {
            sink.put_long(value, width);
        } else {
            sink.put(value, width);
        }
    }
}

std::uint8_t* delta_write_raw(const void* z, const std::uint8_t* symbols, std::size_t count,
                              bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept {
    RawSink sink{to};
    if (wide) {
        put_raw(sink, static_cast<const std::uint64_t*>(z), symbols, count, widths);
    } else {
        put_raw(sink, static_cast<const std::uint32_t*>(z), symbols, count, widths);
    }
    return sink.finish();
}

void delta_read_symbols(const HuffmanStreams& in, const std::uint8_t* contexts, std::size_t count,
                        std::uint8_t* symbols, std::uint64_t* consumed) noexcept {
    const TableOfContext tables{in.table, contexts, in.table_bits};
    if (in.table_bits > 9) {
        decode_rounds<5>(in, tables, count, symbols, consumed);
    } else if (in.table_bits > 8) {
        decode_rounds<6>(in, tables, count, symbols, consumed);
    } else {
        decode_rounds<7>(in, tables, count, symbols, consumed);
    }
}

// The lowest `width` < 64 bits.
inline std::uint64_t low_bits(std::uint64_t value, unsigned width) noexcept {
    return value & ((std::uint64_t{1} << (width & 63)) - 1);
}

// Raw bits up to 8 bytes before the end are read where they are, the last ones from a copy with
// zeros behind it.
template <std::uint64_t kPieceBits>
struct RawTail {
    // What is less than a piece and its window, and as much again, which a wrong piece might take.
    static constexpr std::uint64_t kLeastBits = kPieceBits + 72;
    std::uint8_t bytes[2 * kLeastBits / 8 + 16];
    std::uint64_t first;  // bit of the raw ones that this begins with

    RawTail(const std::uint8_t* raw, std::uint64_t n_bytes, std::uint64_t position) noexcept
        : bytes{}, first(position & ~std::uint64_t{7}) {
        std::uint64_t left = n_bytes - position / 8;
        if (left == 0) return;  // `raw` may be null
        if (left > kLeastBits / 8 + 1) left = kLeastBits / 8 + 1;
        __builtin_memcpy(bytes, raw + position / 8, static_cast<std::size_t>(left));
    }
};

template <class Wide>
inline Wide read_element(const std::uint8_t* raw, std::uint64_t position, std::uint64_t base,
                         unsigned width) noexcept {
    const std::uint8_t* const at = raw + (position >> 3);
    const auto skip = static_cast<unsigned>(position & 7);
    std::uint64_t bits = load_le64(at) >> skip;
    if (sizeof(Wide) == 8) bits |= (static_cast<std::uint64_t>(at[8]) << 1) << (63 - skip);
    return static_cast<Wide>(base + low_bits(bits, width));
}

// Elements from number `i` on, whose bits begin at `position`.
template <class Wide>
inline std::uint64_t read_raw_rest(const std::uint8_t* raw, std::size_t bytes,
                                   const std::uint8_t* symbols, std::size_t i, std::size_t count,
                                   const std::uint64_t* bases, const std::uint8_t* widths,
                                   std::uint64_t position, Wide* z) noexcept {
    constexpr std::size_t kPiece = 16;
    using Tail = RawTail<kPiece * (8 * sizeof(Wide) - 2)>;
    const std::uint64_t total = 8 * static_cast<std::uint64_t>(bytes);
    if (sizeof(Wide) == 4 && count - i >= 256) {
        // Width and base in one entry: one load less for each element.
        std::uint64_t entries[256];
        for (std::size_t s = 0; s < 256; ++s) entries[s] = bases[s] << 32 | widths[s];
        for (; count - i >= kPiece && total - position >= Tail::kLeastBits; i += kPiece) {
#pragma GCC unroll 16
            for (std::size_t k = 0; k < kPiece; ++k) {
                const std::uint64_t entry = entries[symbols[i + k]];
                const auto width = static_cast<unsigned>(entry & 63);
                z[i + k] = read_element<Wide>(raw, position, entry >> 32, width);
                position += width;
            }
        }
    }
    const auto read_piece = [&](const std::uint8_t* from, std::uint64_t at, std::size_t n) {
        for (std::size_t k = 0; k < n; ++k) {
            const unsigned width = widths[symbols[i + k]];
            z[i + k] = read_element<Wide>(from, at, bases[symbols[i + k]], width);
            at += width;
        }
        i += n;
        return at;
    };
    while (count - i >= kPiece && total - position >= Tail::kLeastBits) {
        position = read_piece(raw, position, kPiece);
    }
    const Tail tail(raw, bytes, position);
    while (i < count) {
        const std::size_t n = count - i < kPiece ? count - i : kPiece;
        position = tail.first + read_piece(tail.bytes, position - tail.first, n);
        if (position > total) return UINT64_MAX;
    }
    return position;
}

std::uint64_t delta_read_raw(const std::uint8_t* raw, std::size_t bytes,
                             const std::uint8_t* symbols, std::size_t count, bool wide,
                             const std::uint64_t* bases, const std::uint8_t* widths,
                             void* z) noexcept {
    if (wide) {
        return read_raw_rest(raw, bytes, symbols, 0, count, bases, widths, 0,
                             static_cast<std::uint64_t*>(z));
    }
    return read_raw_rest(raw, bytes, symbols, 0, count, bases, widths, 0,
                         static_cast<std::uint32_t*>(z));
}
