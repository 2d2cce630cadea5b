// SPDX-License-Identifier: Apache-2.0
// What a matrix product knows before it knows types: which blocks come, where in the grid each of
// them belongs, and which rows of x have it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "gemm/weights.hpp"
#include "pydedup/error.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup {

class Matmul::Impl {
  public:
    explicit Impl(const Problem& problem) : p_(problem) {
        const auto& places = p_.places;
        for (std::size_t i = 0; i < places.size(); ++i) {
            const std::size_t before = i == 0 ? 0 : places[i - 1];
            if (places[i] < before || places[i] > before + (i == 0 ? 0 : 1)) {
                throw Error(ErrorCode::invalid_argument,
                            "place " + std::to_string(places[i]) + " follows on " +
                                std::to_string(before) + "; places ascend and leave none out");
            }
        }
        if (!places.empty() && places.back() + std::size_t{1} != p_.grid.count()) {
            throw Error(ErrorCode::invalid_argument, "places end at " +
                                                         std::to_string(places.back()) + " of " +
                                                         std::to_string(p_.grid.count()));
        }
    }
    virtual ~Impl() = default;

    void feed(std::span<const BlockView> blocks, std::span<const std::uint64_t> members) {
        if (!members.empty() && (members.size() != blocks.size() || p_.variants == nullptr)) {
            throw Error(ErrorCode::invalid_argument,
                        "members of " + std::to_string(members.size()) + " blocks came with " +
                            std::to_string(blocks.size()) + " blocks" +
                            (p_.variants == nullptr ? " for rows of one variant" : ""));
        }
        if (blocks.size() > count() - fed_) {
            throw Error(ErrorCode::invalid_argument, std::to_string(fed_ + blocks.size()) +
                                                         " blocks were fed to a matrix of " +
                                                         std::to_string(count()));
        }
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            detail::check_block(blocks[i], p_.grid, p_.weights, place(fed_ + i));
        }
        members_ = members;
        if (!blocks.empty() && p_.m != 0) multiply(blocks);
        members_ = {};
        fed_ += blocks.size();
    }

    [[nodiscard]] std::size_t fed() const noexcept { return fed_; }

  protected:
    virtual void multiply(std::span<const BlockView> blocks) = 0;

    /// How many blocks there will be, and where in the grid each of them belongs.
    [[nodiscard]] std::size_t count() const noexcept {
        return p_.places.empty() ? p_.grid.count() : p_.places.size();
    }
    [[nodiscard]] std::size_t place(std::size_t number) const noexcept {
        return p_.places.empty() ? number : p_.places[number];
    }
    /// The first block at or behind a place.
    [[nodiscard]] std::size_t first_from(std::size_t at) const noexcept {
        if (p_.places.empty()) return at;
        return static_cast<std::size_t>(std::lower_bound(p_.places.begin(), p_.places.end(), at) -
                                        p_.places.begin());
    }

    /// The variants that have block `number`, which is one of this call.
    [[nodiscard]] std::uint64_t members_of(std::size_t number) const noexcept {
        return members_.empty() ? ~std::uint64_t{0} : members_[number - fed_];
    }

    /// Whether a row of x has block `number`, which is one of this call.
    [[nodiscard]] bool has(std::size_t number, std::size_t row) const noexcept {
        return (members_of(number) >> p_.variants[row] & 1) != 0;
    }

    /// Calls use(begin, end) for each run of rows within [i0, i1) that have the block.
    template <class Use>
    void for_rows_with(std::size_t number, std::size_t i0, std::size_t i1, const Use& use) const {
        if (members_.empty()) {
            use(i0, i1);
            return;
        }
        for (std::size_t begin = i0; begin < i1;) {
            std::size_t end = begin;
            while (end < i1 && has(number, end)) ++end;
            if (end > begin) use(begin, end);
            begin = end + 1;
        }
    }

    const Problem p_;
    std::size_t fed_ = 0;
    std::span<const std::uint64_t> members_;  // of the blocks of this call
};

}  // namespace pydedup
