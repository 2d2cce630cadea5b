// SPDX-License-Identifier: Apache-2.0
// Three steps. Whole pages of one equivalence class cost the least that they can: no model reads a
// block there that it does not own. What is left of each class is less than a page; these tails are
// put on a line so that neighbours have similar owners, and the line is cut into pages. Then pairs
// of those mixed pages are repacked. The line is made in several ways while that is cheap.
#include "packing/layout.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "packing/classes.hpp"
#include "packing/fill.hpp"
#include "packing/line.hpp"
#include "packing/refine.hpp"

namespace pydedup::packing {
namespace {

// Up to so many tails several lines are tried.
constexpr std::size_t kFewTails = 2048;
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
        pages.items.clear();
        pages.indptr.assign(1, 0);
        fill_in_order(problem, classes.members.row(c), pages);
        for (std::size_t p = 0; p < pages.size(); ++p) {
            std::uint64_t amount = 0;
            for (const Index b : pages.row(p)) amount += problem.amount(b);
            if (p + 1 < pages.size() || amount == problem.capacity) {
                out.whole.append(pages.row(p));
            } else {
                out.tails.append(pages.row(p));
                out.tail_class.push_back(c);
            }
        }
    }
    return out;
}

std::vector<PageBlocks> mix_tails(const Mixed& mixed, const Split& split) {
    const Problem& problem = mixed.problem;
    const Rows owners = permuted(mixed.owners, split.tail_class);
    const std::vector<std::uint64_t> amount = amounts(problem, split.tails);
    const Pieces pieces{owners, amount, problem.weights, problem.capacity};
    std::vector<PageBlocks> best;
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
        if (!best.empty() && std::pair(pages.size(), reads) >= std::pair(best.size(), best_reads)) {
            return;
        }
        best = std::move(pages);
        best_reads = reads;
    };
    std::vector<Index> line(amount.size());  // tails are in class order: a Gray line
    std::iota(line.begin(), line.end(), Index{0});
    attempt(gather_line(pieces, line, kMostVisits));
    if (line.size() <= kFewTails) {
        attempt(line);
        attempt(gather_line(pieces, heavy_line(pieces, line), kMostVisits));
        if (owners.items.size() * line.size() <= kMostVisits) attempt(similar_line(pieces));
    }
    refine_further(mixed, best);
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

}  // namespace

Rows pack_layout(const Problem& problem) {
    const Classes classes = classes_on_line(problem);
    std::vector<Index> class_of(problem.blocks(), kNone);
    for (Index c = 0; c < classes.size(); ++c) {
        for (const Index b : classes.members.row(c)) class_of[b] = c;
    }
    const Mixed mixing{problem, classes.owners, class_of};
    Split split = split_classes(problem, classes);
    std::vector<PageBlocks> mixed = mix_tails(mixing, split);

    // Where large blocks of one class leave room that only small ones of another can use, classes
    // must be mixed to save pages. One page over the bound is not worth the reads.
    const auto bound = static_cast<std::size_t>(problem.lower_bound) - problem.existing_pages;
    if (!problem.unit() && split.whole.size() + mixed.size() > bound + 1) {
        std::vector<PageBlocks> fitted = first_fit(mixing, classes);
        if (fitted.size() < split.whole.size() + mixed.size()) {
            split.whole = Rows{};
            mixed = std::move(fitted);
        }
    }

    // Along the line, so that the pages of one model have neighbouring numbers.
    std::ranges::stable_sort(mixed, [&](const PageBlocks& a, const PageBlocks& b) {
        return class_of[a.front()] < class_of[b.front()];
    });
    Rows pages;
    pages.items.reserve(problem.new_blocks);
    std::size_t next = 0;
    for (std::size_t p = 0; p < split.whole.size(); ++p) {
        const Index c = class_of[split.whole.row(p).front()];
        while (next < mixed.size() && class_of[mixed[next].front()] < c)
            pages.append(mixed[next++]);
        pages.append(split.whole.row(p));
    }
    while (next < mixed.size()) pages.append(mixed[next++]);
    return pages;
}

}  // namespace pydedup::packing
