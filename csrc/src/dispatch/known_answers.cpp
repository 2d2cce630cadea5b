// SPDX-License-Identifier: Apache-2.0
// A vector table is trusted only after it gave the reference's answers: a miscompiled kernel, or a
// CPU or emulator that errs, must not write hashes and pages that nobody else can read. Products
// are asked in small integers, whose sums are exact in every order.
#include "dispatch/known_answers.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <span>
#include <tuple>

#include "dispatch/known_codec.hpp"
#include "dispatch/tile_registers.hpp"

namespace pydedup {
namespace {

template <std::size_t N>
std::array<std::uint8_t, N> fixed_bytes() noexcept {
    std::array<std::uint8_t, N> bytes{};
    std::uint32_t state = 1;
    for (std::uint8_t& byte : bytes) {
        state = state * 1664525U + 1013904223U;
        byte = static_cast<std::uint8_t>(state >> 24);
    }
    return bytes;
}

using Question = std::array<std::uint8_t, 700>;

// More than a group of stripes, after which the state of a hash is scrambled.
using HashQuestion = std::array<std::uint8_t, 1300>;

bool same_rows(const KernelTable& table, const HashQuestion& question) noexcept {
    for (const std::size_t row_bytes : {question.size(), std::size_t{200}, std::size_t{128}}) {
        std::array<std::uint64_t, 2> want{};
        std::array<std::uint64_t, 2> got{};
        const std::size_t rows = question.size() / row_bytes;
        kScalarKernels.hash.hash_rows(question.data(), rows, row_bytes, row_bytes, 7, want.data());
        table.hash.hash_rows(question.data(), rows, row_bytes, row_bytes, 7, got.data());
        if (want != got) return false;
    }
    return true;
}

// Three blocks side by side, of rows that are no whole stripes, and that overlap.
bool same_panel(const KernelTable& table, const HashQuestion& question) noexcept {
    std::array<std::uint64_t, 6> want{};
    std::array<std::uint64_t, 6> got{};
    kScalarKernels.hash.hash_panel(question.data(), 3, 9, 110, 120, 0, want.data());
    table.hash.hash_panel(question.data(), 3, 9, 110, 120, 0, got.data());
    return want == got;
}

constexpr std::size_t kSide = 19;  // a whole vector, half of one, and a tail

template <class T>
struct Products {
    std::array<T, kSide * kSide> x{};
    std::array<T, kSide * kSide> w{};

    explicit Products(const Question& question) noexcept {
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = static_cast<T>(question[i] % 15) - T{7};
            w[i] = static_cast<T>(question[i + 200] % 13) - T{6};
        }
    }
};

// As many columns as x fills and w has, `Rows` rows: whole register tiles and single rows.
template <std::size_t Rows, class E, class A>
bool multiply_tiles(
    std::span<const GemmTile<E, A>> tiles, std::span<const E> x, std::span<const E> w,
    A (*value)(E) = [](E e) { return A{e}; }) noexcept {
    const std::size_t ldw = w.size() / Rows;
    for (const GemmTile<E, A>& tile : tiles) {
        if (tile.width == 0) break;
        const std::size_t elements = tile.width * tile.group;
        const std::size_t sums = tile.width * tile.sums();
        const std::size_t cols = std::min(x.size() / elements * tile.group, ldw);
        std::array<A, Rows * 64> acc{};
        if (sums > 64 || cols == 0) return false;
        tile.tile_nt(x.data(), w.data(), Rows, cols, ldw, nullptr, acc.data());
        for (std::size_t r = 0; r < Rows; ++r) {
            std::array<A, 64> want{};
            for (std::size_t k = 0; k < (cols + tile.group - 1) / tile.group * elements; ++k) {
                const std::size_t c = k / elements * tile.group + k % tile.group;
                if (c >= cols) continue;
                want[k % elements / tile.per_sum] += value(x[k]) * value(w[r * ldw + c]);
            }
            for (std::size_t s = 0; s < sums; ++s) {
                if (acc[r * sums + s] != want[s]) return false;
            }
        }
    }
    return true;
}

template <class T>
bool same_products(const GemmKernelsOf<T>& gemm, const GemmKernelsOf<T>& reference,
                   const Question& question) noexcept {
    constexpr std::size_t n = kSide;
    const Products<T> in(question);
    for (const std::size_t m : {std::size_t{1}, std::size_t{7}}) {
        auto want = in.w;
        auto got = in.w;
        reference.dot_nt(in.x.data(), n, m, in.w.data(), n, n, n, want.data(), n);
        gemm.dot_nt(in.x.data(), n, m, in.w.data(), n, n, n, got.data(), n);
        if (want != got) return false;
        reference.block_nn(in.x.data(), n, m, in.w.data(), n, n, n, want.data(), n);
        gemm.block_nn(in.x.data(), n, m, in.w.data(), n, n, n, got.data(), n);
        if (want != got) return false;
    }
    return multiply_tiles<kSide, T, T>(gemm.tiles, in.x, in.w);
}

bool same_halves(const GemmKernels& gemm, const GemmKernels& reference,
                 const Question& question) noexcept {
    std::array<std::uint16_t, 35> codes{};  // both signs, subnormals, infinity; no NaN
    for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint16_t>((question[2 * i] & 0xFBU) << 8 | question[2 * i + 1]);
    }
    codes[0] = 0x0001;
    codes[1] = 0xFC00;
    std::array<float, 35> want{};
    std::array<float, 35> got{};
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

    // Small whole numbers in either format.
    std::array<float, 35> x{};
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(question[i] % 15) - 7.0F;
    for (const bool f16 : {true, false}) {
        for (std::size_t i = 0; i < codes.size(); ++i) {  // 1, -2, 0.5, 4
            constexpr std::array<std::uint16_t, 4> kF16 = {0x3C00, 0xC000, 0x3800, 0x4400};
            constexpr std::array<std::uint16_t, 4> kBf16 = {0x3F80, 0xC000, 0x3F00, 0x4080};
            codes[i] = (f16 ? kF16 : kBf16)[question[i + 50] % 4];
        }
        const auto dot = [f16](const GemmKernels& k) { return f16 ? k.dot_nt_f16 : k.dot_nt_bf16; };
        float want_sum = 1.0F;
        float got_sum = 1.0F;
        dot(reference)(x.data(), 35, 1, codes.data(), 1, 35, 35, &want_sum, 1);
        dot(gemm)(x.data(), 35, 1, codes.data(), 1, 35, 35, &got_sum, 1);
        if (want_sum != got_sum) return false;
    }
    return true;
}

bool same_mix(const SimilarityKernels& similarity, const SimilarityKernels& reference,
              const Question& question) noexcept {
    std::array<std::uint32_t, 2 * kSignWords> signs{};
    std::memcpy(signs.data(), question.data(), sizeof signs);
    const auto answer = [&](const SimilarityKernels& kernels) {
        alignas(64) std::array<float, kFoldBuckets> buckets{};
        for (std::size_t i = 0; i < buckets.size(); ++i) {
            buckets[i] = static_cast<float>(question[i % question.size()]) / 3.0F - 42.0F;
        }
        alignas(64) std::array<float, 64> out{};
        kernels.mix(buckets.data(), signs.data(), out.size(), out.data());
        return out;
    };
    return answer(similarity) == answer(reference);
}

// More than a strip, and than compare() adds up at a time.
constexpr std::size_t kElements = kFoldBuckets + 76;

// Strips of whole groups, of which vector kernels take several at once, and one of short groups.
bool same_fold(const ElementKernels& kernels, const ElementKernels& reference,
               const std::uint8_t* data, std::size_t item_bytes,
               const Question& question) noexcept {
    constexpr std::array<std::uint16_t, 4> kMoves{0x2A5, 0, 0x3FF, 0x110};
    std::array<std::uint32_t, kMoves.size() * kSignWords> signs{};
    std::memcpy(signs.data(), question.data(), sizeof signs);
    FoldStrip whole{kFoldGroups, true, {}, {}};
    for (std::size_t t = 0; t < kFoldGroups; ++t) {
        whole.offset[t] = t * kSimLanes * item_bytes;
        whole.lanes[t] = kSimLanes;
    }
    FoldStrip part{};
    for (std::size_t row = 0; row < 3; ++row) {
        for (std::size_t c = 0; c < 50; c += kSimLanes) {
            part.offset[part.groups] = (row * 50 + c) * item_bytes;
            part.lanes[part.groups++] = static_cast<std::uint8_t>(50 - c < 16 ? 50 - c : 16);
        }
    }
    const auto answer = [&](const ElementKernels& k) {
        alignas(64) std::array<float, kFoldBuckets> buckets{};
        std::array<double, kSimLanes> squares{};
        k.fold(data, whole, kMoves.size(), kSimLanes * item_bytes, data, signs.data(),
               kMoves.data(), buckets.data(), squares.data());
        k.fold(data, part, 1, 0, data, signs.data(), kMoves.data(), buckets.data(), squares.data());
        return std::pair(buckets, squares);
    };
    return answer(kernels) == answer(reference);
}

bool same_comparison(const ElementKernels& kernels, const ElementKernels& reference,
                     const std::uint8_t* data, std::size_t item_bytes) noexcept {
    const auto answer = [&](const ElementKernels& k, std::size_t rows, std::size_t cols) {
        const std::size_t stride = (cols + 2) * item_bytes;
        Comparison found{};
        k.compare(data, stride, data + 5 * item_bytes, stride, rows, cols, 0.25, 1e300, found);
        return std::tuple(found.squares, found.squared_difference, found.greatest_difference,
                          found.within, k.sum_squares(data, stride, rows, cols));
    };
    // Rows of a whole group and a tail, and one long row, each beside what is 5 elements further
    // on.
    return answer(kernels, 3, 19) == answer(reference, 3, 19) &&
           answer(kernels, 1, kElements - 5) == answer(reference, 1, kElements - 5);
}

bool same_elements(const SimilarityKernels& similarity, const SimilarityKernels& reference,
                   const Question& question) noexcept {
    std::array<float, kElements> singles{};
    std::array<double, kElements> doubles{};
    std::array<std::uint16_t, kElements> halves{};
    for (std::size_t i = 0; i < kElements; ++i) {
        const auto byte = [&](std::size_t at) { return question[(i + at) % question.size()]; };
        singles[i] = static_cast<float>(byte(0)) / 97.0F - 1.0F;
        doubles[i] = static_cast<double>(byte(70)) / 97.0 - 1.0;
        halves[i] = static_cast<std::uint16_t>(0x3000U | (byte(140) & 0x8FU) << 8);
    }
    const auto same = [&](const ElementKernels& kernels, const ElementKernels& wanted,
                          const auto& values) {
        const auto* data = reinterpret_cast<const std::uint8_t*>(values.data());
        return same_fold(kernels, wanted, data, sizeof values[0], question) &&
               same_comparison(kernels, wanted, data, sizeof values[0]);
    };
    return same(similarity.f32, reference.f32, singles) &&
           same(similarity.f64, reference.f64, doubles) &&
           same(similarity.f16, reference.f16, halves) &&
           same(similarity.bf16, reference.bf16, halves);
}

template <class Key>
bool same_selection(const SelectKernels<Key>& kernels, const SelectKernels<Key>& reference,
                    const std::array<Key, 45>& keys) noexcept {
    const Key low = keys[3] < keys[8] ? keys[3] : keys[8];
    const Key high = keys[3] < keys[8] ? keys[8] : keys[3];
    const auto answer = [&](const SelectKernels<Key>& k) {
        std::array<Key, 45> kept{};
        const Filtered found = k.filter(keys.data(), keys.size(), low, high, kept.data());
        for (std::size_t i = found.kept; i < kept.size(); ++i) kept[i] = 0;  // may hold anything
        return std::tuple(found.below, found.kept, kept,
                          k.count_below(keys.data(), keys.size(), high),
                          k.next_above(keys.data(), keys.size(), low));
    };
    return answer(kernels) == answer(reference);
}

bool same_keys(const SimilarityKernels& similarity, const SimilarityKernels& reference,
               const Question& question) noexcept {
    // Any bits have a magnitude; of NaNs, which widen in two ways, there are none among the halves.
    std::array<std::uint8_t, 360> data{};
    std::memcpy(data.data(), question.data(), data.size());
    for (std::size_t i = 1; i < data.size(); i += 2) {
        data[i] = static_cast<std::uint8_t>(data[i] & 0xBBU);
    }
    using Keys32 = void (*)(const std::uint8_t*, std::size_t, std::uint32_t*) noexcept;
    const auto of = [&](Keys32 make) {
        std::array<std::uint32_t, 45> keys{};
        make(data.data(), keys.size(), keys.data());
        return keys;
    };
    std::array<std::uint64_t, 45> want{};
    std::array<std::uint64_t, 45> got{};
    reference.keys_f64(data.data(), want.size(), want.data());
    similarity.keys_f64(data.data(), got.size(), got.data());
    return of(similarity.keys_f32) == of(reference.keys_f32) &&
           of(similarity.keys_f16) == of(reference.keys_f16) &&
           of(similarity.keys_bf16) == of(reference.keys_bf16) && want == got &&
           same_selection(similarity.select_u32, reference.select_u32, of(reference.keys_f32)) &&
           same_selection(similarity.select_u64, reference.select_u64, want);
}

bool same_sketch_distance(const SimilarityKernels& similarity, const SimilarityKernels& reference,
                          const Question& question) noexcept {
    std::array<std::int16_t, 64> a{};
    std::array<std::int16_t, 64> b{};
    for (std::size_t i = 0; i < a.size(); ++i) {  // differences up to 32766
        a[i] = static_cast<std::int16_t>(question[i] * 64);
        b[i] = static_cast<std::int16_t>(a[i] - (i % 3 == 0 ? 32766 : question[i + 64]));
    }
    return similarity.sketch_distance(a.data(), b.data(), a.size()) ==
           reference.sketch_distance(a.data(), b.data(), a.size());
}

// Small integers, as rows of every kind: their sums are exact in every order.
bool same_rows_summed(const RowsKernels& rows, const RowsKernels& reference,
                      const Question& question) noexcept {
    constexpr std::size_t kRows = 3;
    const Products<float> single(question);
    const Products<double> wide(question);
    std::array<std::uint16_t, kSide * kSide> halves{};  // 1, -2, 0.5 and 4 of f16; any of bf16
    for (std::size_t i = 0; i < halves.size(); ++i) {
        halves[i] = std::array<std::uint16_t, 4>{0x3C00, 0xC000, 0x3800, 0x4400}[question[i] % 4];
    }
    const auto same = [&]<class T, class W>(RowsKernels::Sum<T, W> sum,
                                            RowsKernels::Sum<T, W> wanted, const W* from,
                                            const T* scale) {
        std::array<const W*, kRows> at{};
        for (std::size_t i = 0; i < kRows; ++i) at[i] = from + (i * 5 + 2) * kSide;
        std::array<T, 3 * kSide> want{};
        std::array<T, 3 * kSide> got{};
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
    for (const std::size_t stride : {std::size_t{2}, std::size_t{3}}) {
        std::array<float, 100> want{};
        std::array<float, 100> got{};
        std::array<double, 100> want_wide{};
        std::array<double, 100> got_wide{};
        reference.pick_f32(single.x.data(), stride, want.size(), want.data());
        rows.pick_f32(single.x.data(), stride, got.size(), got.data());
        reference.pick_f64(wide.x.data(), stride, want_wide.size(), want_wide.data());
        rows.pick_f64(wide.x.data(), stride, got_wide.size(), got_wide.data());
        if (want != got || want_wide != got_wide) return false;
    }
    return true;
}

float value_of_bf16(std::uint16_t bits) noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// 47 rows and 35 columns: a whole set of matrix registers, half of one, and a tail.
bool same_pairs(const Bf16GemmKernels& bf16, const Question& question) noexcept {
    constexpr std::size_t kRows = 47;
    constexpr std::size_t kCols = 35;
    std::array<std::uint16_t, (kCols + 1) * 32> x{};
    std::array<std::uint16_t, kRows * kCols> w{};
    const auto small = [&](std::size_t i, int range) {
        const int value = question[i % question.size()] % range - range / 2;
        const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
        return static_cast<std::uint16_t>(bits >> 16);
    };
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = small(i, 15);
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = small(i + 200, 13);
    const TileRegisters registers(bf16);
    return multiply_tiles<kRows, std::uint16_t, float>(bf16.tiles, x, w, value_of_bf16);
}

}  // namespace

const char* first_wrong_group(const KernelTable& table) noexcept {
    const auto question = fixed_bytes<std::tuple_size_v<Question>>();
    const auto to_hash = fixed_bytes<std::tuple_size_v<HashQuestion>>();
    if (!same_rows(table, to_hash) || !same_panel(table, to_hash)) return "hash";
    if (!same_codec(table.codec, kScalarKernels.codec, question)) return "codec";
    if (!same_products(table.gemm.f32, kScalarKernels.gemm.f32, question) ||
        !same_products(table.gemm.f64, kScalarKernels.gemm.f64, question) ||
        !same_halves(table.gemm, kScalarKernels.gemm, question) ||
        !same_pairs(table.gemm.bf16, question)) {
        return "gemm";
    }
    if (!same_rows_summed(table.rows, kScalarKernels.rows, question)) return "rows";
    const SimilarityKernels& similarity = kScalarKernels.similarity;
    if (!same_mix(table.similarity, similarity, question) ||
        !same_elements(table.similarity, similarity, question) ||
        !same_keys(table.similarity, similarity, question) ||
        !same_sketch_distance(table.similarity, similarity, question)) {
        return "similarity";
    }
    return nullptr;
}

}  // namespace pydedup
