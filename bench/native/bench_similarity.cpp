// SPDX-License-Identifier: Apache-2.0
// Sketching, the index, exact distances and magnitudes. "cached" blocks fit the second-level cache;
// "memory" ones do not fit any.
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "harness.hpp"
#include "pydedup/similarity.hpp"

namespace bench {
namespace {

using pydedup::BlockBatch;
using pydedup::Distance;
using pydedup::Dtype;
using pydedup::L2Index;
using pydedup::LshParameters;

constexpr std::size_t kManyBytes = std::size_t{128} << 20;

struct Blocks {
    std::shared_ptr<std::byte> memory;
    std::size_t bytes;
    BlockBatch batch;
    std::vector<std::int64_t> ids;
};

std::shared_ptr<Blocks> make_blocks(std::size_t rows, std::size_t cols, std::size_t count) {
    auto blocks = std::make_shared<Blocks>();
    blocks->bytes = rows * cols * count * sizeof(float);
    blocks->memory = large_memory(blocks->bytes);
    std::minstd_rand random(1);
    // Sums of uniform numbers do: sketches are of about normal blocks, and this is made quickly.
    for (float& value :
         std::span(reinterpret_cast<float*>(blocks->memory.get()), rows * cols * count)) {
        const auto draw = [&random] { return static_cast<float>(random()) / 2147483648.0F - 0.5F; };
        value = 0.02F * (draw() + draw() + draw());
    }
    blocks->batch = pydedup::dense_blocks(blocks->memory.get(), count, rows, cols, Dtype::f32);
    blocks->ids.resize(count);
    std::iota(blocks->ids.begin(), blocks->ids.end(), 0);
    return blocks;
}

LshParameters parameters_of(const Blocks& blocks) {
    return {Dtype::f32, blocks.batch.rows, blocks.batch.cols, 0.5, 8, 8, 1};
}

struct Case {
    std::string name, what;
    std::size_t rows, cols, count;
    unsigned threads;
};

template <class Round>
Entry entry(const std::string& verb, const Case& c, std::size_t passes, const Round& make_round) {
    const std::string name = "similarity." + verb + "-" + c.name;
    return {name, [=] {
                auto blocks = make_blocks(c.rows, c.cols, unless_smoke(c.count, 4));
                const auto bytes = static_cast<double>(blocks->bytes);
                return Workload{name,
                                c.what,
                                bytes * static_cast<double>(passes),
                                0,
                                static_cast<double>(blocks->batch.count),
                                make_round(blocks, c.threads),
                                c.threads};
            }};
}

auto sketching(const std::shared_ptr<Blocks>& blocks, unsigned threads) {
    auto index = std::make_shared<L2Index>(parameters_of(*blocks));
    auto hashes = std::make_shared<std::vector<std::int32_t>>(blocks->batch.count * 64);
    return [=] {
        index->hashes(blocks->batch, *hashes, threads);
        keep(hashes->data());
    };
}

auto adding(const std::shared_ptr<Blocks>& blocks, unsigned threads) {
    return [=] {
        L2Index index(parameters_of(*blocks));
        index.add(blocks->batch, blocks->ids, threads);
        keep(index);
    };
}

auto querying(const std::shared_ptr<Blocks>& blocks, unsigned threads) {
    auto index = std::make_shared<L2Index>(parameters_of(*blocks));
    index->add(blocks->batch, blocks->ids);
    auto ids = std::make_shared<std::vector<std::int64_t>>(blocks->batch.count);
    auto found = std::make_shared<std::vector<double>>(blocks->batch.count);
    return [=] {
        index->query(blocks->batch, 1, *ids, *found, threads);
        keep(ids->data());
    };
}

auto comparing(const std::shared_ptr<Blocks>& blocks, unsigned threads) {
    std::vector<std::int64_t> others(blocks->ids.rbegin(), blocks->ids.rend());
    auto found = std::make_shared<std::vector<Distance>>(blocks->batch.count);
    return [=] {
        pydedup::compare_blocks(blocks->batch, blocks->batch, blocks->ids, others, 0.01,
                                std::numeric_limits<double>::infinity(), *found, threads);
        keep(found->data());
    };
}

auto measuring(const std::shared_ptr<Blocks>& blocks, unsigned threads) {
    auto found = std::make_shared<std::vector<double>>(blocks->batch.count);
    return [=] {
        pydedup::block_magnitudes(blocks->batch, *found, threads);
        keep(found->data());
    };
}

}  // namespace

std::vector<Entry> similarity_entries() {
    const Case cached{"cached-64x64", "64x64 f32 blocks, in cache", 64, 64, 16, 1};
    const Case large{"cached-300x300", "a 300x300 f32 block, in cache", 300, 300, 1, 1};
    const Case memory{"memory-64x64", "64x64 f32 blocks, 128 MiB", 64, 64, kManyBytes / 16384, 1};
    const Case far{
        "memory-300x300", "300x300 f32 blocks, 128 MiB", 300, 300, kManyBytes / 360000, 1};
    const Case both{"memory-64x64-t2", "the same with two threads", 64, 64, kManyBytes / 16384, 2};
    const Case small{"small-8x8", "200,000 8x8 f32 blocks", 8, 8, 200000, 1};
    return {
        entry("sketch", cached, 1, sketching),
        entry("sketch", large, 1, sketching),
        entry("sketch", memory, 1, sketching),
        entry("sketch", far, 1, sketching),
        entry("add", memory, 1, adding),
        entry("add", both, 1, adding),
        entry("add", small, 1, adding),
        entry("query", memory, 1, querying),
        entry("query", both, 1, querying),
        entry("query", small, 1, querying),
        entry("distances", cached, 2, comparing),
        entry("distances", memory, 2, comparing),
        entry("magnitudes", cached, 1, measuring),
        entry("magnitudes", large, 1, measuring),
        entry("magnitudes", memory, 1, measuring),
    };
}

}  // namespace bench
