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

// Bits of a number with its sign, 0 for 0.
unsigned bits_of(std::int32_t value) noexcept {
    if (value == 0) return 0;
    const auto magnitude = static_cast<std::uint32_t>(value < 0 ? -value : value);
    return static_cast<unsigned>(std::bit_width(magnitude)) + 1;
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
        unsigned width = 0;
        for (std::size_t i = 0; i < n; ++i) width = std::max(width, bits_of(factor[k * n + i]));
        sink.push_back(static_cast<std::uint8_t>(width));
    }
    std::uint64_t bits = 0;
    unsigned n_bits = 0;
    for (unsigned k = 0; k < rank; ++k) {
        const unsigned width = sink[first + k];
        const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
        for (std::size_t i = 0; width != 0 && i < n; ++i) {
            bits |= (static_cast<std::uint64_t>(factor[k * n + i]) & mask) << n_bits;
            n_bits += width;
            for (; n_bits >= 8; n_bits -= 8, bits >>= 8) {
                sink.push_back(static_cast<std::uint8_t>(bits));
            }
        }
    }
    if (n_bits != 0) sink.push_back(static_cast<std::uint8_t>(bits));
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

// False when a number is no such number, or bits are left over that are not 0.
bool unpack(std::span<const std::uint8_t> factor, unsigned rank, std::size_t n,
            std::vector<std::int32_t>& numbers) {
    numbers.resize(rank * n);
    // Words are read where a number begins, so there must be one behind the last.
    thread_local std::vector<std::byte> packed;
    packed.resize(factor.size() - rank + sizeof(std::uint64_t));
    std::memcpy(packed.data(), factor.data() + rank, factor.size() - rank);
    std::memset(packed.data() + factor.size() - rank, 0, sizeof(std::uint64_t));
    std::size_t bit = 0;
    std::int32_t least = 0;
    for (unsigned k = 0; k < rank; ++k) {
        const unsigned width = factor[k];
        std::int32_t* const to = numbers.data() + k * n;
        if (width == 0) {
            std::fill_n(to, n, 0);
            continue;
        }
        const unsigned unused = 32 - width;
        for (std::size_t i = 0; i < n; ++i, bit += width) {
            const std::uint64_t word = load_le<std::uint64_t>(packed.data() + bit / 8) >> (bit % 8);
            to[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) << unused) >> unused;
            least = std::min(least, to[i]);
        }
    }
    const unsigned stray = bit % 8 == 0 ? 0U : factor.back() >> (bit % 8);
    return least >= -kLargest && stray == 0;
}

// What does not move, or is not finite, keeps its bits.
template <class Float>
void add_row(const Float* base, const double* sums, double scale, std::size_t cols,
             Float* moved) noexcept {
    for (std::size_t j = 0; j < cols; ++j) {
        const bool stays = sums[j] == 0 || !std::isfinite(base[j]);
        const auto sum = static_cast<Float>(static_cast<double>(base[j]) + sums[j] * scale);
        moved[j] = stays ? base[j] : sum;
    }
}

// Of elements that lie aligned.
template <class Float>
void add_all(const LowRank& low_rank, const Float* base, std::size_t rows, std::size_t cols,
             Float* moved) {
    const std::size_t rank = low_rank.rank;
    const std::size_t wide = round_up(cols, kProductLanes);
    thread_local std::vector<double> room;
    room.assign((rank + 1) * wide + rank, 0);
    double* const of_cols = room.data();
    double* const sums = of_cols + rank * wide;
    double* const of_row = sums + wide;
    for (std::size_t k = 0; k < rank; ++k) {
        std::copy_n(low_rank.of_cols.data() + k * cols, cols, of_cols + k * wide);
    }
    const double scale = std::ldexp(1.0, low_rank.exponent);
    const DeltaKernels& delta = kernels().codec.delta;
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t k = 0; k < rank; ++k) of_row[k] = low_rank.of_rows[k * rows + i];
        delta.products(of_row, of_cols, rank, wide, sums);
        add_row(base + i * cols, sums, scale, cols, moved + i * cols);
    }
}

template <class Float>
void add_of(const LowRank& low_rank, const std::uint8_t* base, std::size_t rows, std::size_t cols,
            Dtype dtype, Dtype wide, std::uint8_t* moved) {
    const std::size_t count = rows * cols;
    const auto values = std::make_unique_for_overwrite<Float[]>(count);
    auto* const bytes = reinterpret_cast<std::uint8_t*>(values.get());
    if (dtype == wide) {
        std::memcpy(bytes, base, count * sizeof(Float));
    } else {
        convert_floats(base, dtype, count, bytes, wide);
    }
    add_all(low_rank, values.get(), rows, cols, values.get());
    if (dtype == wide) {
        std::memcpy(moved, bytes, count * sizeof(Float));
    } else {
        convert_floats(bytes, wide, count, moved, dtype);
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
    if (dtype == Dtype::f64) {
        add_of<double>(low_rank, base, rows, cols, dtype, Dtype::f64, moved);
    } else {
        add_of<float>(low_rank, base, rows, cols, dtype, Dtype::f32, moved);
    }
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

const char* get_low_rank(Source& source, std::size_t rows, std::size_t cols,
                         const std::uint8_t* block, std::size_t before, ReadLowRank& low_rank) {
    low_rank.rank = source.byte();
    const unsigned low = source.byte();
    low_rank.exponent = static_cast<std::int16_t>(low | unsigned{source.byte()} << 8);
    if (source.failed || low_rank.rank == 0 || low_rank.rank > kMaxRank ||
        std::abs(low_rank.exponent) > kMaxExponent) {
        return "its factors have an impossible rank or exponent";
    }
    const auto get = [&](std::size_t n, std::vector<std::int32_t>& numbers) {
        const auto factor = find_factor(source, low_rank.rank, n, block, before);
        return !factor.empty() && unpack(factor, low_rank.rank, n, numbers);
    };
    if (!get(rows, low_rank.of_rows) || !get(cols, low_rank.of_cols)) {
        return "its factors are damaged";
    }
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
    const std::size_t fixed =
        kDeltaHeaderBytes + (delta.encoding == Encoding::quantised ? kStepBytes : 0);
    constexpr std::size_t kDtypeRankAndExponent = 4;
    const std::size_t head = fixed + kDtypeRankAndExponent;
    if (delta.length < head) return std::nullopt;
    const unsigned rank = block[fixed + 1];
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
    return is_delta(block.encoding) && block.length != 0 &&
           static_cast<std::uint8_t>(block.data[0]) == detail::kLowRankDeltaVersion;
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
