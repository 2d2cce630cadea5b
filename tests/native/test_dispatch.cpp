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
#include "kernels.hpp"
#include "pydedup/cpu.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

bool says(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

void wrong_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
                std::size_t stride, std::uint64_t seed, std::uint64_t* out) noexcept {
    kScalarKernels.hash.hash_rows(data, rows, row_bytes, stride, seed, out);
    if (row_bytes == 200) out[1] ^= 1;
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
    // Emulated: QEMU has locks of its own, which a child that is forked meanwhile may wait for.
    if (test_percent() < 100) return;
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
    CHECK(!has.slow_f32_in_tiles || has.slow_bf16_pairs);
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
