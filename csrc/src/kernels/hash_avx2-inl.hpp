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

inline void hash_stripe(const std::uint8_t* data, const std::uint64_t* key,
                        HashState& state) noexcept {
    for (int j = 0; j < 4; ++j) {
        __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 32 * j));
        // Loaded once and in order: GCC loads it again for the sum, which makes the load ports the
        // limit (Zen 3: 41 instead of 53 GB/s, 36 instead of 51 where data is not aligned).
        asm volatile("" : "+x"(d));
        const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + 4 * j));
        const __m256i keyed = _mm256_xor_si256(d, k);
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        state.product[j] = _mm256_add_epi64(state.product[j], product);
        state.sum[j] = _mm256_add_epi64(state.sum[j], d);
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

#include "kernels/hash_vector-inl.hpp"

constexpr HashKernels kHash = {hash_rows, hash_panel};

}  // namespace
}  // namespace pydedup::isa_avx2
