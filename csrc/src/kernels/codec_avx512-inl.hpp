// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_avx512 {
namespace {

#include "kernels/codec_common-inl.hpp"

template <class Word>
void split_matrix(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                  std::size_t cols, bool rotate, std::uint8_t* planes) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        split_row<Word>(elements + r * stride, cols, rows * cols, rotate, planes + r * cols);
    }
}

template <class Word>
void merge_matrix(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                  bool rotate, std::uint8_t* elements, std::size_t stride) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        merge_row<Word>(planes, r * cols, cols, rotate, elements + r * stride);
    }
}

void split_planes(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                  std::size_t cols, std::size_t item_bytes, bool rotate,
                  std::uint8_t* planes) noexcept {
    switch (item_bytes) {
        case 8:
            return split_matrix<std::uint64_t>(elements, stride, rows, cols, rotate, planes);
        case 4:
            return split_matrix<std::uint32_t>(elements, stride, rows, cols, rotate, planes);
        case 2:
            return split_matrix<std::uint16_t>(elements, stride, rows, cols, rotate, planes);
        default:
            return split_matrix<std::uint8_t>(elements, stride, rows, cols, rotate, planes);
    }
}

void merge_planes(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                  std::size_t item_bytes, bool rotate, std::uint8_t* elements,
                  std::size_t stride) noexcept {
    switch (item_bytes) {
        case 8:
            return merge_matrix<std::uint64_t>(planes, rows, cols, rotate, elements, stride);
        case 4:
            return merge_matrix<std::uint32_t>(planes, rows, cols, rotate, elements, stride);
        case 2:
            return merge_matrix<std::uint16_t>(planes, rows, cols, rotate, elements, stride);
        default:
            return merge_matrix<std::uint8_t>(planes, rows, cols, rotate, elements, stride);
    }
}

constexpr CodecKernels kCodec = {split_planes, merge_planes, huffman_decode};

}  // namespace
}  // namespace pydedup::isa_avx512
