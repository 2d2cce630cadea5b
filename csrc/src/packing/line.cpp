// SPDX-License-Identifier: Apache-2.0
// All arithmetic is on integers, or on doubles with one rounding per step in a fixed order: the
// same line on every machine.
#include "packing/line.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace pydedup::packing {
namespace {

/// Models from heavy to light (weight times amount owned), ties to the lower number.
std::vector<Index> model_ranks(const Pieces& pieces) {
    std::vector<double> load(pieces.weights.size(), 0);
    for (std::size_t i = 0; i < pieces.owners.size(); ++i) {
        for (const Index m : pieces.owners.row(i)) {
            load[m] +=
                static_cast<double>(pieces.amount[i]) * static_cast<double>(pieces.weights[m]);
        }
    }
    std::vector<Index> order(load.size());
    std::iota(order.begin(), order.end(), Index{0});
    std::ranges::stable_sort(order, [&](Index a, Index b) { return load[a] > load[b]; });
    std::vector<Index> rank(load.size());
    for (std::size_t r = 0; r < order.size(); ++r) rank[order[r]] = static_cast<Index>(r);
    return rank;
}

// Reflected Gray order of owner sets given as ascending ranks: where two sets first differ, the one
// that has the heavier model comes first, or last when an odd number of owners precede.
bool gray_before(std::span<const Index> a, std::span<const Index> b) {
    const auto [x, y] = std::ranges::mismatch(a, b);
    const bool odd = (x - a.begin()) % 2 != 0;
    const Index left = x == a.end() ? kNone : *x;
    const Index right = y == b.end() ? kNone : *y;
    return odd ? left > right : left < right;
}

// The first four owners as one number that sorts like gray_before(): most comparisons end there.
std::uint64_t gray_key(std::span<const Index> ranks) {
    constexpr Index kTop = 0xffff;  // stands for the end of the set
    std::uint64_t key = 0;
    for (std::size_t k = 0; k < 4; ++k) {
        Index digit = 0;
        if (k <= ranks.size()) digit = k == ranks.size() ? kTop : ranks[k];
        if (k <= ranks.size() && k % 2 != 0) digit = kTop - digit;
        key = key << 16 | digit;
    }
    return key;
}

std::vector<std::int64_t> owner_weights(const Pieces& pieces) {
    std::vector<std::int64_t> weight(pieces.owners.size(), 0);
    for (std::size_t i = 0; i < weight.size(); ++i) {
        for (const Index m : pieces.owners.row(i)) weight[i] += pieces.weights[m];
    }
    return weight;
}

}  // namespace

std::vector<Index> gray_line(const Pieces& pieces) {
    const std::size_t count = pieces.owners.size();
    const std::vector<Index> rank = model_ranks(pieces);
    const bool ranks_fit_keys = rank.size() < 0xffff;
    std::vector<Index> ranks(pieces.owners.items.size());
    const auto row = [&](Index i) {
        return std::span<Index>{ranks.data() + pieces.owners.indptr[i],
                                pieces.owners.row(i).size()};
    };
    std::vector<std::pair<std::uint64_t, Index>> keyed(count);
    for (Index i = 0; i < count; ++i) {
        const auto own = row(i);
        std::ranges::transform(pieces.owners.row(i), own.begin(), [&](Index m) { return rank[m]; });
        std::ranges::sort(own);
        keyed[i] = {ranks_fit_keys ? gray_key(own) : 0, i};
    }
    std::ranges::sort(keyed, [&](const auto& a, const auto& b) {
        if (a.first != b.first) return a.first < b.first;
        const auto left = row(a.second);
        const auto right = row(b.second);
        if (gray_before(left, right)) return true;
        if (gray_before(right, left)) return false;
        return a.second < b.second;
    });
    std::vector<Index> line(count);
    std::ranges::transform(keyed, line.begin(), [](const auto& entry) { return entry.second; });
    return line;
}

std::vector<Index> heavy_line(const Pieces& pieces, std::span<const Index> line) {
    const std::vector<std::int64_t> weight = owner_weights(pieces);
    std::vector<Index> out(line.begin(), line.end());
    std::ranges::stable_sort(out, [&](Index a, Index b) { return weight[a] > weight[b]; });
    return out;
}

std::vector<Index> similar_line(const Pieces& pieces) {
    const std::vector<std::int64_t> weight = owner_weights(pieces);
    std::vector<Index> left(pieces.owners.size());
    std::iota(left.begin(), left.end(), Index{0});
    std::vector<bool> reads(pieces.weights.size(), false);
    std::int64_t page_weight = 0;
    std::uint64_t room = 0;
    std::vector<Index> out;
    out.reserve(left.size());
    while (!left.empty()) {
        std::size_t best = 0;
        double best_ratio = -1;
        for (std::size_t k = 0; k < left.size(); ++k) {
            const Index i = left[k];
            std::int64_t shared = 0;
            for (const Index m : pieces.owners.row(i)) shared += reads[m] ? pieces.weights[m] : 0;
            // An empty page has no models: start with the piece that most models read.
            const double ratio = page_weight == 0
                                     ? static_cast<double>(weight[i])
                                     : static_cast<double>(shared) /
                                           static_cast<double>(page_weight + weight[i] - shared);
            if (ratio < best_ratio) continue;
            if (ratio == best_ratio && pieces.amount[i] <= pieces.amount[left[best]]) continue;
            best = k;
            best_ratio = ratio;
        }
        const Index chosen = left[best];
        left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
        out.push_back(chosen);
        const std::uint64_t amount = pieces.amount[chosen];
        if (amount >= room) {
            // What does not fit opens the next page.
            std::fill(reads.begin(), reads.end(), false);
            page_weight = 0;
            const std::uint64_t rest = (amount - room) % pieces.capacity;
            room = rest == 0 ? 0 : pieces.capacity - rest;
        } else {
            room -= amount;
        }
        if (room == 0) continue;
        for (const Index m : pieces.owners.row(chosen)) {
            page_weight += reads[m] ? 0 : pieces.weights[m];
            reads[m] = true;
        }
    }
    return out;
}

}  // namespace pydedup::packing
