// SPDX-License-Identifier: Apache-2.0
// Deltas on transposed bases: blocks of every shape come back, moved by factors as well, and what
// docs/format.md does not allow is refused.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "check.hpp"
#include "codec/delta_encoder.hpp"
#include "codec/low_rank.hpp"
#include "codec/transposed.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/error.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::array kDtypes = {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16,
                                Dtype::i8,  Dtype::i16, Dtype::u64, Dtype::boolean};
constexpr std::array<std::pair<std::size_t, std::size_t>, 6> kShapes = {
    {{64, 64}, {1, 300}, {300, 1}, {31, 67}, {48, 16}, {17, 64}}};
constexpr std::size_t kDtypeAt = 12;

Buffer transposed(const Buffer& from, std::size_t rows, std::size_t cols, std::size_t item) {
    Buffer to(from.size());
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) {
            std::memcpy(&to[(j * rows + i) * item], &from[(i * cols + j) * item], item);
        }
    }
    return to;
}

Encoded encode_on_transposed(const MatrixRef& block, const MatrixRef& base,
                             std::optional<double> max_rel_error = std::nullopt,
                             const detail::LowRank* low_rank = nullptr) {
    Encoded result;
    result.bytes.resize(block.rows * block.cols * item_bytes(block.dtype));
    detail::DeltaEncoder encoder;
    const auto encoded = encoder.encode(block, base, max_rel_error,
                                        {at(result.bytes), result.bytes.size()}, {true, low_rank});
    if (!encoded) return {};
    result.bytes.resize(encoded->length);
    result.bytes.shrink_to_fit();  // decoding must not look behind
    result.encoding = encoded->encoding;
    return result;
}

Buffer decoded(const Encoded& delta, const BlockView& base, Dtype dtype) {
    const std::uint32_t rows = base.cols;
    const std::uint32_t cols = base.rows;
    Buffer out(std::size_t{rows} * cols * item_bytes(dtype));
    decode_delta(view(delta.bytes, rows, cols, dtype, delta.encoding), base, at(out),
                 cols * item_bytes(dtype));
    return out;
}

TEST(elements_of_each_size_change_places) {
    std::mt19937_64 random(1);
    for (const std::size_t item : {1U, 2U, 4U, 8U}) {
        for (const auto& [rows, cols] : kShapes) {
            const Buffer from = random_bytes(rows * cols * item, random);
            Buffer to(from.size());
            detail::transpose(from.data(), rows, cols, item, to.data());
            CHECK(to == transposed(from, rows, cols, item));
        }
    }
}

TEST(blocks_of_every_dtype_and_shape_come_back) {
    std::mt19937_64 random(2);
    for (const Dtype dtype : kDtypes) {
        const std::size_t item = item_bytes(dtype);
        for (const auto& [rows, cols] : kShapes) {
            const Buffer base = random_bytes(rows * cols * item, random);
            Buffer block = transposed(base, rows, cols, item);
            for (const std::size_t step : {0U, 97U, 5U}) {
                for (std::size_t i = 0; step != 0 && i < block.size(); i += step * item) {
                    block[i] ^= 1;
                }
                const Encoded delta = encode_on_transposed(matrix(block, cols, rows, dtype),
                                                           matrix(base, rows, cols, dtype));
                CHECK(!delta.bytes.empty());
                CHECK(delta.bytes[0] == 4);
                CHECK(delta.encoding == Encoding::delta);
                CHECK(decoded(delta, view(base, rows, cols, dtype), dtype) == block);
                CHECK(!has_factors(view(delta.bytes, cols, rows, dtype, delta.encoding)));
            }
        }
    }
}

TEST(bases_are_converted_masked_and_moved) {
    std::mt19937_64 random(3);
    const std::size_t rows = 40;
    const std::size_t cols = 64;
    const std::vector<std::int32_t> of_rows(2 * cols, 3);
    const std::vector<std::int32_t> of_cols(2 * rows, -77);
    const detail::LowRank low_rank{2, -20, of_rows, of_cols};
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16}) {
        for (const Dtype of_base : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16}) {
            const Buffer base = as_dtype(normal(rows * cols, 0.02, random), of_base);
            const std::vector<double> turned =
                as_doubles(transposed(base, rows, cols, item_bytes(of_base)), of_base);
            for (const bool moves : {false, true}) {
                Buffer block = as_dtype(turned, dtype);
                if (moves) {
                    const Buffer still = block;
                    detail::add_low_rank(low_rank, still.data(), cols, rows, dtype, block.data());
                }
                for (const bool pruned : {false, true}) {
                    if (pruned) {
                        const std::size_t item = item_bytes(dtype);
                        for (std::size_t i = 0; i < block.size(); i += 3 * item) {
                            std::memset(&block[i], 0, item);
                        }
                    }
                    for (const auto& bound : {std::optional<double>(), {0.01}}) {
                        const Encoded delta = encode_on_transposed(
                            matrix(block, cols, rows, dtype), matrix(base, rows, cols, of_base),
                            bound, moves ? &low_rank : nullptr);
                        CHECK(!delta.bytes.empty());
                        CHECK(delta.bytes.size() < 2000);
                        const BlockView stored =
                            view(delta.bytes, cols, rows, dtype, delta.encoding);
                        CHECK(has_factors(stored) == moves);
                        const Buffer back = decoded(delta, view(base, rows, cols, of_base), dtype);
                        if (delta.encoding == Encoding::delta) CHECK(back == block);
                    }
                }
            }
        }
    }
}

TEST(a_base_of_another_shape_is_refused) {
    std::mt19937_64 random(4);
    const Buffer base = random_bytes(40 * 64 * 4, random);
    const Buffer block = transposed(base, 40, 64, 4);
    const MatrixRef to = matrix(block, 64, 40, Dtype::f32);
    CHECK_THROWS(ErrorCode::invalid_argument,
                 static_cast<void>(encode_on_transposed(to, matrix(base, 64, 40, Dtype::f32))));
    const Encoded delta = encode_on_transposed(to, matrix(base, 40, 64, Dtype::f32));
    const auto read = [&](const Encoded& from, std::uint32_t rows, std::uint32_t cols) {
        Buffer out(block.size());
        decode_delta(view(from.bytes, 64, 40, Dtype::f32, from.encoding),
                     view(base, rows, cols, Dtype::f32), at(out), 40 * 4);
    };
    read(delta, 40, 64);
    CHECK_THROWS(ErrorCode::corrupt_page, read(delta, 64, 40));
    CHECK_THROWS(ErrorCode::corrupt_page, read(delta, 20, 128));
    Encoded as_it_is = delta;
    as_it_is.bytes[0] = 2;  // whose mask then begins with the byte that says of no factors
    CHECK_THROWS(ErrorCode::corrupt_page, read(as_it_is, 40, 64));
}

TEST(what_the_format_does_not_allow_is_refused) {
    std::mt19937_64 random(5);
    const Buffer base = random_bytes(16 * 16 * 4, random);
    const Buffer block = transposed(base, 16, 16, 4);
    const Encoded sound =
        encode_on_transposed(matrix(block, 16, 16, Dtype::f32), matrix(base, 16, 16, Dtype::f32));
    const Buffer expected = {4, 0, 2, 0, 0, 1, 0, 0};  // form, dtype of the base, shift, elements
    CHECK(std::equal(expected.begin(), expected.end(), sound.bytes.begin()));
    CHECK(sound.bytes.size() == 16);  // behind the check: a dtype, no factors, no mask, no change
    CHECK(std::count(sound.bytes.begin() + kDtypeAt + 1, sound.bytes.end(), 0) == 3);
    const auto refused = [&](std::size_t where, std::uint8_t byte, ErrorCode code) {
        Encoded damaged = sound;
        damaged.bytes[where] = byte;
        CHECK_THROWS(
            code, static_cast<void>(decoded(damaged, view(base, 16, 16, Dtype::f32), Dtype::f32)));
    };
    refused(0, 6, ErrorCode::unsupported_format);
    refused(0, 5, ErrorCode::corrupt_page);  // whose mask begins with the byte that says of factors
    refused(1, 3, ErrorCode::corrupt_page);
    refused(kDtypeAt, 1, ErrorCode::corrupt_page);       // wider than the block's
    refused(kDtypeAt + 1, 1, ErrorCode::corrupt_page);   // factors that are not there
    refused(kDtypeAt + 1, 65, ErrorCode::corrupt_page);  // nor could be
    for (std::size_t length = 0; length < sound.bytes.size(); ++length) {
        Encoded cut = sound;
        cut.bytes.resize(length);
        cut.bytes.shrink_to_fit();
        CHECK_THROWS(ErrorCode::corrupt_page,
                     static_cast<void>(decoded(cut, view(base, 16, 16, Dtype::f32), Dtype::f32)));
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
