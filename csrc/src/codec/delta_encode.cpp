// SPDX-License-Identifier: Apache-2.0
// Blocks to deltas (docs/format.md, "Deltas"): the header, and behind it the sparse or the coded
// form, whichever is smaller. And how large a delta would become, from a part of the elements.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "codec/convert.hpp"
#include "codec/delta_encoder.hpp"
#include "codec/delta_pair.hpp"
#include "codec/delta_step.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/codec.hpp"

namespace pydedup {
namespace {

using detail::Coded;
using detail::Codes;
using detail::DeltaForm;
using detail::DeltaPlan;
using detail::Differences;
using detail::Pair;
using detail::PairOf;
using detail::Room;
using detail::Sink;

void put_header(Sink& sink, DeltaForm form, Dtype base, unsigned shift, std::size_t count,
                std::uint32_t check, std::optional<double> step) {
    sink.insert(sink.end(), {detail::kDeltaVersion, static_cast<std::uint8_t>(form),
                             static_cast<std::uint8_t>(base), static_cast<std::uint8_t>(shift)});
    const auto put = [&](auto value) {
        std::array<std::byte, sizeof value> bytes;
        store_le(bytes.data(), value);
        for (const std::byte byte : bytes) sink.push_back(static_cast<std::uint8_t>(byte));
    };
    put(static_cast<std::uint32_t>(count));
    put(check);
    if (step) put(std::bit_cast<std::uint64_t>(*step));
}

template <class Wide>
void put_sparse(Sink& sink, const Wide* z, std::size_t count, std::size_t n_changed) {
    detail::put_varint(sink, n_changed);
    std::size_t next = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (z[i] == 0) continue;
        detail::put_varint(sink, i - next);
        detail::put_varint(sink, z[i]);
        next = i + 1;
    }
}

void put_changed(Sink& sink, const Coded& coded) {
    const Differences& d = coded.differences;
    if (d.wide) {
        put_sparse(sink, static_cast<const std::uint64_t*>(d.z), d.count(), coded.n_changed);
    } else {
        put_sparse(sink, static_cast<const std::uint32_t*>(d.z), d.count(), coded.n_changed);
    }
}

std::size_t varint_bytes(std::uint64_t value) noexcept {
    return (static_cast<std::size_t>(std::bit_width(value | 1)) + 6) / 7;
}

// Appends the coded form unless the whole would have more than `limit` bytes.
bool put_coded(Sink& sink, const Coded& coded, const DeltaPlan& plan, const Room& room,
               std::size_t limit) {
    const DeltaKernels& delta = kernels().codec.delta;
    const Differences& d = coded.differences;
    const std::size_t count = d.count();
    Codes codes;
    const std::uint64_t symbol_bits = detail::plan_codes(plan, codes);
    detail::put_contexts(sink, plan.contexts, d.rows);
    detail::put_alphabet(sink, plan.alphabet);
    detail::put_code_bits(sink, codes);
    const std::uint64_t least = (symbol_bits + 7) / 8 + (plan.raw_bits + 7) / 8;
    if (sink.size() + least > limit) return false;
    std::vector<std::uint32_t> table;
    detail::make_codes(codes, table);
    // Stores run ahead by 8 bytes, and each stream may end with a byte that is not full.
    Sink streams(static_cast<std::size_t>(least) + 5 + 16);
    std::uint8_t* to = streams.data();
    std::array<std::size_t, 4> bytes{};
    const std::size_t step = (count + 3) / 4;
    for (std::size_t j = 0; j < 4; ++j) {
        const std::size_t begin = std::min(count, j * step);
        const std::size_t end = std::min(count, begin + step);
        std::uint8_t* const from = to;
        to = delta.write_symbols(room.symbols + begin, room.contexts + begin, end - begin,
                                 table.data(), to);
        bytes[j] = static_cast<std::size_t>(to - from);
    }
    to = delta.write_raw(d.z, room.symbols, count, d.wide, plan.alphabet.widths.data(), to);
    streams.resize(static_cast<std::size_t>(to - streams.data()));
    std::size_t total = sink.size() + streams.size();
    for (const std::size_t n : bytes) total += varint_bytes(n);
    if (total > limit) return false;
    for (const std::size_t n : bytes) detail::put_varint(sink, n);
    sink.insert(sink.end(), streams.begin(), streams.end());
    return true;
}

// The bytes of a delta, empty when it has more than `limit` or cannot be quantised.
Sink encode_pair(const Pair& pair, std::optional<double> max_rel_error, std::size_t limit,
                 std::optional<DeltaPlan>& like) {
    const std::size_t count = pair.count();
    const Room room(count, item_bytes(pair.dtype));
    Coded coded;
    if (!detail::take_differences(pair, max_rel_error, room, coded)) return {};
    Sink sink;
    sink.reserve(std::min(limit, count * item_bytes(pair.dtype)) + 64);
    const auto header = [&](DeltaForm form) {
        put_header(sink, form, pair.base_dtype, coded.shift, count, pair.check, coded.step);
    };
    Sink sparse;
    if (coded.n_changed <= count / 16 + 1) {
        header(DeltaForm::sparse);
        put_changed(sink, coded);
        if (coded.n_changed == 0) return sink.size() <= limit ? sink : Sink{};
        sparse.swap(sink);
        limit = std::min(limit, sparse.size());
    }
    header(DeltaForm::coded);
    DeltaPlan plan;
    detail::plan_pair(coded, room, plan, &like);
    if (put_coded(sink, coded, plan, room, limit)) return sink;
    return sparse.size() <= limit ? sparse : Sink{};
}

}  // namespace

namespace detail {

std::optional<EncodedBlock> DeltaEncoder::encode(const MatrixRef& block, const MatrixRef& base,
                                                 std::optional<double> max_rel_error,
                                                 std::span<std::byte> out) {
    detail::check_pair(block, base);
    detail::check_error(max_rel_error);
    const std::size_t raw = block.rows * block.cols * item_bytes(block.dtype);
    const std::size_t limit = std::min(out.size(), raw - 1);
    const PairOf both(block, base);
    Sink best;
    Encoding encoding = Encoding::delta;
    if (max_rel_error && detail::can_quantise(block.dtype)) {
        best = encode_pair(both.pair, max_rel_error, limit, quantised_);
        if (!best.empty()) encoding = Encoding::quantised;
    }
    // Exact where that is no larger: narrow floats have little to lose.
    if (best.empty() || best.size() > raw / 4) {
        Sink exact =
            encode_pair(both.pair, std::nullopt, best.empty() ? limit : best.size(), exact_);
        if (!exact.empty()) {
            best = std::move(exact);
            encoding = Encoding::delta;
        }
    }
    if (best.empty()) return std::nullopt;
    std::memcpy(out.data(), best.data(), best.size());
    return EncodedBlock{encoding, static_cast<std::uint32_t>(best.size())};
}

}  // namespace detail

std::optional<EncodedBlock> encode_delta(const MatrixRef& block, const MatrixRef& base,
                                         std::optional<double> max_rel_error,
                                         std::span<std::byte> out) {
    return detail::DeltaEncoder().encode(block, base, max_rel_error, out);
}

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
    const auto memory = std::make_unique_for_overwrite<std::uint8_t[]>(n * (2 * item + base_item));
    std::uint8_t* const sampled = memory.get();
    std::uint8_t* const converted = sampled + n * item;
    std::uint8_t* const sampled_base = converted + n * item;
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
    detail::convert_floats(sampled_base, base.dtype, n, converted, block.dtype);
    const Pair pair{taken, run, block.dtype, sampled, converted, base.dtype, 0};
    const std::size_t raw = count * item;
    const Room room(n, item);
    Coded coded;
    const bool quantised = max_rel_error && detail::can_quantise(block.dtype) &&
                           detail::take_differences(pair, max_rel_error, room, coded);
    if (!quantised) {
        coded = {};
        static_cast<void>(detail::take_differences(pair, std::nullopt, room, coded));
    }
    const std::size_t fixed = detail::kDeltaHeaderBytes + (coded.step ? detail::kStepBytes : 0);
    if (coded.n_changed == 0) return std::min(fixed + 1, raw);
    DeltaPlan plan;
    detail::plan_pair(coded, room, plan);
    const double scale = static_cast<double>(count) / static_cast<double>(n);
    const double coded_bytes = static_cast<double>(plan.table_bits) / 8 + 16 +
                               static_cast<double>(plan.symbol_bits + plan.raw_bits) / 8 * scale;
    const double sparse_bytes =
        static_cast<double>(coded.n_changed) * (1.5 + static_cast<double>(item)) * scale;
    const auto estimate = fixed + static_cast<std::size_t>(std::min(coded_bytes, sparse_bytes));
    return std::min(estimate, raw);
}

}  // namespace pydedup
