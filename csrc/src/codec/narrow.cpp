// SPDX-License-Identifier: Apache-2.0
#include "codec/narrow.hpp"

#include <array>
#include <cstring>

#include "codec/convert.hpp"

namespace pydedup::detail {
namespace {

constexpr std::array kNarrow = {Dtype::bf16, Dtype::f16, Dtype::f32};

// Whether the bits of all elements that no narrower dtype has are 0; most blocks end this at once.
template <class Word>
bool has_short_mantissas(const MatrixRef& block, unsigned unused_bits) noexcept {
    const auto unused = static_cast<Word>((Word{1} << unused_bits) - 1);
    for (std::size_t r = 0; r < block.rows; ++r) {
        Word any = 0;
        for (std::size_t c = 0; c < block.cols; ++c) {
            Word word;
            std::memcpy(&word, block.data + r * block.stride_bytes + c * sizeof word, sizeof word);
            any = static_cast<Word>(any | word);
        }
        if ((any & unused) != 0) return false;
    }
    return true;
}

}  // namespace

bool is_narrower(Dtype narrow, Dtype wide) noexcept {
    return converts(narrow, wide) && item_bytes(narrow) < item_bytes(wide);
}

std::optional<NarrowBlock> narrowed(const MatrixRef& block) {
    // f16 has 13 bits of mantissa less than f32, and that 29 less than f64.
    if (block.dtype == Dtype::f32) {
        if (!has_short_mantissas<std::uint32_t>(block, 13)) return std::nullopt;
    } else if (block.dtype != Dtype::f64 || !has_short_mantissas<std::uint64_t>(block, 29)) {
        return std::nullopt;
    }
    const std::size_t count = block.rows * block.cols;
    const std::size_t bytes = count * item_bytes(block.dtype);
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    const auto memory = std::make_unique_for_overwrite<std::uint8_t[]>(2 * bytes);
    std::uint8_t* const wide = memory.get();
    std::uint8_t* const back = wide + bytes;
    for (std::size_t r = 0; r < block.rows; ++r) {
        std::memcpy(wide + r * row_bytes, block.data + r * block.stride_bytes, row_bytes);
    }
    for (const Dtype dtype : kNarrow) {
        if (!is_narrower(dtype, block.dtype)) continue;
        const std::size_t narrow_row = block.cols * item_bytes(dtype);
        auto of = std::make_unique_for_overwrite<std::uint8_t[]>(block.rows * narrow_row);
        convert_floats(wide, block.dtype, count, of.get(), dtype);
        convert_floats(of.get(), dtype, count, back, block.dtype);
        if (std::memcmp(wide, back, bytes) != 0) continue;
        const auto* const data = reinterpret_cast<const std::byte*>(of.get());
        return NarrowBlock{{data, block.rows, block.cols, narrow_row, dtype}, std::move(of)};
    }
    return std::nullopt;
}

}  // namespace pydedup::detail
