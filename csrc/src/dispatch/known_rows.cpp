// SPDX-License-Identifier: Apache-2.0
// Questions about rows that are added, picked and copied.
#include "dispatch/known_rows.hpp"

#include <array>
#include <cstddef>

#include "dispatch/known_products.hpp"

namespace pydedup {
namespace {

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
