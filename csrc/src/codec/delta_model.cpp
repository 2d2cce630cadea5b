// SPDX-License-Identifier: Apache-2.0
// The coded form of a delta in memory: symbols, contexts and codes, and the tables that codes are
// written and read by. Their bytes are in delta_model_bytes.cpp.
#include "codec/delta_model.hpp"

#include <algorithm>
#include <cstring>

namespace pydedup::detail {

DeltaLayout delta_layout(Dtype dtype) noexcept {
    const auto item = static_cast<std::uint8_t>(item_bytes(dtype));
    switch (dtype) {
        case Dtype::f64:
            return {item, 11, 52, true};
        case Dtype::f32:
            return {item, 8, 23, true};
        case Dtype::f16:
            return {item, 5, 10, true};
        case Dtype::bf16:
            return {item, 8, 7, true};
        case Dtype::f8_e4m3:
        case Dtype::f8_e5m2:
            return {item, 0, 0, true};
        default:
            return {item, 0, 0, false};
    }
}

void Alphabet::set_classes(unsigned first, unsigned count) noexcept {
    first_class = first;
    n_classes = count;
    for (unsigned i = 0; i < count; ++i) {
        const unsigned z_class = first + i;
        const unsigned width = class_width(z_class);
        widths[n_dictionary + i] = static_cast<std::uint8_t>(width);
        bases[n_dictionary + i] =
            z_class < 4 ? z_class : (2U | std::uint64_t{z_class & 1}) << width;
    }
}

bool Contexts::uses(Feature feature) const noexcept {
    return std::any_of(groups.begin(), groups.end(),
                       [&](const RowGroup& group) { return group.feature == feature; });
}

void assign_contexts(const Contexts& model, const std::uint8_t* base, std::size_t rows,
                     std::size_t cols, DeltaLayout layout, const CodecKernels& codec,
                     std::uint8_t* feature, std::uint8_t* contexts) noexcept {
    std::array<std::uint8_t, kMaxGroups> first_context{};
    unsigned next = 0;
    for (std::size_t g = 0; g < model.groups.size(); ++g) {
        first_context[g] = static_cast<std::uint8_t>(next);
        next += model.groups[g].n_contexts;
    }
    const std::size_t row_bytes = cols * layout.item_bytes;
    // One group is one long row.
    const bool one = model.groups.size() == 1;
    const std::size_t n_runs = one ? 1 : rows;
    const std::size_t run = one ? rows * cols : cols;
    for (std::size_t r = 0; r < n_runs; ++r) {
        const unsigned g = model.group(r);
        const RowGroup& group = model.groups[g];
        const std::uint8_t* const from = base + r * row_bytes;
        std::uint8_t* const to = contexts + r * run;
        if (group.n_contexts == 1) {
            std::memset(to, first_context[g], run);
            continue;
        }
        if (group.feature == Feature::exponent) {
            codec.delta.exponents(from, run, layout, model.reference_exponent, feature);
        } else {
            codec.delta.mantissas(from, run, layout, feature);
        }
        codec.delta.map_features(feature, run, group.first.data(), group.n_contexts,
                                 first_context[g], to);
    }
}

unsigned longest_code(const Codes& codes) noexcept {
    unsigned longest = 1;
    for (const ContextCode& code : codes) {
        for (std::size_t s = code.first; s <= code.last; ++s) {
            longest = std::max<unsigned>(longest, code.bits[s]);
        }
    }
    return longest;
}

namespace {

using OfLength = std::array<std::uint32_t, kMaxCodeBits + 1>;

OfLength symbols_of_length(const ContextCode& code) noexcept {
    OfLength of_length{};
    for (std::size_t s = code.first; s <= code.last; ++s) ++of_length[code.bits[s]];
    return of_length;
}

// First code of each length, left-aligned to `max_bits`; false when incomplete.
bool first_codes(const OfLength& of_length, unsigned max_bits, OfLength& start) noexcept {
    std::uint32_t at = 0;
    for (unsigned bits = 1; bits <= max_bits; ++bits) {
        start[bits] = at;
        at += of_length[bits] << (max_bits - bits);
    }
    return at == 1U << max_bits;
}

// Entries that are stored at once, the ones behind a run included, which are overwritten then.
constexpr std::size_t kStored = 16;

void fill_run(std::uint16_t* to, std::size_t run, std::uint16_t entry) noexcept {
    std::array<std::uint16_t, kStored> stored;
    stored.fill(entry);
    std::size_t i = 0;
    do {
        std::memcpy(to + i, stored.data(), sizeof stored);
        i += kStored;
    } while (i < run);
}

// The table of one context, whose entries come one behind the other in the order of the codes: by
// length, then by symbol. False when the code is incomplete.
bool fill_table(const ContextCode& code, unsigned table_bits, std::uint16_t* to) noexcept {
    const OfLength of_length = symbols_of_length(code);
    OfLength codes{};
    if (!first_codes(of_length, table_bits, codes)) return false;
    std::array<std::uint8_t, 512> by_code;  // the upper half for symbols without a code
    OfLength next{256};                     // where the next symbol of each length comes
    std::uint32_t count = 0;
    for (unsigned bits = 1; bits <= table_bits; ++bits) {
        next[bits] = count;
        count += of_length[bits];
    }
    for (std::size_t s = code.first; s <= code.last; ++s) {
        by_code[next[code.bits[s]]++] = static_cast<std::uint8_t>(s);
    }
    for (std::uint32_t i = 0; i < count; ++i) {
        const unsigned symbol = by_code[i];
        const unsigned bits = code.bits[symbol];
        const std::size_t run = std::size_t{1} << (table_bits - bits);
        fill_run(to, run, static_cast<std::uint16_t>(symbol << 8 | bits));
        to += run;
    }
    return true;
}

}  // namespace

void make_codes(const Codes& codes, std::vector<std::uint32_t>& table) {
    table.assign(codes.size() * 256, 0);
    for (std::size_t c = 0; c < codes.size(); ++c) {
        const ContextCode& code = codes[c];
        if (!code.used || code.single >= 0) continue;
        OfLength start{};
        static_cast<void>(first_codes(symbols_of_length(code), kMaxCodeBits, start));
        for (std::size_t s = code.first; s <= code.last; ++s) {
            const unsigned bits = code.bits[s];
            if (bits == 0) continue;
            const unsigned unused = kMaxCodeBits - bits;
            table[c * 256 + s] = start[bits] >> unused << 8 | bits;
            start[bits] += 1U << unused;
        }
    }
}

bool make_read_table(const Codes& codes, unsigned table_bits, std::vector<std::uint16_t>& table) {
    const std::size_t size = std::size_t{1} << table_bits;
    const std::size_t needed = codes.size() * size + kStored;
    if (table.size() < needed) table.resize(needed);
    for (std::size_t c = 0; c < codes.size(); ++c) {
        const ContextCode& code = codes[c];
        std::uint16_t* const to = table.data() + c * size;
        if (!code.used || code.single >= 0) {
            fill_run(to, size,
                     static_cast<std::uint16_t>(code.used ? unsigned(code.single) << 8 : 0));
        } else if (!fill_table(code, table_bits, to)) {
            return false;
        }
    }
    return true;
}

}  // namespace pydedup::detail
