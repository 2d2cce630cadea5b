// SPDX-License-Identifier: Apache-2.0
// Questions about products of bf16, in matrix registers or pairs, and about what goes into them.
#include "dispatch/known_bf16.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>
#include <utility>

#include "dispatch/known_products.hpp"
#include "dispatch/tile_registers.hpp"

namespace pydedup {
namespace {

float value_of_bf16(std::uint16_t bits) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// 47 rows and 55 columns: a whole set of matrix registers, half of one, and a tail; and tails of
// the widest group of columns on either side of its middle.
bool same_pairs(const Bf16GemmKernels& bf16, Question question) noexcept {
    constexpr std::size_t kPairRows = 47;
    constexpr std::size_t kPairCols = 55;
    std::array<std::uint16_t, (kPairCols + 1) * 32> x{};
    std::array<std::uint16_t, kPairRows * kPairCols> w{};
    // All 8 bits of a significand.
    const auto number = [&](std::size_t i) {
        const int size = question[i % question.size()];
        const bool negative = question[(i + 1) % question.size()] % 2 != 0;
        const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(negative ? -size : size));
        return static_cast<std::uint16_t>(bits >> 16);
    };
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = number(i);
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = number(i + 200);
    const TileRegisters registers(bf16);
    return multiply_tiles<kPairRows, std::uint16_t, float>(bf16.tiles, x, w, value_of_bf16);
}

// Strips of 32 rows by two tiles: two whole steps of columns and a tail of an odd number, where a
// subnormal number is found as well.
bool same_strips(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
                 Question question) noexcept {
    constexpr std::size_t kCols = 69;
    constexpr std::size_t kTiles = 2;
    constexpr std::size_t kStep = 3 * kCutColumns * kTurnedRows;
    constexpr std::size_t kLd = kTiles * kTurnedRows + 3;
    if (bf16.turned_to_bf16 == nullptr) return true;
    const auto number = [&](std::size_t i) {
        const auto size = static_cast<float>(question[i % question.size()] % 64) - 32.0F;
        return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(size) >> 16);
    };
    std::array<std::uint16_t, kTurnedRows * kCols> x{};
    std::array<std::uint16_t, kTiles * kStep> w{};
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = number(i);
    for (std::size_t t = 0; t < kTiles; ++t) {
        for (std::size_t c = 0; c < kCols; ++c) {
            for (std::size_t r = 0; r < kTurnedRows; ++r) {
                w[t * kStep + c / 2 * 2 * kTurnedRows + 2 * r + c % 2] = number(r * kCols + c + t);
            }
        }
    }
    std::array<float, kTiles * kTurnedRows> bias{};
    for (std::size_t r = 0; r < bias.size(); ++r) bias[r] = static_cast<float>(r) * 0.25F;
    const TileRegisters registers(bf16);
    for (const bool plain : {true, false}) {
        if (!plain) x[20 * kCols + kCols - 1] = 0x8001;
        const TurnedRows rows{x.data(),
                              kCols,
                              kCols,
                              w.data(),
                              kTiles,
                              kStep,
                              plain ? bias.data() : nullptr,
                              plain ? x.data() : nullptr};
        const auto same = [&]<class Y>(auto strip, auto wanted, Y) {
            std::array<Y, kTurnedRows * kLd> want{};
            std::array<Y, kTurnedRows * kLd> got{};
            const bool found = wanted(rows, want.data(), kLd);
            return strip(rows, got.data(), kLd) == found && found != plain &&
                   (found || want == got);
        };
        if (!same(bf16.turned_to_bf16, reference.turned_to_bf16, std::uint16_t{}) ||
            !same(bf16.turned_to_f32, reference.turned_to_f32, float{})) {
            return false;
        }
    }
    return true;
}

// Numbers of three parts: 21 rows by 39 of 55 columns, of either factor alone, as products of lower
// parts do not count.
bool same_cuts(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
               Question question) noexcept {
    constexpr std::size_t kCutXRows = 21;
    constexpr std::size_t kCutWRows = 39;
    constexpr std::size_t kCutCols = 55;
    constexpr std::size_t kPart = cut_elements(kCutWRows, kCutCols);
    constexpr std::size_t kSums = 32;
    if (bf16.cut_block == nullptr) return true;
    std::array<float, kCutXRows * kCutCols> x{};
    std::array<float, kCutWRows * kCutCols> w{};
    for (const bool parts_of_w : {false, true}) {
        const auto fill = [&](auto& numbers, bool parts, std::size_t from) {
            for (std::size_t i = 0; i < numbers.size(); ++i) {
                const unsigned drawn = question[(from + i) % question.size()];
                const unsigned size = parts ? 0x20101U >> drawn % 4 : drawn % 2 + 1;
                numbers[i] = static_cast<float>(size) * (drawn / 4 % 2 != 0 ? -1.0F : 1.0F);
            }
        };
        fill(x, !parts_of_w, 0);
        fill(w, parts_of_w, 100);
        alignas(64) std::array<std::uint16_t, 3 * kPart> want_w{};
        alignas(64) std::array<std::uint16_t, 3 * kPart> got_w{};
        if (!reference.cut_block(w.data(), kCutWRows, kCutCols, kCutCols, want_w.data()) ||
            !bf16.cut_block(w.data(), kCutWRows, kCutCols, kCutCols, got_w.data()) ||
            want_w != got_w) {
            return false;
        }
        std::array<std::uint16_t, 3 * 16 * 2 * kSums> want_pairs{};
        std::array<std::uint16_t, 3 * 16 * 2 * kSums> got_pairs{};
        const auto pair = [&](const Bf16GemmKernels& by, auto& to) {
            std::array<float, 31 * kSums> lanes{};
            for (std::size_t i = 0; i < lanes.size(); ++i) lanes[i] = x[i];
            lanes[5 * kSums + 3] = std::numeric_limits<float>::infinity();
            return by.pair_cut(lanes.data(), 31, to.data(), 16 * 2 * kSums);
        };
        if (pair(reference, want_pairs) != 8 || pair(bf16, got_pairs) != 8 ||
            want_pairs != got_pairs) {
            return false;
        }
        for (const std::size_t width : {kSums, kSums / 2}) {
            // Two rows have a number that is not cut: they are zeros.
            const std::size_t rows = std::min(width, kCutXRows);
            auto odd = x;
            odd[0] = std::numeric_limits<float>::infinity();
            odd[kCutCols + 7] = std::numeric_limits<float>::quiet_NaN();
            constexpr std::size_t kPartOfX = (kCutCols + 1) * kSums;
            std::array<std::uint16_t, 3 * kPartOfX> want{};
            std::array<std::uint16_t, 3 * kPartOfX> got{};
            const auto pack = [&](const Bf16GemmKernels& by, auto& to) {
                return by.pack_cut(odd.data(), kCutCols, rows, kCutCols, to.data(), kPartOfX,
                                   2 * width);
            };
            if (pack(reference, want) != 3 || pack(bf16, got) != 3 || want != got) return false;
            const auto* const tile =
                std::ranges::find(bf16.tiles, width, &GemmTile<std::uint16_t, float>::width);
            if (tile == std::end(bf16.tiles) || tile->tile_nt_cut == nullptr) continue;
            std::array<float, kCutWRows * kSums> sums{};
            const TileRegisters registers(bf16);
            tile->tile_nt_cut(got.data(), kPartOfX, got_w.data(), kPart, kCutWRows, kCutCols,
                              {got_w.data(), got_w.data() + kPart, got.data(), got.data() + 512},
                              sums.data());
            for (std::size_t r = 0; r < kCutWRows; ++r) {
                for (std::size_t i = 0; i < width; ++i) {
                    float sum = 0.0F;
                    for (std::size_t c = 0; c < kCutCols && i >= 2 && i < rows; ++c) {
                        sum += x[i * kCutCols + c] * w[r * kCutCols + c];
                    }
                    if (sums[r * width + i] != sum) return false;
                }
            }
        }
    }
    return true;
}

// Strips of numbers that are cut: 19 rows by a tile and a part of one, a step of columns and a
// tail; while others are cut, all or but one.
bool same_cut_strips(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
                     Question question) noexcept {
    constexpr std::size_t kRows = 19;
    constexpr std::size_t kCols = 41;
    constexpr std::size_t kColumns = kTurnedRows + 21;
    constexpr std::size_t kElements = 2 * kTurnedCutStep;
    constexpr std::size_t kLd = kColumns + 2;
    if (bf16.turned_cut == nullptr) return true;
    std::array<float, kRows * kCols> x{};
    std::array<float, kColumns> bias{};
    for (std::size_t i = 0; i < x.size(); ++i) {
        const unsigned drawn = question[i % question.size()];
        x[i] = static_cast<float>(0x10101U >> drawn % 4) * (drawn / 4 % 2 != 0 ? -1.0F : 1.0F);
    }
    for (std::size_t r = 0; r < bias.size(); ++r) bias[r] = static_cast<float>(r);
    alignas(64) std::array<std::uint16_t, kElements> strip{};
    alignas(64) std::array<std::uint16_t, kElements> other{};
    const auto cut = [&](const Bf16GemmKernels& by, auto& to) {
        return by.cut_strip({x.data(), kCols, kRows, kCols, to.data()});
    };
    if (!cut(reference, strip) || !cut(bf16, other) || strip != other) return false;
    // Ones, of either sign.
    alignas(64) std::array<std::uint16_t, 2 * kElements> w{};
    for (std::size_t r = 0; r < kColumns; ++r) {
        for (std::size_t c = 0; c < kCols; ++c) {
            const bool negative = question[(r * kCols + c) % question.size()] % 2 != 0;
            w[r / kTurnedRows * kElements + c / kCutColumns * kTurnedCutStep +
              c % kCutColumns / 2 * 2 * kTurnedRows + r % kTurnedRows * 2 + c % 2] =
                negative ? 0xBF80 : 0x3F80;
        }
    }
    const TileRegisters registers(bf16);
    for (const bool all : {true, false}) {
        if (!all) x[kCols - 1] = 0x1p60F;
        const auto multiply = [&](const Bf16GemmKernels& by, auto& next, auto& y) {
            return by.turned_cut({strip.data(),
                                  w.data(),
                                  kRows,
                                  kColumns,
                                  all,
                                  all ? bias.data() : nullptr,
                                  {x.data(), kCols, kRows, kCols, next.data()}},
                                 y.data(), kLd);
        };
        std::array<float, kRows * kLd> want{};
        want.fill(3.0F);
        auto got = want;
        alignas(64) std::array<std::uint16_t, kElements> next{};
        if (multiply(reference, other, want) != all || multiply(bf16, next, got) != all ||
            want != got || (all && next != other)) {
            return false;
        }
    }
    return true;
}

// What goes into pairs and comes out of them: 21 rows and 37 columns, a whole square of words and
// tails of it either way, with and without a subnormal number.
bool same_moves(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
                Question question) noexcept {
    constexpr std::size_t kMoved = 21;
    constexpr std::size_t kBeside = 37;
    if (bf16.pack_pairs != nullptr) {
        std::array<std::uint16_t, kMoved * kBeside> x{};
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<std::uint16_t>(question[i % question.size()] << 8 | 0x80U);
        }
        for (const unsigned least : {0x8080U, 0x0001U, 0x807FU}) {
            x[kBeside] = static_cast<std::uint16_t>(least);
            std::array<std::uint16_t, (kBeside + 1) * kMoved> want{};
            std::array<std::uint16_t, (kBeside + 1) * kMoved> got{};
            if (reference.pack_pairs(x.data(), kBeside, kMoved, kBeside, want.data(), 2 * kMoved) !=
                    bf16.pack_pairs(x.data(), kBeside, kMoved, kBeside, got.data(), 2 * kMoved) ||
                want != got) {
                return false;
            }
        }
    }
    if (bf16.copy_pairs != nullptr) {
        // All lanes, few of many, one without its second, none; next to each other and apart.
        constexpr std::array<PairRun, 4> kRuns = {{{3, 40, 0, ~0U, ~1U, ~0U},
                                                   {60, 5, 70, 0x3F0, 0x1FF8, 0xFFFF},
                                                   {90, 91, 110, 1, 0, 1},
                                                   {0, 0, 114, 0, 0, 0x1FFFF}}};
        std::array<std::uint16_t, 300> x{};
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<std::uint16_t>(question[i % question.size()] + 256 * i);
        }
        for (const std::size_t stride : {std::size_t{1}, std::size_t{2}, std::size_t{3}}) {
            std::array<std::uint16_t, 320> want{};
            std::array<std::uint16_t, 320> got{};
            reference.copy_pairs(x.data(), stride, 50, 2, kRuns.data(), kRuns.size(), want.data(),
                                 160);
            bf16.copy_pairs(x.data(), stride, 50, 2, kRuns.data(), kRuns.size(), got.data(), 160);
            if (want != got) return false;
        }
    }
    if (bf16.columns_to_f32 != nullptr) {
        std::array<float, kMoved * kBeside> sums{};
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<float>(i);
        std::array<float, kMoved * kBeside> want{};
        std::array<float, kMoved * kBeside> got{};
        reference.columns_to_f32(sums.data(), kMoved, kBeside, kMoved, want.data(), kBeside);
        bf16.columns_to_f32(sums.data(), kMoved, kBeside, kMoved, got.data(), kBeside);
        if (want != got) return false;
    }
    if (bf16.columns_to_bf16 != nullptr) {
        std::array<float, kMoved * kBeside> sums{};
        for (std::size_t i = 0; i < sums.size(); ++i) {
            sums[i] = static_cast<float>(question[i % question.size()]) * 1.37F - 170.0F;
        }
        for (const float* const bias :
             {std::as_const(sums).data() + 7, static_cast<const float*>(nullptr)}) {
            std::array<std::uint16_t, kMoved * kBeside> want{};
            std::array<std::uint16_t, kMoved * kBeside> got{};
            reference.columns_to_bf16(sums.data(), kMoved, kBeside, kMoved, bias, want.data(),
                                      kBeside);
            bf16.columns_to_bf16(sums.data(), kMoved, kBeside, kMoved, bias, got.data(), kBeside);
            if (want != got) return false;
            reference.rows_to_bf16(sums.data(), kBeside, kMoved, kBeside, bias, want.data(),
                                   kBeside);
            bf16.rows_to_bf16(sums.data(), kBeside, kMoved, kBeside, bias, got.data(), kBeside);
            if (want != got) return false;
        }
    }
    return true;
}

}  // namespace

bool same_bf16(const Bf16GemmKernels& bf16, const Bf16GemmKernels& reference,
               std::span<const std::uint8_t> question) noexcept {
    return same_pairs(bf16, question) && same_moves(bf16, reference, question) &&
           same_strips(bf16, reference, question) && same_cuts(bf16, reference, question) &&
           same_cut_strips(bf16, reference, question);
}

}  // namespace pydedup
