// SPDX-License-Identifier: Apache-2.0
// The hash with 4 registers of 4 lanes. The sums stay unswapped until a scramble
// (addition commutes), which saves a shuffle per load.
#pragma once

#include "kernels/hash_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {

#include "kernels/hash_common-inl.hpp"

struct HashState {
    __m256i product[4];
    __m256i sum[4];
};

inline void add_lanes(__m256i d, std::size_t j, const std::uint64_t* key,
                      HashState& state) noexcept {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + 4 * j));
    const __m256i keyed = _mm256_xor_si256(d, k);
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    state.product[j] = _mm256_add_epi64(state.product[j], product);
    state.sum[j] = _mm256_add_epi64(state.sum[j], d);
}

inline __m256i load_lanes(const std::uint8_t* data) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

inline void hash_stripe(const std::uint8_t* data, const std::uint64_t* key,
                        HashState& state) noexcept {
    for (std::size_t j = 0; j < 4; ++j) {
        __m256i d = load_lanes(data + 32 * j);
        // Loaded once and in order: GCC loads it again for the sum, which makes the load ports the
        // limit (Zen 3: 41 instead of 53 GB/s, 36 instead of 51 where data is not aligned).
        asm volatile("" : "+x"(d));
        add_lanes(d, j, key, state);
    }
}

// Fewer than 32 bytes, and zeros. Masked loads, of 4 bytes each, read nothing beyond them.
inline __m256i load_first(const std::uint8_t* data, std::size_t count) noexcept {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i whole = _mm256_set1_epi32(static_cast<int>(count / 4));
    const __m256i words = _mm256_maskload_epi32(reinterpret_cast<const int*>(data),
                                                _mm256_cmpgt_epi32(whole, number));
    if (count % 4 == 0) return words;
    std::uint32_t last = 0;
    for (std::size_t i = count; i % 4 != 0; --i) last = last << 8 | data[i - 1];
    const __m256i rest = _mm256_set1_epi32(static_cast<int>(last));
    return _mm256_blendv_epi8(words, rest, _mm256_cmpeq_epi32(whole, number));
}

inline void hash_tail(const std::uint8_t* data, std::size_t left, const std::uint64_t* key,
                      HashState& state) noexcept {
#pragma GCC unroll 4  // else the state is in memory, for whole stripes too
    for (std::size_t j = 0; j < 4; ++j) {
        const std::size_t before = 32 * j;
        const std::size_t count = left < before ? 0 : left - before;
        const __m256i d = count >= 32 ? load_lanes(data + before)
                          : count > 0 ? load_first(data + before, count)
                                      : _mm256_setzero_si256();
        add_lanes(d, j, key, state);
    }
}

inline void hash_scramble(HashState& state) noexcept {
    const __m256i factor = _mm256_set1_epi64x(kScrambleFactor);
    for (int j = 0; j < 4; ++j) {
        const __m256i swapped = _mm256_shuffle_epi32(state.sum[j], _MM_SHUFFLE(1, 0, 3, 2));
        const __m256i mixed = _mm256_add_epi64(state.product[j], swapped);
        const __m256i k =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(kHashKeys.scramble + 4 * j));
        const __m256i keyed =
            _mm256_xor_si256(_mm256_xor_si256(mixed, _mm256_srli_epi64(mixed, 47)), k);
        // 64 x 32 bit product from two 32 x 32 ones.
        const __m256i low = _mm256_mul_epu32(keyed, factor);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), factor);
        state.product[j] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
        state.sum[j] = _mm256_setzero_si256();
    }
}

inline void hash_start(HashState& state) noexcept {
    for (int j = 0; j < 4; ++j) {
        state.product[j] =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(kHashKeys.start + 4 * j));
        state.sum[j] = _mm256_setzero_si256();
    }
}

inline void hash_finish(const HashState& state, std::size_t rows, std::size_t row_bytes,
                        std::uint64_t seed, std::uint64_t* out) noexcept {
    alignas(64) std::uint64_t keyed[2][kLanes];
    for (std::size_t j = 0; j < 4; ++j) {
        const __m256i swapped = _mm256_shuffle_epi32(state.sum[j], _MM_SHUFFLE(1, 0, 3, 2));
        const __m256i mixed = _mm256_add_epi64(state.product[j], swapped);
        for (std::size_t h = 0; h < 2; ++h) {
            const auto* key = reinterpret_cast<const __m256i*>(kHashKeys.fold[h] + 4 * j);
            _mm256_store_si256(reinterpret_cast<__m256i*>(keyed[h] + 4 * j),
                               _mm256_xor_si256(mixed, _mm256_load_si256(key)));
        }
    }
    fold_lanes(keyed, rows, row_bytes, seed, out);
}

constexpr int kHashUnroll = 1;

#include "kernels/hash_vector-inl.hpp"

constexpr HashKernels kHash = {hash_rows, hash_panel};

}  // namespace
}  // namespace pydedup::isa_avx2
