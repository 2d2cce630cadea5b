// SPDX-License-Identifier: Apache-2.0
// Projections, exact distances and selection. Everything here has the same bits from every kernel:
// additions happen in the order of the scalar form, whatever the width of a register.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydedup {

/// Logical lanes of all sums below, and of a group of elements.
inline constexpr std::size_t kSimLanes = 16;
/// A block is folded into this many buckets: kFoldGroups groups of kSimLanes.
inline constexpr std::size_t kFoldGroups = 64;
inline constexpr std::size_t kFoldBuckets = kFoldGroups * kSimLanes;
/// Sign words of one strip, or of one transform: per half of the groups one word per lane, whose
/// highest bit belongs to the first group.
inline constexpr std::size_t kSignWords = 2 * kSimLanes;

/// A strip is up to kFoldGroups groups of elements: group t lies `offset[t]` bytes from the strip's
/// beginning and has `lanes[t]` elements (1 to kSimLanes; fewer at the end of a row).
struct FoldStrip {
    std::size_t groups;
    bool full;  ///< kFoldGroups groups of kSimLanes elements
    std::size_t offset[kFoldGroups];
    std::uint8_t lanes[kFoldGroups];
};

/// What compare() found; the sums are of f64.
struct Comparison {
    double squares;  ///< of a
    double squared_difference;
    double greatest_difference;
    std::uint64_t within;  ///< entries with |a - b| <= eps
};

/// Keeps keys in [low, high) and counts those below.
struct Filtered {
    std::size_t below;
    std::size_t kept;
};

/// Adds `strips` strips, `pitch` bytes apart, to `buckets`. Element (t, lane) of strip s goes to
/// bucket (t * 16 + lane) ^ moves[s], negated where the strip's sign of that bucket is set. The sum
/// of squares is added to `squares`, per lane of buckets: in f32 over a strip, then in f64. `ahead`
/// is where what is folded next begins, laid out alike; it is asked for and never read.
using Fold = void (*)(const std::uint8_t* data, const FoldStrip& strip, std::size_t strips,
                      std::size_t pitch, const std::uint8_t* ahead, const std::uint32_t* signs,
                      const std::uint16_t* moves, float* buckets, double* squares) noexcept;

/// Compares two rectangles of rows x cols elements, rows a_stride and b_stride bytes apart. Stops
/// early once the squared difference is above `limit`; the other results are then of a part.
using Compare = void (*)(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                         std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                         double limit, Comparison& out) noexcept;

/// Sum of squares of a rectangle, in the order of Compare.
using SumSquares = double (*)(const std::uint8_t* data, std::size_t stride, std::size_t rows,
                              std::size_t cols) noexcept;

/// The kernels of one element type.
struct ElementKernels {
    Fold fold;
    Compare compare;
    SumSquares sum_squares;
};

/// Selection on keys: unsigned integers in the order of what they stand for.
template <class Key>
struct SelectKernels {
    std::size_t (*count_below)(const Key* keys, std::size_t count, Key pivot) noexcept;
    /// `out` has room for all keys; it may be `keys`.
    Filtered (*filter)(const Key* keys, std::size_t count, Key low, Key high, Key* out) noexcept;
    /// Smallest key above `pivot`, or the greatest Key.
    Key (*next_above)(const Key* keys, std::size_t count, Key pivot) noexcept;
};

struct SimilarityKernels {
    ElementKernels f32, f64, f16, bf16;

    /// Writes the first `outputs` (64 to 512, a power of two) entries of H D3 H D2 G buckets, and
    /// leaves the buckets undefined. H is the Walsh-Hadamard matrix without a factor, G the same
    /// over groups (each lane by itself), D2 and D3 negate where `signs` and `signs + kSignWords`
    /// say so. `buckets` is aligned to 64 bytes.
    void (*mix)(float* buckets, const std::uint32_t* signs, std::size_t outputs,
                float* out) noexcept;

    /// Sum of squared differences. `count` is a multiple of 32, and |difference| <= 32766.
    std::uint64_t (*sketch_distance)(const std::int16_t* a, const std::int16_t* b,
                                     std::size_t count) noexcept;

    /// Magnitudes as keys: the bits of |w|, widened to f32 or f64. Any NaN is above infinity.
    void (*keys_f32)(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept;
    void (*keys_f16)(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept;
    void (*keys_bf16)(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept;
    void (*keys_f64)(const std::uint8_t* data, std::size_t count, std::uint64_t* keys) noexcept;

    SelectKernels<std::uint32_t> select_u32;
    SelectKernels<std::uint64_t> select_u64;
};

}  // namespace pydedup
