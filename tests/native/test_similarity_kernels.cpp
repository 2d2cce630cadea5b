// SPDX-License-Identifier: Apache-2.0
// The similarity kernels: every one gives the bits of the scalar one, and none reads behind the
// elements it was given (buffers end where the last row ends: ASan sees one too far).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"
#include "kernels.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

enum class Type { f32, f64, f16, bf16 };
constexpr Type kTypes[] = {Type::f32, Type::f64, Type::f16, Type::bf16};

std::size_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

const ElementKernels& kernels_of(const KernelTable& table, Type type) {
    const SimilarityKernels& all = table.similarity;
    return type == Type::f64   ? all.f64
           : type == Type::f32 ? all.f32
           : type == Type::f16 ? all.f16
                               : all.bf16;
}

// Elements of about unit size; with `wild`, any bits at all.
std::vector<std::uint8_t> elements(Type type, std::size_t count, bool wild,
                                   std::mt19937_64& random) {
    std::vector<std::uint8_t> out = random_bytes(count * bytes_of(type), random);
    if (wild) return out;
    std::normal_distribution<double> normal(0.0, 1.0);
    for (std::size_t i = 0; i < count; ++i) {
        const double value = normal(random);
        const auto narrow = static_cast<float>(value);
        std::uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        if (type == Type::f64) std::memcpy(&out[8 * i], &value, 8);
        if (type == Type::f32) std::memcpy(&out[4 * i], &narrow, 4);
        if (type == Type::bf16) std::memcpy(&out[2 * i], reinterpret_cast<char*>(&bits) + 2, 2);
        if (type == Type::f16) {  // exponents around 15, any mantissa
            out[2 * i + 1] = static_cast<std::uint8_t>((out[2 * i + 1] & 0x83U) | 0x34U);
        }
    }
    return out;
}

template <class T>
bool same(const T* a, const T* b, std::size_t count) {
    return count == 0 || std::memcmp(a, b, count * sizeof(T)) == 0;
}

template <class T>
bool same_value(T a, T b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b);
}

struct Buckets {
    alignas(64) float at[kFoldBuckets];
};

std::unique_ptr<Buckets> random_buckets(std::mt19937_64& random) {
    auto buckets = std::make_unique<Buckets>();
    std::normal_distribution<float> normal(0.0F, 1.0F);
    for (float& bucket : buckets->at) bucket = normal(random);
    return buckets;
}

std::vector<std::uint32_t> random_words(std::size_t count, std::mt19937_64& random) {
    std::vector<std::uint32_t> words(count);
    for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(random());
    return words;
}

}  // namespace

TEST(every_kernel_folds_like_the_reference) {
    std::mt19937_64 random(1);
    for (int round = 0; round < 600; ++round) {
        const Type type = kTypes[round % 4];
        const std::size_t item = bytes_of(type);
        const bool full = round % 3 == 0;
        const std::size_t cols = full ? 64 : 1 + random() % 200;
        const std::size_t across = (cols + kSimLanes - 1) / kSimLanes;
        const std::size_t rows = full ? 16 : 1 + random() % (kFoldGroups / across);
        const std::size_t stride = (cols + (round % 2 == 0 ? 0 : random() % 40)) * item;
        FoldStrip strip{};
        for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t c = 0; c < cols; c += kSimLanes) {
                strip.offset[strip.groups] = r * stride + c * item;
                strip.lanes[strip.groups++] =
                    static_cast<std::uint8_t>(std::min(cols - c, kSimLanes));
            }
        }
        strip.full = full;
        const std::size_t strips = random() % 11;
        const std::size_t pitch = rows * stride;
        const std::size_t bytes =
            strips == 0 ? 0 : (strips - 1) * pitch + (rows - 1) * stride + cols * item;
        std::vector<std::uint8_t> data = elements(type, bytes / item, round % 5 == 0, random);
        const auto signs = random_words(strips * kSignWords, random);
        std::vector<std::uint16_t> moves(strips);
        for (auto& move : moves) move = static_cast<std::uint16_t>(random() % kFoldBuckets);
        const auto start = random_buckets(random);
        Buckets want = *start;
        double want_squares[kSimLanes] = {1, 2};
        kernels_of(kScalarKernels, type)
            .fold(data.data(), strip, strips, pitch, data.data(), signs.data(), moves.data(),
                  want.at, want_squares);
        for (const KernelTable* table : runnable_kernels()) {
            Buckets got = *start;
            double squares[kSimLanes] = {1, 2};
            kernels_of(*table, type)
                .fold(data.data(), strip, strips, pitch, data.data(), signs.data(), moves.data(),
                      got.at, squares);
            for (std::size_t i = 0; i < kFoldBuckets; ++i) CHECK(same_value(want.at[i], got.at[i]));
            for (std::size_t i = 0; i < kSimLanes; ++i) {
                CHECK(same_value(want_squares[i], squares[i]));
            }
        }
    }
}

TEST(every_kernel_mixes_like_the_reference) {
    std::mt19937_64 random(2);
    for (int round = 0; round < 200; ++round) {
        const std::size_t outputs = std::size_t{64} << (round % 4);
        const auto signs = random_words(2 * kSignWords, random);
        const auto start = random_buckets(random);
        alignas(64) float want[512];
        Buckets buckets = *start;
        kScalarKernels.similarity.mix(buckets.at, signs.data(), outputs, want);
        for (const KernelTable* table : runnable_kernels()) {
            alignas(64) float got[512];
            buckets = *start;
            table->similarity.mix(buckets.at, signs.data(), outputs, got);
            CHECK(same(want, got, outputs));
        }
    }
}

TEST(mixing_keeps_lengths) {
    std::mt19937_64 random(3);
    const auto signs = random_words(2 * kSignWords, random);
    Buckets buckets = *random_buckets(random);
    double before = 0;
    for (const float x : buckets.at) before += double{x} * x;
    alignas(64) float out[512];
    kScalarKernels.similarity.mix(buckets.at, signs.data(), 512, out);
    double after = 0;
    for (const float x : out) after += double{x} * x;
    // Half of the outputs of three transforms, which make squares 64, 1,024 and 1,024 times larger.
    CHECK(std::abs(after / (before * 0x1p25) - 1) < 0.2);
}

TEST(every_kernel_compares_like_the_reference) {
    std::mt19937_64 random(4);
    for (int round = 0; round < 800; ++round) {
        const Type type = kTypes[round % 4];
        const std::size_t item = bytes_of(type);
        const std::size_t rows = round % 7 == 0 ? 1 : 1 + random() % 29;
        const std::size_t cols = 1 + (round % 7 == 0 ? random() % 5000 : random() % 90);
        const std::size_t a_stride = (cols + random() % 3) * item;
        const std::size_t b_stride = (cols + random() % 3) * item;
        const auto size = [&](std::size_t stride) {
            return ((rows - 1) * stride + cols * item) / item;
        };
        const bool wild = round % 9 == 0;
        const auto a = elements(type, size(a_stride), wild, random);
        auto b = elements(type, size(b_stride), wild, random);
        if (round % 2 == 0) std::copy_n(a.data(), std::min(a.size(), b.size()), b.data());
        const double limit = round % 3 == 0 ? std::numeric_limits<double>::infinity()
                                            : static_cast<double>(random() % 3000);
        Comparison want{};
        kernels_of(kScalarKernels, type)
            .compare(a.data(), a_stride, b.data(), b_stride, rows, cols, 0.5, limit, want);
        const double want_squares =
            kernels_of(kScalarKernels, type).sum_squares(a.data(), a_stride, rows, cols);
        for (const KernelTable* table : runnable_kernels()) {
            Comparison got{};
            const ElementKernels& kernel = kernels_of(*table, type);
            kernel.compare(a.data(), a_stride, b.data(), b_stride, rows, cols, 0.5, limit, got);
            CHECK(same_value(want.squares, got.squares));
            CHECK(same_value(want.squared_difference, got.squared_difference));
            CHECK(same_value(want.greatest_difference, got.greatest_difference));
            CHECK(want.within == got.within);
            CHECK(same_value(want_squares, kernel.sum_squares(a.data(), a_stride, rows, cols)));
        }
    }
}

TEST(every_kernel_measures_sketches_like_the_reference) {
    std::mt19937_64 random(5);
    for (int round = 0; round < 300; ++round) {
        const std::size_t count = 32 * (2 + random() % 15);
        std::vector<std::int16_t> a(count);
        std::vector<std::int16_t> b(count);
        for (std::size_t i = 0; i < count; ++i) {
            // The ends of the range at times: sums of squares must not overflow.
            const auto draw = [&] {
                return round % 3 == 0 ? (random() % 2 == 0 ? 16383 : -16383)
                                      : static_cast<int>(random() % 32767) - 16383;
            };
            a[i] = static_cast<std::int16_t>(draw());
            b[i] = static_cast<std::int16_t>(draw());
        }
        std::uint64_t want = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const std::int64_t d = std::int64_t{a[i]} - b[i];
            want += static_cast<std::uint64_t>(d * d);
        }
        for (const KernelTable* table : runnable_kernels()) {
            CHECK(table->similarity.sketch_distance(a.data(), b.data(), count) == want);
        }
    }
}

namespace {

template <class Key>
void check_selection(const SelectKernels<Key>& kernel, const std::vector<Key>& keys, Key low,
                     Key high) {
    const SelectKernels<Key>* reference = nullptr;
    if constexpr (sizeof(Key) == 8) {
        reference = &kScalarKernels.similarity.select_u64;
    } else {
        reference = &kScalarKernels.similarity.select_u32;
    }
    CHECK(kernel.count_below(keys.data(), keys.size(), low) ==
          reference->count_below(keys.data(), keys.size(), low));
    CHECK(kernel.next_above(keys.data(), keys.size(), low) ==
          reference->next_above(keys.data(), keys.size(), low));
    std::vector<Key> want(keys.size());
    std::vector<Key> got(keys.size());
    const Filtered wanted = reference->filter(keys.data(), keys.size(), low, high, want.data());
    const Filtered found = kernel.filter(keys.data(), keys.size(), low, high, got.data());
    CHECK(wanted.below == found.below && wanted.kept == found.kept);
    CHECK(same(want.data(), got.data(), wanted.kept));
    std::vector<Key> in_place = keys;
    static_cast<void>(kernel.filter(in_place.data(), keys.size(), low, high, in_place.data()));
    CHECK(same(want.data(), in_place.data(), wanted.kept));
}

}  // namespace

TEST(every_kernel_selects_like_the_reference) {
    std::mt19937_64 random(6);
    for (int round = 0; round < 600; ++round) {
        const std::size_t count = random() % 300;
        std::vector<std::uint32_t> narrow(count);
        std::vector<std::uint64_t> wide(count);
        for (std::size_t i = 0; i < count; ++i) {
            narrow[i] = static_cast<std::uint32_t>(random() >> (round % 2 == 0 ? 33 : 60));
            wide[i] = random() >> (round % 2 == 0 ? 1 : 60);
        }
        const auto pivot = [&](auto most) {
            return round % 5 == 0
                       ? most
                       : static_cast<decltype(most)>(random() >> (sizeof most == 8 ? 1 : 33));
        };
        for (const KernelTable* table : runnable_kernels()) {
            check_selection(table->similarity.select_u32, narrow, std::uint32_t{7},
                            pivot(~std::uint32_t{0}));
            check_selection(table->similarity.select_u32, narrow, pivot(~std::uint32_t{0}),
                            std::uint32_t{0x7F000000});
            // Bounds that are keys as well: of small ones, each occurs often.
            check_selection(table->similarity.select_u32, narrow, std::uint32_t{2},
                            std::uint32_t{5});
            check_selection(table->similarity.select_u64, wide, std::uint64_t{2}, std::uint64_t{5});
            check_selection(table->similarity.select_u64, wide, std::uint64_t{7},
                            pivot(~std::uint64_t{0}));
            check_selection(table->similarity.select_u64, wide, pivot(~std::uint64_t{0}),
                            std::uint64_t{9});
        }
    }
}

TEST(every_kernel_makes_the_same_keys) {
    std::mt19937_64 random(7);
    for (std::size_t count = 0; count < 100; ++count) {
        const auto data = random_bytes(8 * count, random);
        for (const KernelTable* table : runnable_kernels()) {
            const SimilarityKernels& got = table->similarity;
            const SimilarityKernels& want = kScalarKernels.similarity;
            std::vector<std::uint32_t> a(count);
            std::vector<std::uint32_t> b(count);
            const auto pair = [&](auto kernel, auto reference, bool quiet) {
                kernel(data.data(), count, a.data());
                reference(data.data(), count, b.data());
                for (std::size_t i = 0; i < count; ++i) {
                    // Widening may set the quiet bit of a NaN: it stays one.
                    CHECK(a[i] == b[i] || (quiet && a[i] > 0x7F800000U && b[i] > 0x7F800000U));
                }
            };
            pair(got.keys_f32, want.keys_f32, false);
            pair(got.keys_bf16, want.keys_bf16, false);
            pair(got.keys_f16, want.keys_f16, true);
            std::vector<std::uint64_t> c(count);
            std::vector<std::uint64_t> d(count);
            got.keys_f64(data.data(), count, c.data());
            want.keys_f64(data.data(), count, d.data());
            CHECK(c == d);
        }
    }
}

PYDEDUP_TEST_MAIN
