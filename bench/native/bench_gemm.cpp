// SPDX-License-Identifier: Apache-2.0
// y = x @ W.T with W 4096x4096 f32, streamed as 64x64 blocks that lie one after another as on
// pages.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/gemm.hpp"

namespace bench {
namespace {

using namespace pydedup;

constexpr std::size_t kSize = 4096;
constexpr std::size_t kBlock = 64;

struct Data {
    std::vector<float> weights = std::vector<float>(kSize * kSize);
    std::vector<BlockView> blocks;
    std::vector<float> x, y;
};

Workload matmul(const std::string& name, std::size_t m, unsigned threads) {
    auto data = std::make_shared<Data>();
    std::minstd_rand random(1);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    for (float& value : data->weights) value = normal(random);
    const std::size_t elements = kBlock * kBlock;
    for (std::size_t i = 0; i < kSize * kSize / elements; ++i) {
        data->blocks.push_back(
            {reinterpret_cast<const std::byte*>(data->weights.data() + i * elements),
             static_cast<std::uint32_t>(elements * 4), Encoding::raw, Dtype::f32, kBlock, kBlock,
             0});
    }
    data->x.assign(m * kSize, 0.5F);
    data->y.resize(m * kSize);
    const auto work = static_cast<double>(kSize * kSize);
    return {name,
            "m=" + std::to_string(m) + ", " + std::to_string(threads) + " threads",
            work * 4,
            2.0 * work * static_cast<double>(m),
            0,
            [data, m, threads] {
                Matmul product({{kSize, kSize, kBlock, kBlock},
                                Dtype::f32,
                                reinterpret_cast<const std::byte*>(data->x.data()),
                                m,
                                nullptr,
                                Activation::none,
                                false,
                                reinterpret_cast<std::byte*>(data->y.data()),
                                threads});
                product.feed(data->blocks);
                keep(data->y.data());
            },
            threads};
}

}  // namespace

std::vector<Entry> gemm_entries() {
    std::vector<Entry> entries;
    for (const unsigned threads : {1U, 2U}) {
        for (const std::size_t m : {1, 8, 32, 128, 512}) {
            const std::string name =
                "matmul.m" + std::to_string(m) + "-t" + std::to_string(threads);
            entries.push_back({name, [=] { return matmul(name, m, threads); }});
        }
    }
    return entries;
}

}  // namespace bench
