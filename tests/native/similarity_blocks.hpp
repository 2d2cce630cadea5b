// SPDX-License-Identifier: Apache-2.0
// Blocks for tests of the similarity index, and what it finds of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "pydedup/similarity.hpp"

namespace pydedup::testing {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline std::vector<float> normals(std::size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

inline BlockBatch batch_of(const std::vector<float>& values, std::size_t rows, std::size_t cols) {
    const std::size_t count = rows * cols == 0 ? 0 : values.size() / (rows * cols);
    return dense_blocks(reinterpret_cast<const std::byte*>(values.data()), count, rows, cols,
                        Dtype::f32);
}

inline std::vector<std::int64_t> numbers(std::size_t count, std::int64_t first = 0) {
    std::vector<std::int64_t> ids(count);
    std::iota(ids.begin(), ids.end(), first);
    return ids;
}

struct Found {
    std::vector<std::int64_t> ids;
    std::vector<double> distances;
};

inline Found query(const L2Index& index, const BlockBatch& blocks, std::size_t k) {
    Found found{std::vector<std::int64_t>(blocks.count * k), std::vector<double>(blocks.count * k)};
    index.query(blocks, k, found.ids, found.distances);
    return found;
}

inline LshParameters parameters(std::size_t rows, std::size_t cols) {
    return {Dtype::f32, rows, cols, 0.5, 8, 8, 3};
}

}  // namespace pydedup::testing
