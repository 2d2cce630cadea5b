// SPDX-License-Identifier: Apache-2.0
// Similarity with NEON: 16 lanes are four registers, of f64 eight.
#include "kernels/similarity_kernels.hpp"

namespace pydedup::isa_neon {
namespace {
namespace sim {

// 16 lanes of f64.
struct D {
    struct Reg {
        float64x2_t part[8];
    };
    template <class Op>
    static Reg each(Op op) noexcept {
        return {{op(0), op(1), op(2), op(3), op(4), op(5), op(6), op(7)}};
    }
    static Reg zero() noexcept { return set1(0); }
    static Reg set1(double x) noexcept {
        return each([=](int) noexcept { return vdupq_n_f64(x); });
    }
    static Reg add(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vaddq_f64(a.part[i], b.part[i]); });
    }
    static Reg sub(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vsubq_f64(a.part[i], b.part[i]); });
    }
    static Reg mul(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vmulq_f64(a.part[i], b.part[i]); });
    }
    static Reg abs(const Reg& x) noexcept {
        return each([&](int i) noexcept { return vabsq_f64(x.part[i]); });
    }
    // A difference is a quiet NaN if it is one, and vmaxnm takes the other operand then.
    static Reg greatest(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vmaxnmq_f64(a.part[i], b.part[i]); });
    }
    static double max_of(const Reg& x) noexcept {
        double greatest = 0;
        for (int i = 0; i < 8; ++i) {
            const double here = vmaxvq_f64(x.part[i]);
            greatest = here > greatest ? here : greatest;
        }
        return greatest;
    }
    static std::size_t count_within(const Reg& x, const Reg& limit, std::size_t n) noexcept {
        const uint64x2_t lanes = {0, 1};
        uint64x2_t count = vdupq_n_u64(0);
        for (std::size_t i = 0; i < 8; ++i) {
            const uint64x2_t within = vcleq_f64(x.part[i], limit.part[i]);
            const uint64x2_t counted =
                vcltq_u64(vaddq_u64(lanes, vdupq_n_u64(2 * i)), vdupq_n_u64(n));
            count = vsubq_u64(count, vandq_u64(within, counted));
        }
        return vaddvq_u64(count);
    }
    static Reg load_any(const void* p) noexcept {
        return each([=](int i) noexcept {
            return vreinterpretq_f64_u8(vld1q_u8(static_cast<const std::uint8_t*>(p) + 16 * i));
        });
    }
    static void store_any(void* p, const Reg& x) noexcept {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            vst1q_u8(static_cast<std::uint8_t*>(p) + 16 * i, vreinterpretq_u8_f64(x.part[i]));
        }
    }
    static double total(const Reg& x) noexcept {
        const auto eight = [&](int i) noexcept { return vaddq_f64(x.part[i], x.part[i + 4]); };
        return vaddvq_f64(vaddq_f64(vaddq_f64(eight(0), eight(2)), vaddq_f64(eight(1), eight(3))));
    }
};

struct V {
    struct Reg {
        float32x4_t part[4];
    };
    struct Words {
        uint32x4_t part[4];
    };
    // i ^ m: within a register by a table of bytes, between registers by exchanging them.
    struct Move {
        uint8x16_t bytes;
        bool fours;
        bool eights;
    };
    static constexpr std::size_t kFoldStrips = 2;

    template <class Op>
    static Reg each(Op op) noexcept {
        return {{op(0), op(1), op(2), op(3)}};
    }
    static Reg zero() noexcept { return set1(0); }
    static Reg set1(double x) noexcept {
        return each([=](int) noexcept { return vdupq_n_f32(static_cast<float>(x)); });
    }
    static Reg load(const float* p) noexcept {
        return each([=](int i) noexcept { return vld1q_f32(p + 4 * i); });
    }
    static void store(float* p, const Reg& x) noexcept {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.part[i]);
    }
    static Reg load_any(const void* p) noexcept {
        return each([=](int i) noexcept {
            return vreinterpretq_f32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p) + 16 * i));
        });
    }
    static void store_any(void* p, const Reg& x) noexcept {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            vst1q_u8(static_cast<std::uint8_t*>(p) + 16 * i, vreinterpretq_u8_f32(x.part[i]));
        }
    }
    static Reg add(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vaddq_f32(a.part[i], b.part[i]); });
    }
    static Reg sub(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vsubq_f32(a.part[i], b.part[i]); });
    }
    static Reg mul(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vmulq_f32(a.part[i], b.part[i]); });
    }
    static Reg abs(const Reg& x) noexcept {
        return each([&](int i) noexcept { return vabsq_f32(x.part[i]); });
    }
    static Reg greatest(const Reg& a, const Reg& b) noexcept {
        return each([&](int i) noexcept { return vmaxnmq_f32(a.part[i], b.part[i]); });
    }
    static double max_of(const Reg& x) noexcept {
        return vmaxvq_f32(
            vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
    }
    static std::size_t count_within(const Reg& x, const Reg& limit, std::size_t n) noexcept {
        const uint32x4_t lanes = {0, 1, 2, 3};
        const uint32x4_t end = vdupq_n_u32(static_cast<std::uint32_t>(n));
        uint32x4_t count = vdupq_n_u32(0);
#pragma GCC unroll 4
        for (std::uint32_t i = 0; i < 4; ++i) {
            const uint32x4_t within = vcleq_f32(x.part[i], limit.part[i]);
            const uint32x4_t counted = vcltq_u32(vaddq_u32(lanes, vdupq_n_u32(4 * i)), end);
            count = vsubq_u32(count, vandq_u32(within, counted));
        }
        return vaddvq_u32(count);
    }

    static Words load_words(const std::uint32_t* p) noexcept {
        return {{vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}};
    }
    static Words shift(const Words& words, std::size_t n) noexcept {
        const int32x4_t by = vdupq_n_s32(static_cast<std::int32_t>(n));
        return {{vshlq_u32(words.part[0], by), vshlq_u32(words.part[1], by),
                 vshlq_u32(words.part[2], by), vshlq_u32(words.part[3], by)}};
    }
    static float32x4_t negate_where(float32x4_t x, uint32x4_t bits) noexcept {
        return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), bits));
    }
    static Reg flip(const Reg& x, const Words& words) noexcept {
        const uint32x4_t highest = vdupq_n_u32(0x80000000U);
        return each([&](int i) noexcept {
            return negate_where(x.part[i], vandq_u32(words.part[i], highest));
        });
    }
    static Move make_move(std::size_t by) noexcept {
        const uint8x16_t bytes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return {veorq_u8(bytes, vdupq_n_u8(static_cast<std::uint8_t>((by & 3) * 4))), (by & 4) != 0,
                (by & 8) != 0};
    }
    static Reg move(const Reg& x, const Move& by) noexcept {
        const Reg y = each([&](int i) noexcept {
            return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x.part[i]), by.bytes));
        });
        const Reg z = by.fours ? Reg{{y.part[1], y.part[0], y.part[3], y.part[2]}} : y;
        return by.eights ? Reg{{z.part[2], z.part[3], z.part[0], z.part[1]}} : z;
    }

    template <int Apart>
    static Reg butterfly(const Reg& x) noexcept {
        if constexpr (Apart < 4) {
            const uint32x4_t odd = {0, 0x80000000U, 0, 0x80000000U};
            const uint32x4_t upper = {0, 0, 0x80000000U, 0x80000000U};
            return each([&](int i) noexcept {
                const float32x4_t own = x.part[i];
                const float32x4_t other = Apart == 1 ? vrev64q_f32(own) : vextq_f32(own, own, 2);
                return vaddq_f32(other, negate_where(own, Apart == 1 ? odd : upper));
            });
        } else {
            constexpr int kParts = Apart / 4;
            return each([&](int i) noexcept {
                return (i & kParts) == 0 ? vaddq_f32(x.part[i], x.part[i + kParts])
                                         : vsubq_f32(x.part[i - kParts], x.part[i]);
            });
        }
    }

    static D::Reg widen(const Reg& x) noexcept {
        return D::each([&](int i) noexcept {
            return i % 2 == 0 ? vcvt_f64_f32(vget_low_f32(x.part[i / 2]))
                              : vcvt_high_f64_f32(x.part[i / 2]);
        });
    }
    static Reg narrow(const D::Reg& x) noexcept {
        return each([&](int i) noexcept {
            return vcvt_high_f32_f64(vcvt_f32_f64(x.part[2 * i]), x.part[2 * i + 1]);
        });
    }
};

// An element type whose tails are loaded from a copy: there are no masked loads, and reading past
// the elements could leave the page. Own gives kBytes, Num and value().
template <class Own>
struct Tails {
    static auto value_n(const std::uint8_t* p, std::size_t n) noexcept {
        if (n >= kSimLanes) return Own::value(p);
        std::uint8_t copy[kSimLanes * Own::kBytes] = {};
        __builtin_memcpy(copy, p, n * Own::kBytes);
        return Own::value(copy);
    }
};

struct F32 : Tails<F32> {
    using Num = V;
    static constexpr std::size_t kBytes = 4;
    static V::Reg value(const std::uint8_t* p) noexcept { return V::load_any(p); }
};

struct F16 : Tails<F16> {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static V::Reg value(const std::uint8_t* p) noexcept {
        return V::each(
            [=](int i) noexcept { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
    }
};

struct Bf16 : Tails<Bf16> {
    using Num = V;
    static constexpr std::size_t kBytes = 2;
    static V::Reg value(const std::uint8_t* p) noexcept {
        return V::each([=](int i) noexcept {
            const uint32x4_t bits = vmovl_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)));
            return vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
        });
    }
};

struct F64 : Tails<F64> {
    using Num = D;
    static constexpr std::size_t kBytes = 8;
    static D::Reg value(const std::uint8_t* p) noexcept { return D::load_any(p); }
};

// Nothing here packs lanes together as a compressing store does: lanes are only looked at one by
// one where a register of them has any to keep. Own gives kLanes, below() and first().
template <class Own, class K, class Part>
struct Keys {
    using Key = K;
    struct Reg {
        Part part[4];
    };
    static std::size_t store_between(const Key* p, const Reg& low, const Reg& high, Key* out,
                                     std::size_t& below) noexcept {
        const Reg x = Own::load(p);
        const std::size_t under = Own::below(x, low);
        below += under;
        if (Own::below(x, high) == under) return 0;
        const Key from = Own::first(low);
        const Key to = Own::first(high);
        std::size_t kept = 0;
        for (std::size_t i = 0; i < Own::kLanes; ++i) {
            const Key key = p[i];
            out[kept] = key;  // not behind p[i], which was read, even if out is keys
            kept += key >= from && key < to ? 1 : 0;
        }
        return kept;
    }

  private:
    friend Own;  // no other class is one of these
    Keys() = default;
};

struct Keys32 : Keys<Keys32, std::uint32_t, uint32x4_t> {
    static constexpr std::size_t kLanes = 16;
    static Reg set1(Key key) noexcept {
        const uint32x4_t part = vdupq_n_u32(key);
        return {{part, part, part, part}};
    }
    static Reg load(const Key* p) noexcept {
        return {{vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}};
    }
    static Key first(const Reg& x) noexcept { return vgetq_lane_u32(x.part[0], 0); }
    static std::size_t below(const Reg& a, const Reg& b) noexcept {
        uint32x4_t count = vdupq_n_u32(0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) count = vsubq_u32(count, vcltq_u32(a.part[i], b.part[i]));
        return vaddvq_u32(count);
    }
};

struct Keys64 : Keys<Keys64, std::uint64_t, uint64x2_t> {
    static constexpr std::size_t kLanes = 8;
    static Reg set1(Key key) noexcept {
        const uint64x2_t part = vdupq_n_u64(key);
        return {{part, part, part, part}};
    }
    static Reg load(const Key* p) noexcept {
        return {{vld1q_u64(p), vld1q_u64(p + 2), vld1q_u64(p + 4), vld1q_u64(p + 6)}};
    }
    static Key first(const Reg& x) noexcept { return vgetq_lane_u64(x.part[0], 0); }
    static std::size_t below(const Reg& a, const Reg& b) noexcept {
        uint64x2_t count = vdupq_n_u64(0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) count = vsubq_u64(count, vcltq_u64(a.part[i], b.part[i]));
        return vaddvq_u64(count);
    }
};

std::uint64_t sketch_distance(const std::int16_t* a, const std::int16_t* b,
                              std::size_t count) noexcept {
    uint64x2_t sums[2] = {vdupq_n_u64(0), vdupq_n_u64(0)};
    for (std::size_t i = 0; i < count; i += 16) {
#pragma GCC unroll 2
        for (std::size_t j = 0; j < 2; ++j) {
            const int16x8_t d = vsubq_s16(vld1q_s16(a + i + 8 * j), vld1q_s16(b + i + 8 * j));
            const int32x4_t low = vmull_s16(vget_low_s16(d), vget_low_s16(d));
            const int32x4_t pairs = vmlal_high_s16(low, d, d);  // below 2^31
            sums[j] = vpadalq_u32(sums[j], vreinterpretq_u32_s32(pairs));
        }
    }
    return vaddvq_u64(vaddq_u64(sums[0], sums[1]));
}

#include "kernels/similarity_vector-inl.hpp"

}  // namespace sim
}  // namespace
}  // namespace pydedup::isa_neon
