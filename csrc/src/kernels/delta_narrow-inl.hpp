// SPDX-License-Identifier: Apache-2.0
// Raw bits of small differences, eight elements by one PDEP or PEXT (BMI2). Included INSIDE the
// namespaces of avx2 and avx512 (no guard on purpose), behind delta_common-inl.hpp.
//
// Elements whose symbols have 8 raw bits at most lie in the bytes of a word, whose mask has the
// lowest bits of each byte that are raw. Masks, and what is added to them, come out of tables of 64
// symbols by byte shuffles, 32 elements at a time. All others are read and written one by one, as
// every element of a wide type, or of an alphabet of more symbols.

/// What 64 symbols mean, for `lookup`.
struct NarrowTable {
    __m256i part[4];

    explicit NarrowTable(const std::uint8_t* entries) noexcept {
        for (std::size_t i = 0; i < 4; ++i) {
            part[i] = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * i)));
        }
    }
    [[nodiscard]] __m256i lookup(__m256i symbols) const noexcept {
        const __m256i bit4 = _mm256_slli_epi16(symbols, 3);  // to where blends look at
        const __m256i bit5 = _mm256_slli_epi16(symbols, 2);
        const __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[0], symbols),
                                               _mm256_shuffle_epi8(part[1], symbols), bit4);
        const __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[2], symbols),
                                                _mm256_shuffle_epi8(part[3], symbols), bit4);
        return _mm256_blendv_epi8(low, high, bit5);
    }
};

constexpr std::size_t kNarrowSymbols = 64;
constexpr std::size_t kNarrowPiece = 32;
constexpr unsigned kNarrowWidth = 8;
// Bits of a word that are there, and have room, wherever within a byte it begins.
constexpr unsigned kWordBits = 56;

// How many of the first symbols have at most kNarrowWidth raw bits. (Widths never fall from one to
// the next.)
inline unsigned narrow_symbols(const std::uint8_t* widths) noexcept {
    unsigned n = 0;
    while (n < kNarrowSymbols && widths[n] <= kNarrowWidth) ++n;
    return n;
}

// And of these, how many of the first have values of 16 bits.
inline unsigned narrow_symbols(const std::uint64_t* bases, const std::uint8_t* widths) noexcept {
    const unsigned most = narrow_symbols(widths);
    unsigned n = 0;
    while (n < most && bases[n] <= 0xFF00) ++n;
    return n;
}

// Whether that is worth beginning, by some of the elements.
inline bool is_mostly_narrow(const std::uint8_t* symbols, std::size_t count,
                             unsigned narrow) noexcept {
    constexpr std::size_t kSample = 64;
    if (count < 4 * kSample) return false;
    std::size_t n = 0;
    for (std::size_t i = 0; i < kSample; ++i) n += symbols[i * (count / kSample)] < narrow;
    return n >= kSample * 7 / 8;
}

inline NarrowTable mask_table(const std::uint8_t* widths) noexcept {
    std::uint8_t masks[kNarrowSymbols];
    for (std::size_t s = 0; s < kNarrowSymbols; ++s) {
        masks[s] = static_cast<std::uint8_t>((1U << (widths[s] & 31U)) - 1);
    }
    return NarrowTable(masks);
}

// Bit i: symbol i is none of the first `narrow` ones.
inline std::uint32_t others(__m256i symbols, __m256i narrow) noexcept {
    return static_cast<std::uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(symbols, narrow), symbols)));
}

// Between registers: what was just stored in parts is not soon loaded as a whole.
struct Words4 {
    std::uint64_t of[4];
};

inline Words4 to_words(__m256i v) noexcept {
    const __m128i low = _mm256_castsi256_si128(v);
    const __m128i high = _mm256_extracti128_si256(v, 1);
    const auto word = [](long long value) { return static_cast<std::uint64_t>(value); };
    return {{word(_mm_cvtsi128_si64(low)), word(_mm_extract_epi64(low, 1)),
             word(_mm_cvtsi128_si64(high)), word(_mm_extract_epi64(high, 1))}};
}

inline __m256i from_words(const Words4& words) noexcept {
    const auto number = [&](std::size_t k) { return static_cast<long long>(words.of[k]); };
    return _mm256_setr_epi64x(number(0), number(1), number(2), number(3));
}

inline __m256i load_symbols(const std::uint8_t* from) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Stores base + bits as 32-bit numbers.
inline void store_narrow(__m256i low_bases, __m256i high_bases, __m256i bits,
                         std::uint32_t* z) noexcept {
    const __m256i zero = _mm256_setzero_si256();
    // Within each half: elements 0 to 7 and 8 to 15.
    const __m256i first = _mm256_add_epi16(_mm256_unpacklo_epi8(low_bases, high_bases),
                                           _mm256_unpacklo_epi8(bits, zero));
    const __m256i second = _mm256_add_epi16(_mm256_unpackhi_epi8(low_bases, high_bases),
                                            _mm256_unpackhi_epi8(bits, zero));
    const auto store = [z](std::size_t at, __m128i values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(z + at), _mm256_cvtepu16_epi32(values));
    };
    store(0, _mm256_castsi256_si128(first));
    store(8, _mm256_castsi256_si128(second));
    store(16, _mm256_extracti128_si256(first, 1));
    store(24, _mm256_extracti128_si256(second, 1));
}

// Reads 32 elements at a time.
struct NarrowReader {
    using Tail = RawTail<32 * kNarrowPiece>;

    const std::uint64_t* bases;
    const std::uint8_t* widths;
    NarrowTable masks;
    NarrowTable low_bases;
    NarrowTable high_bases;
    __m256i narrow;

    static NarrowReader of(const std::uint64_t* bases, const std::uint8_t* widths) noexcept {
        std::uint8_t low[kNarrowSymbols];
        std::uint8_t high[kNarrowSymbols];
        for (std::size_t s = 0; s < kNarrowSymbols; ++s) {
            low[s] = static_cast<std::uint8_t>(bases[s]);
            high[s] = static_cast<std::uint8_t>(bases[s] >> 8);
        }
        const unsigned n = narrow_symbols(bases, widths);
        return {bases,
                widths,
                mask_table(widths),
                NarrowTable(low),
                NarrowTable(high),
                _mm256_set1_epi8(static_cast<char>(n))};
    }

    // Returns where their bits end.
    [[nodiscard]] std::uint64_t read(const std::uint8_t* raw, std::uint64_t position,
                                     const std::uint8_t* symbols, std::uint32_t* z) const noexcept {
        const __m256i some = load_symbols(symbols);
        const std::uint32_t wide = others(some, narrow);
        const Words4 mask = to_words(masks.lookup(some));
        Words4 word;
        Words4 begin;
        unsigned by_one = 0;  // of the four words, those that are read one by one
#pragma GCC unroll 4
        for (unsigned k = 0; k < 4; ++k) {
            begin.of[k] = position;
            const auto taken = static_cast<unsigned>(__builtin_popcountll(mask.of[k]));
            if ((wide >> (8 * k) & 0xFFU) == 0 && taken <= kWordBits) [[likely]] {
                const std::uint64_t bits = load_le64(raw + (position >> 3)) >> (position & 7);
                word.of[k] = _pdep_u64(bits, mask.of[k]);
                position += taken;
                continue;
            }
            by_one |= 1U << k;
            word.of[k] = 0;
            for (std::size_t e = 0; e < 8; ++e) position += widths[symbols[8 * k + e]];
        }
        store_narrow(low_bases.lookup(some), high_bases.lookup(some), from_words(word), z);
        for (; by_one != 0; by_one &= by_one - 1) {
            const auto k = static_cast<unsigned>(__builtin_ctz(by_one));
            std::uint64_t at = begin.of[k];
            for (std::size_t e = 8 * k; e < 8 * k + 8; ++e) {
                const unsigned width = widths[symbols[e]];
                z[e] = read_element<std::uint32_t>(raw, at, bases[symbols[e]], width);
                at += width;
            }
        }
        return position;
    }
};

inline std::uint64_t read_raw_narrow(const std::uint8_t* raw, std::size_t bytes,
                                     const std::uint8_t* symbols, std::size_t count,
                                     const std::uint64_t* bases, const std::uint8_t* widths,
                                     std::uint32_t* z) noexcept {
    using Tail = NarrowReader::Tail;
    const std::uint64_t total = 8 * static_cast<std::uint64_t>(bytes);
    const NarrowReader reader = NarrowReader::of(bases, widths);
    std::uint64_t position = 0;
    std::size_t i = 0;
    for (; count - i >= kNarrowPiece && total - position >= Tail::kLeastBits; i += kNarrowPiece) {
        position = reader.read(raw, position, symbols + i, z + i);
    }
    const Tail tail(raw, bytes, position);
    for (; count - i >= kNarrowPiece; i += kNarrowPiece) {
        position = tail.first + reader.read(tail.bytes, position - tail.first, symbols + i, z + i);
        if (position > total) return UINT64_MAX;
    }
    return read_raw_rest(raw, bytes, symbols, i, count, bases, widths, position, z);
}

std::uint64_t delta_read_raw_narrow(const std::uint8_t* raw, std::size_t bytes,
                                    const std::uint8_t* symbols, std::size_t count, bool wide,
                                    const std::uint64_t* bases, const std::uint8_t* widths,
                                    void* z) noexcept {
    if (wide || !is_mostly_narrow(symbols, count, narrow_symbols(bases, widths))) {
        return delta_read_raw(raw, bytes, symbols, count, wide, bases, widths, z);
    }
    return read_raw_narrow(raw, bytes, symbols, count, bases, widths,
                           static_cast<std::uint32_t*>(z));
}

// The lowest bytes of 32 numbers.
inline __m256i low_bytes(const std::uint32_t* z) noexcept {
    const __m256i low = _mm256_set1_epi32(0xFF);
    const auto load = [&](std::size_t at) {
        return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(z + at)), low);
    };
    const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(load(0), load(8)),
                                              _mm256_packus_epi32(load(16), load(24)));
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

std::uint8_t* delta_write_raw_narrow(const void* z, const std::uint8_t* symbols, std::size_t count,
                                     bool wide, const std::uint8_t* widths,
                                     std::uint8_t* to) noexcept {
    const unsigned n_narrow = narrow_symbols(widths);
    if (wide || !is_mostly_narrow(symbols, count, n_narrow)) {
        return delta_write_raw(z, symbols, count, wide, widths, to);
    }
    const auto* const values = static_cast<const std::uint32_t*>(z);
    const NarrowTable masks = mask_table(widths);
    const __m256i narrow = _mm256_set1_epi8(static_cast<char>(n_narrow));
    RawSink sink{to};
    std::size_t i = 0;
    for (; count - i >= kNarrowPiece; i += kNarrowPiece) {
        const __m256i some = load_symbols(symbols + i);
        const std::uint32_t others_of = others(some, narrow);
        const Words4 mask = to_words(masks.lookup(some));
        const Words4 word = to_words(low_bytes(values + i));
#pragma GCC unroll 4
        for (unsigned k = 0; k < 4; ++k) {
            const auto n_bits = static_cast<unsigned>(__builtin_popcountll(mask.of[k]));
            if ((others_of >> (8 * k) & 0xFFU) == 0 && n_bits <= kWordBits) [[likely]] {
                sink.put(_pext_u64(word.of[k], mask.of[k]), n_bits);
            } else {
                put_raw(sink, values + i + 8 * k, symbols + i + 8 * k, 8, widths);
            }
        }
    }
    put_raw(sink, values + i, symbols + i, count - i, widths);
    return sink.finish();
}

constexpr DeltaKernels kDeltaNarrow = [] {
    DeltaKernels kernels = kDelta;
    kernels.write_raw = delta_write_raw_narrow;
    kernels.read_raw = delta_read_raw_narrow;
    return kernels;
}();
