// SPDX-License-Identifier: Apache-2.0
// Questions about encodings: what one machine writes, every other one must read.
#include "dispatch/known_codec.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <tuple>

namespace pydedup {
namespace {

using Question = std::span<const std::uint8_t>;  // 700 bytes
using Planes = std::array<std::uint8_t, 700>;

bool same_planes(const CodecKernels& codec, const CodecKernels& reference,
                 Question question) noexcept {
    // Rows without gaps are one: so long that each size of element gets steps of all widths.
    struct Matrix {
        std::size_t item, cols, stride;
    };
    for (const auto& [item, cols, stride] :
         {Matrix{2, 44, 88}, Matrix{4, 17, 68}, Matrix{8, 12, 96}, Matrix{4, 19, 100}}) {
        Planes want{};
        Planes got{};
        reference.split_planes(question.data(), stride, 7, cols, item, true, want.data());
        codec.split_planes(question.data(), stride, 7, cols, item, true, got.data());
        if (want != got) return false;

        std::array<const std::uint8_t*, 8> planes{};
        for (std::size_t p = 0; p < item; ++p) planes[p] = got.data() + p * 7 * cols;
        Planes back{};
        codec.merge_planes(planes.data(), 7, cols, item, true, back.data(), stride);
        for (std::size_t r = 0; r < 7; ++r) {
            const std::size_t at = r * stride;
            if (std::memcmp(&back[at], &question[at], cols * item) != 0) return false;
        }
    }
    return true;
}

// Any bits are a valid stream of these codes. Long and short streams of short codes (a is 0, b is
// 10, c is 11) reach the vector kernels' decoders by pairs and by one; how many codes they take
// between refills depends on the longest one, so there are codes of one length each, too.
bool same_planes_decoded(const CodecKernels& codec, const CodecKernels& reference,
                         Question question) noexcept {
    constexpr std::array<std::uint16_t, 4> kShort = {'a' << 8 | 1, 'a' << 8 | 1, 'b' << 8 | 2,
                                                     'c' << 8 | 2};
    std::array<std::uint16_t, std::size_t{1} << kMaxCodeBits> codes{};
    const auto same = [&](unsigned bits, std::size_t count) {
        const std::size_t apart = count / 10;
        HuffmanStreams streams{};
        for (std::size_t j = 0; j < 4; ++j) streams.begin[j] = question.data() + j * apart;
        streams.end = question.data() + question.size();
        streams.table = codes.data();
        streams.table_bits = bits;
        std::array<std::uint8_t, 1700> want{};
        std::array<std::uint8_t, 1700> got{};
        std::array<std::uint64_t, 4> want_bits{};
        std::array<std::uint64_t, 4> got_bits{};
        reference.huffman_decode(streams, count, want.data(), want_bits.data());
        codec.huffman_decode(streams, count, got.data(), got_bits.data());
        return want == got && want_bits == got_bits;
    };
    std::copy(kShort.begin(), kShort.end(), codes.begin());
    if (!same(2, 1700) || !same(2, 301)) return false;
    for (const unsigned bits : {8U, 9U, kMaxCodeBits}) {
        for (std::size_t i = 0; i < std::size_t{1} << bits; ++i) {
            codes[i] = static_cast<std::uint16_t>((i & 0xFFU) << 8 | bits);
        }
        if (!same(bits, 301)) return false;
    }
    return true;
}

bool same_differences(const DeltaKernels& delta, const DeltaKernels& reference,
                      Question question) noexcept {
    constexpr std::size_t kCount = 37;
    for (const DeltaLayout layout : {DeltaLayout{2, 8, 7, true}, DeltaLayout{4, 8, 23, true},
                                     DeltaLayout{8, 11, 52, true}, DeltaLayout{1, 0, 0, false}}) {
        std::array<std::uint64_t, kCount> want{};
        std::array<std::uint64_t, kCount> got{};
        const std::uint8_t* base = question.data() + 350;
        reference.subtract(question.data(), base, kCount, layout, want.data());
        delta.subtract(question.data(), base, kCount, layout, got.data());
        std::array<std::uint8_t, kCount * 8> back{};
        delta.add(base, got.data(), kCount, layout, 0, back.data());
        if (want != got) return false;
        if (std::memcmp(back.data(), question.data(), kCount * layout.item_bytes) != 0)
            return false;
    }
    return true;
}

// Values and errors, errors alone, and values that no multiple of the step comes near to.
template <class Float>
bool same_multiples(const DeltaKernels& delta, const DeltaKernels& reference,
                    Question question) noexcept {
    constexpr std::size_t kCount = 37;
    constexpr bool kWide = sizeof(Float) == 8;
    std::array<Float, kCount> x{};
    std::array<Float, kCount> y{};
    for (std::size_t i = 0; i < kCount; ++i) {
        x[i] = static_cast<Float>(question[i]) - Float{127};
        y[i] = x[i] + static_cast<Float>(question[i + 100]) / Float{64};
    }
    y[3] = y[kCount - 1] = 0;  // which no multiple of the step is away from here
    x[3] = x[kCount - 1] = Float{0.0625F};
    const auto answer = [&](const DeltaKernels& k) {
        std::array<std::uint32_t, kCount> z{};
        std::array<double, kErrorLanes> lanes{};
        std::array<double, kErrorLanes> others{};
        const bool fits =
            k.quantise(y.data(), x.data(), kCount, kWide, 0.125, z.data(), lanes.data());
        const bool alone =
            k.quantise(y.data(), x.data(), kCount, kWide, 0.125, nullptr, others.data());
        std::array<Float, kCount> decoded{};
        k.dequantise(x.data(), z.data(), kCount, kWide, 0.125, decoded.data());
        return std::tuple(fits, alone, z, lanes, others, decoded);
    };
    if (answer(delta) != answer(reference)) return false;
    for (const std::size_t far : {std::size_t{5}, kCount - 2}) {
        y[far] = Float{1e9F};
        if (answer(delta) != answer(reference)) return false;
    }
    return true;
}

// Numbers of few bits and of many, that begin at a byte or not.
bool same_numbers(const DeltaKernels& delta, const DeltaKernels& reference,
                  Question question) noexcept {
    constexpr std::size_t kCount = 37;
    for (const unsigned width : {1U, 7U, 12U, 24U}) {
        for (const std::size_t position : {std::size_t{16}, std::size_t{13}}) {
            std::array<std::int32_t, kCount> want{};
            std::array<std::int32_t, kCount> got{};
            reference.unpack(question.data(), position, width, kCount, want.data());
            delta.unpack(question.data(), position, width, kCount, got.data());
            if (want != got) return false;
        }
    }
    return true;
}

// Products whose numbers have as many bits as they may.
bool same_products(const DeltaKernels& delta, const DeltaKernels& reference,
                   Question question) noexcept {
    constexpr std::size_t kRank = 5;
    constexpr std::size_t kRows = 2 * kProductRows;
    constexpr std::size_t kCols = 2 * kProductLanes;
    const auto bits = [&](std::size_t i) {
        return static_cast<std::int32_t>(question[i] | question[i + 1] << 8 |
                                         question[i + 2] << 16);
    };
    std::array<double, kRank * kRows> of_rows{};
    std::array<double, kRank * kCols> of_cols{};
    std::array<std::int32_t, kRank * kRows> pairs_of_rows{};
    std::array<std::int32_t, kRank * kCols> pairs_of_cols{};
    const auto pair = [&](std::size_t i) {  // of 14 bits, so that ten products are below 2^31
        return (bits(i) & 0x3FFF) - 0x2000 + (((bits(i + 1) & 0x3FFF) - 0x2000) << 16);
    };
    for (std::size_t i = 0; i < of_rows.size(); ++i) {
        of_rows[i] = bits(i + 330) - 0x800000;
        pairs_of_rows[i] = pair(i + 330);
    }
    for (std::size_t i = 0; i < of_cols.size(); ++i) {
        of_cols[i] = bits(i) - 0x800000;
        pairs_of_cols[i] = pair(i);
    }
    using Sums = std::array<double, kProductRows * kCols>;
    const auto answer = [&](const DeltaKernels& k) {
        Sums sums{};
        Sums of_pairs{};
        k.products(of_rows.data() + kProductRows, kRows, of_cols.data(), kCols, kRank, sums.data());
        k.pair_products(pairs_of_rows.data(), kRows, pairs_of_cols.data(), kCols, kRank,
                        of_pairs.data());
        return std::tuple(sums, of_pairs);
    };
    return answer(delta) == answer(reference);
}

// Elements of all kinds, and how they move.
bool same_moves(const DeltaKernels& delta, const DeltaKernels& reference,
                Question question) noexcept {
    constexpr std::size_t kCount = 85;
    std::array<double, 3 * kProductLanes> sums{};
    for (std::size_t i = 0; i < sums.size(); ++i)
        sums[i] = question[i] % 5 == 0 ? 0 : question[i] - 99.0;
    for (const DeltaLayout layout :
         {DeltaLayout{2, 8, 7, true}, DeltaLayout{4, 8, 23, true}, DeltaLayout{8, 11, 52, true}}) {
        std::array<std::uint8_t, 8 * kCount> want{};
        std::array<std::uint8_t, 8 * kCount> got{};
        reference.move(question.data(), sums.data(), kCount, layout, 0.125, want.data());
        delta.move(question.data(), sums.data(), kCount, layout, 0.125, got.data());
        if (want != got) return false;
    }
    return true;
}

// Exponents, mantissas and the contexts that they choose, of a whole piece and a tail.
bool same_contexts(const DeltaKernels& delta, const DeltaKernels& reference,
                   Question question) noexcept {
    constexpr std::size_t kCount = 85;
    for (const DeltaLayout layout : {DeltaLayout{2, 8, 7, true}, DeltaLayout{2, 5, 10, true},
                                     DeltaLayout{4, 8, 23, true}, DeltaLayout{8, 11, 52, true}}) {
        const auto answer = [&](const DeltaKernels& k) {
            std::array<std::uint8_t, kCount> exponents{};
            std::array<std::uint8_t, kCount> mantissas{};
            std::array<std::uint8_t, kCount> contexts{};
            k.exponents(question.data(), kCount, layout, 130, exponents.data());
            k.mantissas(question.data(), kCount, layout, mantissas.data());
            constexpr std::array<std::uint8_t, 4> kFirst = {0, 3, 70, 200};
            k.map_features(mantissas.data(), kCount, kFirst.data(), kFirst.size(), 2,
                           contexts.data());
            return std::tuple(exponents, mantissas, contexts);
        };
        if (answer(delta) != answer(reference)) return false;
    }
    return true;
}

// Symbols that are classes: values and widths of their raw bits.
struct Classes {
    std::array<std::uint64_t, 256> bases{};
    std::array<std::uint8_t, 256> widths{};

    Classes() noexcept {
        for (unsigned c = 0; c < 128; ++c) {
            const unsigned width = c < 4 ? 0 : c / 2 - 1;
            widths[c] = static_cast<std::uint8_t>(width);
            bases[c] = c < 4 ? c : (2U | std::uint64_t{c & 1U}) << width;
        }
    }
};

// Classes of differences, their raw bits, and back. Most are small, as in an alphabet that is read
// and written by tables; some have all the bits that there are.
template <class Wide, std::size_t kCount>
bool same_raw_bits(const DeltaKernels& delta, const DeltaKernels& reference,
                   Question question) noexcept {
    constexpr bool kWide = sizeof(Wide) == 8;
    const Classes classes;
    std::array<Wide, kCount> z{};
    for (std::size_t i = 0; i < kCount; ++i) {
        z[i] = question[i] >> (question[i + 1] % 8);
        if (i % 37 == 36) std::memcpy(&z[i], question.data() + i, sizeof(Wide));
    }
    struct Written {
        std::uint64_t all = 0;
        std::array<std::uint8_t, kCount> symbols{};
        std::array<std::uint8_t, kCount * sizeof(Wide) + 8> raw{};
        std::size_t bytes = 0;
    };
    const auto write = [&](const DeltaKernels& k, Written& to) {
        to.all = k.classify(z.data(), kCount, kWide, to.symbols.data());
        std::uint8_t* const end = k.write_raw(z.data(), to.symbols.data(), kCount, kWide,
                                              classes.widths.data(), to.raw.data());
        to.bytes = static_cast<std::size_t>(end - to.raw.data());
    };
    Written want;
    Written got;
    write(reference, want);
    write(delta, got);
    if (want.all != got.all || want.symbols != got.symbols || want.bytes != got.bytes ||
        std::memcmp(want.raw.data(), got.raw.data(), want.bytes) != 0) {
        return false;
    }
    const auto read = [&](const DeltaKernels& k, std::array<Wide, kCount>& to) {
        return k.read_raw(want.raw.data(), want.bytes, want.symbols.data(), kCount, kWide,
                          classes.bases.data(), classes.widths.data(), to.data());
    };
    std::array<Wide, kCount> back{};
    std::array<Wide, kCount> want_back{};
    return read(reference, want_back) == read(delta, back) && want_back == z && back == z;
}

// The same of 64 symbols with up to 9 raw bits each: some come in eights of 64 bits, and some
// values take 16 bits and, with their raw ones, more.
bool same_wide_alphabet(const DeltaKernels& delta, const DeltaKernels& reference,
                        Question question) noexcept {
    constexpr std::size_t kCount = 300;
    std::array<std::uint64_t, 256> bases{};
    std::array<std::uint8_t, 256> widths{};
    for (std::size_t s = 0; s < 64; ++s) {
        bases[s] = s * 1056;
        widths[s] = static_cast<std::uint8_t>(s / 7);
    }
    std::array<std::uint8_t, kCount> symbols{};
    std::array<std::uint32_t, kCount> low{};  // bits
    std::array<std::uint32_t, kCount> z{};
    for (std::size_t i = 0; i < kCount; ++i) {
        symbols[i] = i / 8 % 5 == 4 ? 60 : question[i] % 64;
        low[i] = question[i + 300] & ((1U << widths[symbols[i]]) - 1);
        z[i] = static_cast<std::uint32_t>(bases[symbols[i]]) + low[i];
    }
    using Raw = std::array<std::uint8_t, 2 * kCount + 8>;
    const auto write = [&](const DeltaKernels& k, Raw& raw) {
        std::uint8_t* const end =
            k.write_raw(low.data(), symbols.data(), kCount, false, widths.data(), raw.data());
        return static_cast<std::size_t>(end - raw.data());
    };
    Raw want{};
    Raw got{};
    const std::size_t bytes = write(reference, want);
    if (write(delta, got) != bytes || std::memcmp(want.data(), got.data(), bytes) != 0) {
        return false;
    }
    std::array<std::uint32_t, kCount> back{};
    delta.read_raw(want.data(), bytes, symbols.data(), kCount, false, bases.data(), widths.data(),
                   back.data());
    return back == z;
}

// 32 symbols in two contexts, whose codes have 5 and 6 bits, in four streams and back. Larger
// tables say the same, and are read with other numbers of codes between refills.
bool same_symbols(const DeltaKernels& delta, const DeltaKernels& reference,
                  Question question) noexcept {
    constexpr std::size_t kCount = 301;
    constexpr std::size_t kSegment = (kCount + 3) / 4;
    std::array<std::uint32_t, 512> codes{};
    std::array<std::uint16_t, std::size_t{2} << kMaxCodeBits> table{};
    for (std::uint32_t s = 0; s < 32; ++s) {
        codes[s] = s << 8 | 5;
        codes[256 + s] = s << 9 | 6;
    }
    std::array<std::uint8_t, kCount> symbols{};
    std::array<std::uint8_t, kCount> contexts{};
    for (std::size_t i = 0; i < kCount; ++i) {
        symbols[i] = question[i] % 32;
        contexts[i] = question[i + 300] % 2;
    }
    using Written = std::array<std::uint8_t, kCount + 8>;
    const auto write = [&](const DeltaKernels& k, Written& to, HuffmanStreams& streams) {
        std::uint8_t* at = to.data();
        for (std::size_t j = 0; j < 4; ++j) {
            streams.begin[j] = at;
            const std::size_t first = j * kSegment;
            const std::size_t n = kCount - first < kSegment ? kCount - first : kSegment;
            at = k.write_symbols(symbols.data() + first, contexts.data() + first, n, codes.data(),
                                 at);
        }
        streams.end = at;
        return static_cast<std::size_t>(at - to.data());
    };
    Written want{};
    Written got{};
    HuffmanStreams streams{};
    HuffmanStreams others{};
    const std::size_t bytes = write(reference, want, streams);
    if (write(delta, got, others) != bytes || std::memcmp(want.data(), got.data(), bytes) != 0) {
        return false;
    }
    streams.table = table.data();
    for (const unsigned bits : {6U, 9U, kMaxCodeBits}) {
        const std::size_t size = std::size_t{1} << bits;
        for (std::size_t i = 0; i < size; ++i) {
            const std::size_t s = i >> (bits - 5);
            table[i] = static_cast<std::uint16_t>(s << 8 | 5);
            table[size + i] = static_cast<std::uint16_t>(s << 8 | 6);
        }
        streams.table_bits = bits;
        const auto read = [&](const DeltaKernels& k) {
            std::array<std::uint8_t, kCount> back{};
            std::array<std::uint64_t, 4> consumed{};
            k.read_symbols(streams, contexts.data(), kCount, back.data(), consumed.data());
            return std::tuple(back, consumed);
        };
        if (read(delta) != read(reference) || std::get<0>(read(delta)) != symbols) return false;
    }
    return true;
}

}  // namespace

bool same_codec(const CodecKernels& codec, const CodecKernels& reference,
                std::span<const std::uint8_t> question) noexcept {
    const DeltaKernels& delta = codec.delta;
    return same_planes(codec, reference, question) &&
           same_planes_decoded(codec, reference, question) &&
           same_differences(delta, reference.delta, question) &&
           same_multiples<float>(delta, reference.delta, question) &&
           same_multiples<double>(delta, reference.delta, question) &&
           same_contexts(delta, reference.delta, question) &&
           same_numbers(delta, reference.delta, question) &&
           same_products(delta, reference.delta, question) &&
           same_moves(delta, reference.delta, question) &&
           same_raw_bits<std::uint32_t, 300>(delta, reference.delta, question) &&
           same_raw_bits<std::uint64_t, 75>(delta, reference.delta, question) &&
           same_wide_alphabet(delta, reference.delta, question) &&
           same_symbols(delta, reference.delta, question);
}

}  // namespace pydedup
