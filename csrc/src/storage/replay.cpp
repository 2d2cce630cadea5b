// SPDX-License-Identifier: Apache-2.0
#include "pydedup/replay.hpp"

#include <iterator>
#include <limits>
#include <list>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pydedup/error.hpp"

namespace pydedup {
namespace {

[[noreturn]] void refuse(const std::string& why) {
    throw Error(ErrorCode::invalid_argument, "a trace " + why);
}

void check(const ReplayTrace& trace, std::size_t budget) {
    const std::size_t n = trace.pages.size();
    if (trace.bytes.size() != n || trace.calls.size() != n) {
        refuse("has " + std::to_string(n) + " uses, but " + std::to_string(trace.bytes.size()) +
               " sizes and " + std::to_string(trace.calls.size()) + " calls");
    }
    std::unordered_map<std::int64_t, std::uint32_t> sizes;
    for (std::size_t i = 0; i < n; ++i) {
        if (trace.calls[i] > trace.owners.size() ||
            (i > 0 && trace.calls[i] < trace.calls[i - 1])) {
            refuse("has call " + std::to_string(trace.calls[i]) + " at use " + std::to_string(i) +
                   "; calls ascend, up to " + std::to_string(trace.owners.size()));
        }
        if (trace.bytes[i] > budget) {
            refuse("has a page of " + std::to_string(trace.bytes[i]) +
                   " bytes, more than the budget of " + std::to_string(budget));
        }
        if (sizes.try_emplace(trace.pages[i], trace.bytes[i]).first->second != trace.bytes[i]) {
            refuse("has two sizes of page " + std::to_string(trace.pages[i]));
        }
    }
}

// Counts the misses of a trace, in its order.
class Misses {
  public:
    Misses(const ReplayTrace& trace, ReplayResult& result) : trace_(trace), result_(result) {}

    void add(std::size_t use) noexcept {
        ++result_.misses;
        result_.missed_bytes += trace_.bytes[use];
        // Of no call are uses before the first one.
        if (trace_.calls[use] != last_) ++result_.missed_calls;
        last_ = trace_.calls[use];
    }

  private:
    const ReplayTrace& trace_;
    ReplayResult& result_;
    std::uint32_t last_ = 0;
};

ReplayResult replay_optimum(const ReplayTrace& trace, std::size_t budget) {
    constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();
    const std::size_t n = trace.pages.size();
    std::vector<std::size_t> next(n, kNever);
    std::unordered_map<std::int64_t, std::size_t> later;
    for (std::size_t i = n; i-- > 0;) {
        if (const auto [at, is_last] = later.try_emplace(trace.pages[i], i); !is_last) {
            next[i] = std::exchange(at->second, i);
        }
    }
    ReplayResult result{};
    Misses misses(trace, result);
    std::set<std::pair<std::size_t, std::size_t>> resident;  // next use, this one
    std::unordered_map<std::int64_t, std::size_t> used_at;   // of resident pages
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < n; ++i) {
        if (const auto at = used_at.find(trace.pages[i]); at != used_at.end()) {
            ++result.hits;
            resident.erase({i, at->second});
            at->second = i;
        } else {
            misses.add(i);
            while (bytes + trace.bytes[i] > budget) {
                const std::size_t use = std::prev(resident.end())->second;
                resident.erase(std::prev(resident.end()));
                used_at.erase(trace.pages[use]);
                bytes -= trace.bytes[use];
            }
            bytes += trace.bytes[i];
            used_at.emplace(trace.pages[i], i);
        }
        resident.emplace(next[i], i);
    }
    return result;
}

// As a pool does it with its idle pages, all of which are looked at.
class Replayed {
  public:
    Replayed(std::size_t budget, ReplacementPolicy policy)
        : budget_(budget), replacement_(policy) {}

    Replacement& replacement() noexcept { return replacement_; }

    /// Returns whether the page was there.
    bool use(std::int64_t id, std::uint32_t bytes) {
        const auto found = table_.find(id);
        const bool is_hit = found != table_.end();
        if (!is_hit) {
            while (bytes_ + bytes > budget_) evict();
            pages_.push_back({&replacement_.take_in(id), bytes});
            table_.emplace(id, std::prev(pages_.end()));
            bytes_ += bytes;
        }
        const auto at = is_hit ? found->second : std::prev(pages_.end());
        replacement_.use(*at->history);
        pages_.splice(pages_.end(), pages_, at);
        return is_hit;
    }

  private:
    struct Resident {
        Replacement::History* history;
        std::uint32_t bytes;
    };
    using Pages = std::list<Resident>;

    void evict() {
        auto least = pages_.begin();
        if (replacement_.policy() == ReplacementPolicy::mru) {
            least = std::prev(pages_.end());
        } else if (replacement_.policy() != ReplacementPolicy::lru) {
            double worth = replacement_.worth(*least->history, least->bytes);
            for (auto at = std::next(least); at != pages_.end(); ++at) {
                const double its = replacement_.worth(*at->history, at->bytes);
                if (its <= worth) {
                    least = at;
                    worth = its;
                }
            }
        }
        bytes_ -= least->bytes;
        table_.erase(least->history->id);
        replacement_.give_up(*least->history);
        pages_.erase(least);
    }

    const std::size_t budget_;
    Replacement replacement_;
    Pages pages_;  // used longest ago first
    std::unordered_map<std::int64_t, Pages::iterator> table_;
    std::size_t bytes_ = 0;
};

}  // namespace

ReplayResult replay(const ReplayTrace& trace, std::size_t budget_bytes,
                    std::optional<ReplacementPolicy> policy) {
    check(trace, budget_bytes);
    if (!policy) return replay_optimum(trace, budget_bytes);
    Replayed pool(budget_bytes, *policy);
    std::map<std::int64_t, std::set<std::int64_t>> pages_of;
    for (std::size_t i = 0; i < trace.pages.size(); ++i) {
        if (trace.calls[i] != 0) {
            pages_of[trace.owners[trace.calls[i] - 1]].insert(trace.pages[i]);
        }
    }
    for (const auto& [owner, pages] : pages_of) {
        pool.replacement().owns(owner, std::vector<std::int64_t>(pages.begin(), pages.end()));
    }
    ReplayResult result{};
    Misses misses(trace, result);
    std::uint32_t call = 0;
    for (std::size_t i = 0; i < trace.pages.size(); ++i) {
        while (call < trace.calls[i]) pool.replacement().call(trace.owners[call++]);
        if (pool.use(trace.pages[i], trace.bytes[i])) {
            ++result.hits;
        } else {
            misses.add(i);
        }
    }
    return result;
}

}  // namespace pydedup
