// SPDX-License-Identifier: Apache-2.0
// Questions about products. They are asked in small integers, which are exact in every order, and
// of as many rows and columns as take each path of the vector kernels: all vectors that they hold
// at once, single ones, and a tail.
#include "dispatch/known_gemm.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>

#include "dispatch/known_bf16.hpp"
#include "dispatch/known_products.hpp"

namespace pydedup {
namespace {

template <class T>
bool same_products(const GemmKernelsOf<T>& gemm, const GemmKernelsOf<T>& reference,
                   Question question) noexcept {
    const Products<T> in(question);
    for (const std::size_t m : {kXRows, std::size_t{7}, std::size_t{6}}) {
        auto want = in.w;
        auto got = in.w;
        reference.dot_nt(in.x.data(), kCols, m, in.w.data(), kWRows, kCols, kCols, want.data(),
                         kWRows);
        gemm.dot_nt(in.x.data(), kCols, m, in.w.data(), kWRows, kCols, kCols, got.data(), kWRows);
        if (want != got) return false;
        reference.block_nn(in.x.data(), kWRows, m, in.w.data(), kWRows, kCols, kCols, want.data(),
                           kCols);
        gemm.block_nn(in.x.data(), kWRows, m, in.w.data(), kWRows, kCols, kCols, got.data(), kCols);
        if (want != got) return false;
    }
    return multiply_tiles<kWRows, T, T>(gemm.tiles, std::span(in.x).first(360), in.w);
}

bool same_halves(const GemmKernels& gemm, const GemmKernels& reference,
                 Question question) noexcept {
    constexpr std::size_t kHalves = 47;
    std::array<std::uint16_t, kHalves> codes{};  // both signs, subnormals, infinity; no NaN
    for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint16_t>((question[2 * i] & 0xFBU) << 8 | question[2 * i + 1]);
    }
    codes[0] = 0x0001;
    codes[1] = 0xFC00;
    std::array<float, kHalves> want{};
    std::array<float, kHalves> got{};
    const auto same = [&] {
        return std::equal(want.begin(), want.end(), got.begin(), [](float a, float b) {
            return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
        });
    };
    reference.bf16_to_f32(codes.data(), codes.size(), want.data());
    gemm.bf16_to_f32(codes.data(), codes.size(), got.data());
    if (!same()) return false;
    reference.f16_to_f32(codes.data(), codes.size(), want.data());
    gemm.f16_to_f32(codes.data(), codes.size(), got.data());
    if (!same()) return false;

    // Between two bf16 numbers, halfway among them, and too large for any.
    std::array<float, kHalves> between{};
    for (std::size_t i = 0; i < between.size(); ++i) {
        const std::uint32_t low = i % 3 == 0 ? 0x8000U : question[i] * 257U;
        between[i] = std::bit_cast<float>(static_cast<std::uint32_t>(codes[i]) << 16 | low);
    }
    between[2] = -std::numeric_limits<float>::max();
    std::array<std::uint16_t, kHalves> rounded{};
    std::array<std::uint16_t, kHalves> others{};
    reference.f32_to_bf16(between.data(), between.size(), rounded.data());
    gemm.f32_to_bf16(between.data(), between.size(), others.data());
    if (rounded != others) return false;

    // Small whole numbers and halves of them in either format.
    constexpr std::size_t kRows = 7;
    std::array<float, kRows * kHalves> x{};
    std::array<std::uint16_t, kRows * kHalves> w{};
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(question[i] % 15) - 7.0F;
    for (const bool f16 : {true, false}) {
        for (std::size_t i = 0; i < w.size(); ++i) {  // 1, -2, 0.5, 4
            constexpr std::array<std::uint16_t, 4> kF16 = {0x3C00, 0xC000, 0x3800, 0x4400};
            constexpr std::array<std::uint16_t, 4> kBf16 = {0x3F80, 0xC000, 0x3F00, 0x4080};
            w[i] = (f16 ? kF16 : kBf16)[question[i + 50] % 4];
        }
        const auto dot = [f16](const GemmKernels& k) { return f16 ? k.dot_nt_f16 : k.dot_nt_bf16; };
        for (const std::size_t m : {std::size_t{7}, std::size_t{6}, std::size_t{1}}) {
            std::array<float, kRows * kRows> sums{};
            std::array<float, kRows * kRows> other_sums{};
            dot(reference)(x.data(), kHalves, m, w.data(), kRows, kHalves, kHalves, sums.data(),
                           kRows);
            dot(gemm)(x.data(), kHalves, m, w.data(), kRows, kHalves, kHalves, other_sums.data(),
                      kRows);
            if (sums != other_sums) return false;
        }
    }
    return true;
}

}  // namespace

bool same_gemm(const GemmKernels& gemm, const GemmKernels& reference,
               std::span<const std::uint8_t> question) noexcept {
    return same_products(gemm.f32, reference.f32, question) &&
           same_products(gemm.f64, reference.f64, question) &&
           same_halves(gemm, reference, question) && same_bf16(gemm.bf16, reference.bf16, question);
}

}  // namespace pydedup
