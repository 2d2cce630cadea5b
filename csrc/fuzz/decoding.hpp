// SPDX-License-Identifier: Apache-2.0
// What the targets that decode blocks share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
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

/// A delta on a base that is transposed, or moved by factors of rank 2, as encode_delta() makes one
/// without.
inline std::optional<EncodedBlock> encode_moved(const MatrixRef& block, const MatrixRef& base,
                                                std::optional<double> max_rel_error,
                                                std::span<std::byte> out, bool factored,
                                                bool transposed) {
    const std::vector<std::int32_t> of_rows(2 * block.rows, 3), of_cols(2 * block.cols, -77);
    const std::int64_t first = 0;
    const LowRankFactors factors{2, -30, of_rows, of_cols, {&first, 1}, {&first, 1}};
    const BlockGrid grid{block.rows, block.cols, block.rows, block.cols};
    const BlockGrid of_base{base.rows, base.cols, base.rows, base.cols};
    const auto limit = static_cast<std::int64_t>(out.size()) - 1;
    std::int64_t offset = 0;
    EncodedBlock delta{Encoding::delta, 0};
    static_cast<void>(encode_deltas(block, grid, {&first, 1}, {base, of_base, {&first, 1}},
                                    {&limit, 1}, max_rel_error, out, {&offset, 1}, {&delta, 1}, 1,
                                    factored ? &factors : nullptr, transposed));
    return delta.length != 0 ? std::optional(delta) : std::nullopt;
}

/// A block as it is encoded, away from its page.
inline std::vector<std::byte> copy_alone(const BlockView& block) {
    std::vector<std::byte> bytes(encoded_bytes(block));
    copy_encoded(block, bytes);
    return bytes;
}

/// Decoding may refuse what it was given with such an error, and with no other.
inline void check_refusal(const Error& error) {
    require(error.code() == ErrorCode::corrupt_page ||
                error.code() == ErrorCode::unsupported_format ||
                error.code() == ErrorCode::invalid_argument,
            "an error that says what is wrong with the block");
}

}  // namespace pydedup::fuzz
