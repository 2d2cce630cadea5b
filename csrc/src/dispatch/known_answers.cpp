// SPDX-License-Identifier: Apache-2.0
// A vector table is trusted only after it gave the reference's answers: a miscompiled kernel, or a
// CPU or emulator that errs, must not write hashes and pages that nobody else can read.
#include "dispatch/known_answers.hpp"

#include <array>
#include <cstring>
#include <tuple>

#include "dispatch/known_codec.hpp"
#include "dispatch/known_gemm.hpp"
#include "dispatch/known_rows.hpp"

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
    // Rows of whole stripes, and ones that end within either half of a stripe and at its middle.
    for (const std::size_t row_bytes :
         {question.size(), std::size_t{200}, std::size_t{192}, std::size_t{128}}) {
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

bool same_mix(const SimilarityKernels& similarity, const SimilarityKernels& reference,
              const Question& question) noexcept {
    std::array<std::uint32_t, 2 * kSignWords> signs{};
    std::memcpy(signs.data(), question.data(), sizeof signs);
    const auto answer = [&](const SimilarityKernels& kernels, std::size_t outputs) {
        alignas(64) std::array<float, kFoldBuckets> buckets{};
        for (std::size_t i = 0; i < buckets.size(); ++i) {
            buckets[i] = static_cast<float>(question[i % question.size()]) / 3.0F - 42.0F;
        }
        alignas(64) std::array<float, 512> out{};
        kernels.mix(buckets.data(), signs.data(), outputs, out.data());
        return out;
    };
    for (const std::size_t outputs : {64, 128, 256, 512}) {
        if (answer(similarity, outputs) != answer(reference, outputs)) return false;
    }
    return true;
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
    const auto answer = [&](const ElementKernels& k, std::size_t rows, std::size_t cols,
                            double limit) {
        const std::size_t stride = (cols + 2) * item_bytes;
        Comparison found{};
        k.compare(data, stride, data + 5 * item_bytes, stride, rows, cols, 0.25, limit, found);
        return std::tuple(found.squares, found.squared_difference, found.greatest_difference,
                          found.within, k.sum_squares(data, stride, rows, cols));
    };
    // Rows of a whole group and a tail, and one long row, each beside what is 5 elements further
    // on; the long one also up to a limit.
    return answer(kernels, 3, 19, 1e300) == answer(reference, 3, 19, 1e300) &&
           answer(kernels, 1, kElements - 5, 1e300) == answer(reference, 1, kElements - 5, 1e300) &&
           answer(kernels, 1, kElements - 5, 1.0) == answer(reference, 1, kElements - 5, 1.0);
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

}  // namespace

const char* first_wrong_group(const KernelTable& table) noexcept {
    const auto question = fixed_bytes<std::tuple_size_v<Question>>();
    const auto to_hash = fixed_bytes<std::tuple_size_v<HashQuestion>>();
    if (!same_rows(table, to_hash) || !same_panel(table, to_hash)) return "hash";
    if (!same_codec(table.codec, kScalarKernels.codec, question)) return "codec";
    if (!same_gemm(table.gemm, kScalarKernels.gemm, question)) return "gemm";
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
