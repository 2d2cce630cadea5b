// SPDX-License-Identifier: Apache-2.0
// Streaming products: shapes, encodings, cuts, threads, and blocks that do not fit.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "pydedup/conv.hpp"
#include "stored_matrix.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

template <class T>
void check_frame(const BlockGrid& grid, std::size_t m, bool planes) {
    const Dtype dtype = sizeof(T) == 4 ? Dtype::f32 : Dtype::f64;
    const auto w = normal<T>(grid.rows * grid.cols);
    const Stored stored = store(w, grid, dtype, planes);
    for (const bool transpose : {false, true}) {
        const std::size_t k = transpose ? grid.rows : grid.cols;
        const std::size_t n = transpose ? grid.cols : grid.rows;
        const auto x = normal<T>(m * k);
        const auto y = multiply(stored, x, m, transpose);
        CHECK(exact(x, w, m, n, k, transpose, std::vector<T>(m * n)).agrees(y));
        CHECK(same_bits(y, multiply(stored, x, m, transpose, Activation::none,
                                    static_cast<const T*>(nullptr), 3)));
        for (const std::size_t piece : {1, 3, 7}) {
            CHECK(same_bits(y, multiply(stored, x, m, transpose, Activation::none,
                                        static_cast<const T*>(nullptr), 2, piece)));
        }
        const auto bias = normal<T>(n);
        const auto with_bias = multiply(stored, x, m, transpose, Activation::relu, bias.data());
        bool holds = true;
        for (std::size_t i = 0; i < y.size(); ++i) {
            holds = holds && with_bias[i] == std::max(y[i] + bias[i % n], T{0});
        }
        CHECK(holds);
        // Once, and at the end, wherever blocks are cut.
        for (const std::size_t piece : {1, 3, 7}) {
            CHECK(same_bits(with_bias, multiply(stored, x, m, transpose, Activation::relu,
                                                bias.data(), 2, piece)));
        }
    }
}

TEST(any_shape_any_cut_any_number_of_threads) {
    const BlockGrid grids[] = {{1, 1, 1, 1},       {1, 300, 1, 64},    {300, 1, 64, 1},
                               {65, 67, 16, 8},    {64, 64, 64, 64},   {130, 190, 64, 64},
                               {37, 700, 10, 300}, {20, 30, 100, 100}, {129, 140, 5, 3}};
    for (const BlockGrid& grid : grids) {
        for (const std::size_t m : {1, 3, 4, 5, 9, 40, 77}) {
            for (const bool planes : {false, true}) {
                if (!sampled()) continue;
                check_frame<float>(grid, m, planes);
                check_frame<double>(grid, m, planes);
            }
        }
    }
}

// Large enough that threads are made and rows of x are dealt out in chunks.
TEST(threads_do_not_show) {
    const BlockGrid grid{64, 1024, 32, 64};
    const auto w = normal<float>(grid.rows * grid.cols);
    const Stored stored = store(w, grid, Dtype::f32, false);
    for (const std::size_t m : {33, 700}) {
        for (const bool transpose : {false, true}) {
            const auto x = normal<float>(m * (transpose ? grid.rows : grid.cols));
            const auto one = multiply(stored, x, m, transpose);
            for (const unsigned threads : {2, 5}) {
                CHECK(same_bits(one, multiply(stored, x, m, transpose, Activation::none,
                                              static_cast<const float*>(nullptr), threads)));
            }
        }
    }
}

// 270 rows are packed in chunks, if all blocks come at once, and 800 if some are encoded (every
// third one). 120 are more than stay in the cache, so that a task takes several panels; fed block
// by block, it has one.
TEST(chunks_and_panels_taken_together_do_not_show) {
    const BlockGrid grid{520, 540, 32, 64};
    const auto w = normal<float>(grid.rows * grid.cols);
    std::vector<std::uint16_t> halves;
    std::vector<float> w_halves;
    for (const float value : w) {
        halves.push_back(upper_half(value));
        w_halves.push_back(widened(halves.back()));
    }
    const auto mixed = [&](const auto& weights, Dtype dtype) {
        Stored stored = store(weights, grid, dtype, false);
        const Stored encoded = store(weights, grid, dtype, true);
        for (std::size_t i = 0; i < stored.blocks.size(); i += 3) {
            stored.memory[i] = encoded.memory[i];
            stored.blocks[i] = encoded.blocks[i];
            stored.blocks[i].data = stored.memory[i].data();
        }
        return stored;
    };
    for (const auto& [stored, weights] :
         {std::pair{mixed(w, Dtype::f32), w}, std::pair{store(w, grid, Dtype::f32, false), w},
          std::pair{mixed(halves, Dtype::bf16), w_halves},
          std::pair{store(halves, grid, Dtype::bf16, false), w_halves}}) {
        for (const auto& [m, transpose] :
             {std::pair{std::size_t{270}, false}, std::pair{std::size_t{270}, true},
              std::pair{std::size_t{120}, false}, std::pair{std::size_t{800}, false}}) {
            if (!sampled()) continue;
            const std::size_t k = transpose ? grid.rows : grid.cols;
            const std::size_t n = transpose ? grid.cols : grid.rows;
            auto x = normal<float>(m * k);
            for (float& value : x) value = widened(upper_half(value));
            const auto bias = normal<float>(n);
            const auto y = multiply(stored, x, m, transpose, Activation::none, bias.data());
            auto exactly = exact(x, weights, m, n, k, transpose, std::vector<float>(m * n));
            for (std::size_t i = 0; i < y.size(); ++i) exactly.value[i] += bias[i % n];
            for (std::size_t i = 0; i < y.size(); ++i)
                exactly.magnitude[i] += std::abs(bias[i % n]);
            CHECK(exactly.agrees(y));
            for (const std::size_t piece : {1, 25, 100}) {
                for (const unsigned threads : {1, 2}) {
                    CHECK(same_bits(y, multiply(stored, x, m, transpose, Activation::none,
                                                bias.data(), threads, piece)));
                }
            }
        }
    }
}

// x that is no bf16 numbers is cut into parts on AMX, whose sums have an order of their own: that
// of raw blocks, and that of encoded ones and passes over their columns. Tasks begin with any tile.
TEST(parts_of_x_are_summed_in_the_same_order) {
    // The second is of rows short enough to stay in a cache, in blocks that are not.
    for (const BlockGrid& grid : {BlockGrid{100, 700, 20, 256}, BlockGrid{160, 256, 80, 160}}) {
        std::vector<std::uint16_t> w;
        for (const float value : normal<float>(grid.rows * grid.cols)) {
            w.push_back(upper_half(value));
        }
        Stored stored = store(w, grid, Dtype::bf16, false);
        if (grid.count() > 7) {
            const Stored encoded = store(w, grid, Dtype::bf16, true);
            for (const std::size_t i : {0, 7}) {
                stored.memory[i] = encoded.memory[i];
                stored.blocks[i] = encoded.blocks[i];
                stored.blocks[i].data = stored.memory[i].data();
            }
        }
        for (const std::size_t m : {32, 63, 193, 257}) {
            const auto x = normal<float>(m * grid.cols);
            const auto y = multiply(stored, x, m, false);
            for (const std::size_t piece : {1, 4, 100}) {
                for (const unsigned threads : {1, 2, 3}) {
                    CHECK(
                        same_bits(y, multiply(stored, x, m, false, Activation::none,
                                              static_cast<const float*>(nullptr), threads, piece)));
                }
            }
        }
    }
}

// Blocks are decoded for all rows of x at once, not for each chunk of them again.
TEST(many_rows_decode_a_block_once) {
    struct Counter final : BlockKeeper {
        void keep(const BlockView&, const std::byte*, std::size_t) noexcept override { ++kept; }
        std::atomic<std::size_t> kept{0};
    };
    const BlockGrid grid{520, 540, 32, 64};
    const std::vector<float> w(grid.rows * grid.cols, 0.5F);
    Stored stored = store(w, grid, Dtype::f32, true);
    Counter counter;
    for (BlockView& block : stored.blocks) block.keeper = &counter;
    const std::size_t m = 512;
    const auto x = normal<float>(m * grid.cols);
    for (const unsigned threads : {1, 2}) {
        counter.kept = 0;
        const auto y = multiply(stored, x, m, false, Activation::none,
                                static_cast<const float*>(nullptr), threads);
        CHECK(exact(x, w, m, grid.rows, grid.cols, false, std::vector<float>(m * grid.rows))
                  .agrees(y));
        CHECK(counter.kept == grid.count());
    }
}

TEST(rows_of_x_do_not_influence_each_other) {
    const BlockGrid grid{70, 90, 16, 32};
    const auto w = normal<float>(grid.rows * grid.cols);
    const Stored stored = store(w, grid, Dtype::f32, false);
    for (const std::size_t m : {2, 9, 50, 140}) {
        auto x = normal<float>(m * grid.cols);
        for (std::size_t c = 0; c < grid.cols; ++c) x[grid.cols + c] *= 0x1p-100F;
        const auto clean = multiply(stored, x, m, false);
        x[3] = std::numeric_limits<float>::quiet_NaN();
        x[7] = std::numeric_limits<float>::infinity();
        auto dirty = multiply(stored, x, m, false);
        CHECK(
            std::all_of(dirty.begin(), dirty.begin() + 70, [](float v) { return std::isnan(v); }));
        std::copy_n(clean.begin(), 70, dirty.begin());
        CHECK(same_bits(clean, dirty));
    }
}

TEST(stored_nan_and_infinity_come_through) {
    for (const auto& [m, grid] : {std::pair{std::size_t{1}, BlockGrid{67, 41, 16, 16}},
                                  {3, {67, 41, 16, 16}},
                                  {6, {67, 41, 16, 16}},
                                  {40, {67, 41, 16, 16}},
                                  {150, {67, 41, 16, 32}}}) {
        auto w = normal<float>(grid.rows * grid.cols);
        w[5 * grid.cols + 40] = std::numeric_limits<float>::quiet_NaN();
        w[66 * grid.cols + 0] = std::numeric_limits<float>::infinity();
        const Stored stored = store(w, grid, Dtype::f32, false);
        const std::vector<float> x(m * grid.cols, 1.0F);
        const auto y = multiply(stored, x, m, false);
        bool holds = true;
        for (std::size_t i = 0; i < m; ++i) {
            for (std::size_t r = 0; r < grid.rows; ++r) {
                const float v = y[i * grid.rows + r];
                holds = holds && (r == 5    ? std::isnan(v)
                                  : r == 66 ? v == INFINITY
                                            : std::isfinite(v));
            }
        }
        CHECK(holds);
    }
}

// f32 numbers that are cut on AMX: of any size, and what cannot be cut, in x and W. A row is the
// same whatever is in the others, and all are whatever threads and pieces there are.
TEST(many_rows_of_any_size) {
    const BlockGrid grid{150, 330, 64, 64};
    for (const auto& [m, transpose] : {std::pair{std::size_t{112}, false},
                                       {130, true},
                                       {260, false},
                                       {335, true},
                                       {700, false}}) {
        const std::size_t n = transpose ? grid.cols : grid.rows;
        const std::size_t k = transpose ? grid.rows : grid.cols;
        auto x = normal<float>(m * k);
        auto w = normal<float>(grid.rows * grid.cols);
        const auto scale = [](auto& numbers, std::size_t from, std::size_t count, int exponent) {
            for (std::size_t i = from; i < from + count; ++i) {
                numbers[i] = std::ldexp(numbers[i], exponent);
            }
        };
        for (std::size_t i = 0; i < m; ++i) {
            scale(x, i * k, k, static_cast<int>(rng()() % 110) - 60);
        }
        for (std::size_t r = 0; r < grid.rows; ++r) {
            scale(w, r * grid.cols, grid.cols, static_cast<int>(rng()() % 60) - 30);
        }
        // A block of tiny numbers, and one with a number that is too large; rows of x as well.
        for (std::size_t r = 64; r < 128; ++r) scale(w, r * grid.cols + 64, 64, -90);
        w[130 * grid.cols + 300] = 0x1p127F;
        scale(x, 5 * k, k, -60);
        scale(x, 40 * k, k, -300);
        x[40 * k + 70] = -0x1p127F;
        scale(x, 41 * k, k, -300);
        scale(x, 42 * k + 70, 1, -300);
        const Stored stored = store(w, grid, Dtype::f32, false);
        const auto y = multiply(stored, x, m, transpose);
        const auto want = exact(x, w, m, n, k, transpose, std::vector<float>(m * n));
        bool right = true;
        for (std::size_t i = 0; i < y.size(); ++i) {
            if (want.magnitude[i] > std::numeric_limits<float>::max() / 4) continue;
            // Products, six for each, and sums of them that are subnormal count as zero.
            const double lost = static_cast<double>(6 * k) * std::numeric_limits<float>::min();
            right = right && std::abs(y[i] - want.value[i]) <=
                                 bound<float>(want.terms, want.magnitude[i]) + lost;
        }
        CHECK(right);
        for (const unsigned threads : {1, 3}) {
            for (const std::size_t piece : {1, 7, 1000}) {
                CHECK(same_bits(y, multiply(stored, x, m, transpose, Activation::none,
                                            static_cast<const float*>(nullptr), threads, piece)));
            }
        }
        x[50 * k + 9] = std::numeric_limits<float>::quiet_NaN();
        auto dirty = multiply(stored, x, m, transpose);
        const auto row = dirty.begin() + static_cast<std::ptrdiff_t>(50 * n);
        CHECK(std::all_of(row, row + static_cast<std::ptrdiff_t>(n),
                          [](float v) { return std::isnan(v); }));
        std::copy_n(y.begin() + static_cast<std::ptrdiff_t>(50 * n), n, row);
        CHECK(same_bits(y, dirty));
    }
}

// Lower parts of a number may have the other sign: they must not make NaN of what is too large.
TEST(sums_beyond_all_numbers_are_infinite) {
    const BlockGrid grid{64, 64, 64, 64};
    const std::size_t m = 130;
    for (const auto& [size_of_x, size_of_w] : {std::pair{1.003e30F, 1.01e30F},
                                               {1.003e37F, 1.1e3F},
                                               {1.1e3F, 1.003e37F},
                                               {1.003e18F, 1e18F},
                                               {1.1e19F, 1.003e19F}}) {
        const std::vector<float> x(m * 64, size_of_x);
        const std::vector<float> w(64 * 64, -size_of_w);
        const Stored stored = store(w, grid, Dtype::f32, false);
        for (const bool transpose : {false, true}) {
            const auto y = multiply(stored, x, m, transpose);
            const float want = -64.0F * size_of_x * size_of_w;
            CHECK(std::ranges::all_of(y, [&](float v) {
                return std::isinf(want) ? v == want : std::abs(v / want - 1) < 1e-6F;
            }));
        }
    }
}

TEST(whatever_is_not_zero_is_true) {
    const std::vector<std::uint8_t> w{0, 1, 2, 255};
    const Stored stored = store(w, {1, 4, 1, 3}, Dtype::boolean, false);
    for (const std::size_t m : {std::size_t{1}, std::size_t{9}}) {
        const std::vector<float> ones(m * 4, 1.0F);
        CHECK(multiply(stored, ones, m, false) == std::vector<float>(m, 3.0F));
    }
}

TEST(no_columns_is_an_empty_sum) {
    const std::vector<float> bias{1.0F, -2.0F, 3.0F};
    const Stored none{{3, 0, 1, 1}, Dtype::f32, {}, {}};
    const auto y = multiply(none, std::vector<float>(), 2, false, Activation::relu, bias.data());
    CHECK((y == std::vector<float>{1, 0, 3, 1, 0, 3}));
    CHECK(multiply(none, std::vector<float>(6), 2, true).empty());
}

TEST(blocks_that_do_not_fit_are_refused) {
    const BlockGrid grid{8, 8, 4, 4};
    const Stored stored = store(normal<float>(64), grid, Dtype::f32, false);
    const auto x = normal<float>(8);
    std::vector<float> y(8);
    const auto make = [&] {
        return Matmul({grid, Dtype::f32, reinterpret_cast<const std::byte*>(x.data()), 1, nullptr,
                       Activation::none, false, reinterpret_cast<std::byte*>(y.data()), 1});
    };
    for (const auto& damage : std::vector<void (*)(BlockView&)>{
             [](BlockView& b) { b.rows = 5; }, [](BlockView& b) { b.cols = 3; },
             [](BlockView& b) { b.dtype = Dtype::i32; }, [](BlockView& b) { b.length -= 1; }}) {
        auto blocks = stored.blocks;
        damage(blocks[2]);
        CHECK_THROWS(ErrorCode::corrupt_page, make().feed(blocks));
    }
    auto blocks = stored.blocks;
    blocks.push_back(blocks[0]);
    CHECK_THROWS(ErrorCode::invalid_argument, make().feed(blocks));
}

TEST(unaligned_blocks_are_read) {
    const BlockGrid grid{6, 10, 6, 10};
    const auto w = normal<float>(60);
    const auto x = normal<float>(5 * 10);
    std::vector<std::byte> memory(60 * 4 + 1);
    std::memcpy(memory.data() + 1, w.data(), 240);
    Stored stored = store(w, grid, Dtype::f32, false);
    const auto want = multiply(stored, x, 5, false);
    stored.blocks[0].data = memory.data() + 1;
    CHECK(same_bits(want, multiply(stored, x, 5, false)));
}

TEST(memory_of_a_block_may_hold_the_next_one_when_that_is_fed) {
    // A pool evicts the page of one block and reads that of the next into the same memory.
    const std::array<std::int8_t, 8> w = {1, 2, 3, 4, 5, 6, 7, 8};
    const std::vector<float> x = {1, 10, 100, 1000};
    std::vector<std::int8_t> memory(4);
    const BlockView block{
        reinterpret_cast<const std::byte*>(memory.data()), 4, Encoding::raw, Dtype::i8, 1, 4, 0};
    const auto feed_both = [&](auto& product) {
        for (std::size_t row = 0; row < 2; ++row) {
            std::copy_n(w.begin() + static_cast<std::ptrdiff_t>(row * 4), 4, memory.begin());
            product.feed({&block, 1});
        }
    };
    const std::vector<float> want = {4321, 8765};
    std::vector<float> y(2);
    Conv2d conv({{2, 4, 1, 4},
                 Dtype::i8,
                 {1, 4, 1, 1, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1},
                 reinterpret_cast<const std::byte*>(x.data()),
                 nullptr,
                 Activation::none,
                 reinterpret_cast<std::byte*>(y.data()),
                 1});
    feed_both(conv);
    CHECK(y == want);
    std::fill(y.begin(), y.end(), 0.0F);
    Matmul product({{2, 4, 1, 4},
                    Dtype::i8,
                    reinterpret_cast<const std::byte*>(x.data()),
                    1,
                    nullptr,
                    Activation::none,
                    false,
                    reinterpret_cast<std::byte*>(y.data()),
                    1,
                    nullptr,
                    {}});
    feed_both(product);
    CHECK(y == want);
}

TEST(activations_have_names) {
    CHECK(activation_named("gelu_tanh") == Activation::gelu_tanh);
    CHECK(!activation_named("swish"));
    float value = -1.0F;
    CHECK_THROWS(ErrorCode::invalid_argument,
                 activate(reinterpret_cast<std::byte*>(&value), Dtype::i32, 1, Activation::relu));
}

}  // namespace

PYDEDUP_TEST_MAIN
