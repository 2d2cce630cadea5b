// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include "packing/exact_cover.hpp"
#include "packing/layout.hpp"
#include "packing/problem.hpp"

namespace pydedup {
namespace {

using packing::ExactPages;
using packing::Index;
using packing::Problem;

ExactPages run(const Problem& problem, PackAlgorithm algorithm, bool& optimal) {
    switch (algorithm) {
        case PackAlgorithm::two_stage:
            return packing::pack_two_stage(problem);
        case PackAlgorithm::greedy1:
            return packing::pack_greedy1(problem);
        case PackAlgorithm::greedy2:
            return packing::pack_greedy2(problem);
        case PackAlgorithm::baseline:
            return packing::pack_baseline(problem);
        case PackAlgorithm::layout:
            break;
    }
    packing::PackedLayout packed = packing::pack_layout(problem);
    optimal = packed.optimal && problem.existing_reads_are_forced;
    ExactPages out{std::move(packed.pages), {}};
    std::vector<Index> page_of(problem.blocks(), packing::kNone);
    for (std::size_t p = 0; p < out.pages.size(); ++p) {
        for (const Index b : out.pages.row(p)) page_of[b] = static_cast<Index>(p);
    }
    std::vector<Index> read_by(out.pages.size(), packing::kNone);
    for (Index m = 0; m < problem.models(); ++m) {
        const auto start = static_cast<std::ptrdiff_t>(out.reads.items.size());
        for (const Index b : problem.owned.row(m)) {
            const Index page = page_of[b];
            if (std::exchange(read_by[page], m) != m) out.reads.items.push_back(page);
        }
        std::sort(out.reads.items.begin() + start, out.reads.items.end());
        out.reads.close_row();
    }
    return out;
}

}  // namespace

PackResult pack_pages(const PackRequest& request) {
    Problem problem = packing::make_problem(request);
    PackResult result;
    const ExactPages packed = run(problem, request.algorithm, result.optimal);
    result.least_reads = std::move(problem.least_reads);
    result.lower_bound = problem.lower_bound;
    result.page_indptr.assign(packed.pages.indptr.begin(), packed.pages.indptr.end());
    result.page_ids.reserve(packed.pages.items.size());
    for (const Index b : packed.pages.items) result.page_ids.push_back(problem.ids[b]);
    result.read_indptr.push_back(0);
    for (std::size_t m = 0; m < problem.models(); ++m) {
        for (const Index page : problem.existing_reads.row(m)) result.read_pages.push_back(page);
        for (const Index page : packed.reads.row(m)) {
            result.read_pages.push_back(static_cast<std::int64_t>(problem.existing_pages + page));
        }
        result.read_indptr.push_back(static_cast<std::int64_t>(result.read_pages.size()));
    }
    return result;
}

}  // namespace pydedup
