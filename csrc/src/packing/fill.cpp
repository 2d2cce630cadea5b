// SPDX-License-Identifier: Apache-2.0
#include "packing/fill.hpp"

#include <algorithm>
#include <bit>

namespace pydedup::packing {
namespace {

// Blocks to look at when the next one does not fit. With sizes spread evenly between half and all
// of the largest, 64 leave under 0.2 % of a page empty (tests/native/test_packing.cpp).
constexpr std::size_t kLookAhead = 64;

}  // namespace

void fill_in_order(const Problem& problem, std::span<const Index> sequence, Rows& pages) {
    if (problem.unit()) {
        for (std::size_t at = 0; at < sequence.size(); at += problem.capacity) {
            const std::size_t count = std::min<std::size_t>(problem.capacity, sequence.size() - at);
            pages.append(sequence.subspan(at, count));
        }
        return;
    }
    std::vector<bool> taken(sequence.size(), false);
    std::size_t next = 0;  // all before it are on pages
    const auto skip_taken = [&] {
        while (next < sequence.size() && taken[next]) ++next;
    };
    while (next < sequence.size()) {
        std::uint64_t room = problem.capacity;
        while (next < sequence.size()) {
            std::size_t pick = next;
            if (problem.amount(sequence[next]) > room) {
                const std::size_t end = std::min(sequence.size(), next + kLookAhead);
                std::uint64_t best = 0;
                for (std::size_t i = next + 1; i < end; ++i) {
                    const std::uint64_t size = problem.amount(sequence[i]);
                    if (taken[i] || size > room || size <= best) continue;
                    best = size;
                    pick = i;
                }
                if (best == 0) break;
            }
            taken[pick] = true;
            room -= problem.amount(sequence[pick]);
            pages.items.push_back(sequence[pick]);
            skip_taken();
        }
        pages.close_row();
    }
}

std::size_t fill_anew(const Problem& problem, std::span<const Index> sequence, Rows& pages) {
    pages.items.clear();
    pages.indptr.assign(1, 0);
    fill_in_order(problem, sequence, pages);
    if (pages.size() == 0) return 0;
    std::uint64_t amount = 0;
    for (const Index b : pages.row(pages.size() - 1)) amount += problem.amount(b);
    return amount == problem.capacity ? pages.size() : pages.size() - 1;
}

void fill_first_fit(const Problem& problem, std::span<const Index> sequence, Rows& pages) {
    if (sequence.empty()) return;
    // A tree of the largest room below each node finds the first page with enough of it.
    const std::size_t leaves = std::bit_ceil(sequence.size());
    std::vector<std::uint64_t> room(2 * leaves, problem.capacity);
    std::vector<Index> page_of(sequence.size());
    std::size_t used = 0;
    for (std::size_t i = 0; i < sequence.size(); ++i) {
        const std::uint64_t size = problem.amount(sequence[i]);
        std::size_t node = 1;
        while (node < leaves) node = 2 * node + (room[2 * node] >= size ? 0 : 1);
        page_of[i] = static_cast<Index>(node - leaves);
        used = std::max(used, node - leaves + 1);
        room[node] -= size;
        while (node > 1) {
            node /= 2;
            room[node] = std::max(room[2 * node], room[2 * node + 1]);
        }
    }
    std::vector<std::uint64_t> at(used + 1, 0);
    for (const Index page : page_of) ++at[page + std::size_t{1}];
    for (std::size_t p = 0; p < used; ++p) at[p + 1] += at[p];
    const std::uint64_t base = pages.items.size();
    for (std::size_t p = 0; p < used; ++p) pages.indptr.push_back(base + at[p + 1]);
    pages.items.resize(base + sequence.size());
    for (std::size_t i = 0; i < sequence.size(); ++i) {
        pages.items[base + at[page_of[i]]++] = sequence[i];
    }
}

}  // namespace pydedup::packing
