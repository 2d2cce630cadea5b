// SPDX-License-Identifier: Apache-2.0
#include "packing/problem.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>

#include "base/number_text.hpp"
#include "packing/bound.hpp"
#include "packing/existing.hpp"
#include "pydedup/error.hpp"

namespace pydedup::packing {
namespace {

[[noreturn]] void fail(const std::string& message) {
    throw Error(ErrorCode::invalid_argument, message);
}

// The arrays of a request are borrowed and too large to copy; should another thread write into them
// meanwhile, the packers still get indices that exist.
[[noreturn]] void fail_changed(const std::string& name) {
    fail(name + " changed while it was read; nobody may write into it before the call ends");
}

void check_rows(const IdRows& rows, const char* name) {
    const auto indptr = rows.indptr;
    if (indptr.empty()) {
        if (rows.ids.empty()) return;
        fail(std::string(name) + " has ids but no row pointers");
    }
    if (indptr.front() != 0 || indptr.back() != static_cast<std::int64_t>(rows.ids.size())) {
        fail(std::string(name) + ": row pointers must run from 0 to the number of ids (" +
             std::to_string(rows.ids.size()) + "), not from " + std::to_string(indptr.front()) +
             " to " + std::to_string(indptr.back()));
    }
    for (std::size_t i = 1; i < indptr.size(); ++i) {
        if (indptr[i] < indptr[i - 1]) {
            fail(std::string(name) + ": row pointers must not fall, but number " +
                 std::to_string(i) + " does");
        }
    }
    if (indptr.size() - 1 >= kNone) fail(std::string(name) + " has too many rows");
    const auto negative = std::ranges::find_if(rows.ids, [](std::int64_t id) { return id < 0; });
    if (negative != rows.ids.end()) {
        fail(std::string(name) + ": block id " + std::to_string(*negative) +
             " is negative; ids count from 0");
    }
}

/// Finds the index of an id. Stores hand out ids without large holes, so a bit map with ranks is
/// the rule: one bit per possible id. Very sparse ids are sorted and searched instead.
class IdIndex {
  public:
    IdIndex(std::span<const std::int64_t> ids, std::vector<std::int64_t>& distinct) {
        std::int64_t top = -1;
        for (const std::int64_t id : ids) top = std::max(top, id);
        // At most as much memory as the ids themselves take.
        if (static_cast<std::uint64_t>(top) / 64 <= ids.size() + 4096 || top < 0) {
            fill_bits(ids, static_cast<std::size_t>(top + 1), distinct);
        } else {
            distinct.assign(ids.begin(), ids.end());
            std::ranges::sort(distinct);
            const auto tail = std::ranges::unique(distinct);
            distinct.erase(tail.begin(), tail.end());
            distinct.shrink_to_fit();
            sorted_ = distinct;
        }
        if (distinct.size() >= kNone)
            fail("too many distinct blocks: " + std::to_string(distinct.size()));
    }

    /// kNone when nobody owns `id`.
    [[nodiscard]] Index find(std::int64_t id) noexcept {
        const auto value = static_cast<std::uint64_t>(id);
        if (!bits_.empty()) {
            if (value / 64 >= bits_.size()) return kNone;
            const std::uint64_t word = bits_[value / 64];
            const std::uint64_t bit = std::uint64_t{1} << (value % 64);
            if ((word & bit) == 0) return kNone;
            return ranks_[value / 64] + static_cast<Index>(std::popcount(word & (bit - 1)));
        }
        // Rows are mostly ascending: gallop from where the last search ended.
        std::size_t low = 0;
        std::size_t high = sorted_.size();
        if (last_ < high && sorted_[last_] <= id) {
            low = last_;
            std::size_t step = 1;
            while (low + step < sorted_.size() && sorted_[low + step] <= id) {
                low += step;
                step *= 2;
            }
            high = std::min(high, low + step + 1);
        }
        const auto begin = sorted_.begin();
        const auto at = std::lower_bound(begin + static_cast<std::ptrdiff_t>(low),
                                         begin + static_cast<std::ptrdiff_t>(high), id);
        if (at == sorted_.end() || *at != id) return kNone;
        last_ = static_cast<std::size_t>(at - begin);
        return static_cast<Index>(last_);
    }

  private:
    void fill_bits(std::span<const std::int64_t> ids, std::size_t range,
                   std::vector<std::int64_t>& distinct) {
        bits_.assign(range / 64 + 1, 0);
        for (const std::int64_t id : ids) {
            const auto value = static_cast<std::uint64_t>(id);
            if (value >= range) fail_changed("ids");
            bits_[value / 64] |= std::uint64_t{1} << (value % 64);
        }
        ranks_.resize(bits_.size());
        std::size_t rank = 0;
        for (std::size_t i = 0; i < bits_.size(); ++i) {
            ranks_[i] = static_cast<Index>(rank);
            rank += static_cast<std::size_t>(std::popcount(bits_[i]));
        }
        distinct.reserve(rank);
        for (std::size_t i = 0; i < bits_.size(); ++i) {
            for (std::uint64_t word = bits_[i]; word != 0; word &= word - 1) {
                distinct.push_back(static_cast<std::int64_t>(i * 64) + std::countr_zero(word));
            }
        }
    }

    std::vector<std::uint64_t> bits_;
    std::vector<Index> ranks_;
    std::span<const std::int64_t> sorted_;
    std::size_t last_ = 0;
};

/// Rows of ids as rows of indices, each ascending. With `strangers`, ids nobody owns are left out.
Rows renumber(const IdRows& rows, IdIndex& index, const char* name, bool strangers) {
    Rows out;
    if (rows.indptr.empty()) return out;
    out.items.reserve(rows.ids.size());
    out.indptr.reserve(rows.indptr.size());
    for (std::size_t r = 0; r + 1 < rows.indptr.size(); ++r) {
        bool ascending = true;
        const auto start = static_cast<std::ptrdiff_t>(out.items.size());
        const std::int64_t begin = rows.indptr[r];
        const std::int64_t end = rows.indptr[r + 1];
        if (begin < 0 || end > std::ssize(rows.ids)) fail_changed(name);
        for (std::int64_t i = begin; i < end; ++i) {
            const Index found = index.find(rows.ids[static_cast<std::size_t>(i)]);
            if (found == kNone) {
                if (strangers) continue;
                fail_changed(name);
            }
            ascending = ascending && (std::ssize(out.items) == start || out.items.back() <= found);
            out.items.push_back(found);
        }
        if (!ascending) std::sort(out.items.begin() + start, out.items.end());
        const auto twice = std::adjacent_find(out.items.begin() + start, out.items.end());
        if (twice != out.items.end()) {
            std::int64_t id = -1;
            for (std::int64_t i = begin; i < end; ++i) {
                id = rows.ids[static_cast<std::size_t>(i)];
                if (index.find(id) == *twice) break;
            }
            fail(std::string(name) + "[" + std::to_string(r) + "] lists block " +
                 std::to_string(id) + " twice; ids within one must be distinct");
        }
        out.close_row();
    }
    return out;
}

void take_sizes(const PackRequest& request, Problem& problem) {
    constexpr auto kMostCapacity =
        static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (request.capacity == 0 || request.capacity > kMostCapacity) {
        fail("capacity must be 1 to 2^63 - 1, not " + std::to_string(request.capacity));
    }
    problem.capacity = request.capacity;
    if (request.sizes.empty()) return;
    if (request.sizes.size() != problem.blocks()) {
        fail("sizes has " + std::to_string(request.sizes.size()) + " entries for " +
             std::to_string(problem.blocks()) +
             " distinct blocks; give one per distinct id, in ascending order of ids");
    }
    problem.sizes.reserve(problem.blocks());
    std::uint64_t total = 0;
    for (std::size_t b = 0; b < problem.blocks(); ++b) {
        const std::int64_t size = request.sizes[b];
        if (size < 1 || static_cast<std::uint64_t>(size) > request.capacity) {
            fail("sizes: block " + std::to_string(problem.ids[b]) + " has size " +
                 std::to_string(size) + ", but must have 1 to " + std::to_string(request.capacity) +
                 " bytes to fit a page; use smaller blocks or larger pages");
        }
        total += static_cast<std::uint64_t>(size);
        if (total > kMostCapacity) fail("sizes add up to 2^63 bytes or more");
        problem.sizes.push_back(static_cast<std::uint64_t>(size));
    }
}

/// Weights as integers of 24 bits, so that sums are exact and ties are ties on every machine. A
/// model that is never called keeps weight 1: its reads decide between equals.
std::vector<std::int64_t> take_weights(std::span<const double> weights, std::size_t models) {
    if (weights.empty()) return std::vector<std::int64_t>(models, 1);
    if (weights.size() != models) {
        fail("weights has " + std::to_string(weights.size()) + " entries for " +
             std::to_string(models) + " models");
    }
    double top = 0;
    for (std::size_t m = 0; m < models; ++m) {
        if (!std::isfinite(weights[m]) || weights[m] < 0) {
            fail("weights[" + std::to_string(m) + "] is " + detail::number_text(weights[m]) +
                 "; weights are finite and not negative");
        }
        top = std::max(top, weights[m]);
    }
    std::vector<std::int64_t> out(models, 1);
    if (top == 0 ||
        std::ranges::adjacent_find(weights, std::ranges::not_equal_to{}) == weights.end()) {
        return out;
    }
    constexpr double kScale = 1 << 24;
    for (std::size_t m = 0; m < models; ++m) {
        out[m] = std::max<std::int64_t>(1, std::llround(weights[m] / top * kScale));
    }
    return out;
}

/// Drops the blocks that `placed` marks.
Rows without(const Rows& rows, const std::vector<bool>& placed) {
    Rows out;
    out.indptr.reserve(rows.indptr.size());
    for (std::size_t r = 0; r < rows.size(); ++r) {
        for (const Index b : rows.row(r)) {
            if (!placed[b]) out.items.push_back(b);
        }
        out.close_row();
    }
    return out;
}

}  // namespace

Problem make_problem(const PackRequest& request) {
    check_rows(request.owners, "owners");
    check_rows(request.existing, "existing");
    Problem problem;
    IdIndex index(request.owners.ids, problem.ids);
    problem.owned = renumber(request.owners, index, "owners", false);
    std::vector<bool> has_owner(problem.blocks(), false);
    for (const Index b : problem.owned.items) has_owner[b] = true;
    if (std::ranges::find(has_owner, false) != has_owner.end()) fail_changed("owners");
    take_sizes(request, problem);
    problem.weights = take_weights(request.weights, problem.models());
    // Equal sizes are block counts in disguise, and those pack to the bound exactly.
    if (!problem.unit() &&
        std::ranges::adjacent_find(problem.sizes, std::not_equal_to{}) == problem.sizes.end()) {
        problem.capacity /= problem.sizes.front();
        problem.sizes.clear();
    }
    std::vector<std::uint64_t> amounts;
    problem.least_reads.reserve(problem.models());
    for (std::size_t m = 0; m < problem.models(); ++m) {
        amounts.clear();
        for (const Index b : problem.owned.row(m)) amounts.push_back(problem.amount(b));
        problem.least_reads.push_back(
            static_cast<std::int64_t>(least_pages(amounts, problem.capacity)));
    }

    const Rows pages = renumber(request.existing, index, "existing", true);
    problem.existing_pages = pages.size();
    std::vector<bool> placed(problem.blocks(), false);
    for (const Index b : pages.items) {
        if (placed[b]) problem.existing_reads_are_forced = false;
        placed[b] = true;
    }
    problem.existing_reads = choose_existing(problem.owned, pages, problem.blocks());
    if (!pages.items.empty()) problem.owned = without(problem.owned, placed);

    amounts.clear();
    for (Index b = 0; b < problem.blocks(); ++b) {
        if (!placed[b]) amounts.push_back(problem.amount(b));
    }
    problem.new_blocks = amounts.size();
    problem.lower_bound =
        static_cast<std::int64_t>(problem.existing_pages + least_pages(amounts, problem.capacity));
    return problem;
}

}  // namespace pydedup::packing
