// SPDX-License-Identifier: Apache-2.0
// The third quartile by selection. Magnitudes become integers of the same order; a sample says
// between which two values the quartile almost surely lies; one pass counts what is below and keeps
// what is between; the answer is among those. When the sample was wrong, all are kept.
//
// A rank is found bit by bit, from the highest one that differs: each step counts the keys below a
// pivot, and once few are left between the bounds only those are kept.
#include <bit>
#include <cmath>
#include <limits>

#include "similarity/batch.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kRun = 16;  // keys next to each other in a sample
constexpr std::size_t kSample = 512;

// The key with `rank` keys below it in order, down to bit `last`; the lower bits are 0. Changes
// `keys`.
template <class Key>
Key select(const SelectKernels<Key>& kernel, Key* keys, std::size_t count, std::size_t rank,
           Key last) noexcept {
    Key different = 0;
    for (std::size_t i = 1; i < count; ++i) different |= keys[i] ^ keys[0];
    if (different < last) return keys[0] & ~(last - 1);
    Key bit = std::bit_floor(different);
    Key found = keys[0] & ~(2 * bit - 1);
    std::size_t below = 0;     // keys below `found`
    std::size_t left = count;  // keys in [found, found + 2 * bit)
    std::size_t dropped = 0;   // keys that were dropped because they are below `found`
    for (; bit >= last && bit != 0; bit >>= 1) {
        const std::size_t under = dropped + kernel.count_below(keys, count, found | bit);
        if (under <= rank) {
            left -= under - below;
            below = under;
            found |= bit;
        } else {
            left = under - below;
        }
        if (left < count / 4) {
            const Filtered kept = kernel.filter(keys, count, found, found + bit, keys);
            dropped += kept.below;
            count = kept.kept;
        }
    }
    return found;
}

template <class Key>
double magnitude_of(Key key) noexcept {
    if constexpr (sizeof(Key) == 8) {
        return std::bit_cast<double>(key);
    } else {
        return static_cast<double>(std::bit_cast<float>(key));
    }
}

template <class Key>
struct Pair {
    Key at, next;  // the keys of two neighbouring ranks
};

// Keys `rank` and rank + 1. `scratch` has room for all keys.
template <class Key>
Pair<Key> select_pair(const SelectKernels<Key>& kernel, const Key* keys, std::size_t count,
                      std::size_t rank, Key* scratch) noexcept {
    std::copy_n(keys, count, scratch);
    const Key at = select(kernel, scratch, count, rank, Key{1});
    if (rank + 1 >= count || kernel.count_below(keys, count, at + 1) > rank + 1) return {at, at};
    return {at, kernel.next_above(keys, count, at)};
}

template <class Key>
Pair<Key> quartile_pair(const SelectKernels<Key>& kernel, const Key* keys, std::size_t count,
                        std::size_t rank, Key* scratch) noexcept {
    if (count <= 2 * kSample) return select_pair(kernel, keys, count, rank, scratch);
    Key sample[kSample];
    Key copy[kSample];
    const std::size_t runs = kSample / kRun;
    const std::size_t step = (count - kRun) / (runs - 1);
    for (std::size_t i = 0; i < runs; ++i) {
        std::copy_n(keys + i * step, kRun, sample + i * kRun);
    }
    // 6 % of the ranks on each side are three deviations of the sample's quartile; the bounds need
    // no more than the upper half of their bits.
    constexpr Key kCoarse = Key{1} << (4 * sizeof(Key) - 4);
    constexpr std::size_t kMiddle = kSample * 3 / 4;
    std::copy_n(sample, kSample, copy);
    const Key low = select(kernel, copy, kSample, kMiddle - kSample / 16, kCoarse);
    const Key high = select(kernel, sample, kSample, kMiddle + kSample / 16, kCoarse) + kCoarse;
    const Filtered found = kernel.filter(keys, count, low, high, scratch);
    // Not between the bounds, or too many are (of equal keys): all are looked at.
    if (rank < found.below || rank + 1 >= found.below + found.kept || 2 * found.kept > count) {
        return select_pair(kernel, keys, count, rank, scratch);
    }
    return select_pair(kernel, scratch, found.kept, rank - found.below, scratch + found.kept);
}

template <class Key>
double third_quartile(const SelectKernels<Key>& kernel, const Key* keys, std::size_t count,
                      Key infinity, Key* scratch) {
    if (kernel.count_below(keys, count, infinity + 1) != count) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const std::size_t rank = (count - 1) / 4 * 3 + (count - 1) % 4 * 3 / 4;
    const double fraction = static_cast<double>((count - 1) % 4 * 3 % 4) / 4;
    const Pair<Key> pair = quartile_pair(kernel, keys, count, rank, scratch);
    const double at = magnitude_of(pair.at);
    if (fraction == 0 || pair.at == pair.next) return at;
    return at + fraction * (magnitude_of(pair.next) - at);
}

}  // namespace

void block_magnitudes(const BlockBatch& blocks, std::span<double> out, unsigned threads) {
    similarity::check_count(out.size(), blocks.count, "magnitudes", "blocks");
    const SimilarityKernels& all = kernels().similarity;
    const std::size_t item = item_bytes(blocks.dtype);
    const std::size_t elements = blocks.rows * blocks.cols;
    const bool dense = blocks.row_stride == blocks.cols * item;
    const auto load = [&](std::size_t i, auto kernel, auto* keys) {
        const auto* data = reinterpret_cast<const std::uint8_t*>(blocks.block(i));
        if (dense) {
            kernel(data, elements, keys);
            return;
        }
        for (std::size_t r = 0; r < blocks.rows; ++r) {
            kernel(data + r * blocks.row_stride, blocks.cols, keys + r * blocks.cols);
        }
    };
    const auto keys_u32 = blocks.dtype == Dtype::f16    ? all.keys_f16
                          : blocks.dtype == Dtype::bf16 ? all.keys_bf16
                                                        : all.keys_f32;
    similarity::for_blocks(
        blocks.count, similarity::block_bytes(blocks), threads,
        [&](std::size_t begin, std::size_t end) {
            if (blocks.dtype == Dtype::f64) {
                std::vector<std::uint64_t> keys(2 * elements);
                for (std::size_t i = begin; i < end; ++i) {
                    load(i, all.keys_f64, keys.data());
                    out[i] =
                        third_quartile(all.select_u64, keys.data(), elements,
                                       std::uint64_t{0x7FF0000000000000}, keys.data() + elements);
                }
                return;
            }
            std::vector<std::uint32_t> keys(2 * elements);
            for (std::size_t i = begin; i < end; ++i) {
                load(i, keys_u32, keys.data());
                out[i] = third_quartile(all.select_u32, keys.data(), elements,
                                        std::uint32_t{0x7F800000}, keys.data() + elements);
            }
        });
}

}  // namespace pydedup
