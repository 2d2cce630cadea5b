// SPDX-License-Identifier: Apache-2.0
// The reference: one element at a time, in the order that all kernels keep.
#include "kernels/similarity_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {
namespace sim {

template <class T>
T load_as(const std::uint8_t* from) noexcept {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

float float_of(std::uint32_t bits) noexcept {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint32_t bits_of(float value) noexcept {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

float flip(float value, bool negative) noexcept { return negative ? -value : value; }

// ---- elements: `Fold` is what is folded, `Value` what is compared -------------------------------

struct F32 {
    using Value = float;
    static constexpr std::size_t kBytes = 4;
    static Value value(const std::uint8_t* at) noexcept { return load_as<float>(at); }
};

struct F64 {
    using Value = double;
    static constexpr std::size_t kBytes = 8;
    static Value value(const std::uint8_t* at) noexcept { return load_as<double>(at); }
};

struct Bf16 {
    using Value = float;
    static constexpr std::size_t kBytes = 2;
    static Value value(const std::uint8_t* at) noexcept {
        return float_of(static_cast<std::uint32_t>(load_as<std::uint16_t>(at)) << 16);
    }
};

struct F16 {
    using Value = float;
    static constexpr std::size_t kBytes = 2;
    static Value value(const std::uint8_t* at) noexcept {
        const std::uint32_t half = load_as<std::uint16_t>(at);
        const std::uint32_t sign = (half & 0x8000U) << 16;
        const std::uint32_t exponent = (half >> 10) & 0x1FU;
        const std::uint32_t mantissa = half & 0x3FFU;
        if (exponent == 0) {  // a subnormal is an exact product
            return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24F));
        }
        if (exponent == 31) return float_of(sign | 0x7F800000U | (mantissa << 13));
        return float_of(sign | ((exponent + 112U) << 23) | (mantissa << 13));
    }
};

bool sign_at(const std::uint32_t* words, std::size_t group, std::size_t lane) noexcept {
    return ((words[group / 32 * kSimLanes + lane] << (group % 32)) & 0x80000000U) != 0;
}

template <class Element>
void fold(const std::uint8_t* data, const FoldStrip& strip, std::size_t strips, std::size_t pitch,
          const std::uint8_t*, const std::uint32_t* signs, const std::uint16_t* moves,
          float* buckets, double* squares) noexcept {
    for (std::size_t s = 0; s < strips; ++s, data += pitch, signs += kSignWords) {
        const std::size_t group_move = moves[s] / kSimLanes;
        const std::size_t lane_move = moves[s] % kSimLanes;
        float strip_squares[kSimLanes] = {};
        for (std::size_t g = 0; g < kFoldGroups; ++g) {
            const std::size_t t = g ^ group_move;
            if (t >= strip.groups) continue;
            for (std::size_t lane = 0; lane < kSimLanes; ++lane) {
                const std::size_t from = lane ^ lane_move;
                if (from >= strip.lanes[t]) continue;
                const auto value = static_cast<float>(
                    Element::value(data + strip.offset[t] + from * Element::kBytes));
                buckets[g * kSimLanes + lane] += flip(value, sign_at(signs, g, lane));
                strip_squares[lane] += value * value;
            }
        }
        for (std::size_t lane = 0; lane < kSimLanes; ++lane) {
            squares[lane] += static_cast<double>(strip_squares[lane]);
        }
    }
}

void butterfly(float* x, std::size_t count, std::size_t apart) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        if ((i & apart) != 0) continue;
        const float a = x[i];
        const float b = x[i + apart];
        x[i] = a + b;
        x[i + apart] = a - b;
    }
}

void negate(float* x, const std::uint32_t* signs) noexcept {
    for (std::size_t i = 0; i < kFoldBuckets; ++i) {
        x[i] = flip(x[i], sign_at(signs, i / kSimLanes, i % kSimLanes));
    }
}

void mix(float* buckets, const std::uint32_t* signs, std::size_t outputs, float* out) noexcept {
    constexpr std::size_t kFar[] = {8 * kSimLanes, 16 * kSimLanes, 32 * kSimLanes};
    constexpr std::size_t kNear[] = {1 * kSimLanes, 2 * kSimLanes, 4 * kSimLanes};
    for (const std::size_t apart : kFar) butterfly(buckets, kFoldBuckets, apart);
    for (const std::size_t apart : kNear) butterfly(buckets, kFoldBuckets, apart);
    negate(buckets, signs);
    for (const std::size_t apart : kNear) butterfly(buckets, kFoldBuckets, apart);
    for (std::size_t lanes = 1; lanes < kSimLanes; lanes *= 2) {
        butterfly(buckets, kFoldBuckets, lanes);
    }
    for (const std::size_t apart : kFar) butterfly(buckets, kFoldBuckets, apart);
    negate(buckets, signs + kSignWords);
    std::size_t left = kFoldBuckets;
    for (; left > outputs; left /= 2) {  // of these butterflies only the sums are asked for
        for (std::size_t i = 0; i < left / 2; ++i) buckets[i] += buckets[i + left / 2];
    }
    for (std::size_t i = 0; i < outputs; ++i) out[i] = buckets[i];
    for (std::size_t apart = outputs / 2; apart >= kSimLanes; apart /= 2) {
        butterfly(out, outputs, apart);
    }
    for (std::size_t lanes = 1; lanes < kSimLanes; lanes *= 2) butterfly(out, outputs, lanes);
}

std::uint64_t sketch_distance(const std::int16_t* a, const std::int16_t* b,
                              std::size_t count) noexcept {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t difference = std::int64_t{a[i]} - b[i];
        sum += static_cast<std::uint64_t>(difference * difference);
    }
    return sum;
}

// ---- comparing ----------------------------------------------------------------------------------

// Sums of 16 lanes: in the type of the values over a chunk, then in f64.
template <class Value>
struct Sums {
    Value part[kSimLanes] = {};
    double whole[kSimLanes] = {};

    void add(std::size_t lane, Value value) noexcept { part[lane] += value * value; }
    void end_chunk() noexcept {
        for (std::size_t i = 0; i < kSimLanes; ++i) {
            whole[i] += static_cast<double>(part[i]);
            part[i] = 0;
        }
    }
    [[nodiscard]] double total() const noexcept {
        double eight[8];
        for (std::size_t i = 0; i < 8; ++i) eight[i] = whole[i] + whole[i + 8];
        for (std::size_t apart = 4; apart != 0; apart /= 2) {
            for (std::size_t i = 0; i < apart; ++i) eight[i] += eight[i + apart];
        }
        return eight[0];
    }
};

template <class Element>
void compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
             std::size_t b_stride, std::size_t rows, std::size_t cols, double eps, double limit,
             Comparison& out) noexcept {
    using Value = typename Element::Value;
    Sums<Value> squares;
    Sums<Value> differences;
    out = {0, 0, 0, 0};
    const auto close = static_cast<Value>(eps);
    std::size_t groups = 0;
    for (std::size_t r = 0; r < rows; ++r, a += a_stride, b += b_stride) {
        for (std::size_t c = 0; c < cols; ++c) {
            const Value left = Element::value(a + c * Element::kBytes);
            const Value difference = left - Element::value(b + c * Element::kBytes);
            const Value size = difference < 0 ? -difference : difference;
            squares.add(c % kSimLanes, left);
            differences.add(c % kSimLanes, difference);
            if (size > static_cast<Value>(out.greatest_difference)) out.greatest_difference = size;
            if (size <= close) ++out.within;
            if (c % kSimLanes != kSimLanes - 1 && c + 1 != cols) continue;
            if (++groups != kFoldGroups) continue;
            groups = 0;
            squares.end_chunk();
            differences.end_chunk();
            if (differences.total() > limit) {
                out.squares = squares.total();
                out.squared_difference = differences.total();
                return;
            }
        }
    }
    squares.end_chunk();
    differences.end_chunk();
    out.squares = squares.total();
    out.squared_difference = differences.total();
}

template <class Element>
double sum_squares(const std::uint8_t* data, std::size_t stride, std::size_t rows,
                   std::size_t cols) noexcept {
    Sums<typename Element::Value> squares;
    std::size_t groups = 0;
    for (std::size_t r = 0; r < rows; ++r, data += stride) {
        for (std::size_t c = 0; c < cols; ++c) {
            squares.add(c % kSimLanes, Element::value(data + c * Element::kBytes));
            if (c % kSimLanes != kSimLanes - 1 && c + 1 != cols) continue;
            if (++groups != kFoldGroups) continue;
            groups = 0;
            squares.end_chunk();
        }
    }
    squares.end_chunk();
    return squares.total();
}

// ---- selection ----------------------------------------------------------------------------------

template <class Element>
void keys_u32(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        keys[i] = bits_of(Element::value(data + i * Element::kBytes)) & 0x7FFFFFFFU;
    }
}

void keys_u64(const std::uint8_t* data, std::size_t count, std::uint64_t* keys) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        keys[i] = load_as<std::uint64_t>(data + 8 * i) & 0x7FFFFFFFFFFFFFFFU;
    }
}

template <class Key>
std::size_t count_below(const Key* keys, std::size_t count, Key pivot) noexcept {
    std::size_t below = 0;
    for (std::size_t i = 0; i < count; ++i) below += keys[i] < pivot ? 1 : 0;
    return below;
}

template <class Key>
Filtered filter(const Key* keys, std::size_t count, Key low, Key high, Key* out) noexcept {
    Filtered found{0, 0};
    for (std::size_t i = 0; i < count; ++i) {
        const Key key = keys[i];
        if (key < low) {
            ++found.below;
        } else if (key < high) {
            out[found.kept++] = key;
        }
    }
    return found;
}

template <class Key>
Key next_above(const Key* keys, std::size_t count, Key pivot) noexcept {
    Key next = ~Key{0};
    for (std::size_t i = 0; i < count; ++i) {
        if (keys[i] > pivot && keys[i] < next) next = keys[i];
    }
    return next;
}

template <class Element>
constexpr ElementKernels kElement = {fold<Element>, compare<Element>, sum_squares<Element>};

template <class Key>
constexpr SelectKernels<Key> kSelect = {count_below<Key>, filter<Key>, next_above<Key>};

constexpr SimilarityKernels kSimilarity = {
    kElement<F32>,          kElement<F64>,          kElement<F16>, kElement<Bf16>, mix,
    sketch_distance,        keys_u32<F32>,          keys_u32<F16>, keys_u32<Bf16>, keys_u64,
    kSelect<std::uint32_t>, kSelect<std::uint64_t>,
};

}  // namespace sim
}  // namespace
}  // namespace pydedup::isa_scalar
