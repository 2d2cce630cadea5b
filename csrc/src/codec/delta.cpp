// SPDX-License-Identifier: Apache-2.0
// Blocks as differences to a base (docs/format.md, "Deltas"): the frames around plan, codes and
// streams. Stateless; each thread keeps memory for blocks of usual size.
#include "codec/delta.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "base/endian.hpp"
#include "codec/convert.hpp"
#include "codec/delta_model.hpp"
#include "codec/delta_plan.hpp"
#include "codec/delta_step.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace detail {

Room::Room(std::size_t count, std::size_t item) {
    const std::size_t wide = item == 8 ? 8 : 4;
    const std::size_t values = count * 8 + 64;
    const auto rounded = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    const std::array<std::size_t, 7> sizes = {
        rounded(count * item), rounded(values), rounded(count * wide), rounded(count),
        rounded(count),        rounded(count),  rounded(count)};
    std::size_t total = 64;
    for (const std::size_t size : sizes) total += size;
    std::uint8_t* at = nullptr;
    if (total > kKept) {
        own_ = std::make_unique_for_overwrite<std::uint8_t[]>(total);
        at = own_.get();
    } else {
        thread_local std::unique_ptr<std::uint8_t[]> kept;
        if (!kept) kept = std::make_unique_for_overwrite<std::uint8_t[]>(kKept);
        at = kept.get();
    }
    at += (64 - reinterpret_cast<std::uintptr_t>(at) % 64) % 64;
    std::array<std::uint8_t*, 7> parts{};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        parts[i] = at;
        at += sizes[i];
    }
    block = parts[0];
    values_of = parts[1];
    z = parts[2];
    classes = parts[3];
    symbols = parts[4];
    contexts = parts[5];
    features = parts[6];
}

}  // namespace detail

namespace {

using detail::Codes;
using detail::DeltaForm;
using detail::DeltaPlan;
using detail::Differences;
using detail::Room;
using detail::RowScore;
using detail::Sink;
using detail::Source;

const std::uint8_t* bytes_at(const std::byte* at) noexcept {
    return reinterpret_cast<const std::uint8_t*>(at);
}

[[noreturn]] void corrupt(const BlockView& block, const std::string& what) {
    throw Error(ErrorCode::corrupt_page, "a delta of " + std::to_string(block.rows) + " x " +
                                             std::to_string(block.cols) +
                                             " elements does not decode: " + what);
}

bool is_dense(const MatrixRef& matrix) noexcept {
    return matrix.rows == 1 || matrix.stride_bytes == matrix.cols * item_bytes(matrix.dtype);
}

// A copy, its rows one behind the other.
const std::uint8_t* copied(const MatrixRef& matrix, std::uint8_t* room) noexcept {
    const std::size_t row_bytes = matrix.cols * item_bytes(matrix.dtype);
    for (std::size_t r = 0; r < matrix.rows; ++r) {
        std::memcpy(room + r * row_bytes, matrix.data + r * matrix.stride_bytes, row_bytes);
    }
    return room;
}

std::uint32_t check_of(const std::uint8_t* base, std::size_t rows, std::size_t row_bytes) {
    std::array<std::uint64_t, 2> digest{};
    kernels().hash.hash_rows(base, rows, row_bytes, row_bytes, 0, digest.data());
    return static_cast<std::uint32_t>(digest[0]);
}

bool is_wide(Dtype dtype) noexcept { return item_bytes(dtype) == 8; }

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
std::size_t count_changed(const Wide* z, std::size_t count) noexcept {
    std::size_t changed = 0;
    for (std::size_t i = 0; i < count; ++i) changed += z[i] != 0 ? 1 : 0;
    return changed;
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

// A block that is to be a delta, with what its base gives for it.
struct Pair {
    std::size_t rows;
    std::size_t cols;
    Dtype dtype;
    const std::uint8_t* block;  // rows * cols elements
    const std::uint8_t* base;   // the same, of the block's dtype
    Dtype base_dtype;
    std::uint32_t check;

    [[nodiscard]] std::size_t count() const noexcept { return rows * cols; }
};

struct Coded {
    Differences differences;
    unsigned shift = 0;
    std::optional<double> step;
    std::size_t n_changed = 0;
};

// Differences of a pair into room.z and room.classes; the exact ones, or quantised. False when they
// cannot be quantised.
bool take_differences(const Pair& pair, std::optional<double> max_rel_error, const Room& room,
                      Coded& coded) {
    const CodecKernels& codec = kernels().codec;
    const DeltaLayout layout = detail::delta_layout(pair.dtype);
    const std::size_t count = pair.count();
    bool wide = is_wide(pair.dtype);
    if (max_rel_error) {
        const detail::Values values(pair.block, pair.base, count, pair.dtype);
        coded.step = detail::find_step(values, *max_rel_error, codec,
                                       reinterpret_cast<std::uint32_t*>(room.z));
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
    coded.differences = {pair.rows, pair.cols, layout, pair.base, room.z, wide, room.classes};
    coded.n_changed = wide ? count_changed(reinterpret_cast<const std::uint64_t*>(room.z), count)
                           : count_changed(reinterpret_cast<const std::uint32_t*>(room.z), count);
    return true;
}

void plan_pair(const Coded& coded, const Room& room, DeltaPlan& plan) {
    detail::plan_delta(coded.differences, coded.step ? RowScore::activity : RowScore::kind,
                       kernels().codec, {room.symbols, room.contexts, room.features}, plan);
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
Sink encode_pair(const Pair& pair, std::optional<double> max_rel_error, std::size_t limit) {
    const std::size_t count = pair.count();
    const Room room(count, item_bytes(pair.dtype));
    Coded coded;
    if (!take_differences(pair, max_rel_error, room, coded)) return {};
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
    plan_pair(coded, room, plan);
    if (put_coded(sink, coded, plan, room, limit)) return sink;
    return sparse.size() <= limit ? sparse : Sink{};
}

void check_pair(const MatrixRef& block, const MatrixRef& base) {
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    if (block.rows == 0 || row_bytes == 0 || block.rows > UINT32_MAX || block.cols > UINT32_MAX ||
        block.rows > UINT32_MAX / row_bytes) {
        throw Error(
            ErrorCode::invalid_argument,
            "a block of " + std::to_string(block.rows) + " x " + std::to_string(block.cols) +
                " elements cannot be a delta: it must have an element and stay below 4 GiB");
    }
    if (base.rows != block.rows || base.cols != block.cols) {
        throw Error(ErrorCode::invalid_argument,
                    "a delta has the shape of its base: the block has " +
                        std::to_string(block.rows) + " x " + std::to_string(block.cols) +
                        " elements, the base " + std::to_string(base.rows) + " x " +
                        std::to_string(base.cols));
    }
    if (!detail::converts(base.dtype, block.dtype)) {
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

// Contiguous copies where they are needed, and the memory for them. The base is always copied: it
// is looked at again and again, and must be the same each time, also when somebody writes into it
// meanwhile; else a code may lack a symbol that is then written.
class PairOf {
  public:
    PairOf(const MatrixRef& block, const MatrixRef& base) {
        const std::size_t count = block.rows * block.cols;
        const std::size_t base_item = item_bytes(base.dtype);
        const std::size_t item = item_bytes(block.dtype);
        const std::size_t for_block = is_dense(block) ? 0 : count * item;
        const std::size_t for_base = count * base_item;
        const std::size_t converted = base.dtype == block.dtype ? 0 : count * item;
        memory_ = std::make_unique_for_overwrite<std::uint8_t[]>(for_block + for_base + converted);
        std::uint8_t* const of_base = memory_.get() + for_block + converted;
        const std::uint8_t* from = copied(base, of_base);
        pair = {block.rows,
                block.cols,
                block.dtype,
                is_dense(block) ? bytes_at(block.data) : copied(block, memory_.get()),
                from,
                base.dtype,
                check_of(from, base.rows, base.cols * base_item)};
        if (converted != 0) {
            detail::convert_floats(from, base.dtype, count, of_base - converted, block.dtype);
            pair.base = of_base - converted;
        }
    }
    Pair pair;

  private:
    std::unique_ptr<std::uint8_t[]> memory_;
};

}  // namespace

std::optional<EncodedBlock> encode_delta(const MatrixRef& block, const MatrixRef& base,
                                         std::optional<double> max_rel_error,
                                         std::span<std::byte> out) {
    check_pair(block, base);
    check_error(max_rel_error);
    const std::size_t raw = block.rows * block.cols * item_bytes(block.dtype);
    const std::size_t limit = std::min(out.size(), raw - 1);
    const PairOf both(block, base);
    Sink best;
    Encoding encoding = Encoding::delta;
    if (max_rel_error && detail::can_quantise(block.dtype)) {
        best = encode_pair(both.pair, max_rel_error, limit);
        if (!best.empty()) encoding = Encoding::quantised;
    }
    // Exact where that is no larger: narrow floats have little to lose.
    if (best.empty() || best.size() > raw / 4) {
        Sink exact = encode_pair(both.pair, std::nullopt, best.empty() ? limit : best.size());
        if (!exact.empty()) {
            best = std::move(exact);
            encoding = Encoding::delta;
        }
    }
    if (best.empty()) return std::nullopt;
    std::memcpy(out.data(), best.data(), best.size());
    return EncodedBlock{encoding, static_cast<std::uint32_t>(best.size())};
}

std::size_t estimate_delta(const MatrixRef& block, const MatrixRef& base,
                           std::optional<double> max_rel_error) {
    check_pair(block, base);
    check_error(max_rel_error);
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
    const std::size_t taken = (n_runs + every - 1) / every;
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
                           take_differences(pair, max_rel_error, room, coded);
    if (!quantised) {
        coded = {};
        static_cast<void>(take_differences(pair, std::nullopt, room, coded));
    }
    const std::size_t fixed = detail::kDeltaHeaderBytes + (coded.step ? detail::kStepBytes : 0);
    if (coded.n_changed == 0) return std::min(fixed + 1, raw);
    DeltaPlan plan;
    plan_pair(coded, room, plan);
    const double scale = static_cast<double>(count) / static_cast<double>(n);
    const double coded_bytes = static_cast<double>(plan.table_bits) / 8 + 16 +
                               static_cast<double>(plan.symbol_bits + plan.raw_bits) / 8 * scale;
    const double sparse_bytes =
        static_cast<double>(coded.n_changed) * (1.5 + static_cast<double>(item)) * scale;
    const auto estimate = fixed + static_cast<std::size_t>(std::min(coded_bytes, sparse_bytes));
    return std::min(estimate, raw);
}

namespace {

template <class Wide>
const char* get_sparse(Source& source, std::size_t count, unsigned value_bits, Wide* z) {
    std::memset(z, 0, count * sizeof(Wide));
    const std::uint64_t n_changed = source.varint();
    if (source.failed) return "it has no list of changes";
    std::size_t next = 0;
    for (std::uint64_t i = 0; i < n_changed; ++i) {
        const std::uint64_t gap = source.varint();
        const std::uint64_t value = source.varint();
        if (source.failed) return "its list of changes is cut off";
        if (gap >= count - next) return "a change lies behind its end";
        if (value == 0 || (value_bits < 64 && value >> value_bits != 0)) {
            return "a change has an impossible value";
        }
        z[next + gap] = static_cast<Wide>(value);
        next += gap + 1;
    }
    return source.left.empty() ? nullptr : "bytes are left over";
}

const char* get_coded(Source& source, const BlockView& block, DeltaLayout layout,
                      unsigned value_bits, bool wide, const std::uint8_t* base,
                      const std::uint8_t* readable_end, const Room& room) {
    const CodecKernels& codec = kernels().codec;
    const std::size_t count = std::size_t{block.rows} * block.cols;
    detail::Contexts contexts;
    if (const char* wrong = detail::get_contexts(source, block.rows, layout, contexts)) {
        return wrong;
    }
    detail::Alphabet alphabet;
    if (const char* wrong = detail::get_alphabet(source, value_bits, alphabet)) return wrong;
    Codes codes;
    if (const char* wrong =
            detail::get_code_bits(source, contexts.n_contexts, alphabet.n_symbols(), codes)) {
        return wrong;
    }
    const unsigned table_bits = detail::longest_code(codes);
    thread_local std::vector<std::uint16_t> table;
    if (!detail::make_read_table(codes, table_bits, table)) {
        return "a code is not a complete prefix code";
    }
    HuffmanStreams streams{};
    std::array<std::uint64_t, 4> bytes{};
    for (std::uint64_t& n : bytes) n = source.varint();
    if (source.failed) return "it has no stream sizes";
    for (std::size_t j = 0; j < 4; ++j) {
        if (bytes[j] > source.left.size()) return "its streams are longer than it";
        streams.begin[j] = source.take(static_cast<std::size_t>(bytes[j])).data();
    }
    streams.end = readable_end;
    streams.table = table.data();
    streams.table_bits = table_bits;
    detail::assign_contexts(contexts, base, block.rows, block.cols, layout, codec, room.features,
                            room.contexts);
    std::array<std::uint64_t, 4> consumed{};
    codec.delta.read_symbols(streams, room.contexts, count, room.symbols, consumed.data());
    for (std::size_t j = 0; j < 4; ++j) {
        if ((consumed[j] + 7) / 8 != bytes[j]) return "a stream does not end where it should";
        const auto padding = static_cast<unsigned>(8 * bytes[j] - consumed[j]);
        if (padding != 0 && (streams.begin[j][bytes[j] - 1] & ((1U << padding) - 1)) != 0) {
            return "a stream ends with stray bits";
        }
    }
    // A context without a code may still be asked for: its table says symbol 0.
    const std::uint64_t raw_bits =
        codec.delta.read_raw(source.left.data(), source.left.size(), room.symbols, count, wide,
                             alphabet.bases.data(), alphabet.widths.data(), room.z);
    if (raw_bits == UINT64_MAX || (raw_bits + 7) / 8 != source.left.size()) {
        return "its raw bits do not end where they should";
    }
    if (raw_bits % 8 != 0 && source.left.back() >> (raw_bits % 8) != 0) {
        return "its raw bits end with stray bits";
    }
    return nullptr;
}

// The base's elements as those of the delta's dtype; `memory` holds them where they had to be
// decoded or converted. What the header says of the base is checked on the way.
const std::uint8_t* base_elements(const BlockView& delta, const BlockView& base,
                                  std::uint32_t check, std::unique_ptr<std::uint8_t[]>& memory) {
    const std::size_t count = std::size_t{base.rows} * base.cols;
    const std::size_t base_bytes = count * item_bytes(base.dtype);
    const bool convert = base.dtype != delta.dtype;
    const bool decode = base.encoding != Encoding::raw;
    const std::size_t converted_bytes = convert ? count * item_bytes(delta.dtype) : 0;
    const std::uint8_t* from = bytes_at(base.data);
    if (convert || decode) {
        memory = std::make_unique_for_overwrite<std::uint8_t[]>(converted_bytes +
                                                                (decode ? base_bytes : 0));
    }
    if (decode) {
        std::uint8_t* const to = memory.get() + converted_bytes;
        decode_block(base, reinterpret_cast<std::byte*>(to), base.row_bytes());
        from = to;
    } else if (base.length != base_bytes) {
        corrupt(delta, "its base has a length that is not that of its shape");
    }
    if (check_of(from, base.rows, base.row_bytes()) != check) {
        corrupt(delta, "this is not the base that it was made from");
    }
    if (!convert) return from;
    detail::convert_floats(from, base.dtype, count, memory.get(), delta.dtype);
    return memory.get();
}

}  // namespace

void decode_delta(const BlockView& delta, const BlockView& base, std::byte* dst,
                  std::size_t dst_stride_bytes) {
    const std::size_t item = item_bytes(delta.dtype);
    const std::uint64_t count = std::uint64_t{delta.rows} * delta.cols;
    if (item == 0 || count == 0 || count > UINT32_MAX / item) {
        corrupt(delta, "its dtype or shape is impossible");
    }
    if (dst_stride_bytes < delta.row_bytes()) {
        throw Error(ErrorCode::invalid_argument, "a block's rows do not fit the given stride");
    }
    const bool quantised = delta.encoding == Encoding::quantised;
    if (!quantised && delta.encoding != Encoding::delta) corrupt(delta, "it is not a delta");
    if (base.encoding != Encoding::raw && base.encoding != Encoding::planes) {
        corrupt(delta, "its base is a delta itself");
    }
    if (base.rows != delta.rows || base.cols != delta.cols) {
        corrupt(delta, "its base has " + std::to_string(base.rows) + " x " +
                           std::to_string(base.cols) + " elements");
    }
    Source source{{bytes_at(delta.data), delta.length}};
    const std::size_t header = detail::kDeltaHeaderBytes + (quantised ? detail::kStepBytes : 0);
    if (delta.length < header) corrupt(delta, "its header is cut off");
    const std::byte* const head = delta.data;
    if (bytes_at(head)[0] > detail::kDeltaVersion) {
        throw Error(ErrorCode::unsupported_format,
                    "a delta has version " + std::to_string(bytes_at(head)[0]) +
                        ", this pydedup reads up to " + std::to_string(detail::kDeltaVersion) +
                        "; use a newer pydedup");
    }
    const std::uint8_t form = bytes_at(head)[1];
    const unsigned shift = bytes_at(head)[3];
    if (bytes_at(head)[0] == 0 || form > 1 || load_le<std::uint32_t>(head + 4) != count ||
        shift >= 8 * item || (quantised && shift != 0)) {
        corrupt(delta, "its header is damaged");
    }
    if (bytes_at(head)[2] != static_cast<std::uint8_t>(base.dtype) ||
        !detail::converts(base.dtype, delta.dtype)) {
        corrupt(delta, "its base has another dtype");
    }
    double step = 0;
    if (quantised) {
        step = std::bit_cast<double>(load_le<std::uint64_t>(head + detail::kDeltaHeaderBytes));
        if (!detail::can_quantise(delta.dtype) || !std::isfinite(step) || !(step > 0) ||
            (item != 8 && static_cast<double>(static_cast<float>(step)) != step)) {
            corrupt(delta, "its step is impossible");
        }
    }
    std::unique_ptr<std::uint8_t[]> memory;
    const std::uint8_t* from = base_elements(delta, base, load_le<std::uint32_t>(head + 8), memory);
    static_cast<void>(source.take(header));

    const Room room(static_cast<std::size_t>(count), item);
    const DeltaLayout layout = detail::delta_layout(delta.dtype);
    const bool wide = item == 8 && !quantised;
    const unsigned value_bits = quantised ? 32U : static_cast<unsigned>(8 * item);
    const auto n = static_cast<std::size_t>(count);
    const char* wrong = nullptr;
    if (form == static_cast<std::uint8_t>(DeltaForm::coded)) {
        wrong = get_coded(source, delta, layout, value_bits, wide, from,
                          bytes_at(delta.data) + delta.length, room);
    } else if (wide) {
        wrong = get_sparse(source, n, value_bits, reinterpret_cast<std::uint64_t*>(room.z));
    } else {
        wrong = get_sparse(source, n, value_bits, reinterpret_cast<std::uint32_t*>(room.z));
    }
    if (wrong != nullptr) corrupt(delta, wrong);

    const CodecKernels& codec = kernels().codec;
    if (quantised) {
        const detail::Values values(from, from, n, delta.dtype);
        detail::dequantise(values.base(), reinterpret_cast<const std::uint32_t*>(room.z), n,
                           delta.dtype, step, codec, room.values_of, room.block);
    } else if (dst_stride_bytes == delta.row_bytes()) {
        codec.delta.add(from, room.z, n, layout, shift, reinterpret_cast<std::uint8_t*>(dst));
        return;
    } else {
        codec.delta.add(from, room.z, n, layout, shift, room.block);
    }
    for (std::size_t r = 0; r < delta.rows; ++r) {
        std::memcpy(dst + r * dst_stride_bytes, room.block + r * delta.row_bytes(),
                    delta.row_bytes());
    }
}

}  // namespace pydedup
