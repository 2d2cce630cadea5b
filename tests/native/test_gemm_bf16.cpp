// SPDX-License-Identifier: Apache-2.0
// Products with x or y in bf16: the numbers are those of f32, rounded where y is.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "stored_matrix.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Bits = std::uint16_t;

struct Factors {
    std::vector<Bits> x;
    std::size_t m;
    bool transpose = false;
    Activation activation = Activation::none;
    const float* bias = nullptr;
};

template <class Y>
std::vector<Y> multiply_bf16(const Stored& w, const Factors& given, unsigned threads = 2,
                             std::size_t piece = static_cast<std::size_t>(-1)) {
    // What is not written shows.
    std::vector<Y> y(given.m * (given.transpose ? w.grid.cols : w.grid.rows),
                     std::is_same_v<Y, Bits> ? Y{0x7FC1} : std::numeric_limits<Y>::quiet_NaN());
    Matmul matmul({w.grid,
                   w.dtype,
                   reinterpret_cast<const std::byte*>(given.x.data()),
                   given.m,
                   reinterpret_cast<const std::byte*>(given.bias),
                   given.activation,
                   given.transpose,
                   reinterpret_cast<std::byte*>(y.data()),
                   threads,
                   nullptr,
                   {},
                   true,
                   std::is_same_v<Y, Bits>});
    for (std::size_t at = 0; at < w.blocks.size();) {
        const std::size_t n = std::min(piece, w.blocks.size() - at);
        matmul.feed(std::span(w.blocks).subspan(at, n));
        at += n;
    }
    return y;
}

TEST(x_in_bf16_counts_as_the_same_numbers_in_f32) {
    const BlockGrid grid{37, 135, 16, 32};
    const Dtype dtypes[] = {Dtype::bf16, Dtype::f16, Dtype::i16};
    for (const float special : {1.0F, 0x1p-130F, std::numeric_limits<float>::infinity()}) {
        for (const std::size_t m : {1, 2, 5, 33, 70}) {
            const std::vector<Bits> w(grid.rows * grid.cols, 0x3C11);
            for (const bool transpose : {false, true}) {
                auto drawn = normal<float>(m * (transpose ? grid.rows : grid.cols));
                drawn[3] = special;
                const Factors given{halves_of(drawn), m, transpose};
                for (const Dtype dtype : dtypes) {
                    const Stored stored = store(w, grid, dtype, false);
                    CHECK(same_bits(multiply_bf16<float>(stored, given),
                                    multiply(stored, floats_of(given.x), m, transpose)));
                }
            }
        }
    }
}

TEST(threads_widen_many_numbers_in_bf16) {
    const BlockGrid grid{32, 4, 32, 4};
    const std::size_t m = 33'000;  // 2^20 numbers and more: for two threads
    const Stored stored = store(normal<float>(grid.rows * grid.cols), grid, Dtype::f32, false);
    std::vector<float> x;
    for (std::size_t i = 0; i < m * grid.rows; ++i) x.push_back(static_cast<float>(i % 509));
    const Factors given{halves_of(x), m, true};
    CHECK(same_bits(multiply_bf16<float>(stored, given),
                    multiply(stored, floats_of(given.x), m, true)));
}

// Any matrix, and few rows, tiles and chunks of them; all at once, and cut between and within rows
// of blocks; what is straight from registers and what rests in f32.
TEST(y_in_bf16_is_that_in_f32_rounded) {
    const BlockGrid grids[] = {{1, 1, 1, 1},       {65, 67, 16, 8},    {130, 190, 64, 64},
                               {37, 700, 10, 300}, {20, 30, 100, 100}, {96, 520, 64, 64},
                               {70, 256, 64, 64},  {129, 140, 5, 3},   {64, 330, 64, 64}};
    for (const BlockGrid& grid : grids) {
        const auto drawn = normal<float>(grid.rows * grid.cols);
        for (const std::size_t m : {1, 2, 9, 32, 40, 77, 300, 700}) {
            for (const bool planes : {false, true}) {
                for (const bool is_f32 : {false, true}) {
                    if (!sampled()) continue;
                    const Stored stored = is_f32
                                              ? store(drawn, grid, Dtype::f32, planes)
                                              : store(halves_of(drawn), grid, Dtype::bf16, planes);
                    const bool transpose = m % 2 == 1;
                    const auto bias = normal<float>(transpose ? grid.cols : grid.rows);
                    auto x = normal<float>(m * (transpose ? grid.rows : grid.cols));
                    if (planes) x.back() = 0x1p-130F;
                    Factors given{halves_of(x), m, transpose};
                    for (const auto activation : {Activation::none, Activation::silu}) {
                        given.activation = activation;
                        for (const float* const added :
                             {std::as_const(bias).data(), static_cast<const float*>(nullptr)}) {
                            given.bias = added;
                            const auto want = rounded(multiply_bf16<float>(stored, given));
                            CHECK(want == multiply_bf16<Bits>(stored, given, 1));
                            CHECK(want == multiply_bf16<Bits>(stored, given, 3));
                            CHECK(want == multiply_bf16<Bits>(stored, given, 2, 1));
                            CHECK(want == multiply_bf16<Bits>(stored, given, 2, 7));
                        }
                    }
                }
            }
        }
    }
}

// Many rows, of which W is packed and not x where all blocks come at once: several groups of
// panels, a last panel and a last tile that are not full, an odd number of columns. Cut between
// calls, x is packed.
TEST(many_rows_are_the_same_whichever_factor_is_packed) {
    const BlockGrid grids[] = {{190, 301, 64, 64}, {250, 65, 128, 65}, {1000, 900, 60, 100},
                               {61, 33, 64, 64},   {256, 640, 64, 64}, {192, 384, 64, 64}};
    for (const BlockGrid& grid : grids) {
        const auto drawn = halves_of(normal<float>(grid.rows * grid.cols));
        const auto bias = normal<float>(grid.rows);
        for (const std::size_t m : {262, 1100}) {
            for (const bool planes : {false, true}) {
                const Stored stored = store(drawn, grid, Dtype::bf16, planes);
                Factors given{halves_of(normal<float>(m * grid.cols)), m};
                for (const auto activation : {Activation::none, Activation::gelu}) {
                    if (!sampled()) continue;
                    given.activation = activation;
                    given.bias = activation == Activation::none && planes ? nullptr : bias.data();
                    const auto want = multiply_bf16<float>(stored, given, 2, 3);
                    for (const unsigned threads : {1U, 2U, 3U}) {
                        CHECK(same_bits(want, multiply_bf16<float>(stored, given, threads)));
                        CHECK(rounded(want) == multiply_bf16<Bits>(stored, given, threads));
                    }
                }
            }
        }
    }
}

// A subnormal number counts, wherever among the rows that threads pack it is: first, last, or in a
// tile of few.
TEST(one_subnormal_number_is_found) {
    const BlockGrid grid{64, 256, 64, 64};
    std::vector<float> w(grid.rows * grid.cols, 0.0F);
    for (std::size_t r = 0; r < grid.rows; ++r) w[r * grid.cols + r] = 0x1p100F;
    const Stored stored = store(halves_of(w), grid, Dtype::bf16, false);
    for (const std::size_t m : {5, 31, 32, 33, 64, 1001}) {
        for (const std::size_t row : {std::size_t{0}, m / 2, m - 1}) {
            std::vector<float> x(m * grid.cols, 1.0F);
            x[row * grid.cols + 63] = 0x1p-130F;
            const Factors given{halves_of(x), m};
            for (const std::size_t piece : {std::size_t{1}, std::size_t{4}}) {
                const auto y = multiply_bf16<float>(stored, given, 2, piece);
                CHECK(y[row * grid.rows + 63] == 0x1p-30F);
                CHECK(y[row * grid.rows + 62] == 0x1p100F);
                CHECK(rounded(y) == multiply_bf16<Bits>(stored, given, 2, piece));
            }
        }
    }
}

TEST(no_columns_is_an_empty_sum_in_bf16) {
    const BlockGrid grid{5, 0, 64, 64};
    const Stored stored = store(std::vector<Bits>{}, grid, Dtype::bf16, false);
    const std::array<float, 5> bias = {1.0F, 1.00390625F, -2.0F, 3.0F, 0.0F};
    const auto y = multiply_bf16<Bits>(stored, {{}, 2, false, Activation::none, bias.data()});
    CHECK(y ==
          rounded({1.0F, 1.00390625F, -2.0F, 3.0F, 0.0F, 1.0F, 1.00390625F, -2.0F, 3.0F, 0.0F}));
}

}  // namespace

PYDEDUP_TEST_MAIN
