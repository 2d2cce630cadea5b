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

// For delta_products-inl.hpp: products, exact ones, and the sums of two each of 16 bits.
constexpr bool kPrefersPairs = true;

template <class Doubles>
inline void add_products(Doubles& sums, const Doubles& one, const Doubles& other) noexcept {
    sums = reinterpret_cast<Doubles>(vfmaq_f64(reinterpret_cast<float64x2_t>(sums),
                                               reinterpret_cast<float64x2_t>(one),
                                               reinterpret_cast<float64x2_t>(other)));
}

template <class Ints>
inline void add_pairs(Ints& sums, const Ints& one, const Ints& other) noexcept {
    const auto first = reinterpret_cast<int16x8_t>(one);
    const auto second = reinterpret_cast<int16x8_t>(other);
    const int32x4_t low = vmull_s16(vget_low_s16(first), vget_low_s16(second));
    sums += reinterpret_cast<Ints>(vpaddq_s32(low, vmull_high_s16(first, second)));
}

// For delta_products-inl.hpp: numbers four at a time out of 16 bytes, and how many of the first.
struct FourNumbers {
    std::size_t byte;
    uint8x16_t bytes;  // of each number, where within the 16
    int32x4_t above;   // how far its last bit is from the top of its bytes

    FourNumbers(std::size_t position, unsigned width) noexcept : byte(position / 8) {
        std::uint32_t places[4];
        std::int32_t shifts[4];
        for (unsigned i = 0; i < 4; ++i) {
            const auto first = static_cast<unsigned>(position % 8) + i * width;
            places[i] = first / 8 * 0x01010101U + 0x03020100U;
            shifts[i] = static_cast<std::int32_t>(32 - width - first % 8);
        }
        bytes = vreinterpretq_u8_u32(vld1q_u32(places));
        above = vld1q_s32(shifts);
    }
    [[nodiscard]] int32x4_t unpack(const std::uint8_t* from, int32x4_t unused) const noexcept {
        const uint8x16_t some = vqtbl1q_u8(vld1q_u8(from + byte), bytes);
        return vshlq_s32(vshlq_s32(vreinterpretq_s32_u8(some), above), vnegq_s32(unused));
    }
};

inline std::size_t unpack_first(const std::uint8_t* from, std::size_t position, unsigned width,
                                std::size_t count, std::int32_t* to) noexcept {
    const FourNumbers low(position, width);
    const FourNumbers high(position + 4 * std::size_t{width}, width);
    const int32x4_t unused = vdupq_n_s32(static_cast<std::int32_t>(32 - width));
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8, from += width) {
        vst1q_s32(to + i, low.unpack(from, unused));
        vst1q_s32(to + i + 4, high.unpack(from, unused));
    }
    return i;
}

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
