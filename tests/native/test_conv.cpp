// SPDX-License-Identifier: Apache-2.0
// Convolutions against plain sums: here images and results are as large as they have to be and no
// larger, so that the sanitizers see each step beside them.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "pydedup/conv.hpp"
#include "stored_matrix.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Bits = std::uint16_t;
constexpr std::size_t kAll = static_cast<std::size_t>(-1);

struct Layer {
    ConvShape shape;
    std::size_t block_rows, block_cols;

    [[nodiscard]] BlockGrid grid() const {
        const std::size_t cols = shape.channels / shape.groups * shape.kernel_h * shape.kernel_w;
        return {shape.out_channels, cols, block_rows, block_cols};
    }
    [[nodiscard]] std::size_t image() const { return shape.channels * shape.height * shape.width; }
    [[nodiscard]] std::size_t result() const {
        return shape.out_channels * shape.out_h() * shape.out_w();
    }
};

//                        batch, channels, h, w,  out, kernel, stride, dilation, padding,    groups
const Layer kLayers[] = {
    {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1}, 1, 1},
    {{2, 5, 9, 40, 70, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 16, 29},
    {{2, 4, 5, 7, 6, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1}, 4, 3},
    {{2, 4, 5, 7, 6, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 1}, 64, 64},
    {{1, 3, 23, 21, 9, 7, 5, 2, 2, 1, 1, 3, 3, 3, 3, 1}, 16, 29},
    {{1, 3, 15, 17, 9, 3, 5, 1, 2, 3, 2, 2, 0, 5, 1, 1}, 5, 64},
    {{2, 6, 8, 8, 12, 3, 2, 3, 1, 1, 1, 2, 2, 2, 2, 3}, 16, 29},
    {{2, 8, 6, 11, 8, 3, 3, 1, 2, 1, 1, 1, 1, 1, 1, 8}, 8, 9},
    {{3, 70, 4, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 16, 100},
    {{2, 64, 7, 7, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}, 32, 64},
    {{5, 64, 3, 3, 64, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1}, 64, 64},
    {{1, 7, 7, 6, 7, 7, 7, 1, 1, 1, 1, 3, 3, 3, 3, 7}, 3, 20},
    {{1, 6, 20, 30, 12, 5, 3, 1, 1, 1, 1, 2, 2, 2, 2, 6}, 16, 29},
    {{2, 6, 9, 9, 2, 5, 3, 1, 3, 1, 1, 0, 4, 2, 1, 2}, 1, 7},
    {{1, 2, 5, 900, 2, 3, 4, 1, 2, 1, 1, 1, 3, 0, 2, 2}, 16, 29},
    {{1, 33, 1, 70, 35, 1, 3, 1, 1, 1, 4, 0, 4, 0, 4, 1}, 32, 32},
    {{2, 12, 10, 1, 6, 11, 1, 1, 1, 1, 1, 5, 0, 5, 0, 2}, 4, 33},
    {{4, 16, 2, 2, 17, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 1}, 17, 64},
};

// Each place of a result, and what it is the sum of.
template <class T, class W>
Exact<T> exact(const Layer& layer, const std::vector<T>& x, const std::vector<W>& w) {
    const ConvShape& s = layer.shape;
    const std::size_t ins = s.channels / s.groups;
    const std::size_t outs = s.out_channels / s.groups;
    Exact<T> sums{{}, {}, layer.grid().cols};
    const auto add = [&](std::size_t n, std::size_t o, std::size_t i, std::size_t j) {
        long double sum = 0;
        long double magnitude = 0;
        for (std::size_t c = 0; c < ins; ++c) {
            for (std::size_t k = 0; k < s.kernel_h * s.kernel_w; ++k) {
                const std::size_t row = i * s.stride_h + k / s.kernel_w * s.dilation_h;
                const std::size_t col = j * s.stride_w + k % s.kernel_w * s.dilation_w;
                if (row < s.pad_top || row >= s.pad_top + s.height) continue;
                if (col < s.pad_left || col >= s.pad_left + s.width) continue;
                const std::size_t channel = n * s.channels + o / outs * ins + c;
                const long double term =
                    static_cast<long double>(
                        x[(channel * s.height + row - s.pad_top) * s.width + col - s.pad_left]) *
                    w[(o * ins + c) * s.kernel_h * s.kernel_w + k];
                sum += term;
                magnitude += std::abs(term);
            }
        }
        sums.value.push_back(static_cast<double>(sum));
        sums.magnitude.push_back(static_cast<double>(magnitude));
    };
    for (std::size_t n = 0; n < s.batch; ++n) {
        for (std::size_t o = 0; o < s.out_channels; ++o) {
            for (std::size_t i = 0; i < s.out_h(); ++i) {
                for (std::size_t j = 0; j < s.out_w(); ++j) add(n, o, i, j);
            }
        }
    }
    return sums;
}

struct How {
    unsigned threads = 1;
    std::size_t piece = kAll;  // blocks in a call of feed()
    const void* bias = nullptr;
    Activation activation = Activation::none;
};

// X and Y may be bf16 numbers, as bits.
template <class Y, class X>
std::vector<Y> convolve(const Layer& layer, const Stored& w, const std::vector<X>& x,
                        const How& how = {}) {
    // What is not written shows.
    constexpr bool kRounded = std::is_same_v<Y, Bits>;
    std::vector<Y> y(layer.shape.batch * layer.result());
    if constexpr (kRounded) {
        std::fill(y.begin(), y.end(), Y{0x7FC1});
    } else {
        std::fill(y.begin(), y.end(), std::numeric_limits<Y>::quiet_NaN());
    }
    Conv2d conv({layer.grid(), w.dtype, layer.shape, reinterpret_cast<const std::byte*>(x.data()),
                 static_cast<const std::byte*>(how.bias), how.activation,
                 reinterpret_cast<std::byte*>(y.data()), how.threads, std::is_same_v<X, Bits>,
                 kRounded});
    for (std::size_t at = 0; at < w.blocks.size();) {
        const std::size_t n = std::min(how.piece, w.blocks.size() - at);
        conv.feed(std::span(w.blocks).subspan(at, n));
        at += n;
    }
    CHECK(conv.fed() == w.grid.count());
    return y;
}

// All ways to deal out the work.
template <class Y, class X>
bool same_in_all_ways(const Layer& layer, const Stored& w, const std::vector<X>& x,
                      const std::vector<Y>& y) {
    const std::size_t columns = layer.grid().grid_cols();
    for (const unsigned threads : {1U, 2U, 3U}) {
        for (const std::size_t piece : {kAll, std::size_t{1}, columns, columns + 1}) {
            if (!same_bits(convolve<Y>(layer, w, x, {threads, piece}), y)) return false;
        }
    }
    return true;
}

template <class T>
void check_own(const Layer& layer, Dtype dtype, bool planes) {
    const auto w = normal<T>(layer.grid().rows * layer.grid().cols);
    const auto x = normal<T>(layer.shape.batch * layer.image());
    const Stored stored = store(w, layer.grid(), dtype, planes);
    const auto y = convolve<T>(layer, stored, x);
    CHECK(exact(layer, x, w).agrees(y));
    CHECK(same_in_all_ways(layer, stored, x, y));
}

void check_halves(const Layer& layer, Dtype dtype, bool planes) {
    const auto w = halves_of(normal<float>(layer.grid().rows * layer.grid().cols));
    const auto x = normal<float>(layer.shape.batch * layer.image());
    const Stored stored = store(w, layer.grid(), dtype, planes);
    std::vector<float> weights = floats_of(w);
    if (dtype == Dtype::f16) {
        kernels_named("scalar").gemm.f16_to_f32(w.data(), w.size(), weights.data());
    }
    const auto y = convolve<float>(layer, stored, x);
    CHECK(exact(layer, x, weights).agrees(y));
    CHECK(same_in_all_ways(layer, stored, x, y));
}

// An image in bf16 counts as its numbers in f32, a result in bf16 is that in f32, rounded.
void check_bf16_beside(const Layer& layer, const Stored& w) {
    const auto x = halves_of(normal<float>(layer.shape.batch * layer.image()));
    const auto bias = normal<float>(layer.shape.out_channels);
    const How how{2, kAll, bias.data(), Activation::relu};
    const auto y = convolve<float>(layer, w, x, how);
    CHECK(same_bits(convolve<float>(layer, w, floats_of(x), how), y));
    CHECK(same_bits(convolve<Bits>(layer, w, x, how), rounded(y)));
    const How cut{3, 1, bias.data(), Activation::relu};
    CHECK(same_bits(convolve<Bits>(layer, w, floats_of(x), cut), rounded(y)));
    CHECK(same_in_all_ways(layer, w, x, convolve<Bits>(layer, w, x)));
}

TEST(layers_are_the_sums_that_they_should_be) {
    for (const Layer& layer : kLayers) {
        for (const bool planes : {false, true}) {
            if (!sampled()) continue;
            check_own<float>(layer, Dtype::f32, planes);
            check_own<double>(layer, Dtype::f64, planes);
            check_halves(layer, Dtype::bf16, planes);
            check_halves(layer, Dtype::f16, planes);
        }
    }
}

TEST(images_and_results_in_bf16_are_those_of_f32) {
    for (const Layer& layer : kLayers) {
        if (!sampled()) continue;
        const auto w = normal<float>(layer.grid().rows * layer.grid().cols);
        check_bf16_beside(layer, store(w, layer.grid(), Dtype::f32, false));
        check_bf16_beside(layer, store(halves_of(w), layer.grid(), Dtype::bf16, false));
    }
}

Layer random_layer() {
    const auto draw = [](std::size_t least, std::size_t most) {
        return std::uniform_int_distribution<std::size_t>(least, most)(rng());
    };
    Layer layer{};
    ConvShape& s = layer.shape;
    s.groups = draw(0, 2) == 0 ? draw(2, 5) : 1;
    s.batch = draw(1, 3);
    s.channels = s.groups * (draw(0, 3) == 0 ? draw(30, 70) : draw(1, 6));
    s.out_channels = s.groups * (draw(0, 3) == 0 ? draw(30, 70) : draw(1, 6));
    s.kernel_h = draw(1, 4);
    s.kernel_w = draw(1, 4);
    s.stride_h = draw(1, 3);
    s.stride_w = draw(1, 3);
    s.dilation_h = draw(1, 2);
    s.dilation_w = draw(1, 3);
    s.pad_top = draw(0, 3);
    s.pad_left = draw(0, 3);
    s.pad_bottom = draw(0, 3);
    s.pad_right = draw(0, 3);
    const std::size_t tall = (s.kernel_h - 1) * s.dilation_h + 1;
    const std::size_t wide = (s.kernel_w - 1) * s.dilation_w + 1;
    s.height = std::max(draw(1, 9), tall - std::min(tall - 1, s.pad_top + s.pad_bottom));
    s.width = std::max(draw(1, 20), wide - std::min(wide - 1, s.pad_left + s.pad_right));
    layer.block_rows = draw(1, 64);
    layer.block_cols = draw(1, 100);
    return layer;
}

TEST(any_layer_is_the_sum_that_it_should_be) {
    for (std::size_t round = 0; round < scaled(150); ++round) {
        const Layer layer = random_layer();
        check_own<float>(layer, Dtype::f32, round % 2 == 1);
        check_halves(layer, Dtype::bf16, round % 2 == 1);
        const auto w = halves_of(normal<float>(layer.grid().rows * layer.grid().cols));
        check_bf16_beside(layer, store(w, layer.grid(), Dtype::bf16, false));
    }
}

// Nothing of an image, not even a NaN, is in the results of those beside it.
TEST(what_an_image_has_stays_its_own) {
    for (const Layer& layer : kLayers) {
        if (layer.shape.batch < 2 || !sampled()) continue;
        const auto size = static_cast<std::ptrdiff_t>(layer.result());
        const auto w = normal<float>(layer.grid().rows * layer.grid().cols);
        const Stored stored = store(w, layer.grid(), Dtype::f32, false);
        auto x = normal<float>(layer.shape.batch * layer.image());
        const auto y = convolve<float>(layer, stored, x);
        for (const float odd : {std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::infinity(), 0x1p-130F, 0x1p100F}) {
            std::fill_n(x.begin(), layer.image(), odd);
            const auto others = convolve<float>(layer, stored, x, {2});
            CHECK(std::equal(y.begin() + size, y.end(), others.begin() + size));
            CHECK(!std::isnan(odd) || std::any_of(others.begin(), others.begin() + size,
                                                  [](float v) { return std::isnan(v); }));
        }
    }
}

TEST(a_batch_of_none_has_no_result) {
    Layer layer = kLayers[1];
    layer.shape.batch = 0;
    const auto w = normal<float>(layer.grid().rows * layer.grid().cols);
    CHECK(convolve<float>(layer, store(w, layer.grid(), Dtype::f32, false), std::vector<float>{})
              .empty());
}

TEST(wrong_shapes_and_blocks_are_refused) {
    const Layer layer = kLayers[1];
    const auto w = normal<float>(layer.grid().rows * layer.grid().cols);
    const auto x = normal<float>(layer.shape.batch * layer.image());
    std::vector<float> y(layer.shape.batch * layer.result());
    const Stored stored = store(w, layer.grid(), Dtype::f32, false);
    const auto conv = [&](const ConvShape& shape, const BlockGrid& grid) {
        return Conv2d({grid, Dtype::f32, shape, reinterpret_cast<const std::byte*>(x.data()),
                       nullptr, Activation::none, reinterpret_cast<std::byte*>(y.data()), 1});
    };
    const auto with = [&](std::size_t ConvShape::* field, std::size_t value) {
        ConvShape shape = layer.shape;
        shape.*field = value;
        return shape;
    };
    for (const auto field :
         {&ConvShape::channels, &ConvShape::height, &ConvShape::out_channels, &ConvShape::kernel_h,
          &ConvShape::stride_w, &ConvShape::dilation_h, &ConvShape::groups}) {
        CHECK_THROWS(ErrorCode::invalid_argument, conv(with(field, 0), layer.grid()));
    }
    CHECK_THROWS(ErrorCode::invalid_argument, conv(with(&ConvShape::groups, 3), layer.grid()));
    CHECK_THROWS(ErrorCode::invalid_argument, conv(with(&ConvShape::kernel_h, 12), layer.grid()));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 conv(with(&ConvShape::height, std::size_t{1} << 31), layer.grid()));
    CHECK_THROWS(ErrorCode::invalid_argument, conv(layer.shape, {70, 44, 16, 29}));
    Conv2d begun = conv(layer.shape, layer.grid());
    CHECK_THROWS(ErrorCode::corrupt_page, begun.feed(std::span(stored.blocks).subspan(1, 1)));
    begun.feed(stored.blocks);
    CHECK_THROWS(ErrorCode::invalid_argument, begun.feed(std::span(stored.blocks).first(1)));
}

}  // namespace

PYDEDUP_TEST_MAIN
