// SPDX-License-Identifier: Apache-2.0
// What tests of delta encodings share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "blocks.hpp"
#include "codec/convert.hpp"
#include "pydedup/codec.hpp"

namespace pydedup::testing {

inline Buffer as_dtype(const std::vector<double>& values, Dtype dtype) {
    Buffer bytes(values.size() * item_bytes(dtype));
    detail::convert_floats(reinterpret_cast<const std::uint8_t*>(values.data()), Dtype::f64,
                           values.size(), bytes.data(), dtype);
    return bytes;
}

inline std::vector<double> as_doubles(const Buffer& bytes, Dtype dtype) {
    std::vector<double> values(bytes.size() / item_bytes(dtype));
    detail::convert_floats(bytes.data(), dtype, values.size(),
                           reinterpret_cast<std::uint8_t*>(values.data()), Dtype::f64);
    return values;
}

inline std::vector<double> normal(std::size_t n, double spread, std::mt19937_64& random) {
    std::normal_distribution<double> draw(0.0, spread);
    std::vector<double> values(n);
    for (double& value : values) value = draw(random);
    return values;
}

struct Encoded {
    Buffer bytes;
    Encoding encoding = Encoding::raw;
};

inline Encoded encode(const MatrixRef& block, const MatrixRef& base,
                      std::optional<double> max_rel_error = std::nullopt) {
    Encoded result;
    result.bytes.resize(block.rows * block.cols * item_bytes(block.dtype));
    const auto encoded =
        encode_delta(block, base, max_rel_error, {at(result.bytes), result.bytes.size()});
    if (!encoded) return {};
    result.bytes.resize(encoded->length);
    result.bytes.shrink_to_fit();  // decoding must not look behind
    result.encoding = encoded->encoding;
    return result;
}

inline Buffer decode(const Encoded& delta, const BlockView& base, Dtype dtype) {
    Buffer out(std::size_t{base.rows} * base.cols * item_bytes(dtype));
    decode_delta(view(delta.bytes, base.rows, base.cols, dtype, delta.encoding), base, at(out),
                 base.cols * item_bytes(dtype));
    return out;
}

// A block's elements one behind the other.
inline Buffer copied(const MatrixRef& block) {
    Buffer bytes;
    for (std::size_t r = 0; r < block.rows; ++r) {
        const auto* const row =
            reinterpret_cast<const std::uint8_t*>(block.data) + r * block.stride_bytes;
        bytes.insert(bytes.end(), row, row + block.cols * item_bytes(block.dtype));
    }
    return bytes;
}

}  // namespace pydedup::testing
