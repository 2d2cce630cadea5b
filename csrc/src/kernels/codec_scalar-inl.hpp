// SPDX-License-Identifier: Apache-2.0
// The reference: planes and Huffman decoding in plain C++.
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {

constexpr std::size_t kVectorBytes = 16;

// For delta_products-inl.hpp: products, exact ones, and the sums of two each of 16 bits. (Vectors
// of 32 bits are not multiplied by what every CPU has.)
constexpr bool kPrefersPairs = false;

template <class Doubles>
inline void add_products(Doubles& sums, const Doubles& one, const Doubles& other) noexcept {
    sums += one * other;
}

template <class Ints>
inline void add_pairs(Ints& sums, const Ints& one, const Ints& other) noexcept {
    sums += (one << 16 >> 16) * (other << 16 >> 16) + (one >> 16) * (other >> 16);
}

// For delta_products-inl.hpp: how many of the first numbers were unpacked by vectors.
inline std::size_t unpack_first(const std::uint8_t*, std::size_t, unsigned, std::size_t,
                                std::int32_t*) noexcept {
    return 0;
}

#include "kernels/codec_common-inl.hpp"
#include "kernels/delta_common-inl.hpp"

constexpr CodecKernels kCodec = {split_planes<ScalarRows>, merge_planes<ScalarRows>, huffman_decode,
                                 kDelta};

}  // namespace
}  // namespace pydedup::isa_scalar
