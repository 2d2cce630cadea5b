// SPDX-License-Identifier: Apache-2.0
// The parts in front of a delta's streams, to bytes and back. Reading accepts exactly what
// docs/format.md describes; whatever passes is safe to decode with.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/endian.hpp"
#include "codec/delta_bits.hpp"
#include "codec/delta_model.hpp"

namespace pydedup::detail {
namespace {

// Code lengths are written as ranks in a list that begins with what is likely behind the symbol
// before: the same length, its neighbours, no code.
class LengthGuess {
  public:
    using Order = std::array<std::uint8_t, kMaxCodeBits + 1>;

    /// All lengths by rank, and the rank of each length.
    [[nodiscard]] const Order& order() const noexcept { return kOrders[after_unused_][last_]; }
    [[nodiscard]] unsigned rank(unsigned length) const noexcept {
        return kRanks[after_unused_][last_][length];
    }
    void saw(unsigned length) noexcept {
        after_unused_ = length == 0 ? 1 : 0;
        if (length != 0) last_ = length;
    }

  private:
    using Orders = std::array<std::array<Order, kMaxCodeBits + 1>, 2>;  // [after unused][last]

    static constexpr Orders make_orders() noexcept {
        Orders orders{};
        for (unsigned after_unused = 0; after_unused < 2; ++after_unused) {
            for (unsigned last = 1; last <= kMaxCodeBits; ++last) {
                Order& order = orders[after_unused][last];
                std::size_t n = after_unused;  // 0, no code, comes first then
                order[n++] = static_cast<std::uint8_t>(last);
                for (unsigned far = 1; far < kMaxCodeBits; ++far) {
                    if (last + far <= kMaxCodeBits) {
                        order[n++] = static_cast<std::uint8_t>(last + far);
                    }
                    if (last > far) order[n++] = static_cast<std::uint8_t>(last - far);
                    if (far == 1 && after_unused == 0) order[n++] = 0;
                }
            }
        }
        return orders;
    }
    static constexpr Orders make_ranks(const Orders& orders) noexcept {
        Orders ranks{};
        for (unsigned after_unused = 0; after_unused < 2; ++after_unused) {
            for (unsigned last = 1; last <= kMaxCodeBits; ++last) {
                for (unsigned rank = 0; rank <= kMaxCodeBits; ++rank) {
                    ranks[after_unused][last][orders[after_unused][last][rank]] =
                        static_cast<std::uint8_t>(rank);
                }
            }
        }
        return ranks;
    }
    static const Orders kOrders;
    static const Orders kRanks;

    unsigned last_ = 6;  // the last length that was not 0
    unsigned after_unused_ = 0;
};

constexpr LengthGuess::Orders LengthGuess::kOrders = make_orders();
constexpr LengthGuess::Orders LengthGuess::kRanks = make_ranks(kOrders);

unsigned bits_of_group(std::size_t n_groups) noexcept {
    return static_cast<unsigned>(std::bit_width(n_groups - 1));
}

}  // namespace

void put_varint(Sink& sink, std::uint64_t value) {
    for (; value >= 128; value >>= 7) sink.push_back(static_cast<std::uint8_t>(value | 128));
    sink.push_back(static_cast<std::uint8_t>(value));
}

std::uint8_t Source::byte() noexcept {
    if (left.empty()) {
        failed = true;
        return 0;
    }
    const std::uint8_t byte = left[0];
    left = left.subspan(1);
    return byte;
}

std::uint64_t Source::varint() noexcept {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        const std::uint8_t next = byte();
        value |= static_cast<std::uint64_t>(next & 127) << shift;
        if (next < 128) {
            // One form only: no empty last byte, no bits that fall off.
            if ((next == 0 && shift != 0) || (shift == 63 && next > 1)) failed = true;
            return value;
        }
    }
    failed = true;
    return 0;
}

std::span<const std::uint8_t> Source::take(std::size_t count) noexcept {
    if (count > left.size()) {
        failed = true;
        return {};
    }
    const auto taken = left.first(count);
    left = left.subspan(count);
    return taken;
}

void put_alphabet(Sink& sink, const Alphabet& alphabet) {
    unsigned n_runs = 0;
    const auto begins_run = [&](unsigned i) {
        return i == 0 || alphabet.bases[i] != alphabet.bases[i - 1] + 1;
    };
    for (unsigned i = 0; i < alphabet.n_dictionary; ++i) n_runs += begins_run(i) ? 1 : 0;
    put_varint(sink, n_runs);
    std::uint64_t behind = 0;  // the value behind the last run
    for (unsigned i = 0; i < alphabet.n_dictionary;) {
        unsigned end = i + 1;
        while (end < alphabet.n_dictionary && !begins_run(end)) ++end;
        put_varint(sink, alphabet.bases[i] - behind);
        put_varint(sink, end - i - 1);
        behind = alphabet.bases[end - 1] + 1;
        i = end;
    }
    sink.push_back(static_cast<std::uint8_t>(alphabet.first_class));
    sink.push_back(static_cast<std::uint8_t>(alphabet.n_classes));
}

const char* get_alphabet(Source& source, unsigned value_bits, Alphabet& alphabet) {
    const std::uint64_t n_runs = source.varint();
    const std::uint64_t most = value_bits == 64 ? UINT64_MAX : (std::uint64_t{1} << value_bits) - 1;
    std::uint64_t next = 0;
    bool full = false;  // the last run ended with the largest value
    for (std::uint64_t run = 0; run < n_runs; ++run) {
        const std::uint64_t gap = source.varint();
        const std::uint64_t more = source.varint();
        if (source.failed || full || (run != 0 && gap == 0) || gap > most - next ||
            more > most - next - gap || more >= 256U - alphabet.n_dictionary) {
            return "a delta's dictionary is damaged";
        }
        const std::uint64_t first = next + gap;
        for (std::uint64_t i = 0; i <= more; ++i) {
            alphabet.bases[alphabet.n_dictionary++] = first + i;
        }
        full = first + more == most;
        next = first + more + 1;
    }
    const unsigned first_class = source.byte();
    const unsigned n_classes = source.byte();
    if (source.failed || first_class + n_classes > 2 * value_bits ||
        alphabet.n_dictionary + n_classes > 256 || alphabet.n_dictionary + n_classes == 0 ||
        (n_classes == 0 && first_class != 0)) {
        return "a delta's alphabet is damaged";
    }
    alphabet.set_classes(first_class, n_classes);
    return nullptr;
}

void put_contexts(Sink& sink, const Contexts& contexts, std::size_t rows) {
    sink.push_back(static_cast<std::uint8_t>(contexts.groups.size()));
    if (contexts.groups.size() > 1) {
        BitSink bits(sink);
        for (std::size_t r = 0; r < rows; ++r) {
            bits.put(contexts.group(r), bits_of_group(contexts.groups.size()));
        }
        bits.finish();
    }
    for (const RowGroup& group : contexts.groups) {
        sink.push_back(static_cast<std::uint8_t>(group.feature));
        if (group.feature == Feature::none) continue;
        sink.push_back(static_cast<std::uint8_t>(group.n_contexts));
        for (unsigned c = 1; c < group.n_contexts; ++c) sink.push_back(group.first[c]);
    }
    if (contexts.uses(Feature::exponent)) {
        sink.push_back(static_cast<std::uint8_t>(contexts.reference_exponent));
        sink.push_back(static_cast<std::uint8_t>(contexts.reference_exponent >> 8));
    }
}

const char* get_contexts(Source& source, std::size_t rows, DeltaLayout layout, Contexts& contexts) {
    const std::size_t n_groups = source.byte();
    if (n_groups == 0 || n_groups > kMaxGroups) return "a delta has a bad number of row groups";
    contexts.groups.resize(n_groups);
    if (n_groups > 1) {
        const unsigned bits_each = bits_of_group(n_groups);
        if (source.left.size() < (rows * bits_each + 7) / 8) return "a delta's row groups are cut";
        contexts.group_of_row.resize(rows);
        BitSource bits(source);
        for (std::uint8_t& group : contexts.group_of_row) {
            group = static_cast<std::uint8_t>(bits.value(bits_each));
            if (group >= n_groups) return "a delta names a row group that it does not have";
        }
        if (!bits.finish()) return "a delta's row groups end with stray bits";
    }
    for (RowGroup& group : contexts.groups) {
        const std::uint8_t feature = source.byte();
        group.feature = static_cast<Feature>(feature);
        if (feature > 2 || (feature != 0 && layout.mantissa_bits == 0)) {
            return "a delta has contexts that its dtype does not know";
        }
        if (feature != 0) {
            group.n_contexts = source.byte();
            if (group.n_contexts < 2 || group.n_contexts > kMaxContexts) {
                return "a row group has a bad number of contexts";
            }
            for (unsigned c = 1; c < group.n_contexts; ++c) {
                group.first[c] = source.byte();
                if (group.first[c] <= group.first[c - 1]) return "contexts are out of order";
            }
        }
        contexts.n_contexts += group.n_contexts;
    }
    if (contexts.n_contexts > kMaxContexts) return "a delta has too many contexts";
    if (contexts.uses(Feature::exponent)) {
        contexts.reference_exponent = source.byte();
        contexts.reference_exponent |= std::uint32_t{source.byte()} << 8;
    }
    return source.failed ? "a delta's contexts are cut off" : nullptr;
}

void put_code_bits(Sink& sink, const Codes& codes) {
    // Two bits a context (0 nothing, 1 one symbol, 2 a code), then what each of them has to say.
    BitSink bits(sink);
    for (const ContextCode& code : codes) {
        bits.put(!code.used ? 0 : code.single >= 0 ? 1 : 2, 2);
        if (!code.used) continue;
        if (code.single >= 0) {
            bits.put(static_cast<unsigned>(code.single), 8);
            continue;
        }
        bits.put(code.first, 8);
        bits.put(code.last, 8);
        LengthGuess guess;
        for (unsigned s = code.first; s <= code.last; ++s) {
            const unsigned rank = guess.rank(code.bits[s]);
            bits.put((1U << rank) - 1, rank + 1);
            guess.saw(code.bits[s]);
        }
    }
    bits.finish();
}

const char* get_code_bits(Source& source, unsigned n_contexts, unsigned n_symbols, Codes& codes) {
    codes.resize(n_contexts);
    BitSource bits(source);
    for (ContextCode& code : codes) {
        const unsigned kind = bits.value(2);
        if (kind == 3) return "a code has an unknown kind";
        code.used = kind != 0;
        if (kind == 0) continue;
        const unsigned first = bits.value(8);
        if (first >= n_symbols) return "a code names a symbol outside of the alphabet";
        if (kind == 1) {
            code.single = static_cast<std::int16_t>(first);
            continue;
        }
        const unsigned last = bits.value(8);
        if (last >= n_symbols || last <= first) return "a code has a bad range of symbols";
        code.first = static_cast<std::uint8_t>(first);
        code.last = static_cast<std::uint8_t>(last);
        LengthGuess guess;
        for (unsigned s = first; s <= last; ++s) {
            const unsigned rank = bits.ones(kMaxCodeBits);
            if (rank > kMaxCodeBits) return "a code has an impossible length";
            code.bits[s] = guess.order()[rank];
            guess.saw(code.bits[s]);
        }
        if (code.bits[first] == 0 || code.bits[last] == 0)
            return "a code has a bad range of symbols";
    }
    const bool ends_well = bits.finish();
    if (source.failed) return "a delta's codes are cut off";
    return ends_well ? nullptr : "a delta's codes end with stray bits";
}

}  // namespace pydedup::detail
