// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/hash.hpp"

namespace bench {
namespace {

using pydedup::BlockGrid;
using pydedup::Digest;
using pydedup::MatrixRef;

std::shared_ptr<std::vector<float>> random_floats(std::size_t count) {
    auto values = std::make_shared<std::vector<float>>(count);
    std::minstd_rand random(1);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    for (float& value : *values) value = normal(random);
    return values;
}

Workload matrix(const char* name, const char* what, std::size_t rows, std::size_t cols,
                std::size_t block_rows, std::size_t block_cols) {
    auto values = random_floats(rows * cols);
    const BlockGrid grid{rows, cols, block_rows, block_cols};
    auto digests = std::make_shared<std::vector<Digest>>(grid.count());
    const MatrixRef ref{reinterpret_cast<const std::byte*>(values->data()), rows, cols, cols * 4,
                        pydedup::Dtype::f32};
    return {name,
            what,
            static_cast<double>(rows * cols * 4),
            0,
            static_cast<double>(grid.count()),
            [=] {
                hash_blocks(ref, grid, 0, *digests, 1);
                keep(values->data());
            }};
}

}  // namespace

std::vector<Entry> hash_entries() {
    return {
        {"hash.cached-64k",
         [] { return matrix("hash.cached-64k", "64 KiB, one row, in cache", 1, 16384, 1, 16384); }},
        {"hash.cached-64x64",
         [] {
             return matrix("hash.cached-64x64", "64x64 f32 blocks of 128x384, in cache", 128, 384,
                           64, 64);
         }},
        {"hash.memory-64x64",
         [] {
             return matrix("hash.memory-64x64", "64x64 f32 blocks of 16384x1024, from memory",
                           16384, 1024, 64, 64);
         }},
        {"hash.memory-80x50",
         [] {
             return matrix("hash.memory-80x50",
                           "80x50 f32 blocks of 400000x50 (GloVe), from memory", 400000, 50, 80,
                           50);
         }},
    };
}

}  // namespace bench
