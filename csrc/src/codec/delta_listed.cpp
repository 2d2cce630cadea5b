// SPDX-License-Identifier: Apache-2.0
// Distances between the elements of a list are as those between the heads of a coin that is tossed:
// Rice's code is within 2 % of the best for them (Rice, "Some Practical Universal Noiseless Coding
// Techniques", JPL 1979), and needs no table.
#include "codec/delta_listed.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "codec/delta_bits.hpp"

namespace pydedup::detail {
namespace {

constexpr std::size_t kMaxLists = 16;
// What is coded may take so large a part more than its entropy: the symbol of what did not change
// takes a whole bit, and so half of the room for codes.
constexpr std::uint64_t kOptimism = 8;
// Elements that are worth a list of their own.
constexpr std::uint32_t kFewest = 8;
// So many ones stand for a distance that follows in 32 bits.
constexpr unsigned kFar = 24;
constexpr unsigned kFarBits = 32;
constexpr unsigned kMaxLowBits = 31;

struct List {
    std::uint64_t value;  // 0 for the one of all others
    std::uint64_t n;
    unsigned low_bits;  // of a distance, behind what is written in ones
};

// The best for n elements by chance: k bits are worse than one more where the part of all distances
// that reach 2^k is above the golden section, which is to 1 % where these are above 1.04 * 2^(k +
// 1)
// - 0.5 on average.
unsigned low_bits_of(std::size_t n, std::size_t count) noexcept {
    const std::size_t mean = (2 * count - n) * 25 / (52 * n);
    return mean == 0 ? 0 : static_cast<unsigned>(std::bit_width(mean)) - 1;
}

// About how many bits the distances of n elements take.
std::size_t distance_bits(std::size_t n, std::size_t count) noexcept {
    if (n == 0) return 0;
    const unsigned low_bits = low_bits_of(n, count);
    const std::size_t half_low = n * ((std::size_t{1} << low_bits) - 1) / 2;
    const std::size_t high = (count - n - std::min(count - n, half_low)) >> low_bits;
    return n * (1 + low_bits) + high;
}

void put_distance(BitSink& bits, std::uint32_t distance, unsigned low_bits) {
    const std::uint32_t high = distance >> low_bits;
    if (high < kFar) {
        bits.put((1U << high) - 1, high + 1);
        bits.put(distance & ((1U << low_bits) - 1), low_bits);
    } else {
        bits.put((1U << kFar) - 1, kFar);
        bits.put(distance, kFarBits);
    }
}

std::uint64_t get_distance(BitSource& bits, unsigned low_bits) noexcept {
    const unsigned high = bits.ones(kFar - 1);
    if (high < kFar) return std::uint64_t{high} << low_bits | bits.value(low_bits);
    static_cast<void>(bits.value(kFar));
    return bits.value(kFarBits);
}

}  // namespace

bool may_be_listed(const DeltaPlan& plan) noexcept {
    const Alphabet& alphabet = plan.alphabet;
    std::uint64_t least = 0;
    for (std::size_t symbol = 0; symbol < alphabet.n_symbols(); ++symbol) {
        if (alphabet.bases[symbol] == 0) continue;
        std::size_t n = 0;
        for (std::size_t c = 0; c < plan.contexts.n_contexts; ++c) {
            n += plan.histogram[c * 256 + symbol];
        }
        least += distance_bits(n, plan.count) + n * alphabet.widths[symbol];
    }
    const std::uint64_t coded = plan.symbol_bits + plan.raw_bits + plan.table_bits;
    return least < coded + coded / kOptimism;
}

template <class Wide>
ListedPlan::ListedPlan(const Wide* z, std::size_t of_count, std::size_t n_changed, double scale)
    : count(of_count), changed(n_changed + 1) {
    // Without a branch on what is 0, which nobody foresees: of these, the next one takes the place.
    std::size_t n = 0;
    for (std::size_t i = 0; i < count; ++i) {
        changed[n] = static_cast<std::uint32_t>(i);
        n += z[i] != 0 ? 1 : 0;
    }
    changed.pop_back();
    for (const std::uint32_t at : changed) {
        const Wide value = z[at];
        ++n_of[value < ListedPlan::kValues ? static_cast<std::size_t>(value) : 0];
        if (value >= ListedPlan::kValues) other_bytes += varint_bytes(value);
    }
    const auto fewest = static_cast<std::uint32_t>(kFewest / scale) + 1;
    for (std::size_t value = 1; value < ListedPlan::kValues; ++value) {
        if (n_of[value] >= fewest) values.push_back(static_cast<std::uint16_t>(value));
    }
    if (values.size() > kMaxLists) {
        std::stable_sort(values.begin(), values.end(),
                         [&](std::uint16_t x, std::uint16_t y) { return n_of[x] > n_of[y]; });
        values.resize(kMaxLists);
        std::sort(values.begin(), values.end());
    }
    auto next = values.begin();
    for (std::size_t value = 1; value < ListedPlan::kValues; ++value) {
        if (next != values.end() && *next == value) {
            ++next;
        } else {
            n_of[0] += n_of[value];
            other_bytes += n_of[value] * varint_bytes(value);
        }
    }
}

double ListedPlan::bytes(double scale) const noexcept {
    constexpr double kOfList = 5;
    std::size_t bits = distance_bits(n_of[0], count);
    for (const std::uint16_t value : values) bits += distance_bits(n_of[value], count);
    return (static_cast<double>(bits) / 8 + static_cast<double>(other_bytes)) * scale +
           kOfList * static_cast<double>(values.size() + 1);
}

template <class Wide>
void put_listed(Sink& sink, const Wide* z, const ListedPlan& plan) {
    // The list of all others, 0 here, comes last.
    std::array<std::uint8_t, ListedPlan::kValues> list_of{};
    std::array<std::size_t, kMaxLists + 2> end{};  // of each list, in the order that they are in
    const std::size_t n_lists = plan.values.size();
    put_varint(sink, n_lists);
    const auto put_length = [&](std::size_t list, std::size_t n) {
        end[list + 1] = end[list] + n;
        put_varint(sink, n);
        if (n != 0) sink.push_back(static_cast<std::uint8_t>(low_bits_of(n, plan.count)));
    };
    for (std::size_t i = 0; i < n_lists; ++i) {
        list_of[plan.values[i]] = static_cast<std::uint8_t>(i + 1);
        put_varint(sink, plan.values[i]);
        put_length(i, plan.n_of[plan.values[i]]);
    }
    put_length(n_lists, plan.n_of[0]);
    std::vector<std::uint32_t> places(plan.changed.size());
    std::array<std::size_t, kMaxLists + 2> next = end;
    for (const std::uint32_t at : plan.changed) {
        const std::size_t list =
            z[at] < ListedPlan::kValues ? list_of[static_cast<std::size_t>(z[at])] : 0;
        places[next[list == 0 ? n_lists : list - 1]++] = at;
    }
    BitSink bits(sink);
    for (std::size_t i = 0; i <= n_lists; ++i) {
        const std::size_t n = end[i + 1] - end[i];
        const unsigned low_bits = n == 0 ? 0 : low_bits_of(n, plan.count);
        std::uint32_t from = 0;
        for (std::size_t k = end[i]; k < end[i + 1]; ++k) {
            put_distance(bits, places[k] - from, low_bits);
            from = places[k] + 1;
        }
    }
    bits.finish();
    for (std::size_t k = end[n_lists]; k < end[n_lists + 1]; ++k) put_varint(sink, z[places[k]]);
}

template <class Wide>
const char* get_listed(Source& source, std::size_t count, unsigned value_bits, Wide* z) {
    const auto is_possible = [&](std::uint64_t value) {
        return value != 0 && (value_bits == 64 || value >> value_bits == 0);
    };
    const std::uint64_t n_lists = source.varint();
    if (source.failed || n_lists > kMaxLists) return "it has an impossible number of lists";
    std::array<List, kMaxLists + 1> lists{};
    std::uint64_t total = 0;
    for (std::size_t i = 0; i <= n_lists; ++i) {
        const bool is_last = i == n_lists;
        List& list = lists[i];
        list.value = is_last ? 0 : source.varint();
        list.n = source.varint();
        list.low_bits = is_last && list.n == 0 ? 0 : source.byte();
        if (source.failed) return "its lists are cut off";
        if (!is_last && (!is_possible(list.value) || (i > 0 && list.value <= lists[i - 1].value))) {
            return "a list has an impossible value";
        }
        if ((!is_last && list.n == 0) || list.n > count - total || list.low_bits > kMaxLowBits) {
            return "a list has an impossible length";
        }
        total += list.n;
    }
    std::fill_n(z, count, Wide{0});
    std::vector<std::uint32_t> others;
    others.reserve(static_cast<std::size_t>(lists[n_lists].n));
    BitSource bits(source);
    for (std::size_t i = 0; i <= n_lists; ++i) {
        const List& list = lists[i];
        std::size_t next = 0;
        for (std::uint64_t k = 0; k < list.n; ++k) {
            const std::uint64_t distance = get_distance(bits, list.low_bits);
            if (distance >= count - next) return "a change lies behind its end";
            const std::size_t at = next + static_cast<std::size_t>(distance);
            if (z[at] != 0) return "an element is in two lists";
            z[at] = static_cast<Wide>(list.value);
            if (i == n_lists) others.push_back(static_cast<std::uint32_t>(at));
            next = at + 1;
        }
    }
    if (!bits.finish()) return "its lists end with stray bits";
    if (source.failed) return "its lists are cut off";
    for (const std::uint32_t at : others) {
        const std::uint64_t value = source.varint();
        if (source.failed) return "its list of changes is cut off";
        if (!is_possible(value)) return "a change has an impossible value";
        z[at] = static_cast<Wide>(value);
    }
    return source.left.empty() ? nullptr : "bytes are left over";
}

template ListedPlan::ListedPlan(const std::uint32_t*, std::size_t, std::size_t, double);
template ListedPlan::ListedPlan(const std::uint64_t*, std::size_t, std::size_t, double);
template void put_listed(Sink&, const std::uint32_t*, const ListedPlan&);
template void put_listed(Sink&, const std::uint64_t*, const ListedPlan&);
template const char* get_listed(Source&, std::size_t, unsigned, std::uint32_t*);
template const char* get_listed(Source&, std::size_t, unsigned, std::uint64_t*);

}  // namespace pydedup::detail
