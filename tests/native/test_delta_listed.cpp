// SPDX-License-Identifier: Apache-2.0
// Deltas of which most differences are 0, as lists: round trips, sizes, and what is refused.
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/delta_listed.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/codec.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::uint8_t kListed = 3;

bool is_listed(const Encoded& delta) {
    return !delta.bytes.empty() && delta.bytes[0] == 5 && delta.bytes[1] == kListed;
}

// What is added to an element that changes.
enum class Step { one, few_values, many_values, any };

std::uint64_t step(Step kind, std::size_t item, std::mt19937_64& random) {
    const std::uint64_t sign = random() % 2 == 0 ? 1 : ~std::uint64_t{0};
    switch (kind) {
        case Step::one:
            return sign;
        case Step::few_values:
            return sign * (item > 1 ? 1000 : 16) * (1 + random() % 3);
        case Step::many_values:
            return sign * (1 + random() % 60);
        default:
            return item == 8 ? random() >> 3 : random() >> 40;
    }
}

TEST(lists_of_every_dtype_and_density_come_back) {
    std::mt19937_64 random(51);
    std::map<Dtype, int> listed;
    for (const Dtype dtype : kDtypes) {
        const std::size_t item = item_bytes(dtype);
        for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{64, 64},
                                         {1, 4097},
                                         {31, 67},
                                         {256, 64},
                                         {3, 5}}) {
            for (const unsigned percent : {1U, 4U, 11U, 27U, 45U, 60U}) {
                for (const Step kind :
                     {Step::one, Step::few_values, Step::many_values, Step::any}) {
                    const Buffer base = random_bytes(rows * cols * item, random);
                    Buffer block = base;
                    // Half of them in the first part: what comes behind is far away.
                    const std::size_t dense = percent == 4 ? rows * cols / 8 : rows * cols;
                    for (std::size_t i = 0; i < rows * cols; ++i) {
                        if (random() % 100 >= percent || (i > dense && random() % 400 != 0))
                            continue;
                        std::uint64_t bits = 0;
                        std::memcpy(&bits, &block[i * item], item);
                        bits += step(kind, item, random);
                        std::memcpy(&block[i * item], &bits, item);
                    }
                    const Encoded delta =
                        encode(matrix(block, rows, cols, dtype), matrix(base, rows, cols, dtype));
                    if (delta.bytes.empty()) continue;
                    CHECK(delta.encoding == Encoding::delta);
                    CHECK(decode(delta, view(base, rows, cols, dtype), dtype) == block);
                    listed[dtype] += is_listed(delta) ? 1 : 0;
                }
            }
        }
    }
    for (const Dtype dtype : kDtypes) CHECK(listed[dtype] > 8);
}

// Bits of an element of which one in so many changes, by one of two values.
double entropy(double share) {
    const double changed = share / 2;
    return -2 * changed * std::log2(changed) - (1 - share) * std::log2(1 - share);
}

TEST(lists_are_about_as_small_as_can_be) {
    std::mt19937_64 random(52);
    const std::size_t rows = 256;
    const std::size_t cols = 64;
    const Buffer base = random_bytes(rows * cols, random);
    for (const double share : {0.005, 0.01, 0.03, 0.1, 0.2, 0.3}) {
        Buffer block = base;
        std::bernoulli_distribution changes(share);
        for (std::uint8_t& element : block) {
            if (changes(random))
                element = static_cast<std::uint8_t>(element + random() % 2 * 2 - 1);
        }
        const Encoded delta =
            encode(matrix(block, rows, cols, Dtype::u8), matrix(base, rows, cols, Dtype::u8));
        CHECK(is_listed(delta));
        const double best = entropy(share) * static_cast<double>(rows * cols) / 8;
        CHECK(static_cast<double>(delta.bytes.size()) < 1.1 * best + 32);
        const double about =
            static_cast<double>(estimate_delta(matrix(block, rows, cols, Dtype::u8),
                                               matrix(base, rows, cols, Dtype::u8), std::nullopt));
        CHECK(std::abs(about / static_cast<double>(delta.bytes.size()) - 1) < 0.2);
    }
}

TEST(lists_of_quantised_pruned_and_narrow_blocks_come_back) {
    std::mt19937_64 random(53);
    const std::size_t rows = 64;
    const std::size_t cols = 64;
    const std::vector<double> values = normal(rows * cols, 0.02, random);
    std::array<int, 3> listed{};
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16}) {
        const Buffer base = as_dtype(values, dtype);
        std::vector<double> moved = as_doubles(base, dtype);
        std::vector<double> pruned = moved;
        for (std::size_t i = 0; i < moved.size(); ++i) {
            if (random() % 8 == 0) moved[i] *= 1.125;
            if (random() % 3 == 0) pruned[i] = 0;
            if (random() % 9 == 0) pruned[i] *= 1.015625;
        }
        const Encoded quantised = encode(matrix(as_dtype(moved, dtype), rows, cols, dtype),
                                         matrix(base, rows, cols, dtype), 0.01);
        const std::vector<double> back =
            as_doubles(decode(quantised, view(base, rows, cols, dtype), dtype), dtype);
        double error = 0;
        double norm = 0;
        for (std::size_t i = 0; i < moved.size(); ++i) {
            error += (moved[i] - back[i]) * (moved[i] - back[i]);
            norm += moved[i] * moved[i];
        }
        CHECK(error <= 0.01 * 0.01 * norm * 1.1);
        listed[0] += is_listed(quantised) ? 1 : 0;
        const Buffer of_pruned = as_dtype(pruned, dtype);
        const Encoded masked =
            encode(matrix(of_pruned, rows, cols, dtype), matrix(base, rows, cols, dtype));
        CHECK(decode(masked, view(base, rows, cols, dtype), dtype) == of_pruned);
        listed[1] += is_listed(masked) ? 1 : 0;
    }
    const Buffer base = as_dtype(values, Dtype::bf16);
    Buffer narrow = base;
    for (std::size_t i = 0; i < narrow.size(); i += 2) narrow[i] ^= random() % 9 == 0 ? 1 : 0;
    const Buffer wide = as_dtype(as_doubles(narrow, Dtype::bf16), Dtype::f32);
    const Encoded delta =
        encode(matrix(wide, rows, cols, Dtype::f32), matrix(base, rows, cols, Dtype::bf16));
    CHECK(decode(delta, view(base, rows, cols, Dtype::bf16), Dtype::f32) == wide);
    listed[2] += is_listed(delta) ? 1 : 0;
    CHECK(listed[0] > 0 && listed[1] > 0 && listed[2] > 0);
}

TEST(exact_lists_that_are_smaller_than_quantised_ones_are_taken) {
    std::mt19937_64 random(54);
    const std::size_t rows = 64;
    const std::size_t cols = 64;
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
        const Buffer base = as_dtype(normal(rows * cols, 0.02, random), dtype);
        const std::size_t item = item_bytes(dtype);
        Buffer block = base;
        // By a step of the upper byte of f32's mantissa, of f16's and bf16's the lowest one.
        const std::size_t low = item == 4 ? 2 : 0;
        for (std::size_t i = 0; i < rows * cols; ++i) {
            if (random() % 5 < 2) block[i * item + low] ^= 1;
        }
        const MatrixRef of_block = matrix(block, rows, cols, dtype);
        const MatrixRef of_base = matrix(base, rows, cols, dtype);
        const Encoded exact = encode(of_block, of_base);
        for (const double bound : {1e-5, 1e-2}) {
            const Encoded delta = encode(of_block, of_base, bound);
            CHECK(delta.bytes.size() <= exact.bytes.size());
            const bool is_same = decode(delta, view(base, rows, cols, dtype), dtype) == block;
            CHECK(is_same == (bound == 1e-5));
            const std::size_t about = estimate_delta(of_block, of_base, bound);
            CHECK(static_cast<double>(about) < 1.2 * static_cast<double>(delta.bytes.size()));
        }
    }
}

// Whether lists are read, of eight elements of a byte.
bool reads(const Buffer& bytes, std::array<std::uint32_t, 8>& z) {
    Buffer exact = bytes;
    exact.shrink_to_fit();
    detail::Source source{{exact.data(), exact.size()}};
    return detail::get_listed(source, z.size(), 8, z.data()) == nullptr;
}

TEST(lists_that_are_not_as_described_are_refused) {
    std::array<std::uint32_t, 8> z{};
    // A list of value 7: elements 2 and 3, at distances 2 and 0; none of others.
    CHECK(reads({1, 7, 2, 0, 0, 0b0011}, z));
    CHECK((z == std::array<std::uint32_t, 8>{0, 0, 7, 7}));
    CHECK(reads({1, 7, 2, 1, 0, 0b00001}, z));  // 1 + low bit 0; 0 + low bit 0
    CHECK((z == std::array<std::uint32_t, 8>{0, 0, 7, 7}));
    // Lists of 1 and 7, an element each, and one of the others: the last, of value 255.
    CHECK(reads({2, 1, 1, 0, 7, 1, 0, 1, 2, 0xAD, 0x01, 0xFF, 1}, z));
    CHECK((z == std::array<std::uint32_t, 8>{0, 1, 7, 0, 0, 0, 0, 255}));
    CHECK(reads({0, 0}, z));
    CHECK((z == std::array<std::uint32_t, 8>{}));
    CHECK(!reads({}, z));
    CHECK(!reads({0}, z));
    CHECK(!reads({17}, z));
    CHECK(!reads({0, 0, 0}, z));                       // a byte too many
    CHECK(!reads({1, 7, 2, 0, 0}, z));                 // no bits
    CHECK(!reads({1, 7, 2, 0, 0, 0b10011}, z));        // stray ones behind them
    CHECK(!reads({1, 7, 0, 0, 0}, z));                 // an empty list
    CHECK(!reads({1, 0, 2, 0, 0, 0b0011}, z));         // of what did not change
    CHECK(!reads({1, 0x80, 2, 2, 0, 0, 0b0011}, z));   // 256 is no byte
    CHECK(!reads({2, 7, 1, 0, 7, 1, 0, 0, 0b10}, z));  // twice the same value
    CHECK(!reads({2, 7, 1, 0, 6, 1, 0, 0, 0b10}, z));  // and not ascending
    CHECK(reads({2, 6, 1, 0, 7, 1, 0, 0, 0b010}, z));  // elements 0 and 1
    CHECK(!reads({2, 6, 1, 0, 7, 1, 0, 0, 0b00}, z));  // an element in both
    CHECK(!reads({1, 7, 9, 0, 0, 0, 0}, z));           // nine elements of eight
    CHECK(!reads({1, 7, 5, 0, 4, 0, 0, 0}, z));
    CHECK(!reads({1, 7, 1, 32, 0, 0, 0, 0, 0, 0}, z));  // a distance of more than 32 bits
    CHECK(reads({1, 7, 1, 0, 0, 0b01111111}, z));       // the last element
    CHECK(!reads({1, 7, 1, 0, 0, 0b11111111, 0}, z));   // and one behind it
    CHECK(!reads({1, 7, 2, 0, 0, 0b01111111}, z));
    const Buffer far = {1, 7, 1, 0, 0, 0xFF, 0xFF, 0xFF, 7, 0, 0, 0};
    CHECK(reads(far, z));
    CHECK(z[7] == 7);
    CHECK(!reads({1, 7, 1, 0, 0, 0xFF, 0xFF, 0xFF, 8, 0, 0, 0}, z));
    CHECK(!reads({1, 7, 1, 0, 0, 0xFF, 0xFF, 0xFF, 7, 0, 0, 1}, z));
    CHECK(!reads({1, 7, 1, 0, 0, 0xFF, 0xFF, 0xFF, 7, 0, 0}, z));
    CHECK(reads({0, 1, 0, 0, 9}, z));  // one of the others
    CHECK(z[0] == 9);
    CHECK(!reads({0, 1, 0, 0, 0}, z));
    CHECK(!reads({0, 1, 0, 0}, z));
    CHECK(!reads({0, 1, 0, 0, 0x80, 2}, z));
    CHECK(!reads({1, 7, 1, 0, 1, 0, 0b00, 9}, z));  // it has a list already
}

}  // namespace

PYDEDUP_TEST_MAIN
