// SPDX-License-Identifier: Apache-2.0
// Planes by vectors of 256 bits; Huffman decoding and small differences with BMI2.
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_avx2 {
namespace {

constexpr std::size_t kVectorBytes = 32;

#include "kernels/codec_common-inl.hpp"
#include "kernels/codec_pairs-inl.hpp"
#include "kernels/codec_planes-inl.hpp"
#include "kernels/delta_common-inl.hpp"
#include "kernels/delta_narrow-inl.hpp"

constexpr CodecKernels kCodec = {split_planes<VectorRows>, merge_planes<VectorRows>,
                                 huffman_decode_fast, kDeltaNarrow};

}  // namespace
}  // namespace pydedup::isa_avx2
