// SPDX-License-Identifier: Apache-2.0
// Deltas in plain C++, written so that compilers make vectors of it where the instruction set
// allows: what all of them share, the bodies (one file each), and their table. Included INSIDE the
// namespace of each instruction set (no guard on purpose), behind codec_common-inl.hpp, whose bit
// reader it shares, and behind kVectorBytes, the width of its vectors.

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

// Elements of 4 bytes at once in the compiler's own vectors, as wide (kVectorBytes) as those of the
// instruction set: GCC takes wider ones apart into single elements wherever it compares them.
// (They are never passed or returned: how would depend on the instruction set.)
using Floats __attribute__((vector_size(kVectorBytes))) = float;
using Ints __attribute__((vector_size(kVectorBytes))) = std::int32_t;
using Words __attribute__((vector_size(kVectorBytes))) = std::uint32_t;
using HalfFloats __attribute__((vector_size(kVectorBytes / 2))) = float;
using Doubles __attribute__((vector_size(kVectorBytes))) = double;
constexpr std::size_t kVector = kVectorBytes / 4;

template <class Vector, class Element>
inline void load_vector(Vector& vector, const Element* from) noexcept {
    __builtin_memcpy(&vector, from, sizeof vector);
}

// Elements to differences and back.
#include "kernels/delta_differences-inl.hpp"
// Contexts from what the base says.
#include "kernels/delta_features-inl.hpp"
// Symbols and raw bits, to streams and back.
#include "kernels/delta_streams-inl.hpp"
// Floats to multiples of a step and back.
#include "kernels/delta_quantised-inl.hpp"
// Factors, their products, and what these move.
#include "kernels/delta_products-inl.hpp"

constexpr DeltaKernels kDelta = {delta_subtract,      delta_add,       delta_classify,
                                 delta_exponents,     delta_mantissas, delta_map_features,
                                 delta_write_symbols, delta_write_raw, delta_read_symbols,
                                 delta_read_raw,      delta_quantise,  delta_dequantise,
                                 delta_unpack,        delta_products,  delta_pair_products,
                                 delta_move,          kPrefersPairs};
