// SPDX-License-Identifier: Apache-2.0
// Products of several variants of a matrix at once, which have some of their blocks in common.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "stored_matrix.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// Normal weights, as elements W.
template <class W>
std::vector<W> weights(std::size_t count) {
    if constexpr (std::is_same_v<W, std::uint16_t>) {
        const auto wide = normal<float>(count);
        std::vector<W> halves(count);
        std::transform(wide.begin(), wide.end(), halves.begin(), upper_half);
        return halves;
    } else {
        return normal<W>(count);
    }
}

// Weights as numbers to compute with.
template <class W>
auto as_sums(const std::vector<W>& matrix) {
    if constexpr (std::is_same_v<W, std::uint16_t>) {
        std::vector<float> wide(matrix.size());
        std::transform(matrix.begin(), matrix.end(), wide.begin(), widened);
        return wide;
    } else {
        return matrix;
    }
}

// Where 3 divides p + v, variant v has a block of its own at place p; all others have one in
// common. W: float, double, or std::uint16_t for bf16.
template <class W>
void check_variants(const BlockGrid& grid, std::size_t rows_each, unsigned n_variants) {
    constexpr bool kIsBf16 = std::is_same_v<W, std::uint16_t>;
    using T = std::conditional_t<kIsBf16, float, W>;
    const Dtype dtype = kIsBf16 ? Dtype::bf16 : sizeof(W) == 4 ? Dtype::f32 : Dtype::f64;
    const auto common = weights<W>(grid.rows * grid.cols);
    const Stored shared = store(common, grid, dtype, false);
    std::vector<std::vector<W>> matrices;
    std::vector<Stored> own;
    for (unsigned v = 0; v < n_variants; ++v) {
        own.push_back(store(weights<W>(grid.rows * grid.cols), grid, dtype, v % 2 != 0));
        matrices.push_back(common);
    }
    std::vector<BlockView> blocks;
    std::vector<std::uint32_t> places;
    std::vector<std::uint64_t> members;
    const auto put = [&](const BlockView& block, std::size_t place, std::uint64_t who) {
        blocks.push_back(block);
        places.push_back(static_cast<std::uint32_t>(place));
        members.push_back(who);
    };
    for (std::size_t p = 0; p < grid.count(); ++p) {
        std::uint64_t who = 0;
        for (unsigned v = 0; v < n_variants; ++v) {
            if ((p + v) % 3 != 0) {
                who |= std::uint64_t{1} << v;
                continue;
            }
            put(own[v].blocks[p], p, std::uint64_t{1} << v);
            const BlockRect rect = block_rect(grid, p);
            decode_block(own[v].blocks[p],
                         reinterpret_cast<std::byte*>(matrices[v].data() + rect.row0 * grid.cols +
                                                      rect.col0),
                         grid.cols * sizeof(W));
        }
        if (who != 0) put(shared.blocks[p], p, who);
    }
    const std::size_t m = rows_each * n_variants;
    std::vector<std::uint8_t> variants(m);
    for (std::size_t i = 0; i < m; ++i) variants[i] = static_cast<std::uint8_t>(i / rows_each);
    for (const bool transpose : {false, true}) {
        const std::size_t k = transpose ? grid.rows : grid.cols;
        const std::size_t n = transpose ? grid.cols : grid.rows;
        auto x = normal<T>(m * k);
        if constexpr (kIsBf16) {  // what kernels for pairs of bf16 numbers take as it is, or cut
            if (rows_each > 1) {
                for (T& value : x) value = widened(upper_half(value));
            }
        }
        const auto product = [&](std::size_t piece, const T* bias, Activation activation) {
            std::vector<T> y(m * n, std::numeric_limits<T>::quiet_NaN());
            Matmul matmul({grid, dtype, reinterpret_cast<const std::byte*>(x.data()), m,
                           reinterpret_cast<const std::byte*>(bias), activation, transpose,
                           reinterpret_cast<std::byte*>(y.data()), 2, variants.data(), places});
            for (std::size_t at = 0; at < blocks.size(); at += piece) {
                const std::size_t count = std::min(piece, blocks.size() - at);
                matmul.feed(std::span(blocks).subspan(at, count),
                            std::span(members).subspan(at, count));
            }
            return y;
        };
        const auto bias = normal<T>(n);
        const auto uncut = product(blocks.size(), nullptr, Activation::none);
        for (const std::size_t piece : {std::size_t{1}, std::size_t{5}, blocks.size()}) {
            const auto y = product(piece, nullptr, Activation::none);
            CHECK(std::memcmp(y.data(), uncut.data(), y.size() * sizeof(T)) == 0);
            // Once, and at the end, however many blocks a place has.
            const auto with_bias = product(piece, bias.data(), Activation::relu);
            bool holds = true;
            for (std::size_t i = 0; i < y.size(); ++i) {
                holds = holds && with_bias[i] == std::max(y[i] + bias[i % n], T{0});
            }
            CHECK(holds);
            for (unsigned v = 0; v < n_variants; ++v) {
                const auto first = static_cast<std::ptrdiff_t>(v * rows_each);
                const auto last = first + static_cast<std::ptrdiff_t>(rows_each);
                const auto of = [&](const std::vector<T>& all, std::size_t width) {
                    const auto w = static_cast<std::ptrdiff_t>(width);
                    return std::vector<T>(all.begin() + first * w, all.begin() + last * w);
                };
                CHECK(exact(of(x, k), as_sums(matrices[v]), rows_each, n, k, transpose,
                            std::vector<T>(rows_each * n))
                          .agrees(of(y, n)));
            }
        }
    }
}

TEST(variants_share_a_product) {
    const BlockGrid grids[] = {{1, 1, 1, 1}, {65, 67, 16, 8}, {130, 190, 64, 64}, {129, 140, 5, 3}};
    for (const BlockGrid& grid : grids) {
        for (const std::size_t rows_each : {1, 2, 5, 11}) {
            for (const unsigned n_variants : {1U, 3U, 12U}) {
                if (!sampled()) continue;
                check_variants<float>(grid, rows_each, n_variants);
                check_variants<double>(grid, rows_each, n_variants);
                check_variants<std::uint16_t>(grid, rows_each, n_variants);
            }
        }
    }
    check_variants<float>({19, 67, 16, 8}, 1, Matmul::kMaxVariants);
}

// Places may be left out where each comes once; who has a block counts then, too.
TEST(rows_that_do_not_have_a_block_get_nothing_of_it) {
    constexpr std::size_t kRows = 64;
    const BlockGrid grid{8, 8, 8, 8};
    const Stored w = store(normal<float>(64), grid, Dtype::f32, false);
    const auto x = normal<float>(kRows * 8);
    std::vector<std::uint8_t> variants(kRows);
    for (std::size_t i = 0; i < kRows; ++i) variants[i] = i % 2;
    const std::vector<std::uint64_t> members{1};
    for (const bool transpose : {false, true}) {
        const auto all = multiply(w, x, kRows, transpose);
        std::vector<float> y(kRows * 8, -1.0F);
        Matmul matmul({grid,
                       Dtype::f32,
                       reinterpret_cast<const std::byte*>(x.data()),
                       kRows,
                       nullptr,
                       Activation::none,
                       transpose,
                       reinterpret_cast<std::byte*>(y.data()),
                       2,
                       variants.data(),
                       {}});
        matmul.feed(w.blocks, members);
        bool holds = true;
        for (std::size_t at = 0; at < y.size(); ++at) {
            const bool has = at / 8 % 2 == 0;
            holds = holds && (has ? std::abs(y[at] - all[at]) < 1e-4F : y[at] == 0.0F);
        }
        CHECK(holds);
    }
}

TEST(places_that_leave_one_out_are_refused) {
    const BlockGrid grid{4, 4, 2, 2};
    const std::vector<float> x(4);
    std::vector<float> y(4);
    const auto make = [&](const std::vector<std::uint32_t>& places, const std::uint8_t* variants) {
        return Matmul({grid, Dtype::f32, reinterpret_cast<const std::byte*>(x.data()), 1, nullptr,
                       Activation::none, false, reinterpret_cast<std::byte*>(y.data()), 1, variants,
                       places});
    };
    const std::uint8_t variant = 0;
    const std::vector<std::uint32_t> gap{0, 2, 3};
    const std::vector<std::uint32_t> back{0, 1, 0, 2, 3};
    const std::vector<std::uint32_t> late{1, 2, 3};
    const std::vector<std::uint32_t> open{0, 1, 2};
    const std::vector<std::uint32_t> whole{0, 1, 2, 2, 3};
    for (const auto& places : {gap, back, late, open}) {
        CHECK_THROWS(ErrorCode::invalid_argument, make(places, &variant));
    }
    const Stored w = store(normal<float>(16), grid, Dtype::f32, false);
    const std::vector<std::uint64_t> members(4, 1);
    CHECK_THROWS(ErrorCode::invalid_argument, make(whole, nullptr).feed(w.blocks, members));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 make(whole, &variant).feed(w.blocks, std::span(members).first(3)));
}

}  // namespace

PYDEDUP_TEST_MAIN
