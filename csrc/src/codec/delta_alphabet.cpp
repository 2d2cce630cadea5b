// SPDX-License-Identifier: Apache-2.0
// A class symbol spends raw bits on telling the values of its class apart, as if they were equally
// frequent. A value that is much more frequent than its class makes the others pays for an entry in
// the dictionary. Small values are counted by a table; large ones by hashing, and only when a
// sample of the block has repeats among them.
#include "codec/delta_alphabet.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "codec/counting.hpp"
#include "codec/logarithm.hpp"

namespace pydedup::detail {
namespace {

constexpr std::uint32_t kSmall = 4096;  // values below are counted by table
constexpr unsigned kSmallClasses = 2 * 12;
constexpr std::size_t kMaxDictionary = 192;
constexpr std::uint32_t kMinRepeats = 3;
constexpr std::size_t kSample = 512;
constexpr std::size_t kMinSampleRepeats = 4;
// What an entry costs, in bits: its place in the dictionary and in the codes of the contexts.
constexpr std::uint64_t kSmallEntryBits = 24;
constexpr std::uint64_t kLargeEntryBits = 48;

// Counts of the large values of a sample, then of the whole block.
class Counter {
  public:
    static constexpr std::size_t kSlots = 2048;  // several times kSample

    struct Slot {
        std::uint64_t value;
        std::uint32_t count;
    };

    /// Returns whether the value was there before.
    bool insert(std::uint64_t value) noexcept {
        Slot& slot = find(value);
        if (slot.count != 0) return true;
        slot = {value, 1};
        return false;
    }
    void count(std::uint64_t value) noexcept {
        Slot& slot = find(value);
        slot.count += slot.count != 0 ? 1 : 0;
    }
    [[nodiscard]] const std::array<Slot, kSlots>& slots() const noexcept { return slots_; }

  private:
    Slot& find(std::uint64_t value) noexcept {
        auto at = static_cast<std::size_t>(value * 0x9E3779B97F4A7C15U >> 53);
        while (slots_[at].count != 0 && slots_[at].value != value) at = (at + 1) % kSlots;
        return slots_[at];
    }
    std::array<Slot, kSlots> slots_{};
};

struct Entry {
    std::uint64_t gain;
    std::uint64_t value;
    unsigned z_class;
    std::uint32_t count;
};

// Bits that an entry saves: its class would give it width + log2(class / count) bits' worth of
// code, of which the dictionary spends what its frequency asks for.
std::uint64_t gain_of(std::uint32_t count, std::uint32_t class_count, unsigned width) noexcept {
    const std::uint64_t with =
        std::uint64_t{log2_fixed(count)} + (std::uint64_t{width} << kLogBits);
    const std::uint64_t share = log2_fixed(class_count);
    return with <= share ? 0 : (with - share) * count >> kLogBits;
}

unsigned class_of_value(std::uint64_t z) noexcept {
    if (z < 2) return static_cast<unsigned>(z);
    const auto top = static_cast<unsigned>(std::bit_width(z)) - 1;
    return 2 * top + static_cast<unsigned>(z >> (top - 1) & 1);
}

using ClassCounts = std::array<std::uint32_t, 128>;

void consider(std::vector<Entry>& entries, const ClassCounts& in_class, std::uint64_t value,
              std::uint32_t count, std::uint64_t cost) {
    if (count < kMinRepeats) return;
    const unsigned z_class = class_of_value(value);
    const std::uint64_t gain = gain_of(count, in_class[z_class], class_width(z_class));
    if (gain > cost) entries.push_back({gain - cost, value, z_class, count});
}

template <class Wide>
void collect_large(const Wide* z, std::size_t count, const ClassCounts& in_class,
                   std::vector<Entry>& entries) {
    Counter counter;
    const std::size_t step = std::max<std::size_t>(1, count / kSample) | 1;  // not a column's
    std::size_t repeats = 0;
    for (std::size_t i = 0, seen = 0; i < count && seen < 2 * kSample; i += step, ++seen) {
        if (z[i] >= kSmall && counter.insert(z[i])) ++repeats;
    }
    if (repeats < kMinSampleRepeats) return;
    // The sample's values start from 1 and are counted 1 too often; the threshold knows.
    for (std::size_t i = 0; i < count; ++i) {
        if (z[i] >= kSmall) counter.count(z[i]);
    }
    for (const Counter::Slot& slot : counter.slots()) {
        if (slot.count != 0) {
            consider(entries, in_class, slot.value, slot.count - 1, kLargeEntryBits);
        }
    }
}

template <class Wide>
void collect_small(const Wide* z, std::size_t count, const ClassCounts& in_class,
                   std::vector<Entry>& entries) {
    Counts<2> counts(kSmall + 1);
    counts.add(count, [=](std::size_t i) { return std::min<Wide>(z[i], kSmall); });
    for (unsigned z_class = 4; z_class < kSmallClasses; ++z_class) {
        // A value has to be frequent within its class to be worth anything.
        if (in_class[z_class] < kMinRepeats) continue;
        const unsigned width = class_width(z_class);
        const std::uint32_t first = (2U | (z_class & 1)) << width;
        for (std::uint32_t value = first; value < first + (1U << width); ++value) {
            consider(entries, in_class, value, counts[value], kSmallEntryBits);
        }
    }
}

template <class Wide>
void collect(const Wide* z, std::size_t count, const ClassCounts& in_class,
             std::vector<Entry>& entries) {
    std::uint32_t n_small = 0;  // of those that have raw bits
    std::uint32_t n_large = 0;
    for (unsigned c = 4; c < in_class.size(); ++c) {
        (c < kSmallClasses ? n_small : n_large) += in_class[c];
    }
    if (n_small >= count / 32) collect_small(z, count, in_class, entries);
    if (n_large >= count / 64) collect_large(z, count, in_class, entries);
}

// Symbols of large dictionary entries.
class LargeSymbols {
  public:
    void add(std::uint64_t value, unsigned symbol) noexcept {
        std::size_t slot = slot_of(value);
        while (symbols_[slot] != 0) slot = (slot + 1) % kSlots;
        symbols_[slot] = static_cast<std::uint16_t>(symbol + 1);
        values_[slot] = value;
    }

    [[nodiscard]] unsigned find(std::uint64_t value, unsigned otherwise) const noexcept {
        std::size_t slot = slot_of(value);
        for (; symbols_[slot] != 0; slot = (slot + 1) % kSlots) {
            if (values_[slot] == value) return symbols_[slot] - 1U;
        }
        return otherwise;
    }

  private:
    static constexpr std::size_t kSlots = 1024;  // several times kMaxDictionary
    static std::size_t slot_of(std::uint64_t value) noexcept {
        return static_cast<std::size_t>(value * 0x9E3779B97F4A7C15U >> 54);
    }
    std::array<std::uint16_t, kSlots> symbols_{};
    std::array<std::uint64_t, kSlots> values_;
};

template <class Wide>
void write_symbols_of(const Differences& differences, const Alphabet& alphabet,
                      std::uint8_t* symbols) {
    const std::size_t count = differences.count();
    const std::uint8_t* const classes = differences.classes;
    const auto from_class =
        static_cast<std::uint8_t>(alphabet.n_dictionary - alphabet.first_class);  // may wrap
    const auto by_class = [&](unsigned z_class) {
        return static_cast<std::uint8_t>(z_class + from_class);
    };
    if (alphabet.n_dictionary == 0) {
        for (std::size_t i = 0; i < count; ++i) symbols[i] = by_class(classes[i]);
        return;
    }
    // The symbol of every small value, classes first.
    std::array<std::uint8_t, kSmall> small;
    small[0] = by_class(0);
    small[1] = by_class(1);
    for (unsigned z_class = 2; z_class < kSmallClasses; ++z_class) {
        const std::size_t size = z_class < 4 ? 1 : std::size_t{1} << class_width(z_class);
        const std::size_t first = z_class < 4 ? z_class : (2U | (z_class & 1)) * size;
        std::memset(&small[first], by_class(z_class), size);
    }
    LargeSymbols large;
    bool any_large = false;
    for (unsigned s = 0; s < alphabet.n_dictionary; ++s) {
        if (alphabet.bases[s] < kSmall) {
            small[static_cast<std::size_t>(alphabet.bases[s])] = static_cast<std::uint8_t>(s);
        } else {
            large.add(alphabet.bases[s], s);
            any_large = true;
        }
    }
    const auto* const z = static_cast<const Wide*>(differences.z);
    // Without a branch: which values are small is as good as chance.
    for (std::size_t i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(std::min(z[i], Wide{kSmall - 1}));
        const std::uint8_t own = by_class(classes[i]);
        symbols[i] = z[i] < kSmall ? small[at] : own;
    }
    if (!any_large) return;
    for (std::size_t i = 0; i < count; ++i) {
        if (z[i] >= kSmall) {
            symbols[i] = static_cast<std::uint8_t>(large.find(z[i], symbols[i]));
        }
    }
}

void write_symbols(const Differences& differences, const Alphabet& alphabet,
                   std::uint8_t* symbols) {
    if (differences.wide) {
        write_symbols_of<std::uint64_t>(differences, alphabet, symbols);
    } else {
        write_symbols_of<std::uint32_t>(differences, alphabet, symbols);
    }
}

}  // namespace

void choose_alphabet(const Differences& differences, Alphabet& alphabet, std::uint8_t* symbols) {
    ClassCounts in_class;
    Counts<4> by_class(in_class.size());
    const std::uint8_t* const classes = differences.classes;
    by_class.add(differences.count(), [=](std::size_t i) { return classes[i]; });
    for (std::size_t c = 0; c < in_class.size(); ++c) in_class[c] = by_class[c];
    std::vector<Entry> entries;
    if (differences.wide) {
        collect(static_cast<const std::uint64_t*>(differences.z), differences.count(), in_class,
                entries);
    } else {
        collect(static_cast<const std::uint32_t*>(differences.z), differences.count(), in_class,
                entries);
    }
    const std::size_t room =
        std::min<std::size_t>(kMaxDictionary, 256 - (differences.wide ? 128 : 64));
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
        return a.gain != b.gain ? a.gain > b.gain : a.value < b.value;
    });
    if (entries.size() > room) entries.resize(room);
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return a.value < b.value; });
    for (const Entry& entry : entries) {
        alphabet.bases[alphabet.n_dictionary++] = entry.value;
        in_class[entry.z_class] -= entry.count;
    }
    const auto used = [](std::uint32_t n) { return n != 0; };
    const auto first = std::find_if(in_class.begin(), in_class.end(), used);
    if (first == in_class.end()) {
        alphabet.set_classes(0, 0);
    } else {
        const auto last = std::find_if(in_class.rbegin(), in_class.rend(), used).base();
        alphabet.set_classes(static_cast<unsigned>(first - in_class.begin()),
                             static_cast<unsigned>(last - first));
    }
    write_symbols(differences, alphabet, symbols);
}

void reuse_alphabet(const Differences& differences, const Alphabet& like, Alphabet& alphabet,
                    std::uint8_t* symbols) {
    alphabet = {};
    alphabet.n_dictionary = like.n_dictionary;
    std::copy_n(like.bases.begin(), like.n_dictionary, alphabet.bases.begin());
    std::uint8_t first = 255;
    std::uint8_t last = 0;
    for (std::size_t i = 0; i < differences.count(); ++i) {
        first = std::min(first, differences.classes[i]);
        last = std::max(last, differences.classes[i]);
    }
    alphabet.set_classes(first, last - first + 1U);
    write_symbols(differences, alphabet, symbols);
}

}  // namespace pydedup::detail
