// SPDX-License-Identifier: Apache-2.0
// The reference: planes and Huffman decoding in plain C++.
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {

constexpr std::size_t kVectorBytes = 16;

#include "kernels/codec_common-inl.hpp"
#include "kernels/delta_common-inl.hpp"

constexpr CodecKernels kCodec = {split_planes<ScalarRows>, merge_planes<ScalarRows>, huffman_decode,
                                 kDelta};

}  // namespace
}  // namespace pydedup::isa_scalar
