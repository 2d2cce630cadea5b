// SPDX-License-Identifier: Apache-2.0
// Planes by the structure loads and stores of NEON, which take 2- and 4-byte elements apart (and
// put them together) by themselves: 16 elements a step. A rotation by one bit is then a shift
// within a plane that takes its free bit from the neighbouring plane. Huffman decoding by pairs, as
// in the other vector kernels: shifts by a register need no extension here.
#pragma once

#include "kernels/codec_kernels.hpp"

namespace pydedup::isa_neon {
namespace {

constexpr std::size_t kVectorBytes = 16;

#include "kernels/codec_common-inl.hpp"
#include "kernels/codec_pairs-inl.hpp"
#include "kernels/delta_common-inl.hpp"

constexpr std::size_t kElements = 16;  // elements, whatever their size

// The planes of elements rotated left by one bit, and back.
template <std::size_t N>
inline void rotate_planes_left(uint8x16_t* p) noexcept {
    const uint8x16_t top = p[N - 1];
#pragma GCC unroll 8
    for (std::size_t i = N - 1; i > 0; --i) p[i] = vsriq_n_u8(vshlq_n_u8(p[i], 1), p[i - 1], 7);
    p[0] = vsriq_n_u8(vshlq_n_u8(p[0], 1), top, 7);
}

template <std::size_t N>
inline void rotate_planes_right(uint8x16_t* p) noexcept {
    const uint8x16_t bottom = p[0];
#pragma GCC unroll 8
    for (std::size_t i = 0; i + 1 < N; ++i) p[i] = vsliq_n_u8(vshrq_n_u8(p[i], 1), p[i + 1], 7);
    p[N - 1] = vsliq_n_u8(vshrq_n_u8(p[N - 1], 1), bottom, 7);
}

inline void load_planes(const std::uint8_t* from, uint8x16_t (&p)[2]) noexcept {
    const uint8x16x2_t v = vld2q_u8(from);
    p[0] = v.val[0];
    p[1] = v.val[1];
}

inline void store_elements(std::uint8_t* to, const uint8x16_t (&p)[2]) noexcept {
    vst2q_u8(to, {{p[0], p[1]}});
}

inline void load_planes(const std::uint8_t* from, uint8x16_t (&p)[4]) noexcept {
    const uint8x16x4_t v = vld4q_u8(from);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) p[i] = v.val[i];
}

inline void store_elements(std::uint8_t* to, const uint8x16_t (&p)[4]) noexcept {
    vst4q_u8(to, {{p[0], p[1], p[2], p[3]}});
}

// Bytes k and k + 4 of elements of 8 alternate in register k of a load by fours.
inline void load_planes(const std::uint8_t* from, uint8x16_t (&p)[8]) noexcept {
    const uint8x16x4_t first = vld4q_u8(from);
    const uint8x16x4_t second = vld4q_u8(from + 64);
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k) {
        p[k] = vuzp1q_u8(first.val[k], second.val[k]);
        p[k + 4] = vuzp2q_u8(first.val[k], second.val[k]);
    }
}

inline void store_elements(std::uint8_t* to, const uint8x16_t (&p)[8]) noexcept {
    uint8x16x4_t first;
    uint8x16x4_t second;
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k) {
        first.val[k] = vzip1q_u8(p[k], p[k + 4]);
        second.val[k] = vzip2q_u8(p[k], p[k + 4]);
    }
    vst4q_u8(to, first);
    vst4q_u8(to + 64, second);
}

struct NeonRows {
    template <class Word>
    static void split(const std::uint8_t* elements, std::size_t cols, std::size_t plane_bytes,
                      bool rotate, std::uint8_t* planes) noexcept {
        constexpr std::size_t N = sizeof(Word);
        std::size_t i = 0;
        if constexpr (N > 1) {
            for (; i + kElements <= cols; i += kElements) {
                uint8x16_t p[N];
                load_planes(elements + i * N, p);
                if (rotate) rotate_planes_left<N>(p);
#pragma GCC unroll 8
                for (std::size_t k = 0; k < N; ++k) vst1q_u8(planes + k * plane_bytes + i, p[k]);
            }
        }
        ScalarRows::split<Word>(elements + i * N, cols - i, plane_bytes, rotate, planes + i);
    }

    template <class Word>
    static void merge(const std::uint8_t* const* planes, std::size_t at, std::size_t cols,
                      bool rotate, std::uint8_t* elements) noexcept {
        constexpr std::size_t N = sizeof(Word);
        std::size_t i = 0;
        if constexpr (N > 1) {
            for (; i + kElements <= cols; i += kElements) {
                uint8x16_t p[N];
#pragma GCC unroll 8
                for (std::size_t k = 0; k < N; ++k) p[k] = vld1q_u8(planes[k] + at + i);
                if (rotate) rotate_planes_right<N>(p);
                store_elements(elements + i * N, p);
            }
        }
        ScalarRows::merge<Word>(planes, at + i, cols - i, rotate, elements + i * N);
    }
};

constexpr CodecKernels kCodec = {split_planes<NeonRows>, merge_planes<NeonRows>,
                                 huffman_decode_fast, kDelta};

}  // namespace
}  // namespace pydedup::isa_neon
