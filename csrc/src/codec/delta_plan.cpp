// SPDX-License-Identifier: Apache-2.0
// Rows that behave alike form a group; within a group, the base's exponent or mantissa may say what
// a difference is likely to be. (The last bits of an exact difference grow as the exponent of the
// base falls; and what an optimizer's weight decay leaves behind is a function of the mantissa.)
// Each step is decided by estimated bits.
#include "codec/delta_plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "codec/code_lengths.hpp"
#include "codec/delta_alphabet.hpp"
#include "codec/logarithm.hpp"

namespace pydedup::detail {
namespace {

constexpr unsigned kEqualContexts = 8;
constexpr std::size_t kMaxExactGroups = 3;
static_assert(kMaxExactGroups * kEqualContexts <= kMaxContexts);
constexpr std::uint64_t kContextBits = 18;  // what a code takes beside its lengths
constexpr std::uint64_t kGroupBits = 24;

using Histogram = std::vector<std::uint32_t>;  // [context * 256 + symbol]

// Bits of coding what was counted, with the code itself.
std::uint64_t cost_of(const std::uint32_t* counts, unsigned n_symbols, std::uint64_t& table_bits) {
    std::uint64_t total = 0;
    std::uint64_t sum = 0;
    unsigned used = 0;
    for (unsigned s = 0; s < n_symbols; ++s) {
        const std::uint32_t count = counts[s];
        if (count == 0) continue;
        ++used;
        total += count;
        sum += value_log2(count);
    }
    table_bits = used == 0 ? 2 : used == 1 ? 10 : kContextBits + 5 * std::uint64_t{used} / 2;
    if (used < 2) return 0;
    const std::uint64_t all = value_log2(static_cast<std::uint32_t>(total));
    return std::max(total, all <= sum ? 0 : (all - sum) >> kLogBits);
}

std::uint64_t full_cost(const std::uint32_t* counts, unsigned n_symbols) {
    std::uint64_t table = 0;
    const std::uint64_t bits = cost_of(counts, n_symbols, table);
    return bits + table;
}

// Four counts at once do not wait for each other's stores.
void count_all(const std::uint8_t* symbols, std::size_t count, Histogram& histogram) {
    std::array<std::array<std::uint32_t, 256>, 4> parts{};
    std::size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        for (std::size_t k = 0; k < 4; ++k) ++parts[k][symbols[i + k]];
    }
    for (; i < count; ++i) ++parts[0][symbols[i]];
    for (std::size_t s = 0; s < 256; ++s) {
        histogram[s] = parts[0][s] + parts[1][s] + parts[2][s] + parts[3][s];
    }
}

// Two counts in turns, for the same reason.
void count_rows(const Differences& d, const std::uint8_t* symbols,
                const std::vector<std::uint8_t>& row_class, Histogram& histogram) {
    Histogram odd(histogram.size());
    for (std::size_t r = 0; r < d.rows; ++r) {
        std::uint32_t* const counts = histogram.data() + std::size_t{row_class[r]} * 256;
        std::uint32_t* const others = odd.data() + std::size_t{row_class[r]} * 256;
        const std::uint8_t* const row = symbols + r * d.cols;
        std::size_t i = 0;
        for (; i + 2 <= d.cols; i += 2) {
            ++counts[row[i]];
            ++others[row[i + 1]];
        }
        if (i < d.cols) ++counts[row[i]];
    }
    for (std::size_t i = 0; i < odd.size(); ++i) histogram[i] += odd[i];
}

std::uint64_t sum_of(const std::uint8_t* bytes, std::size_t count) {
    std::uint64_t sum = 0;
    std::size_t i = 0;
    // Eight bytes by one multiplication: their sum stays below 2^16.
    for (; i + 8 <= count; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, bytes + i, sizeof word);
        const std::uint64_t pairs =
            (word & 0x00FF00FF00FF00FFU) + (word >> 8 & 0x00FF00FF00FF00FFU);
        sum += pairs * 0x0001000100010001U >> 48;
    }
    for (; i < count; ++i) sum += bytes[i];
    return sum;
}

// Rows that did not change, rows whose differences are all but spelled out by their symbols, and
// the others by how many bits their differences have.
void classes_by_kind(const Differences& d, const Alphabet& alphabet, const std::uint8_t* symbols,
                     std::vector<std::uint8_t>& row_class) {
    std::array<std::uint8_t, 256> inexact;
    bool all_inexact = true;
    for (std::size_t s = 0; s < 256; ++s) {
        inexact[s] = alphabet.widths[s] != 0 ? 1 : 0;
        all_inexact &= s >= alphabet.n_symbols() || inexact[s] != 0;
    }
    std::vector<std::uint32_t> width(d.rows);
    std::uint32_t widest = 0;
    for (std::size_t r = 0; r < d.rows; ++r) {
        const std::uint8_t* const row = symbols + r * d.cols;
        const std::uint8_t* const classes = d.classes + r * d.cols;
        const std::uint64_t sum = sum_of(classes, d.cols);
        std::size_t raw = all_inexact ? d.cols : 0;
        if (!all_inexact) {
            for (std::size_t i = 0; i < d.cols; ++i) raw += inexact[row[i]];
        }
        width[r] = static_cast<std::uint32_t>(sum / (2 * d.cols));
        row_class[r] = sum == 0 ? 0 : raw * 16 <= d.cols ? 1 : 2;
        if (row_class[r] == 2) widest = std::max(widest, width[r]);
    }
    for (std::size_t r = 0; r < d.rows; ++r) {
        if (row_class[r] == 2) {
            row_class[r] = static_cast<std::uint8_t>(2 + std::min(widest - width[r], 5U));
        }
    }
}

void classes_by_activity(const Differences& d, std::vector<std::uint8_t>& row_class) {
    // Mean |q| in hundredths.
    constexpr std::array<std::uint64_t, 7> kLevels = {2, 10, 30, 70, 150, 300, 600};
    const auto* const z = static_cast<const std::uint32_t*>(d.z);
    for (std::size_t r = 0; r < d.rows; ++r) {
        std::uint64_t sum = 0;
        for (std::size_t i = 0; i < d.cols; ++i) {
            sum += std::min(z[r * d.cols + i], 127U) / 2 + (z[r * d.cols + i] & 1);
        }
        const std::uint64_t hundredths = sum * 100 / d.cols;
        row_class[r] = static_cast<std::uint8_t>(
            std::upper_bound(kLevels.begin(), kLevels.end(), hundredths) - kLevels.begin());
    }
}

// Joins neighbouring classes as long as that saves bits or there are too many. On return row_class
// names groups, 0 to the result - 1.
unsigned merge_classes(const Differences& d, unsigned n_symbols, std::size_t most,
                       const std::uint8_t* symbols, std::vector<std::uint8_t>& row_class,
                       Histogram& histogram) {
    std::uint32_t present = 0;
    for (const std::uint8_t c : row_class) present |= 1U << c;
    histogram.assign(kMaxGroups * 256, 0);
    if (std::has_single_bit(present)) {
        count_all(symbols, d.count(), histogram);
        return 1;
    }
    count_rows(d, symbols, row_class, histogram);
    struct Part {
        std::vector<std::uint32_t> counts;
        std::uint64_t cost;
        std::uint32_t classes;  // bit set
    };
    std::vector<Part> parts;
    for (unsigned c = 0; c < kMaxGroups; ++c) {
        if ((present >> c & 1) == 0) continue;
        const auto from = histogram.begin() + c * 256;
        parts.push_back({{from, from + n_symbols}, 0, 1U << c});
        parts.back().cost = full_cost(parts.back().counts.data(), n_symbols);
    }
    while (parts.size() > 1) {
        std::size_t best = 0;
        std::int64_t best_gain = std::numeric_limits<std::int64_t>::min();
        Part best_part = parts[0];
        for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
            Part both = parts[i];
            for (unsigned s = 0; s < n_symbols; ++s) both.counts[s] += parts[i + 1].counts[s];
            both.classes |= parts[i + 1].classes;
            both.cost = full_cost(both.counts.data(), n_symbols);
            const auto gain =
                static_cast<std::int64_t>(parts[i].cost + parts[i + 1].cost + kGroupBits) -
                static_cast<std::int64_t>(both.cost);
            if (gain > best_gain) {
                best_gain = gain;
                best = i;
                best_part = std::move(both);
            }
        }
        if (best_gain <= 0 && parts.size() <= most) break;
        parts[best] = std::move(best_part);
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
    std::array<std::uint8_t, kMaxGroups> group_of{};
    std::fill(histogram.begin(), histogram.end(), 0);
    for (std::size_t g = 0; g < parts.size(); ++g) {
        for (unsigned c = 0; c < kMaxGroups; ++c) {
            if ((parts[g].classes >> c & 1) != 0) group_of[c] = static_cast<std::uint8_t>(g);
        }
        std::copy(parts[g].counts.begin(), parts[g].counts.end(),
                  histogram.begin() + static_cast<std::ptrdiff_t>(g) * 256);
    }
    for (std::uint8_t& c : row_class) c = group_of[c];
    return static_cast<unsigned>(parts.size());
}

// The exponent field of the largest magnitude, whatever it is.
template <class Word>
std::uint64_t largest_magnitude(const std::uint8_t* from, std::size_t count) {
    // Eight at once do not wait for each other. (Comparing signed is what SSE2 can.)
    using Signed = std::make_signed_t<Word>;
    constexpr auto kMagnitude = static_cast<Word>(static_cast<Word>(~Word{0}) >> 1);
    constexpr std::size_t kLanes = 64 / sizeof(Word);
    std::array<Signed, kLanes> top{};
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        std::array<Word, kLanes> words;
        std::memcpy(words.data(), from + i * sizeof(Word), sizeof words);
        for (std::size_t k = 0; k < kLanes; ++k) {
            const auto magnitude = static_cast<Signed>(words[k] & kMagnitude);
            top[k] = magnitude > top[k] ? magnitude : top[k];
        }
    }
    for (; i < count; ++i) {
        Word word;
        std::memcpy(&word, from + i * sizeof(Word), sizeof word);
        top[0] = std::max(top[0], static_cast<Signed>(word & kMagnitude));
    }
    return static_cast<std::uint64_t>(*std::max_element(top.begin(), top.end()));
}

std::uint32_t largest_exponent(const Differences& d) {
    const std::uint64_t mask = (std::uint64_t{1} << d.layout.exponent_bits) - 1;
    const std::uint64_t largest =
        d.layout.item_bytes == 8   ? largest_magnitude<std::uint64_t>(d.base, d.count())
        : d.layout.item_bytes == 4 ? largest_magnitude<std::uint32_t>(d.base, d.count())
                                   : largest_magnitude<std::uint16_t>(d.base, d.count());
    return static_cast<std::uint32_t>(largest >> d.layout.mantissa_bits & mask);
}

RowGroup equal_contexts(Feature feature, DeltaLayout layout) {
    RowGroup group{feature, kEqualContexts, {}};
    const unsigned bits = std::min<unsigned>(8, layout.mantissa_bits);
    for (unsigned c = 0; c < kEqualContexts; ++c) {
        group.first[c] =
            static_cast<std::uint8_t>(feature == Feature::exponent ? c : c << (bits - 3));
    }
    return group;
}

void count_contexts(const std::uint8_t* symbols, const std::uint8_t* contexts, std::size_t count,
                    Histogram& histogram) {
    Histogram odd(histogram.size());
    std::size_t i = 0;
    for (; i + 2 <= count; i += 2) {
        ++histogram[std::size_t{contexts[i]} << 8 | symbols[i]];
        ++odd[std::size_t{contexts[i + 1]} << 8 | symbols[i + 1]];
    }
    if (i < count) ++histogram[std::size_t{contexts[i]} << 8 | symbols[i]];
    for (i = 0; i < odd.size(); ++i) histogram[i] += odd[i];
}

// Pieces of the mantissa's range within which all of a group's rows have one symbol, and pieces
// between them that are mixed. Returns one context when that leads nowhere.
RowGroup mantissa_pieces(const Differences& d, const Contexts& contexts, unsigned group,
                         const CodecKernels& codec, const PlanRoom& room) {
    std::array<std::int16_t, 256> symbol_of;
    constexpr std::int16_t kEmpty = -1;
    constexpr std::int16_t kMixed = -2;
    symbol_of.fill(kEmpty);
    for (std::size_t r = 0; r < d.rows; ++r) {
        if (contexts.group(r) != group) continue;
        codec.delta.mantissas(d.base + r * d.cols * d.layout.item_bytes, d.cols, d.layout,
                              room.features);
        const std::uint8_t* const row = room.symbols + r * d.cols;
        for (std::size_t i = 0; i < d.cols; ++i) {
            std::int16_t& seen = symbol_of[room.features[i]];
            if (seen == kEmpty) {
                seen = row[i];
            } else if (seen != row[i]) {
                seen = kMixed;
            }
        }
    }
    RowGroup pieces{Feature::mantissa, 1, {}};
    std::int16_t current = kEmpty;
    for (unsigned value = 0; value < 256; ++value) {
        const std::int16_t seen = symbol_of[value];
        if (seen == kEmpty || seen == current) continue;
        if (current != kEmpty) {
            if (pieces.n_contexts == kMaxContexts / contexts.groups.size()) return {};
            pieces.first[pieces.n_contexts++] = static_cast<std::uint8_t>(value);
        }
        current = seen;
    }
    return pieces.n_contexts == 1 ? RowGroup{} : pieces;
}

struct Choice {
    RowGroup group;
    std::uint64_t cost = UINT64_MAX;
    const std::uint32_t* counts = nullptr;
};

void offer(Choice& choice, const RowGroup& group, const std::uint32_t* counts, unsigned n_symbols) {
    std::uint64_t cost = group.n_contexts > 1 ? 8 * std::uint64_t{group.n_contexts} : 0;
    for (unsigned c = 0; c < group.n_contexts; ++c) {
        cost += full_cost(counts + std::size_t{c} * 256, n_symbols);
    }
    if (cost < choice.cost) choice = {group, cost, counts};
}

// The feature of each group, by trying all.
void choose_features(const Differences& d, const CodecKernels& codec, const PlanRoom& room,
                     DeltaPlan& plan, const Histogram& by_group) {
    const unsigned n_symbols = plan.alphabet.n_symbols();
    Contexts& contexts = plan.contexts;
    const std::size_t n_groups = contexts.groups.size();
    std::vector<Choice> choices(n_groups);
    std::uint64_t exact = 0;  // elements that their symbols spell out
    for (std::size_t g = 0; g < n_groups; ++g) {
        const std::uint32_t* const counts = by_group.data() + g * 256;
        offer(choices[g], RowGroup{}, counts, n_symbols);
        for (unsigned s = 0; s < n_symbols; ++s) {
            exact += plan.alphabet.widths[s] == 0 ? counts[s] : 0;
        }
    }
    std::array<Histogram, 3> tried;
    const auto try_groups = [&](Histogram& histogram, const std::vector<RowGroup>& groups) {
        Contexts trial{groups, contexts.group_of_row, contexts.reference_exponent, 0};
        for (const RowGroup& group : groups) trial.n_contexts += group.n_contexts;
        assign_contexts(trial, d.base, d.rows, d.cols, d.layout, codec, room.features,
                        room.contexts);
        histogram.assign(std::size_t{trial.n_contexts} * 256, 0);
        count_contexts(room.symbols, room.contexts, d.count(), histogram);
        std::size_t at = 0;
        for (std::size_t g = 0; g < n_groups; ++g) {
            offer(choices[g], groups[g], histogram.data() + at * 256, n_symbols);
            at += groups[g].n_contexts;
        }
    };
    if (d.layout.mantissa_bits != 0) {
        contexts.reference_exponent = largest_exponent(d);
        const std::vector<RowGroup> by_exponent(n_groups,
                                                equal_contexts(Feature::exponent, d.layout));
        const std::vector<RowGroup> by_mantissa(n_groups,
                                                equal_contexts(Feature::mantissa, d.layout));
        try_groups(tried[0], by_exponent);
        // Noise that needs raw bits knows nothing of the mantissa.
        if (exact >= d.count() / 8) try_groups(tried[1], by_mantissa);
        std::vector<RowGroup> by_pieces(n_groups);
        bool any = false;
        for (std::size_t g = 0; g < n_groups; ++g) {
            // Only where few symbols say it all.
            if (choices[g].group.feature != Feature::mantissa) continue;
            by_pieces[g] = mantissa_pieces(d, contexts, static_cast<unsigned>(g), codec, room);
            any |= by_pieces[g].n_contexts > 1;
        }
        if (any) try_groups(tried[2], by_pieces);
    }
    contexts.n_contexts = 0;
    plan.histogram.clear();
    plan.symbol_bits = 0;
    for (std::size_t g = 0; g < n_groups; ++g) {
        const RowGroup& group = choices[g].group;
        contexts.groups[g] = group;
        contexts.n_contexts += group.n_contexts;
        const std::size_t size = std::size_t{group.n_contexts} * 256;
        plan.histogram.insert(plan.histogram.end(), choices[g].counts, choices[g].counts + size);
    }
}

}  // namespace

void plan_delta(const Differences& d, RowScore score, const CodecKernels& codec,
                const PlanRoom& room, DeltaPlan& plan) {
    choose_alphabet(d, plan.alphabet, room.symbols);
    const unsigned n_symbols = plan.alphabet.n_symbols();
    Contexts& contexts = plan.contexts;
    Histogram by_group;
    unsigned n_groups = 1;
    std::vector<std::uint8_t> row_class(d.rows, 0);
    if (d.rows > 1) {
        if (score == RowScore::kind) {
            classes_by_kind(d, plan.alphabet, room.symbols, row_class);
        } else {
            classes_by_activity(d, row_class);
        }
    }
    n_groups = merge_classes(d, n_symbols, score == RowScore::kind ? kMaxExactGroups : kMaxGroups,
                             room.symbols, row_class, by_group);
    contexts.groups.assign(n_groups, RowGroup{});
    if (n_groups > 1) contexts.group_of_row = std::move(row_class);
    if (score == RowScore::kind) {
        choose_features(d, codec, room, plan, by_group);
    } else {
        contexts.n_contexts = n_groups;
        by_group.resize(std::size_t{n_groups} * 256);
        plan.histogram = std::move(by_group);
    }
    plan.symbol_bits = 0;
    plan.table_bits = 0;
    plan.raw_bits = 0;
    for (unsigned c = 0; c < contexts.n_contexts; ++c) {
        const std::uint32_t* const counts = plan.histogram.data() + std::size_t{c} * 256;
        std::uint64_t table = 0;
        plan.symbol_bits += cost_of(counts, n_symbols, table);
        plan.table_bits += table;
        for (unsigned s = 0; s < n_symbols; ++s) {
            plan.raw_bits += std::uint64_t{counts[s]} * plan.alphabet.widths[s];
        }
    }
    assign_contexts(contexts, d.base, d.rows, d.cols, d.layout, codec, room.features,
                    room.contexts);
}

std::uint64_t plan_codes(const DeltaPlan& plan, Codes& codes) {
    // Tables of up to 16 KiB stay in the first cache beside the block.
    const unsigned limit = plan.contexts.n_contexts > 4 ? 9 : 10;
    codes.assign(plan.contexts.n_contexts, ContextCode{});
    std::uint64_t bits = 0;
    for (unsigned c = 0; c < plan.contexts.n_contexts; ++c) {
        std::array<std::uint32_t, 256> counts;
        std::copy_n(plan.histogram.begin() + c * 256, 256, counts.begin());
        unsigned used = 0;
        unsigned first = 0;
        unsigned last = 0;
        for (unsigned s = 0; s < plan.alphabet.n_symbols(); ++s) {
            if (counts[s] == 0) continue;
            if (used++ == 0) first = s;
            last = s;
        }
        codes[c].used = used != 0;
        if (used == 1) codes[c].single = static_cast<std::int16_t>(last);
        if (used < 2) continue;
        codes[c].first = static_cast<std::uint8_t>(first);
        codes[c].last = static_cast<std::uint8_t>(last);
        optimal_code_lengths(counts, limit, codes[c].bits);
        for (unsigned s = first; s <= last; ++s)
            bits += std::uint64_t{counts[s]} * codes[c].bits[s];
    }
    return bits;
}

}  // namespace pydedup::detail
