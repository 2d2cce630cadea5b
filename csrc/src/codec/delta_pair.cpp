// SPDX-License-Identifier: Apache-2.0
// Blocks and bases as contiguous elements of one dtype, and their differences.
#include "codec/delta_pair.hpp"

#include <array>
#include <bit>
#include <cstring>
#include <string>
#include <type_traits>

#include "codec/convert.hpp"
#include "codec/delta_step.hpp"
#include "codec/transposed.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/error.hpp"

namespace pydedup::detail {
namespace {

bool is_dense(const MatrixRef& matrix) noexcept {
    return matrix.rows == 1 || matrix.stride_bytes == matrix.cols * item_bytes(matrix.dtype);
}

// A copy, its rows one behind the other. They are asked for ahead: the processor foresees none that
// lie far apart.
const std::uint8_t* copied(const MatrixRef& matrix, std::uint8_t* room) noexcept {
    constexpr std::size_t kAhead = 8;
    constexpr std::size_t kLine = 64;
    const std::size_t row_bytes = matrix.cols * item_bytes(matrix.dtype);
    for (std::size_t r = 0; r < matrix.rows; ++r) {
        if (r + kAhead < matrix.rows) {
            const std::byte* const next = matrix.data + (r + kAhead) * matrix.stride_bytes;
            for (std::size_t at = 0; at < row_bytes; at += kLine) __builtin_prefetch(next + at);
        }
        std::memcpy(room + r * row_bytes, matrix.data + r * matrix.stride_bytes, row_bytes);
    }
    return room;
}

bool is_wide(Dtype dtype) noexcept { return item_bytes(dtype) == 8; }

template <class Wide>
std::size_t count_changed(const Wide* z, std::size_t count) noexcept {
    std::size_t changed = 0;
    for (std::size_t i = 0; i < count; ++i) changed += z[i] != 0 ? 1 : 0;
    return changed;
}

template <class Word>
std::size_t count_equal(const std::uint8_t* a, const std::uint8_t* b, std::size_t count) noexcept {
    std::size_t equal = 0;
    for (std::size_t i = 0; i < count; ++i) {
        Word of_a;
        Word of_b;
        std::memcpy(&of_a, a + i * sizeof(Word), sizeof(Word));
        std::memcpy(&of_b, b + i * sizeof(Word), sizeof(Word));
        equal += of_a == of_b ? 1 : 0;
    }
    return equal;
}

template <class Wide>
unsigned shift_out(Wide* z, std::size_t count, std::uint64_t all) noexcept {
    const auto shift = static_cast<unsigned>(std::countr_zero(static_cast<Wide>(all)));
    using Signed = std::make_signed_t<Wide>;
    for (std::size_t i = 0; i < count; ++i) {
        const Wide value = (z[i] >> 1) ^ (Wide{0} - (z[i] & 1));
        const auto shifted = static_cast<Signed>(value) >> shift;
        z[i] =
            static_cast<Wide>(shifted) << 1 ^ static_cast<Wide>(shifted >> (8 * sizeof(Wide) - 1));
    }
    return shift;
}

}  // namespace

void check_pair(const MatrixRef& block, const MatrixRef& base, bool is_transposed) {
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    if (block.rows == 0 || row_bytes == 0 || block.rows > UINT32_MAX || block.cols > UINT32_MAX ||
        block.rows > UINT32_MAX / row_bytes) {
        throw Error(
            ErrorCode::invalid_argument,
            "a block of " + std::to_string(block.rows) + " x " + std::to_string(block.cols) +
                " elements cannot be a delta: it must have an element and stay below 4 GiB");
    }
    const bool fits = is_transposed ? base.rows == block.cols && base.cols == block.rows
                                    : base.rows == block.rows && base.cols == block.cols;
    if (!fits) {
        throw Error(ErrorCode::invalid_argument,
                    std::string("a delta has the shape of its base") +
                        (is_transposed ? ", transposed" : "") + ": the block has " +
                        std::to_string(block.rows) + " x " + std::to_string(block.cols) +
                        " elements, the base " + std::to_string(base.rows) + " x " +
                        std::to_string(base.cols));
    }
    if (!converts(base.dtype, block.dtype)) {
        throw Error(ErrorCode::invalid_argument,
                    "a base of dtype code " + std::to_string(static_cast<unsigned>(base.dtype)) +
                        " cannot become dtype code " +
                        std::to_string(static_cast<unsigned>(block.dtype)) +
                        "; only f64, f32, f16 and bf16 are converted");
    }
}

void check_error(std::optional<double> max_rel_error) {
    if (max_rel_error && !(*max_rel_error > 0 && *max_rel_error < 1)) {
        throw Error(ErrorCode::invalid_argument, "max_rel_error must be above 0 and below 1, got " +
                                                     std::to_string(*max_rel_error));
    }
}

std::uint32_t check_of(const std::uint8_t* base, std::size_t rows, std::size_t row_bytes) {
    std::array<std::uint64_t, 2> digest{};
    kernels().hash.hash_rows(base, rows, row_bytes, row_bytes, 0, digest.data());
    return static_cast<std::uint32_t>(digest[0]);
}

PairOf::PairOf(const MatrixRef& block, const MatrixRef& base, const BaseMoves& moves) {
    const std::size_t count = block.rows * block.cols;
    const std::size_t base_item = item_bytes(base.dtype);
    const std::size_t item = item_bytes(block.dtype);
    const std::size_t for_block = is_dense(block) ? 0 : count * item;
    const std::size_t for_base = count * base_item;
    const std::size_t converted = base.dtype == block.dtype ? 0 : count * item;
    const std::size_t transposed = moves.is_transposed ? for_base : 0;
    memory_ = std::make_unique_for_overwrite<std::uint8_t[]>(for_block + converted + for_base +
                                                             transposed);
    std::uint8_t* const of_base = memory_.get() + for_block + converted;
    std::uint8_t* const as_given = of_base + transposed;
    const std::uint32_t check = check_of(copied(base, as_given), base.rows, base.cols * base_item);
    if (moves.is_transposed) transpose(as_given, base.rows, base.cols, base_item, of_base);
    pair = {block.rows,
            block.cols,
            block.dtype,
            is_dense(block) ? reinterpret_cast<const std::uint8_t*>(block.data)
                            : copied(block, memory_.get()),
            of_base,
            base.dtype,
            check};
    if (converted != 0) {
        convert_floats(of_base, base.dtype, count, of_base - converted, block.dtype);
        pair.base = of_base - converted;
    }
    if (moves.low_rank != nullptr) {
        auto* const moved = const_cast<std::uint8_t*>(pair.base);  // into the copy itself
        add_low_rank(*moves.low_rank, pair.base, block.rows, block.cols, block.dtype, moved);
    }
}

MaskedPair::MaskedPair(const Pair& of) : pair(of) {
    const DeltaLayout layout = delta_layout(of.dtype);
    mask = find_zeros(of.block, of.base, of.count(), layout);
    if (!mask) return;
    base_ = std::make_unique_for_overwrite<std::uint8_t[]>(of.count() * layout.item_bytes);
    apply_mask(*mask, of.base, of.count(), layout, base_.get());
    pair.base = base_.get();
    pair.masked = true;
}

bool masks_win(Dtype dtype, std::optional<double> max_rel_error) noexcept {
    return !max_rel_error && delta_layout(dtype).mantissa_bits != 0;
}

bool keeps_many(const Pair& pair) noexcept {
    constexpr std::size_t kOneOf = 8;
    const auto count = [&]<class Word>(Word) {
        return count_equal<Word>(pair.block, pair.base, pair.count());
    };
    const std::size_t item = item_bytes(pair.dtype);
    const std::size_t kept = item == 8   ? count(std::uint64_t{})
                             : item == 4 ? count(std::uint32_t{})
                             : item == 2 ? count(std::uint16_t{})
                                         : count(std::uint8_t{});
    return kept >= pair.count() / kOneOf;
}

bool take_differences(const Pair& pair, std::optional<double> max_rel_error, const Room& room,
                      Coded& coded) {
    const CodecKernels& codec = kernels().codec;
    const DeltaLayout layout = delta_layout(pair.dtype);
    const std::size_t count = pair.count();
    bool wide = is_wide(pair.dtype);
    if (max_rel_error) {
        const Values block(pair.block, count, pair.dtype);
        const Values base(pair.base, count, pair.dtype);
        coded.step =
            find_step(block, base, *max_rel_error, codec, reinterpret_cast<std::uint32_t*>(room.z));
        if (!coded.step) return false;
        wide = false;
    } else {
        codec.delta.subtract(pair.block, pair.base, count, layout, room.z);
    }
    const std::uint64_t all = codec.delta.classify(room.z, count, wide, room.classes);
    if (!coded.step && all != 0 && (all & 1) == 0) {
        coded.shift = wide ? shift_out(reinterpret_cast<std::uint64_t*>(room.z), count, all)
                           : shift_out(reinterpret_cast<std::uint32_t*>(room.z), count, all);
        static_cast<void>(codec.delta.classify(room.z, count, wide, room.classes));
    }
    coded.differences = {pair.rows, pair.cols, layout,       pair.base,
                         room.z,    wide,      room.classes, pair.masked};
    coded.n_changed = wide ? count_changed(reinterpret_cast<const std::uint64_t*>(room.z), count)
                           : count_changed(reinterpret_cast<const std::uint32_t*>(room.z), count);
    return true;
}

void plan_pair(const Coded& coded, const Room& room, DeltaPlan& plan,
               std::optional<DeltaPlan>* like) {
    const CodecKernels& codec = kernels().codec;
    const PlanRoom of{room.symbols, room.contexts, room.features};
    if (like != nullptr && like->has_value() &&
        plan_alike(coded.differences, codec, of, **like, plan)) {
        return;
    }
    plan = {};
    plan_delta(coded.differences, coded.step ? RowScore::activity : RowScore::kind, codec, of,
               plan);
    if (like != nullptr) *like = plan;
}

}  // namespace pydedup::detail
