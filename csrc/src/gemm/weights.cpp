// SPDX-License-Identifier: Apache-2.0
#include "gemm/weights.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <string>

#include "pydedup/error.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup {

Dtype compute_dtype(Dtype weights) noexcept {
    switch (weights) {
        case Dtype::f64:
        case Dtype::i32:
        case Dtype::u32:
        case Dtype::i64:
        case Dtype::u64:
            return Dtype::f64;
        default:
            return Dtype::f32;
    }
}

namespace detail {
namespace {

// 8-bit floats (OCP OFP8, 2023): value of each of the 256 codes. E4M3 has no infinity, and one NaN
// per sign; E5M2 is the upper byte of a half.
std::array<float, 256> make_f8_table(int mantissa_bits, int bias, bool has_infinity) noexcept {
    std::array<float, 256> table{};
    const int exponent_max = (1 << (7 - mantissa_bits)) - 1;
    const int mantissa_max = (1 << mantissa_bits) - 1;
    for (int code = 0; code < 256; ++code) {
        const int exponent = (code & 0x7F) >> mantissa_bits;
        const int mantissa = code & mantissa_max;
        float value;
        if (exponent == exponent_max && has_infinity) {
            value = mantissa == 0 ? HUGE_VALF : std::nanf("");
        } else if (exponent == exponent_max && mantissa == mantissa_max) {
            value = std::nanf("");
        } else if (exponent == 0) {
            value = std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
        } else {
            value = std::ldexp(static_cast<float>(mantissa + mantissa_max + 1),
                               exponent - bias - mantissa_bits);
        }
        table[static_cast<std::size_t>(code)] = (code & 0x80) != 0 ? -value : value;
    }
    return table;
}

const std::array<float, 256> kF8E4M3 = make_f8_table(3, 7, false);
const std::array<float, 256> kF8E5M2 = make_f8_table(2, 15, true);

template <class From, class T>
void convert(const std::byte* from, std::size_t count, T* to) noexcept {
    const auto* const values = reinterpret_cast<const From*>(from);
    for (std::size_t i = 0; i < count; ++i) to[i] = static_cast<T>(values[i]);
}

template <class T>
void look_up(const std::array<float, 256>& table, const std::byte* from, std::size_t count,
             T* to) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        to[i] = static_cast<T>(table[std::to_integer<std::size_t>(from[i])]);
    }
}

std::string shape_of(std::size_t rows, std::size_t cols) {
    return std::to_string(rows) + " x " + std::to_string(cols);
}

}  // namespace

void check_block(const BlockView& block, const BlockGrid& grid, Dtype dtype, std::size_t index) {
    const BlockRect rect = block_rect(grid, index);
    if (block.rows != rect.rows || block.cols != rect.cols) {
        throw Error(ErrorCode::corrupt_page,
                    "block " + std::to_string(index) + " is stored as " +
                        shape_of(block.rows, block.cols) + " where its tensor needs " +
                        shape_of(rect.rows, rect.cols) + "; run verify on the store");
    }
    if (block.dtype != dtype) {
        throw Error(ErrorCode::corrupt_page,
                    "block " + std::to_string(index) + " is stored with dtype code " +
                        std::to_string(static_cast<int>(block.dtype)) + " where its tensor has " +
                        std::to_string(static_cast<int>(dtype)) + "; run verify on the store");
    }
    if (block.encoding == Encoding::raw && block.length != block.raw_bytes()) {
        throw Error(ErrorCode::corrupt_page,
                    "block " + std::to_string(index) + " has " + std::to_string(block.length) +
                        " raw bytes where " + std::to_string(block.raw_bytes()) +
                        " are needed; run verify on the store");
    }
}

bool is_in_place(const BlockView& block) noexcept {
    return block.encoding == Encoding::raw &&
           reinterpret_cast<std::uintptr_t>(block.data) % item_bytes(block.dtype) == 0;
}

template <class T>
void widen(const std::byte* from, Dtype dtype, std::size_t count, T* to,
           const GemmKernels& kernels) {
    switch (dtype) {
        case Dtype::f64:
            return convert<double>(from, count, to);
        case Dtype::f32:
            return convert<float>(from, count, to);
        case Dtype::f16:
        case Dtype::bf16:
            if constexpr (sizeof(T) == 4) {
                const auto* const halves = reinterpret_cast<const std::uint16_t*>(from);
                (dtype == Dtype::f16 ? kernels.f16_to_f32 : kernels.bf16_to_f32)(halves, count, to);
                return;
            }
            break;  // never with T = double: compute_dtype
        case Dtype::i8:
            return convert<std::int8_t>(from, count, to);
        case Dtype::i16:
            return convert<std::int16_t>(from, count, to);
        case Dtype::i32:
            return convert<std::int32_t>(from, count, to);
        case Dtype::i64:
            return convert<std::int64_t>(from, count, to);
        case Dtype::u8:
            return convert<std::uint8_t>(from, count, to);
        case Dtype::boolean:  // whatever is not 0 is true, as for numpy
            for (std::size_t i = 0; i < count; ++i) to[i] = from[i] == std::byte{0} ? T{0} : T{1};
            return;
        case Dtype::u16:
            return convert<std::uint16_t>(from, count, to);
        case Dtype::u32:
            return convert<std::uint32_t>(from, count, to);
        case Dtype::u64:
            return convert<std::uint64_t>(from, count, to);
        case Dtype::f8_e4m3:
            return look_up(kF8E4M3, from, count, to);
        case Dtype::f8_e5m2:
            return look_up(kF8E5M2, from, count, to);
    }
    throw Error(ErrorCode::invalid_argument, "no conversion for this dtype");
}

template void widen<float>(const std::byte*, Dtype, std::size_t, float*, const GemmKernels&);
template void widen<double>(const std::byte*, Dtype, std::size_t, double*, const GemmKernels&);

}  // namespace detail
}  // namespace pydedup
