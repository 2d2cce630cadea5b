// SPDX-License-Identifier: Apache-2.0
#include "packing/existing.hpp"

#include <algorithm>
#include <queue>
#include <span>
#include <utility>
#include <vector>

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

// Chooses the pages that one model after another reads.
class Chooser {
  public:
    Chooser(const Rows& pages, std::size_t blocks)
        : pages_(pages),
          pages_of_(transpose(pages, blocks)),
          chosen_by_(pages.size(), kNone),
          gain_(pages.size(), 0),
          open_(blocks, false) {}

    // Appends a row to `reads`.
    void choose_for(Index model, std::span<const Index> owned, Rows& reads) {
        const auto start = static_cast<std::ptrdiff_t>(reads.items.size());
        undecided_.clear();
        for (const Index b : owned) {
            const auto on = pages_of_.row(b);
            if (on.size() == 1) choose(on[0], model, reads);
            if (on.size() > 1) undecided_.push_back(b);
        }
        cover_undecided(model, reads);
        std::sort(reads.items.begin() + start, reads.items.end());
        reads.close_row();
    }

  private:
    void choose(Index page, Index model, Rows& reads) {
        if (std::exchange(chosen_by_[page], model) != model) reads.items.push_back(page);
    }

    // What the pages without alternative do not bring along is covered greedily. Gains only fall,
    // so a queue entry is right when its gain is still the page's.
    void cover_undecided(Index model, Rows& reads) {
        candidates_.clear();
        for (const Index b : undecided_) {
            const auto on = pages_of_.row(b);
            if (std::ranges::any_of(on, [&](Index p) { return chosen_by_[p] == model; })) continue;
            open_[b] = true;
            for (const Index p : on) {
                if (gain_[p]++ == 0) candidates_.push_back(p);
            }
        }
        using Entry = std::pair<Index, Index>;  // gain, page
        const auto worse = [](const Entry& a, const Entry& b) {
            return a.first != b.first ? a.first < b.first : a.second > b.second;
        };
        std::priority_queue<Entry, std::vector<Entry>, decltype(worse)> queue(worse);
        for (const Index p : candidates_) queue.emplace(gain_[p], p);
        while (!queue.empty()) {
            const auto [stale, page] = queue.top();
            queue.pop();
            if (gain_[page] == 0) continue;
            if (stale != gain_[page]) {
                queue.emplace(gain_[page], page);
                continue;
            }
            choose(page, model, reads);
            for (const Index b : pages_.row(page)) {
                if (!open_[b]) continue;
                open_[b] = false;
                for (const Index p : pages_of_.row(b)) --gain_[p];
            }
        }
    }

    const Rows& pages_;
    const Rows pages_of_;
    std::vector<Index> chosen_by_;  // model that reads the page
    std::vector<Index> gain_;       // per page: open blocks on it
    std::vector<bool> open_;
    std::vector<Index> undecided_;
    std::vector<Index> candidates_;
};

}  // namespace

Rows choose_existing(const Rows& owned, const Rows& pages, std::size_t blocks) {
    Rows reads;
    if (pages.items.empty()) {
        reads.indptr.assign(owned.size() + 1, 0);
        return reads;
    }
    Chooser chooser(pages, blocks);
    for (Index m = 0; m < owned.size(); ++m) chooser.choose_for(m, owned.row(m), reads);
    return reads;
}

}  // namespace pydedup::packing
