// SPDX-License-Identifier: Apache-2.0
// Packing problems to test with.
#pragma once

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "pydedup/packing.hpp"

namespace pydedup::testing {

inline constexpr PackAlgorithm kAll[] = {PackAlgorithm::layout, PackAlgorithm::two_stage,
                                         PackAlgorithm::greedy1, PackAlgorithm::greedy2,
                                         PackAlgorithm::baseline};

struct Input {
    std::vector<std::int64_t> indptr{0};
    std::vector<std::int64_t> ids;
    void add_row(const std::vector<std::int64_t>& row) {
        ids.insert(ids.end(), row.begin(), row.end());
        indptr.push_back(static_cast<std::int64_t>(ids.size()));
    }
    [[nodiscard]] IdRows rows() const { return {indptr, ids}; }
};

/// Block b belongs to the models whose bits are set in masks[b].
inline Input from_masks(const std::vector<unsigned>& masks, int models) {
    Input input;
    for (int m = 0; m < models; ++m) {
        std::vector<std::int64_t> row;
        for (std::size_t b = 0; b < masks.size(); ++b) {
            if ((masks[b] >> m & 1U) != 0) row.push_back(static_cast<std::int64_t>(b));
        }
        input.add_row(row);
    }
    return input;
}

/// One block per unit of count, its id drawn at random: classes lie scattered over the ids.
inline Input from_classes(const std::vector<std::pair<unsigned, int>>& counts, int models) {
    std::vector<unsigned> masks;
    for (const auto& [mask, count] : counts) masks.insert(masks.end(), count, mask);
    std::mt19937 random(11);
    std::shuffle(masks.begin(), masks.end(), random);
    return from_masks(masks, models);
}

inline LayoutClaim claim_of(const PackResult& result) {
    return {{result.page_indptr, result.page_ids}, {result.read_indptr, result.read_pages}};
}

inline PackResult pack_checked(const PackRequest& request) {
    PackResult result = pack_pages(request);
    check_layout(request, claim_of(result));
    return result;
}

inline std::int64_t new_pages(const PackResult& r) { return std::ssize(r.page_indptr) - 1; }

inline std::int64_t reads_of(const PackResult& r, std::size_t model) {
    return r.read_indptr[model + 1] - r.read_indptr[model];
}

inline std::vector<unsigned> random_masks(std::mt19937& random, int models, int blocks) {
    std::vector<unsigned> masks(static_cast<std::size_t>(blocks));
    for (unsigned& mask : masks) mask = 1 + random() % ((1U << models) - 1);
    return masks;
}

}  // namespace pydedup::testing
