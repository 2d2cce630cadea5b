// SPDX-License-Identifier: Apache-2.0
// hash_rows with 2 registers of 8 lanes. The sums stay unswapped until a scramble
// (addition commutes), which saves a shuffle per load.
#pragma once

#include "kernels/hash_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {

#include "kernels/hash_common-inl.hpp"

struct HashState {
    __m512i product[2];
    __m512i sum[2];
};

inline void hash_stripe(const std::uint8_t* data, const std::uint64_t* key,
                        HashState& state) noexcept {
    for (int j = 0; j < 2; ++j) {
        const __m512i d = _mm512_loadu_si512(data + 64 * j);
        const __m512i k = _mm512_loadu_si512(key + 8 * j);
        const __m512i keyed = _mm512_xor_si512(d, k);
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        state.product[j] = _mm512_add_epi64(state.product[j], product);
        state.sum[j] = _mm512_add_epi64(state.sum[j], d);
    }
}

// The stripe of the last `left` bytes of a row: masked loads read nothing beyond them.
inline void hash_tail(const std::uint8_t* data, std::size_t left, const std::uint64_t* key,
                      HashState& state) noexcept {
    for (std::size_t j = 0; j < 2; ++j) {
        const std::size_t count = left < 64 * j ? 0 : left - 64 * j;
        const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
        const __m512i d = _mm512_maskz_loadu_epi8(mask, data + 64 * j);
        const __m512i k = _mm512_loadu_si512(key + 8 * j);
        const __m512i keyed = _mm512_xor_si512(d, k);
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        state.product[j] = _mm512_add_epi64(state.product[j], product);
        state.sum[j] = _mm512_add_epi64(state.sum[j], d);
    }
}

inline void hash_scramble(HashState& state) noexcept {
    const __m512i factor = _mm512_set1_epi64(kScrambleFactor);
    for (int j = 0; j < 2; ++j) {
        const __m512i swapped = _mm512_shuffle_epi32(state.sum[j], _MM_PERM_BADC);
        const __m512i mixed = _mm512_add_epi64(state.product[j], swapped);
        const __m512i k = _mm512_load_si512(kHashKeys.scramble + 8 * j);
        const __m512i keyed =
            _mm512_xor_si512(_mm512_xor_si512(mixed, _mm512_srli_epi64(mixed, 47)), k);
        // 64 x 32 bit product from two 32 x 32 ones.
        const __m512i low = _mm512_mul_epu32(keyed, factor);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), factor);
        state.product[j] = _mm512_add_epi64(low, _mm512_slli_epi64(high, 32));
        state.sum[j] = _mm512_setzero_si512();
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
    for (int j = 0; j < 2; ++j) {
        state.product[j] =
            _mm512_load_si512(kHashKeys.start + 8 * j);
        state.sum[j] = _mm512_setzero_si512();
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
                hash_tail(row + at, row_bytes - at, keys[stripe], state);
                if (++stripe == kGroupStripes) {
                    hash_scramble(state);
                    stripe = 0;
                }
            }
        }
    }
    alignas(64) std::uint64_t product[kLanes];
    alignas(64) std::uint64_t sum[kLanes];
    for (int j = 0; j < 2; ++j) {
        _mm512_store_si512(product + 8 * j, state.product[j]);
        _mm512_store_si512(sum + 8 * j, state.sum[j]);
    }
    finish_hash(product, sum, rows, row_bytes, seed, out);
}

constexpr HashKernels kHash = {hash_rows};

}  // namespace
}  // namespace pydedup::isa_avx512
