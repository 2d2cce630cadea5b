// SPDX-License-Identifier: Apache-2.0
// Canonical codes: the lengths alone determine the code. Codes of one length are consecutive, in
// order of the byte; shorter codes come first. Because the decoder reads from the most significant
// bit, each code then owns one run of its lookup table, and the runs follow each other.
//
// The code table of a payload has the cheaper of two forms; a nibble per byte value of a range, or
// a bitmap of the used byte values and a nibble for each.
#include "codec/huffman.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "codec/code_lengths.hpp"

namespace pydedup::detail {
namespace {

constexpr std::uint8_t kRangeForm = 0;
constexpr std::uint8_t kBitmapForm = 1;
constexpr std::size_t kBitmapBytes = 32;
constexpr std::size_t kStreamSizesBytes = 3 * 4;  // the fourth stream is what is left

struct CodeTableShape {
    unsigned first, last;  // used byte values
    unsigned n_used;

    [[nodiscard]] std::size_t range_bytes() const noexcept { return 2 + (last - first + 2) / 2; }
    [[nodiscard]] std::size_t bitmap_bytes() const noexcept {
        return kBitmapBytes + (n_used + 1) / 2;
    }
    [[nodiscard]] bool takes_range() const noexcept { return range_bytes() <= bitmap_bytes(); }
    [[nodiscard]] std::size_t bytes() const noexcept {
        return 1 + (takes_range() ? range_bytes() : bitmap_bytes());
    }
};

template <class Used>
CodeTableShape code_table_shape(const Used& used) noexcept {
    CodeTableShape shape{0, 0, 0};
    for (unsigned s = 0; s < 256; ++s) {
        if (used[s] == 0) continue;
        if (shape.n_used++ == 0) shape.first = s;
        shape.last = s;
    }
    return shape;
}

std::uint8_t* write_code_table(const HuffmanPlan& plan, std::uint8_t* to) noexcept {
    const CodeTableShape shape = code_table_shape(plan.code_bits);
    const bool range = shape.takes_range();
    *to++ = range ? kRangeForm : kBitmapForm;
    std::uint8_t* nibbles = to + 2;
    if (range) {
        to[0] = static_cast<std::uint8_t>(shape.first);
        to[1] = static_cast<std::uint8_t>(shape.last);
    } else {
        nibbles = to + kBitmapBytes;
        std::memset(to, 0, kBitmapBytes);
    }
    std::size_t n = 0;
    for (unsigned s = shape.first; s <= shape.last; ++s) {
        const std::uint8_t bits = plan.code_bits[s];
        if (!range && bits == 0) continue;
        if (!range) to[s / 8] = static_cast<std::uint8_t>(to[s / 8] | (1U << (s % 8)));
        if (n % 2 == 0) nibbles[n / 2] = 0;
        nibbles[n / 2] = static_cast<std::uint8_t>(nibbles[n / 2] | (bits << (4 * (n % 2))));
        ++n;
    }
    return nibbles + (n + 1) / 2;
}

// The code bits of the bytes that have a code, by ascending byte.
struct UsedSymbols {
    std::array<std::uint8_t, 256> symbol;
    std::array<std::uint8_t, 256> bits;  // 0 .. 15
    std::size_t n = 0;
};

// Moves `payload` behind the table. Whether the lengths form a code is seen later.
const char* read_code_table(std::span<const std::uint8_t>& payload, UsedSymbols& used) noexcept {
    if (payload.empty()) return "a Huffman plane has no code table";
    const std::uint8_t form = payload[0];
    payload = payload.subspan(1);
    std::size_t n = 0;
    if (form == kRangeForm) {
        if (payload.size() < 2 || payload[0] >= payload[1]) return "a code table names a bad range";
        for (unsigned s = payload[0]; s <= payload[1]; ++s) {
            used.symbol[n++] = static_cast<std::uint8_t>(s);
        }
        payload = payload.subspan(2);
    } else if (form == kBitmapForm) {
        if (payload.size() < kBitmapBytes) return "a code table is cut off";
        for (unsigned s = 0; s < 256; ++s) {
            if ((payload[s / 8] >> (s % 8) & 1) != 0)
                used.symbol[n++] = static_cast<std::uint8_t>(s);
        }
        payload = payload.subspan(kBitmapBytes);
    } else {
        return "a code table has an unknown form";
    }
    if (payload.size() < (n + 1) / 2) return "a code table is cut off";
    for (std::size_t i = 0; i < n; ++i) used.bits[i] = payload[i / 2] >> (4 * (i % 2)) & 15;
    if (n % 2 == 1 && payload[n / 2] >> 4 != 0) return "a code table ends with stray bits";
    const bool every = form == kBitmapForm;
    for (std::size_t i = 0; i < n; ++i) {
        if (used.bits[i] == 0 && (every || i == 0 || i + 1 == n)) {
            return "a code table names a byte that has no code";
        }
    }
    payload = payload.subspan((n + 1) / 2);
    used.n = n;
    return nullptr;
}

// First code of each length, as an index into a table of 2^max_bits entries.
struct CanonicalCode {
    std::array<std::uint32_t, 16> start;
    unsigned max_bits;
    bool
        complete;  // every sequence of bits is a sequence of codes, and none is longer than allowed
};

CanonicalCode canonical_code(std::span<const std::uint8_t> code_bits) noexcept {
    std::array<std::uint32_t, 16> of_length{};
    for (const std::uint8_t bits : code_bits) {
        if (bits != 0) ++of_length[bits];
    }
    CanonicalCode code{};
    for (unsigned bits = 1; bits < 16; ++bits) {
        if (of_length[bits] != 0) code.max_bits = bits;
    }
    std::uint32_t at = 0;
    for (unsigned bits = 1; bits <= code.max_bits; ++bits) {
        code.start[bits] = at;
        at += of_length[bits] << (code.max_bits - bits);
    }
    code.complete =
        code.max_bits != 0 && code.max_bits <= kMaxCodeBits && at == 1U << code.max_bits;
    return code;
}

void store_be64(std::uint8_t* to, std::uint64_t value) noexcept {
    value = __builtin_bswap64(value);
    std::memcpy(to, &value, sizeof value);
}

// `codes` is code << 8 | bits. Stores of 8 bytes run ahead of the stream, never past room_end.
std::uint8_t* encode_stream(std::span<const std::uint8_t> symbols,
                            const std::array<std::uint32_t, 256>& codes, std::uint8_t* to,
                            const std::uint8_t* room_end) noexcept {
    std::uint64_t bits = 0;  // the lowest `pending` ones are yet to be written
    unsigned pending = 0;
    const auto take = [&](std::uint8_t symbol) {
        const std::uint32_t code = codes[symbol];
        bits = (bits << (code & 255)) | (code >> 8);
        pending += code & 255;
    };
    static_assert(5 * kMaxCodeBits + 7 <= 63);
    std::size_t i = 0;
    for (; i + 5 <= symbols.size() && room_end - to >= 8; i += 5) {
        for (std::size_t k = 0; k < 5; ++k) take(symbols[i + k]);
        store_be64(to, bits << (64 - pending));
        to += pending / 8;
        pending %= 8;
    }
    for (; i < symbols.size(); ++i) {
        take(symbols[i]);
        for (; pending >= 8; pending -= 8) *to++ = static_cast<std::uint8_t>(bits >> (pending - 8));
    }
    if (pending != 0) *to++ = static_cast<std::uint8_t>(bits << (8 - pending));
    return to;
}

// Symbols [begin, end) of stream j.
struct Segment {
    std::size_t begin, end;
};

Segment segment_of(std::size_t count, std::size_t stream) noexcept {
    const std::size_t step = (count + 3) / 4;
    return {std::min(count, stream * step), std::min(count, (stream + 1) * step)};
}

}  // namespace

void count_bytes(std::span<const std::uint8_t> plane, PlaneHistogram& histogram) noexcept {
    auto& segment = histogram.segment;
    for (auto& counts : segment) counts.fill(0);
    const std::size_t step = (plane.size() + 3) / 4;
    const Segment last = segment_of(plane.size(), 3);
    const std::size_t together = last.end - last.begin;
    const std::uint8_t* const p = plane.data();
    // Four tables at once: runs of one byte do not wait for their own last store.
    for (std::size_t i = 0; i < together; ++i) {
        ++segment[0][p[i]];
        ++segment[1][p[i + step]];
        ++segment[2][p[i + 2 * step]];
        ++segment[3][p[i + 3 * step]];
    }
    for (std::size_t j = 0; j < 3; ++j) {
        const Segment rest = segment_of(plane.size(), j);
        for (std::size_t i = rest.begin + together; i < rest.end; ++i) ++segment[j][p[i]];
    }
    histogram.n_used = 0;
    for (std::size_t s = 0; s < 256; ++s) {
        histogram.total[s] = segment[0][s] + segment[1][s] + segment[2][s] + segment[3][s];
        histogram.n_used += histogram.total[s] != 0 ? 1 : 0;
    }
}

bool is_incompressible(const PlaneHistogram& histogram, std::uint64_t count) noexcept {
    // With q = sum of squares / count^2 a symbol takes at least H2 = -log2(q) bits, so the payload
    // at least count * H2 / 8 + overhead bytes. That is >= count if q <= 2^(8 * overhead / count)
    // / 256, and 2^x >= 1 + x * ln 2 > 1 + x * 5 / 8.
    std::uint64_t squares = 0;
    for (const std::uint64_t n : histogram.total) squares += n * n;  // <= count^2 < 2^64
    const std::uint64_t overhead = code_table_shape(histogram.total).bytes() + kStreamSizesBytes;
    return squares <= count * count / 256 + count * overhead * 5 / 256;
}

void plan_huffman(const PlaneHistogram& histogram, HuffmanPlan& plan) noexcept {
    optimal_code_lengths(histogram.total, kMaxCodeBits, plan.code_bits);
    plan.payload_bytes = code_table_shape(plan.code_bits).bytes() + kStreamSizesBytes;
    for (std::size_t j = 0; j < 4; ++j) {
        std::uint64_t bits = 0;
        for (std::size_t s = 0; s < 256; ++s) {
            bits += static_cast<std::uint64_t>(histogram.segment[j][s]) * plan.code_bits[s];
        }
        plan.stream_bytes[j] = static_cast<std::uint32_t>((bits + 7) / 8);
        plan.payload_bytes += plan.stream_bytes[j];
    }
}

void huffman_encode(std::span<const std::uint8_t> plane, const HuffmanPlan& plan,
                    std::span<std::uint8_t> room) noexcept {
    CanonicalCode canonical = canonical_code(plan.code_bits);
    std::array<std::uint32_t, 256> codes{};
    for (std::size_t s = 0; s < 256; ++s) {
        const unsigned bits = plan.code_bits[s];
        if (bits == 0) continue;
        const unsigned unused = canonical.max_bits - bits;
        codes[s] = (canonical.start[bits] >> unused) << 8 | bits;
        canonical.start[bits] += 1U << unused;
    }
    std::uint8_t* to = write_code_table(plan, room.data());
    std::memcpy(to, plan.stream_bytes.data(), kStreamSizesBytes);
    to += kStreamSizesBytes;
    const std::uint8_t* const room_end = room.data() + room.size();
    for (std::size_t j = 0; j < 4; ++j) {
        const Segment segment = segment_of(plane.size(), j);
        to = encode_stream(plane.subspan(segment.begin, segment.end - segment.begin), codes, to,
                           room_end);
    }
}

const char* huffman_decode(std::span<const std::uint8_t> payload, const std::uint8_t* readable_end,
                           const CodecKernels& codec, std::span<std::uint8_t> plane) noexcept {
    UsedSymbols used;
    if (const char* wrong = read_code_table(payload, used)) return wrong;
    CanonicalCode canonical = canonical_code(std::span(used.bits).first(used.n));
    if (!canonical.complete) return "a code table is not a complete prefix code";
    if (payload.size() < kStreamSizesBytes) return "a Huffman plane has no stream sizes";
    std::array<std::uint32_t, 3> sizes;
    std::memcpy(sizes.data(), payload.data(), kStreamSizesBytes);
    payload = payload.subspan(kStreamSizesBytes);
    const std::uint64_t in_front = std::uint64_t{sizes[0]} + sizes[1] + sizes[2];
    if (in_front > payload.size()) return "the streams of a Huffman plane are longer than it";

    std::array<std::uint16_t, 1U << kMaxCodeBits> table;
    for (std::size_t i = 0; i < used.n; ++i) {
        const unsigned bits = used.bits[i];
        if (bits == 0) continue;
        const std::uint32_t run = 1U << (canonical.max_bits - bits);
        std::fill_n(table.data() + canonical.start[bits], run,
                    static_cast<std::uint16_t>(used.symbol[i] << 8 | bits));
        canonical.start[bits] += run;
    }
    HuffmanStreams streams{};
    const std::array<std::uint64_t, 4> bytes = {sizes[0], sizes[1], sizes[2],
                                                payload.size() - in_front};
    const std::uint8_t* at = payload.data();
    for (std::size_t j = 0; j < 4; ++j) {
        streams.begin[j] = at;
        at += bytes[j];
    }
    streams.end = readable_end;
    streams.table = table.data();
    streams.table_bits = canonical.max_bits;
    std::array<std::uint64_t, 4> consumed{};
    codec.huffman_decode(streams, plane.size(), plane.data(), consumed.data());
    for (std::size_t j = 0; j < 4; ++j) {
        if ((consumed[j] + 7) / 8 != bytes[j])
            return "a Huffman stream does not end where it should";
        const unsigned padding = static_cast<unsigned>(8 * bytes[j] - consumed[j]);
        if (padding != 0 && (streams.begin[j][bytes[j] - 1] & ((1U << padding) - 1)) != 0) {
            return "a Huffman stream ends with stray bits";
        }
    }
    return nullptr;
}

}  // namespace pydedup::detail
