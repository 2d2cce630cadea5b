// SPDX-License-Identifier: Apache-2.0
// Questions about products and sums. They are asked in small integers, which are exact in every
// order, and of as many rows and columns as take each path of the vector kernels: all vectors that
// they hold at once, single ones, and a tail.
#include "dispatch/known_gemm.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <limits>
#include <utility>

#include "dispatch/tile_registers.hpp"

namespace pydedup {
namespace {

using Question = std::span<const std::uint8_t>;  // 700 bytes

constexpr std::size_t kXRows = 9;
constexpr std::size_t kWRows = 23;  // tiles of eight rows, one of four, and single ones
constexpr std::size_t kCols = 87;   // four vectors of AVX-512, one, and a tail

template <class T>
struct Products {
    std::array<T, kXRows * kCols> x{};
    std::array<T, kWRows * kCols> w{};

    explicit Products(Question question) noexcept {
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<T>(question[i % question.size()] % 15) - T{7};
        }
        for (std::size_t i = 0; i < w.size(); ++i) {
            w[i] = static_cast<T>(question[(i + 200) % question.size()] % 13) - T{6};
        }
    }
};

// As many columns as x fills and w has, the last group of them in part, `Rows` rows: whole register
// tiles and single rows, with and without what comes next.
template <std::size_t Rows, class E, class A>
bool multiply_tiles(
    std::span<const GemmTile<E, A>> tiles, std::span<const E> x, std::span<const E> w,
    A (*value)(E) = [](E e) { return A{e}; }) noexcept {
    const std::size_t ldw = w.size() / Rows;
    for (const GemmTile<E, A>& tile : tiles) {
        if (tile.width == 0) break;
        const std::size_t sums = tile.sums();
        const std::size_t filled = x.size() / (tile.width * tile.group) * tile.group;
        const std::size_t cols = std::min(filled - (tile.group > 1 ? 1 : 0), ldw);
        if (tile.width * sums > 64 || cols == 0) return false;
        std::array<A, Rows * 64> plain{};
        std::array<A, Rows * 64> ahead{};
        tile.tile_nt(x.data(), w.data(), Rows, cols, ldw, {}, plain.data());
        tile.tile_nt(x.data(), w.data(), Rows, cols, ldw,
                     {w.data(), w.data() + w.size(), x.data(), x.data() + x.size()}, ahead.data());
        std::array<A, Rows * 64> want{};
        for (std::size_t r = 0; r < Rows; ++r) {
            A* const to = &want[r * tile.width * sums];
            for (std::size_t c = 0; c < cols; ++c) {
                const std::size_t in_group = c % tile.group;
                const E* const column = &x[(c - in_group) * tile.width + in_group];
                const A weight = value(w[r * ldw + c]);
                for (std::size_t i = 0; i < tile.width; ++i) {
                    to[i * sums + in_group / tile.per_sum] +=
                        value(column[i * tile.group]) * weight;
                }
            }
        }
        if (plain != want || ahead != want) return false;
    }
    return true;
}

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

// All lengths of chains that are summed at once, and a longer one, of as many vectors as stay in
// registers, of half as many and of one.
template <class T>
bool same_windows(RowsKernels::Windows<T> sum, RowsKernels::Windows<T> wanted,
                  const Products<T>& numbers) noexcept {
    constexpr std::size_t kRows = 9;  // twice as many as stay in registers, in part
    constexpr std::size_t kPitch = 11;
    constexpr std::size_t kColumns = 7 * 64 / sizeof(T);  // whole vectors
    constexpr std::size_t kFilled = 2 * kWindowRows;
    for (std::size_t length = 1; length <= 9; ++length) {
        const std::array<WindowChain<T>, 2> chains = {
            {{numbers.x.data(), numbers.w.data(), length, 3},
             {numbers.x.data() + 5, numbers.w.data() + 40, 2, 1}}};
        std::array<T, kFilled * kColumns> want{};
        std::array<T, kFilled * kColumns> got{};
        wanted(chains.data(), 2, kPitch, kRows, kColumns, want.data(), kColumns);
        sum(chains.data(), 2, kPitch, kRows, kColumns, got.data(), kColumns);
        for (std::size_t i = 0; i < kRows * kColumns; ++i) {
            if (want[i] != got[i]) return false;
        }
    }
    return true;
}

}  // namespace

bool same_gemm(const GemmKernels& gemm, const GemmKernels& reference,
               std::span<const std::uint8_t> question) noexcept {
    return same_products(gemm.f32, reference.f32, question) &&
           same_products(gemm.f64, reference.f64, question) &&
           same_halves(gemm, reference, question) && same_pairs(gemm.bf16, question) &&
           same_moves(gemm.bf16, reference.bf16, question) &&
           same_strips(gemm.bf16, reference.bf16, question) &&
           same_cuts(gemm.bf16, reference.bf16, question);
}

bool same_rows_summed(const RowsKernels& rows, const RowsKernels& reference,
                      std::span<const std::uint8_t> question) noexcept {
    constexpr std::size_t kRows = 19;  // more than are asked of memory ahead
    const Products<float> single(question);
    const Products<double> wide(question);
    std::array<std::uint16_t, kXRows * kCols> halves{};  // 1, -2, 0.5, 4 of f16; any of bf16
    for (std::size_t i = 0; i < halves.size(); ++i) {
        halves[i] = std::array<std::uint16_t, 4>{0x3C00, 0xC000, 0x3800,
                                                 0x4400}[question[i % question.size()] % 4];
    }
    const auto same = [&]<class T, class W>(RowsKernels::Sum<T, W> sum,
                                            RowsKernels::Sum<T, W> wanted, const W* from,
                                            const T* scale) {
        std::array<const W*, kRows> at{};
        for (std::size_t i = 0; i < kRows; ++i) at[i] = from + i * 31;
        std::array<T, kCols> want{};
        std::array<T, kCols> got{};
        wanted(at.data(), kRows, scale, want.size(), want.data());
        sum(at.data(), kRows, scale, got.size(), got.data());
        return want == got;
    };
    for (const bool scaled : {false, true}) {
        const float* const scale = scaled ? single.w.data() : nullptr;
        if (!same(rows.sum_f32, reference.sum_f32, single.x.data(), scale) ||
            !same(rows.sum_bf16, reference.sum_bf16, halves.data(), scale) ||
            !same(rows.sum_f16, reference.sum_f16, halves.data(), scale) ||
            !same(rows.sum_f64, reference.sum_f64, wide.x.data(),
                  scaled ? wide.w.data() : nullptr)) {
            return false;
        }
    }
    for (const std::size_t stride : {std::size_t{1}, std::size_t{2}, std::size_t{3}}) {
        std::array<float, 200> want{};
        std::array<float, 200> got{};
        std::array<double, 200> want_wide{};
        std::array<double, 200> got_wide{};
        // Two rows of whole vectors and a tail.
        reference.pick_f32(single.x.data(), 40, stride, 2, 93, want.data(), 97);
        rows.pick_f32(single.x.data(), 40, stride, 2, 93, got.data(), 97);
        reference.pick_f64(wide.x.data(), 40, stride, 2, 93, want_wide.data(), 97);
        rows.pick_f64(wide.x.data(), 40, stride, 2, 93, got_wide.data(), 97);
        if (want != got || want_wide != got_wide) return false;
        reference.pick_bf16(halves.data(), 40, stride, 2, 93, want.data(), 97);
        rows.pick_bf16(halves.data(), 40, stride, 2, 93, got.data(), 97);
        if (want != got) return false;
    }
    if (!same_windows(rows.windows_f32, reference.windows_f32, single) ||
        !same_windows(rows.windows_f64, reference.windows_f64, wide)) {
        return false;
    }
    // All lanes, few of many, none.
    constexpr std::array<LaneRun, 4> kRuns = {
        {{3, 0, 0, 32, 32}, {40, 33, 5, 19, 31}, {7, 64, 17, 30, 30}, {0, 96, 2, 2, 9}}};
    std::array<float, 220> want{};
    std::array<float, 220> got{};
    reference.copy_runs_f32(single.x.data(), 80, 2, kRuns.data(), kRuns.size(), want.data(), 110);
    rows.copy_runs_f32(single.x.data(), 80, 2, kRuns.data(), kRuns.size(), got.data(), 110);
    return want == got;
}

}  // namespace pydedup
