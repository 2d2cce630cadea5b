// SPDX-License-Identifier: Apache-2.0
// Fills page after page; the next piece is the one that adds the least weight of models that do not
// read the page yet. Kept cheap by lists of each model's pieces: when a model starts to read the
// page, only its own pieces get a new price. A heap holds (price, preference); stale entries are
// recognised by their price, since prices only fall while a page is filled.
#include <algorithm>
#include <cstdint>
#include <queue>
#include <utility>

#include "packing/line.hpp"

namespace pydedup::packing {
namespace {

class Gatherer {
  public:
    Gatherer(const Pieces& pieces, std::span<const Index> line, std::uint64_t most_visits)
        : pieces_(pieces),
          line_(line),
          most_visits_(most_visits),
          reach_(line.size()),
          price_(line.size(), 0),
          preference_(line.size()),
          by_preference_(line.size()),
          taken_(line.size(), false),
          reads_(pieces.weights.size(), false) {
        list_places();
        prefer();
    }

    std::vector<Index> run() {
        std::vector<Index> out;
        out.reserve(line_.size());
        std::uint64_t room = 0;
        while (out.size() < line_.size()) {
            const Index place = room == 0 ? kNone : cheapest();
            const Index chosen = place == kNone ? first_left() : place;
            taken_[chosen] = true;
            out.push_back(line_[chosen]);
            const std::uint64_t amount = pieces_.amount[line_[chosen]];
            if (amount >= room) {
                // What does not fit opens the next page.
                const std::uint64_t rest = (amount - room) % pieces_.capacity;
                room = rest == 0 ? 0 : pieces_.capacity - rest;
                open_page(out.size());
            } else {
                room -= amount;
            }
            if (room != 0) add_owners(chosen);
        }
        return out;
    }

  private:
    [[nodiscard]] std::span<const Index> owners(Index place) const {
        return pieces_.owners.row(line_[place]);
    }

    // Per model the places on the line of its pieces, ascending.
    void list_places() {
        std::vector<std::uint64_t>& indptr = places_.indptr;
        indptr.assign(reads_.size() + 1, 0);
        for (const Index m : pieces_.owners.items) ++indptr[m + std::size_t{1}];
        for (std::size_t m = 1; m < indptr.size(); ++m) indptr[m] += indptr[m - 1];
        places_.items.resize(indptr.back());
        begin_.assign(indptr.begin(), indptr.end() - 1);
        std::vector<std::uint64_t> at = begin_;
        for (Index place = 0; place < line_.size(); ++place) {
            for (const Index m : owners(place)) places_.items[at[m]++] = place;
        }
    }

    // Between equal prices: what shares most reads, then what is large, then what comes first.
    void prefer() {
        std::vector<std::int64_t> weight(line_.size(), 0);
        for (Index place = 0; place < line_.size(); ++place) {
            by_preference_[place] = place;
            for (const Index m : owners(place)) weight[place] += pieces_.weights[m];
            price_[place] = weight[place];
        }
        std::ranges::sort(by_preference_, [&](Index a, Index b) {
            if (weight[a] != weight[b]) return weight[a] > weight[b];
            const std::uint64_t left = pieces_.amount[line_[a]];
            const std::uint64_t right = pieces_.amount[line_[b]];
            return left != right ? left > right : a < b;
        });
        for (Index i = 0; i < line_.size(); ++i) preference_[by_preference_[i]] = i;
    }

    [[nodiscard]] Index first_left() {
        while (taken_[first_]) ++first_;
        return first_;
    }

    /// The cheapest piece that shares a model with the page, or kNone.
    [[nodiscard]] Index cheapest() {
        while (!heap_.empty()) {
            const auto [price, preference] = heap_.top();
            const Index place = by_preference_[preference];
            heap_.pop();
            if (!taken_[place] && price_[place] == price) return place;
        }
        return kNone;
    }

    void open_page(std::size_t placed) {
        for (const auto& [place, by] : discounts_) price_[place] += by;
        discounts_.clear();
        for (const Index m : page_models_) reads_[m] = false;
        page_models_.clear();
        heap_ = {};
        // Keep to the visits allowed by looking less far along the line, and back when there is
        // time: what is near on the line is alike.
        const double share = static_cast<double>(placed) / static_cast<double>(line_.size());
        const double allowed = static_cast<double>(most_visits_) * share;
        if (static_cast<double>(visits_) > allowed) {
            reach_ = std::max<std::size_t>(reach_ / 2, 64);
        } else if (static_cast<double>(visits_) < allowed / 2) {
            reach_ = std::min(reach_ * 2, line_.size());
        }
    }

    void add_owners(Index chosen) {
        const std::size_t end = std::min(line_.size(), first_left_or_end() + reach_);
        for (const Index m : owners(chosen)) {
            if (reads_[m]) continue;
            reads_[m] = true;
            page_models_.push_back(m);
            cut_price(m, end);
        }
    }

    [[nodiscard]] std::size_t first_left_or_end() {
        while (first_ < line_.size() && taken_[first_]) ++first_;
        return first_;
    }

    // Pieces of `m` before `end` need one reader less. Places already taken are squeezed out of the
    // part that was looked at, so that each is met once.
    void cut_price(Index m, std::size_t end) {
        const std::int64_t by = pieces_.weights[m];
        const std::uint64_t stop = places_.indptr[m + std::size_t{1}];
        std::uint64_t at = begin_[m];
        for (; at < stop && places_.items[at] < end; ++at) {
            const Index place = places_.items[at];
            if (taken_[place]) continue;
            price_[place] -= by;
            discounts_.emplace_back(place, by);
            heap_.emplace(price_[place], preference_[place]);
        }
        visits_ += at - begin_[m];
        std::uint64_t keep = at;
        while (at > begin_[m]) {
            const Index place = places_.items[--at];
            if (!taken_[place]) places_.items[--keep] = place;
        }
        begin_[m] = keep;
    }

    using Entry = std::pair<std::int64_t, Index>;

    const Pieces& pieces_;
    std::span<const Index> line_;
    std::uint64_t most_visits_;
    std::uint64_t visits_ = 0;
    std::size_t reach_;                 // how far to look along the line
    Index first_ = 0;                   // all places before it are taken
    Rows places_;                       // per model
    std::vector<std::uint64_t> begin_;  // per model: its places before that are taken
    std::vector<std::int64_t> price_;   // per place: weight of owners that do not read the page
    std::vector<Index> preference_, by_preference_;
    std::vector<bool> taken_;  // per place
    std::vector<bool> reads_;  // per model: reads the page
    std::vector<Index> page_models_;
    std::vector<std::pair<Index, std::int64_t>> discounts_;  // to take back when the page is full
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> heap_;
};

}  // namespace

std::vector<Index> gather_line(const Pieces& pieces, std::span<const Index> line,
                               std::uint64_t most_visits) {
    return Gatherer(pieces, line, most_visits).run();
}

}  // namespace pydedup::packing
