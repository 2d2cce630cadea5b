// SPDX-License-Identifier: Apache-2.0
// Which page a full pool gives up. Time is counted in uses of pages ("ticks"): it stands still
// while nobody asks, and is the same for a recorded trace as for the traffic that it was recorded
// from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pydedup {

enum class ReplacementPolicy : std::uint8_t {
    lru,       ///< least recently used
    mru,       ///< most recently used: right for one loop, wrong for nearly all else
    lru2,      ///< the page whose last use but one is longest ago (O'Neil et al., SIGMOD 1993)
    locality,  ///< locality sets with shared pages, after Zhou et al., PVLDB 15, 2022: the page
               ///< that is least likely wanted by any of its owners, rates added up
    reuse,     ///< the page with the longest expected wait per byte; see Replacement::wait()
};

[[nodiscard]] std::optional<ReplacementPolicy> replacement_named(std::string_view name) noexcept;

/// What is known of the uses of pages, and what a policy makes of it. Not safe between threads.
///
/// Owners are models; a call is one prediction, whose repeated uses of a page are one. Pages that
/// were given up are remembered for a while (four times as many as there are in memory).
class Replacement {
  public:
    using PageId = std::int64_t;
    using Owner = std::int64_t;

    struct History {
        PageId id = 0;
        std::uint64_t last = 0;    ///< tick of the last use; 0 for none
        std::uint64_t before = 0;  ///< tick of the last use but one, in another call
        std::uint64_t first = 0;   ///< tick of the first use
        std::uint64_t call = 0;    ///< number of the call of the last use
        double reuses = 0;         ///< uses after the first, decayed; as of `last`
        double gap = 0;            ///< running mean of the ticks between uses
        double spread = 0;         ///< running mean of how far gaps were from it
        std::uint32_t group = 0;   ///< pages with the same owners
        bool resident = false;
    };

    explicit Replacement(ReplacementPolicy policy)
        : policy_(policy), models_(1, Model{1, 1, 0}), groups_(1) {
        numbers_of_groups_.emplace(std::vector<std::size_t>(), 0);
    }
    Replacement(const Replacement&) = delete;
    Replacement& operator=(const Replacement&) = delete;

    /// Says that a model reads these pages. Kept are about 50 bytes for each page, and for each set
    /// of models that some page has as its owners 8 bytes per member. Once there are many models,
    /// those that were not called for long are forgotten: versions that were replaced add up.
    void owns(Owner owner, std::span<const PageId> pages);

    /// A prediction begins. Returns whether it is known which pages the model reads: whether it
    /// was called, or `owns` was, and it was not forgotten since.
    bool call(Owner owner);

    /// A page comes into memory, unused. The result is valid until `give_up`.
    History& take_in(PageId id);

    /// A page in memory is used.
    void use(History& page) noexcept;

    /// A page leaves memory.
    void give_up(History& page) noexcept;

    /// How gladly a page is kept: of several, the one with the least goes first.
    [[nodiscard]] double worth(const History& page, std::size_t bytes);

    /// Expected ticks until the next use, by policy `reuse`.
    ///
    /// Uses come at a rate: those of the page itself, and, as long as few of them were seen, those
    /// of its owners, added up. A page that is used at even distances is different: the longer ago
    /// its last use is, the sooner comes the next. So of a loop that does not fit, the page that
    /// was just used goes first, and the rest of the loop stays.
    [[nodiscard]] double wait(const History& page);

    [[nodiscard]] ReplacementPolicy policy() const noexcept { return policy_; }
    /// Number of the newest call, 0 before the first.
    [[nodiscard]] std::uint64_t calls() const noexcept { return call_; }

  private:
    struct Model {
        std::uint64_t last = 0, first = 0;
        double calls = 0;  // decayed, as of `last`
    };
    // Pages with the same owners.
    struct Group {
        std::vector<std::size_t> owners;  // ascending
        std::size_t pages = 0;
        std::uint64_t rated_at = 0;  // when `rate` was made
        double rate = 0;
    };
    using Histories = std::list<History>;

    [[nodiscard]] double horizon() const noexcept;
    [[nodiscard]] double decayed(double count, std::uint64_t since) const noexcept;
    [[nodiscard]] double rate_of(const Model& model) const noexcept;
    [[nodiscard]] double rate_of_group(std::uint32_t group);
    [[nodiscard]] std::uint32_t group_with(std::uint32_t group, std::size_t model);
    void leave_group(std::uint32_t group) noexcept;
    void forget_stale();

    const ReplacementPolicy policy_;
    std::uint64_t now_ = 0;
    std::uint64_t call_ = 0;
    Histories resident_, gone_;  // gone_: those given up longest ago first
    std::unordered_map<PageId, Histories::iterator> known_;

    // Owners of a page are one of few sets, named by number; 0 is the empty one. A number without
    // pages is given to the next set.
    std::unordered_map<Owner, std::size_t> numbers_;
    std::vector<Model> models_;  // the first one stands for all that were forgotten
    std::size_t most_models_ = 0;
    std::vector<Group> groups_;
    std::map<std::vector<std::size_t>, std::uint32_t> numbers_of_groups_;
    std::vector<std::uint32_t> free_groups_;
    std::unordered_map<PageId, std::uint32_t> group_of_;
};

}  // namespace pydedup
