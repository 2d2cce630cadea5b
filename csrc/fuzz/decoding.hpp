// SPDX-License-Identifier: Apache-2.0
// What the targets that decode blocks share.
#pragma once

#include <cstddef>
#include <vector>

#include "fuzz.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/error.hpp"

namespace pydedup::fuzz {

/// Memory for the rows of a block, with bytes between them that must stay as they are.
class Gapped {
  public:
    explicit Gapped(const BlockView& block)
        : stride(block.row_bytes() + kGap), memory(block.rows * stride, kUntouched) {}

    void check_gaps(const BlockView& block) const {
        for (std::size_t r = 0; r < block.rows; ++r) {
            for (std::size_t i = block.row_bytes(); i < stride; ++i) {
                require(memory[r * stride + i] == kUntouched, "gaps stay untouched");
            }
        }
    }

    std::size_t stride;
    std::vector<std::byte> memory;

  private:
    static constexpr std::size_t kGap = 5;
    static constexpr std::byte kUntouched{0xA5};
};

/// Decoding may refuse what it was given with such an error, and with no other.
inline void check_refusal(const Error& error) {
    require(error.code() == ErrorCode::corrupt_page ||
                error.code() == ErrorCode::unsupported_format ||
                error.code() == ErrorCode::invalid_argument,
            "an error that says what is wrong with the block");
}

}  // namespace pydedup::fuzz
