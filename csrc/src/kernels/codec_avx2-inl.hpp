// SPDX-License-Identifier: Apache-2.0
// Planes by vectors of 256 bits; Huffman decoding and small differences with BMI2.
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {

constexpr std::size_t kVectorBytes = 32;

// For delta_products-inl.hpp: products, exact ones, and the sums of two each of 16 bits.
constexpr bool kPrefersPairs = true;

template <class Doubles>
inline void add_products(Doubles& sums, const Doubles& one, const Doubles& other) noexcept {
    sums = reinterpret_cast<Doubles>(_mm256_fmadd_pd(reinterpret_cast<__m256d>(one),
                                                     reinterpret_cast<__m256d>(other),
                                                     reinterpret_cast<__m256d>(sums)));
}

template <class Ints>
inline void add_pairs(Ints& sums, const Ints& one, const Ints& other) noexcept {
    sums += reinterpret_cast<Ints>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(one), reinterpret_cast<__m256i>(other)));
}

#include "kernels/codec_common-inl.hpp"
#include "kernels/codec_numbers-inl.hpp"
#include "kernels/codec_pairs-inl.hpp"
#include "kernels/codec_planes-inl.hpp"
#include "kernels/delta_common-inl.hpp"
#include "kernels/delta_narrow-inl.hpp"

constexpr CodecKernels kCodec = {split_planes<VectorRows>, merge_planes<VectorRows>,
                                 huffman_decode_fast, kDeltaNarrow};

}  // namespace
}  // namespace pydedup::isa_avx2
