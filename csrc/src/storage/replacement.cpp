// SPDX-License-Identifier: Apache-2.0
#include "pydedup/replacement.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace pydedup {
namespace {

// Ticks after which a use counts a third, per page in memory: a pool has been filled anew so often.
constexpr double kTurnovers = 16;
// Pages from which on that is so; smaller pools remember as long as one of this size.
constexpr double kMinPages = 64;
// Part of the horizon for which the rate of its owners counts like observations of the page itself.
constexpr double kPriorWeight = 1.0 / 32;
// How far, of its length, the first gap is believed to be from the mean. Less than a half: the
// second round of a loop should already profit.
constexpr double kFirstSpread = 0.25;
// Part of the horizon for which a rate is not looked at again.
constexpr double kRatesStayGood = 1.0 / 256;
// Share of the newest gap in the running mean.
constexpr double kNewest = 0.25;
// A wait so many times as long as expected says that the expectation is wrong.
constexpr double kOverdue = 4;
// What a read costs beside its bytes, in bytes that could be read meanwhile.
constexpr double kReadBytes = 64 << 10;
// Pages that are remembered after they went: so many times those in memory, and at least so many.
constexpr std::size_t kRememberedTimes = 4;
constexpr std::size_t kRemembered = 1024;
// Models from which on those are forgotten that were not called for so many horizons: nothing is
// left of what their calls said.
constexpr std::size_t kManyModels = 256;
constexpr double kStaleHorizons = 8;

struct Named {
    std::string_view name;
    ReplacementPolicy policy;
};
constexpr std::array<Named, 5> kPolicies = {{{"lru", ReplacementPolicy::lru},
                                             {"mru", ReplacementPolicy::mru},
                                             {"lru2", ReplacementPolicy::lru2},
                                             {"locality", ReplacementPolicy::locality},
                                             {"reuse", ReplacementPolicy::reuse}}};

/// exp(-x) for x >= 0, as nearly as guesses of the future need it, in a few multiplications: a full
/// pool asks for it twice per page.
[[nodiscard]] double fading(double x) noexcept {
    double power = std::max(1 - x / 16, 0.0);
    for (int i = 0; i < 4; ++i) power *= power;
    return power;
}

[[nodiscard]] double ticks(std::uint64_t from, std::uint64_t to) noexcept {
    return static_cast<double>(to - from);
}

}  // namespace

std::optional<ReplacementPolicy> replacement_named(std::string_view name) noexcept {
    const auto* const at = std::find_if(kPolicies.begin(), kPolicies.end(),
                                        [&](const Named& named) { return named.name == name; });
    if (at == kPolicies.end()) return std::nullopt;
    return at->policy;
}

void Replacement::owns(Owner owner, std::span<const PageId> pages) {
    if (models_.size() > std::max(most_models_, kManyModels)) forget_stale();
    const auto [at, is_new] = numbers_.try_emplace(owner, models_.size());
    if (is_new) models_.emplace_back();
    const std::size_t model = at->second;
    for (const PageId id : pages) {
        std::uint32_t& group = group_of_[id];
        const auto& owners = groups_[group].owners;
        if (std::binary_search(owners.begin(), owners.end(), model)) continue;
        const std::uint32_t next = group_with(group, model);
        ++groups_[next].pages;
        leave_group(group);
        group = next;
        if (const auto known = known_.find(id); known != known_.end()) known->second->group = group;
    }
}

std::uint32_t Replacement::group_with(std::uint32_t group, std::size_t model) {
    std::vector<std::size_t> owners = groups_[group].owners;
    owners.insert(std::upper_bound(owners.begin(), owners.end(), model), model);
    if (const auto at = numbers_of_groups_.find(owners); at != numbers_of_groups_.end()) {
        return at->second;
    }
    if (free_groups_.empty()) {
        free_groups_.reserve(groups_.size() + 1);  // leave_group() must not fail
        groups_.emplace_back();
        free_groups_.push_back(static_cast<std::uint32_t>(groups_.size() - 1));
    }
    const std::uint32_t number = free_groups_.back();
    groups_[number] = {owners, 0, 0, 0};
    numbers_of_groups_.emplace(std::move(owners), number);
    free_groups_.pop_back();
    return number;
}

void Replacement::leave_group(std::uint32_t group) noexcept {
    if (group == 0 || --groups_[group].pages != 0) return;
    numbers_of_groups_.erase(groups_[group].owners);
    groups_[group] = {};
    free_groups_.push_back(group);
}

// Puts the first model in the place of those that were not called for long, in all sets of owners.
// All is made anew, at the latest when there are twice as many models as the last time.
void Replacement::forget_stale() {
    const double stale = kStaleHorizons * horizon();
    std::vector<Model> models(1, models_.front());
    std::vector<std::size_t> new_model(models_.size(), 0);
    for (std::size_t i = 1; i < models_.size(); ++i) {
        const Model& model = models_[i];
        // Of one that was never called it is not known how long ago that is.
        if (model.last != 0 && model.last < now_ && ticks(model.last, now_) > stale) continue;
        new_model[i] = models.size();
        models.push_back(model);
    }
    std::unordered_map<Owner, std::size_t> numbers;
    for (const auto& [owner, number] : numbers_) {
        if (new_model[number] != 0) numbers.emplace(owner, new_model[number]);
    }
    std::vector<Group> groups(1);
    std::map<std::vector<std::size_t>, std::uint32_t> numbers_of_groups;
    numbers_of_groups.emplace(std::vector<std::size_t>(), 0);
    std::vector<std::uint32_t> new_group(groups_.size(), 0);
    for (std::size_t i = 1; i < groups_.size(); ++i) {
        if (groups_[i].pages == 0) continue;
        std::vector<std::size_t> owners;
        for (const std::size_t model : groups_[i].owners) owners.push_back(new_model[model]);
        std::sort(owners.begin(), owners.end());
        owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
        const auto [at, is_new] =
            numbers_of_groups.try_emplace(owners, static_cast<std::uint32_t>(groups.size()));
        if (is_new) groups.push_back({std::move(owners), 0, 0, 0});
        new_group[i] = at->second;
    }
    std::vector<std::uint32_t> free_groups;
    free_groups.reserve(groups.size());

    // Nothing fails from here on.
    most_models_ = 2 * models.size();
    models_.swap(models);
    numbers_.swap(numbers);
    groups_.swap(groups);
    numbers_of_groups_.swap(numbers_of_groups);
    free_groups_.swap(free_groups);
    for (auto at = group_of_.begin(); at != group_of_.end();) {
        const std::uint32_t group = new_group[at->second];
        const auto known = known_.find(at->first);
        const auto& owners = groups_[group].owners;
        if (known == known_.end() && owners.size() == 1 && owners.front() == 0) {
            at = group_of_.erase(at);  // perhaps of a page that is no more
            continue;
        }
        if (known != known_.end()) known->second->group = group;
        ++groups_[group].pages;
        at->second = group;
        ++at;
    }
    for (std::size_t i = 1; i < groups_.size(); ++i) {
        if (groups_[i].pages != 0) continue;
        numbers_of_groups_.erase(groups_[i].owners);
        groups_[i] = {};
        free_groups_.push_back(static_cast<std::uint32_t>(i));
    }
}

bool Replacement::call(Owner owner) {
    ++call_;
    const auto [at, is_new] = numbers_.try_emplace(owner, models_.size());
    if (is_new) models_.emplace_back();
    Model& model = models_[at->second];
    if (model.first == 0) model.first = now_ + 1;
    model.calls = decayed(model.calls, model.last) + 1;
    model.last = now_ + 1;
    return !is_new;
}

Replacement::History& Replacement::take_in(PageId id) {
    auto at = known_.find(id);
    if (at == known_.end()) {
        Histories fresh(1);
        fresh.front().id = id;
        if (const auto group = group_of_.find(id); group != group_of_.end()) {
            fresh.front().group = group->second;
        }
        at = known_.emplace(id, fresh.begin()).first;
        resident_.splice(resident_.end(), fresh);
    } else if (!at->second->resident) {
        resident_.splice(resident_.end(), gone_, at->second);
    }
    History& page = *at->second;
    page.resident = true;
    return page;
}

void Replacement::use(History& page) noexcept {
    ++now_;
    if (page.last == 0) {
        page.first = now_;
    } else if (page.call != call_ || call_ == 0) {
        const double gap = ticks(page.last, now_);
        if (page.before == 0) {
            page.gap = gap;
            page.spread = gap * kFirstSpread;
        } else {
            page.spread += (std::abs(gap - page.gap) - page.spread) * kNewest;
            page.gap += (gap - page.gap) * kNewest;
        }
        page.reuses = decayed(page.reuses, page.last) + 1;
        page.before = page.last;
    }
    page.call = call_;
    page.last = now_;
}

void Replacement::give_up(History& page) noexcept {
    page.resident = false;
    gone_.splice(gone_.end(), resident_, known_.find(page.id)->second);
    while (gone_.size() > std::max(kRemembered, kRememberedTimes * resident_.size())) {
        known_.erase(gone_.front().id);
        gone_.pop_front();
    }
}

double Replacement::worth(const History& page, std::size_t bytes) {
    switch (policy_) {
        case ReplacementPolicy::lru:
            return static_cast<double>(page.last);
        case ReplacementPolicy::mru:
            return -static_cast<double>(page.last);
        case ReplacementPolicy::lru2:
            // Of pages that were used once, the one used longest ago.
            return page.before != 0
                       ? static_cast<double>(page.before)
                       : static_cast<double>(page.last) - static_cast<double>(now_) - 1;
        case ReplacementPolicy::locality:
            // Models are read from front to back: of equal ones, the one that was just used.
            return rate_of_group(page.group) - 1e-12 * static_cast<double>(page.last);
        case ReplacementPolicy::reuse:
            break;
    }
    const auto size = static_cast<double>(bytes);
    return (size + kReadBytes) / (size * wait(page));
}

double Replacement::wait(const History& page) {
    const double age = ticks(page.last, now_);
    // One use in a horizon is what is believed of a page of which nothing is known.
    const double owned =
        page.group == 0 ? 1 / horizon() : rate_of_group(page.group) + kPriorWeight / horizon();
    const double prior = kPriorWeight * horizon();
    const double seen = horizon() * (1 - fading(ticks(page.first, now_) / horizon()));
    // Of an owned page that was not used again yet, its owners know more than it shows itself.
    double rate = page.group != 0 && page.reuses == 0
                      ? owned
                      : (decayed(page.reuses, page.last) + owned * prior) / (seen + prior);
    double even = 0;  // 0: uses come by chance, 1: at even distances
    if (page.before != 0) {
        even = std::clamp(1 - 2 * page.spread / page.gap, 0.0, 1.0);
        if (age > page.gap + kOverdue * page.spread) even = 0;
    }
    if (age * rate > kOverdue) rate = kOverdue / age;
    const double left = even == 0 ? 0 : std::max(page.gap - age, 1.0);
    return (1 - even) / rate + even * left;
}

double Replacement::horizon() const noexcept {
    return kTurnovers * std::max(kMinPages, static_cast<double>(resident_.size()));
}

double Replacement::decayed(double count, std::uint64_t since) const noexcept {
    return count == 0 ? 0 : count * fading(ticks(since, now_) / horizon());
}

double Replacement::rate_of(const Model& model) const noexcept {
    if (model.first == 0 || model.first > now_) return 0;
    const double seen = horizon() * (1 - fading(ticks(model.first - 1, now_) / horizon()));
    // The first call says nothing of the next one.
    const double prior = kPriorWeight * horizon();
    const double calls = decayed(model.calls, model.last);
    return std::max(calls - 1, 0.0) / (seen + prior) + kPriorWeight / (seen + prior);
}

double Replacement::rate_of_group(std::uint32_t group) {
    // Rates change slowly; what was found stays good for a small part of the horizon.
    Group& its = groups_[group];
    if (its.rated_at == 0 || ticks(its.rated_at, now_) > horizon() * kRatesStayGood) {
        its.rate = 0;
        for (const std::size_t model : its.owners) its.rate += rate_of(models_[model]);
        its.rated_at = std::max<std::uint64_t>(now_, 1);
    }
    return its.rate;
}

}  // namespace pydedup
