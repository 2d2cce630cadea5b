// SPDX-License-Identifier: Apache-2.0
// NEON: 32 registers of 4 floats. There are no masked loads: tails go through a copy, since reading
// past them could leave the page.
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_neon {
namespace {

struct F32 {
    using Elem = float;
    using Reg = float32x4_t;
    static constexpr std::size_t kLanes = 4;
    static Reg zero() noexcept { return vdupq_n_f32(0.0F); }
    static Reg load(const Elem* p) noexcept { return vld1q_f32(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        Elem copy[kLanes] = {};
        for (std::size_t i = 0; i < n && i < kLanes; ++i) copy[i] = p[i];
        return vld1q_f32(copy);
    }
    static void store(Elem* p, Reg v) noexcept { vst1q_f32(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        Elem copy[kLanes];
        vst1q_f32(copy, v);
        for (std::size_t i = 0; i < n && i < kLanes; ++i) p[i] = copy[i];
    }
    static Reg set1(Elem value) noexcept { return vdupq_n_f32(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return vfmaq_f32(c, a, b); }
    static Reg add(Reg a, Reg b) noexcept { return vaddq_f32(a, b); }
    static Elem sum(Reg v) noexcept { return vaddvq_f32(v); }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    }
};

struct F64 {
    using Elem = double;
    using Reg = float64x2_t;
    static constexpr std::size_t kLanes = 2;
    static Reg zero() noexcept { return vdupq_n_f64(0.0); }
    static Reg load(const Elem* p) noexcept { return vld1q_f64(p); }
    static Reg load_n(const Elem* p, std::size_t n) noexcept {
        return n == 0 ? zero() : vsetq_lane_f64(*p, zero(), 0);
    }
    static void store(Elem* p, Reg v) noexcept { vst1q_f64(p, v); }
    static void store_n(Elem* p, Reg v, std::size_t n) noexcept {
        if (n != 0) vst1q_lane_f64(p, v, 0);
    }
    static Reg set1(Elem value) noexcept { return vdupq_n_f64(value); }
    static Reg fma(Reg a, Reg b, Reg c) noexcept { return vfmaq_f64(c, a, b); }
    static Reg add(Reg a, Reg b) noexcept { return vaddq_f64(a, b); }
    static Elem sum(Reg v) noexcept { return vaddvq_f64(v); }
    static void sum4(Reg a, Reg b, Reg c, Reg d, Elem* out) noexcept {
        vst1q_f64(out, vpaddq_f64(a, b));
        vst1q_f64(out + 2, vpaddq_f64(c, d));
    }
};

uint16x4_t load_halves(const std::uint16_t* p) noexcept { return vld1_u16(p); }

uint16x4_t load_halves_n(const std::uint16_t* p, std::size_t n) noexcept {
    std::uint16_t copy[4] = {};
    for (std::size_t i = 0; i < n && i < 4; ++i) copy[i] = p[i];
    return vld1_u16(copy);
}

float32x4_t widen_bf16(uint16x4_t bits) noexcept {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16));
}

// The conversion is part of every ARMv8; arithmetic in halves, which is not, is not used.
float32x4_t widen_f16(uint16x4_t bits) noexcept { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }

void round_bf16(float32x4_t values, std::uint16_t* to) noexcept {
    const uint32x4_t bits = vreinterpretq_u32_f32(values);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    const uint32x4_t result = vbslq_u32(vceqq_f32(values, values), rounded, quiet);
    vst1_u16(to, vshrn_n_u32(result, 16));
}

void round_bf16_n(float32x4_t values, std::size_t n, std::uint16_t* to) noexcept {
    std::uint16_t all[F32::kLanes];
    round_bf16(values, all);
    for (std::size_t i = 0; i < n; ++i) to[i] = all[i];
}

constexpr std::size_t kDotRows4 = 4;
constexpr std::size_t kNnRows = 6;
constexpr std::size_t kNnVectors = 4;

#include "kernels/gemm_vector-inl.hpp"

constexpr GemmKernels kGemm = {
    {dot_nt<F32, SameWeight<F32>>,
     block_nn<F32>,
     {{16, tile_nt<F32, 4, 6>}, {8, tile_nt<F32, 2, 8>}, {4, tile_nt<F32, 1, 8>}},
     4},
    {dot_nt<F64, SameWeight<F64>>,
     block_nn<F64>,
     {{8, tile_nt<F64, 4, 6>}, {4, tile_nt<F64, 2, 8>}, {2, tile_nt<F64, 1, 8>}},
     4},
    dot_nt<F32, Bf16Weight>,
    dot_nt<F32, F16Weight>,
    widen<Bf16Weight>,
    widen<F16Weight>,
    f32_to_bf16,
};

}  // namespace
}  // namespace pydedup::isa_neon
