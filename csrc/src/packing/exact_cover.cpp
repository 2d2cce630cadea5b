// SPDX-License-Identifier: Apache-2.0
#include "packing/exact_cover.hpp"

#include <algorithm>
#include <numeric>

#include "base/rounding.hpp"
#include "packing/classes.hpp"
#include "packing/fill.hpp"

namespace pydedup::packing {
namespace {

/// Number of models per block.
std::vector<Index> count_sharers(const Rows& owned, std::size_t blocks) {
    std::vector<Index> sharers(blocks, 0);
    for (const Index b : owned.items) ++sharers[b];
    return sharers;
}

/// Covers models one after the other: first with pages that lie wholly inside the model, then with
/// new pages for the rest. Knows per block the pages that hold it.
class Coverer {
  public:
    Coverer(const Problem& problem, Rows& pages)
        : problem_(problem), pages_(pages), newest_copy_(problem.blocks(), kNone) {}

    /// Covers `blocks` (ascending); `sharers` orders what goes onto new pages, most shared first,
    /// or leaves it in id order when empty. Appends the pages used to `used`.
    void cover(std::span<const Index> blocks, std::span<const Index> sharers,
               std::vector<Index>& used) {
        find_inner_pages(blocks);
        rest_.assign(blocks.begin(), blocks.end());
        reuse_full_pages(used);
        reuse_partial_pages(used);
        if (!sharers.empty()) {
            std::ranges::stable_sort(rest_,
                                     [&](Index a, Index b) { return sharers[a] > sharers[b]; });
        }
        const std::size_t before = pages_.size();
        fill_in_order(problem_, rest_, pages_);
        for (std::size_t p = before; p < pages_.size(); ++p) {
            used.push_back(static_cast<Index>(p));
            add_copies(static_cast<Index>(p), p + 1 < pages_.size());
        }
    }

  private:
    void add_copies(Index page, bool full) {
        std::uint64_t amount = 0;
        for (const Index b : pages_.row(page)) {
            older_copy_.push_back(newest_copy_[b]);
            newest_copy_[b] = static_cast<Index>(copy_page_.size());
            copy_page_.push_back(page);
            amount += problem_.amount(b);
        }
        full_.push_back(full || amount == problem_.capacity);
        amount_.push_back(amount);
        inside_.push_back(0);
    }

    void find_inner_pages(std::span<const Index> blocks) {
        hit_.clear();
        for (const Index b : blocks) {
            for (Index c = newest_copy_[b]; c != kNone; c = older_copy_[c]) {
                if (inside_[copy_page_[c]]++ == 0) hit_.push_back(copy_page_[c]);
            }
        }
        inner_.clear();
        for (const Index page : hit_) {
            if (inside_[page] == pages_.row(page).size()) inner_.push_back(page);
            inside_[page] = 0;
        }
        std::ranges::sort(inner_);
    }

    [[nodiscard]] bool uncovered(Index page) {
        return std::ranges::none_of(pages_.row(page), [&](Index b) { return covered_[b]; });
    }

    void take(Index page, std::vector<Index>& used) {
        for (const Index b : pages_.row(page)) covered_[b] = true;
        used.push_back(page);
    }

    void drop_covered() {
        std::erase_if(rest_, [&](Index b) {
            if (!covered_[b]) return false;
            covered_[b] = false;
            return true;
        });
    }

    void reuse_full_pages(std::vector<Index>& used) {
        covered_.resize(problem_.blocks(), false);
        for (const Index page : inner_) {
            if (full_[page] && uncovered(page)) take(page, used);
        }
        // Partial pages must not overlap what is covered: see before the marks are cleared.
        std::erase_if(inner_, [&](Index page) { return full_[page] || !uncovered(page); });
        drop_covered();
    }

    // A page that is not full is worth reading when that saves writing one.
    void reuse_partial_pages(std::vector<Index>& used) {
        if (inner_.empty()) return;
        std::ranges::stable_sort(inner_, [&](Index a, Index b) { return amount_[a] > amount_[b]; });
        std::uint64_t rest = 0;
        for (const Index b : rest_) rest += problem_.amount(b);
        const auto pages_for = [&](std::uint64_t amount) {
            return detail::ceil_div(amount, problem_.capacity);
        };
        for (const Index page : inner_) {
            if (pages_for(rest - std::min(rest, amount_[page])) < pages_for(rest) &&
                uncovered(page)) {
                take(page, used);
                rest -= amount_[page];
            }
        }
        drop_covered();
    }

    const Problem& problem_;
    Rows& pages_;
    std::vector<Index> newest_copy_;  // per block; copies form lists, newest first
    std::vector<Index> older_copy_;   // per copy
    std::vector<Index> copy_page_;    // per copy
    std::vector<bool> full_;          // per page
    std::vector<std::uint64_t> amount_;
    std::vector<Index> inside_;  // per page: its blocks that the model owns
    std::vector<bool> covered_;  // per block
    std::vector<Index> hit_, inner_, rest_;
};

Rows in_rows(std::vector<std::vector<Index>>& rows) {
    Rows out;
    for (auto& row : rows) {
        std::ranges::sort(row);
        out.append(row);
    }
    return out;
}

std::vector<Index> large_to_small(const Rows& owned) {
    std::vector<Index> order(owned.size());
    std::iota(order.begin(), order.end(), Index{0});
    std::ranges::stable_sort(
        order, [&](Index a, Index b) { return owned.row(a).size() > owned.row(b).size(); });
    return order;
}

void run_greedy2(const Problem& problem, const Rows& owned, Rows& pages,
                 std::vector<std::vector<Index>>& reads) {
    const std::vector<Index> sharers = count_sharers(owned, problem.blocks());
    // Pages numbered from 0 for the coverer, which may only reuse its own.
    Rows own;
    Coverer coverer(problem, own);
    const auto shift = static_cast<Index>(pages.size());
    std::vector<Index> used;
    for (const Index m : large_to_small(owned)) {
        used.clear();
        coverer.cover(owned.row(m), sharers, used);
        for (const Index page : used) reads[m].push_back(page + shift);
    }
    for (std::size_t p = 0; p < own.size(); ++p) pages.append(own.row(p));
}

}  // namespace

// As the authors implement it, what is left of a later model is ordered by its sharers too.
ExactPages pack_baseline(const Problem& problem) {
    ExactPages out;
    const std::vector<Index> sharers = count_sharers(problem.owned, problem.blocks());
    Coverer coverer(problem, out.pages);
    std::vector<std::vector<Index>> reads(problem.models());
    for (std::size_t m = 0; m < problem.models(); ++m) {
        const auto order = m == 0 ? std::span<const Index>{} : std::span<const Index>{sharers};
        coverer.cover(problem.owned.row(m), order, reads[m]);
    }
    out.reads = in_rows(reads);
    return out;
}

ExactPages pack_greedy1(const Problem& problem) {
    ExactPages out;
    const Classes classes = find_classes(problem.owned, problem.blocks());
    std::vector<std::vector<Index>> reads(problem.models());
    for (std::size_t c = 0; c < classes.size(); ++c) {
        const std::size_t before = out.pages.size();
        fill_in_order(problem, classes.members.row(c), out.pages);
        for (std::size_t p = before; p < out.pages.size(); ++p) {
            for (const Index m : classes.owners.row(c)) reads[m].push_back(static_cast<Index>(p));
        }
    }
    out.reads = in_rows(reads);
    return out;
}

ExactPages pack_greedy2(const Problem& problem) {
    ExactPages out;
    std::vector<std::vector<Index>> reads(problem.models());
    run_greedy2(problem, problem.owned, out.pages, reads);
    out.reads = in_rows(reads);
    return out;
}

ExactPages pack_two_stage(const Problem& problem) {
    ExactPages out;
    std::vector<std::vector<Index>> reads(problem.models());
    Rows left;
    {
        const Classes classes = find_classes(problem.owned, problem.blocks());
        std::vector<bool> placed(problem.blocks(), false);
        Rows pages;
        for (std::size_t c = 0; c < classes.size(); ++c) {
            const std::size_t n_full = fill_anew(problem, classes.members.row(c), pages);
            for (std::size_t p = 0; p < n_full; ++p) {
                for (const Index b : pages.row(p)) placed[b] = true;
                for (const Index m : classes.owners.row(c)) {
                    reads[m].push_back(static_cast<Index>(out.pages.size()));
                }
                out.pages.append(pages.row(p));
            }
        }
        for (std::size_t m = 0; m < problem.models(); ++m) {
            for (const Index b : problem.owned.row(m)) {
                if (!placed[b]) left.items.push_back(b);
            }
            left.close_row();
        }
    }
    run_greedy2(problem, left, out.pages, reads);
    out.reads = in_rows(reads);
    return out;
}

}  // namespace pydedup::packing
