// SPDX-License-Identifier: Apache-2.0
#include "packing/bound.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace pydedup::packing {
namespace {

constexpr std::size_t kChunk = 8;  // models whose groupings are all tried: 4^8 steps, 0.1 ms
constexpr std::size_t kSets = std::size_t{1} << kChunk;

std::int64_t pages_for(std::uint64_t amount, std::uint64_t capacity) noexcept {
    return static_cast<std::int64_t>(amount / capacity + (amount % capacity != 0 ? 1 : 0));
}

/// The best bound over all ways to cut up to kChunk models into groups.
class ChunkBound {
  public:
    ChunkBound(std::span<const std::int64_t> weights, std::uint64_t capacity)
        : count_(weights.size()), capacity_(capacity) {
        for (std::size_t s = 1; s < std::size_t{1} << count_; ++s) {
            weight_[s] =
                weight_[s & (s - 1)] + weights[static_cast<std::size_t>(std::countr_zero(s))];
        }
    }

    void add(std::size_t owners, std::uint64_t amount) { amount_[owners] += amount; }

    [[nodiscard]] std::int64_t best() {
        const std::size_t all = (std::size_t{1} << count_) - 1;
        for (std::size_t g = 1; g <= all; ++g) group_[g] = one_group(g, all);
        std::array<std::int64_t, kSets> cut{};
        for (std::size_t set = 1; set <= all; ++set) {
            const std::size_t lowest = set & (~set + 1);
            const std::size_t rest = set ^ lowest;
            for (std::size_t other = rest;; other = (other - 1) & rest) {
                const std::size_t group = other | lowest;
                cut[set] = std::max(cut[set], group_[group] + cut[set ^ group]);
                if (other == 0) break;
            }
        }
        return cut[all];
    }

  private:
    // Sum over t > 0 of the pages needed for what models of `group` with weight >= t own.
    [[nodiscard]] std::int64_t one_group(std::size_t group, std::size_t all) const {
        const std::size_t outside = all ^ group;
        std::array<std::pair<std::int64_t, std::uint64_t>, kSets> by_weight;
        std::size_t n = 0;
        for (std::size_t inner = group; inner != 0; inner = (inner - 1) & group) {
            std::uint64_t sum = 0;
            for (std::size_t outer = outside;; outer = (outer - 1) & outside) {
                sum += amount_[inner | outer];
                if (outer == 0) break;
            }
            if (sum != 0) by_weight[n++] = {weight_[inner], sum};
        }
        std::sort(by_weight.begin(), by_weight.begin() + static_cast<std::ptrdiff_t>(n),
                  [](const auto& a, const auto& b) { return a.first > b.first; });
        std::int64_t reads = 0;
        std::uint64_t at_least = 0;
        for (std::size_t i = 0; i < n; ++i) {
            at_least += by_weight[i].second;
            const std::int64_t next = i + 1 < n ? by_weight[i + 1].first : 0;
            reads += (by_weight[i].first - next) * pages_for(at_least, capacity_);
        }
        return reads;
    }

    std::size_t count_;
    std::uint64_t capacity_;
    std::array<std::int64_t, kSets> weight_{};
    std::array<std::uint64_t, kSets> amount_{};
    std::array<std::int64_t, kSets> group_{};
};

std::int64_t all_in_one_group(const Problem& problem, const Rows& owners,
                              std::span<const std::uint64_t> amount) {
    std::vector<std::pair<std::int64_t, std::uint64_t>> by_weight(owners.size());
    for (std::size_t i = 0; i < owners.size(); ++i) {
        by_weight[i].second = amount[i];
        for (const Index m : owners.row(i)) by_weight[i].first += problem.weights[m];
    }
    std::ranges::sort(by_weight, std::greater<>{});
    std::int64_t reads = 0;
    std::uint64_t at_least = 0;
    for (std::size_t i = 0; i < by_weight.size(); ++i) {
        at_least += by_weight[i].second;
        const std::int64_t next = i + 1 < by_weight.size() ? by_weight[i + 1].first : 0;
        reads += (by_weight[i].first - next) * pages_for(at_least, problem.capacity);
    }
    return reads;
}

}  // namespace

std::int64_t least_weighted_reads(const Problem& problem, const Rows& owners,
                                  std::span<const std::uint64_t> amount) {
    // Only models that own something, in order of their numbers: relatives are often neighbours.
    std::vector<Index> place(problem.models(), kNone);
    for (const Index m : owners.items) place[m] = 0;
    std::vector<std::int64_t> weights;
    for (Index m = 0; m < place.size(); ++m) {
        if (place[m] == kNone) continue;
        place[m] = static_cast<Index>(weights.size());
        weights.push_back(problem.weights[m]);
    }
    std::vector<ChunkBound> chunks;
    for (std::size_t first = 0; first < weights.size(); first += kChunk) {
        const std::size_t count = std::min(kChunk, weights.size() - first);
        chunks.emplace_back(std::span(weights).subspan(first, count), problem.capacity);
    }
    std::vector<std::size_t> owned_of(chunks.size(), 0);
    std::vector<std::size_t> touched;
    for (std::size_t i = 0; i < owners.size(); ++i) {
        for (const Index m : owners.row(i)) {
            std::size_t& set = owned_of[place[m] / kChunk];
            if (set == 0) touched.push_back(place[m] / kChunk);
            set |= std::size_t{1} << (place[m] % kChunk);
        }
        for (const std::size_t c : touched) chunks[c].add(std::exchange(owned_of[c], 0), amount[i]);
        touched.clear();
    }
    std::int64_t reads = 0;
    for (ChunkBound& chunk : chunks) reads += chunk.best();
    if (chunks.size() > 1) reads = std::max(reads, all_in_one_group(problem, owners, amount));
    return reads;
}

std::uint64_t least_pages(std::span<std::uint64_t> sizes, std::uint64_t capacity) {
    std::uint64_t total = 0;
    std::uint64_t largest = 0;
    for (const std::uint64_t size : sizes) {
        total += size;
        largest = std::max(largest, size);
    }
    auto least = static_cast<std::uint64_t>(pages_for(total, capacity));
    if (largest <= capacity / 2) return least;
    // For every a up to half a page: blocks over capacity - a share their page with nothing of size
    // a or more. Those up to there, but over half a page, are one to a page, and what is left of
    // these pages is the only room for the others of size a or more without pages of their own.
    std::ranges::sort(sizes, std::greater<>{});
    std::size_t large = 0;  // over half a page
    while (large < sizes.size() && sizes[large] > capacity / 2) ++large;
    least = std::max<std::uint64_t>(least, large);
    std::uint64_t room = 0;   // beside large blocks up to capacity - a
    std::uint64_t small = 0;  // sum of the sizes from a to half a page
    std::size_t shares = large;
    for (std::size_t i = large; i < sizes.size();) {
        const std::uint64_t a = sizes[i];
        while (i < sizes.size() && sizes[i] == a) small += sizes[i++];
        while (shares > 0 && sizes[shares - 1] <= capacity - a) room += capacity - sizes[--shares];
        const std::uint64_t more = small > room ? small - room : 0;
        least = std::max(least, large + static_cast<std::uint64_t>(pages_for(more, capacity)));
    }
    return least;
}

}  // namespace pydedup::packing
