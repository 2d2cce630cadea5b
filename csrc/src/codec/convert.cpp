// SPDX-License-Identifier: Apache-2.0
// In integers throughout: neither rounding modes nor what a CPU does with NaN has a say. Every one
// of these dtypes is exact in f64, so a conversion is one widening and one rounding; the pairs that
// models are made of have loops of their own.
#include "codec/convert.hpp"

#include <bit>
#include <cstring>

namespace pydedup::detail {
namespace {

struct FloatFormat {
    unsigned exponent_bits;
    unsigned mantissa_bits;
};

constexpr FloatFormat format_of(Dtype dtype) noexcept {
    switch (dtype) {
        case Dtype::f64:
            return {11, 52};
        case Dtype::f32:
            return {8, 23};
        case Dtype::f16:
            return {5, 10};
        case Dtype::bf16:
            return {8, 7};
        default:
            return {0, 0};
    }
}

constexpr std::uint64_t kInfinity64 = 0x7FF0000000000000U;

// The bits of a float, as those of the f64 of the same value.
std::uint64_t widen(std::uint64_t bits, FloatFormat format) noexcept {
    const unsigned mantissa_bits = format.mantissa_bits;
    const unsigned top = (1U << format.exponent_bits) - 1;
    const std::uint64_t sign = bits >> (format.exponent_bits + mantissa_bits) << 63;
    const auto exponent = static_cast<unsigned>(bits >> mantissa_bits) & top;
    std::uint64_t mantissa = bits & ((std::uint64_t{1} << mantissa_bits) - 1);
    if (exponent == top) {
        return sign | kInfinity64 | (mantissa != 0 ? std::uint64_t{1} << 51 : 0);
    }
    std::uint64_t biased = exponent + (1023 - top / 2);
    if (exponent == 0) {
        if (mantissa == 0) return sign;
        if (format.exponent_bits == 11) return bits;
        const auto lift = static_cast<unsigned>(std::countl_zero(mantissa)) - (63 - mantissa_bits);
        mantissa = mantissa << lift & ((std::uint64_t{1} << mantissa_bits) - 1);
        biased += 1 - std::uint64_t{lift};
    }
    return sign | biased << 52 | mantissa << (52 - mantissa_bits);
}

// The nearest float of a narrower format, ties to even.
std::uint64_t narrow(std::uint64_t bits, FloatFormat format) noexcept {
    const unsigned mantissa_bits = format.mantissa_bits;
    const std::int64_t top = (1 << format.exponent_bits) - 1;
    const std::uint64_t infinity = static_cast<std::uint64_t>(top) << mantissa_bits;
    const std::uint64_t sign = bits >> 63 << (format.exponent_bits + mantissa_bits);
    const std::uint64_t magnitude = bits & (kInfinity64 | (kInfinity64 - 1));
    if (magnitude >= kInfinity64) {
        const std::uint64_t quiet = (std::uint64_t{1} << mantissa_bits) >> 1;
        return sign | infinity | (magnitude > kInfinity64 ? quiet : 0);
    }
    const std::int64_t exponent = static_cast<std::int64_t>(magnitude >> 52) - 1023 + top / 2;
    std::uint64_t mantissa = magnitude & ((std::uint64_t{1} << 52) - 1);
    unsigned drop = 52 - mantissa_bits;
    std::uint64_t kept = static_cast<std::uint64_t>(exponent) << mantissa_bits;
    if (exponent <= 0) {  // subnormal there; subnormals of f64 are far below all of them
        if (exponent < -static_cast<std::int64_t>(mantissa_bits)) return sign;
        mantissa |= std::uint64_t{1} << 52;
        drop += static_cast<unsigned>(1 - exponent);
        kept = 0;
    }
    kept += mantissa >> drop;
    const std::uint64_t half = std::uint64_t{1} << (drop - 1);
    const std::uint64_t rest = mantissa & ((half << 1) - 1);
    if (rest > half || (rest == half && (kept & 1) != 0)) ++kept;  // carries into the exponent
    return sign | (kept > infinity ? infinity : kept);
}

template <class Word>
std::uint64_t load(const std::uint8_t* from, std::size_t i) noexcept {
    Word word;
    std::memcpy(&word, from + i * sizeof word, sizeof word);
    return word;
}

template <class Word>
void store(std::uint8_t* to, std::size_t i, std::uint64_t bits) noexcept {
    const auto word = static_cast<Word>(bits);
    std::memcpy(to + i * sizeof word, &word, sizeof word);
}

template <class From, class To>
void convert_any(const std::uint8_t* from, FloatFormat from_format, std::size_t count,
                 std::uint8_t* to, FloatFormat to_format) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t wide = widen(load<From>(from, i), from_format);
        store<To>(to, i, to_format.mantissa_bits == 52 ? wide : narrow(wide, to_format));
    }
}

template <class From>
void convert_from(const std::uint8_t* from, FloatFormat from_format, std::size_t count,
                  std::uint8_t* to, Dtype to_dtype) noexcept {
    const FloatFormat to_format = format_of(to_dtype);
    switch (item_bytes(to_dtype)) {
        case 8:
            return convert_any<From, std::uint64_t>(from, from_format, count, to, to_format);
        case 4:
            return convert_any<From, std::uint32_t>(from, from_format, count, to, to_format);
        default:
            return convert_any<From, std::uint16_t>(from, from_format, count, to, to_format);
    }
}

void f32_to_bf16(const std::uint8_t* from, std::size_t count, std::uint8_t* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const auto bits = static_cast<std::uint32_t>(load<std::uint32_t>(from, i));
        const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1)) >> 16;
        const std::uint32_t nan = bits >> 31 << 15 | 0x7FC0U;
        store<std::uint16_t>(to, i, (bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
    }
}

void bf16_to_f32(const std::uint8_t* from, std::size_t count, std::uint8_t* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const auto bits = static_cast<std::uint32_t>(load<std::uint16_t>(from, i)) << 16;
        const std::uint32_t nan = bits >> 31 << 31 | 0x7FC00000U;
        store<std::uint32_t>(to, i, (bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : bits);
    }
}

}  // namespace

bool converts(Dtype from, Dtype to) noexcept {
    return from == to || (format_of(from).mantissa_bits != 0 && format_of(to).mantissa_bits != 0);
}

void convert_floats(const std::uint8_t* from, Dtype from_dtype, std::size_t count, std::uint8_t* to,
                    Dtype to_dtype) noexcept {
    if (from_dtype == to_dtype) {
        std::memcpy(to, from, count * item_bytes(to_dtype));
        return;
    }
    if (from_dtype == Dtype::f32 && to_dtype == Dtype::bf16) return f32_to_bf16(from, count, to);
    if (from_dtype == Dtype::bf16 && to_dtype == Dtype::f32) return bf16_to_f32(from, count, to);
    const FloatFormat format = format_of(from_dtype);
    switch (item_bytes(from_dtype)) {
        case 8:
            return convert_from<std::uint64_t>(from, format, count, to, to_dtype);
        case 4:
            return convert_from<std::uint32_t>(from, format, count, to, to_dtype);
        default:
            return convert_from<std::uint16_t>(from, format, count, to, to_dtype);
    }
}

}  // namespace pydedup::detail
