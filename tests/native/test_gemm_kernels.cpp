// SPDX-License-Identifier: Apache-2.0
// The product kernels of every instruction set that runs here, against long sums.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "check.hpp"
#include "dispatch/tile_registers.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm_reference.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

template <class T>
const GemmKernelsOf<T>& of_type(const KernelTable& table) {
    if constexpr (sizeof(T) == 4) {
        return table.gemm.f32;
    } else {
        return table.gemm.f64;
    }
}

template <class T>
void check_kernels(const KernelTable& table, std::size_t m, std::size_t n, std::size_t k) {
    const GemmKernelsOf<T>& kernels = of_type<T>(table);
    const auto x = normal<T>(m * k);
    const auto w = normal<T>(n * k);
    const auto y0 = normal<T>(m * n);
    const auto px = tight(x);
    const auto pw = tight(w);

    auto y = y0;
    kernels.dot_nt(px.get(), k, m, pw.get(), n, k, k, y.data(), n);
    CHECK(exact(x, w, m, n, k, false, y0).agrees(y));

    y = y0;
    kernels.block_nn(px.get(), k, m, pw.get(), k, n, n, y.data(), n);
    CHECK(exact(x, w, m, n, k, true, y0).agrees(y));

    for (const auto& tile : kernels.tiles) {
        if (tile.width == 0) break;
        const std::size_t width = tile.width;
        const std::size_t group = tile.group;
        const std::size_t lanes = width * group;
        const auto xt = normal<T>(width * k);
        const auto start = normal<T>(width * n);
        std::vector<T> packed((k + group - 1) / group * lanes), acc(n * lanes);
        for (std::size_t i = 0; i < width; ++i) {
            for (std::size_t c = 0; c < k; ++c) {
                packed[c / group * lanes + i * group + c % group] = xt[i * k + c];
            }
            for (std::size_t r = 0; r < n; ++r) acc[r * lanes + i * group] = start[i * n + r];
        }
        const auto ppacked = tight(packed);
        // What is prefetched changes nothing, be it much, little or nothing, and there or not.
        const auto next = [&](const T* begin, std::size_t elements) {
            const std::size_t some[] = {0, elements / 2, elements, 9 * elements};
            return begin + some[rng()() % std::size(some)];
        };
        tile.tile_nt(
            ppacked.get(), pw.get(), n, k, k,
            {pw.get(), next(pw.get(), n * k), ppacked.get(), next(ppacked.get(), packed.size())},
            acc.data());
        std::vector<T> got(width * n);
        for (std::size_t i = 0; i < width; ++i) {
            for (std::size_t r = 0; r < n; ++r) {
                const T* const sums = acc.data() + r * lanes + i * group;
                got[i * n + r] = std::accumulate(sums, sums + group, T{0});
            }
        }
        CHECK(exact(xt, w, width, n, k, false, start).agrees(got));
    }
}

TEST(kernels_agree_with_long_sums) {
    const std::size_t sizes[] = {1, 2, 3, 5, 8, 13, 17, 33, 64, 70};
    for (const KernelTable* table : runnable_kernels()) {
        for (const std::size_t m : {1, 2, 3, 4, 5, 7, 13}) {
            for (const std::size_t n : sizes) {
                for (const std::size_t k : sizes) {
                    if (!sampled()) continue;
                    check_kernels<float>(*table, m, n, k);
                    check_kernels<double>(*table, m, n, k);
                }
            }
        }
    }
}

using Bits = std::uint16_t;
constexpr Bits kNan = 0x7FC0;

std::vector<float> bf16_numbers(std::size_t count) {
    auto values = normal<float>(count);
    for (float& value : values) value = widened(upper_half(value));
    return values;
}

// What lies beside a block and behind x is NaN: whatever is read of it shows.
struct Pairs {
    std::size_t width, rows, cols;
    std::vector<float> x, w;  // width x cols, rows x cols
    std::vector<Bits> packed, stored;
    std::size_t ldw;

    Pairs(const GemmTile<Bits, float>& tile, std::size_t n, std::size_t k)
        : width(tile.width),
          rows(n),
          cols(k),
          x(bf16_numbers(width * k)),
          w(bf16_numbers(n * k)),
          ldw(k + 3) {
        const std::size_t group = tile.group;
        packed.assign((k + group - 1) / group * width * group, 0);
        for (std::size_t i = 0; i < width; ++i) {
            for (std::size_t c = 0; c < k; ++c) {
                packed[(c / group * width + i) * group + c % group] = upper_half(x[i * k + c]);
            }
        }
        packed.insert(packed.end(), 2048, kNan);
        stored.assign((n + 32) * ldw, kNan);
        for (std::size_t r = 0; r < n; ++r) {
            for (std::size_t c = 0; c < k; ++c) stored[r * ldw + c] = upper_half(w[r * k + c]);
        }
    }
};

// Sums of a tile, and what lies behind them, from (width x rows).
std::vector<float> sums_from(const GemmTile<Bits, float>& tile, const std::vector<float>& start,
                             std::size_t rows) {
    const std::size_t sums = tile.width * tile.sums();
    std::vector<float> acc((rows + 1) * sums, 0.0F);
    for (std::size_t i = 0; i < tile.width; ++i) {
        for (std::size_t r = 0; r < rows; ++r) {
            acc[r * sums + i * tile.sums()] = start[i * rows + r];
        }
    }
    std::fill(acc.end() - static_cast<std::ptrdiff_t>(sums), acc.end(), -7.0F);
    return acc;
}

std::vector<float> added_up(const GemmTile<Bits, float>& tile, const std::vector<float>& acc,
                            std::size_t rows) {
    const std::size_t sums = tile.width * tile.sums();
    for (std::size_t s = 0; s < sums; ++s) CHECK(acc[rows * sums + s] == -7.0F);
    std::vector<float> y(tile.width * rows);
    for (std::size_t i = 0; i < tile.width; ++i) {
        for (std::size_t r = 0; r < rows; ++r) {
            const float* const from = acc.data() + r * sums + i * tile.sums();
            y[i * rows + r] = std::accumulate(from, from + tile.sums(), 0.0F);
        }
    }
    return y;
}

void check_pairs(const GemmTile<Bits, float>& tile, std::size_t n, std::size_t k) {
    const Pairs p(tile, n, k);
    const auto start = normal<float>(tile.width * n);
    auto acc = sums_from(tile, start, n);
    const std::size_t asked = n % 2 == 0 ? p.stored.size() : 0;
    tile.tile_nt(p.packed.data(), p.stored.data(), n, k, p.ldw,
                 {p.stored.data(), p.stored.data() + asked, nullptr, nullptr}, acc.data());
    CHECK(exact(p.x, p.w, tile.width, n, k, false, start).agrees(added_up(tile, acc, n)));
}

// One block after another and all at once.
void check_pieces(const GemmTile<Bits, float>& tile, std::size_t n, std::size_t k) {
    std::vector<Pairs> blocks;
    std::vector<GemmPiece<Bits>> pieces;
    const std::size_t count = rng()() % kMaxGemmPieces + 1;
    for (std::size_t i = 0; i < count; ++i) blocks.emplace_back(tile, n, k + 7 * i);
    for (const Pairs& p : blocks) {
        const Bits* const next = pieces.size() % 2 == 0 ? p.stored.data() : nullptr;
        pieces.push_back({p.packed.data(), p.stored.data(), p.cols, p.ldw, next});
    }
    const bool anew = rng()() % 2 == 0;  // whatever was there before
    auto acc = sums_from(tile, normal<float>(tile.width * n), n);
    auto want = anew ? std::vector<float>(tile.width * n) : normal<float>(tile.width * n);
    Exact<float> sums{std::vector<double>(want.begin(), want.end()),
                      std::vector<double>(want.size()), 1};
    if (!anew) acc = sums_from(tile, want, n);
    tile.tile_nt_pieces(pieces.data(), pieces.size(), n, anew, acc.data());
    for (const Pairs& p : blocks) {
        const std::vector<float> zeros(want.size());
        const auto one = exact(p.x, p.w, tile.width, n, p.cols, false, zeros);
        for (std::size_t i = 0; i < want.size(); ++i) {
            sums.value[i] += one.value[i];
            sums.magnitude[i] += one.magnitude[i] + std::abs(want[i]);
        }
        sums.terms += one.terms;
    }
    CHECK(sums.agrees(added_up(tile, acc, n)));
}

TEST(pairs_of_bf16_agree_with_long_sums) {
    for (const KernelTable* table : runnable_kernels()) {
        const TileRegisters registers(table->gemm.bf16);
        for (const auto& tile : table->gemm.bf16.tiles) {
            if (tile.width == 0) break;
            for (const std::size_t n : {1, 8, 15, 16, 17, 31, 32, 33, 48, 64, 70}) {
                for (const std::size_t k : {1, 2, 3, 15, 31, 32, 33, 64, 70, 300}) {
                    if (!sampled()) continue;
                    check_pairs(tile, n, k);
                    if (tile.tile_nt_pieces != nullptr) check_pieces(tile, n, k);
                }
            }
        }
    }
}

// Any that may be cut: all exponents from 2^-94 on, all kinds of significands, and what is special.
std::vector<float> numbers_to_cut() {
    std::vector<float> numbers = {0.0F,
                                  -0.0F,
                                  1.0F,
                                  -1.5F,
                                  0x1p-94F,
                                  -0x1.fffffep-94F,
                                  INFINITY,
                                  -INFINITY,
                                  0x1.000002p0F,
                                  0x1.0002p3F,
                                  std::numeric_limits<float>::max()};
    for (const std::uint32_t bits : {0x7F800001U, 0xFFC00000U, 0x7FC12345U}) {
        numbers.push_back(std::bit_cast<float>(bits));
    }
    while (numbers.size() < 5000) {
        const auto bits = static_cast<std::uint32_t>(rng()());
        const std::uint32_t kept = numbers.size() % 3 == 0 ? 0xFFFFFFFFU << rng()() % 24 : ~0U;
        const auto number = std::bit_cast<float>(bits & kept);
        if (std::abs(number) >= 0x1p-94F) numbers.push_back(number);
    }
    return numbers;
}

TEST(a_number_is_the_sum_of_its_three_parts) {
    const auto numbers = numbers_to_cut();
    const std::size_t count = numbers.size();
    const auto& scalar = kernels_named("scalar").gemm.bf16.cut;
    std::vector<float> high(count), middle(count), low(count);
    scalar(numbers.data(), count, high.data(), middle.data(), low.data());
    bool right = true;
    for (std::size_t i = 0; i < count; ++i) {
        const float x = numbers[i];
        for (const float part : {high[i], middle[i], low[i]}) {
            right = right && (widened(upper_half(part)) == part) == !std::isnan(x);
            right = right && (std::isfinite(x) ? std::isfinite(part) && (part == 0) == (x == 0)
                                               : std::isnan(part) == std::isnan(x));
            right = right && (std::isnan(x) || std::signbit(part) == std::signbit(x));
        }
        if (!std::isfinite(x)) continue;
        const double sum = double{high[i]} + double{middle[i]} + double{low[i]};
        right = right && std::abs(sum - x) <= 0x1p-31 * std::abs(x);
    }
    CHECK(right);
}

TEST(kernels_cut_as_the_scalar_one) {
    const auto numbers = numbers_to_cut();
    const auto& scalar = kernels_named("scalar").gemm.bf16.cut;
    for (const KernelTable* table : runnable_kernels()) {
        const auto& kernel = table->gemm.bf16.cut;
        if (kernel == nullptr) continue;
        for (std::size_t n = 0; n <= numbers.size(); n = n < 40 ? n + 1 : 2 * n) {
            const auto x = tight(
                std::vector<float>(numbers.end() - static_cast<std::ptrdiff_t>(n), numbers.end()));
            std::vector<float> want(3 * n + 3, -7.0F), got = want;
            const auto cut = [&](const auto& by, std::vector<float>& to) {
                by(x.get(), n, to.data(), to.data() + n + 1, to.data() + 2 * n + 2);
            };
            cut(scalar, want);
            cut(kernel, got);
            CHECK(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0);
        }
        std::vector<float> want(3 * numbers.size()), got = want;
        const std::size_t n = numbers.size();
        scalar(numbers.data(), n, want.data(), want.data() + n, want.data() + 2 * n);
        kernel(numbers.data(), n, got.data(), got.data() + n, got.data() + 2 * n);
        CHECK(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0);
    }
}

// Any numbers: most of one size, so that they may be cut; some rows of others.
std::vector<float> rows_to_cut(std::size_t rows, std::size_t cols) {
    auto numbers = normal<float>(rows * cols);
    for (std::size_t r = 0; r < rows; ++r) {
        float* const row = numbers.data() + r * cols;
        const auto at = rng()() % cols;
        switch (rng()() % 12) {
            case 0:
                row[at] = -INFINITY;
                break;
            case 1:
                row[at] = std::bit_cast<float>(0x7F800001U);
                break;
            case 2:
                row[at] = 0x1p60F;
                break;
            case 3:
                for (std::size_t c = 0; c < cols; ++c) row[c] *= 0x1p-120F;
                break;
            case 4:
                std::fill_n(row, cols, -0.0F);
                break;
            case 5:
                row[at] = std::bit_cast<float>(0x5D7FFFFFU);
                break;
            case 6:
                for (std::size_t c = 0; c < cols; ++c) row[c] *= 0x1p-80F;
                break;
            default:
                row[at] = std::bit_cast<float>(static_cast<std::uint32_t>(rng()()) & 0xBFFFFFFFU);
        }
    }
    return numbers;
}

TEST(kernels_cut_both_factors_as_the_scalar_one) {
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    for (const KernelTable* table : runnable_kernels()) {
        const auto& bf16 = table->gemm.bf16;
        if (bf16.cut_block == nullptr) continue;
        for (const std::size_t rows : {1, 2, 15, 16, 17, 31, 32}) {
            for (const std::size_t cols : {1, 2, 31, 32, 33, 64, 101}) {
                if (!sampled()) continue;
                const std::size_t ldx = cols + rng()() % 3;
                const auto x = tight(rows_to_cut(rows, ldx));
                const std::size_t ld_to = 2 * rows + 2;
                const std::size_t part = (cols + 1) / 2 * ld_to;
                std::vector<Bits> want(3 * part, 0x1234), got = want;
                CHECK(scalar.pack_cut(x.get(), ldx, rows, cols, want.data(), part, ld_to) ==
                      bf16.pack_cut(x.get(), ldx, rows, cols, got.data(), part, ld_to));
                CHECK(want == got);

                const std::size_t of_pairs = (cols + 1) / 2 * 64;
                const auto lanes = tight(rows_to_cut(cols, 32));
                std::vector<Bits> want_pairs(3 * of_pairs), got_pairs = want_pairs;
                CHECK(scalar.pair_cut(lanes.get(), cols, want_pairs.data(), of_pairs) ==
                      bf16.pair_cut(lanes.get(), cols, got_pairs.data(), of_pairs));
                CHECK(want_pairs == got_pairs);

                const std::size_t filled = cut_elements(rows, cols);
                const detail::AlignedArray<Bits> plain(3 * filled), other(3 * filled);
                const bool may = scalar.cut_block(x.get(), rows, cols, ldx, plain.data());
                CHECK(may == bf16.cut_block(x.get(), rows, cols, ldx, other.data()));
                CHECK(!may || std::equal(plain.data(), plain.data() + 3 * filled, other.data()));
            }
        }
    }
}

TEST(three_parts_add_up_to_a_number) {
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    const detail::AlignedArray<Bits> to(3 * cut_elements(1, 1));
    bool right = true;
    for (std::size_t i = 0; i < 5000; ++i) {
        const auto number = std::bit_cast<float>(static_cast<std::uint32_t>(rng()()));
        const bool may = scalar.cut_block(&number, 1, 1, 1, to.data());
        const float size = std::abs(number);
        right = right && may == ((size >= 0x1p-90F && size < 0x1p60F) || size == 0);
        double sum = 0;
        for (std::size_t k = 0; k < 3; ++k) sum += widened(to[k * cut_elements(1, 1)]);
        if (may) right = right && sum == number;
    }
    CHECK(right);
}

// All columns of a block, or from a later one on.
TEST(cut_products_agree_with_long_sums) {
    for (const KernelTable* table : runnable_kernels()) {
        const auto& bf16 = table->gemm.bf16;
        const TileRegisters registers(bf16);
        for (const auto& tile : bf16.tiles) {
            if (tile.width == 0 || tile.tile_nt_cut == nullptr) break;
            for (const std::size_t n : {1, 8, 15, 16, 17, 31, 32, 33, 48, 64, 70}) {
                for (const std::size_t k : {1, 2, 3, 15, 31, 32, 33, 64, 70, 300}) {
                    if (!sampled()) continue;
                    const std::size_t from = k > 64 && rng()() % 2 == 0 ? 32 : 0;
                    const std::size_t m = tile.width - rng()() % 3;
                    const auto x = normal<float>(m * k);
                    const auto w = normal<float>(n * k);
                    const std::size_t ld = 2 * tile.width;
                    const std::size_t columns = (k + 1) / 2 * ld;
                    const std::size_t part = columns + 16 * ld;
                    // What lies behind the last column, NaN here, must not count.
                    const auto packed = tight(std::vector<Bits>(3 * part, 0x7FC0));
                    for (const std::size_t i : {0, 1, 2}) {
                        std::fill_n(packed.get() + i * part, columns, Bits{0});
                    }
                    CHECK(bf16.pack_cut(x.data(), k, m, k, packed.get(), part, ld) == 0);
                    const std::size_t filled = cut_elements(n, k);
                    const detail::AlignedArray<Bits> cut(3 * filled);
                    CHECK(bf16.cut_block(w.data(), n, k, k, cut.data()));
                    const auto start = normal<float>(n * tile.width);
                    const auto acc = tight(start);
                    const bool ahead = rng()() % 2 == 0;
                    tile.tile_nt_cut(packed.get() + from / 2 * ld, part,
                                     cut.data() + cut_elements(n, from), filled, n, k - from,
                                     ahead ? GemmNext<Bits>{cut.data(), cut.data() + filled,
                                                            packed.get(), packed.get() + part}
                                           : GemmNext<Bits>{},
                                     acc.get());
                    std::vector<float> y(m * n), y0(m * n), some_x, some_w;
                    for (std::size_t i = 0; i < m; ++i) {
                        for (std::size_t r = 0; r < n; ++r) {
                            y[i * n + r] = acc.get()[r * tile.width + i];
                            y0[i * n + r] = start[r * tile.width + i];
                        }
                        for (std::size_t c = from; c < k; ++c) some_x.push_back(x[i * k + c]);
                    }
                    for (std::size_t r = 0; r < n; ++r) {
                        for (std::size_t c = from; c < k; ++c) some_w.push_back(w[r * k + c]);
                    }
                    const auto want = exact(some_x, some_w, m, n, k - from, false, y0);
                    CHECK(want.agrees(y));
                }
            }
        }
    }
}

TEST(kernels_round_as_the_scalar_one) {
    std::vector<float> values;
    for (std::uint32_t i = 0; i < 65536; ++i) {
        for (const std::uint32_t low : {0x0000U, 0x0001U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
            values.push_back(std::bit_cast<float>(i << 16 | low));
        }
    }
    const auto& scalar = kernels_named("scalar").gemm.f32_to_bf16;
    std::vector<Bits> want(values.size());
    scalar(values.data(), values.size(), want.data());
    bool nearest = true;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const float value = values[i];
        if (std::isnan(value)) {
            nearest = nearest && std::isnan(widened(want[i]));
            continue;
        }
        if (!std::isfinite(value)) continue;
        const double off = std::abs(double{widened(want[i])} - value);
        for (const int step : {-1, 1}) {
            const double other = widened(static_cast<Bits>(want[i] + step));
            if (std::isnan(other) || std::isinf(widened(want[i]))) continue;
            nearest = nearest && off <= std::abs(other - value);
            if (off == std::abs(other - value)) nearest = nearest && want[i] % 2 == 0;
        }
    }
    CHECK(nearest);
    for (const KernelTable* table : runnable_kernels()) {
        std::vector<Bits> got(values.size());
        table->gemm.f32_to_bf16(values.data(), values.size(), got.data());
        CHECK(got == want);
        for (std::size_t n = 0; n < 40; ++n) {  // tails
            const auto some =
                tight(std::vector<float>(values.end() - static_cast<long>(n), values.end()));
            std::vector<Bits> to(n + 1, 0x1234);
            table->gemm.f32_to_bf16(some.get(), n, to.data());
            CHECK(to[n] == 0x1234 &&
                  std::equal(to.begin(), to.end() - 1, want.end() - static_cast<long>(n)));
        }
    }
}

TEST(kernels_move_pairs_as_the_scalar_one) {
    const auto& scalar = kernels_named("scalar").gemm.bf16;
    for (const KernelTable* table : runnable_kernels()) {
        const auto& bf16 = table->gemm.bf16;
        if (bf16.tiles[0].width == 0) continue;
        for (int trial = 0; trial < 300; ++trial) {
            const std::size_t rows = rng()() % 70 + 1, cols = rng()() % 70 + 1;
            const std::size_t ld = cols + rng()() % 5;
            std::vector<Bits> x(rows * ld);
            for (Bits& number : x) number = static_cast<Bits>(rng()() | 0x80U);
            const bool subnormal = trial % 2 == 0;
            if (subnormal) {
                x[rng()() % rows * ld + rng()() % cols] = static_cast<Bits>(rng()() % 127 + 1);
            }
            x.resize((rows - 1) * ld + cols);
            const auto given = tight(x);
            std::vector<Bits> want((cols + 1) / 2 * (2 * rows + 3), 7), got = want;
            CHECK(scalar.pack_pairs(given.get(), ld, rows, cols, want.data(), 2 * rows + 3) ==
                  subnormal);
            CHECK(bf16.pack_pairs(given.get(), ld, rows, cols, got.data(), 2 * rows + 3) ==
                  subnormal);
            CHECK(want == got);

            auto sums = normal<float>(rows * ld);
            sums[0] = -0.0F;
            sums.resize((rows - 1) * ld + cols);
            const auto held = tight(sums);
            std::vector<float> whole(cols * (rows + 2), 7.0F), moved = whole;
            scalar.columns_to_f32(held.get(), ld, rows, cols, whole.data(), rows + 2);
            bf16.columns_to_f32(held.get(), ld, rows, cols, moved.data(), rows + 2);
            CHECK(std::memcmp(whole.data(), moved.data(), whole.size() * sizeof(float)) == 0);
            for (const bool has_bias : {true, false}) {
                const auto of_rows = tight(normal<float>(rows));
                const float* added = has_bias ? of_rows.get() : nullptr;
                std::vector<Bits> there(cols * (rows + 2), 7), here = there;
                scalar.columns_to_bf16(held.get(), ld, rows, cols, added, there.data(), rows + 2);
                bf16.columns_to_bf16(held.get(), ld, rows, cols, added, here.data(), rows + 2);
                CHECK(there == here);
                const auto of_columns = tight(normal<float>(cols));
                added = has_bias ? of_columns.get() : nullptr;
                there.assign(rows * (cols + 2), 7);
                here = there;
                scalar.rows_to_bf16(held.get(), ld, rows, cols, added, there.data(), cols + 2);
                bf16.rows_to_bf16(held.get(), ld, rows, cols, added, here.data(), cols + 2);
                CHECK(there == here);
            }
        }
    }
}

TEST(sixteen_bit_kernels_widen_every_value) {
    std::vector<std::uint16_t> codes(65536);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint16_t>(i);
    std::vector<float> want(codes.size());
    std::vector<float> got(codes.size());
    const GemmKernels& reference = kernels_named("scalar").gemm;
    for (const KernelTable* table : runnable_kernels()) {
        for (const bool half : {true, false}) {
            const auto pick = [half](const GemmKernels& k) {
                return half ? k.f16_to_f32 : k.bf16_to_f32;
            };
            pick(reference)(codes.data(), codes.size(), want.data());
            pick(table->gemm)(codes.data(), codes.size(), got.data());
            bool same = true;
            for (std::size_t i = 0; i < codes.size(); ++i) {
                same = same && (std::memcmp(&want[i], &got[i], 4) == 0 ||
                                (std::isnan(want[i]) && std::isnan(got[i])));
            }
            CHECK(same);
            // Tails: the dot product of one value with 1 is that value. Behind the values is
            // nothing, or what is not a number.
            const auto dot = half ? table->gemm.dot_nt_f16 : table->gemm.dot_nt_bf16;
            for (std::size_t k = 1; k < 40; ++k) {
                const std::vector<float> x(k, 1.0F);
                std::vector<std::uint16_t> some(codes.begin() + 15000, codes.begin() + 15000 + k);
                const auto w = tight(some);
                some.resize(k + 40, 0xFFFF);
                double sum = 0.0;
                for (std::size_t c = 0; c < k; ++c) sum += want[15000 + c];
                for (const std::uint16_t* from : {w.get(), some.data()}) {
                    float y = 0.0F;
                    dot(x.data(), k, 1, from, 1, k, k, &y, 1);
                    CHECK(std::abs(y - sum) <= bound<float>(k, std::abs(sum)));
                }
                std::vector<float> wide(k + 1, -7.0F);
                pick(table->gemm)(w.get(), k, wide.data());
                CHECK(std::equal(want.begin() + 15000, want.begin() + 15000 + k, wide.begin()));
                CHECK(wide[k] == -7.0F);
            }
        }
    }
}

TEST(scalar_widening_knows_the_special_values) {
    const GemmKernels& scalar = kernels_named("scalar").gemm;
    const std::uint16_t halves[] = {0x0000, 0x8000, 0x0001, 0x03FF, 0x0400,
                                    0x3C00, 0xC000, 0x7BFF, 0x7C00, 0xFC00};
    const float want[] = {0.0F, -0.0F, 0x1p-24F, 1023 * 0x1p-24F, 0x1p-14F,
                          1.0F, -2.0F, 65504.F,  INFINITY,        -INFINITY};
    float got[10];
    scalar.f16_to_f32(halves, 10, got);
    CHECK(std::memcmp(want, got, sizeof want) == 0);
    const std::uint16_t nan = 0x7E01;
    scalar.f16_to_f32(&nan, 1, got);
    CHECK(std::isnan(got[0]));
}

}  // namespace

PYDEDUP_TEST_MAIN
