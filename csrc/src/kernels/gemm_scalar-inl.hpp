// SPDX-License-Identifier: Apache-2.0
// The reference: plain loops, one accumulator per output, columns in order.
#include "kernels/gemm_kernels.hpp"

namespace pydedup::isa_scalar {
namespace {

float widen_bf16(std::uint16_t bits) noexcept {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

// Subnormals are exact products with 2^-24; everything else is a shift and a change of the bias.
float widen_f16(std::uint16_t bits) noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1FU;
    const std::uint32_t mantissa = bits & 0x3FFU;
    std::uint32_t wide;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
        __builtin_memcpy(&wide, &magnitude, sizeof wide);
        wide |= sign;
    } else if (exponent == 31) {
        wide = sign | 0x7F800000U | (mantissa << 13);
    } else {
        wide = sign | ((exponent + 112U) << 23) | (mantissa << 13);
    }
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

template <class T, class W, class Widen>
void dot_rows(const T* x, std::size_t ldx, std::size_t m, const W* w, std::size_t rows,
              std::size_t cols, std::size_t ldw, T* y, std::size_t ldy, Widen widen) noexcept {
    for (std::size_t i = 0; i < m; ++i) {
        for (std::size_t r = 0; r < rows; ++r) {
            T sum = 0;
            for (std::size_t c = 0; c < cols; ++c) sum += x[i * ldx + c] * widen(w[r * ldw + c]);
            y[i * ldy + r] += sum;
        }
    }
}

template <class T>
void dot_nt(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
            std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept {
    dot_rows(x, ldx, m, w, rows, cols, ldw, y, ldy, [](T value) noexcept { return value; });
}

void dot_nt_bf16(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                 std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                 std::size_t ldy) noexcept {
    dot_rows(x, ldx, m, w, rows, cols, ldw, y, ldy, widen_bf16);
}

void dot_nt_f16(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                std::size_t ldy) noexcept {
    dot_rows(x, ldx, m, w, rows, cols, ldw, y, ldy, widen_f16);
}

template <class T>
void block_nn(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
              std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept {
    for (std::size_t i = 0; i < m; ++i) {
        for (std::size_t r = 0; r < rows; ++r) {
            const T factor = x[i * ldx + r];
            for (std::size_t c = 0; c < cols; ++c) y[i * ldy + c] += factor * w[r * ldw + c];
        }
    }
}

constexpr std::size_t kWidth = 8;

template <class T>
void tile_nt(const T* x, const T* w, std::size_t rows, std::size_t cols, std::size_t ldw,
             const GemmNext<T>&, T* acc) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        T sums[kWidth];
        __builtin_memcpy(sums, acc + r * kWidth, sizeof sums);
        for (std::size_t c = 0; c < cols; ++c) {
            for (std::size_t i = 0; i < kWidth; ++i) sums[i] += x[c * kWidth + i] * w[r * ldw + c];
        }
        __builtin_memcpy(acc + r * kWidth, sums, sizeof sums);
    }
}

void bf16_to_f32(const std::uint16_t* src, std::size_t count, float* dst) noexcept {
    for (std::size_t i = 0; i < count; ++i) dst[i] = widen_bf16(src[i]);
}

void f16_to_f32(const std::uint16_t* src, std::size_t count, float* dst) noexcept {
    for (std::size_t i = 0; i < count; ++i) dst[i] = widen_f16(src[i]);
}

std::uint32_t bits_of(float value) noexcept {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

float value_of(std::uint32_t bits) noexcept {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

float truncated_to_bf16(float value) noexcept { return value_of(bits_of(value) & 0xFFFF0000U); }

void cut(const float* x, std::size_t count, float* high, float* middle, float* low) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        if (x[i] != x[i]) {  // its bits may be in the lower half alone
            high[i] = middle[i] = low[i] = value_of((bits_of(x[i]) & 0xFFFF0000U) | 0x00400000U);
        } else if (x[i] - x[i] != 0.0F) {
            high[i] = middle[i] = low[i] = x[i];
        } else {
            high[i] = truncated_to_bf16(x[i]);
            const float rest = x[i] - high[i];
            middle[i] = truncated_to_bf16(rest);
            low[i] = rest - middle[i];
            if (middle[i] == 0.0F) middle[i] = high[i] * 0x1p-32F;
            if (low[i] == 0.0F) low[i] = high[i] * 0x1p-32F;
        }
    }
}

void f32_to_bf16(const float* src, std::size_t count, std::uint16_t* dst) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t bits = bits_of(src[i]);
        if (src[i] != src[i]) {
            dst[i] = static_cast<std::uint16_t>(bits >> 16 | 0x40U);
        } else {
            dst[i] = static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
        }
    }
}

bool pack_pairs(const std::uint16_t* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                std::uint16_t* to, std::size_t ld_to) noexcept {
    bool subnormal = false;
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < cols; ++c) {
            const std::uint16_t number = x[r * ldx + c];
            to[c / 2 * ld_to + 2 * r + c % 2] = number;
            subnormal = subnormal || ((number & 0x7F80U) == 0 && (number & 0x7FU) != 0);
        }
        if (cols % 2 != 0) to[cols / 2 * ld_to + 2 * r + 1] = 0;
    }
    return subnormal;
}

void copy_pairs(const std::uint16_t* from, std::size_t stride, std::size_t ld, std::size_t times,
                const PairRun* runs, std::size_t n, std::uint16_t* to, std::size_t ld_to) noexcept {
    const auto step = static_cast<std::ptrdiff_t>(stride);
    for (std::size_t k = 0; k < times; ++k, from += ld, to += ld_to) {
        for (const PairRun* run = runs; run < runs + n; ++run) {
            for (std::ptrdiff_t i = 0; i < 32 && (run->lanes >> i & 1U) != 0; ++i) {
                std::uint16_t* const pair = to + run->to + 2 * i;
                const bool has_first = (run->has_first >> i & 1U) != 0;
                const bool has_second = (run->has_second >> i & 1U) != 0;
                pair[0] = has_first ? from[run->first + i * step] : std::uint16_t{0};
                pair[1] = has_second ? from[run->second + i * step] : std::uint16_t{0};
            }
        }
    }
}

void columns_to_f32(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                    float* dst, std::size_t ld_dst) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < cols; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
    }
}

void columns_to_bf16(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                     const float* bias, std::uint16_t* dst, std::size_t ld_dst) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < cols; ++c) {
            const float sum = src[r * ld_src + c];
            const float value = bias == nullptr ? sum : sum + bias[r];
            f32_to_bf16(&value, 1, dst + c * ld_dst + r);
        }
    }
}

void rows_to_bf16(const float* src, std::size_t ld_src, std::size_t rows, std::size_t cols,
                  const float* bias, std::uint16_t* dst, std::size_t ld_dst) noexcept {
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < cols; ++c) {
            const float sum = src[r * ld_src + c];
            const float value = bias == nullptr ? sum : sum + bias[c];
            f32_to_bf16(&value, 1, dst + r * ld_dst + c);
        }
    }
}

template <class Y>
bool turned(const TurnedRows& rows, Y* y, std::size_t ld) noexcept {
    bool subnormal = false;
    for (std::size_t i = 0; i < kTurnedRows; ++i) {
        const std::uint16_t* const x = rows.x + i * rows.ldx;
        for (std::size_t c = 0; c < rows.cols; ++c) {
            subnormal = subnormal || ((x[c] & 0x7F80U) == 0 && (x[c] & 0x7FU) != 0);
        }
        for (std::size_t r = 0; r < rows.tiles * kTurnedRows; ++r) {
            const std::uint16_t* const w =
                rows.w + r / kTurnedRows * rows.step + r % kTurnedRows * 2;
            float sum = 0.0F;
            for (std::size_t c = 0; c < rows.cols; ++c) {
                sum += widen_bf16(x[c]) * widen_bf16(w[c / 2 * 2 * kTurnedRows + c % 2]);
            }
            if (rows.bias != nullptr) sum += rows.bias[r];
            if constexpr (sizeof(Y) == sizeof(float)) {
                y[i * ld + r] = sum;
            } else {
                f32_to_bf16(&sum, 1, y + i * ld + r);
            }
        }
    }
    return subnormal;
}

float nearest_bf16(float value) noexcept {
    return value_of((bits_of(value) + 0x8000U) & 0xFFFF0000U);
}

// Parts of a number, `part` elements apart.
void cut_into(float value, std::uint16_t* to, std::size_t part) noexcept {
    for (std::size_t i = 0; i < 2; ++i) {
        const float nearest = nearest_bf16(value);
        to[i * part] = static_cast<std::uint16_t>(bits_of(nearest) >> 16);
        value -= nearest;
    }
    to[2 * part] = static_cast<std::uint16_t>(bits_of(value) >> 16);
}

bool may_be_cut(std::uint32_t largest) noexcept {
    return largest < kTooLargeToCut && (largest == 0 || largest >= kLeastToCut);
}

std::uint32_t larger(std::uint32_t size, float value) noexcept {
    const std::uint32_t other = bits_of(value) & 0x7FFFFFFFU;
    return size < other ? other : size;
}

// Numbers that are so far apart into pairs; zeros, if they cannot be cut. Whether they were.
bool cut_line(const float* x, std::size_t apart, std::size_t cols, std::uint16_t* to,
              std::size_t part, std::size_t ld_to) noexcept {
    std::uint32_t largest = 0;
    for (std::size_t c = 0; c < cols; ++c) largest = larger(largest, x[c * apart]);
    const bool may = may_be_cut(largest);
    for (std::size_t c = 0; c < cols + cols % 2; ++c) {
        cut_into(may && c < cols ? x[c * apart] : 0.0F, to + c / 2 * ld_to + c % 2, part);
    }
    return may;
}

std::uint32_t pack_cut(const float* x, std::size_t ldx, std::size_t rows, std::size_t cols,
                       std::uint16_t* to, std::size_t part, std::size_t ld_to) noexcept {
    std::uint32_t uncut = 0;
    for (std::size_t r = 0; r < rows; ++r) {
        const bool is_cut = cut_line(x + r * ldx, 1, cols, to + 2 * r, part, ld_to);
        if (!is_cut) uncut |= std::uint32_t{1} << r;
    }
    return uncut;
}

std::uint32_t pair_cut(const float* x, std::size_t cols, std::uint16_t* to,
                       std::size_t part) noexcept {
    constexpr std::size_t kLanes = 32;
    std::uint32_t uncut = 0;
    for (std::size_t i = 0; i < kLanes; ++i) {
        const bool is_cut = cut_line(x + i, kLanes, cols, to + 2 * i, part, 2 * kLanes);
        if (!is_cut) uncut |= std::uint32_t{1} << i;
    }
    return uncut;
}

bool cut_block(const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
               std::uint16_t* to) noexcept {
    const std::size_t all_rows = (rows + kCutRows - 1) / kCutRows * kCutRows;
    const std::size_t all_cols = (cols + kCutColumns - 1) / kCutColumns * kCutColumns;
    std::uint32_t largest = 0;
    for (std::size_t c = 0; c < all_cols; ++c) {
        std::uint16_t* const at = to + c / kCutColumns * kCutColumns * all_rows + c % kCutColumns;
        for (std::size_t r = 0; r < all_rows; ++r) {
            const float value = r < rows && c < cols ? w[r * ldw + c] : 0.0F;
            largest = larger(largest, value);
            cut_into(value, at + r * kCutColumns, all_rows * all_cols);
        }
    }
    return may_be_cut(largest);
}

bool cut_strip(const RowsToCut& rows) noexcept {
    constexpr std::size_t kPart = kTurnedRows * kCutColumns;
    bool all = true;
    std::uint16_t* to = rows.to;
    for (std::size_t c0 = 0; c0 < rows.cols; c0 += kCutColumns, to += kTurnedCutStep) {
        for (std::size_t r = 0; r < kTurnedRows; ++r) {
            std::uint32_t largest = 0;
            for (std::size_t c = c0; c < c0 + kCutColumns; ++c) {
                const bool is_there = r < rows.rows && c < rows.cols;
                const float value = is_there ? rows.x[r * rows.ldx + c] : 0.0F;
                largest = larger(largest, value);
                cut_into(value, to + r * kCutColumns + (c - c0), kPart);
            }
            all = all && may_be_cut(largest);
        }
    }
    return all;
}

bool turned_cut(const TurnedCut& given, float* y, std::size_t ld) noexcept {
    constexpr std::size_t kPart = kTurnedRows * kCutColumns;
    constexpr std::size_t kPartsOfX[6] = {0, 0, 1, 1, 2, 0};
    constexpr std::size_t kPartsOfW[6] = {2, 1, 1, 0, 0, 0};
    const std::size_t steps = (given.next.cols + kCutColumns - 1) / kCutColumns;
    for (std::size_t i = 0; i < given.rows; ++i) {
        for (std::size_t r = 0; r < given.columns; ++r) {
            const std::uint16_t* x = given.x + i * kCutColumns;
            const std::uint16_t* w = given.w + r / kTurnedRows * steps * kTurnedCutStep;
            float sum = given.anew ? 0.0F : y[i * ld + r];
            for (std::size_t s = 0; s < steps; ++s, x += kTurnedCutStep, w += kTurnedCutStep) {
                for (std::size_t pair = 0; pair < 6; ++pair) {
                    const std::size_t part_x = kPartsOfX[pair];
                    const std::size_t part_w = kPartsOfW[pair];
                    for (std::size_t c = 0; c < kCutColumns; ++c) {
                        const std::size_t at =
                            c / 2 * 2 * kTurnedRows + r % kTurnedRows * 2 + c % 2;
                        sum +=
                            widen_bf16(x[part_x * kPart + c]) * widen_bf16(w[part_w * kPart + at]);
                    }
                }
            }
            y[i * ld + r] = given.bias == nullptr ? sum : sum + given.bias[r];
        }
    }
    return cut_strip(given.next);
}

template <class T>
constexpr GemmKernelsOf<T> kGemmOf = {dot_nt<T>, block_nn<T>, {{kWidth, tile_nt<T>}}, 4};

constexpr GemmKernels kGemm = {
    kGemmOf<float>,
    kGemmOf<double>,
    dot_nt_bf16,
    dot_nt_f16,
    bf16_to_f32,
    f16_to_f32,
    f32_to_bf16,
    {{},
     cut,
     nullptr,
     nullptr,
     pack_pairs,
     columns_to_f32,
     columns_to_bf16,
     rows_to_bf16,
     copy_pairs,
     pack_cut,
     pair_cut,
     cut_block,
     turned<std::uint16_t>,
     turned<float>,
     cut_strip,
     turned_cut},
};

}  // namespace
}  // namespace pydedup::isa_scalar
