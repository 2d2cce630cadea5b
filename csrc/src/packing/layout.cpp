// SPDX-License-Identifier: Apache-2.0
// Whole pages of one equivalence class cost little: no model reads a block there that it does not
// own. What is left of each class is less than a page; these tails are put on a line so that
// neighbours have similar owners, and the line is cut into pages. Then pairs of those mixed pages
// are repacked, and where nothing is gained that way, a few of them are shuffled. The line is made
// in several ways while that is cheap. All of it ends where the bound on reads is reached.
//
// This is a heuristic: blocks of one class may have to share pages with others although they fill
// one (nine blocks, three of them A's own, two each of A and B, A and C, A and D, three on a page).
// Few blocks are therefore searched exhaustively at last.
#include "packing/layout.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "packing/bound.hpp"
#include "packing/classes.hpp"
#include "packing/exact_search.hpp"
#include "packing/fill.hpp"
#include "packing/line.hpp"
#include "packing/refine.hpp"

namespace pydedup::packing {
namespace {

// Up to so many tails several lines are tried.
constexpr std::size_t kFewTails = 2048;
// Up to so many models a layout is compared with the bound on its reads: some ms.
constexpr std::size_t kFewModels = 64;
// Up to so many (model, block) pairs weighted problems are packed without weights too.
constexpr std::size_t kFewPairs = 4'000'000;
// (piece, owner) visits allowed to a line, about 2 s.
constexpr std::uint64_t kMostVisits = 50'000'000;

std::vector<std::uint64_t> amounts(const Problem& problem, const Rows& rows) {
    std::vector<std::uint64_t> out(rows.size(), 0);
    for (std::size_t r = 0; r < rows.size(); ++r) {
        for (const Index b : rows.row(r)) out[r] += problem.amount(b);
    }
    return out;
}

Rows permuted(const Rows& rows, std::span<const Index> order) {
    Rows out;
    out.items.reserve(rows.items.size());
    out.indptr.reserve(rows.indptr.size());
    for (const Index r : order) out.append(rows.row(r));
    return out;
}

/// The classes, numbered along a line: neighbours have similar owners.
Classes classes_on_line(const Problem& problem) {
    Classes found = find_classes(problem.owned, problem.blocks());
    const std::vector<std::uint64_t> total = amounts(problem, found.members);
    const std::vector<Index> line =
        gray_line({found.owners, total, problem.weights, problem.capacity});
    return {permuted(found.members, line), permuted(found.owners, line)};
}

struct Split {
    Rows whole;  // pages of one class each, in class order
    Rows tails;  // per class with a tail, the blocks that fill no page
    std::vector<Index> tail_class;
};

Split split_classes(const Problem& problem, const Classes& classes) {
    Split out;
    Rows pages;
    for (Index c = 0; c < classes.size(); ++c) {
        const std::size_t n_full = fill_anew(problem, classes.members.row(c), pages);
        for (std::size_t p = 0; p < pages.size(); ++p) {
            if (p < n_full) {
                out.whole.append(pages.row(p));
            } else {
                out.tails.append(pages.row(p));
                out.tail_class.push_back(c);
            }
        }
    }
    return out;
}

struct Mix {
    std::vector<PageBlocks> pages;
    std::int64_t least_reads = 0;  // weighted; no layout of the blocks on `pages` has less
};

Mix mix_tails(const Mixed& mixed, const Split& split) {
    const Problem& problem = mixed.problem;
    const Rows owners = permuted(mixed.owners, split.tail_class);
    const std::vector<std::uint64_t> amount = amounts(problem, split.tails);
    const Pieces pieces{owners, amount, problem.weights, problem.capacity};
    const bool few = amount.size() <= kFewTails;
    // What ends the search for better: pages and reads that cannot be less. Only while it is
    // cheaper to know than to go on.
    const std::uint64_t total = std::accumulate(amount.begin(), amount.end(), std::uint64_t{0});
    const std::uint64_t least_pages =
        total / problem.capacity + (total % problem.capacity != 0 ? 1 : 0);
    Mix best{{}, few ? least_weighted_reads(problem, owners, amount) : 0};
    std::int64_t best_reads = 0;
    const auto attempt = [&](std::span<const Index> line) {
        std::vector<Index> blocks;
        blocks.reserve(split.tails.items.size());
        for (const Index t : line) {
            const auto tail = split.tails.row(t);
            blocks.insert(blocks.end(), tail.begin(), tail.end());
        }
        std::vector<PageBlocks> pages = cut_pages(mixed, blocks);
        refine_pairs(mixed, pages);
        const std::int64_t reads = weighted_reads(mixed, pages);
        if (best.pages.empty() ||
            std::pair(pages.size(), reads) < std::pair(best.pages.size(), best_reads)) {
            best.pages = std::move(pages);
            best_reads = reads;
        }
        return best.pages.size() <= least_pages && best_reads <= best.least_reads;
    };
    std::vector<Index> line(amount.size());  // tails are in class order: a Gray line
    std::iota(line.begin(), line.end(), Index{0});
    if (attempt(gather_line(pieces, line, kMostVisits)) || !few) return best;
    if (attempt(line)) return best;
    if (attempt(gather_line(pieces, heavy_line(pieces, line), kMostVisits))) return best;
    if (owners.items.size() * line.size() <= kMostVisits) attempt(similar_line(pieces));
    return best;
}

std::vector<PageBlocks> first_fit(const Mixed& mixed, const Classes& classes) {
    Rows rows;
    fill_first_fit(mixed.problem, classes.members.items, rows);
    std::vector<PageBlocks> pages(rows.size());
    for (std::size_t p = 0; p < rows.size(); ++p) {
        pages[p].assign(rows.row(p).begin(), rows.row(p).end());
        std::ranges::sort(pages[p], [&](Index a, Index b) { return mixed.before(a, b); });
    }
    refine_pairs(mixed, pages);
    return pages;
}

std::int64_t weighted_reads_of_whole(const Mixed& mixed, const Rows& whole) {
    std::int64_t reads = 0;
    for (std::size_t p = 0; p < whole.size(); ++p) {
        for (const Index m : mixed.owners.row(mixed.class_of[whole.row(p).front()])) {
            reads += mixed.problem.weights[m];
        }
    }
    return reads;
}

/// All pages along the line, so that the pages of one model have neighbouring numbers.
Rows in_line_order(const Mixed& mixed, const Rows& whole, std::vector<PageBlocks> others) {
    const auto class_on = [&](std::span<const Index> page) { return mixed.class_of[page.front()]; };
    std::ranges::stable_sort(others, [&](const PageBlocks& a, const PageBlocks& b) {
        return class_on(a) < class_on(b);
    });
    Rows pages;
    pages.items.reserve(mixed.problem.new_blocks);
    std::size_t next = 0;
    for (std::size_t p = 0; p < whole.size(); ++p) {
        const Index c = class_on(whole.row(p));
        while (next < others.size() && class_on(others[next]) < c) pages.append(others[next++]);
        pages.append(whole.row(p));
    }
    while (next < others.size()) pages.append(others[next++]);
    return pages;
}

std::int64_t weighted_reads_of(const Problem& problem, const Rows& pages) {
    std::vector<Index> page_of(problem.blocks(), kNone);
    for (std::size_t p = 0; p < pages.size(); ++p) {
        for (const Index b : pages.row(p)) page_of[b] = static_cast<Index>(p);
    }
    std::vector<Index> read_by(pages.size(), kNone);
    std::int64_t reads = 0;
    for (Index m = 0; m < problem.models(); ++m) {
        for (const Index b : problem.owned.row(m)) {
            if (std::exchange(read_by[page_of[b]], m) != m) reads += problem.weights[m];
        }
    }
    return reads;
}

PackedLayout lay_out(const Problem& problem) {
    const Classes classes = classes_on_line(problem);
    std::vector<Index> class_of(problem.blocks(), kNone);
    for (Index c = 0; c < classes.size(); ++c) {
        for (const Index b : classes.members.row(c)) class_of[b] = c;
    }
    const Mixed mixed{problem, classes.owners, class_of};
    Split split = split_classes(problem, classes);
    Mix mix = mix_tails(mixed, split);

    // Where large blocks of one class leave room that only small ones of another can use, classes
    // must be mixed to save pages. One page over the bound is not worth the reads.
    const auto least_pages = static_cast<std::size_t>(problem.lower_bound) - problem.existing_pages;
    const std::size_t count = split.whole.size() + mix.pages.size();
    const bool few = problem.new_blocks <= kFewBlocks;
    std::int64_t least_reads = 0;
    if (few || problem.models() <= kFewModels) {
        least_reads =
            least_weighted_reads(problem, classes.owners, amounts(problem, classes.members));
    }
    if (!problem.unit() && count > least_pages + 1) {
        std::vector<PageBlocks> fitted = first_fit(mixed, classes);
        if (fitted.size() < count) {
            split.whole = Rows{};
            mix = {std::move(fitted), least_reads};
        }
    }
    PackedLayout out;
    if (few) {
        std::vector<PageBlocks> all;
        all.reserve(split.whole.size() + mix.pages.size());
        for (std::size_t p = 0; p < split.whole.size(); ++p) {
            all.emplace_back(split.whole.row(p).begin(), split.whole.row(p).end());
        }
        std::ranges::move(mix.pages, std::back_inserter(all));
        mix.pages = std::move(all);
        split.whole = Rows{};
        out.optimal = search_exactly(mixed, mix.pages, least_pages, least_reads);
        mix.least_reads = least_reads;
    }
    if (!out.optimal) {
        const std::int64_t whole_reads = weighted_reads_of_whole(mixed, split.whole);
        refine_further(mixed, mix.pages, mix.least_reads, whole_reads);
        out.optimal = split.whole.size() + mix.pages.size() <= least_pages &&
                      whole_reads + weighted_reads(mixed, mix.pages) <= least_reads;
    }
    out.pages = in_line_order(mixed, split.whole, std::move(mix.pages));
    return out;
}

}  // namespace

PackedLayout pack_layout(const Problem& problem) {
    PackedLayout found = lay_out(problem);
    const bool weighted =
        std::ranges::adjacent_find(problem.weights, std::not_equal_to{}) != problem.weights.end();
    if (found.optimal || !weighted || problem.owned.items.size() > kFewPairs) return found;
    // Weights steer a heuristic: without them it may happen to find what is better even by them.
    Problem plain = problem;
    plain.weights.assign(problem.models(), 1);
    PackedLayout other = lay_out(plain);
    other.optimal = false;
    const auto cost = [&](const PackedLayout& layout) {
        return std::pair(layout.pages.size(), weighted_reads_of(problem, layout.pages));
    };
    return cost(other) < cost(found) ? std::move(other) : std::move(found);
}

}  // namespace pydedup::packing
