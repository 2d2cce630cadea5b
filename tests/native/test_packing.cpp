// SPDX-License-Identifier: Apache-2.0
// Packers against exhaustive search, the figures of the paper and each other; their parts.
#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "check.hpp"
#include "packing/classes.hpp"
#include "packing/fill.hpp"
#include "packing/line.hpp"
#include "packing/problem.hpp"
#include "packing_inputs.hpp"
#include "pydedup/packing.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

/// Least weighted reads with the least number of pages, by trying every placement.
class Exhaustive {
  public:
    Exhaustive(std::vector<unsigned> masks, std::size_t capacity, std::vector<int> weights)
        : masks_(std::move(masks)), capacity_(capacity), weights_(std::move(weights)) {
        // Equal blocks next to each other are cut early.
        std::sort(masks_.begin(), masks_.end());
        const std::size_t pages = (masks_.size() + capacity - 1) / capacity;
        readers_.assign(pages, 0);
        filled_.assign(pages, 0);
    }
    int best(int bound) {
        best_ = bound;
        place(0, 0);
        return best_;
    }

  private:
    void place(std::size_t block, int cost) {
        if (cost >= best_) return;
        if (block == masks_.size()) {
            best_ = cost;
            return;
        }
        for (std::size_t p = 0; p < readers_.size(); ++p) {
            if (filled_[p] == capacity_) continue;
            const unsigned before = readers_[p];
            int added = 0;
            for (unsigned fresh = masks_[block] & ~before; fresh != 0; fresh &= fresh - 1) {
                added += weights_[static_cast<std::size_t>(std::countr_zero(fresh))];
            }
            readers_[p] |= masks_[block];
            ++filled_[p];
            place(block + 1, cost + added);
            --filled_[p];
            readers_[p] = before;
            if (filled_[p] == 0) break;  // empty pages are alike
        }
    }
    std::vector<unsigned> masks_;
    std::size_t capacity_;
    std::vector<int> weights_;
    std::vector<unsigned> readers_;
    std::vector<std::size_t> filled_;
    int best_ = 0;
};

}  // namespace

TEST(layout_is_as_good_as_exhaustive_search_on_tiny_problems) {
    std::mt19937 random(1);
    for (int round = 0; round < 400; ++round) {
        const int models = 2 + static_cast<int>(random() % 4);
        const std::size_t capacity = 2 + random() % 4;
        const auto masks = random_masks(random, models, 4 + static_cast<int>(random() % 7));
        std::vector<int> weights(static_cast<std::size_t>(models), 1);
        if (round % 2 != 0) {
            for (int& weight : weights) weight = 1 << random() % 4;
        }
        const Input input = from_masks(masks, models);
        PackRequest request{input.rows(), capacity};
        const std::vector<double> rates(weights.begin(), weights.end());
        request.weights = rates;
        const PackResult result = pack_checked(request);
        CHECK(new_pages(result) == result.lower_bound);
        int reads = 0;
        for (std::size_t m = 0; m < weights.size(); ++m) {
            reads += weights[m] * static_cast<int>(reads_of(result, m));
        }
        const int best = Exhaustive(masks, capacity, weights).best(reads + 1);
        CHECK(reads == best);
        CHECK(result.optimal);
    }
}

TEST(word2vec_of_the_paper) {
    // Six variants of 500 blocks of which 450 are the same, 8 on a page; the bound is 94 pages.
    std::vector<std::pair<unsigned, int>> counts{{63, 450}};
    for (unsigned m = 0; m < 6; ++m) counts.emplace_back(1U << m, 50);
    const Input input = from_classes(counts, 6);
    std::map<PackAlgorithm, std::int64_t> pages;
    for (const PackAlgorithm algorithm : kAll) {
        PackRequest request{input.rows(), 8};
        request.algorithm = algorithm;
        const PackResult result = pack_checked(request);
        pages[algorithm] = new_pages(result);
        CHECK(result.lower_bound == 94);
        for (std::size_t m = 0; m < 6; ++m) {
            CHECK(result.least_reads[m] == 63);
            CHECK(reads_of(result, m) <= 64);
        }
        if (algorithm == PackAlgorithm::layout) CHECK(result.read_pages.size() == 381);
    }
    CHECK(pages[PackAlgorithm::layout] == 94);
    CHECK(pages[PackAlgorithm::two_stage] == 98);
    CHECK(pages[PackAlgorithm::greedy1] == 99);
    CHECK(pages[PackAlgorithm::greedy2] == 98);
    CHECK(pages[PackAlgorithm::baseline] > 98);
}

TEST(shapes_of_the_paper_reach_the_bound_with_one_read_more_at_most) {
    // Five text classifiers: most blocks in all, the rest in uneven and partly tiny classes.
    const std::vector<std::pair<unsigned, int>> small{{31, 410}, {23, 50}, {21, 36}, {2, 50},
                                                      {8, 100},  {1, 15},  {20, 9},  {4, 4}};
    const std::vector<std::pair<unsigned, int>> large{
        {31, 5550}, {15, 610}, {11, 395}, {27, 10}, {29, 7},    {2, 10}, {14, 1},
        {30, 8},    {10, 150}, {4, 560},  {8, 4},   {16, 1160}, {1, 165}};
    const std::pair<const std::vector<std::pair<unsigned, int>>*, std::uint64_t> shapes[] = {
        {&small, 8}, {&large, 88}, {&large, 44}};
    for (const auto& [counts, capacity] : shapes) {
        const Input input = from_classes(*counts, 5);
        const PackResult result = pack_checked({input.rows(), capacity});
        CHECK(new_pages(result) == result.lower_bound);
        for (std::size_t m = 0; m < 5; ++m) CHECK(reads_of(result, m) <= result.least_reads[m] + 1);
    }
}

TEST(equal_sizes_pack_like_counts) {
    std::mt19937 random(3);
    const Input input = from_masks(random_masks(random, 6, 500), 6);
    const std::vector<std::int64_t> sizes(500, 7);
    for (const PackAlgorithm algorithm : kAll) {
        PackRequest in_bytes{input.rows(), 7 * 16 + 6};
        in_bytes.sizes = sizes;
        in_bytes.algorithm = algorithm;
        PackRequest in_blocks{input.rows(), 16};
        in_blocks.algorithm = algorithm;
        CHECK(pack_checked(in_bytes).page_ids == pack_checked(in_blocks).page_ids);
    }
}

TEST(sizes_never_need_more_pages_than_first_fit) {
    // Large blocks of one class that fit a page only beside small ones of another.
    Input input;
    std::vector<std::int64_t> large(100), small(100), sizes(200, 600);
    std::iota(large.begin(), large.end(), 0);
    std::iota(small.begin(), small.end(), 100);
    std::fill(sizes.begin() + 100, sizes.end(), 400);
    input.add_row(large);
    input.add_row(small);
    PackRequest request{input.rows(), 1000};
    request.sizes = sizes;
    CHECK(new_pages(pack_checked(request)) == 100);
}

TEST(pages_are_filled_as_they_say) {
    using Pages = std::vector<std::vector<packing::Index>>;
    const auto filled = [](const std::vector<std::uint64_t>& sizes, auto fill) {
        packing::Problem problem;
        problem.sizes = sizes;
        problem.capacity = 10;
        std::vector<packing::Index> order(sizes.size());
        std::iota(order.begin(), order.end(), packing::Index{0});
        packing::Rows rows;
        fill(problem, order, rows);
        Pages pages;
        for (std::size_t p = 0; p < rows.size(); ++p) {
            pages.emplace_back(rows.row(p).begin(), rows.row(p).end());
        }
        return pages;
    };
    const auto in_order = packing::fill_in_order;
    CHECK(filled({6, 5, 3, 4, 5}, in_order) == (Pages{{0, 3}, {1, 2}, {4}}));  // the largest
    CHECK(filled({8, 5, 2, 2, 2}, in_order) == (Pages{{0, 2}, {1, 3, 4}}));  // of equals the first
    CHECK(filled({6, 5, 4, 5}, packing::fill_first_fit) == (Pages{{0, 2}, {1, 3}}));
    // A page that is full counts as one, also the last.
    const auto n_full = [](const std::vector<std::uint64_t>& sizes) {
        packing::Problem problem;
        problem.sizes = sizes;
        problem.capacity = 10;
        const std::vector<packing::Index> order{0, 1, 2};
        packing::Rows rows;
        return packing::fill_anew(problem, order, rows);
    };
    CHECK(n_full({10, 4, 6}) == 2);
    CHECK(n_full({10, 4, 5}) == 1);
}

TEST(looking_ahead_leaves_little_room) {
    std::mt19937 random(4);
    packing::Problem problem;
    problem.capacity = 640'000;
    std::uint64_t total = 0;
    for (int b = 0; b < 20'000; ++b) {
        problem.sizes.push_back(5'000 + random() % 5'001);
        total += problem.sizes.back();
    }
    std::vector<packing::Index> order(problem.sizes.size());
    std::iota(order.begin(), order.end(), 0U);
    packing::Rows pages;
    packing::fill_in_order(problem, order, pages);
    const double least = static_cast<double>(total) / 640'000;
    CHECK(static_cast<double>(pages.size()) < least * 1.002 + 1);
    packing::Rows fitted;
    packing::fill_first_fit(problem, order, fitted);
    CHECK(fitted.items.size() == order.size());
    std::sort(fitted.items.begin(), fitted.items.end());
    CHECK(fitted.items == order);
}

TEST(classes_are_those_of_equal_owner_sets) {
    std::mt19937 random(5);
    for (int round = 0; round < 100; ++round) {
        const int models = 1 + static_cast<int>(random() % 10);
        const auto masks = random_masks(random, models, 200);
        packing::Rows owned;
        for (int m = 0; m < models; ++m) {
            for (packing::Index b = 0; b < masks.size(); ++b) {
                if ((masks[b] >> m & 1U) != 0) owned.items.push_back(b);
            }
            owned.close_row();
        }
        const packing::Classes classes = packing::find_classes(owned, masks.size());
        std::set<unsigned> seen;
        std::size_t members = 0;
        for (std::size_t c = 0; c < classes.size(); ++c) {
            unsigned mask = 0;
            for (const packing::Index m : classes.owners.row(c)) mask |= 1U << m;
            CHECK(seen.insert(mask).second);
            CHECK(std::ranges::is_sorted(classes.members.row(c)));
            for (const packing::Index b : classes.members.row(c)) CHECK(masks[b] == mask);
            members += classes.members.row(c).size();
        }
        CHECK(members == masks.size());
    }
}

TEST(lines_hold_every_piece_once_whatever_the_work_allowed) {
    std::mt19937 random(6);
    packing::Rows owners;
    std::vector<std::uint64_t> amount;
    for (int i = 0; i < 3000; ++i) {
        std::set<packing::Index> row;
        for (std::size_t k = 0; k < 1 + random() % 6; ++k) row.insert(random() % 200);
        owners.append(std::vector<packing::Index>(row.begin(), row.end()));
        amount.push_back(1 + random() % 15);
    }
    const std::vector<std::int64_t> weights(200, 1);
    const packing::Pieces pieces{owners, amount, weights, 16};
    const auto gray = packing::gray_line(pieces);
    const auto once = [](std::vector<packing::Index> line) {
        std::sort(line.begin(), line.end());
        for (packing::Index i = 0; i < line.size(); ++i) {
            if (line[i] != i) return false;
        }
        return line.size() == 3000;
    };
    CHECK(once(gray));
    CHECK(once(packing::heavy_line(pieces, gray)));
    CHECK(once(packing::similar_line(pieces)));
    for (const std::uint64_t visits : {0ULL, 2'000ULL, 1'000'000'000ULL}) {
        CHECK(once(packing::gather_line(pieces, gray, visits)));
    }
}

TEST(existing_pages_are_read_sparingly) {
    Input owners, existing;
    owners.add_row({1, 2, 3, 4, 5, 6});
    for (const auto& page : {std::vector<std::int64_t>{1, 2}, {3, 4}, {1, 2, 3, 4, 90}, {5, 91}}) {
        existing.add_row(page);
    }
    PackRequest request{owners.rows(), 4};
    request.existing = existing.rows();
    const PackResult result = pack_checked(request);
    CHECK(result.read_pages == std::vector<std::int64_t>{2, 3, 4});
    CHECK(result.page_ids == std::vector<std::int64_t>{6});
    CHECK(result.lower_bound == 5);
}

TEST(thousands_of_classes_reach_the_bound) {
    // 40 families of 8 models, each with its own mix of sharing.
    std::mt19937 random(7);
    std::vector<std::vector<std::int64_t>> rows(320);
    for (std::int64_t b = 0; b < 200'000; ++b) {
        const std::size_t family = random() % 40;
        const unsigned mask = 1 + random() % 255;
        for (std::size_t m = 0; m < 8; ++m) {
            if ((mask >> m & 1U) != 0) rows[family * 8 + m].push_back(b);
        }
    }
    Input input;
    for (const auto& row : rows) input.add_row(row);
    const PackResult result = pack_checked({input.rows(), 64});
    CHECK(new_pages(result) == result.lower_bound);
    std::int64_t least = 0;
    for (const std::int64_t reads : result.least_reads) least += reads;
    // Each class alone would be 20 blocks on a page of 64; 1.38 when written.
    CHECK(static_cast<double>(result.read_pages.size()) < 1.45 * static_cast<double>(least));
    PackRequest again{input.rows(), 64};
    CHECK(pack_pages(again).page_ids == result.page_ids);
}

PYDEDUP_TEST_MAIN
