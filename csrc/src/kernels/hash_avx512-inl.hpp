// SPDX-License-Identifier: Apache-2.0
// The hash with 2 registers of 8 lanes. The sums stay unswapped until a scramble
// (addition commutes), which saves a shuffle per load.
#pragma once

#include "kernels/hash_avx2-inl.hpp"
#include "kernels/hash_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {

#include "kernels/hash_common-inl.hpp"

struct HashState {
    __m512i product[2];
    __m512i sum[2];
};

inline void add_lanes(__m512i d, std::size_t j, const std::uint64_t* key,
                      HashState& state) noexcept {
    const __m512i keyed = _mm512_xor_si512(d, _mm512_loadu_si512(key + 8 * j));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    state.product[j] = _mm512_add_epi64(state.product[j], product);
    state.sum[j] = _mm512_add_epi64(state.sum[j], d);
}

inline void hash_stripe(const std::uint8_t* data, const std::uint64_t* key,
                        HashState& state) noexcept {
    for (std::size_t j = 0; j < 2; ++j) {
        __m512i d = _mm512_loadu_si512(data + 64 * j);
        // Keeps the order of the loads. GCC gathers them, which costs a tenth where data is not
        // aligned to 32 bytes (Zen 4: 65 instead of 58 GB/s, against 68 and 70 where it is).
        asm volatile("" : "+v"(d));
        add_lanes(d, j, key, state);
    }
}

// The stripe of the last `left` bytes of a row: masked loads read nothing beyond them.
inline void hash_tail(const std::uint8_t* data, std::size_t left, const std::uint64_t* key,
                      HashState& state) noexcept {
    for (std::size_t j = 0; j < 2; ++j) {
        const std::size_t count = left < 64 * j ? 0 : left - 64 * j;
        const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
        const __m512i d = _mm512_maskz_loadu_epi8(mask, data + 64 * j);
        add_lanes(d, j, key, state);
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

inline void hash_start(HashState& state) noexcept {
    for (int j = 0; j < 2; ++j) {
        state.product[j] = _mm512_load_si512(kHashKeys.start + 8 * j);
        state.sum[j] = _mm512_setzero_si512();
    }
}

inline void hash_finish(const HashState& state, std::size_t rows, std::size_t row_bytes,
                        std::uint64_t seed, std::uint64_t* out) noexcept {
    alignas(64) std::uint64_t keyed[2][kLanes];
    for (std::size_t j = 0; j < 2; ++j) {
        const __m512i swapped = _mm512_shuffle_epi32(state.sum[j], _MM_PERM_BADC);
        const __m512i mixed = _mm512_add_epi64(state.product[j], swapped);
        for (std::size_t h = 0; h < 2; ++h) {
            const __m512i key = _mm512_load_si512(kHashKeys.fold[h] + 8 * j);
            _mm512_store_si512(keyed[h] + 8 * j, _mm512_xor_si512(mixed, key));
        }
    }
    fold_lanes(keyed, rows, row_bytes, seed, out);
}

constexpr int kHashUnroll = 8;

#include "kernels/hash_vector-inl.hpp"

// Panels come from memory, and there the 256-bit form of whole stripes is the faster one (Zen 4,
// one thread, 64 x 64 f32 blocks: 19.6 against 17.5 GB/s of 21 that can be read; what is in cache
// already, it takes at 43 instead of 53 GB/s). Where rows end within a stripe, masked loads count
// for more.
void hash_panel_measured(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                         std::size_t row_bytes, std::size_t stride_bytes, std::uint64_t seed,
                         std::uint64_t* out) noexcept {
    if (row_bytes % kStripeBytes == 0) {
        isa_avx2::hash_panel(data, blocks, rows, row_bytes, stride_bytes, seed, out);
    } else {
        hash_panel(data, blocks, rows, row_bytes, stride_bytes, seed, out);
    }
}

constexpr HashKernels kHash = {hash_rows, hash_panel_measured};

}  // namespace
}  // namespace pydedup::isa_avx512
