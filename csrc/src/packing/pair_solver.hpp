// SPDX-License-Identifier: Apache-2.0
// Repacks two pages as well as two pages can be packed. Private to src/packing.
//
// Two pages hold n classes. If two of them lie on both pages, blocks can be exchanged until one of
// the two lies on one page only, and no model reads more: so a best packing of the pair has at most
// one class on both. That leaves 2^n choices of what goes to the first page, times which class is
// split; all are weighed at once, by summing over subsets how much weight stays away from a page.
// With more classes than can be enumerated, neighbouring ones are moved together.
#pragma once

#include <utility>

#include "packing/refine.hpp"

namespace pydedup::packing {

class PairSolver {
  public:
    /// Enumerates 2^most_groups choices at most.
    PairSolver(const Mixed& mixed, unsigned most_groups);

    /// Repacks both pages; false when that gains nothing. A gain is less weight of reads, or as
    /// much with fewer classes on both pages.
    bool improve(PageBlocks& first, PageBlocks& second);

    /// Steps done so far: a clock that runs alike on every machine, at about 3 ns.
    [[nodiscard]] std::uint64_t work() const noexcept { return work_; }

  private:
    struct Run {  // of one class, then of neighbouring classes, in blocks_
        std::size_t begin, end;
        std::uint64_t amount;
    };
    struct Choice {
        std::int64_t reads;
        std::size_t incidences;  // (page, class) pairs
        bool found = false;
        std::size_t on_first = 0;  // set of groups
        std::size_t split = kNone;
        std::size_t split_at =
            0;  // blocks_[begin, split_at) of the split group go to the first page
    };

    bool merge(const PageBlocks& first, const PageBlocks& second);
    void count_reads(const PageBlocks& page, std::uint32_t side);
    void group();
    void weigh();
    void search(Choice& best);
    void apply(const Choice& choice, PageBlocks& first, PageBlocks& second) const;
    [[nodiscard]] std::span<const Index> owners_of(std::size_t c) const;
    [[nodiscard]] std::int64_t difference(std::size_t a, std::size_t b) const;
    [[nodiscard]] std::size_t split_point(const Run& group, std::uint64_t least,
                                          std::uint64_t most);

    const Mixed& mixed_;
    unsigned most_groups_;
    std::vector<std::uint32_t> mask_;       // per model; zero between uses
    std::vector<std::int64_t> stays_away_;  // per set of groups, see weigh()
    std::vector<std::uint64_t> amount_;     // per set of groups
    std::vector<Index> blocks_, touched_;
    std::vector<Run> classes_, groups_;
    std::vector<std::pair<std::int64_t, std::size_t>> boundaries_;
    std::int64_t total_ = 0;      // weight of the models that read either page
    std::int64_t now_reads_ = 0;  // as the pages are
    std::int64_t now_both_ = 0;   // weight of the models that read both
    std::size_t now_incidences_ = 0;
    std::uint64_t work_ = 0;
};

}  // namespace pydedup::packing
