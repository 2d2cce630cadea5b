// SPDX-License-Identifier: Apache-2.0
// What every kernel makes of factors: numbers of so many bits, their products, and what these move.
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/rounding.hpp"
#include "check.hpp"
#include "codec/delta_model.hpp"
#include "codec/low_rank.hpp"
#include "deltas.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

std::int32_t number_at(const Buffer& bytes, std::size_t bit, unsigned width) {
    std::int64_t number = 0;
    for (unsigned i = 0; i < width; ++i) {
        const std::int64_t one = bytes[(bit + i) / 8] >> ((bit + i) % 8) & 1;
        number += (i + 1 == width ? -one : one) << i;
    }
    return static_cast<std::int32_t>(number);
}

TEST(numbers_of_all_widths_are_unpacked_wherever_they_begin) {
    std::mt19937_64 random(1);
    for (const KernelTable* table : runnable_kernels()) {
        for (unsigned width = 1; width <= 24; ++width) {
            for (const std::size_t count : {1U, 7U, 8U, 9U, 31U, 64U}) {
                for (const std::size_t begin : {0U, 1U, 5U, 7U, 8U, 30U}) {
                    const std::size_t bytes = (begin + count * width + 7) / 8;
                    const Buffer packed = random_bytes(bytes + kUnpackedAhead, random);
                    std::vector<std::int32_t> numbers(count);
                    table->codec.delta.unpack(packed.data(), begin, width, count, numbers.data());
                    for (std::size_t i = 0; i < count; ++i) {
                        CHECK(numbers[i] == number_at(packed, begin + i * width, width));
                    }
                }
            }
        }
    }
}

// The sums of kProductRows rows, the second group of two.
std::vector<double> sums_of(const std::vector<std::int32_t>& of_rows,
                            const std::vector<std::int32_t>& of_cols, std::size_t cols,
                            std::size_t rank) {
    std::vector<double> sums;
    for (std::size_t r = kProductRows; r < 2 * kProductRows; ++r) {
        for (std::size_t j = 0; j < cols; ++j) {
            std::int64_t sum = 0;
            for (std::size_t k = 0; k < rank; ++k) {
                sum += std::int64_t{of_rows[k * 2 * kProductRows + r]} * of_cols[k * cols + j];
            }
            sums.push_back(static_cast<double>(sum));
        }
    }
    return sums;
}

std::vector<std::int32_t> random_numbers(std::size_t count, std::int32_t least,
                                         std::int32_t largest, std::mt19937_64& random) {
    std::uniform_int_distribution<std::int32_t> draw(least, largest);
    std::vector<std::int32_t> numbers(count);
    for (std::int32_t& number : numbers) number = draw(random);
    return numbers;
}

std::vector<double> as_numbers(const std::vector<std::int32_t>& numbers) {
    return {numbers.begin(), numbers.end()};
}

std::vector<std::int32_t> in_pairs(const std::vector<std::int32_t>& numbers, std::size_t n) {
    std::vector<std::int32_t> pairs;
    for (std::size_t at = 0; at < numbers.size(); at += 2 * n) {
        for (std::size_t i = at; i < at + n; ++i) {
            pairs.push_back((numbers[i] & 0xFFFF) | numbers[i + n] << 16);
        }
    }
    return pairs;
}

TEST(products_are_those_in_integers) {
    std::mt19937_64 random(2);
    constexpr std::int32_t kLargest = (1 << 23) - 1;
    constexpr std::int32_t kLargestOfPairs = (1 << 15) - 1;
    constexpr std::size_t kRows = 2 * kProductRows;
    for (const KernelTable* table : runnable_kernels()) {
        const DeltaKernels& delta = table->codec.delta;
        for (const std::size_t cols : {kProductLanes, 3 * kProductLanes}) {
            for (const std::size_t rank : {2U, 6U, 64U}) {
                for (const bool is_largest : {false, true}) {
                    const auto make = [&](std::size_t n, std::int32_t largest) {
                        return random_numbers(n * rank, is_largest ? largest : -largest, largest,
                                              random);
                    };
                    auto of_rows = make(kRows, kLargest);
                    auto of_cols = make(cols, kLargest);
                    std::vector<double> sums(kProductRows * cols);
                    delta.products(as_numbers(of_rows).data() + kProductRows, kRows,
                                   as_numbers(of_cols).data(), cols, rank, sums.data());
                    CHECK(sums == sums_of(of_rows, of_cols, cols, rank));

                    // Two products of the largest ones are just below 2^31, and the least is below.
                    const auto most = static_cast<std::int32_t>(2 * kLargestOfPairs / rank);
                    of_rows = make(kRows, rank == 2 ? kLargestOfPairs : most);
                    of_cols = make(cols, kLargestOfPairs);
                    if (is_largest) {
                        for (std::int32_t& number : of_rows) number = -number - 1;
                    }
                    delta.pair_products(in_pairs(of_rows, kRows).data() + kProductRows, kRows,
                                        in_pairs(of_cols, cols).data(), cols, rank / 2,
                                        sums.data());
                    CHECK(sums == sums_of(of_rows, of_cols, cols, rank));
                }
            }
        }
    }
}

// Elements of every kind, and sums of which some are 0.
TEST(elements_move_as_the_reference_moves_them) {
    std::mt19937_64 random(3);
    for (const KernelTable* table : runnable_kernels()) {
        for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16}) {
            const std::size_t item = item_bytes(dtype);
            const DeltaLayout layout = detail::delta_layout(dtype);
            for (const std::size_t count : {1U, 7U, 31U, 32U, 33U, 200U}) {
                const bool any = count == 200;
                Buffer x = any ? random_bytes(count * item, random)
                               : as_dtype(normal(count, 0.02, random), dtype);
                const Buffer odd = as_dtype({-0.0, INFINITY, -INFINITY, NAN, -NAN, 1e-310}, dtype);
                std::memcpy(x.data(), odd.data(), std::min(odd.size(), x.size()));
                const std::size_t n_sums = detail::round_up(count, kProductLanes);
                const std::vector<double> sums = as_numbers(random_numbers(n_sums, -9, 9, random));
                for (const double scale : {0x1p-900, 0x1p-12, 1.0, 0x1p900}) {
                    Buffer want(x.size());
                    Buffer got(x.size());
                    kernels_named("scalar").codec.delta.move(x.data(), sums.data(), count, layout,
                                                             scale, want.data());
                    table->codec.delta.move(x.data(), sums.data(), count, layout, scale,
                                            got.data());
                    CHECK(got == want);
                    Buffer inside = x;
                    table->codec.delta.move(inside.data(), sums.data(), count, layout, scale,
                                            inside.data());
                    CHECK(inside == want);
                }
            }
        }
    }
}

// Where a sum leaves 32 bits, or a number 16, sums are taken in f64.
TEST(a_base_moves_alike_on_both_sides_of_what_pairs_hold) {
    constexpr std::size_t kRows = 5;
    constexpr std::size_t kCols = 3;
    for (const unsigned rank : {1U, 2U, 3U, 4U}) {
        for (const std::int32_t of_rows : {-32769, -32768, -32767, 32767, 32768}) {
            for (const std::int32_t of_cols : {-32768, 32767, 32768}) {
                const std::vector<std::int32_t> rows(rank * kRows, of_rows);
                const std::vector<std::int32_t> cols(rank * kCols, of_cols);
                const Buffer base = as_dtype(std::vector<double>(kRows * kCols, 0.5), Dtype::f64);
                Buffer moved(base.size());
                detail::add_low_rank({rank, 0, rows, cols}, base.data(), kRows, kCols, Dtype::f64,
                                     moved.data());
                const double sum = static_cast<double>(rank) * of_rows * of_cols;
                for (const double element : as_doubles(moved, Dtype::f64)) {
                    CHECK(element == 0.5 + sum);
                }
            }
        }
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
