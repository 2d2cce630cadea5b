// SPDX-License-Identifier: Apache-2.0
// Masks of elements that became 0: found, applied, written and read.
#include "codec/zero_mask.hpp"

#include <algorithm>
#include <cstring>

#include "base/rounding.hpp"
#include "codec/delta_changed.hpp"
#include "codec/logarithm.hpp"

namespace pydedup::detail {
namespace {

constexpr std::size_t kFewest = 64;  // one of so many elements is worth a mask

template <class Word>
constexpr Word sign_of(bool ordered) noexcept {
    return ordered ? static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1)) : Word{0};
}

template <class Word>
Word word_at(const std::uint8_t* elements, std::size_t i) noexcept {
    Word word;
    std::memcpy(&word, elements + i * sizeof(Word), sizeof word);
    return word;
}

// Calls `with` with a word of so many bytes.
template <class With>
void by_width(std::size_t item_bytes, const With& with) {
    switch (item_bytes) {
        case 1:
            return with(std::uint8_t{});
        case 2:
            return with(std::uint16_t{});
        case 4:
            return with(std::uint32_t{});
        default:
            return with(std::uint64_t{});
    }
}

template <class Word>
constexpr Word magnitude_of(bool ordered) noexcept {
    return static_cast<Word>(~sign_of<Word>(ordered));
}

// How many elements are 0. As fast as it can be: of most blocks none is, and no mask is tried.
template <class Word>
std::size_t count_zeros(const std::uint8_t* elements, std::size_t count, Word magnitude) noexcept {
    using Vector __attribute__((vector_size(16))) = Word;
    constexpr std::size_t kLanes = sizeof(Vector) / sizeof(Word);
    constexpr std::size_t kAtOnce = 4;  // vectors
    constexpr std::size_t kMost = 63;   // times that, which a byte counts
    const Vector mask = magnitude + Vector{};
    // (Vectors in a std::array lose what makes them vectors where Word is a template's.)
    const auto all_bits_of_zeros = [&](std::size_t at) {
        Vector some;
        std::memcpy(&some, elements + at * sizeof(Word), sizeof some);
        return reinterpret_cast<Vector>((some & mask) == 0);
    };
    std::size_t total = 0;
    std::size_t i = 0;
    while (i + kAtOnce * kLanes <= count) {
        Vector zeros{};
        const std::size_t end = std::min(count, i + kMost * kAtOnce * kLanes);
        for (; i + kAtOnce * kLanes <= end; i += kAtOnce * kLanes) {
            zeros -= all_bits_of_zeros(i) + all_bits_of_zeros(i + kLanes) +
                     all_bits_of_zeros(i + 2 * kLanes) + all_bits_of_zeros(i + 3 * kLanes);
        }
        for (std::size_t k = 0; k < kLanes; ++k) total += static_cast<std::size_t>(zeros[k]);
    }
    for (; i < count; ++i) total += (word_at<Word>(elements, i) & magnitude) == 0 ? 1 : 0;
    return total;
}

// 1 where an element of the base became 0. Without a branch: which ones is as good as chance.
template <class Word>
unsigned became_zero(Word y, Word x, Word magnitude) noexcept {
    return static_cast<unsigned>((y & magnitude) == 0) &
           static_cast<unsigned>((x & magnitude) != 0);
}

// Sums over the elements that became 0.
struct Zeros {
    std::size_t n = 0;
    std::size_t negative = 0;      // in the base
    std::size_t negative_now = 0;  // in the block
};

template <class Word>
Zeros count_new_zeros(const std::uint8_t* block, const std::uint8_t* base, std::size_t count,
                      Word magnitude) noexcept {
    constexpr unsigned kTop = 8 * sizeof(Word) - 1;
    Zeros zeros;
    for (std::size_t i = 0; i < count; ++i) {
        const auto y = word_at<Word>(block, i);
        const auto x = word_at<Word>(base, i);
        const std::size_t became = became_zero(y, x, magnitude);
        zeros.n += became;
        zeros.negative += became & static_cast<std::size_t>(x >> kTop);
        zeros.negative_now += became & static_cast<std::size_t>(y >> kTop);
    }
    return zeros;
}

// The largest magnitude up to which all of the base's elements became 0, when of those above it
// hardly any did (rounding makes some of them equal to others that stayed); else 0.
template <class Word>
Word threshold_of(const std::uint8_t* block, const std::uint8_t* base, std::size_t count,
                  Word magnitude) noexcept {
    Word kept = magnitude;
    for (std::size_t i = 0; i < count; ++i) {
        const auto y = static_cast<Word>(word_at<Word>(block, i) & magnitude);
        const auto x = static_cast<Word>(word_at<Word>(base, i) & magnitude);
        kept = std::min(kept, y == 0 || x == 0 ? magnitude : x);
    }
    std::size_t n_above = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const auto y = static_cast<Word>(word_at<Word>(block, i) & magnitude);
        const auto x = static_cast<Word>(word_at<Word>(base, i) & magnitude);
        n_above += y == 0 && x >= kept ? 1 : 0;
    }
    return n_above * kFewest < count ? static_cast<Word>(kept - 1) : Word{0};
}

template <class Word>
void store_masked(std::uint8_t* masked, std::size_t i, Word x, bool gone, Word sign_kept) noexcept {
    // All bits where it stays, the sign at most where it does not.
    const auto stays = static_cast<Word>(static_cast<Word>(Word{gone} - 1) | sign_kept);
    const auto word = static_cast<Word>(x & stays);
    std::memcpy(masked + i * sizeof(Word), &word, sizeof word);
}

enum class MaskForm : std::uint8_t { none = 0, bits = 1, threshold = 2 };

}  // namespace

std::optional<ZeroMask> find_zeros(const std::uint8_t* block, const std::uint8_t* base,
                                   std::size_t count, DeltaLayout layout) {
    std::optional<ZeroMask> mask;
    by_width(layout.item_bytes, [&]<class Word>(Word) {
        const auto magnitude = magnitude_of<Word>(layout.ordered);
        if (count_zeros<Word>(block, count, magnitude) * kFewest < count) return;
        const Zeros zeros = count_new_zeros<Word>(block, base, count, magnitude);
        if (zeros.n * kFewest < count) return;
        mask.emplace();
        mask->n_set = zeros.n;
        mask->keeps_sign = layout.ordered && 2 * zeros.negative_now > zeros.negative;
        mask->threshold = threshold_of(block, base, count, magnitude);
        if (mask->threshold != 0) return;
        mask->bits.assign(ceil_div(count, 8), 0);
        for (std::size_t byte = 0; byte < mask->bits.size(); ++byte) {
            unsigned bits = 0;
            for (std::size_t i = 8 * byte; i < std::min(count, 8 * byte + 8); ++i) {
                bits |= became_zero(word_at<Word>(block, i), word_at<Word>(base, i), magnitude)
                        << (i % 8);
            }
            mask->bits[byte] = static_cast<std::uint8_t>(bits);
        }
    });
    return mask;
}

void apply_mask(const ZeroMask& mask, const std::uint8_t* base, std::size_t count,
                DeltaLayout layout, std::uint8_t* masked) noexcept {
    by_width(layout.item_bytes, [&]<class Word>(Word) {
        const Word sign_kept = mask.keeps_sign ? sign_of<Word>(layout.ordered) : Word{0};
        const auto magnitude = magnitude_of<Word>(layout.ordered);
        const auto threshold = static_cast<Word>(mask.threshold);
        if (threshold != 0) {
            for (std::size_t i = 0; i < count; ++i) {
                const auto x = word_at<Word>(base, i);
                store_masked(masked, i, x, (x & magnitude) <= threshold, sign_kept);
            }
            return;
        }
        for (std::size_t i = 0; i < count; ++i) {
            const bool gone = (mask.bits[i / 8] >> (i % 8) & 1) != 0;
            store_masked(masked, i, word_at<Word>(base, i), gone, sign_kept);
        }
    });
}

void put_mask(Sink& sink, const std::optional<ZeroMask>& of, DeltaLayout layout) {
    const MaskForm form = !of                  ? MaskForm::none
                          : of->threshold != 0 ? MaskForm::threshold
                                               : MaskForm::bits;
    sink.push_back(static_cast<std::uint8_t>(form));
    if (!of) return;
    const ZeroMask& mask = *of;
    sink.push_back(mask.keeps_sign ? 1 : 0);
    if (form == MaskForm::threshold) {
        for (unsigned i = 0; i < layout.item_bytes; ++i) {
            sink.push_back(static_cast<std::uint8_t>(mask.threshold >> 8 * i));
        }
        return;
    }
    put_bytes(sink, mask.bits);
}

std::uint64_t mask_bits(const ZeroMask& mask, std::size_t count) noexcept {
    if (mask.threshold != 0) return 0;
    const auto all = static_cast<std::uint32_t>(count);
    const auto set = static_cast<std::uint32_t>(mask.n_set);
    return (value_log2(all) - std::min(value_log2(all), value_log2(set) + value_log2(all - set))) >>
           kLogBits;
}

const char* get_mask(Source& source, std::size_t count, DeltaLayout layout,
                     std::optional<ZeroMask>& of) {
    const auto form = static_cast<MaskForm>(source.byte());
    if (source.failed) return "its mask is cut off";
    if (form == MaskForm::none) return nullptr;
    if (form != MaskForm::bits && form != MaskForm::threshold)
        return "its mask has an unknown form";
    const bool by_threshold = form == MaskForm::threshold;
    const std::uint8_t sign = source.byte();
    const std::span<const std::uint8_t> threshold =
        source.take(by_threshold ? layout.item_bytes : 0);
    if (source.failed) return "its mask is cut off";
    if (sign > 1 || (sign == 1 && !layout.ordered)) return "its mask has an impossible sign";
    ZeroMask& mask = of.emplace();
    mask.keeps_sign = sign == 1;
    if (by_threshold) {
        for (unsigned i = 0; i < layout.item_bytes; ++i) {
            mask.threshold |= std::uint64_t{threshold[i]} << 8 * i;
        }
        const std::uint64_t sign_bit = std::uint64_t{layout.ordered} << (8 * layout.item_bytes - 1);
        if (mask.threshold == 0 || (mask.threshold & sign_bit) != 0) {
            return "its mask has an impossible threshold";
        }
        return nullptr;
    }
    mask.bits.resize(ceil_div(count, 8));
    if (const char* wrong = get_bytes(source, mask.bits)) return wrong;
    if (count % 8 != 0 && mask.bits.back() >> (count % 8) != 0) {
        return "its mask ends with stray bits";
    }
    return nullptr;
}

}  // namespace pydedup::detail
