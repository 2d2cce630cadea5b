// SPDX-License-Identifier: Apache-2.0
// Convolutions as networks have them: one image, the weight in blocks of 64x64 (or narrower, where
// it is) one after another. Bytes are those of image, weight and result, each once.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "harness.hpp"
#include "pydedup/conv.hpp"

namespace bench {
namespace {

using namespace pydedup;

constexpr std::size_t kBlock = 64;

struct Layer {
    const char* name;
    const char* what;
    std::size_t channels, out, size, kernel, stride, padding, groups;
};

constexpr Layer kLayers[] = {
    {"7x7s2", "7x7/2, 3 to 64, 224x224", 3, 64, 224, 7, 2, 3, 1},
    {"3x3", "3x3, 64 to 64, 56x56", 64, 64, 56, 3, 1, 1, 1},
    {"3x3-deep", "3x3, 512 to 512, 7x7", 512, 512, 7, 3, 1, 1, 1},
    {"1x1", "1x1, 256 to 64, 56x56", 256, 64, 56, 1, 1, 0, 1},
    {"1x1s2", "1x1/2, 64 to 128, 56x56", 64, 128, 56, 1, 2, 0, 1},
    {"depthwise", "depthwise 3x3, 144, 56x56", 144, 144, 56, 3, 1, 1, 144},
    {"lenet", "5x5, 6 to 16, 14x14", 6, 16, 14, 5, 1, 0, 1},
};

struct Data {
    std::vector<float> x, weights, y;
    std::vector<BlockView> blocks;
    Conv2d::Problem problem{};
};

Workload conv(const std::string& name, const Layer& layer, unsigned threads) {
    auto data = std::make_shared<Data>();
    const std::size_t size = unless_smoke(layer.size, std::min<std::size_t>(layer.size, 14));
    const ConvShape shape{1,
                          layer.channels,
                          size,
                          size,
                          layer.out,
                          layer.kernel,
                          layer.kernel,
                          layer.stride,
                          layer.stride,
                          1,
                          1,
                          layer.padding,
                          layer.padding,
                          layer.padding,
                          layer.padding,
                          layer.groups};
    const std::size_t cols = layer.channels / layer.groups * layer.kernel * layer.kernel;
    const BlockGrid grid{layer.out, cols, std::min(kBlock, layer.out), std::min(kBlock, cols)};
    data->x.assign(layer.channels * size * size, 0.5F);
    data->weights.assign(layer.out * cols, 0.25F);
    data->y.resize(layer.out * shape.out_h() * shape.out_w());
    const float* at = data->weights.data();
    for (std::size_t b = 0; b < grid.count(); ++b) {
        const BlockRect rect = block_rect(grid, b);
        const std::size_t count = rect.rows * rect.cols;
        data->blocks.push_back({reinterpret_cast<const std::byte*>(at),
                                static_cast<std::uint32_t>(count * sizeof(float)), Encoding::raw,
                                Dtype::f32, static_cast<std::uint32_t>(rect.rows),
                                static_cast<std::uint32_t>(rect.cols), 0});
        at += count;
    }
    data->problem = {grid,
                     Dtype::f32,
                     shape,
                     reinterpret_cast<const std::byte*>(data->x.data()),
                     nullptr,
                     Activation::none,
                     reinterpret_cast<std::byte*>(data->y.data()),
                     threads};
    const std::size_t elements = data->x.size() + data->weights.size() + data->y.size();
    return {name,
            std::string(layer.what) + ", " + std::to_string(threads) +
                (threads == 1 ? " thread" : " threads"),
            static_cast<double>(elements * sizeof(float)),
            2.0 * static_cast<double>(data->y.size() * cols),
            0,
            [data] {
                Conv2d convolution(data->problem);
                convolution.feed(data->blocks);
                keep(data->y.data());
            },
            threads};
}

}  // namespace

std::vector<Entry> conv_entries() {
    std::vector<Entry> entries;
    for (const Layer& layer : kLayers) {
        for (const unsigned threads : {1U, 2U}) {
            const std::string name =
                "conv." + std::string(layer.name) + "-t" + std::to_string(threads);
            entries.push_back({name, [=] { return conv(name, layer, threads); }});
        }
    }
    return entries;
}

}  // namespace bench
