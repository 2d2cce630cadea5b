// SPDX-License-Identifier: Apache-2.0
// Within a group of rows (delta_rows.cpp), the base's exponent or mantissa may say what a
// difference is likely to be. (The last bits of an exact difference grow as the exponent of the
// base falls; and what an optimizer's weight decay leaves behind is a function of the mantissa.)
// Each step is decided by estimated bits.
#include "codec/delta_plan.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <type_traits>

#include "codec/code_lengths.hpp"
#include "codec/counting.hpp"
#include "codec/delta_alphabet.hpp"
#include "codec/delta_rows.hpp"

namespace pydedup::detail {
namespace {

constexpr unsigned kEqualContexts = 8;
constexpr std::uint64_t kNoisy = 5 << 9;  // 2.5 bits an element, in 1024ths
static_assert(kMaxExactGroups * kEqualContexts <= kMaxContexts);

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

// What the exponent is asked for: how large an element is, where that says something of its
// difference, and whether it is masked, in a last context that costs nothing where all that is 0 in
// it is as in the base. One context where it is asked for nothing.
RowGroup exponent_contexts(const Differences& d, bool is_exact, std::uint32_t reference_exponent) {
    const unsigned n_others = is_exact ? kEqualContexts - 1 : 1;
    const std::uint32_t zero = std::min<std::uint32_t>(reference_exponent, 255);
    if (!d.masked || zero < n_others) {
        return is_exact ? equal_contexts(Feature::exponent, d.layout) : RowGroup{};
    }
    RowGroup group{Feature::exponent, n_others + 1, {}};
    for (unsigned c = 0; c < n_others; ++c) group.first[c] = static_cast<std::uint8_t>(c);
    group.first[n_others] = static_cast<std::uint8_t>(zero);
    return group;
}

void count_contexts(const std::uint8_t* symbols, const std::uint8_t* contexts, std::size_t count,
                    unsigned n_symbols, Histogram& histogram) {
    Counts<4> counts(histogram.size() / 256 * n_symbols);
    counts.add(count, [=](std::size_t i) {
        return static_cast<std::size_t>(contexts[i]) * n_symbols + symbols[i];
    });
    put_counts(counts, n_symbols, histogram);
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

// The feature of each group, by trying all. Quantised differences know nothing of the base but
// where it is masked.
void choose_features(const Differences& d, RowScore score, const CodecKernels& codec,
                     const PlanRoom& room, DeltaPlan& plan, const Histogram& by_group) {
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
        count_contexts(room.symbols, room.contexts, d.count(), n_symbols, histogram);
        std::size_t at = 0;
        for (std::size_t g = 0; g < n_groups; ++g) {
            offer(choices[g], groups[g], histogram.data() + at * 256, n_symbols);
            at += groups[g].n_contexts;
        }
    };
    const bool is_exact = score == RowScore::kind;
    if (d.layout.mantissa_bits != 0 && (is_exact || d.masked)) {
        contexts.reference_exponent = largest_exponent(d);
        const RowGroup by_exponent = exponent_contexts(d, is_exact, contexts.reference_exponent);
        try_groups(tried[0], std::vector<RowGroup>(n_groups, by_exponent));
    }
    if (d.layout.mantissa_bits != 0 && is_exact) {
        const std::vector<RowGroup> by_mantissa(n_groups,
                                                equal_contexts(Feature::mantissa, d.layout));
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
    for (std::size_t g = 0; g < n_groups; ++g) {
        const RowGroup& group = choices[g].group;
        contexts.groups[g] = group;
        contexts.n_contexts += group.n_contexts;
        const std::size_t size = std::size_t{group.n_contexts} * 256;
        plan.histogram.insert(plan.histogram.end(), choices[g].counts, choices[g].counts + size);
    }
}

// What the symbols and raw bits will take.
void add_up(const Differences& d, DeltaPlan& plan) {
    const unsigned n_symbols = plan.alphabet.n_symbols();
    plan.count = d.count();
    plan.layout = d.layout;
    plan.symbol_bits = 0;
    plan.table_bits = 0;
    plan.raw_bits = 0;
    for (unsigned c = 0; c < plan.contexts.n_contexts; ++c) {
        const std::uint32_t* const counts = plan.histogram.data() + std::size_t{c} * 256;
        std::uint64_t table = 0;
        plan.symbol_bits += cost_of(counts, n_symbols, table);
        plan.table_bits += table;
        for (unsigned s = 0; s < n_symbols; ++s) {
            plan.raw_bits += std::uint64_t{counts[s]} * plan.alphabet.widths[s];
        }
    }
}

}  // namespace

void plan_delta(const Differences& d, RowScore score, const CodecKernels& codec,
                const PlanRoom& room, DeltaPlan& plan) {
    choose_alphabet(d, plan.alphabet, room.symbols);
    Contexts& contexts = plan.contexts;
    Histogram by_group;
    std::vector<std::uint8_t> group_of_row;
    const unsigned n_groups =
        group_rows(d, score, plan.alphabet, room.symbols, group_of_row, by_group);
    contexts.groups.assign(n_groups, RowGroup{});
    if (n_groups > 1) contexts.group_of_row = std::move(group_of_row);
    choose_features(d, score, codec, room, plan, by_group);
    add_up(d, plan);
    assign_contexts(contexts, d.base, d.rows, d.cols, d.layout, codec, room.features,
                    room.contexts);
}

bool plan_alike(const Differences& d, const CodecKernels& codec, const PlanRoom& room,
                const DeltaPlan& like, DeltaPlan& plan) {
    const auto per_element = [](const DeltaPlan& p) {
        return ((p.symbol_bits + p.raw_bits) << 10) / p.count;
    };
    const std::uint64_t before = per_element(like);
    // Elements of a context cost nothing while they all have one symbol, and a bit each as soon as
    // one has another: where most did not change, what pays for a block may not for the next.
    // And no narrower dtype has all values that a dictionary of a wider one may name.
    if (like.contexts.groups.size() != 1 || like.count != d.count() || like.layout != d.layout ||
        before < kNoisy) {
        return false;
    }
    reuse_alphabet(d, like.alphabet, plan.alphabet, room.symbols);
    plan.contexts = like.contexts;
    assign_contexts(plan.contexts, d.base, d.rows, d.cols, d.layout, codec, room.features,
                    room.contexts);
    plan.histogram.assign(std::size_t{plan.contexts.n_contexts} * 256, 0);
    count_contexts(room.symbols, room.contexts, d.count(), plan.alphabet.n_symbols(),
                   plan.histogram);
    add_up(d, plan);
    // Blocks of one matrix have much the same differences; where they do not, there may be more to
    // gain.
    const std::uint64_t now = per_element(plan);
    return 64 * now <= 65 * before && 32 * now >= 31 * before;
}

std::uint64_t plan_codes(const DeltaPlan& plan, Codes& codes) {
    // Tables of up to 16 KiB stay in the first cache beside the block.
    const unsigned limit = plan.contexts.n_contexts > 4 ? 9 : 10;
    codes.assign(plan.contexts.n_contexts, ContextCode{});
    std::uint64_t bits = 0;
    for (unsigned c = 0; c < plan.contexts.n_contexts; ++c) {
        const std::span<const std::uint32_t> counts(plan.histogram.data() + std::size_t{c} * 256,
                                                    plan.alphabet.n_symbols());
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
