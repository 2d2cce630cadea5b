// SPDX-License-Identifier: Apache-2.0
// Kernels that gather images for convolutions, and sum what weights see of them, beside the
// reference. Arrays are as large as they have to be, so that the sanitizers see each step beside
// them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "base/rounding.hpp"
#include "check.hpp"
#include "gemm_reference.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

using Bits = std::uint16_t;

// Any lanes of which any have elements; what is beside them is not touched.
TEST(every_kernel_copies_runs_as_the_reference) {
    std::vector<float> from(400);
    std::iota(from.begin(), from.end(), 1.0F);
    std::mt19937_64 draw(5);
    const auto below = [&](std::size_t n) { return static_cast<std::uint32_t>(draw() % n); };
    for (int round = 0; round < 300; ++round) {
        std::vector<LaneRun> runs;
        std::size_t to = 0;
        const std::size_t columns = below(3) + 1;
        while (runs.size() < 5) {
            const std::uint32_t count = below(33);
            const std::uint32_t begin = below(count + 1);
            const std::uint32_t end = begin + below(count - begin + 1);
            // The last element there is, at times.
            const std::size_t first = below(3) == 0 ? 200 - (end - begin) : below(200 - 32);
            runs.push_back({first, to, begin, end, count});
            to += count + below(3);
        }
        std::vector<float> want(columns * (to + 1), -1.0F), got = want;
        const std::vector<float> tight(
            from.end() - static_cast<std::ptrdiff_t>(100 * columns + 100), from.end());
        const auto copy = [&](const RowsKernels& by, std::vector<float>& into) {
            by.copy_runs_f32(tight.data(), 100, columns, runs.data(), runs.size(), into.data(),
                             to + 1);
        };
        copy(kernels_named("scalar").rows, want);
        for (std::size_t c = 0; c < columns; ++c) {
            for (const LaneRun& run : runs) {
                for (std::uint32_t i = 0; i < run.count; ++i) {
                    const bool is_there = i >= run.begin && i < run.end;
                    const float lane = want[c * (to + 1) + run.to + i];
                    CHECK(lane == (is_there ? tight[c * 100 + run.from + i - run.begin] : 0.0F));
                }
            }
        }
        for (const KernelTable* table : runnable_kernels()) {
            got.assign(got.size(), -1.0F);
            copy(table->rows, got);
            CHECK(want == got);
        }
    }
}

// Any lanes of which any have elements, as near to the ends of what there is as they can be.
PairRun random_run(std::size_t size, std::size_t stride, std::size_t to) {
    const auto below = [](std::size_t n) { return static_cast<std::size_t>(rng()() % n); };
    const auto lanes_below = [](std::size_t lane) {
        return static_cast<std::uint32_t>((std::uint64_t{1} << lane) - 1U);
    };
    const std::size_t count = below(32) + 1;
    const auto elements = [&](std::ptrdiff_t& lane0, std::uint32_t& has) {
        const std::size_t begin = below(count + 1);
        const std::size_t end = begin + below(count - begin + 1);
        has = lanes_below(end) & ~lanes_below(begin);
        const std::size_t reach = end == begin ? 0 : (end - begin - 1) * stride;
        const std::size_t most = size - 1 - reach;
        const std::size_t first = below(3) == 0 ? most : below(3) == 0 ? 0 : below(most + 1);
        lane0 = static_cast<std::ptrdiff_t>(first) - static_cast<std::ptrdiff_t>(begin * stride);
    };
    PairRun run{0, 0, to, 0, 0, lanes_below(count)};
    elements(run.first, run.has_first);
    elements(run.second, run.has_second);
    return run;
}

TEST(kernels_copy_pairs_as_the_scalar_one) {
    constexpr std::size_t kSize = 150;
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    for (std::size_t round = 0; round < scaled(400); ++round) {
        const std::size_t stride = round % 4 + 1;
        const std::size_t times = round % 3 + 1;
        std::vector<PairRun> runs;
        std::size_t ld_to = 0;
        for (std::size_t i = 0; i < round % 5 + 1; ++i) {
            runs.push_back(random_run(kSize, stride, ld_to));
            ld_to += 2 * static_cast<std::size_t>(std::popcount(runs.back().lanes)) + round % 3;
        }
        std::vector<Bits> from(times * kSize);
        for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<Bits>(i + 1);
        std::vector<Bits> want(times * ld_to, 0xFFFF), got = want;
        scalar.copy_pairs(from.data(), stride, kSize, times, runs.data(), runs.size(), want.data(),
                          ld_to);
        const PairRun& last = runs.back();
        for (std::size_t i = 0; 2 * i + last.to < ld_to - round % 3; ++i) {
            const auto element = [&](std::ptrdiff_t lane0, std::uint32_t has) {
                const auto at = static_cast<std::size_t>(
                    lane0 + static_cast<std::ptrdiff_t>(i * stride + (times - 1) * kSize));
                return (has >> i & 1U) == 0 ? Bits{0} : from.at(at);
            };
            const std::size_t at = (times - 1) * ld_to + last.to + 2 * i;
            CHECK(want[at] == element(last.first, last.has_first));
            CHECK(want[at + 1] == element(last.second, last.has_second));
        }
        for (const KernelTable* table : runnable_kernels()) {
            if (table->gemm.bf16.copy_pairs == nullptr) continue;
            got.assign(got.size(), 0xFFFF);
            table->gemm.bf16.copy_pairs(from.data(), stride, kSize, times, runs.data(), runs.size(),
                                        got.data(), ld_to);
            CHECK(want == got);
        }
    }
}

template <class T>
T numbered(std::size_t i) {
    return static_cast<T>(i % 251 + 1);
}

template <class W, class T>
void check_pick(RowsKernels::Pick<W, T> pick, RowsKernels::Pick<W, T> reference) {
    for (const std::size_t stride : {1, 2, 3, 5}) {
        for (const std::size_t rows : {1, 3}) {
            for (const std::size_t cols : {1, 2, 7, 8, 9, 16, 17, 33, 64, 70}) {
                const std::size_t ld = (cols - 1) * stride + 1 + rng()() % 3;
                const std::size_t ld_to = cols + rng()() % 3;
                std::vector<W> from((rows - 1) * ld + (cols - 1) * stride + 1);
                for (std::size_t i = 0; i < from.size(); ++i) from[i] = numbered<W>(i);
                std::vector<T> want((rows - 1) * ld_to + cols, T{-1}), got = want;
                reference(from.data(), ld, stride, rows, cols, want.data(), ld_to);
                const T last = want.back();
                if constexpr (sizeof(W) == sizeof(T)) CHECK(last == from.back());
                pick(from.data(), ld, stride, rows, cols, got.data(), ld_to);
                CHECK(got == want);
            }
        }
    }
}

TEST(every_kernel_picks_as_the_reference) {
    const RowsKernels& scalar = kernels_named("scalar").rows;
    for (const KernelTable* table : runnable_kernels()) {
        check_pick(table->rows.pick_f32, scalar.pick_f32);
        check_pick(table->rows.pick_f64, scalar.pick_f64);
        check_pick(table->rows.pick_bf16, scalar.pick_bf16);
    }
}

// A channel's windows, which chains of `length` weights see, one element apart.
template <class T>
struct Seen {
    std::size_t rows, cols, n, length;
    std::size_t pitch = cols + n - 1 + rng()() % 3;
    std::size_t ld = detail::round_up(cols, 64 / sizeof(T));
    std::size_t filled = detail::round_up(rows, kWindowRows);
    std::vector<T> elements = normal<T>((filled + length - 2) * pitch + n - 1 + ld);
    std::vector<T> weights = normal<T>(n * length);
    std::vector<T> before = normal<T>(filled * ld);

    [[nodiscard]] std::vector<WindowChain<T>> chains() const {
        std::vector<WindowChain<T>> all;
        for (std::size_t i = 0; i < n; ++i) {
            all.push_back({elements.data() + i, weights.data() + i, length, n});
        }
        return all;
    }

    [[nodiscard]] bool is_sum(std::size_t r, std::size_t c, T sum) const {
        long double want = before[r * ld + c];
        long double magnitude = std::abs(want);
        for (std::size_t k = 0; k < n * length; ++k) {
            const long double term =
                static_cast<long double>(weights[k]) *
                static_cast<long double>(elements[(r + k / n) * pitch + c + k % n]);
            want += term;
            magnitude += std::abs(term);
        }
        return std::abs(static_cast<double>(sum - want)) <=
               bound<T>(n * length + 1, static_cast<double>(magnitude));
    }
};

template <class T>
void check_windows(RowsKernels::Windows<T> sum) {
    for (std::size_t round = 0; round < scaled(120); ++round) {
        const Seen<T> seen{rng()() % 20 + 1, rng()() % 90 + 1, round % 8 + 1, round % 17 + 1};
        auto sums = seen.before;
        const auto chains = seen.chains();
        sum(chains.data(), chains.size(), seen.pitch, seen.rows, seen.cols, sums.data(), seen.ld);
        bool holds = true;
        for (std::size_t r = 0; r < seen.rows; ++r) {
            for (std::size_t c = 0; c < seen.cols; ++c) {
                holds = holds && seen.is_sum(r, c, sums[r * seen.ld + c]);
            }
        }
        CHECK(holds);
    }
}

TEST(every_kernel_sums_windows) {
    for (const KernelTable* table : runnable_kernels()) {
        check_windows<float>(table->rows.windows_f32);
        check_windows<double>(table->rows.windows_f64);
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
