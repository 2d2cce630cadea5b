// SPDX-License-Identifier: Apache-2.0
#include "packing/refine.hpp"

#include <algorithm>
#include <utility>

#include "packing/fill.hpp"
#include "packing/pair_solver.hpp"

namespace pydedup::packing {
namespace {

// Every pair is tried up to so many pages, neighbours on the line beyond. The more pairs, the fewer
// choices per pair: each step is 2^groups. Measured on twelve random and family-shaped problems of
// 60 to 20,000 blocks: larger values with ten times the work gain 0 to 2.4 % of the reads, in nine
// of them under 0.3 %.
constexpr std::size_t kFewPages = 256;
constexpr std::size_t kReach = 8;
constexpr std::uint64_t kPairWork = 200'000'000;
constexpr std::uint64_t kShuffleWork = 25'000'000;
// Rounds and work for refine_further(). On 28 problems of 200 to 8,600 blocks twice the rounds gain
// nothing, and work without regard to the gap 0.05 % of the reads for three times the time.
constexpr std::size_t kRoundsPerPage = 32;
constexpr double kFullGap = 0.1;  // reads over the least there could be, relative: all of the work

unsigned groups_for(std::size_t pages) noexcept {
    return pages <= 64 ? 12 : pages <= kFewPages ? 9 : 8;
}

/// Random numbers that are the same everywhere (splitmix64, Steele et al., OOPSLA 2014).
class Random {
  public:
    explicit Random(std::uint64_t seed) noexcept : state_(seed) {}
    std::uint64_t next() noexcept {
        state_ += 0x9e3779b97f4a7c15;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    std::size_t below(std::size_t end) noexcept { return static_cast<std::size_t>(next() % end); }

  private:
    std::uint64_t state_;
};

class Refiner {
  public:
    Refiner(const Mixed& mixed, std::vector<PageBlocks>& pages)
        : mixed_(mixed),
          pages_(pages),
          reach_(pages.size() <= kFewPages ? pages.size() - 1 : kReach),
          solver_(mixed, groups_for(pages.size())),
          changed_(pages.size(), 1),
          checked_(pages.size() * reach_, 0) {}

    // Near pairs first: they are alike, and the work may run out. A pair is looked at again only
    // after one of its pages changed.
    void descend(std::uint64_t most_work) {
        for (bool improved = true; improved;) {
            improved = false;
            for (std::size_t distance = 1; distance <= reach_; ++distance) {
                for (std::size_t i = 0; i + distance < pages_.size(); ++i) {
                    const std::size_t j = i + distance;
                    std::uint64_t& checked = checked_[i * reach_ + distance - 1];
                    if (std::max(changed_[i], changed_[j]) <= checked) continue;
                    if (solver_.work() > most_work) return;
                    checked = now_;
                    if (!solver_.improve(pages_[i], pages_[j])) continue;
                    changed_[i] = changed_[j] = ++now_;
                    improved = true;
                }
            }
        }
    }

    void wander(std::int64_t least, std::int64_t other_reads) {
        std::vector<PageBlocks> best = pages_;
        std::int64_t best_reads = weighted_reads(mixed_, pages_);
        std::size_t blocks = 0;
        for (const PageBlocks& page : pages_) blocks += page.size();
        std::uint64_t rounds_work = 0;
        Random random(pages_.size());
        const std::uint64_t start = solver_.work();
        std::ranges::fill(checked_, now_);  // descend() was here before
        const std::size_t rounds = kRoundsPerPage * pages_.size();
        for (std::size_t round = 0; round < rounds && best_reads > least; ++round) {
            rounds_work += 4 * blocks;
            // The less there is to gain, the less is spent on it.
            const double gap =
                static_cast<double>(best_reads - least) / static_cast<double>(least + other_reads);
            const double most = static_cast<double>(kShuffleWork) * std::min(1.0, gap / kFullGap);
            if (static_cast<double>(solver_.work() - start + rounds_work) > most) break;
            if (!shuffle(random)) continue;
            descend(start + kShuffleWork);
            const std::int64_t reads = weighted_reads(mixed_, pages_);
            for (std::size_t p = 0; p < pages_.size(); ++p) {
                if (pages_[p] == best[p]) continue;
                if (reads <= best_reads) {
                    best[p] = pages_[p];
                } else {
                    pages_[p] = best[p];
                    changed_[p] = ++now_;
                }
            }
            best_reads = std::min(best_reads, reads);
        }
    }

  private:
    // Packs two to four pages anew, their classes in random order. False when they do not fit.
    bool shuffle(Random& random) {
        const std::size_t count = std::min(pages_.size(), 2 + random.below(3));
        std::vector<std::size_t> chosen;
        while (chosen.size() < count) {
            const std::size_t p = random.below(pages_.size());
            if (std::ranges::find(chosen, p) == chosen.end()) chosen.push_back(p);
        }
        const std::uint64_t salt = random.next();
        std::vector<std::pair<std::uint64_t, Index>> keyed;
        for (const std::size_t p : chosen) {
            for (const Index b : pages_[p]) {
                keyed.emplace_back(Random(salt ^ mixed_.class_of[b]).next(), b);
            }
        }
        std::ranges::sort(keyed);
        std::vector<Index> blocks(keyed.size());
        std::ranges::transform(keyed, blocks.begin(), [](const auto& k) { return k.second; });
        std::vector<PageBlocks> cut = cut_pages(mixed_, blocks);
        if (cut.size() != count) return false;
        for (std::size_t i = 0; i < count; ++i) {
            pages_[chosen[i]] = std::move(cut[i]);
            changed_[chosen[i]] = ++now_;
        }
        return true;
    }

    const Mixed& mixed_;
    std::vector<PageBlocks>& pages_;
    std::size_t reach_;
    PairSolver solver_;
    std::vector<std::uint64_t> changed_;  // per page: when it last changed
    std::vector<std::uint64_t> checked_;  // per pair: when it was last looked at
    std::uint64_t now_ = 1;
};

// Blocks of unequal size may leave room for one page on another.
void drop_empty(std::vector<PageBlocks>& pages) {
    std::erase_if(pages, [](const PageBlocks& page) { return page.empty(); });
}

}  // namespace

std::vector<PageBlocks> cut_pages(const Mixed& mixed, std::span<const Index> blocks) {
    Rows rows;
    fill_in_order(mixed.problem, blocks, rows);
    std::vector<PageBlocks> pages(rows.size());
    for (std::size_t p = 0; p < rows.size(); ++p) {
        pages[p].assign(rows.row(p).begin(), rows.row(p).end());
        std::ranges::sort(pages[p], [&](Index a, Index b) { return mixed.before(a, b); });
    }
    return pages;
}

std::int64_t weighted_reads(const Mixed& mixed, std::span<const PageBlocks> pages) {
    std::vector<std::size_t> seen(mixed.problem.models(), 0);
    std::int64_t sum = 0;
    for (std::size_t p = 0; p < pages.size(); ++p) {
        Index last = kNone;
        for (const Index b : pages[p]) {
            if (std::exchange(last, mixed.class_of[b]) == mixed.class_of[b]) continue;
            for (const Index m : mixed.owners.row(last)) {
                if (std::exchange(seen[m], p + 1) != p + 1) sum += mixed.problem.weights[m];
            }
        }
    }
    return sum;
}

void refine_pairs(const Mixed& mixed, std::vector<PageBlocks>& pages) {
    if (pages.size() < 2) return;
    Refiner(mixed, pages).descend(kPairWork);
    drop_empty(pages);
}

void refine_further(const Mixed& mixed, std::vector<PageBlocks>& pages, std::int64_t least_reads,
                    std::int64_t other_reads) {
    if (pages.size() < 2 || pages.size() > kFewPages) return;
    Refiner(mixed, pages).wander(least_reads, other_reads);
    drop_empty(pages);
}

}  // namespace pydedup::packing
