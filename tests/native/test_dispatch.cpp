// SPDX-License-Identifier: Apache-2.0
// How a kernel is chosen: demands and their three refusals, kernels that give wrong answers, forks
// in the middle of it, and what the CPU and the operating system say.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "check.hpp"
#include "dispatch/cpu_features.hpp"
#include "dispatch/known_answers.hpp"
#include "kernels.hpp"
#include "pydedup/cpu.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

bool says(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

// A wrong answer of each function, given right after the reference's.
void wrong_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (row_bytes == 200) out[1] ^= 1;
}
// Right up to a group of stripes, after which the state is scrambled.
void wrong_long_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                     std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (rows * row_bytes >= 1024) out[0] ^= 1;
}
void wrong_long_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                      std::size_t row_bytes, std::size_t stride, std::uint64_t seed,
                      std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_panel(data, blocks, rows, row_bytes, stride, seed, out);
    if (rows > 8) out[0] ^= 1;
}
void wrong_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                 std::size_t row_bytes, std::size_t stride, std::uint64_t seed,
                 std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_panel(data, blocks, rows, row_bytes, stride, seed, out);
    out[2 * blocks - 1] ^= std::uint64_t{1} << 63;
}
void wrong_split(const std::uint8_t* elements, std::size_t stride, std::size_t rows,
                 std::size_t cols, std::size_t item, bool rotate, std::uint8_t* planes) noexcept {
    kScalarKernels.codec.split_planes(elements, stride, rows, cols, item, rotate, planes);
    // One long row, as vector kernels need for a step.
    if (item == 8 && stride == cols * item) planes[rows * cols * item - 1] ^= 1;
}
void wrong_merge(const std::uint8_t* const* planes, std::size_t rows, std::size_t cols,
                 std::size_t item, bool, std::uint8_t* elements, std::size_t stride) noexcept {
    kScalarKernels.codec.merge_planes(planes, rows, cols, item, false, elements, stride);
}
void wrong_decode(const HuffmanStreams& streams, std::size_t count, std::uint8_t* out,
                  std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.huffman_decode(streams, count, out, consumed);
    ++consumed[3];
}
template <class T>
void wrong_dot(const T* x, std::size_t ldx, std::size_t m, const T* w, std::size_t rows,
               std::size_t cols, std::size_t ldw, T* y, std::size_t ldy) noexcept {
    const auto& reference = [] {
        if constexpr (sizeof(T) == 4) {
            return kScalarKernels.gemm.f32;
        } else {
            return kScalarKernels.gemm.f64;
        }
    }();
    reference.dot_nt(x, ldx, m, w, rows, cols - 1, ldw, y, ldy);
}
void wrong_tile(const float* x, const float* w, std::size_t rows, std::size_t cols, std::size_t ldw,
                const float* next, float* acc) noexcept {
    kScalarKernels.gemm.f32.tiles[0].tile_nt(x, w, rows - 1, cols, ldw, next, acc);
}
void wrong_half(const std::uint16_t* src, std::size_t count, float* dst) noexcept {
    kScalarKernels.gemm.f16_to_f32(src, count, dst);
    dst[count - 1] = -dst[count - 1];
}
void wrong_half_dot(const float* x, std::size_t ldx, std::size_t m, const std::uint16_t* w,
                    std::size_t rows, std::size_t cols, std::size_t ldw, float* y,
                    std::size_t ldy) noexcept {
    kScalarKernels.gemm.dot_nt_bf16(x, ldx, m, w, rows, cols - 1, ldw, y, ldy);
}

void wrong_subtract(const std::uint8_t* y, const std::uint8_t* x, std::size_t count,
                    DeltaLayout layout, void* z) noexcept {
    layout.ordered = false;
    kScalarKernels.codec.delta.subtract(y, x, count, layout, z);
}
void wrong_dequantise(const void* x, const std::uint32_t* z, std::size_t count, bool wide,
                      double step, void* values) noexcept {
    kScalarKernels.codec.delta.dequantise(x, z, count, wide, step * 2, values);
}
std::uint64_t wrong_classify(const void* z, std::size_t count, bool wide,
                             std::uint8_t* classes) noexcept {
    const std::uint64_t all = kScalarKernels.codec.delta.classify(z, count, wide, classes);
    if (wide) ++classes[count - 1];
    return all;
}
void wrong_exponents(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint32_t reference, std::uint8_t* features) noexcept {
    kScalarKernels.codec.delta.exponents(x, count, layout, reference, features);
    if (layout.item_bytes == 8) ++features[count - 1];
}
void wrong_mantissas(const std::uint8_t* x, std::size_t count, DeltaLayout layout,
                     std::uint8_t* features) noexcept {
    kScalarKernels.codec.delta.mantissas(x, count, layout, features);
    ++features[count - 1];
}
void wrong_contexts(const std::uint8_t* features, std::size_t count, const std::uint8_t* first,
                    unsigned n, std::uint8_t base, std::uint8_t* contexts) noexcept {
    kScalarKernels.codec.delta.map_features(features, count, first, n - 1, base, contexts);
}
std::uint8_t* wrong_write_symbols(const std::uint8_t* symbols, const std::uint8_t* contexts,
                                  std::size_t count, DeltaCodes codes, std::uint8_t* to) noexcept {
    std::uint8_t* const end =
        kScalarKernels.codec.delta.write_symbols(symbols, contexts, count, codes, to);
    end[-1] ^= 0x80;
    return end;
}
std::uint8_t* wrong_write_raw(const void* z, const std::uint8_t* symbols, std::size_t count,
                              bool wide, const std::uint8_t* widths, std::uint8_t* to) noexcept {
    std::uint8_t* const end =
        kScalarKernels.codec.delta.write_raw(z, symbols, count, wide, widths, to);
    if (!wide) to[0] ^= 1;
    return end;
}
void wrong_read_symbols(const HuffmanStreams& streams, const std::uint8_t* contexts,
                        std::size_t count, std::uint8_t* symbols,
                        std::uint64_t* consumed) noexcept {
    kScalarKernels.codec.delta.read_symbols(streams, contexts, count, symbols, consumed);
    symbols[count - 1] ^= 1;
}
std::uint64_t wrong_read_raw(const std::uint8_t* raw, std::size_t bytes,
                             const std::uint8_t* symbols, std::size_t count, bool wide,
                             const std::uint64_t* bases, const std::uint8_t* widths,
                             void* z) noexcept {
    const std::uint64_t bits =
        kScalarKernels.codec.delta.read_raw(raw, bytes, symbols, count, wide, bases, widths, z);
    return wide ? bits + 1 : bits;
}
template <class T, class W, RowsKernels::Sum<T, W> RowsKernels::* kSum>
void wrong_sum(const W* const* from, std::size_t n, const T* scale, std::size_t count,
               T* sum) noexcept {
    (kScalarKernels.rows.*kSum)(from, n, scale, count - 1, sum);
}
void wrong_pick(const float* from, std::size_t stride, std::size_t count, float* to) noexcept {
    kScalarKernels.rows.pick_f32(from, stride == 2 ? 2 : 1, count, to);
}
void wrong_compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                   std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                   double limit, Comparison& out) noexcept {
    kScalarKernels.similarity.f16.compare(a, a_stride, b, b_stride, rows, cols, eps, limit, out);
    ++out.within;
}
void wrong_long_compare(const std::uint8_t* a, std::size_t a_stride, const std::uint8_t* b,
                        std::size_t b_stride, std::size_t rows, std::size_t cols, double eps,
                        double limit, Comparison& out) noexcept {
    kScalarKernels.similarity.f32.compare(a, a_stride, b, b_stride, rows, cols, eps, limit, out);
    if (rows * cols > 1024) out.squares += 1;
}
// Wrong where several whole strips are taken at once.
void wrong_fold(const std::uint8_t* data, const FoldStrip& strip, std::size_t strips,
                std::size_t pitch, const std::uint8_t* ahead, const std::uint32_t* signs,
                const std::uint16_t* moves, float* buckets, double* squares) noexcept {
    kScalarKernels.similarity.f64.fold(data, strip, strips, pitch, ahead, signs, moves, buckets,
                                       squares);
    if (strip.full && strips >= 4) squares[0] += 1;
}
void wrong_mix(float* buckets, const std::uint32_t* signs, std::size_t outputs,
               float* out) noexcept {
    kScalarKernels.similarity.mix(buckets, signs, outputs, out);
    out[outputs - 1] = -out[outputs - 1];
}
std::uint64_t wrong_distance(const std::int16_t* a, const std::int16_t* b,
                             std::size_t count) noexcept {
    return kScalarKernels.similarity.sketch_distance(a, b, count - 32);
}
std::size_t wrong_count(const std::uint64_t* keys, std::size_t count,
                        std::uint64_t pivot) noexcept {
    return kScalarKernels.similarity.select_u64.count_below(keys, count, pivot) + 1;
}
void wrong_keys(const std::uint8_t* data, std::size_t count, std::uint32_t* keys) noexcept {
    kScalarKernels.similarity.keys_bf16(data, count, keys);
    keys[count - 1] |= 0x80000000U;
}

template <class Change>
std::string group_of(Change change) {
    KernelTable table = kScalarKernels;
    change(table);
    const char* group = first_wrong_group(table);
    return group == nullptr ? "none" : group;
}

}  // namespace

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // their locks, not ours
namespace {

// Ends with 0 when a child of this process, forked while another thread makes the first call, makes
// it too.
int call_in_a_child(void (*call)()) {
    std::atomic<bool> begun{false};
    std::thread first([&] {
        begun = true;
        call();
    });
    while (!begun) {
    }
    const pid_t child = fork();
    if (child == 0) {
        call();
        _exit(0);
    }
    int status = -1;
    const bool ended = waitpid(child, &status, 0) == child;
    first.join();
    return ended && WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
}

}  // namespace

// Before all others here, since it wants processes that have chosen nothing. Where the choice was
// made under a lock, one child in four waited for it for ever.
TEST(a_process_that_is_forked_during_the_first_call_does_not_wait_for_it) {
    void (*const calls[])() = {[] { static_cast<void>(kernels()); },
                               [] { static_cast<void>(default_threads()); }};
    for (auto* call : calls) {
        for (std::size_t round = 0; round < scaled(100); ++round) {
            const pid_t child = fork();
            if (child == 0) _exit(call_in_a_child(call));
            int status = -1;
            CHECK(waitpid(child, &status, 0) == child);
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        }
    }
}
#endif

TEST(every_kernel_that_runs_here_gives_the_known_answers) {
    CHECK(!runnable_kernels().empty());
    for (const KernelTable* table : runnable_kernels()) {
        const char* group = first_wrong_group(*table);
        if (group != nullptr) fail(table->name, 0, std::string("wrong group: ") + group);
    }
}

TEST(a_wrong_answer_of_any_function_is_found) {
    CHECK(group_of([](KernelTable&) {}) == "none");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_rows = wrong_rows; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_panel = wrong_panel; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_rows = wrong_long_rows; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.hash.hash_panel = wrong_long_panel; }) == "hash");
    CHECK(group_of([](KernelTable& t) { t.codec.split_planes = wrong_split; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.codec.merge_planes = wrong_merge; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.codec.huffman_decode = wrong_decode; }) == "codec");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.dot_nt = wrong_dot<float>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.dot_nt = wrong_dot<double>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.block_nn = wrong_dot<float>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f64.block_nn = wrong_dot<double>; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f32.tiles[0].tile_nt = wrong_tile; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.f16_to_f32 = wrong_half; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.bf16_to_f32 = wrong_half; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.dot_nt_bf16 = wrong_half_dot; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.gemm.dot_nt_f16 = wrong_half_dot; }) == "gemm");
    CHECK(group_of([](KernelTable& t) { t.codec.delta.subtract = wrong_subtract; }) == "codec");
    const auto delta_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.codec.delta); });
    };
    CHECK(delta_of([](auto& d) { d.dequantise = wrong_dequantise; }) == "codec");
    CHECK(delta_of([](auto& d) { d.classify = wrong_classify; }) == "codec");
    CHECK(delta_of([](auto& d) { d.exponents = wrong_exponents; }) == "codec");
    CHECK(delta_of([](auto& d) { d.mantissas = wrong_mantissas; }) == "codec");
    CHECK(delta_of([](auto& d) { d.map_features = wrong_contexts; }) == "codec");
    CHECK(delta_of([](auto& d) { d.write_symbols = wrong_write_symbols; }) == "codec");
    CHECK(delta_of([](auto& d) { d.write_raw = wrong_write_raw; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_symbols = wrong_read_symbols; }) == "codec");
    CHECK(delta_of([](auto& d) { d.read_raw = wrong_read_raw; }) == "codec");
    const auto rows_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.rows); });
    };
    using R = RowsKernels;
    using Half = std::uint16_t;
    CHECK(rows_of([](R& r) { r.sum_f32 = wrong_sum<float, float, &R::sum_f32>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_f64 = wrong_sum<double, double, &R::sum_f64>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_bf16 = wrong_sum<float, Half, &R::sum_bf16>; }) == "rows");
    CHECK(rows_of([](R& r) { r.sum_f16 = wrong_sum<float, Half, &R::sum_f16>; }) == "rows");
    CHECK(rows_of([](R& r) { r.pick_f32 = wrong_pick; }) == "rows");
    const auto similarity_of = [](auto change) {
        return group_of([&](KernelTable& t) { change(t.similarity); });
    };
    CHECK(similarity_of([](auto& s) { s.f16.compare = wrong_compare; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.f32.compare = wrong_long_compare; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.f64.fold = wrong_fold; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.mix = wrong_mix; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.sketch_distance = wrong_distance; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.select_u64.count_below = wrong_count; }) == "similarity");
    CHECK(similarity_of([](auto& s) { s.keys_bf16 = wrong_keys; }) == "similarity");
}

TEST(a_demand_is_met_or_refused_with_its_reason) {
    KernelTable liar = kScalarKernels;
    liar.hash.hash_rows = wrong_rows;
    const KernelTable& good = kScalarKernels;
    const KernelCandidate machine[] = {{"plain", &good, true, "any CPU"},
                                       {"other", nullptr, true, "another CPU"},
                                       {"large", &good, false, "a larger CPU"},
                                       {"wrong", &liar, true, "luck"}};
    const auto error_of = [&](const char* demand) {
        const KernelChoice choice = choose_kernel(machine, demand);
        CHECK(choice.table == nullptr && says(choice.error, "PYDEDUP_KERNEL"));
        return choice.error;
    };
    CHECK(says(error_of("Plain"), "'Plain' is unknown; here run: plain, wrong"));
    CHECK(says(error_of("other"), "'other' is not built into this pydedup"));
    CHECK(says(error_of("large"), "'large' cannot run on this machine: it needs a larger CPU"));
    CHECK(says(error_of("wrong"), "'wrong' gives wrong answers (hash)"));

    const KernelChoice demanded = choose_kernel(machine, "plain");
    CHECK(demanded.table == &good && demanded.error.empty());
    CHECK(demanded.reason == "demanded by PYDEDUP_KERNEL");

    for (const char* no_demand : {static_cast<const char*>(nullptr), ""}) {
        const KernelChoice found = choose_kernel(machine, no_demand);
        CHECK(found.table == &good && found.error.empty());
        CHECK(says(found.reason, "fastest measured"));
        CHECK(says(found.reason, "wrong gave wrong answers (hash)"));
        CHECK(!says(found.reason, "large") && !says(found.reason, "other"));
    }

    const KernelChoice none = choose_kernel({machine + 3, 1}, nullptr);
    CHECK(none.table == nullptr && says(none.error, "no kernel gives right answers"));
}

TEST(the_last_that_runs_is_taken_by_default) {
    const KernelTable first = kScalarKernels;
    const KernelTable second = kScalarKernels;
    const KernelCandidate machine[] = {{"first", &first, true, ""}, {"second", &second, true, ""}};
    CHECK(choose_kernel(machine, nullptr).table == &second);
    CHECK(choose_kernel(machine, "first").table == &first);

    // What is known to be slower on this CPU waits for a demand.
    const KernelCandidate other[] = {{"first", &first, true, ""},
                                     {"second", &second, true, "", "this CPU is odd"}};
    const KernelChoice found = choose_kernel(other, nullptr);
    CHECK(found.table == &first && says(found.reason, "second: this CPU is odd"));
    CHECK(choose_kernel(other, "second").table == &second);
}

TEST(infos_tell_what_candidates_are) {
    const auto infos = kernel_infos();
    CHECK(infos.size() == kernel_candidates().size() && infos.front().name == "scalar");
    for (std::size_t i = 0; i < infos.size(); ++i) {
        const KernelCandidate& c = kernel_candidates()[i];
        CHECK(infos[i].name == c.name && infos[i].built == (c.table != nullptr));
        CHECK(infos[i].runnable == c.runnable && says(infos[i].note, c.needs));
        CHECK(says(infos[i].note, "not built") == (c.table == nullptr));
        if (c.table != nullptr) CHECK(std::strcmp(c.table->name, c.name) == 0);
        if (c.table != nullptr && c.runnable) {
            CHECK(&kernels_named(c.name) == c.table);
        } else {
            CHECK_THROWS(ErrorCode::kernel_unavailable, static_cast<void>(kernels_named(c.name)));
        }
    }
    CHECK_THROWS(ErrorCode::kernel_unavailable, static_cast<void>(kernels_named("avx1024")));
}

TEST(features_need_the_cpu_and_the_operating_system) {
    const CpuFeatures has = cpu_features();
#if defined(__x86_64__)
    CHECK(!has.neon);
    CHECK(!has.avx512 || has.avx2);
    CHECK(!has.avx512_in_halves || has.avx512);
    CHECK(!has.amx || has.avx512);
    CHECK(!has.slow_bit_deposit || !has.avx512);
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    CHECK(__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0);
    constexpr unsigned kOsxsave = 1U << 27;
    std::uint32_t saved = 0;  // XCR0: bits 1, 2 for YMM; 5, 6, 7 for ZMM and masks; 17, 18 for AMX
    if ((ecx & kOsxsave) != 0) {
        std::uint32_t high = 0;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    }
    if ((saved & 0x06U) != 0x06U) CHECK(!has.avx2);
    if ((saved & 0xE6U) != 0xE6U) CHECK(!has.avx512);
    if ((saved & 0x60000U) != 0x60000U) CHECK(!has.amx);
    unsigned leaf7 = 0;
    CHECK(__get_cpuid_count(7, 0, &eax, &leaf7, &ecx, &edx) != 0);
    if ((leaf7 & bit_AVX2) == 0) CHECK(!has.avx2);
    if ((leaf7 & bit_AVX512F) == 0) CHECK(!has.avx512);
#elif defined(__aarch64__)
    CHECK(has.neon && !has.avx2 && !has.avx512);
#endif
}

PYDEDUP_TEST_MAIN
