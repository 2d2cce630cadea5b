// SPDX-License-Identifier: Apache-2.0
// Deltas in plain C++, written so that compilers make vectors of it where the instruction set
// allows. Included INSIDE the namespace of each instruction set (no guard on purpose), behind
// codec_common-inl.hpp, whose bit reader it shares.

// ---- integers
// ------------------------------------------------------------------------------------

template <class Word>
struct SignedOf;
template <>
struct SignedOf<std::uint8_t> {
    using type = std::int8_t;
};
template <>
struct SignedOf<std::uint16_t> {
    using type = std::int16_t;
};
template <>
struct SignedOf<std::uint32_t> {
    using type = std::int32_t;
};
template <>
struct SignedOf<std::uint64_t> {
    using type = std::int64_t;
};

// All ones where the top bit is set.
template <class Word>
inline Word sign_mask(Word word) noexcept {
    using Signed = typename SignedOf<Word>::type;
    return static_cast<Word>(static_cast<Signed>(word) >> (8 * sizeof(Word) - 1));
}

// Sign and magnitude to a two's complement number of the same order; its own inverse.
template <class Word>
inline Word ordered(Word word) noexcept {
    constexpr Word kMagnitude = static_cast<Word>(static_cast<Word>(~Word{0}) >> 1);
    return static_cast<Word>(word ^ (sign_mask(word) & kMagnitude));
}

template <class Word>
inline Word negate_where(Word value, Word mask) noexcept {
    return static_cast<Word>((value ^ mask) - mask);
}

template <class Word>
inline Word zigzag(Word value) noexcept {
    return static_cast<Word>(static_cast<Word>(value << 1) ^ sign_mask(value));
}

template <class Word>
inline Word unzigzag(Word value) noexcept {
    return static_cast<Word>((value >> 1) ^ static_cast<Word>(Word{0} - (value & 1)));
}

template <class Word>
inline Word load_word(const std::uint8_t* from, std::size_t i) noexcept {
    Word word;
    __builtin_memcpy(&word, from + i * sizeof(Word), sizeof(Word));
    return word;
}

template <class Word, class Wide, bool kOrdered>
inline void subtract_words(const std::uint8_t* __restrict y, const std::uint8_t* __restrict x,
                           std::size_t count, Wide* __restrict z) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const Word from = load_word<Word>(x, i);
        const Word to = load_word<Word>(y, i);
        if (kOrdered) {
            const Word d = static_cast<Word>(ordered(to) - ordered(from));
            z[i] = zigzag(negate_where(d, sign_mask(from)));
        } else {
            z[i] = zigzag(static_cast<Word>(to - from));
        }
    }
}

template <class Word, class Wide, bool kOrdered>
inline void add_words(const std::uint8_t* __restrict x, const Wide* __restrict z, std::size_t count,
                      unsigned shift, std::uint8_t* __restrict y) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const Word from = load_word<Word>(x, i);
        const Word d = static_cast<Word>(unzigzag(static_cast<Word>(z[i])) << shift);
        Word to;
        if (kOrdered) {
            to = ordered(static_cast<Word>(ordered(from) + negate_where(d, sign_mask(from))));
        } else {
            to = static_cast<Word>(from + d);
        }
        __builtin_memcpy(y + i * sizeof(Word), &to, sizeof(Word));
    }
}

template <class Word, class Wide>
inline void subtract_as(const std::uint8_t* y, const std::uint8_t* x, std::size_t count,
                        bool is_ordered, void* z) noexcept {
    if (is_ordered) {
        subtract_words<Word, Wide, true>(y, x, count, static_cast<Wide*>(z));
    } else {
        subtract_words<Word, Wide, false>(y, x, count, static_cast<Wide*>(z));
    }
}

template <class Word, class Wide>
inline void add_as(const std::uint8_t* x, const void* z, std::size_t count, bool is_ordered,
                   unsigned shift, std::uint8_t* y) noexcept {
    if (is_ordered) {
        add_words<Word, Wide, true>(x, static_cast<const Wide*>(z), count, shift, y);
    } else {
        add_words<Word, Wide, false>(x, static_cast<const Wide*>(z), count, shift, y);
    }
}

void delta_subtract(const std::uint8_t* y, const std::uint8_t* x, std::size_t count,
                    DeltaLayout layout, void* z) noexcept {
    switch (layout.item_bytes) {
        case 8:
            return subtract_as<std::uint64_t, std::uint64_t>(y, x, count, layout.ordered, z);
        case 4:
            return subtract_as<std::uint32_t, std::uint32_t>(y, x, count, layout.ordered, z);
        case 2:
            return subtract_as<std::uint16_t, std::uint32_t>(y, x, count, layout.ordered, z);
        default:
            return subtract_as<std::uint8_t, std::uint32_t>(y, x, count, layout.ordered, z);
    }
}

void delta_add(const std::uint8_t* x, const void* z, std::size_t count, DeltaLayout layout,
               unsigned shift, std::uint8_t* y) noexcept {
    switch (layout.item_bytes) {
        case 8:
            return add_as<std::uint64_t, std::uint64_t>(x, z, count, layout.ordered, shift, y);
        case 4:
            return add_as<std::uint32_t, std::uint32_t>(x, z, count, layout.ordered, shift, y);
        case 2:
            return add_as<std::uint16_t, std::uint32_t>(x, z, count, layout.ordered, shift, y);
        default:
            return add_as<std::uint8_t, std::uint32_t>(x, z, count, layout.ordered, shift, y);
    }
}

// The exponent of a float finds the leading bit. Below 2^24 the conversion is exact; above, the low
// 8 bits cannot reach the two bits that are asked for.
inline std::uint32_t class_of(std::uint32_t z) noexcept {
    const std::uint32_t big = z >> 24 != 0 ? ~0U : 0U;
    const std::uint32_t exact = (z & ~big) | (z >> 8 & big);
    const auto held = static_cast<float>(static_cast<std::int32_t>(exact));
    std::uint32_t bits;
    __builtin_memcpy(&bits, &held, sizeof bits);
    const std::uint32_t found = (bits >> 22) - 2 * 127 + (big & 16U);
    return z < 2 ? z : found;
}

inline std::uint32_t class_of(std::uint64_t z) noexcept {
    if (z < 2) return static_cast<std::uint32_t>(z);
    const auto top = 63U - static_cast<unsigned>(__builtin_clzll(z));
    return 2 * top + static_cast<std::uint32_t>(z >> (top - 1) & 1);
}

// Sixteen elements at once in the compiler's own vectors: pieces of them where the instruction set
// has shorter ones.
// (They are never passed or returned: how would depend on the instruction set.)
using Floats __attribute__((vector_size(64))) = float;
using Ints __attribute__((vector_size(64))) = std::int32_t;
using Words __attribute__((vector_size(64))) = std::uint32_t;
using Bytes16 __attribute__((vector_size(16))) = std::uint8_t;
using Doubles __attribute__((vector_size(64))) = double;
constexpr std::size_t kVector = 16;

template <class Vector, class Element>
inline void load_vector(Vector& vector, const Element* from) noexcept {
    __builtin_memcpy(&vector, from, sizeof vector);
}

// Handles whole vectors; returns how many elements that are.
inline std::size_t classify_vectors(const std::uint32_t* z, std::size_t count,
                                    std::uint8_t* classes, std::uint32_t& all) noexcept {
    Words seen{};
    std::size_t i = 0;
    for (; i + kVector <= count; i += kVector) {
        Words v;
        load_vector(v, z + i);
        const Words big = reinterpret_cast<Words>((v >> 24) != 0U);
        const Words exact = (v & ~big) | (v >> 8 & big);
        const Floats held = __builtin_convertvector(reinterpret_cast<Ints>(exact), Floats);
        const auto bits = reinterpret_cast<Words>(held);  // the same bits: casts do not convert
        const Words found = (bits >> 22) - 2U * 127U + (big & 16U);
        const Words tiny = reinterpret_cast<Words>(v < 2U);
        const Words result = (v & tiny) | (found & ~tiny);
        const Bytes16 bytes = __builtin_convertvector(result, Bytes16);
        __builtin_memcpy(classes + i, &bytes, sizeof bytes);
        seen |= (v >> 1) ^ (0U - (v & 1U));
    }
    for (std::size_t k = 0; k < kVector; ++k) all |= seen[k];
    return i;
}

inline std::size_t classify_vectors(const std::uint64_t*, std::size_t, std::uint8_t*,
                                    std::uint64_t&) noexcept {
    return 0;
}

template <class Wide>
inline std::uint64_t classify_as(const Wide* z, std::size_t count, std::uint8_t* classes) noexcept {
    Wide all = 0;
    std::size_t i = classify_vectors(z, count, classes, all);
    for (; i < count; ++i) {
        classes[i] = static_cast<std::uint8_t>(class_of(z[i]));
        all |= unzigzag(z[i]);
    }
    return all;
}

std::uint64_t delta_classify(const void* z, std::size_t count, bool wide,
                             std::uint8_t* classes) noexcept {
    if (wide) return classify_as(static_cast<const std::uint64_t*>(z), count, classes);
    return classify_as(static_cast<const std::uint32_t*>(z), count, classes);
}

// ---- what the base says about a difference
// -------------------------------------------------------

template <class Word>
inline void exponents_of(const std::uint8_t* __restrict x, std::size_t count, unsigned mantissa,
                         std::uint32_t mask, std::uint32_t reference,
                         std::uint8_t* __restrict features) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const auto exponent = static_cast<std::uint32_t>(load_word<Word>(x, i) >> mantissa) & mask;
        const std::uint32_t below = reference < exponent ? 0 : reference - exponent;
        features[i] = static_cast<std::uint8_t>(below < 255 ? below : 255);
    }
}

void delta_exponents(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint32_t reference, std::uint8_t* features) noexcept {
    const std::uint32_t mask = (1U << layout.exponent_bits) - 1;
    switch (layout.item_bytes) {
        case 8:
            return exponents_of<std::uint64_t>(x, count, layout.mantissa_bits, mask, reference,
                                               features);
        case 4:
            return exponents_of<std::uint32_t>(x, count, layout.mantissa_bits, mask, reference,
                                               features);
        default:
            return exponents_of<std::uint16_t>(x, count, layout.mantissa_bits, mask, reference,
                                               features);
    }
}

template <class Word>
inline void mantissas_of(const std::uint8_t* __restrict x, std::size_t count, unsigned shift,
                         std::uint8_t mask, std::uint8_t* __restrict features) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        features[i] = static_cast<std::uint8_t>(load_word<Word>(x, i) >> shift) & mask;
    }
}

void delta_mantissas(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint8_t* features) noexcept {
    const unsigned shift = layout.mantissa_bits > 8 ? layout.mantissa_bits - 8U : 0U;
    const auto mask = static_cast<std::uint8_t>(
        layout.mantissa_bits > 7 ? 0xFF : (1 << layout.mantissa_bits) - 1);
    switch (layout.item_bytes) {
        case 8:
            return mantissas_of<std::uint64_t>(x, count, shift, mask, features);
        case 4:
            return mantissas_of<std::uint32_t>(x, count, shift, mask, features);
        default:
            return mantissas_of<std::uint16_t>(x, count, shift, mask, features);
    }
}

void delta_map_features(const std::uint8_t* features, std::size_t count, const std::uint8_t* first,
                        unsigned n, std::uint8_t base, std::uint8_t* contexts) noexcept {
    constexpr std::size_t kPiece = 64;
    std::size_t i = 0;
    for (; i + kPiece <= count; i += kPiece) {
        std::uint8_t reached[kPiece];
        for (std::size_t k = 0; k < kPiece; ++k) reached[k] = base;
        for (unsigned c = 1; c < n; ++c) {
            const std::uint8_t from = first[c];
            for (std::size_t k = 0; k < kPiece; ++k) {
                reached[k] = static_cast<std::uint8_t>(reached[k] + (features[i + k] >= from));
            }
        }
        __builtin_memcpy(contexts + i, reached, kPiece);
    }
    for (; i < count; ++i) {
        std::uint8_t reached = base;
        for (unsigned c = 1; c < n; ++c) {
            reached = static_cast<std::uint8_t>(reached + (features[i] >= first[c]));
        }
        contexts[i] = reached;
    }
}

// ---- bits
// ----------------------------------------------------------------------------------------

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

template <class Wide>
inline std::uint8_t* write_raw_as(const Wide* z, const std::uint8_t* symbols, std::size_t count,
                                  const std::uint8_t* widths, std::uint8_t* to) noexcept {
    std::uint64_t bits = 0;
    unsigned pending = 0;  // below 8 between elements
    for (std::size_t i = 0; i < count; ++i) {
        const unsigned width = widths[symbols[i]];
        const std::uint64_t value =
            static_cast<std::uint64_t>(z[i]) & ((std::uint64_t{1} << width) - 1);
        bits |= value << pending;
        __builtin_memcpy(to, &bits, sizeof bits);
        const unsigned held = pending + width;
        if (sizeof(Wide) == 8 && held >= 64) {  // width is 62 at most, so pending is not 0
            to += 8;
            bits = value >> (64 - pending);
            pending = held - 64;
            continue;
        }
        to += held / 8;
        if (sizeof(Wide) == 8) {
            bits >>= 8 * (held / 8);  // held is below 64
        } else {
            bits >>= held & 0x38U;  // at most 7 + 30 bits are held
        }
        pending = held % 8;
    }
    if (pending == 0) return to;
    *to = static_cast<std::uint8_t>(bits);
    return to + 1;
}

std::uint8_t* delta_write_raw(const void* z, const std::uint8_t* symbols, std::size_t count,
                              bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept {
    if (wide) {
        return write_raw_as(static_cast<const std::uint64_t*>(z), symbols, count, widths, to);
    }
    return write_raw_as(static_cast<const std::uint32_t*>(z), symbols, count, widths, to);
}

inline std::uint8_t take_in_context(BitWindow& window, const std::uint16_t* table,
                                    std::uint8_t context, unsigned table_bits,
                                    unsigned shift) noexcept {
    const std::uint16_t entry =
        table[(static_cast<std::size_t>(context) << table_bits) + (window.bits >> shift)];
    window.bits <<= entry & 63U;
    return static_cast<std::uint8_t>(entry >> 8);
}

inline std::uint64_t read_tail(const HuffmanStreams& in, const std::uint8_t* begin,
                               std::uint64_t position, const std::uint8_t* contexts,
                               std::size_t count, std::uint8_t* out) noexcept {
    const std::uint64_t available = static_cast<std::uint64_t>(in.end - begin);
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t byte = position >> 3;
        std::uint32_t window = 0;  // 24 bits hold 7 skipped ones and the longest code
        for (std::uint64_t k = 0; k < 3; ++k) {
            window = window << 8 | (byte + k < available ? begin[byte + k] : 0U);
        }
        window = (window << (position & 7)) & 0xFFFFFFU;
        const std::uint16_t entry =
            in.table[(static_cast<std::size_t>(contexts[i]) << in.table_bits) +
                     (window >> (24 - in.table_bits))];
        out[i] = static_cast<std::uint8_t>(entry >> 8);
        position += entry & 0xFFU;
    }
    return position;
}

// As decode_rounds, but that codes differ from element to element.
template <unsigned kRound>
inline void read_rounds(const HuffmanStreams& in, const std::uint8_t* contexts, std::size_t count,
                        std::uint8_t* out, std::uint64_t* consumed) noexcept {
    const std::size_t segment = (count + 3) / 4;
    const unsigned table_bits = in.table_bits;
    const unsigned shift = 64 - table_bits;
    const std::uint16_t* const table = in.table;
    BitWindow a{in.begin[0], 1}, b{in.begin[1], 1}, c{in.begin[2], 1}, d{in.begin[3], 1};
    const BitWindow* const windows[4] = {&a, &b, &c, &d};
    std::size_t done = 0;
    const std::size_t shortest = count > 3 * segment ? count - 3 * segment : 0;
    for (;;) {
        std::size_t rounds = (shortest - done) / kRound;
        for (const BitWindow* window : windows) {
            const std::uint64_t left = static_cast<std::uint64_t>(in.end - window->at);
            const std::uint64_t safe = left < 15 ? 0 : (left - 15) / 7 + 1;
            if (safe < rounds) rounds = static_cast<std::size_t>(safe);
        }
        if (rounds == 0) break;
        for (; rounds != 0; --rounds) {
            refill(a);
            refill(b);
            refill(c);
            refill(d);
            std::uint8_t* const to = out + done;
            const std::uint8_t* const at = contexts + done;
#pragma GCC unroll 8
            for (unsigned k = 0; k < kRound; ++k) {
                to[k] = take_in_context(a, table, at[k], table_bits, shift);
                to[k + segment] = take_in_context(b, table, at[k + segment], table_bits, shift);
                to[k + 2 * segment] =
                    take_in_context(c, table, at[k + 2 * segment], table_bits, shift);
                to[k + 3 * segment] =
                    take_in_context(d, table, at[k + 3 * segment], table_bits, shift);
            }
            done += kRound;
        }
    }
    for (std::size_t j = 0; j < 4; ++j) {
        const std::size_t first = j * segment < count ? j * segment : count;
        const std::size_t symbols = count - first < segment ? count - first : segment;
        const std::uint64_t position = position_of(*windows[j], in.begin[j]);
        consumed[j] = read_tail(in, in.begin[j], position, contexts + first + done, symbols - done,
                                out + first + done);
    }
}

void delta_read_symbols(const HuffmanStreams& in, const std::uint8_t* contexts, std::size_t count,
                        std::uint8_t* symbols, std::uint64_t* consumed) noexcept {
    if (in.table_bits > 9) {
        read_rounds<5>(in, contexts, count, symbols, consumed);
    } else if (in.table_bits > 8) {
        read_rounds<6>(in, contexts, count, symbols, consumed);
    } else {
        read_rounds<7>(in, contexts, count, symbols, consumed);
    }
}

// The lowest `width` < 64 bits.
inline std::uint64_t low_bits(std::uint64_t value, unsigned width) noexcept {
    return value & ((std::uint64_t{1} << (width & 63)) - 1);
}

template <class Wide>
inline std::uint64_t read_raw_as(const std::uint8_t* raw, std::size_t bytes,
                                 const std::uint8_t* symbols, std::size_t count,
                                 const std::uint64_t* bases, const std::uint8_t* widths,
                                 Wide* z) noexcept {
    constexpr std::size_t kPiece = 16;
    constexpr std::uint64_t kMostBits = kPiece * (8 * sizeof(Wide) - 2) + 72;
    const std::uint64_t total = 8 * static_cast<std::uint64_t>(bytes);
    std::uint64_t position = 0;
    std::size_t i = 0;
    if (sizeof(Wide) == 4 && count >= 256) {
        // Width and base in one entry: one load less for each element.
        std::uint64_t entries[256];
        for (std::size_t s = 0; s < 256; ++s) entries[s] = bases[s] << 32 | widths[s];
        for (; count - i >= kPiece && total - position >= kMostBits; i += kPiece) {
#pragma GCC unroll 16
            for (std::size_t k = 0; k < kPiece; ++k) {
                const std::uint64_t entry = entries[symbols[i + k]];
                const std::uint64_t bits = load_le64(raw + (position >> 3)) >> (position & 7);
                const auto width = static_cast<unsigned>(entry & 63);
                z[i + k] = static_cast<Wide>((entry >> 32) + low_bits(bits, width));
                position += width;
            }
        }
    }
    while (i < count) {
        if (count - i >= kPiece && total - position >= kMostBits) {
            for (std::size_t k = 0; k < kPiece; ++k) {
                const unsigned symbol = symbols[i + k];
                const unsigned width = widths[symbol];
                const std::uint8_t* const at = raw + (position >> 3);
                const unsigned skip = static_cast<unsigned>(position & 7);
                std::uint64_t bits = load_le64(at) >> skip;
                if (sizeof(Wide) == 8) {
                    bits |= (static_cast<std::uint64_t>(at[8]) << 1) << (63 - skip);
                }
                z[i + k] = static_cast<Wide>(bases[symbol] + low_bits(bits, width));
                position += width;
            }
            i += kPiece;
            continue;
        }
        const unsigned symbol = symbols[i];
        const unsigned width = widths[symbol];
        if (width > total - position) return UINT64_MAX;
        std::uint64_t bits = 0;
        for (unsigned got = 0; got < width;) {
            const unsigned skip = static_cast<unsigned>(position & 7);
            const unsigned take = width - got < 8 - skip ? width - got : 8 - skip;
            const std::uint64_t part = (raw[position >> 3] >> skip) & ((1U << take) - 1);
            bits |= part << got;
            got += take;
            position += take;
        }
        z[i++] = static_cast<Wide>(bases[symbol] + bits);
    }
    return position;
}

std::uint64_t delta_read_raw(const std::uint8_t* raw, std::size_t bytes,
                             const std::uint8_t* symbols, std::size_t count, bool wide,
                             const std::uint64_t* bases, const std::uint8_t* widths,
                             void* z) noexcept {
    if (wide) {
        return read_raw_as(raw, bytes, symbols, count, bases, widths,
                           static_cast<std::uint64_t*>(z));
    }
    return read_raw_as(raw, bytes, symbols, count, bases, widths, static_cast<std::uint32_t*>(z));
}

// ---- quantised differences
// -----------------------------------------------------------------------

template <class Float>
struct FloatTraits;
template <>
struct FloatTraits<float> {
    using Word = std::uint32_t;
    static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct FloatTraits<double> {
    using Word = std::uint64_t;
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

template <class Float>
inline std::uint32_t sign_of(Float value) noexcept {
    using Word = typename FloatTraits<Float>::Word;
    Word bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint32_t>(sign_mask(bits));
}

// One element, as the decoder will see it. Returns its error.
template <class Float, bool kStore>
inline double quantise_one(Float y, Float x, Float step, Float scale, std::uint32_t* z,
                           bool& good) noexcept {
    constexpr Float kRound = FloatTraits<Float>::kRound;
    const Float r = (y - x) * scale;
    const bool within = (r < Float{0} ? -r : r) <= static_cast<Float>(kMaxQuantum);  // not NaN
    good &= within;
    const Float q = (r + kRound) - kRound;
    const Float moved = x + q * step;
    const Float back = q == Float{0} ? x : moved;
    if (kStore) {
        auto whole = static_cast<std::uint32_t>(static_cast<std::int32_t>(within ? q : Float{0}));
        if (y == Float{0} && back != Float{0}) whole = static_cast<std::uint32_t>(kZeroMark);
        *z = zigzag(negate_where(whole, sign_of(x)));
    }
    return static_cast<double>(y - back);
}

template <bool kStore>
inline std::size_t quantise_vectors(const float* y, const float* x, std::size_t count, float step,
                                    float scale, std::uint32_t* z, double* sums,
                                    bool& good) noexcept {
    using Half __attribute__((vector_size(32))) = float;
    Words within = ~Words{};
    Doubles low{};
    Doubles high{};
    std::size_t i = 0;
    for (; i + kVector <= count; i += kVector) {
        Floats from;
        Floats to;
        load_vector(from, x + i);
        load_vector(to, y + i);
        const Floats r = (to - from) * scale;
        const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Words>(r) & 0x7FFFFFFFU);
        const Words fits = reinterpret_cast<Words>(size <= static_cast<float>(kMaxQuantum));
        within &= fits;
        const Floats q = (r + FloatTraits<float>::kRound) - FloatTraits<float>::kRound;
        const Words still = reinterpret_cast<Words>(q == 0.0F);
        const Words moved = reinterpret_cast<Words>(from + q * step);
        const Floats back =
            reinterpret_cast<Floats>((still & reinterpret_cast<Words>(from)) | (~still & moved));
        const Floats error = to - back;
        Half halves[2];
        __builtin_memcpy(halves, &error, sizeof halves);
        const Doubles first = __builtin_convertvector(halves[0], Doubles);
        const Doubles second = __builtin_convertvector(halves[1], Doubles);
        low += first * first;
        high += second * second;
        if (kStore) {
            const Floats held = reinterpret_cast<Floats>(reinterpret_cast<Words>(q) & fits);
            const Words whole = reinterpret_cast<Words>(__builtin_convertvector(held, Ints));
            const Words lost =
                reinterpret_cast<Words>(to == 0.0F) & reinterpret_cast<Words>(back != 0.0F);
            const Words marked = (lost & static_cast<std::uint32_t>(kZeroMark)) | (~lost & whole);
            const Words sign = reinterpret_cast<Words>(reinterpret_cast<Ints>(from) >> 31);
            const Words folded = (marked ^ sign) - sign;
            const Words top = reinterpret_cast<Words>(reinterpret_cast<Ints>(folded) >> 31);
            const Words result = (folded << 1) ^ top;
            __builtin_memcpy(z + i, &result, sizeof result);
        }
    }
    __builtin_memcpy(sums, &low, sizeof low);
    __builtin_memcpy(sums + 8, &high, sizeof high);
    for (std::size_t k = 0; k < kVector; ++k) good &= within[k] != 0;
    return i;
}

template <bool kStore>
inline std::size_t quantise_vectors(const double* y, const double* x, std::size_t count,
                                    double step, double scale, std::uint32_t* z, double* sums,
                                    bool& good) noexcept {
    std::size_t i = 0;
    for (; i + kErrorLanes <= count; i += kErrorLanes) {
        for (std::size_t k = 0; k < kErrorLanes; ++k) {
            const double error = quantise_one<double, kStore>(y[i + k], x[i + k], step, scale,
                                                              kStore ? z + i + k : nullptr, good);
            sums[k] += error * error;
        }
    }
    return i;
}

template <class Float, bool kStore>
inline bool quantise_as(const Float* y, const Float* x, std::size_t count, Float step,
                        std::uint32_t* z, double* lanes) noexcept {
    static_assert(kErrorLanes == kVector);
    const Float scale = Float{1} / step;
    double sums[kErrorLanes] = {};
    bool good = true;
    std::size_t i = quantise_vectors<kStore>(y, x, count, step, scale, z, sums, good);
    for (std::size_t k = 0; i < count; ++i, ++k) {
        const double error =
            quantise_one<Float, kStore>(y[i], x[i], step, scale, kStore ? z + i : nullptr, good);
        sums[k] += error * error;
    }
    for (std::size_t k = 0; k < kErrorLanes; ++k) lanes[k] = sums[k];
    return good;
}

bool delta_quantise(const void* y, const void* x, std::size_t count, bool wide, double step,
                    std::uint32_t* z, double* lanes) noexcept {
    if (wide) {
        const auto* const to = static_cast<const double*>(y);
        const auto* const from = static_cast<const double*>(x);
        return z != nullptr ? quantise_as<double, true>(to, from, count, step, z, lanes)
                            : quantise_as<double, false>(to, from, count, step, z, lanes);
    }
    const auto* const to = static_cast<const float*>(y);
    const auto* const from = static_cast<const float*>(x);
    const auto narrow = static_cast<float>(step);
    return z != nullptr ? quantise_as<float, true>(to, from, count, narrow, z, lanes)
                        : quantise_as<float, false>(to, from, count, narrow, z, lanes);
}

inline std::size_t dequantise_vectors(const float* x, const std::uint32_t* z, std::size_t count,
                                      float step, float* values) noexcept {
    std::size_t i = 0;
    for (; i + kVector <= count; i += kVector) {
        Floats from;
        Words v;
        load_vector(from, x + i);
        load_vector(v, z + i);
        const Words whole = (v >> 1) ^ (0U - (v & 1U));
        const Words sign = reinterpret_cast<Words>(reinterpret_cast<Ints>(from) >> 31);
        const Words q = (whole ^ sign) - sign;
        const Floats size = __builtin_convertvector(reinterpret_cast<Ints>(q), Floats);
        const Words moved = reinterpret_cast<Words>(from + size * step);
        const Words still = reinterpret_cast<Words>(q == 0U);
        const Words value = (still & reinterpret_cast<Words>(from)) | (~still & moved);
        const Words kept = reinterpret_cast<Words>(q != static_cast<std::uint32_t>(kZeroMark));
        const Words result = value & kept;
        __builtin_memcpy(values + i, &result, sizeof result);
    }
    return i;
}

inline std::size_t dequantise_vectors(const double*, const std::uint32_t*, std::size_t, double,
                                      double*) noexcept {
    return 0;
}

template <class Float>
inline void dequantise_as(const Float* x, const std::uint32_t* z, std::size_t count, Float step,
                          Float* values) noexcept {
    for (std::size_t i = dequantise_vectors(x, z, count, step, values); i < count; ++i) {
        const auto q = static_cast<std::int32_t>(negate_where(unzigzag(z[i]), sign_of(x[i])));
        const Float moved = x[i] + static_cast<Float>(q) * step;
        const Float value = q == 0 ? x[i] : moved;
        values[i] = q == kZeroMark ? Float{0} : value;
    }
}

void delta_dequantise(const void* x, const std::uint32_t* z, std::size_t count, bool wide,
                      double step, void* values) noexcept {
    if (wide) {
        dequantise_as(static_cast<const double*>(x), z, count, step, static_cast<double*>(values));
    } else {
        dequantise_as(static_cast<const float*>(x), z, count, static_cast<float>(step),
                      static_cast<float*>(values));
    }
}

constexpr DeltaKernels kDelta = {delta_subtract,      delta_add,       delta_classify,
                                 delta_exponents,     delta_mantissas, delta_map_features,
                                 delta_write_symbols, delta_write_raw, delta_read_symbols,
                                 delta_read_raw,      delta_quantise,  delta_dequantise};
