// SPDX-License-Identifier: Apache-2.0
// Products of many rows where W is packed, not x: kernels that take strips of rows, and that no bit
// shows which factor was packed.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.hpp"
#include "dispatch/tile_registers.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm_reference.hpp"
#include "kernels.hpp"
#include "stored_matrix.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Bits = std::uint16_t;

Bits small_number() { return upper_half(static_cast<float>(static_cast<int>(rng()() % 127) - 63)); }

// Whole numbers: ones, or such as have three parts.
std::vector<float> whole_numbers(std::size_t count, bool parts) {
    std::vector<float> numbers(count);
    for (float& number : numbers) {
        const auto drawn = static_cast<unsigned>(rng()());
        const unsigned size = parts ? 0x10101U >> drawn % 4 : 1U;
        number = static_cast<float>(size) * (drawn / 4 % 2 == 0 ? 1.0F : -1.0F);
    }
    return numbers;
}

// Sums of whole numbers, which are exact in any order.
TEST(kernels_take_strips_as_the_scalar_one) {
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    for (const KernelTable* table : runnable_kernels()) {
        const auto& bf16 = table->gemm.bf16;
        if (table->gemm.bf16.turned_to_bf16 == nullptr) continue;
        const TileRegisters registers(bf16);
        for (int trial = 0; trial < 200; ++trial) {
            const std::size_t cols = rng()() % 150 + 1, tiles = rng()() % 4 + 1;
            const std::size_t ldx = cols + rng()() % 5, ld = tiles * kTurnedRows + rng()() % 5;
            const std::size_t step = (cols + 31) / 32 * 32 * kTurnedRows;
            std::vector<Bits> x((kTurnedRows - 1) * ldx + cols);
            for (Bits& element : x) element = small_number();
            const bool subnormal = trial % 3 == 0;
            const auto small = static_cast<Bits>((rng()() % 127 + 1) | (rng()() % 2 << 15));
            if (subnormal) x[rng()() % kTurnedRows * ldx + rng()() % cols] = small;
            std::vector<Bits> w(tiles * step);
            for (std::size_t i = 0; i < w.size(); ++i) {
                const std::size_t pair = i % step / (2 * kTurnedRows);
                if (2 * pair + i % 2 < cols) w[i] = small_number();
            }
            std::vector<float> of_columns(tiles * kTurnedRows);
            for (float& element : of_columns) element = static_cast<float>(rng()() % 64) * 0.25F;
            const auto rows_of_x = tight(x);
            const auto weights = tight(w);
            const auto added = tight(of_columns);
            const TurnedRows given{rows_of_x.get(),
                                   ldx,
                                   cols,
                                   weights.get(),
                                   tiles,
                                   step,
                                   trial % 2 == 0 ? nullptr : added.get(),
                                   trial % 4 < 2 ? nullptr : rows_of_x.get()};
            std::vector<float> want(kTurnedRows * ld, 7.0F), got = want;
            CHECK(scalar.turned_to_f32(given, want.data(), ld) == subnormal);
            CHECK(bf16.turned_to_f32(given, got.data(), ld) == subnormal);
            CHECK(subnormal || want == got);
            std::vector<Bits> want_halves(kTurnedRows * ld, 7), got_halves = want_halves;
            CHECK(scalar.turned_to_bf16(given, want_halves.data(), ld) == subnormal);
            CHECK(bf16.turned_to_bf16(given, got_halves.data(), ld) == subnormal);
            CHECK(subnormal || want_halves == got_halves);
        }
    }
}

// Some rows of x, here or next, and a last tile of W in part; one number may be too large, or one
// of 32 neighbours alone and tiny.
TEST(kernels_take_strips_of_cut_rows_as_the_scalar_one) {
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    for (const KernelTable* table : runnable_kernels()) {
        const auto& bf16 = table->gemm.bf16;
        if (bf16.turned_cut == nullptr) continue;
        const TileRegisters registers(bf16);
        for (int trial = 0; trial < 300; ++trial) {
            const std::size_t cols = rng()() % 150 + 1, columns = rng()() % 130 + 1;
            const std::size_t rows = rng()() % 3 == 0 ? rng()() % kTurnedRows + 1 : kTurnedRows;
            const std::size_t of_next = rng()() % 3 == 0 ? rng()() % kTurnedRows : kTurnedRows;
            const std::size_t ldx = cols + rng()() % 5, ld = columns + rng()() % 5;
            const std::size_t steps = (cols + kCutColumns - 1) / kCutColumns;
            const std::size_t elements = steps * kTurnedCutStep;
            const auto x = tight(whole_numbers((rows - 1) * ldx + cols, trial % 2 == 0));
            const auto w = whole_numbers(columns * cols, trial % 2 != 0);

            const detail::AlignedArray<Bits> of_x(elements), other_x(elements);
            CHECK(scalar.cut_strip({x.get(), ldx, rows, cols, of_x.data()}));
            CHECK(bf16.cut_strip({x.get(), ldx, rows, cols, other_x.data()}));
            CHECK(std::equal(of_x.data(), of_x.data() + elements, other_x.data()));

            const std::size_t tiles = (columns + kTurnedRows - 1) / kTurnedRows;
            const detail::AlignedArray<Bits> of_w(tiles * elements);
            std::fill_n(of_w.data(), tiles * elements, Bits{0});
            for (std::size_t r = 0; r < columns; r += kTurnedRows) {
                for (std::size_t c = 0; c < cols; c += kCutColumns) {
                    CHECK(scalar.pack_cut(w.data() + r * cols + c, cols,
                                          std::min(kTurnedRows, columns - r),
                                          std::min(kCutColumns, cols - c),
                                          of_w.data() + r / kTurnedRows * elements +
                                              c / kCutColumns * kTurnedCutStep,
                                          kTurnedRows * kCutColumns, 2 * kTurnedRows) == 0);
                }
            }
            auto numbers = whole_numbers(of_next == 0 ? 1 : (of_next - 1) * ldx + cols, true);
            const bool uncut = of_next != 0 && trial % 3 == 0;
            if (uncut) {
                const std::size_t row = rng()() % of_next * ldx, at = rng()() % cols;
                const std::size_t begin = at / kCutColumns * kCutColumns;
                const std::size_t end = std::min(begin + kCutColumns, cols);
                const bool large = trial % 2 == 0;
                for (std::size_t c = begin; c < end && !large; ++c) numbers[row + c] = 0.0F;
                numbers[row + at] = large ? 0x1p60F : -0x1p-91F;
            }
            const auto next = tight(numbers);
            const auto bias = tight(whole_numbers(columns, false));
            const detail::AlignedArray<Bits> of_others(elements), other_of_others(elements);
            TurnedCut given{of_x.data(),
                            of_w.data(),
                            rows,
                            columns,
                            trial % 7 < 4,
                            trial % 5 == 0 ? nullptr : bias.get(),
                            {next.get(), ldx, of_next, cols, of_others.data()}};
            std::vector<float> want((rows - 1) * ld + columns, 7.0F);
            const auto got = tight(want);
            CHECK(scalar.turned_cut(given, want.data(), ld) == !uncut);
            given.next.to = other_of_others.data();
            CHECK(bf16.turned_cut(given, got.get(), ld) == !uncut);
            CHECK(std::equal(want.begin(), want.end(), got.get()));
            CHECK(
                uncut || of_next == 0 ||
                std::equal(of_others.data(), of_others.data() + elements, other_of_others.data()));
        }
    }
}

// Cut between calls, x is packed. Groups, and blocks, that cannot be cut; rows that cannot, of a
// strip or in the last one, which may be too short for a tile.
TEST(many_rows_in_f32_are_the_same_whichever_factor_is_packed) {
    const BlockGrid grids[] = {{190, 301, 64, 64},  {1000, 700, 64, 96},  {61, 33, 64, 64},
                               {192, 384, 64, 64},  {96, 130, 96, 130},   {2100, 256, 32, 256},
                               {150, 1500, 64, 64}, {200, 1000, 64, 1000}};
    for (const BlockGrid& grid : grids) {
        const std::size_t k = grid.cols;
        const auto bias = normal<float>(grid.rows);
        for (const std::size_t m : {1050, 1072, 2060}) {
            if (!sampled()) continue;
            auto x = normal<float>(m * k);
            auto w = normal<float>(grid.rows * k);
            if (rng()() % 3 == 0) w[rng()() % w.size()] = 0x1p70F;
            const auto spoil = [&](std::size_t row) {
                const float factor = rng()() % 2 == 0 ? 0x1p-110F : 0x1p61F;
                for (std::size_t c = 0; c < k; ++c) x[row * k + c] *= factor;
            };
            if (rng()() % 2 == 0) spoil(0);
            if (rng()() % 2 == 0) spoil(rng()() % m);
            if (rng()() % 2 == 0) spoil(m - 1);
            if (rng()() % 4 == 0) x[rng()() % x.size()] = std::numeric_limits<float>::infinity();
            const Stored stored = store(w, grid, Dtype::f32, rng()() % 2 == 0);
            const auto activation = rng()() % 2 == 0 ? Activation::none : Activation::gelu;
            const float* const added = rng()() % 3 == 0 ? nullptr : bias.data();
            const auto want = multiply(stored, x, m, false, activation, added, 2, 3);
            for (const unsigned threads : {1U, 2U, 3U}) {
                CHECK(same_bits(want, multiply(stored, x, m, false, activation, added, threads)));
            }
        }
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
