// SPDX-License-Identifier: Apache-2.0
// y = x @ W.T and x @ W with W 4096x4096, streamed as 64x64 blocks that lie one after another as on
// pages. In f32; in bf16 with x in f32 (widened as it is read) and with x of bf16 numbers.
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/gemm.hpp"

namespace bench {
namespace {

using namespace pydedup;

constexpr std::size_t kBlock = 64;

struct Kind {
    const char* prefix;
    const char* what;
    Dtype weights;
    float x;  ///< every element of x: with 0.5 they are bf16 numbers, with 0.3 not
    bool transpose;
};

constexpr Kind kF32{"matmul.", "f32", Dtype::f32, 0.3F, false};
constexpr Kind kBf16{"matmul.bf16-", "bf16, x in bf16", Dtype::bf16, 0.5F, false};
constexpr Kind kBf16F32{"matmul.bf16-f32-", "bf16, x in f32", Dtype::bf16, 0.3F, false};
constexpr Kind kTransposed{"matmul.nn-", "x @ W, f32", Dtype::f32, 0.3F, true};

struct Data {
    std::shared_ptr<std::byte> weights;
    std::vector<BlockView> blocks;
    std::vector<float> x, y;
};

Workload matmul(const std::string& name, const Kind& kind, std::size_t m, unsigned threads) {
    auto data = std::make_shared<Data>();
    const std::size_t size = unless_smoke(4096, 256);
    const std::size_t item = item_bytes(kind.weights);
    const std::size_t bytes = size * size * item;
    data->weights = large_memory(bytes);
    std::minstd_rand random(1);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    for (std::size_t at = 0; at < bytes; at += item) {
        const float value = normal(random);
        // bf16 is the upper half of f32 (truncated).
        std::memcpy(data->weights.get() + at,
                    reinterpret_cast<const std::byte*>(&value) + (4 - item), item);
    }
    const std::size_t block_bytes = kBlock * kBlock * item;
    for (std::size_t at = 0; at < bytes; at += block_bytes) {
        data->blocks.push_back({data->weights.get() + at, static_cast<std::uint32_t>(block_bytes),
                                Encoding::raw, kind.weights, kBlock, kBlock, 0});
    }
    data->x.assign(m * size, kind.x);
    data->y.resize(m * size);
    const auto work = static_cast<double>(size * size);
    return {name,
            std::string(kind.what) + ", m=" + std::to_string(m) + ", " + std::to_string(threads) +
                (threads == 1 ? " thread" : " threads"),
            static_cast<double>(bytes),
            2.0 * work * static_cast<double>(m),
            0,
            [data, kind, size, m, threads] {
                Matmul product({{size, size, kBlock, kBlock},
                                kind.weights,
                                reinterpret_cast<const std::byte*>(data->x.data()),
                                m,
                                nullptr,
                                Activation::none,
                                kind.transpose,
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
    for (const Kind& kind : {kF32, kBf16, kBf16F32, kTransposed}) {
        for (const unsigned threads : {1U, 2U}) {
            for (const std::size_t m : {1, 8, 32, 128, 512}) {
                const std::string name = std::string(kind.prefix) + "m" + std::to_string(m) + "-t" +
                                         std::to_string(threads);
                entries.push_back({name, [=] { return matmul(name, kind, m, threads); }});
            }
        }
    }
    return entries;
}

}  // namespace bench
