// SPDX-License-Identifier: Apache-2.0
// How large a delta would become, from a part of the elements.
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "base/rounding.hpp"
#include "codec/delta_listed.hpp"
#include "codec/delta_pair.hpp"
#include "codec/delta_step.hpp"
#include "codec/narrow.hpp"
#include "pydedup/codec.hpp"

namespace pydedup {
namespace {

using detail::Coded;
using detail::DeltaPlan;
using detail::MaskedPair;
using detail::Pair;
using detail::PairOf;
using detail::Room;

// About how many bytes encode_pair() would write for all of a block, of which `pair` is a sample,
// one of `scale` elements; nullopt where it cannot be quantised.
std::optional<std::size_t> estimate_pair(const Pair& pair, std::optional<double> max_rel_error,
                                         double scale) {
    const std::size_t item = item_bytes(pair.dtype);
    const Room room(pair.count(), item);
    Coded coded;
    if (!detail::take_differences(pair, max_rel_error, room, coded)) return std::nullopt;
    const std::size_t fixed = detail::kDeltaHeaderBytes + (coded.step ? detail::kStepBytes : 0);
    if (coded.n_changed == 0) return fixed + 1;
    DeltaPlan plan;
    detail::plan_pair(coded, room, plan);
    const double coded_bytes = static_cast<double>(plan.table_bits) / 8 + 16 +
                               static_cast<double>(plan.symbol_bits + plan.raw_bits) / 8 * scale;
    const double sparse_bytes =
        static_cast<double>(coded.n_changed) * (1.5 + static_cast<double>(item)) * scale;
    double bytes = std::min(coded_bytes, sparse_bytes);
    if (detail::may_be_listed(coded.n_changed, pair.count()) && detail::may_be_listed(plan)) {
        detail::with_numbers(coded.differences, [&](const auto* z) {
            const detail::ListedPlan listed(z, pair.count(), coded.n_changed, scale);
            bytes = std::min(bytes, listed.bytes(scale));
        });
    }
    return fixed + static_cast<std::size_t>(bytes);
}

// Of the pair or the masked one, whichever is smaller.
std::optional<std::size_t> estimate_smaller(const Pair& pair, std::optional<double> max_rel_error,
                                            double scale) {
    std::optional<std::size_t> behind;
    if (const MaskedPair masked(pair); masked.mask) {
        behind = estimate_pair(masked.pair, max_rel_error, scale);
        const auto bits = static_cast<double>(detail::mask_bits(*masked.mask, pair.count()));
        if (behind) *behind += static_cast<std::size_t>(bits * scale / 8);
        if (behind && detail::masks_win(pair.dtype, max_rel_error)) return behind;
    }
    const std::optional<std::size_t> plain = estimate_pair(pair, max_rel_error, scale);
    return plain && behind ? std::min(*plain, *behind) : plain ? plain : behind;
}

}  // namespace

std::size_t estimate_delta(const MatrixRef& block, const MatrixRef& base,
                           std::optional<double> max_rel_error) {
    detail::check_pair(block, base);
    detail::check_error(max_rel_error);
    // Every fourth row, or run of 64 elements where there are few rows.
    constexpr std::size_t kEvery = 4;
    constexpr std::size_t kEnough = 1024;
    constexpr std::size_t kRun = 64;
    const std::size_t count = block.rows * block.cols;
    const std::size_t item = item_bytes(block.dtype);
    const std::size_t base_item = item_bytes(base.dtype);
    const bool all = count < kEvery * kEnough || (block.rows < 4 * kEvery && block.cols < 4 * kRun);
    const bool by_rows = all || block.rows >= 4 * kEvery;
    const std::size_t every = all ? 1 : kEvery;
    const std::size_t run = by_rows ? block.cols : kRun;
    const std::size_t runs_a_row = by_rows ? 1 : block.cols / kRun;
    const std::size_t n_runs = block.rows * runs_a_row;
    const std::size_t taken = detail::ceil_div(n_runs, every);
    const std::size_t n = taken * run;
    const auto memory = std::make_unique_for_overwrite<std::uint8_t[]>(n * (item + base_item));
    std::uint8_t* const sampled = memory.get();
    std::uint8_t* const sampled_base = sampled + n * item;
    for (std::size_t i = 0; i < taken; ++i) {
        // One of each `every`, but no fixed one: rows may differ by a period.
        const std::size_t skip = static_cast<std::uint32_t>(i * 0x9E3779B1U) >> 16;
        const std::size_t chosen = std::min(i * every + skip % every, n_runs - 1);
        const std::size_t row = chosen / runs_a_row;
        const std::size_t col = chosen % runs_a_row * run;
        std::memcpy(sampled + i * run * item, block.data + row * block.stride_bytes + col * item,
                    run * item);
        std::memcpy(sampled_base + i * run * base_item,
                    base.data + row * base.stride_bytes + col * base_item, run * base_item);
    }
    const auto matrix = [&](const std::uint8_t* of, Dtype dtype) {
        return MatrixRef{reinterpret_cast<const std::byte*>(of), taken, run,
                         run * item_bytes(dtype), dtype};
    };
    const MatrixRef of_block = matrix(sampled, block.dtype);
    const MatrixRef of_base = matrix(sampled_base, base.dtype);
    const double scale = static_cast<double>(count) / static_cast<double>(n);
    std::optional<std::size_t> bytes;
    std::optional<PairOf> both;
    if (max_rel_error && detail::can_quantise(block.dtype)) {
        both.emplace(of_block, of_base);
        bytes = estimate_smaller(both->pair, max_rel_error, scale);
    }
    const std::optional<detail::NarrowBlock> narrow = detail::narrowed(of_block);
    if (narrow || !both) both.emplace(narrow ? narrow->block : of_block, of_base);
    if (!bytes || detail::keeps_many(both->pair)) {
        const std::optional<std::size_t> exact = estimate_smaller(both->pair, std::nullopt, scale);
        if (exact) bytes = std::min(*exact, bytes.value_or(*exact));
    }
    return std::min(bytes.value_or(count * item), count * item);
}

namespace detail {

std::size_t estimate_exact(const Pair& pair) {
    const auto matrix = [&](const std::uint8_t* of) {
        return MatrixRef{reinterpret_cast<const std::byte*>(of), pair.rows, pair.cols,
                         pair.cols * item_bytes(pair.dtype), pair.dtype};
    };
    return estimate_delta(matrix(pair.block), matrix(pair.base), std::nullopt);
}

}  // namespace detail

}  // namespace pydedup
