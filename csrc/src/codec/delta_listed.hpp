// SPDX-License-Identifier: Apache-2.0
// Differences of which most are 0, as lists of where the frequent ones are and one of all others
// (docs/format.md, "Listed form"): a code for each element takes a bit at least. Private to codec/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/delta_model.hpp"
#include "codec/delta_plan.hpp"

namespace pydedup::detail {

/// Whether so few elements have changed that this form may be the smallest.
[[nodiscard]] constexpr bool may_be_listed(std::size_t n_changed, std::size_t count) noexcept {
    return n_changed != 0 && n_changed <= count / 2;
}

/// The same, where it is known how the elements would be coded; it is not asked of the elements.
[[nodiscard]] bool may_be_listed(const DeltaPlan& plan) noexcept;

/// Where the elements are that changed, and which values have lists of their own.
struct ListedPlan {
    /// Values below this may have one.
    static constexpr std::size_t kValues = 512;

    /// `z` is u32 or u64 of each element, of which `n_changed` are not 0; they are a sample of
    /// `scale` times as many.
    template <class Wide>
    ListedPlan(const Wide* z, std::size_t count, std::size_t n_changed, double scale = 1);

    /// About how many bytes put_listed() writes, if these elements are such a sample.
    [[nodiscard]] double bytes(double scale = 1) const noexcept;

    std::size_t count;
    std::vector<std::uint32_t> changed;
    std::vector<std::uint16_t> values;          ///< that have a list, ascending
    std::array<std::uint32_t, kValues> n_of{};  ///< elements of each value; of 0: in no such list
    std::uint64_t other_bytes = 0;              ///< of the values in no such list
};

template <class Wide>
void put_listed(Sink& sink, const Wide* z, const ListedPlan& plan);

/// Reads all that is left. Returns nullptr, or what is wrong.
template <class Wide>
[[nodiscard]] const char* get_listed(Source& source, std::size_t count, unsigned value_bits,
                                     Wide* z);

}  // namespace pydedup::detail
