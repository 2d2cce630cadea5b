// SPDX-License-Identifier: Apache-2.0
#include "packing/existing.hpp"

#include <algorithm>
#include <queue>
#include <utility>

namespace pydedup::packing {
namespace {

Rows transpose(const Rows& pages, std::size_t blocks) {
    Rows out;
    out.indptr.assign(blocks + 1, 0);
    for (const Index b : pages.items) ++out.indptr[b + 1];
    for (std::size_t b = 0; b < blocks; ++b) out.indptr[b + 1] += out.indptr[b];
    out.items.resize(pages.items.size());
    std::vector<std::uint64_t> at(out.indptr.begin(), out.indptr.end() - 1);
    for (std::size_t p = 0; p < pages.size(); ++p) {
        for (const Index b : pages.row(p)) out.items[at[b]++] = static_cast<Index>(p);
    }
    return out;
}

}  // namespace

Rows choose_existing(const Rows& owned, const Rows& pages, std::size_t blocks) {
    Rows reads;
    if (pages.items.empty()) {
        reads.indptr.assign(owned.size() + 1, 0);
        return reads;
    }
    const Rows pages_of = transpose(pages, blocks);
    std::vector<Index> chosen_by(pages.size(), kNone);   // model that reads the page
    std::vector<Index> counted_by(pages.size(), kNone);  // model that `gain` speaks of
    std::vector<Index> gain(pages.size(), 0);
    std::vector<bool> open(blocks, false);
    std::vector<Index> undecided;
    std::vector<Index> candidates;
    for (Index m = 0; m < owned.size(); ++m) {
        const std::size_t start = reads.items.size();
        const auto choose = [&](Index page) {
            if (std::exchange(chosen_by[page], m) != m) reads.items.push_back(page);
        };
        undecided.clear();
        for (const Index b : owned.row(m)) {
            const auto on = pages_of.row(b);
            if (on.size() == 1) choose(on[0]);
            if (on.size() > 1) undecided.push_back(b);
        }
        // What the pages without alternative do not bring along is covered greedily. Gains only
        // fall, so a queue entry is right when its gain is still the page's.
        candidates.clear();
        for (const Index b : undecided) {
            const auto on = pages_of.row(b);
            if (std::ranges::any_of(on, [&](Index p) { return chosen_by[p] == m; })) continue;
            open[b] = true;
            for (const Index p : on) {
                if (std::exchange(counted_by[p], m) != m) {
                    gain[p] = 0;
                    candidates.push_back(p);
                }
                ++gain[p];
            }
        }
        const auto worse = [](const std::pair<Index, Index>& a, const std::pair<Index, Index>& b) {
            return a.first != b.first ? a.first < b.first : a.second > b.second;
        };
        std::priority_queue<std::pair<Index, Index>, std::vector<std::pair<Index, Index>>,
                            decltype(worse)>
            queue(worse);
        for (const Index p : candidates) queue.emplace(gain[p], p);
        while (!queue.empty()) {
            const auto [stale, page] = queue.top();
            queue.pop();
            if (gain[page] == 0) continue;
            if (stale != gain[page]) {
                queue.emplace(gain[page], page);
                continue;
            }
            choose(page);
            for (const Index b : pages.row(page)) {
                if (!open[b]) continue;
                open[b] = false;
                for (const Index p : pages_of.row(b)) --gain[p];
            }
        }
        std::sort(reads.items.begin() + static_cast<std::ptrdiff_t>(start), reads.items.end());
        reads.close_row();
    }
    return reads;
}

}  // namespace pydedup::packing
