// SPDX-License-Identifier: Apache-2.0
// The hash with 8 registers of 2 lanes, two registers a step: unzipping two of them gives the low
// and the high halves of four lanes at once, and the long multiplications add as they go. The sums
// stay unswapped until a scramble (addition commutes), which saves a shuffle per load.
#pragma once

#include "kernels/hash_kernels.hpp"

namespace pydedup::isa_neon {
namespace {

#include "kernels/hash_common-inl.hpp"

struct HashState {
    uint64x2_t product[8];
    uint64x2_t sum[8];
};

inline uint64x2_t load_lanes(const std::uint8_t* data) noexcept {
    return vreinterpretq_u64_u8(vld1q_u8(data));  // any alignment
}

inline void hash_stripe(const std::uint8_t* data, const std::uint64_t* key,
                        HashState& state) noexcept {
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) {
        const uint64x2_t d0 = load_lanes(data + 16 * j);
        const uint64x2_t d1 = load_lanes(data + 16 * j + 16);
        const uint32x4_t keyed0 = vreinterpretq_u32_u64(veorq_u64(d0, vld1q_u64(key + 2 * j)));
        const uint32x4_t keyed1 = vreinterpretq_u32_u64(veorq_u64(d1, vld1q_u64(key + 2 * j + 2)));
        const uint32x4_t low = vuzp1q_u32(keyed0, keyed1);
        const uint32x4_t high = vuzp2q_u32(keyed0, keyed1);
        state.product[j] = vmlal_u32(state.product[j], vget_low_u32(low), vget_low_u32(high));
        state.product[j + 1] = vmlal_high_u32(state.product[j + 1], low, high);
        state.sum[j] = vaddq_u64(state.sum[j], d0);
        state.sum[j + 1] = vaddq_u64(state.sum[j + 1], d1);
    }
}

inline void hash_scramble(HashState& state) noexcept {
    const uint32x2_t factor = vdup_n_u32(static_cast<std::uint32_t>(kScrambleFactor));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        const uint64x2_t swapped = vextq_u64(state.sum[j], state.sum[j], 1);
        const uint64x2_t mixed = vaddq_u64(state.product[j], swapped);
        const uint64x2_t shifted = veorq_u64(mixed, vshrq_n_u64(mixed, 47));
        const uint64x2_t keyed = veorq_u64(shifted, vld1q_u64(kHashKeys.scramble + 2 * j));
        // 64 x 32 bit product from two 32 x 32 ones.
        const uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(keyed, 32), factor), 32);
        state.product[j] = vmlal_u32(high, vmovn_u64(keyed), factor);
        state.sum[j] = vdupq_n_u64(0);
    }
}

inline void hash_start(HashState& state) noexcept {
    for (int j = 0; j < 8; ++j) {
        state.product[j] = vld1q_u64(kHashKeys.start + 2 * j);
        state.sum[j] = vdupq_n_u64(0);
    }
}

inline void hash_finish(const HashState& state, std::size_t rows, std::size_t row_bytes,
                        std::uint64_t seed, std::uint64_t* out) noexcept {
    std::uint64_t keyed[2][kLanes];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        const uint64x2_t swapped = vextq_u64(state.sum[j], state.sum[j], 1);
        const uint64x2_t mixed = vaddq_u64(state.product[j], swapped);
        for (int h = 0; h < 2; ++h) {
            const uint64x2_t key = vld1q_u64(kHashKeys.fold[h] + 2 * j);
            vst1q_u64(keyed[h] + 2 * j, veorq_u64(mixed, key));
        }
    }
    fold_lanes(keyed, rows, row_bytes, seed, out);
}

constexpr int kHashUnroll = 1;

#include "kernels/hash_vector-inl.hpp"

constexpr HashKernels kHash = {hash_rows, hash_panel};

}  // namespace
}  // namespace pydedup::isa_neon
