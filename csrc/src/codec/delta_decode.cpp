// SPDX-License-Identifier: Apache-2.0
// Deltas back to blocks (docs/format.md, "Deltas"): what is not as described there is refused.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/endian.hpp"
#include "codec/convert.hpp"
#include "codec/delta_changed.hpp"
#include "codec/delta_listed.hpp"
#include "codec/delta_model.hpp"
#include "codec/delta_pair.hpp"
#include "codec/delta_room.hpp"
#include "codec/delta_step.hpp"
#include "codec/low_rank.hpp"
#include "codec/narrow.hpp"
#include "codec/transposed.hpp"
#include "codec/zero_mask.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

using detail::Codes;
using detail::DeltaForm;
using detail::Room;
using detail::Source;

const std::uint8_t* bytes_at(const std::byte* at) noexcept {
    return reinterpret_cast<const std::uint8_t*>(at);
}

[[noreturn]] void corrupt(const BlockView& block, const std::string& what) {
    throw Error(ErrorCode::corrupt_page, "a delta of " + std::to_string(block.rows) + " x " +
                                             std::to_string(block.cols) +
                                             " elements does not decode: " + what);
}

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

// Any form of differences that are mostly 0.
template <class Wide>
const char* get_few(std::uint8_t form, Source& source, std::size_t count, unsigned value_bits,
                    Wide* z) {
    switch (static_cast<DeltaForm>(form)) {
        case DeltaForm::changed:
            return detail::get_changed(source, count, value_bits, z);
        case DeltaForm::listed:
            return detail::get_listed(source, count, value_bits, z);
        default:
            return get_sparse(source, count, value_bits, z);
    }
}

// Whether the list of changes is empty, as that of a block is whose base, as moved, is the same.
bool changes_nothing(std::uint8_t form, const Source& source) noexcept {
    return form == static_cast<std::uint8_t>(DeltaForm::sparse) && source.left.size() == 1 &&
           source.left.front() == 0;
}

void copy_rows(const std::uint8_t* from, const BlockView& block, std::byte* dst,
               std::size_t dst_stride_bytes) noexcept {
    for (std::size_t r = 0; r < block.rows; ++r) {
        std::memcpy(dst + r * dst_stride_bytes, from + r * block.row_bytes(), block.row_bytes());
    }
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

// What stands in front of what is coded.
struct Header {
    std::uint8_t form;
    unsigned shift;
    std::uint32_t base_check;
    double step;  // of a quantised delta
    Dtype dtype;  // of the differences
    bool is_transposed;
    std::optional<detail::ReadLowRank> low_rank;
    std::optional<detail::ZeroMask> mask;
};

// Accepts what such a delta of such a base can say, and leaves the source behind it.
Header read_header(const BlockView& delta, const BlockView& base, Source& source) {
    const bool quantised = delta.encoding == Encoding::quantised;
    if (!quantised && delta.encoding != Encoding::delta) corrupt(delta, "it is not a delta");
    if (base.encoding != Encoding::raw && base.encoding != Encoding::planes) {
        corrupt(delta, "its base is a delta itself");
    }
    const std::size_t bytes = detail::kDeltaHeaderBytes + (quantised ? detail::kStepBytes : 0);
    if (delta.length < bytes) corrupt(delta, "its header is cut off");
    const std::uint8_t* const head = bytes_at(delta.data);
    if (head[0] > detail::kDeltaVersion) {
        throw Error(ErrorCode::unsupported_format,
                    "a delta has version " + std::to_string(head[0]) +
                        ", this pydedup reads up to " + std::to_string(detail::kDeltaVersion) +
                        "; use a newer pydedup");
    }
    const std::size_t item = item_bytes(delta.dtype);
    const std::size_t count = std::size_t{delta.rows} * delta.cols;
    Header header{head[1], head[3],     load_le<std::uint32_t>(delta.data + 8),
                  0,       delta.dtype, head[0] == detail::kTransposedDeltaVersion,
                  {},      {}};
    if (head[0] == 0 || !detail::has_form(head[0], header.form) ||
        load_le<std::uint32_t>(delta.data + 4) != count || (quantised && header.shift != 0)) {
        corrupt(delta, "its header is damaged");
    }
    const bool fits = header.is_transposed ? base.rows == delta.cols && base.cols == delta.rows
                                           : base.rows == delta.rows && base.cols == delta.cols;
    if (!fits) {
        corrupt(delta, "its base has " + std::to_string(base.rows) + " x " +
                           std::to_string(base.cols) + " elements");
    }
    static_cast<void>(source.take(bytes));
    if (head[0] >= detail::kExtendedDeltaVersion) {
        header.dtype = static_cast<Dtype>(source.byte());
        const bool is_narrow = header.dtype != delta.dtype;
        if (is_narrow && (quantised || !detail::is_narrower(header.dtype, delta.dtype))) {
            corrupt(delta, "its differences have an impossible dtype");
        }
        if (detail::moves_base(head[0]) &&
            !(header.is_transposed && detail::skip_no_low_rank(source))) {
            if (!detail::can_quantise(header.dtype)) corrupt(delta, "its dtype has no factors");
            header.low_rank.emplace();
            const char* wrong = detail::get_low_rank(source, delta.rows, delta.cols, head,
                                                     delta.before, *header.low_rank);
            if (wrong != nullptr) corrupt(delta, wrong);
        }
        const char* wrong =
            detail::get_mask(source, count, detail::delta_layout(header.dtype), header.mask);
        if (wrong != nullptr) corrupt(delta, wrong);
    }
    if (header.shift >= 8 * item_bytes(header.dtype)) corrupt(delta, "its shift is impossible");
    if (head[2] != static_cast<std::uint8_t>(base.dtype) ||
        !detail::converts(base.dtype, delta.dtype)) {
        corrupt(delta, "its base has another dtype");
    }
    if (quantised) {
        header.step =
            std::bit_cast<double>(load_le<std::uint64_t>(delta.data + detail::kDeltaHeaderBytes));
        if (!detail::can_quantise(delta.dtype) || !std::isfinite(header.step) ||
            !(header.step > 0) ||
            (item != 8 && static_cast<double>(static_cast<float>(header.step)) != header.step)) {
            corrupt(delta, "its step is impossible");
        }
    }
    return header;
}

// The base's elements as those that differences are of; `memory` holds them where they had to be
// decoded, converted, transposed, moved or masked. What the header says of the base is checked on
// the way.
const std::uint8_t* base_elements(const BlockView& delta, const BlockView& base,
                                  const Header& header, std::unique_ptr<std::uint8_t[]>& memory) {
    const std::size_t count = std::size_t{base.rows} * base.cols;
    const std::size_t base_bytes = count * item_bytes(base.dtype);
    const bool convert = base.dtype != header.dtype;
    const bool decode = base.encoding != Encoding::raw;
    const std::size_t changed_bytes =
        convert || header.low_rank || header.mask ? count * item_bytes(header.dtype) : 0;
    const std::size_t decoded_bytes = decode ? base_bytes : 0;
    const std::size_t transposed_bytes = header.is_transposed ? base_bytes : 0;
    const std::size_t needed = changed_bytes + decoded_bytes + transposed_bytes;
    const std::uint8_t* from = bytes_at(base.data);
    if (needed != 0) memory = std::make_unique_for_overwrite<std::uint8_t[]>(needed);
    if (decode) {
        std::uint8_t* const to = memory.get() + changed_bytes;
        decode_block(base, reinterpret_cast<std::byte*>(to), base.row_bytes());
        from = to;
    } else if (base.length != base_bytes) {
        corrupt(delta, "its base has a length that is not that of its shape");
    }
    if (detail::check_of(from, base.rows, base.row_bytes()) != header.base_check) {
        corrupt(delta, "this is not the base that it was made from");
    }
    if (header.is_transposed) {
        std::uint8_t* const to = memory.get() + changed_bytes + decoded_bytes;
        detail::transpose(from, base.rows, base.cols, item_bytes(base.dtype), to);
        from = to;
    }
    if (convert) {
        detail::convert_floats(from, base.dtype, count, memory.get(), header.dtype);
        from = memory.get();
    }
    if (header.low_rank) {
        detail::add_low_rank(header.low_rank->view(), from, delta.rows, delta.cols, header.dtype,
                             memory.get());
        from = memory.get();
    }
    if (header.mask) {
        detail::apply_mask(*header.mask, from, count, detail::delta_layout(header.dtype),
                           memory.get());
        from = memory.get();
    }
    return from;
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
    Source source{{bytes_at(delta.data), delta.length}};
    const Header header = read_header(delta, base, source);
    std::unique_ptr<std::uint8_t[]> memory;
    const std::uint8_t* from = base_elements(delta, base, header, memory);

    const std::size_t coded_item = item_bytes(header.dtype);
    const bool is_narrow = header.dtype != delta.dtype;
    if (!quantised && !is_narrow && changes_nothing(header.form, source)) {
        copy_rows(from, delta, dst, dst_stride_bytes);
        return;
    }
    const Room room(static_cast<std::size_t>(count), item);
    const DeltaLayout layout = detail::delta_layout(header.dtype);
    const bool wide = coded_item == 8 && !quantised;
    const unsigned value_bits = quantised ? 32U : static_cast<unsigned>(8 * coded_item);
    const auto n = static_cast<std::size_t>(count);
    const char* wrong = nullptr;
    if (header.form == static_cast<std::uint8_t>(DeltaForm::coded)) {
        wrong = get_coded(source, delta, layout, value_bits, wide, from,
                          bytes_at(delta.data) + delta.length, room);
    } else if (wide) {
        wrong =
            get_few(header.form, source, n, value_bits, reinterpret_cast<std::uint64_t*>(room.z));
    } else {
        wrong =
            get_few(header.form, source, n, value_bits, reinterpret_cast<std::uint32_t*>(room.z));
    }
    if (wrong != nullptr) corrupt(delta, wrong);

    const CodecKernels& codec = kernels().codec;
    if (quantised) {
        const detail::Values values(from, n, delta.dtype);
        detail::dequantise(values, reinterpret_cast<const std::uint32_t*>(room.z), header.step,
                           codec, room.values_of, room.block);
    } else if (is_narrow) {
        codec.delta.add(from, room.z, n, layout, header.shift, room.values_of);
        detail::convert_floats(room.values_of, header.dtype, n, room.block, delta.dtype);
    } else if (dst_stride_bytes == delta.row_bytes()) {
        codec.delta.add(from, room.z, n, layout, header.shift,
                        reinterpret_cast<std::uint8_t*>(dst));
        return;
    } else {
        codec.delta.add(from, room.z, n, layout, header.shift, room.block);
    }
    copy_rows(room.block, delta, dst, dst_stride_bytes);
}

}  // namespace pydedup
