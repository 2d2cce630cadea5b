// SPDX-License-Identifier: Apache-2.0
// What the base says about a difference: exponents and mantissas, and the contexts they choose.
// Included by delta_common-inl.hpp alone, inside the namespace of each instruction set (no guard on
// purpose).

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
