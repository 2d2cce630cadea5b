// SPDX-License-Identifier: Apache-2.0
#include "codec/low_rank.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "codec/convert.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace detail {
namespace {

constexpr unsigned kMaxRank = 64;
// So that a product of two, 64 times, has at most 2^52.
constexpr unsigned kMaxBits = 24;
constexpr std::int32_t kLargest = (std::int32_t{1} << (kMaxBits - 1)) - 1;
constexpr int kMaxExponent = 900;

// Bits of each of these numbers with its sign, 0 if all are 0.
unsigned width_of(Factor numbers) noexcept {
    std::uint32_t used = 0;
    for (const std::int32_t number : numbers) {
        used |= static_cast<std::uint32_t>(number < 0 ? -number : number);
    }
    return used == 0 ? 0 : static_cast<unsigned>(std::bit_width(used)) + 1;
}

// Of a delta that may have factors: those before what says of which rank.
std::size_t bytes_before_rank(Encoding encoding) noexcept {
    constexpr std::size_t kDtype = 1;
    return kDeltaHeaderBytes + (encoding == Encoding::quantised ? kStepBytes : 0) + kDtype;
}

std::size_t packed_bytes(std::span<const std::uint8_t> widths, std::size_t n) noexcept {
    std::size_t bits = 0;
    for (const std::uint8_t width : widths) bits += width * n;
    return (bits + 7) / 8;
}

void put_factor(Sink& sink, unsigned rank, Factor factor) {
    const std::size_t n = factor.size() / rank;
    const std::size_t first = sink.size();
    for (unsigned k = 0; k < rank; ++k) {
        sink.push_back(static_cast<std::uint8_t>(width_of(factor.subspan(k * n, n))));
    }
    const std::size_t at = sink.size();
    sink.resize(at + packed_bytes(std::span(sink).subspan(first), n));
    std::uint8_t* to = sink.data() + at;
    std::uint64_t bits = 0;
    unsigned n_bits = 0;
    for (unsigned k = 0; k < rank; ++k) {
        const unsigned width = sink[first + k];
        const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
        for (std::size_t i = 0; width != 0 && i < n; ++i) {
            bits |= (static_cast<std::uint64_t>(factor[k * n + i]) & mask) << n_bits;
            n_bits += width;
            if (n_bits < 32) continue;
            store_le(reinterpret_cast<std::byte*>(to), static_cast<std::uint32_t>(bits));
            to += sizeof(std::uint32_t);
            bits >>= 32;
            n_bits -= 32;
        }
    }
    for (; to != sink.data() + sink.size(); bits >>= 8) *to++ = static_cast<std::uint8_t>(bits);
}

// The bytes of a factor of n numbers for each of `rank`; empty when they are cut off or no factor.
std::span<const std::uint8_t> take_factor(Source& source, unsigned rank, std::size_t n) noexcept {
    const std::span<const std::uint8_t> left = source.left;
    if (left.size() < rank) return {};
    const auto widths = left.first(rank);
    for (const std::uint8_t width : widths) {
        if (width > kMaxBits) return {};
    }
    const std::size_t bytes = rank + packed_bytes(widths, n);
    return bytes <= left.size() ? source.take(bytes) : std::span<const std::uint8_t>{};
}

// The factor itself, or where it is said to lie in front of the block.
std::span<const std::uint8_t> find_factor(Source& source, unsigned rank, std::size_t n,
                                          const std::uint8_t* block, std::size_t before) noexcept {
    const std::uint64_t behind = source.varint();
    if (source.failed) return {};
    if (behind == 0) return take_factor(source, rank, n);
    if (behind > before) return {};
    Source earlier{{block - behind, static_cast<std::size_t>(behind)}};
    return take_factor(earlier, rank, n);
}

// Of each k, a bit: whether both factors have numbers that are not 0. Others move nothing, and take
// memory that a page of a few bytes need not pay for. One is left, as factors have a rank.
std::uint64_t that_move(std::span<const std::uint8_t> of_rows,
                        std::span<const std::uint8_t> of_cols, unsigned rank) noexcept {
    std::uint64_t moving = 0;
    for (unsigned k = 0; k < rank; ++k) {
        if (of_rows[k] != 0 && of_cols[k] != 0) moving |= std::uint64_t{1} << k;
    }
    return moving == 0 ? 1 : moving;
}

// The numbers of those k whose bit is in `wanted`. False when one, of whatever k, is no such
// number, or bits are left over that are not 0.
bool unpack(std::span<const std::uint8_t> factor, unsigned rank, std::uint64_t wanted,
            std::size_t n, std::vector<std::int32_t>& numbers) {
    const auto taken = static_cast<std::size_t>(std::popcount(wanted));
    const std::size_t room_for_others = taken == rank ? 0 : n;
    numbers.resize(taken * n + room_for_others);
    const std::size_t bytes = factor.size() - rank;
    thread_local std::vector<std::uint8_t> packed;
    packed.resize(bytes + kUnpackedAhead);
    std::memcpy(packed.data(), factor.data() + rank, bytes);
    std::memset(packed.data() + bytes, 0, kUnpackedAhead);
    const DeltaKernels& delta = kernels().codec.delta;
    std::size_t bit = 0;
    std::int32_t* to = numbers.data();
    for (unsigned k = 0; k < rank; ++k) {
        const unsigned width = factor[k];
        const bool is_wanted = (wanted >> k & 1U) != 0;
        if (width == 0) {
            if (is_wanted) to = std::fill_n(to, n, 0);
            continue;
        }
        delta.unpack(packed.data(), bit, width, n, to);
        bit += width * n;
        if (width == kMaxBits && *std::min_element(to, to + n) < -kLargest) return false;
        if (is_wanted) to += n;
    }
    numbers.resize(taken * n);
    const unsigned stray = bit % 8 == 0 ? 0U : factor.back() >> (bit % 8);
    return stray == 0;
}

// Whether numbers have 16 bits at most, and their sums are below 2^31.
bool are_pairs(const LowRank& low_rank, std::size_t rows, std::size_t cols) noexcept {
    constexpr unsigned kMost = 16;
    std::uint64_t largest = 0;
    for (unsigned k = 0; k < low_rank.rank; ++k) {
        const unsigned of_row = width_of(low_rank.of_rows.subspan(k * rows, rows));
        const unsigned of_col = width_of(low_rank.of_cols.subspan(k * cols, cols));
        if (of_row > kMost || of_col > kMost) return false;
        if (of_row != 0 && of_col != 0) largest += std::uint64_t{1} << (of_row + of_col - 2);
    }
    return largest <= std::uint64_t{1} << 31;
}

// The numbers of a factor as products take them, with zeros up to `wide` for each k.
void put_numbers(Factor factor, std::size_t n, std::size_t rank, std::size_t wide, double* to) {
    for (std::size_t k = 0; k < rank; ++k, to += wide) {
        std::copy_n(factor.data() + k * n, n, to);
        std::fill(to + n, to + wide, 0.0);
    }
}

void put_numbers(Factor factor, std::size_t n, std::size_t rank, std::size_t wide,
                 std::int32_t* to) {
    for (std::size_t k = 0; k < rank; k += 2, to += wide) {
        const std::int32_t* const first = factor.data() + k * n;
        const bool is_last = k + 1 == rank;
        const std::int32_t* const second = is_last ? first : first + n;
        const std::int32_t of_second = is_last ? 0 : -1;
        for (std::size_t i = 0; i < n; ++i) {
            to[i] = (second[i] & of_second) << 16 | (first[i] & 0xFFFF);
        }
        std::fill(to + n, to + wide, 0);
    }
}

// `products` of all rows, of `depth` numbers or pairs.
template <class Number, class Products>
void move_all(const LowRank& low_rank, std::size_t depth, const std::uint8_t* base,
              std::size_t rows, std::size_t cols, Dtype dtype, Products products,
              std::uint8_t* moved) {
    const std::size_t high = round_up(rows, kProductRows);
    const std::size_t wide = round_up(cols, kProductLanes);
    thread_local std::vector<Number> numbers;
    thread_local std::vector<double> sums;
    numbers.resize(depth * (high + wide));
    sums.resize(kProductRows * wide);
    Number* const of_rows = numbers.data();
    Number* const of_cols = of_rows + depth * high;
    put_numbers(low_rank.of_rows, rows, low_rank.rank, high, of_rows);
    put_numbers(low_rank.of_cols, cols, low_rank.rank, wide, of_cols);
    const double scale = std::ldexp(1.0, low_rank.exponent);
    const DeltaLayout layout = delta_layout(dtype);
    const std::size_t row_bytes = cols * layout.item_bytes;
    const DeltaKernels& delta = kernels().codec.delta;
    for (std::size_t i = 0; i < rows; i += kProductRows) {
        products(of_rows + i, high, of_cols, wide, depth, sums.data());
        for (std::size_t r = i; r < std::min(rows, i + kProductRows); ++r) {
            delta.move(base + r * row_bytes, sums.data() + (r - i) * wide, cols, layout, scale,
                       moved + r * row_bytes);
        }
    }
}

void move_base(const LowRank& low_rank, const std::uint8_t* base, std::size_t rows,
               std::size_t cols, Dtype dtype, std::uint8_t* moved) {
    const DeltaKernels& delta = kernels().codec.delta;
    if (delta.prefers_pairs && are_pairs(low_rank, rows, cols)) {
        move_all<std::int32_t>(low_rank, ceil_div(low_rank.rank, 2U), base, rows, cols, dtype,
                               delta.pair_products, moved);
    } else {
        move_all<double>(low_rank, low_rank.rank, base, rows, cols, dtype, delta.products, moved);
    }
}

}  // namespace

void check_low_rank(const LowRank& low_rank, std::size_t rows, std::size_t cols) {
    const auto refuse = [](const std::string& what) {
        throw Error(ErrorCode::invalid_argument, "factors of a delta " + what);
    };
    if (low_rank.rank == 0 || low_rank.rank > kMaxRank) {
        refuse("have rank 1 to 64, got " + std::to_string(low_rank.rank));
    }
    if (std::abs(low_rank.exponent) > kMaxExponent) {
        refuse("have an exponent of -900 to 900, got " + std::to_string(low_rank.exponent));
    }
    if (low_rank.of_rows.size() != low_rank.rank * rows ||
        low_rank.of_cols.size() != low_rank.rank * cols) {
        refuse("must fit a block of " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    for (const Factor factor : {low_rank.of_rows, low_rank.of_cols}) {
        for (const std::int32_t number : factor) {
            if (number > kLargest || number < -kLargest) {
                refuse("have numbers below 2^23, got " + std::to_string(number));
            }
        }
    }
}

void add_low_rank(const LowRank& low_rank, const std::uint8_t* base, std::size_t rows,
                  std::size_t cols, Dtype dtype, std::uint8_t* moved) {
    if (dtype != Dtype::f16) return move_base(low_rank, base, rows, cols, dtype, moved);
    const std::size_t count = rows * cols;
    const auto values = std::make_unique_for_overwrite<std::uint8_t[]>(count * sizeof(float));
    convert_floats(base, Dtype::f16, count, values.get(), Dtype::f32);
    move_base(low_rank, values.get(), rows, cols, Dtype::f32, values.get());
    convert_floats(values.get(), Dtype::f32, count, moved, Dtype::f16);
}

std::size_t put_low_rank(Sink& sink, const LowRank& low_rank) {
    sink.push_back(static_cast<std::uint8_t>(low_rank.rank));
    const auto exponent = static_cast<std::uint16_t>(static_cast<std::int16_t>(low_rank.exponent));
    sink.push_back(static_cast<std::uint8_t>(exponent));
    sink.push_back(static_cast<std::uint8_t>(exponent >> 8));
    std::size_t bytes = 0;
    for (const Factor factor : {low_rank.of_rows, low_rank.of_cols}) {
        put_varint(sink, 0);
        const std::size_t first = sink.size();
        put_factor(sink, low_rank.rank, factor);
        bytes += sink.size() - first;
    }
    return bytes;
}

void put_no_low_rank(Sink& sink) { sink.push_back(0); }

bool skip_no_low_rank(Source& source) noexcept {
    if (source.left.empty() || source.left.front() != 0) return false;
    static_cast<void>(source.byte());
    return true;
}

const char* get_low_rank(Source& source, std::size_t rows, std::size_t cols,
                         const std::uint8_t* block, std::size_t before, ReadLowRank& low_rank) {
    low_rank.rank = source.byte();
    const unsigned low = source.byte();
    low_rank.exponent = static_cast<std::int16_t>(low | unsigned{source.byte()} << 8);
    if (source.failed || low_rank.rank == 0 || low_rank.rank > kMaxRank ||
        std::abs(low_rank.exponent) > kMaxExponent) {
        return "its factors have an impossible rank or exponent";
    }
    constexpr const char* kDamaged = "its factors are damaged";
    const unsigned rank = low_rank.rank;
    const auto of_rows = find_factor(source, rank, rows, block, before);
    if (of_rows.empty()) return kDamaged;
    const auto of_cols = find_factor(source, rank, cols, block, before);
    if (of_cols.empty()) return kDamaged;
    const std::uint64_t moving = that_move(of_rows, of_cols, rank);
    if (!unpack(of_rows, rank, moving, rows, low_rank.of_rows) ||
        !unpack(of_cols, rank, moving, cols, low_rank.of_cols)) {
        return kDamaged;
    }
    low_rank.rank = static_cast<unsigned>(std::popcount(moving));
    return nullptr;
}

std::size_t bytes_besides_factors(const BlockView& delta) {
    const std::optional<FactorPlaces> places = find_factors(delta);
    if (!places) return delta.length;
    return places->head.size() + places->tail.size();
}

std::optional<FactorPlaces> find_factors(const BlockView& delta) {
    if (!has_factors(delta)) return std::nullopt;
    const auto* const block = reinterpret_cast<const std::uint8_t*>(delta.data);
    Source source{{block, delta.length}};
    const std::size_t at_rank = bytes_before_rank(delta.encoding);
    constexpr std::size_t kRankAndExponent = 3;
    const std::size_t head = at_rank + kRankAndExponent;
    if (delta.length < head) return std::nullopt;
    const unsigned rank = block[at_rank];
    static_cast<void>(source.take(head));
    if (rank == 0 || rank > kMaxRank) return std::nullopt;
    const auto of_rows = find_factor(source, rank, delta.rows, block, delta.before);
    if (of_rows.empty()) return std::nullopt;
    const auto of_cols = find_factor(source, rank, delta.cols, block, delta.before);
    if (of_cols.empty()) return std::nullopt;
    return FactorPlaces{{delta.data, head},
                        std::as_bytes(of_rows),
                        std::as_bytes(of_cols),
                        std::as_bytes(source.left)};
}

}  // namespace detail

bool has_factors(const BlockView& block) noexcept {
    if (!is_delta(block.encoding) || block.length == 0) return false;
    const auto version = static_cast<std::uint8_t>(block.data[0]);
    const std::size_t at_rank = detail::bytes_before_rank(block.encoding);
    return version == detail::kLowRankDeltaVersion ||
           (version == detail::kTransposedDeltaVersion && block.length > at_rank &&
            block.data[at_rank] != std::byte{0});
}

std::size_t encoded_bytes(const BlockView& block) {
    const auto places = detail::find_factors(block);
    if (!places) return block.length;
    return places->head.size() + 1 + places->of_rows.size() + 1 + places->of_cols.size() +
           places->tail.size();
}

void copy_encoded(const BlockView& block, std::span<std::byte> out) {
    const auto places = detail::find_factors(block);
    std::byte* to = out.data();
    const auto put = [&](std::span<const std::byte> bytes) {
        to = std::copy(bytes.begin(), bytes.end(), to);
    };
    if (!places) {
        put({block.data, block.length});
        return;
    }
    put(places->head);
    for (const std::span<const std::byte> factor : {places->of_rows, places->of_cols}) {
        *to++ = std::byte{0};  // it follows
        put(factor);
    }
    put(places->tail);
}

}  // namespace pydedup
