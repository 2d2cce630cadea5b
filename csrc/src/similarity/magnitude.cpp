// SPDX-License-Identifier: Apache-2.0
// The third quartile by selection. Magnitudes become integers of the same order; a sample says
// between which two values the quartile almost surely lies; one pass counts what is below and keeps
// what is between; the answer is among those. When the sample was wrong, all are kept.
//
// A rank within few keys is found bit by bit, from the highest: each step counts the keys below a
// pivot, at the speed of the cache.
#include <bit>
#include <cmath>
#include <limits>

#include "similarity/batch.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kRun = 16;  // keys next to each other in a sample
constexpr std::size_t kSample = 512;

// The key with `rank` keys below it in order.
template <class Key>
Key select(const SelectKernels<Key>& kernel, const Key* keys, std::size_t count,
           std::size_t rank) noexcept {
    Key found = 0;
    for (Key bit = ~(~Key{0} >> 1) >> 1; bit != 0; bit >>= 1) {  // the highest bit is never set
        if (kernel.count_below(keys, count, found | bit) <= rank) found |= bit;
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

template <class Key>
Pair<Key> select_pair(const SelectKernels<Key>& kernel, const Key* keys, std::size_t count,
                      std::size_t rank) noexcept {
    const Key at = select(kernel, keys, count, rank);
    if (rank + 1 >= count || kernel.count_below(keys, count, at + 1) > rank + 1) return {at, at};
    return {at, kernel.next_above(keys, count, at)};
}

// Keys `rank` and rank + 1 of `keys`, which are changed.
template <class Key>
Pair<Key> quartile_pair(const SelectKernels<Key>& kernel, Key* keys, std::size_t count,
                        std::size_t rank) noexcept {
    if (count <= 4 * kSample) return select_pair(kernel, keys, count, rank);
    Key sample[kSample];
    const std::size_t runs = kSample / kRun;
    const std::size_t step = (count - kRun) / (runs - 1);
    for (std::size_t i = 0; i < runs; ++i) {
        std::copy_n(keys + i * step, kRun, sample + i * kRun);
    }
    // 12 % of the ranks on each side are six deviations of the sample's quartile.
    const Key low = select(kernel, sample, kSample, kSample * 3 / 4 - kSample / 8);
    const Key high = select(kernel, sample, kSample, kSample * 3 / 4 + kSample / 8) + 1;
    std::vector<Key> kept(count);
    const Filtered found = kernel.filter(keys, count, low, high, kept.data());
    if (rank >= found.below && rank + 1 < found.below + found.kept) {
        return select_pair(kernel, kept.data(), found.kept, rank - found.below);
    }
    return select_pair(kernel, keys, count, rank);
}

template <class Key>
double third_quartile(const SelectKernels<Key>& kernel, Key* keys, std::size_t count,
                      Key infinity) {
    if (kernel.count_below(keys, count, infinity + 1) != count) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const std::size_t rank = (count - 1) / 4 * 3 + (count - 1) % 4 * 3 / 4;
    const double fraction = static_cast<double>((count - 1) % 4 * 3 % 4) / 4;
    const Pair<Key> pair = quartile_pair(kernel, keys, count, rank);
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
    similarity::for_blocks(blocks.count, similarity::block_bytes(blocks), threads,
                           [&](std::size_t begin, std::size_t end) {
                               if (blocks.dtype == Dtype::f64) {
                                   std::vector<std::uint64_t> keys(elements);
                                   for (std::size_t i = begin; i < end; ++i) {
                                       load(i, all.keys_f64, keys.data());
                                       out[i] =
                                           third_quartile(all.select_u64, keys.data(), elements,
                                                          std::uint64_t{0x7FF0000000000000});
                                   }
                                   return;
                               }
                               std::vector<std::uint32_t> keys(elements);
                               for (std::size_t i = begin; i < end; ++i) {
                                   load(i, keys_u32, keys.data());
                                   out[i] = third_quartile(all.select_u32, keys.data(), elements,
                                                           std::uint32_t{0x7F800000});
                               }
                           });
}

}  // namespace pydedup
