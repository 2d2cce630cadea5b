// SPDX-License-Identifier: Apache-2.0
#include "packing/pair_solver.hpp"

#include <algorithm>
#include <bit>
#include <iterator>

namespace pydedup::packing {

PairSolver::PairSolver(const Mixed& mixed, unsigned most_groups)
    : mixed_(mixed),
      most_groups_(most_groups),
      mask_(mixed.problem.models(), 0),
      stays_away_(std::size_t{1} << most_groups),
      amount_(std::size_t{1} << most_groups) {}

bool PairSolver::improve(PageBlocks& first, PageBlocks& second) {
    if (!merge(first, second)) return false;
    group();
    weigh();
    Choice best{now_reads_, now_incidences_};
    search(best);
    if (!best.found) return false;
    apply(best, first, second);
    return true;
}

// Gathers the blocks class by class. False when no model reads both pages: nothing can be gained.
bool PairSolver::merge(const PageBlocks& first, const PageBlocks& second) {
    touched_.clear();
    now_reads_ = now_both_ = 0;
    now_incidences_ = 0;
    count_reads(first, 1);
    count_reads(second, 2);
    for (const Index m : touched_) mask_[m] = 0;
    if (now_both_ == 0) return false;

    blocks_.clear();
    std::ranges::merge(first, second, std::back_inserter(blocks_),
                       [&](Index a, Index b) { return mixed_.before(a, b); });
    classes_.clear();
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
        if (i == 0 || mixed_.class_of[blocks_[i]] != mixed_.class_of[blocks_[i - 1]]) {
            classes_.push_back({i, i, 0});
        }
        ++classes_.back().end;
        classes_.back().amount += mixed_.problem.amount(blocks_[i]);
    }
    return true;
}

void PairSolver::count_reads(const PageBlocks& page, std::uint32_t side) {
    Index last = kNone;
    work_ += 2 * page.size();
    for (const Index b : page) {
        if (std::exchange(last, mixed_.class_of[b]) == mixed_.class_of[b]) continue;
        ++now_incidences_;
        const auto owners = mixed_.owners.row(last);
        work_ += owners.size();
        for (const Index m : owners) {
            if ((mask_[m] & side) != 0) continue;
            if (mask_[m] == 0) touched_.push_back(m);
            if (mask_[m] != 0) now_both_ += mixed_.problem.weights[m];
            mask_[m] |= side;
            now_reads_ += mixed_.problem.weights[m];
        }
    }
}

// More classes than can be enumerated: keep the boundaries between the most different ones.
void PairSolver::group() {
    groups_ = classes_;
    if (classes_.size() <= most_groups_) return;
    boundaries_.clear();
    for (std::size_t i = 1; i < classes_.size(); ++i) {
        boundaries_.emplace_back(-difference(i - 1, i), i);
    }
    const auto kept = boundaries_.begin() + (most_groups_ - 1);
    std::nth_element(boundaries_.begin(), kept, boundaries_.end());
    std::sort(boundaries_.begin(), kept,
              [](const auto& a, const auto& b) { return a.second < b.second; });
    groups_.clear();
    std::size_t at = 0;
    for (std::size_t g = 0; g < most_groups_; ++g) {
        const std::size_t end = g + 1 < most_groups_ ? boundaries_[g].second : classes_.size();
        Run run{classes_[at].begin, classes_[end - 1].end, 0};
        for (; at < end; ++at) run.amount += classes_[at].amount;
        groups_.push_back(run);
    }
}

std::span<const Index> PairSolver::owners_of(std::size_t c) const {
    return mixed_.owners.row(mixed_.class_of[blocks_[classes_[c].begin]]);
}

// Weight of the models that own exactly one of two classes.
std::int64_t PairSolver::difference(std::size_t a, std::size_t b) const {
    const auto left = owners_of(a);
    const auto right = owners_of(b);
    std::int64_t sum = 0;
    auto i = left.begin();
    auto j = right.begin();
    while (i != left.end() || j != right.end()) {
        if (j == right.end() || (i != left.end() && *i < *j)) {
            sum += mixed_.problem.weights[*i++];
        } else if (i == left.end() || *j < *i) {
            sum += mixed_.problem.weights[*j++];
        } else {
            ++i;
            ++j;
        }
    }
    return sum;
}

// stays_away_[S]: weight of the models all of whose groups are in S, so that a page without S is
// none of theirs.
void PairSolver::weigh() {
    const std::size_t subsets = std::size_t{1} << groups_.size();
    work_ += subsets * groups_.size() / 2;
    std::fill_n(stays_away_.begin(), subsets, std::int64_t{0});
    touched_.clear();
    std::size_t g = 0;
    for (std::size_t c = 0; c < classes_.size(); ++c) {
        if (classes_[c].begin >= groups_[g].end) ++g;
        for (const Index m : owners_of(c)) {
            if (mask_[m] == 0) touched_.push_back(m);
            mask_[m] |= std::uint32_t{1} << g;
        }
    }
    total_ = 0;
    for (const Index m : touched_) {
        stays_away_[mask_[m]] += mixed_.problem.weights[m];
        total_ += mixed_.problem.weights[m];
        mask_[m] = 0;
    }
    for (std::size_t bit = 1; bit < subsets; bit *= 2) {
        for (std::size_t s = 0; s < subsets; ++s) {
            if ((s & bit) != 0) stays_away_[s] += stays_away_[s ^ bit];
        }
    }
    amount_[0] = 0;
    for (std::size_t s = 1; s < subsets; ++s) {
        amount_[s] =
            amount_[s & (s - 1)] + groups_[static_cast<std::size_t>(std::countr_zero(s))].amount;
    }
}

void PairSolver::search(Choice& best) {
    const std::uint64_t capacity = mixed_.problem.capacity;
    const std::size_t all = (std::size_t{1} << groups_.size()) - 1;
    const auto better = [&](std::int64_t reads, std::size_t incidences) {
        return reads != best.reads ? reads < best.reads : incidences < best.incidences;
    };
    for (std::size_t on_first = 0; on_first <= all; ++on_first) {
        const std::size_t on_second = all ^ on_first;
        if (amount_[on_first] > capacity) continue;
        const std::int64_t second_reads = total_ - stays_away_[on_first];
        if (amount_[on_second] <= capacity) {
            const std::int64_t reads = second_reads + total_ - stays_away_[on_second];
            if (better(reads, classes_.size())) best = {reads, classes_.size(), true, on_first};
            continue;
        }
        for (std::size_t rest = on_second; rest != 0; rest &= rest - 1) {
            const std::size_t bit = rest & (~rest + 1);
            const std::int64_t reads = second_reads + total_ - stays_away_[on_second ^ bit];
            if (!better(reads, classes_.size() + 1)) continue;
            const auto g = static_cast<std::size_t>(std::countr_zero(bit));
            const std::size_t at = split_point(groups_[g], amount_[on_second] - capacity,
                                               capacity - amount_[on_first]);
            if (at != 0) best = {reads, classes_.size() + 1, true, on_first, g, at};
        }
    }
}

// Where to cut a group so that its front amounts to `least` to `most` and its back is not empty; 0
// when that cannot be.
std::size_t PairSolver::split_point(const Run& group, std::uint64_t least, std::uint64_t most) {
    if (least > most || least >= group.amount) return 0;
    if (mixed_.problem.unit()) return group.begin + static_cast<std::size_t>(least);
    work_ += group.end - group.begin;
    std::uint64_t front = 0;
    for (std::size_t i = group.begin; i + 1 < group.end; ++i) {
        front += mixed_.problem.amount(blocks_[i]);
        if (front > most) return 0;
        if (front >= least) return i + 1;
    }
    return 0;
}

void PairSolver::apply(const Choice& choice, PageBlocks& first, PageBlocks& second) const {
    first.clear();
    second.clear();
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        std::size_t cut = (choice.on_first >> g & 1) != 0 ? groups_[g].end : groups_[g].begin;
        if (g == choice.split) cut = choice.split_at;
        const auto at = [&](std::size_t i) {
            return blocks_.begin() + static_cast<std::ptrdiff_t>(i);
        };
        first.insert(first.end(), at(groups_[g].begin), at(cut));
        second.insert(second.end(), at(cut), at(groups_[g].end));
    }
}

}  // namespace pydedup::packing
