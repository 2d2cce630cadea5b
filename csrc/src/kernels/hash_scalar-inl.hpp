// SPDX-License-Identifier: Apache-2.0
// The reference: the definition in hash_common-inl.hpp, written down lane by lane.
#pragma once

#include "kernels/hash_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {

#include "kernels/hash_common-inl.hpp"

void hash_stripe(const std::uint8_t* data, const std::uint64_t* key, std::uint64_t* product,
                 std::uint64_t* sum) noexcept {
    for (std::size_t i = 0; i < kLanes; ++i) {
        std::uint64_t d;
        __builtin_memcpy(&d, data + 8 * i, sizeof d);
        const std::uint64_t keyed = d ^ key[i];
        product[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
        sum[i] += d;
    }
}

void hash_scramble(std::uint64_t* product, std::uint64_t* sum) noexcept {
    std::uint64_t mixed[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) mixed[i] = product[i] + sum[i ^ 1];
    for (std::size_t i = 0; i < kLanes; ++i) {
        product[i] = (mixed[i] ^ (mixed[i] >> 47) ^ kHashKeys.scramble[i]) * kScrambleFactor;
        sum[i] = 0;
    }
}

void hash_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
               std::size_t stride_bytes, std::uint64_t seed, std::uint64_t* out) noexcept {
    std::uint64_t storage[kGroupStripes][kLanes];
    const std::uint64_t (*keys)[kLanes] = seeded_keys(seed, storage);
    std::uint64_t product[kLanes];
    std::uint64_t sum[kLanes] = {};
    for (std::size_t i = 0; i < kLanes; ++i) product[i] = kHashKeys.start[i];
    std::size_t stripe = 0;
    for (std::size_t r = 0; r < rows; ++r) {
        const std::uint8_t* row = data + r * stride_bytes;
        for (std::size_t at = 0; at < row_bytes; at += kStripeBytes) {
            std::uint8_t padded[kStripeBytes] = {};
            const std::size_t left = row_bytes - at;
            __builtin_memcpy(padded, row + at, left < kStripeBytes ? left : kStripeBytes);
            hash_stripe(padded, keys[stripe], product, sum);
            if (++stripe == kGroupStripes) {
                hash_scramble(product, sum);
                stripe = 0;
            }
        }
    }
    finish_hash(product, sum, rows, row_bytes, seed, out);
}

void hash_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                std::size_t row_bytes, std::size_t stride_bytes, std::uint64_t seed,
                std::uint64_t* out) noexcept {
    for (std::size_t b = 0; b < blocks; ++b) {
        hash_rows(data + b * row_bytes, rows, row_bytes, stride_bytes, seed, out + 2 * b);
    }
}

constexpr HashKernels kHash = {hash_rows, hash_panel};

}  // namespace
}  // namespace pydedup::isa_scalar
