// SPDX-License-Identifier: Apache-2.0
// Choosing how a delta is coded: what the writer is free to do. Private to codec/. Integer
// arithmetic throughout, so that every machine chooses the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/delta_model.hpp"

namespace pydedup::detail {

/// The differences of a block (or of a sample of its rows), contiguous.
struct Differences {
    std::size_t rows;
    std::size_t cols;
    DeltaLayout layout;        ///< of the base's elements
    const std::uint8_t* base;  ///< rows * cols elements
    const void* z;             ///< u32 each, u64 when wide
    bool wide;
    const std::uint8_t* classes;  ///< of each z
    bool masked;                  ///< elements of the base are 0 because the block's are

    [[nodiscard]] std::size_t count() const noexcept { return rows * cols; }
};

/// Calls write(z) with the numbers as they are, of 4 or 8 bytes.
template <class Write>
void with_numbers(const Differences& d, const Write& write) {
    if (d.wide) {
        write(static_cast<const std::uint64_t*>(d.z));
    } else {
        write(static_cast<const std::uint32_t*>(d.z));
    }
}

struct DeltaPlan {
    std::size_t count = 0;  ///< of elements
    DeltaLayout layout{};   ///< of the differences
    Alphabet alphabet;
    Contexts contexts;
    std::vector<std::uint32_t> histogram;  ///< [context * 256 + symbol]
    std::uint64_t symbol_bits = 0;         ///< estimated: entropy, at least a bit a symbol
    std::uint64_t raw_bits = 0;
    std::uint64_t table_bits = 0;  ///< estimated
};

/// Memory that planning needs, an entry per element each.
struct PlanRoom {
    std::uint8_t* symbols;   ///< the result: alphabet symbols
    std::uint8_t* contexts;  ///< the result: contexts
    std::uint8_t* features;
};

/// How rows are told apart: by what the differences are (exact ones), or by how large they are on
/// average (quantised ones).
enum class RowScore : std::uint8_t { kind, activity };

void plan_delta(const Differences& differences, RowScore score, const CodecKernels& codec,
                const PlanRoom& room, DeltaPlan& plan);

/// Plans as another block was planned, with codes of its own: several times as fast. False when
/// that block has another size, its differences are of another dtype, its rows were told apart or
/// little in it changed, or when this one takes more or less room than that one did.
[[nodiscard]] bool plan_alike(const Differences& differences, const CodecKernels& codec,
                              const PlanRoom& room, const DeltaPlan& like, DeltaPlan& plan);

/// Optimal codes for the plan's histogram, and the bits that the symbols take with them.
[[nodiscard]] std::uint64_t plan_codes(const DeltaPlan& plan, Codes& codes);

}  // namespace pydedup::detail
