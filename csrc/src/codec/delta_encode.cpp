// SPDX-License-Identifier: Apache-2.0
// Blocks to deltas (docs/format.md, "Deltas"): the header, and behind it the form that is smallest.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "codec/convert.hpp"
#include "codec/delta_changed.hpp"
#include "codec/delta_encoder.hpp"
#include "codec/delta_listed.hpp"
#include "codec/delta_pair.hpp"
#include "codec/delta_step.hpp"
#include "codec/narrow.hpp"
#include "codec/zero_mask.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

using detail::Coded;
using detail::Codes;
using detail::DeltaForm;
using detail::DeltaPlan;
using detail::Differences;
using detail::ListedPlan;
using detail::Pair;
using detail::PairOf;
using detail::Room;
using detail::Sink;

// What versions above 1 say behind the header.
struct Extension {
    std::uint8_t version = 1;
    Sink bytes;
};

// What the listed form takes is known to some percent before it is written.
constexpr double kAbout = 1.02;

// Of the forms that all versions have, and of the one that fewer have, which there is for what is
// mostly 0.
struct Extensions {
    Extension of_all;
    Extension of_few;
};

void put_header(Sink& sink, DeltaForm form, Dtype base, unsigned shift, std::size_t count,
                std::uint32_t check, std::optional<double> step, const Extension& extension) {
    sink.insert(sink.end(), {extension.version, static_cast<std::uint8_t>(form),
                             static_cast<std::uint8_t>(base), static_cast<std::uint8_t>(shift)});
    const auto put = [&](auto value) {
        std::array<std::byte, sizeof value> bytes;
        store_le(bytes.data(), value);
        for (const std::byte byte : bytes) sink.push_back(static_cast<std::uint8_t>(byte));
    };
    put(static_cast<std::uint32_t>(count));
    put(check);
    if (step) put(std::bit_cast<std::uint64_t>(*step));
    sink.insert(sink.end(), extension.bytes.begin(), extension.bytes.end());
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
    for (const std::size_t n : bytes) total += detail::varint_bytes(n);
    if (total > limit) return false;
    for (const std::size_t n : bytes) detail::put_varint(sink, n);
    sink.insert(sink.end(), streams.begin(), streams.end());
    return true;
}

// The bytes of a delta, empty when it has more than `limit` or cannot be quantised.
Sink encode_pair(const Pair& pair, std::optional<double> max_rel_error, std::size_t limit,
                 std::optional<DeltaPlan>& like, const Extensions& extensions) {
    const std::size_t count = pair.count();
    const Room room(count, item_bytes(pair.dtype));
    Coded coded;
    if (!detail::take_differences(pair, max_rel_error, room, coded)) return {};
    Sink sink;
    sink.reserve(std::min(limit, count * item_bytes(pair.dtype)) + 64);
    const auto header = [&](DeltaForm form) {
        const bool is_of_all = form == DeltaForm::sparse || form == DeltaForm::coded;
        put_header(sink, form, pair.base_dtype, coded.shift, count, pair.check, coded.step,
                   is_of_all ? extensions.of_all : extensions.of_few);
    };
    Sink few;  // the smallest form for what is mostly 0
    const auto try_form = [&](DeltaForm form, const auto& write) {
        header(form);
        detail::with_numbers(coded.differences, write);
        if (few.empty() || sink.size() < few.size()) few.swap(sink);
        limit = std::min(limit, few.size());
        sink.clear();
    };
    if (coded.n_changed <= count / 16 + 1) {
        const std::size_t most = limit;
        try_form(DeltaForm::sparse,
                 [&](const auto* z) { put_sparse(sink, z, count, coded.n_changed); });
        if (coded.n_changed == 0) return few.size() <= most ? few : Sink{};
    }
    const bool has_lists = extensions.of_few.version == detail::kListedDeltaVersion;
    if (!has_lists && coded.n_changed <= count / 4) {
        try_form(DeltaForm::changed, [&](const auto* z) { detail::put_changed(sink, z, count); });
    }
    DeltaPlan plan;
    detail::plan_pair(coded, room, plan, &like);
    std::optional<ListedPlan> listed;
    if (has_lists && detail::may_be_listed(coded.n_changed, count) && detail::may_be_listed(plan)) {
        detail::with_numbers(coded.differences,
                             [&](const auto* z) { listed.emplace(z, count, coded.n_changed); });
    }
    header(DeltaForm::coded);
    // The coded form is not written to be thrown away.
    const std::size_t listed_bytes =
        listed ? sink.size() + static_cast<std::size_t>(listed->bytes() * kAbout) : limit;
    if (put_coded(sink, coded, plan, room, std::min(limit, listed_bytes))) return sink;
    sink.clear();
    const std::size_t most = limit;
    if (listed) {
        try_form(DeltaForm::listed, [&](const auto* z) { detail::put_listed(sink, z, *listed); });
    }
    return few.size() <= most ? few : Sink{};
}

}  // namespace

namespace detail {

// Not in the class: the compiler would fill all of the plans that are not there with zeros.
DeltaEncoder::DeltaEncoder() = default;

// Behind a mask, if one helps. `dtype` is the block's, of which the pair's may be a narrower one;
// `moved` is what there is to say of the base.
Sink DeltaEncoder::encode_smaller(const Pair& pair, Dtype dtype,
                                  std::optional<double> max_rel_error, std::size_t limit,
                                  const Moved& moved) {
    const auto extensions = [&](const std::optional<ZeroMask>& mask) {
        Sink more;
        more.reserve(1 + moved.bytes.size());
        more.push_back(static_cast<std::uint8_t>(pair.dtype));
        more.insert(more.end(), moved.bytes.begin(), moved.bytes.end());
        put_mask(more, mask, delta_layout(pair.dtype));
        if (moved.version != 0) return Extensions{{moved.version, more}, {moved.version, more}};
        const Extension of_few{kListedDeltaVersion, more};
        if (pair.dtype == dtype && !mask) return Extensions{{}, of_few};
        return Extensions{{kExtendedDeltaVersion, more}, of_few};
    };
    Sink best;
    if (const MaskedPair masked(pair); masked.mask) {
        best =
            encode_pair(masked.pair, max_rel_error, limit,
                        max_rel_error ? quantised_masked_ : exact_masked_, extensions(masked.mask));
        if (!best.empty() && masks_win(pair.dtype, max_rel_error)) return best;
        if (!best.empty()) limit = best.size() - 1;
    }
    Sink plain = encode_pair(pair, max_rel_error, limit, max_rel_error ? quantised_ : exact_,
                             extensions(std::nullopt));
    if (plain.empty()) return best;
    return plain;
}

std::optional<EncodedBlock> DeltaEncoder::encode(const MatrixRef& block, const MatrixRef& base,
                                                 std::optional<double> max_rel_error,
                                                 std::span<std::byte> out, const BaseMoves& moves) {
    check_pair(block, base, moves.is_transposed);
    check_error(max_rel_error);
    if (moves.low_rank != nullptr) {
        check_low_rank(*moves.low_rank, block.rows, block.cols);
        if (!can_quantise(block.dtype)) {
            throw Error(ErrorCode::invalid_argument,
                        "only f64, f32, f16 and bf16 have deltas with factors, not dtype code " +
                            std::to_string(static_cast<unsigned>(block.dtype)));
        }
    }
    const std::size_t raw = block.rows * block.cols * item_bytes(block.dtype);
    // Factors do not count: a page may have them for many blocks.
    Moved moved;
    std::size_t besides = 0;
    if (moves.low_rank != nullptr) {
        moved.version = kLowRankDeltaVersion;
        besides = put_low_rank(moved.bytes, *moves.low_rank);
    }
    if (moves.is_transposed) {
        moved.version = kTransposedDeltaVersion;
        if (moves.low_rank == nullptr) put_no_low_rank(moved.bytes);
    }
    const std::size_t limit = std::min(out.size(), raw - 1 + besides);
    std::optional<PairOf> both;
    Sink best;
    Encoding encoding = Encoding::delta;
    if (max_rel_error && can_quantise(block.dtype)) {
        both.emplace(block, base, moves);
        best = encode_smaller(both->pair, block.dtype, max_rel_error, limit, moved);
        if (!best.empty()) encoding = Encoding::quantised;
    }
    // Exact where that is no larger: narrow floats have little to lose, and what stayed nothing.
    const std::optional<NarrowBlock> narrow = narrowed(block);
    const MatrixRef& exactly = narrow ? narrow->block : block;
    if (narrow || !both) both.emplace(exactly, base, moves);
    if (best.empty() || best.size() > exactly.rows * exactly.cols * item_bytes(exactly.dtype) / 4 ||
        (keeps_many(both->pair) && estimate_exact(both->pair) < best.size())) {
        Sink exact = encode_smaller(both->pair, block.dtype, std::nullopt,
                                    best.empty() ? limit : best.size(), moved);
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
    detail::DeltaEncoder encoder;
    return encoder.encode(block, base, max_rel_error, out);
}

}  // namespace pydedup
