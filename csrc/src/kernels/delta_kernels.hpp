// SPDX-License-Identifier: Apache-2.0
// What the delta encodings ask of kernels (docs/format.md, "Deltas"). Every function works on
// contiguous arrays and gives the same bits with every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

struct HuffmanStreams;

/// Most contexts of one block, each with a code of its own.
inline constexpr unsigned kMaxContexts = 32;

/// Sums of squares are taken in this many lanes, element i in lane i % kErrorLanes, so that they
/// come out the same whatever the width of a vector.
inline constexpr std::size_t kErrorLanes = 16;

/// The value of q that stands for "the element is 0, whatever the base is".
inline constexpr std::int32_t kZeroMark = INT32_MIN;

/// Largest |q| of the quantised form: a rounding trick and f32 both hold it exactly.
inline constexpr std::int32_t kMaxQuantum = (1 << 21) - 1;

/// Rows and columns of a product that are made at once; there may be more of either than asked for.
inline constexpr std::size_t kProductRows = 4;
inline constexpr std::size_t kProductLanes = 32;

/// Readable bytes that unpack() wants behind the last number.
inline constexpr std::size_t kUnpackedAhead = 16;

/// What a dtype's bits mean: ordered = sign and magnitude; exponent and mantissa are 0 bits where
/// there are none.
struct DeltaLayout {
    std::uint8_t item_bytes;
    std::uint8_t exponent_bits;
    std::uint8_t mantissa_bits;
    bool ordered;

    bool operator==(const DeltaLayout&) const = default;
};

/// Codes of symbols: code << 8 | bits, at [context * 256 + symbol].
using DeltaCodes = const std::uint32_t*;

struct DeltaKernels {
    /// z[i] = zigzag of the difference y - x in ordered integers, negated where x is negative. z
    /// has 32 bits an element, 64 for elements of 8 bytes.
    void (*subtract)(const std::uint8_t* y, const std::uint8_t* x, std::size_t count,
                     DeltaLayout layout, void* z) noexcept;
    /// The inverse; the differences are first shifted left by `shift`.
    void (*add)(const std::uint8_t* x, const void* z, std::size_t count, DeltaLayout layout,
                unsigned shift, std::uint8_t* y) noexcept;
    /// classes[i] = 2 * floor(log2 z) + the bit behind the leading one; z itself below 2. Returns
    /// the bitwise or of all differences (sign-extended).
    std::uint64_t (*classify)(const void* z, std::size_t count, bool wide,
                              std::uint8_t* classes) noexcept;
    /// features[i] = how far the exponent of x lies below `reference`, within 0 .. 255.
    void (*exponents)(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                      std::uint32_t reference, std::uint8_t* features) noexcept;
    /// features[i] = the top 8 bits of the mantissa of x (all where it has fewer).
    void (*mantissas)(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                      std::uint8_t* features) noexcept;
    /// contexts[i] = base + how many of first[1] .. first[n - 1] (ascending) features[i] reaches.
    void (*map_features)(const std::uint8_t* features, std::size_t count, const std::uint8_t* first,
                         unsigned n, std::uint8_t base, std::uint8_t* contexts) noexcept;
    /// Writes `count` symbols, most significant bit first, into one stream that ends with zeros up
    /// to a byte; returns its end. Stores run up to 8 bytes ahead.
    std::uint8_t* (*write_symbols)(const std::uint8_t* symbols, const std::uint8_t* contexts,
                                   std::size_t count, DeltaCodes codes, std::uint8_t* to) noexcept;
    /// Writes the lowest widths[symbol] bits of each z, least significant bit first.
    std::uint8_t* (*write_raw)(const void* z, const std::uint8_t* symbols, std::size_t count,
                               bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept;
    /// As CodecKernels::huffman_decode, with table [context << table_bits | next bits], whose codes
    /// may have 0 bits. At most 1 <= table_bits <= kMaxCodeBits.
    void (*read_symbols)(const HuffmanStreams& streams, const std::uint8_t* contexts,
                         std::size_t count, std::uint8_t* symbols,
                         std::uint64_t* consumed) noexcept;
    /// z[i] = bases[symbol] + the next widths[symbol] bits. Returns the bits taken, or UINT64_MAX
    /// when there are not that many.
    std::uint64_t (*read_raw)(const std::uint8_t* raw, std::size_t bytes,
                              const std::uint8_t* symbols, std::size_t count, bool wide,
                              const std::uint64_t* bases, const std::uint8_t* widths,
                              void* z) noexcept;
    /// Quantises y - x by `step` (f32 values, or f64 when wide), rounding to nearest; q is folded
    /// by the sign of x and zigzagged into z when z is not null. lanes[] gets the squared errors of
    /// x + q * step. Returns whether all q are within kMaxQuantum and finite.
    bool (*quantise)(const void* y, const void* x, std::size_t count, bool wide, double step,
                     std::uint32_t* z, double* lanes) noexcept;
    /// values[i] = x[i] + q[i] * step in f32 (f64 when wide); x[i] where q is 0; 0 where it is
    /// kZeroMark.
    void (*dequantise)(const void* x, const std::uint32_t* z, std::size_t count, bool wide,
                       double step, void* values) noexcept;
    /// to[i] = the number of `width` bits (1 to 24, two's complement) that begins at bit position +
    /// i * width. Reads up to kUnpackedAhead bytes behind the last.
    void (*unpack)(const std::uint8_t* from, std::size_t position, unsigned width,
                   std::size_t count, std::int32_t* to) noexcept;
    /// sums[r * cols + j] = sum over k below `rank` of of_rows[k * rows + r] * of_cols[k * cols +
    /// j] for r below kProductRows, of whole numbers whose sums are below 2^53; `cols` is a
    /// multiple of kProductLanes.
    void (*products)(const double* of_rows, std::size_t rows, const double* of_cols,
                     std::size_t cols, std::size_t rank, double* sums) noexcept;
    /// The same of numbers of 16 bits, those of two k in one of 32, the first in its lower half,
    /// whose sums are below 2^31; where `prefers_pairs`, in less time.
    void (*pair_products)(const std::int32_t* of_rows, std::size_t rows,
                          const std::int32_t* of_cols, std::size_t cols, std::size_t n_pairs,
                          double* sums) noexcept;
    /// y[i] = x[i] + sums[i] * scale, rounded to f64 and then to the dtype, for the layouts of f64,
    /// f32 and bf16. What is NaN, of bf16 as the quiet one of its sign, or infinite stays, and so
    /// does all whose sum is 0 (not -0). y may be x; of sums there are as many as a multiple of
    /// kProductLanes.
    void (*move)(const std::uint8_t* x, const double* sums, std::size_t count, DeltaLayout layout,
                 double scale, std::uint8_t* y) noexcept;
    bool prefers_pairs;
};

}  // namespace pydedup
