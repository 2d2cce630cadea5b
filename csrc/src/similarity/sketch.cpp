// SPDX-License-Identifier: Apache-2.0
#include "similarity/sketch.hpp"

#include <bit>
#include <cmath>
#include <limits>

#include "base/rounding.hpp"
#include "similarity/batch.hpp"

namespace pydedup::similarity {
namespace {

using detail::ceil_div;
using detail::round_up;

constexpr std::uint64_t kSignStream = 1;
constexpr std::uint64_t kMoveStream = 2;
constexpr std::uint64_t kMixStream = 3;

// Two blocks up to this large fit the second-level cache with room to spare.
constexpr std::size_t kLargeBlock = 64 * 1024;
constexpr std::size_t kAheadBytes = 16 * 1024;

// Sums of squares of f32 elements in this range lost nothing to under- or overflow.
bool is_safe(double squares, std::size_t elements) noexcept {
    return squares < 1e30 && squares > 1e-24 * static_cast<double>(elements);
}

double sum_lanes(const double* lanes) noexcept {
    double eight[8];
    for (std::size_t i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
    for (std::size_t apart = 4; apart != 0; apart /= 2) {
        for (std::size_t i = 0; i < apart; ++i) eight[i] += eight[i + apart];
    }
    return eight[0];
}

void fill_words(std::uint32_t* words, std::size_t count, std::uint64_t seed) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        words[i] = static_cast<std::uint32_t>(random_word(seed, i) >> 32);
    }
}

// `rows` rows of `cols` elements (or one piece of a row) as a strip.
FoldStrip make_strip(std::size_t rows, std::size_t cols, std::size_t stride, std::size_t item) {
    FoldStrip strip{};
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < cols; c += kSimLanes) {
            strip.offset[strip.groups] = r * stride + c * item;
            strip.lanes[strip.groups] = static_cast<std::uint8_t>(std::min(cols - c, kSimLanes));
            ++strip.groups;
        }
    }
    strip.full = strip.groups == kFoldGroups && cols % kSimLanes == 0;
    return strip;
}

}  // namespace

Sketcher::Sketcher(std::size_t rows, std::size_t cols, Dtype dtype, std::size_t projections,
                   std::uint64_t seed)
    : rows_(rows),
      cols_(cols),
      projections_(projections),
      outputs_(std::bit_ceil(std::max<std::size_t>(projections, 64))),
      rows_per_strip_(cols <= kFoldBuckets ? kFoldBuckets / round_up(cols, kSimLanes) : 0),
      strips_(cols <= kFoldBuckets ? ceil_div(rows, rows_per_strip_)
                                   : rows * ceil_div(cols, kFoldBuckets)),
      dtype_(dtype),
      signs_((strips_ + 2) * kSignWords),
      moves_(strips_) {
    fill_words(signs_.data(), strips_ * kSignWords, stream_seed(seed, kSignStream));
    fill_words(signs_.data() + strips_ * kSignWords, 2 * kSignWords, stream_seed(seed, kMixStream));
    const std::uint64_t move_seed = stream_seed(seed, kMoveStream);
    for (std::size_t s = 0; s < strips_; ++s) {
        moves_[s] = static_cast<std::uint16_t>(random_word(move_seed, s) % kFoldBuckets);
    }
}

Sketcher::Plan Sketcher::plan(std::size_t row_stride, std::size_t item) const {
    Plan plan{};
    plan.stride = row_stride;
    if (rows_per_strip_ != 0) {
        plan.pitch = rows_per_strip_ * row_stride;
        plan.strip = make_strip(rows_per_strip_, cols_, row_stride, item);
        plan.last = make_strip(rows_ % rows_per_strip_, cols_, row_stride, item);
    } else {
        plan.pitch = kFoldBuckets * item;
        plan.strip = make_strip(1, kFoldBuckets, row_stride, item);
        plan.last = make_strip(1, cols_ % kFoldBuckets, row_stride, item);
    }
    return plan;
}

void Sketcher::fold(const std::byte* block, const Plan& plan, Fold kernel, std::ptrdiff_t ahead,
                    float* buckets, double* squares) const {
    const auto* data = reinterpret_cast<const std::uint8_t*>(block);
    const std::uint32_t* signs = signs_.data();
    const std::uint16_t* moves = moves_.data();
    const auto run = [&](const std::uint8_t* from, const FoldStrip& strip, std::size_t strips,
                         std::size_t pitch) {
        if (strips == 0 || strip.groups == 0) return;
        kernel(from, strip, strips, pitch, from + ahead, signs, moves, buckets, squares);
        signs += strips * kSignWords;
        moves += strips;
    };
    if (rows_per_strip_ != 0) {
        const std::size_t whole = rows_ / rows_per_strip_;
        run(data, plan.strip, whole, plan.pitch);
        run(data + whole * plan.pitch, plan.last, 1, 0);
        return;
    }
    const std::size_t whole = cols_ / kFoldBuckets;
    for (std::size_t r = 0; r < rows_; ++r, data += plan.stride) {
        run(data, plan.strip, whole, plan.pitch);
        run(data + whole * plan.pitch, plan.last, 1, 0);
    }
}

void Sketcher::finish(float* buckets, double squares, std::int16_t* out) const {
    alignas(64) float raw[kFoldBuckets / 2];
    kernels().similarity.mix(buckets, signs_.data() + strips_ * kSignWords, outputs_, raw);
    // An output is the projection times 256: the transforms of 64 and 1,024 entries make lengths 8
    // and 32 times larger, and the third one sums up.
    const auto scale = static_cast<float>(kSketchUnit / 256.0 / std::sqrt(squares));
    constexpr auto kOffset = static_cast<float>(kSketchMost + 1);
    for (std::size_t i = 0; i < projections_; ++i) {
        // Truncation of a positive number rounds down: the same on every machine.
        const float up = std::min(std::max(raw[i] * scale + kOffset, 1.0F), 2 * kOffset - 1.0F);
        out[i] = static_cast<std::int16_t>(static_cast<int>(up) - (kSketchMost + 1));
    }
}

Kind Sketcher::sketch(const BlockBatch& blocks, const Plan& plan, std::size_t index,
                      std::int16_t* out, double& rms) const {
    alignas(64) float buckets[kFoldBuckets] = {};
    double lanes[kSimLanes] = {};
    const std::byte* block = blocks.block(index);
    // While this block is folded the next one is asked for, or of a large one what comes soon: the
    // order within a strip is no stream that hardware would follow.
    std::ptrdiff_t ahead = 0;
    if (plan.pitch == 0) {  // all rows are one, as numpy broadcasts them
    } else if (block_bytes(blocks) > kLargeBlock) {
        ahead = static_cast<std::ptrdiff_t>((kAheadBytes / plan.pitch + 1) * plan.pitch);
    } else if (index + 1 < blocks.count) {
        ahead = blocks.block(index + 1) - block;
    }
    fold(block, plan, element_kernels(dtype_).fold, ahead, buckets, lanes);
    const double squares = sum_lanes(lanes);
    if (!is_safe(squares, rows_ * cols_)) return sketch_rare(block, blocks, out, rms);
    rms = std::sqrt(squares / static_cast<double>(rows_ * cols_));
    finish(buckets, squares, out);
    return Kind::normal;
}

// Blocks that are zero, tiny, huge or not finite: looked at in f64, and scaled by a power of two.
Kind Sketcher::sketch_rare(const std::byte* block, const BlockBatch& blocks, std::int16_t* out,
                           double& rms) const {
    std::fill_n(out, projections_, std::int16_t{0});
    std::vector<double> wide(rows_ * cols_);
    widen_block(block, blocks, wide.data());
    double greatest = 0;
    for (const double value : wide) {
        if (!std::isfinite(value)) {
            rms = std::numeric_limits<double>::quiet_NaN();
            return Kind::not_finite;
        }
        greatest = std::max(greatest, std::abs(value));
    }
    rms = 0;
    if (greatest == 0) return Kind::zero;
    int exponent = 0;
    static_cast<void>(std::frexp(greatest, &exponent));
    std::vector<float> scaled(wide.size());
    for (std::size_t i = 0; i < wide.size(); ++i) {
        scaled[i] = static_cast<float>(std::ldexp(wide[i], -exponent));
    }
    alignas(64) float buckets[kFoldBuckets] = {};
    double lanes[kSimLanes] = {};
    fold(reinterpret_cast<const std::byte*>(scaled.data()),
         plan(cols_ * sizeof(float), sizeof(float)), kernels().similarity.f32.fold, sizeof(float),
         buckets, lanes);
    const double squares = sum_lanes(lanes);
    // 0 means a zero block; rounding the largest elements to f32 may lead beyond the last number.
    rms = std::clamp(std::ldexp(std::sqrt(squares / static_cast<double>(wide.size())), exponent),
                     std::numeric_limits<double>::denorm_min(), std::numeric_limits<double>::max());
    finish(buckets, squares, out);
    return Kind::normal;
}

}  // namespace pydedup::similarity
