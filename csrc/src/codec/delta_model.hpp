// SPDX-License-Identifier: Apache-2.0
// What the coded form of a delta consists of (docs/format.md, "Deltas"): an alphabet of symbols,
// contexts that say which code an element uses, and the codes. Private to codec/.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/codec_kernels.hpp"
#include "pydedup/types.hpp"

namespace pydedup::detail {

/// Deltas are written as the oldest version that can describe them.
inline constexpr std::uint8_t kDeltaVersion = 5;
/// Of this version are deltas of a narrower dtype (narrow.hpp) or with a mask (zero_mask.hpp), and
/// no others; of the next one those with factors (low_rank.hpp), then those whose base is
/// transposed (transposed.hpp), with factors or without, and of the last one those with neither of
/// both that have the form `listed`.
inline constexpr std::uint8_t kExtendedDeltaVersion = 2;
inline constexpr std::uint8_t kLowRankDeltaVersion = 3;
inline constexpr std::uint8_t kTransposedDeltaVersion = 4;
inline constexpr std::uint8_t kListedDeltaVersion = 5;
inline constexpr std::size_t kDeltaHeaderBytes = 12;
inline constexpr std::size_t kStepBytes = 8;
inline constexpr unsigned kMaxGroups = 8;

/// Whether deltas of this version have a base that is moved by factors, or transposed.
[[nodiscard]] constexpr bool moves_base(std::uint8_t version) noexcept {
    return version == kLowRankDeltaVersion || version == kTransposedDeltaVersion;
}

/// `changed` where moves_base() only, `listed` of kListedDeltaVersion only.
enum class DeltaForm : std::uint8_t { sparse = 0, coded = 1, changed = 2, listed = 3 };

/// Whether deltas of this version may have that form.
[[nodiscard]] constexpr bool has_form(std::uint8_t version, std::uint8_t form) noexcept {
    switch (static_cast<DeltaForm>(form)) {
        case DeltaForm::sparse:
        case DeltaForm::coded:
            return true;
        case DeltaForm::changed:
            return moves_base(version);
        case DeltaForm::listed:
            return version == kListedDeltaVersion;
    }
    return false;
}

enum class Feature : std::uint8_t { none = 0, exponent = 1, mantissa = 2 };

[[nodiscard]] DeltaLayout delta_layout(Dtype dtype) noexcept;

/// Dictionary entries first, each one value of z, then classes of z with raw bits behind them.
struct Alphabet {
    unsigned n_dictionary = 0;
    unsigned first_class = 0;
    unsigned n_classes = 0;
    std::array<std::uint64_t, 256> bases{};  ///< ascending within the dictionary
    std::array<std::uint8_t, 256> widths{};  ///< raw bits behind the symbol

    [[nodiscard]] unsigned n_symbols() const noexcept { return n_dictionary + n_classes; }
    /// Fills in bases and widths of the classes.
    void set_classes(unsigned first, unsigned count) noexcept;
};

[[nodiscard]] constexpr unsigned class_width(unsigned z_class) noexcept {
    return z_class < 4 ? 0 : z_class / 2 - 1;
}

/// Rows with something in common: which feature of the base chooses among their contexts.
struct RowGroup {
    Feature feature = Feature::none;
    unsigned n_contexts = 1;
    std::array<std::uint8_t, kMaxContexts> first{};  ///< first feature value of each; first[0] = 0
};

struct Contexts {
    std::vector<RowGroup> groups;
    std::vector<std::uint8_t> group_of_row;  ///< empty when there is one group
    std::uint32_t reference_exponent = 0;
    unsigned n_contexts = 0;

    [[nodiscard]] bool uses(Feature feature) const noexcept;
    [[nodiscard]] unsigned group(std::size_t row) const noexcept {
        return group_of_row.empty() ? 0 : group_of_row[row];
    }
};

/// contexts[i] of each element; `feature` has room for as many.
void assign_contexts(const Contexts& model, const std::uint8_t* base, std::size_t rows,
                     std::size_t cols, DeltaLayout layout, const CodecKernels& codec,
                     std::uint8_t* feature, std::uint8_t* contexts) noexcept;

/// Bits of each symbol's code; all 0 in a context that codes nothing, or whose only symbol is
/// `single`.
struct ContextCode {
    std::array<std::uint8_t, 256> bits{};
    std::uint8_t first = 0;  ///< and last symbol with bits, where there is no `single`
    std::uint8_t last = 0;
    std::int16_t single = -1;
    bool used = false;
};

using Codes = std::vector<ContextCode>;

[[nodiscard]] unsigned longest_code(const Codes& codes) noexcept;

/// One code (code << 8 | bits) per context and symbol, for writing.
void make_codes(const Codes& codes, std::vector<std::uint32_t>& table);

/// The table that is read by, which only grows; false when a context's bits are not those of a
/// complete code.
[[nodiscard]] bool make_read_table(const Codes& codes, unsigned table_bits,
                                   std::vector<std::uint16_t>& table);

/// A byte sink and a byte source for the parts in front of the streams.
using Sink = std::vector<std::uint8_t>;

void put_varint(Sink& sink, std::uint64_t value);

[[nodiscard]] constexpr std::size_t varint_bytes(std::uint64_t value) noexcept {
    return (static_cast<std::size_t>(std::bit_width(value | 1)) + 6) / 7;
}

struct Source {
    std::span<const std::uint8_t> left;
    bool failed = false;

    std::uint8_t byte() noexcept;
    std::uint64_t varint() noexcept;
    std::span<const std::uint8_t> take(std::size_t count) noexcept;
};

void put_alphabet(Sink& sink, const Alphabet& alphabet);
void put_contexts(Sink& sink, const Contexts& contexts, std::size_t rows);
void put_code_bits(Sink& sink, const Codes& codes);

/// Each returns nullptr, or what is wrong.
[[nodiscard]] const char* get_alphabet(Source& source, unsigned value_bits, Alphabet& alphabet);
[[nodiscard]] const char* get_contexts(Source& source, std::size_t rows, DeltaLayout layout,
                                       Contexts& contexts);
[[nodiscard]] const char* get_code_bits(Source& source, unsigned n_contexts, unsigned n_symbols,
                                        Codes& codes);

}  // namespace pydedup::detail
