// SPDX-License-Identifier: Apache-2.0
// The checker against all packers, and against damaged layouts; requests that are refused.
#include <limits>
#include <set>
#include <string>

#include "check.hpp"
#include "packing_inputs.hpp"

using namespace pydedup;
using namespace pydedup::testing;

TEST(every_algorithm_passes_the_checker) {
    std::mt19937 random(2);
    for (std::size_t round = 0; round < scaled(100); ++round) {
        const int models = 1 + static_cast<int>(random() % 8);
        const auto masks = random_masks(random, models, 1 + static_cast<int>(random() % 120));
        const Input input = from_masks(masks, models);
        Input existing;
        for (std::size_t p = 0; p < random() % 5; ++p) {
            std::set<std::int64_t> page;
            for (std::size_t i = 0; i < 1 + random() % 9; ++i) page.insert(random() % 150);
            existing.add_row({page.begin(), page.end()});
        }
        std::vector<std::int64_t> sizes(masks.size());
        for (std::int64_t& size : sizes) size = 1 + static_cast<std::int64_t>(random() % 60);
        for (const PackAlgorithm algorithm : kAll) {
            PackRequest request{input.rows(), 1 + random() % 16};
            request.existing = existing.rows();
            request.algorithm = algorithm;
            const PackResult in_blocks = pack_checked(request);
            CHECK(new_pages(in_blocks) >=
                  in_blocks.lower_bound - (std::ssize(existing.indptr) - 1));
            request.capacity = 60 + random() % 200;
            request.sizes = sizes;
            static_cast<void>(pack_checked(request));
        }
    }
}

TEST(checker_finds_each_kind_of_damage) {
    Input owners, existing;
    owners.add_row({0, 1, 2, 3, 4});
    owners.add_row({3, 4, 5});
    existing.add_row({0});
    PackRequest request{owners.rows(), 3};
    request.existing = existing.rows();
    const auto verdict = [&](std::vector<std::vector<std::int64_t>> pages,
                             std::vector<std::vector<std::int64_t>> reads) {
        Input page_rows, read_rows;
        for (const auto& page : pages) page_rows.add_row(page);
        for (const auto& read : reads) read_rows.add_row(read);
        try {
            check_layout(request, {page_rows.rows(), read_rows.rows()});
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string("fine");
    };
    const auto says = [](const std::string& message, const char* part) {
        return message.find(part) != std::string::npos;
    };
    CHECK(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 2}, {2}}) == "fine");
    CHECK(says(verdict({{1, 2}, {3, 4}}, {{0, 1, 2}, {2}}), "block 5 is on no page"));
    CHECK(says(verdict({{2}, {1, 3, 4, 5}}, {{0, 1, 2}, {2}}), "more than its capacity"));
    CHECK(says(verdict({{1, 2, 1}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "is twice on"));
    CHECK(says(verdict({{1, 2, 9}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "belongs to no model"));
    CHECK(says(verdict({{0, 1, 2}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "on an existing page already"));
    CHECK(says(verdict({{1, 2, 3}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "on several new pages"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}, {}}, {{0, 1, 2}, {2}}), "is empty"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{1, 2}, {2}}), "block 0 of model 0 is on no page"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 2}, {1, 2}}), "owns no block there"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 2, 1}, {2}}), "not ascending"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 1, 2}, {2}}), "not ascending"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 3}, {2}}), "not ascending"));
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 2}}), "reads of 1 models"));
    request.algorithm = PackAlgorithm::greedy2;
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "whose block 5 it does not own"));
    CHECK(verdict({{1, 2}, {3, 4}, {5}}, {{0, 1, 2}, {2, 3}}) == "fine");
    const std::vector<std::int64_t> fitting{1, 1, 1, 1, 1, 1}, few{1, 1}, zero{1, 1, 0, 1, 1, 1};
    request.sizes = fitting;
    CHECK(verdict({{1, 2}, {3, 4}, {5}}, {{0, 1, 2}, {2, 3}}) == "fine");
    request.sizes = few;
    CHECK(says(verdict({{1, 2}, {3, 4}, {5}}, {{0, 1, 2}, {2, 3}}), "given for 2 of 6"));
    request.sizes = zero;
    CHECK(says(verdict({{1, 2}, {3, 4}, {5}}, {{0, 1, 2}, {2, 3}}), "an entry below 1"));
    constexpr std::int64_t kThird = 0x5555555555555556;  // three of them are 2^64 + 2
    const std::vector<std::int64_t> huge{1, 1, 1, kThird, kThird, kThird};
    request.sizes = huge;
    request.algorithm = PackAlgorithm::layout;
    CHECK(says(verdict({{1, 2}, {3, 4, 5}}, {{0, 1, 2}, {2}}), "more than its capacity 3"));
}

TEST(checker_refuses_row_pointers_that_are_none) {
    Input owners, existing, pages, reads;
    owners.add_row({0, 1, 2});
    existing.add_row({5, 6, 7});
    pages.add_row({0, 1, 2});
    reads.add_row({1});
    const std::vector<std::int64_t> good{0, 3}, late{1, 3}, falling{0, 2, 1, 3}, short_of{0, 2},
        beyond{0, 4}, none;
    PackRequest request{owners.rows(), 8};
    request.existing = existing.rows();
    LayoutClaim claim{pages.rows(), reads.rows()};
    check_layout(request, claim);
    const auto check = [&](IdRows& rows, const std::string& name) {
        const IdRows sound = rows;
        for (const auto* bad : {&late, &falling, &short_of, &beyond, &none}) {
            rows.indptr = *bad;
            std::string said = "nothing";
            try {
                check_layout(request, claim);
            } catch (const Error& error) {
                said = error.what();
            }
            CHECK(said.find("row pointers of " + name) != std::string::npos);
        }
        rows = sound;
    };
    check(request.owners, "owners");
    check(request.existing, "existing");
    check(claim.pages, "pages");
    check(claim.reads, "reads");
}

TEST(bad_requests_are_refused) {
    const auto refused = [](const PackRequest& request) {
        CHECK_THROWS(ErrorCode::invalid_argument, static_cast<void>(pack_pages(request)));
    };
    Input good;
    good.add_row({4, 2, 7});
    const std::vector<std::int64_t> sizes{1, 2, 3}, wrong_count{1, 2}, too_large{1, 2, 9},
        zero{1, 0, 2};
    const std::vector<double> two{1, 1}, negative{-1},
        nan{std::numeric_limits<double>::quiet_NaN()};
    refused({good.rows(), 0});
    for (const auto* bad : {&wrong_count, &too_large, &zero}) refused({good.rows(), 8, *bad});
    for (const auto* bad : {&two, &negative, &nan}) refused({good.rows(), 8, sizes, {}, *bad});
    Input twice, below;
    twice.add_row({4, 2, 4});
    below.add_row({-1});
    refused({twice.rows(), 8});
    refused({below.rows(), 8});
    refused({good.rows(), 8, {}, twice.rows()});
    const std::vector<std::int64_t> late{1, 3}, falling{0, 2, 1, 3}, short_of{0, 2};
    for (const auto* bad : {&late, &falling, &short_of}) refused({{*bad, good.ids}, 8});
    CHECK(pack_pages({{}, 8}).read_indptr == std::vector<std::int64_t>{0});
}

PYDEDUP_TEST_MAIN
