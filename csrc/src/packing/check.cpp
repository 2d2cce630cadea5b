// SPDX-License-Identifier: Apache-2.0
// Proves layouts with sorted arrays and counting only; shares nothing with the packers but the
// public header, so that a mistake there does not hide itself here.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "pydedup/error.hpp"
#include "pydedup/packing.hpp"

namespace pydedup {
namespace {

[[noreturn]] void violation(const std::string& what) {
    throw Error(ErrorCode::invalid_argument, "layout violates its request: " + what);
}

std::string text(std::int64_t number) { return std::to_string(number); }

class Checker {
  public:
    Checker(const PackRequest& request, const LayoutClaim& claim)
        : request_(request), claim_(claim) {
        check_pointers(request.owners, "owners");
        check_pointers(request.existing, "existing");
        check_pointers(claim.pages, "pages");
        check_pointers(claim.reads, "reads");
        ids_.assign(request.owners.ids.begin(), request.owners.ids.end());
        std::ranges::sort(ids_);
        const auto repeated = std::ranges::unique(ids_);
        ids_.erase(repeated.begin(), repeated.end());
        if (!request.sizes.empty() && request.sizes.size() != ids_.size()) {
            violation("sizes are given for " + std::to_string(request.sizes.size()) + " of " +
                      std::to_string(ids_.size()) + " distinct blocks");
        }
        if (std::ranges::any_of(request.sizes, [](std::int64_t size) { return size < 1; })) {
            violation("sizes has an entry below 1");
        }
        existing_ = rows(request.existing);
        if (rows(claim.reads) != rows(request.owners)) {
            violation("it has reads of " + text(rows(claim.reads)) + " models, not of " +
                      text(rows(request.owners)));
        }
    }

    void check_pages() {
        std::vector<std::int64_t> copies(ids_.size(), 0);
        std::vector<std::int64_t> seen_on(ids_.size(), -1);
        for (std::int64_t page = 0; page < existing_; ++page) {
            for (const std::int64_t id : row(request_.existing, page)) {
                const std::int64_t at = find(id);
                if (at >= 0) copies[index(at)] = -1;
            }
        }
        for (std::int64_t page = 0; page < rows(claim_.pages); ++page) {
            const auto blocks = row(claim_.pages, page);
            if (blocks.empty()) violation("new page " + text(page) + " is empty");
            std::uint64_t room = request_.capacity;
            for (const std::int64_t id : blocks) {
                const std::int64_t at = find(id);
                if (at < 0) {
                    violation("block " + text(id) + " on new page " + text(page) +
                              " belongs to no model");
                }
                if (std::exchange(seen_on[index(at)], page) == page) {
                    violation("block " + text(id) + " is twice on new page " + text(page));
                }
                if (copies[index(at)] < 0) {
                    violation("block " + text(id) + " on new page " + text(page) +
                              " is on an existing page already");
                }
                if (++copies[index(at)] > 1 && !promises_exact_cover(request_.algorithm)) {
                    violation("block " + text(id) + " is stored on several new pages");
                }
                // Sizes are a claim too: a sum of them may overflow.
                if (size_of(at) > room) {
                    violation("new page " + text(page) + " holds more than its capacity " +
                              std::to_string(request_.capacity));
                }
                room -= size_of(at);
            }
        }
        for (std::size_t at = 0; at < ids_.size(); ++at) {
            if (copies[at] == 0) violation("block " + text(ids_[at]) + " is on no page");
        }
    }

    void check_reads() {
        std::vector<std::int64_t> owner(ids_.size(), -1);
        std::vector<std::int64_t> covered_for(ids_.size(), -1);
        for (std::int64_t model = 0; model < rows(claim_.reads); ++model) {
            for (const std::int64_t id : row(request_.owners, model)) owner[find_owned(id)] = model;
            std::int64_t last = -1;
            for (const std::int64_t page : row(claim_.reads, model)) {
                if (page <= last || page >= existing_ + rows(claim_.pages)) {
                    violation("reads of model " + text(model) +
                              " are not ascending page numbers: " + text(page) + " after " +
                              text(last));
                }
                last = page;
                const bool is_new = page >= existing_;
                bool useful = false;
                for (const std::int64_t id :
                     is_new ? row(claim_.pages, page - existing_) : row(request_.existing, page)) {
                    const std::int64_t at = find(id);
                    if (at >= 0 && owner[index(at)] == model) {
                        useful = true;
                        covered_for[index(at)] = model;
                    } else if (is_new && promises_exact_cover(request_.algorithm)) {
                        violation("model " + text(model) + " reads page " + text(page) +
                                  ", whose block " + text(id) + " it does not own");
                    }
                }
                if (!useful) {
                    violation("model " + text(model) + " reads page " + text(page) +
                              " but owns no block there");
                }
            }
            for (const std::int64_t id : row(request_.owners, model)) {
                if (covered_for[find_owned(id)] != model) {
                    violation("block " + text(id) + " of model " + text(model) +
                              " is on no page that the model reads");
                }
            }
        }
    }

  private:
    static void check_pointers(const IdRows& list, const char* name) {
        const auto p = list.indptr;
        const bool well_formed = p.empty()
                                     ? list.ids.empty()
                                     : p.front() == 0 && std::ranges::is_sorted(p) &&
                                           p.back() == static_cast<std::int64_t>(list.ids.size());
        if (!well_formed) violation(std::string("row pointers of ") + name + " are malformed");
    }

    static std::int64_t rows(const IdRows& list) {
        return list.indptr.empty() ? 0 : static_cast<std::int64_t>(list.indptr.size()) - 1;
    }

    static std::span<const std::int64_t> row(const IdRows& list, std::int64_t i) {
        const auto begin = static_cast<std::size_t>(list.indptr[index(i)]);
        const auto end = static_cast<std::size_t>(list.indptr[index(i) + 1]);
        // Checked before; but the arrays are borrowed, and somebody may write into them.
        if (begin > end || end > list.ids.size()) violation("row pointers changed meanwhile");
        return list.ids.subspan(begin, end - begin);
    }

    static std::size_t index(std::int64_t at) { return static_cast<std::size_t>(at); }

    [[nodiscard]] std::int64_t find(std::int64_t id) const {
        const auto at = std::ranges::lower_bound(ids_, id);
        return at == ids_.end() || *at != id ? -1 : at - ids_.begin();
    }

    [[nodiscard]] std::size_t find_owned(std::int64_t id) const {
        const std::int64_t at = find(id);
        if (at < 0) violation("owners changed meanwhile");
        return index(at);
    }

    [[nodiscard]] std::uint64_t size_of(std::int64_t at) const {
        return request_.sizes.empty() ? 1 : static_cast<std::uint64_t>(request_.sizes[index(at)]);
    }

    const PackRequest& request_;
    const LayoutClaim& claim_;
    std::vector<std::int64_t> ids_;  // owned by any model, ascending
    std::int64_t existing_ = 0;
};

}  // namespace

void check_layout(const PackRequest& request, const LayoutClaim& claim) {
    Checker checker(request, claim);
    checker.check_pages();
    checker.check_reads();
}

}  // namespace pydedup
