// SPDX-License-Identifier: Apache-2.0
// hash_rows with 4 registers of 4 lanes. The sums stay unswapped until a scramble
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
        const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 32 * j));
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
        const __m256i k = _mm256_load_si256(
            reinterpret_cast<const __m256i*>(kHashKeys.scramble + 4 * j));
        const __m256i keyed =
            _mm256_xor_si256(_mm256_xor_si256(mixed, _mm256_srli_epi64(mixed, 47)), k);
        // 64 x 32 bit product from two 32 x 32 ones.
        const __m256i low = _mm256_mul_epu32(keyed, factor);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), factor);
        state.product[j] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
        state.sum[j] = _mm256_setzero_si256();
    }
}

inline void hash_group(const std::uint8_t* data, const std::uint64_t (*keys)[kLanes],
                       HashState& state) noexcept {
    for (std::size_t s = 0; s < kGroupStripes; ++s) {
        hash_stripe(data + s * kStripeBytes, keys[s], state);
    }
    hash_scramble(state);
}

void hash_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
               std::size_t stride_bytes, std::uint64_t seed, std::uint64_t* out) noexcept {
    std::uint64_t storage[kGroupStripes][kLanes];
    const std::uint64_t(*keys)[kLanes] = seeded_keys(seed, storage);
    HashState state;
    for (int j = 0; j < 4; ++j) {
        state.product[j] =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(kHashKeys.start + 4 * j));
        state.sum[j] = _mm256_setzero_si256();
    }
    // Dense rows of whole stripes are one long row to the stripes.
    if (row_bytes % kStripeBytes == 0 && (stride_bytes == row_bytes || rows == 1)) {
        const std::uint8_t* end = data + rows * row_bytes;
        for (; static_cast<std::size_t>(end - data) >= kGroupStripes * kStripeBytes;
             data += kGroupStripes * kStripeBytes) {
            hash_group(data, keys, state);
        }
        for (std::size_t s = 0; data != end; ++s, data += kStripeBytes) {
            hash_stripe(data, keys[s], state);
        }
    } else {
        std::size_t stripe = 0;
        for (std::size_t r = 0; r < rows; ++r) {
            const std::uint8_t* row = data + r * stride_bytes;
            // Strides of a large matrix are beyond the hardware's prefetcher.
            if (rows - r > kRowsAhead) prefetch_row(row + kRowsAhead * stride_bytes, row_bytes);
            std::size_t at = 0;
            for (; row_bytes - at >= kStripeBytes; at += kStripeBytes) {
                hash_stripe(row + at, keys[stripe], state);
                if (++stripe == kGroupStripes) {
                    hash_scramble(state);
                    stripe = 0;
                }
            }
            if (at != row_bytes) {
                alignas(64) std::uint8_t padded[kStripeBytes] = {};
                __builtin_memcpy(padded, row + at, row_bytes - at);
                hash_stripe(padded, keys[stripe], state);
                if (++stripe == kGroupStripes) {
                    hash_scramble(state);
                    stripe = 0;
                }
            }
        }
    }
    alignas(64) std::uint64_t product[kLanes];
    alignas(64) std::uint64_t sum[kLanes];
    for (int j = 0; j < 4; ++j) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(product + 4 * j), state.product[j]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(sum + 4 * j), state.sum[j]);
    }
    finish_hash(product, sum, rows, row_bytes, seed, out);
}

constexpr HashKernels kHash = {hash_rows};

}  // namespace
}  // namespace pydedup::isa_avx2
