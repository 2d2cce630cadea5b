// SPDX-License-Identifier: Apache-2.0
// Elements that became 0, as those of a pruned model: a difference to the base would spell out
// each element of the base that is gone, so a bit of a mask says it (docs/format.md, "Masks"), and
// the delta is one on the masked base. Private to codec/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "codec/delta_model.hpp"

namespace pydedup::detail {

struct ZeroMask {
    /// Zeros have the sign of the base's element, as after a multiplication by 0; else none.
    bool keeps_sign = false;
    /// All elements of the base up to this magnitude (its bits without the sign, as an integer)
    /// became 0, and hardly any others: so it is where the least were pruned. 0 where it is not so.
    std::uint64_t threshold = 0;
    std::size_t n_set = 0;           ///< on reading it is not known
    std::vector<std::uint8_t> bits;  ///< else: element i is bit i % 8 of byte i / 8
};

/// The elements of `block` that are 0, of either sign, where those of `base` are not; nullopt when
/// they are fewer than 1/64 of all, which a delta says as well.
[[nodiscard]] std::optional<ZeroMask> find_zeros(const std::uint8_t* block,
                                                 const std::uint8_t* base, std::size_t count,
                                                 DeltaLayout layout);

/// masked[i] = base[i], or 0 where the mask says so. Others may have become 0 besides.
void apply_mask(const ZeroMask& mask, const std::uint8_t* base, std::size_t count,
                DeltaLayout layout, std::uint8_t* masked) noexcept;

/// A mask, or that there is none.
void put_mask(Sink& sink, const std::optional<ZeroMask>& mask, DeltaLayout layout);

/// About how many bits the mask of `count` elements takes.
[[nodiscard]] std::uint64_t mask_bits(const ZeroMask& mask, std::size_t count) noexcept;

/// Reads the mask of `count` elements, if there is one. Returns nullptr, or what is wrong.
[[nodiscard]] const char* get_mask(Source& source, std::size_t count, DeltaLayout layout,
                                   std::optional<ZeroMask>& mask);

}  // namespace pydedup::detail
