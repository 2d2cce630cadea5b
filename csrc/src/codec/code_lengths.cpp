// SPDX-License-Identifier: Apache-2.0
// Lengths first by the in-place method of Moffat and Katajainen ("In-Place Calculation of
// Minimum-Redundancy Codes", WADS 1995), linear after a sort. Only when one exceeds the limit, by
// package-merge (Larmore and Hirschberg, "A Fast Algorithm for Optimal Length-Limited Huffman
// Codes", JACM 1990), which is optimal under the limit and costs limit * 512 steps.
#include "codec/code_lengths.hpp"

#include <algorithm>
#include <cstddef>

namespace pydedup::detail {
namespace {

constexpr std::size_t kSymbols = 256;
constexpr unsigned kMaxLimit = 15;

struct Leaves {
    std::array<std::uint64_t, kSymbols> weight;  // ascending
    std::array<std::uint8_t, kSymbols> symbol;
    std::size_t n;
};

Leaves sorted_leaves(std::span<const std::uint32_t> counts) noexcept {
    std::array<std::uint64_t, kSymbols> keys;
    std::size_t n = 0;
    for (std::size_t s = 0; s < counts.size(); ++s) {
        if (counts[s] != 0) keys[n++] = (static_cast<std::uint64_t>(counts[s]) << 8) | s;
    }
    std::sort(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(n));
    Leaves leaves;
    leaves.n = n;
    for (std::size_t i = 0; i < n; ++i) {
        leaves.weight[i] = keys[i] >> 8;
        leaves.symbol[i] = static_cast<std::uint8_t>(keys[i]);
    }
    return leaves;
}

// Depths of a Huffman tree over ascending weights, longest first. `a` holds in turn weights,
// parents of inner nodes, depths of inner nodes, depths of leaves.
void unlimited_depths(const Leaves& leaves, std::array<std::uint64_t, kSymbols>& a) noexcept {
    const std::size_t n = leaves.n;
    std::copy_n(leaves.weight.begin(), n, a.begin());
    // Left to right: join the two lightest of leaves and inner nodes.
    a[0] += a[1];
    std::size_t root = 0;
    std::size_t leaf = 2;
    for (std::size_t next = 1; next + 1 < n; ++next) {
        if (leaf >= n || a[root] < a[leaf]) {
            a[next] = a[root];
            a[root++] = next;
        } else {
            a[next] = a[leaf++];
        }
        if (leaf >= n || (root < next && a[root] < a[leaf])) {
            a[next] += a[root];
            a[root++] = next;
        } else {
            a[next] += a[leaf++];
        }
    }
    // Right to left: depths of inner nodes.
    a[n - 2] = 0;
    for (std::size_t next = n - 2; next-- > 0;) a[next] = a[a[next]] + 1;
    // Right to left: leaves fill what inner nodes leave free on each level.
    std::size_t available = 1;
    std::uint64_t depth = 0;
    std::size_t inner = n - 1;  // inner nodes not yet passed
    std::size_t next = n;       // leaves not yet given a depth
    while (available > 0) {
        std::size_t used = 0;
        while (inner > 0 && a[inner - 1] == depth) {
            ++used;
            --inner;
        }
        for (; available > used; --available) a[--next] = depth;
        available = 2 * used;
        ++depth;
    }
}

// Each level merges the leaves with pairs of the level below; the cheapest 2n - 2 items of the top
// level are the solution. A leaf's length is the number of levels on which it is among those.
void limited_depths(const Leaves& leaves, unsigned limit,
                    std::array<std::uint64_t, kSymbols>& depth) noexcept {
    const std::size_t n = leaves.n;
    std::array<std::array<bool, 2 * kSymbols>, kMaxLimit> is_leaf;  // [level][item], cheapest first
    std::array<std::uint64_t, 2 * kSymbols> below{};
    std::array<std::uint64_t, 2 * kSymbols> merged{};
    std::size_t n_below = 0;
    for (unsigned level = 0; level < limit; ++level) {
        const std::size_t n_pairs = n_below / 2;
        std::size_t leaf = 0;
        std::size_t pair = 0;
        for (std::size_t item = 0; item < n + n_pairs; ++item) {
            const std::uint64_t pair_weight =
                pair < n_pairs ? below[2 * pair] + below[2 * pair + 1] : 0;
            const bool take_leaf =
                pair == n_pairs || (leaf < n && leaves.weight[leaf] <= pair_weight);
            is_leaf[level][item] = take_leaf;
            merged[item] = take_leaf ? leaves.weight[leaf++] : pair_weight;
            if (!take_leaf) ++pair;
        }
        n_below = n + n_pairs;
        below = merged;
    }
    std::fill(depth.begin(), depth.begin() + static_cast<std::ptrdiff_t>(n), 0);
    std::size_t taken = 2 * n - 2;
    for (unsigned level = limit; level-- > 0;) {
        std::size_t n_leaves = 0;
        for (std::size_t item = 0; item < taken; ++item) n_leaves += is_leaf[level][item] ? 1 : 0;
        for (std::size_t i = 0; i < n_leaves; ++i) ++depth[i];
        taken = 2 * (taken - n_leaves);
    }
}

}  // namespace

void optimal_code_lengths(std::span<const std::uint32_t> counts, unsigned limit,
                          std::array<std::uint8_t, 256>& code_bits) noexcept {
    const Leaves leaves = sorted_leaves(counts);
    std::array<std::uint64_t, kSymbols> depth;
    unlimited_depths(leaves, depth);
    if (depth[0] > limit) limited_depths(leaves, limit, depth);
    code_bits.fill(0);
    for (std::size_t i = 0; i < leaves.n; ++i) {
        code_bits[leaves.symbol[i]] = static_cast<std::uint8_t>(depth[i]);
    }
}

}  // namespace pydedup::detail
