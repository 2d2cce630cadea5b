// SPDX-License-Identifier: Apache-2.0
// Differences of whole elements as integers: taken, put back, and sorted into classes. Included by
// delta_common-inl.hpp alone, inside the namespace of each instruction set (no guard on purpose).

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

inline void classify_vector(const std::uint32_t* z, std::uint32_t* found, Words& seen) noexcept {
    Words v;
    load_vector(v, z);
    const Words big = reinterpret_cast<Words>((v >> 24) != 0U);
    const Words exact = (v & ~big) | (v >> 8 & big);
    const Floats held = __builtin_convertvector(reinterpret_cast<Ints>(exact), Floats);
    const auto bits = reinterpret_cast<Words>(held);  // the same bits: casts do not convert
    const Words top = (bits >> 22) - 2U * 127U + (big & 16U);
    const Words tiny = reinterpret_cast<Words>(v >> 1 == 0U);
    const Words result = (v & tiny) | (top & ~tiny);
    __builtin_memcpy(found, &result, sizeof result);
    seen |= (v >> 1) ^ (0U - (v & 1U));
}

// Handles whole pieces; returns how many elements that are. Words become bytes in a loop of their
// own, which GCC makes vectors of; it converts vectors of words to bytes one by one.
inline std::size_t classify_vectors(const std::uint32_t* z, std::size_t count,
                                    std::uint8_t* classes, std::uint32_t& all) noexcept {
    constexpr std::size_t kPiece = 64;
    std::uint32_t found[kPiece];
    Words seen{};
    std::size_t i = 0;
    for (; i + kPiece <= count; i += kPiece) {
#pragma GCC unroll 4
        for (std::size_t k = 0; k < kPiece; k += kVector) {
            classify_vector(z + i + k, found + k, seen);
        }
        for (std::size_t k = 0; k < kPiece; ++k) {
            classes[i + k] = static_cast<std::uint8_t>(found[k]);
        }
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
