// SPDX-License-Identifier: Apache-2.0
// Rows that behave alike form a group: by what their differences are, as long as telling them apart
// saves estimated bits.
#include "codec/delta_rows.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "codec/logarithm.hpp"

namespace pydedup::detail {
namespace {

constexpr std::uint64_t kContextBits = 18;  // what a code takes beside its lengths
constexpr std::uint64_t kGroupBits = 24;

void count_all(const std::uint8_t* symbols, std::size_t count, unsigned n_symbols,
               Histogram& histogram) {
    Counts<4> counts(n_symbols);
    counts.add(count, [=](std::size_t i) { return symbols[i]; });
    for (unsigned s = 0; s < n_symbols; ++s) histogram[s] = counts[s];
}

void count_rows(const Differences& d, const std::uint8_t* symbols, unsigned n_symbols,
                const std::vector<std::uint8_t>& row_class, Histogram& histogram) {
    Counts<4> counts(histogram.size() / 256 * n_symbols);
    for (std::size_t r = 0; r < d.rows; ++r) {
        const std::size_t first = std::size_t{row_class[r]} * n_symbols;
        const std::uint8_t* const row = symbols + r * d.cols;
        counts.add(d.cols, [=](std::size_t i) { return first + row[i]; });
    }
    put_counts(counts, n_symbols, histogram);
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

// How many bytes are at least `least`, which is above 0.
std::size_t count_at_least(const std::uint8_t* bytes, std::size_t count, unsigned least) {
    using Bytes __attribute__((vector_size(16))) = std::uint8_t;
    constexpr std::size_t kMost = 255;  // that a byte counts
    const Bytes limit = static_cast<std::uint8_t>(least - 1) + Bytes{};
    std::size_t n = 0;
    std::size_t i = 0;
    while (i + sizeof(Bytes) <= count) {
        Bytes counts{};
        for (std::size_t k = 0; k < kMost && i + sizeof(Bytes) <= count; ++k, i += sizeof(Bytes)) {
            Bytes some;
            std::memcpy(&some, bytes + i, sizeof some);
            counts -= static_cast<Bytes>(some > limit);
        }
        std::array<std::uint8_t, sizeof(Bytes)> each;
        std::memcpy(each.data(), &counts, sizeof counts);
        n += static_cast<std::size_t>(sum_of(each.data(), each.size()));
    }
    for (; i < count; ++i) n += bytes[i] >= least ? 1 : 0;
    return n;
}

// Rows that did not change, rows whose differences are all but spelled out by their symbols, and
// the others by how many bits their differences have.
void classes_by_kind(const Differences& d, const Alphabet& alphabet, const std::uint8_t* symbols,
                     std::vector<std::uint8_t>& row_class) {
    // Symbols from here on have raw bits: widths never fall.
    unsigned inexact = 0;
    while (inexact < alphabet.n_symbols() && alphabet.widths[inexact] == 0) ++inexact;
    std::vector<std::uint32_t> width(d.rows);
    std::uint32_t widest = 0;
    for (std::size_t r = 0; r < d.rows; ++r) {
        const std::uint8_t* const row = symbols + r * d.cols;
        const std::uint8_t* const classes = d.classes + r * d.cols;
        const std::uint64_t sum = sum_of(classes, d.cols);
        const std::size_t raw = inexact == 0 ? d.cols : count_at_least(row, d.cols, inexact);
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
    if (d.cols == 0) return;  // never; the static analyser cannot know
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
        count_all(symbols, d.count(), n_symbols, histogram);
        return 1;
    }
    count_rows(d, symbols, n_symbols, row_class, histogram);
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

}  // namespace

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

void put_counts(const Counts<4>& counts, unsigned n_symbols, Histogram& histogram) {
    for (std::size_t row = 0; row < histogram.size() / 256; ++row) {
        for (unsigned s = 0; s < n_symbols; ++s) {
            histogram[row << 8 | s] = counts[row * n_symbols + s];
        }
    }
}

unsigned group_rows(const Differences& d, RowScore score, const Alphabet& alphabet,
                    const std::uint8_t* symbols, std::vector<std::uint8_t>& group_of_row,
                    Histogram& histogram) {
    group_of_row.assign(d.rows, 0);
    const bool by_kind = score == RowScore::kind;
    if (d.rows > 1) {
        if (by_kind) {
            classes_by_kind(d, alphabet, symbols, group_of_row);
        } else {
            classes_by_activity(d, group_of_row);
        }
    }
    return merge_classes(d, alphabet.n_symbols(), by_kind ? kMaxExactGroups : kMaxGroups, symbols,
                         group_of_row, histogram);
}

}  // namespace pydedup::detail
