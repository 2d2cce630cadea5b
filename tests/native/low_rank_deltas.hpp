// SPDX-License-Identifier: Apache-2.0
// What tests of deltas on moved bases share: factors, what they move, and deltas with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "codec/delta_encoder.hpp"
#include "codec/low_rank.hpp"
#include "deltas.hpp"

namespace pydedup::testing {

struct Factors {
    unsigned rank;
    int exponent;
    std::vector<std::int32_t> of_rows, of_cols;

    [[nodiscard]] detail::LowRank view() const { return {rank, exponent, of_rows, of_cols}; }
};

inline Factors random_factors(std::size_t rows, std::size_t cols, unsigned rank,
                              std::int32_t largest, int exponent, std::mt19937_64& random) {
    std::uniform_int_distribution<std::int32_t> draw(-largest, largest);
    Factors factors{rank, exponent, std::vector<std::int32_t>(rank * rows),
                    std::vector<std::int32_t>(rank * cols)};
    for (std::int32_t& number : factors.of_rows) number = draw(random);
    for (std::int32_t& number : factors.of_cols) number = draw(random);
    return factors;
}

inline Buffer moved_by(const Factors& factors, const Buffer& base, std::size_t rows,
                       std::size_t cols, Dtype dtype) {
    Buffer moved(base.size());
    detail::add_low_rank(factors.view(), base.data(), rows, cols, dtype, moved.data());
    return moved;
}

inline Encoded encode(const MatrixRef& block, const MatrixRef& base, const Factors& factors,
                      std::optional<double> max_rel_error = std::nullopt,
                      std::optional<std::size_t> most = std::nullopt) {
    Encoded result;
    result.bytes.resize(most.value_or(block.rows * block.cols * item_bytes(block.dtype)));
    const detail::LowRank low_rank = factors.view();
    detail::DeltaEncoder encoder;
    const auto encoded = encoder.encode(
        block, base, max_rel_error, {at(result.bytes), result.bytes.size()}, {false, &low_rank});
    if (!encoded) return {};
    result.bytes.resize(encoded->length);
    result.bytes.shrink_to_fit();
    result.encoding = encoded->encoding;
    return result;
}

// How a block differs from its moved base.
enum class Change { none, few, some_small, some_large, all };

inline Buffer changed(const Buffer& block, Dtype dtype, Change how, std::mt19937_64& random) {
    Buffer result = block;
    const std::size_t item = item_bytes(dtype);
    for (std::size_t i = 0; i < block.size(); i += item) {
        const bool is_changed = how == Change::all || (how == Change::few && i / item % 61 == 3) ||
                                (how != Change::few && random() % 9 == 0);
        if (how == Change::none || !is_changed) continue;
        std::uint64_t bits = 0;
        std::memcpy(&bits, &block[i], item);
        // Large: all of the element but its sign and exponent.
        bits ^= how == Change::some_large && item > 2 ? random() >> (item == 8 ? 12 : 41)
                                                      : random() % 7;
        std::memcpy(&result[i], &bits, item);
    }
    return result;
}

}  // namespace pydedup::testing
