// SPDX-License-Identifier: Apache-2.0
// Lower bounds against definitions, and the exact search against them and trying everything.
#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "check.hpp"
#include "packing/bound.hpp"
#include "packing_inputs.hpp"
#include "pydedup/packing.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Sizes = std::vector<std::uint64_t>;

/// The bound as Martello and Toth define it, one threshold after the other.
std::uint64_t defined_l2(const Sizes& sizes, std::uint64_t capacity) {
    std::uint64_t most = 0;
    for (std::uint64_t a = 0; a <= capacity / 2; ++a) {
        std::uint64_t alone = 0, large = 0, large_sum = 0, small_sum = 0;
        for (const std::uint64_t size : sizes) {
            if (size > capacity - a) {
                ++alone;
            } else if (size > capacity / 2) {
                ++large;
                large_sum += size;
            } else if (size >= a) {
                small_sum += size;
            }
        }
        const std::uint64_t room = large * capacity - large_sum;
        const std::uint64_t over = small_sum > room ? small_sum - room : 0;
        most = std::max(most, alone + large + (over + capacity - 1) / capacity);
    }
    return most;
}

struct Best {
    std::size_t pages;
    std::int64_t reads;
};

/// Fewest pages, then least weighted reads, by trying every placement on up to so many pages.
Best try_everything(const std::vector<unsigned>& masks, const std::vector<std::int64_t>& sizes,
                    std::int64_t capacity, const std::vector<std::int64_t>& weights) {
    const auto cost = [&](unsigned mask) {
        std::int64_t sum = 0;
        for (std::size_t m = 0; m < weights.size(); ++m)
            sum += (mask >> m & 1) != 0 ? weights[m] : 0;
        return sum;
    };
    Best best{masks.size() + 1, 0};
    std::vector<std::int64_t> filled;
    std::vector<unsigned> readers;
    std::function<void(std::size_t)> place = [&](std::size_t block) {
        if (filled.size() > best.pages) return;
        if (block == masks.size()) {
            std::int64_t reads = 0;
            for (const unsigned mask : readers) reads += cost(mask);
            if (filled.size() < best.pages || reads < best.reads) best = {filled.size(), reads};
            return;
        }
        for (std::size_t p = 0; p <= filled.size(); ++p) {
            if (p == filled.size()) {
                filled.push_back(sizes[block]);
                readers.push_back(masks[block]);
                place(block + 1);
                filled.pop_back();
                readers.pop_back();
                return;
            }
            if (filled[p] + sizes[block] > capacity) continue;
            const unsigned before = readers[p];
            filled[p] += sizes[block];
            readers[p] |= masks[block];
            place(block + 1);
            filled[p] -= sizes[block];
            readers[p] = before;
        }
    };
    place(0);
    return best;
}

std::int64_t weighted(const PackResult& result, const std::vector<std::int64_t>& weights) {
    std::int64_t reads = 0;
    for (std::size_t m = 0; m < weights.size(); ++m) reads += weights[m] * reads_of(result, m);
    return reads;
}

}  // namespace

TEST(page_bound_is_that_of_martello_and_toth) {
    std::mt19937 random(1);
    for (int round = 0; round < 2000; ++round) {
        const std::uint64_t capacity = 1 + random() % 60;
        Sizes sizes(random() % 20);
        for (std::uint64_t& size : sizes) size = 1 + random() % capacity;
        const std::uint64_t expected = defined_l2(sizes, capacity);
        CHECK(packing::least_pages(sizes, capacity) == expected);
    }
    Sizes nothing;
    CHECK(packing::least_pages(nothing, 5) == 0);
    // As large as numbers get: no sum may wrap.
    const std::uint64_t top = (std::uint64_t{1} << 63) - 1;
    Sizes one{top}, halves{top / 2, top / 2};
    CHECK(packing::least_pages(one, top) == 1);
    CHECK(packing::least_pages(halves, top) == 1);
}

TEST(the_bound_counts_blocks_that_fit_no_page_together) {
    Input input;
    input.add_row({0, 1, 2});
    const std::vector<std::int64_t> sizes{9, 12, 12};
    PackRequest request{input.rows(), 20};
    request.sizes = sizes;
    const PackResult result = pack_checked(request);
    CHECK(result.lower_bound == 3);  // 33 of 40 would be two
    CHECK(result.least_reads == std::vector<std::int64_t>{3});
    CHECK(result.optimal);
}

TEST(blocks_of_unequal_size_are_packed_as_well_as_can_be) {
    std::mt19937 random(2);
    for (int round = 0; round < 300; ++round) {
        const int models = 1 + static_cast<int>(random() % 4);
        const auto masks = random_masks(random, models, 1 + static_cast<int>(random() % 8));
        std::vector<std::int64_t> sizes(masks.size());
        for (std::int64_t& size : sizes) size = 1 + static_cast<std::int64_t>(random() % 30);
        std::vector<std::int64_t> weights(static_cast<std::size_t>(models));
        for (std::int64_t& weight : weights) weight = 1 + static_cast<std::int64_t>(random() % 3);
        const Input input = from_masks(masks, models);
        PackRequest request{input.rows(), 30 + random() % 40};
        request.sizes = sizes;
        const std::vector<double> rates(weights.begin(), weights.end());
        request.weights = rates;
        const PackResult result = pack_checked(request);
        const Best best =
            try_everything(masks, sizes, static_cast<std::int64_t>(request.capacity), weights);
        CHECK(static_cast<std::size_t>(new_pages(result)) == best.pages);
        CHECK(weighted(result, weights) == best.reads);
        CHECK(result.optimal);
    }
}

TEST(read_bound_is_never_above_what_can_be_had) {
    std::mt19937 random(3);
    int tight = 0;
    for (int round = 0; round < 300; ++round) {
        const int models = 1 + static_cast<int>(random() % 5);
        const auto masks = random_masks(random, models, 1 + static_cast<int>(random() % 8));
        const std::vector<std::int64_t> ones(masks.size(), 1);
        std::vector<std::int64_t> weights(static_cast<std::size_t>(models));
        for (std::int64_t& weight : weights) weight = 1 + static_cast<std::int64_t>(random() % 3);
        packing::Problem problem;
        problem.capacity = 1 + random() % 4;
        problem.weights = weights;
        packing::Rows owners;
        for (const unsigned mask : masks) {
            for (packing::Index m = 0; m < weights.size(); ++m) {
                if ((mask >> m & 1) != 0) owners.items.push_back(m);
            }
            owners.close_row();
        }
        problem.owned.indptr.resize(weights.size() + 1);
        const std::vector<std::uint64_t> amount(masks.size(), 1);
        const std::int64_t bound = packing::least_weighted_reads(problem, owners, amount);
        const Best best =
            try_everything(masks, ones, static_cast<std::int64_t>(problem.capacity), weights);
        CHECK(bound <= best.reads);
        std::int64_t alone = 0;  // each model by itself
        for (std::size_t m = 0; m < weights.size(); ++m) {
            std::uint64_t owned = 0;
            for (const unsigned mask : masks) owned += mask >> m & 1;
            alone += weights[m] *
                     static_cast<std::int64_t>((owned + problem.capacity - 1) / problem.capacity);
        }
        CHECK(bound >= alone);
        tight += bound == best.reads ? 1 : 0;
    }
    CHECK(tight > 200);
}

TEST(read_bound_of_many_models_takes_eight_at_a_time) {
    // 24 models in three families of 8, each like the one that is bounded alone.
    std::mt19937 random(4);
    const auto masks = random_masks(random, 8, 40);
    const auto bound_of = [&](std::size_t families) {
        packing::Problem problem;
        problem.capacity = 7;
        problem.weights.assign(families * 8, 3);
        problem.owned.indptr.resize(families * 8 + 1);
        packing::Rows owners;
        for (std::size_t f = 0; f < families; ++f) {
            for (const unsigned mask : masks) {
                for (packing::Index m = 0; m < 8; ++m) {
                    if ((mask >> m & 1) != 0) {
                        owners.items.push_back(static_cast<packing::Index>(f * 8) + m);
                    }
                }
                owners.close_row();
            }
        }
        const std::vector<std::uint64_t> amount(owners.size(), 1);
        return packing::least_weighted_reads(problem, owners, amount);
    };
    CHECK(bound_of(3) >= 3 * bound_of(1));
}

TEST(a_class_that_fills_a_page_may_have_to_share_pages) {
    // Three blocks of A alone and two each of A with B, C, D, three to a page: six reads are
    // possible only when each page has one block of A alone.
    const Input input = from_classes({{1, 3}, {3, 2}, {5, 2}, {9, 2}}, 4);
    const PackResult result = pack_checked({input.rows(), 3});
    CHECK(new_pages(result) == 3);
    CHECK(result.read_pages.size() == 6);
    CHECK(result.optimal);
}

TEST(an_optimum_is_claimed_only_when_reads_are_forced) {
    Input owners, once, twice;
    owners.add_row({0, 1, 2});
    once.add_row({0, 1});
    twice.add_row({0, 1});
    twice.add_row({1, 7});
    PackRequest request{owners.rows(), 2};
    request.existing = once.rows();
    CHECK(pack_checked(request).optimal);
    request.existing = twice.rows();
    CHECK(!pack_checked(request).optimal);
    request.existing = {};
    request.algorithm = PackAlgorithm::two_stage;
    CHECK(!pack_checked(request).optimal);
}

PYDEDUP_TEST_MAIN
