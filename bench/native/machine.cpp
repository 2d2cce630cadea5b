// SPDX-License-Identifier: Apache-2.0
#include "machine.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "harness.hpp"
#include "source_version.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

// Compiled once for each instruction set; the loader takes the widest that the CPU has.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace bench {
namespace {

using Words = std::uint64_t __attribute__((vector_size(64)));
using Lanes = float __attribute__((vector_size(64)));

// Chains of multiply-adds in 64 bytes each: as many as the registers of AVX2 hold, and as many as
// two pipelines of AVX-512 with four cycles each keep busy. The better one counts.
constexpr int kFewChains = 6;
constexpr int kManyChains = 12;

// Reads `count` words as `kStreams` streams, 1 KiB of each in turn.
template <std::size_t kStreams>
[[gnu::always_inline]] inline std::uint64_t sum_streams(const std::uint64_t* data,
                                                        std::size_t count) {
    constexpr std::size_t kTurn = 128;
    Words sums[4] = {};
    const std::size_t length = count / kStreams / kTurn * kTurn;
    for (std::size_t at = 0; at < length; at += kTurn) {
        for (std::size_t stream = 0; stream < kStreams; ++stream) {
            const std::uint64_t* from = data + stream * length + at;
            for (std::size_t i = 0; i < kTurn; i += 32) {
                for (std::size_t j = 0; j < 4; ++j) {
                    Words words;
                    std::memcpy(&words, from + i + 8 * j, sizeof words);
                    sums[j] += words;
                }
            }
        }
    }
    const Words all = sums[0] + sums[1] + sums[2] + sums[3];
    std::uint64_t total = 0;
    for (int i = 0; i < 8; ++i) total += all[i];
    return total;
}

FOR_EACH_CPU std::uint64_t sum_one_stream(const std::uint64_t* data, std::size_t count) {
    return sum_streams<1>(data, count);
}

FOR_EACH_CPU std::uint64_t sum_four_streams(const std::uint64_t* data, std::size_t count) {
    return sum_streams<4>(data, count);
}

template <int kChains>
[[gnu::always_inline]] inline float chains(std::size_t repeats) {
    // Each begins elsewhere: of equal chains the compiler would make one.
    Lanes sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = Lanes{} + 0.25F * static_cast<float>(i);
    const Lanes factor = Lanes{} + 0.999F;
    const Lanes term = Lanes{} + 0.5F;
    for (std::size_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
        for (Lanes& sum : sums) sum = sum * factor + term;
    }
    float total = 0;
    for (const Lanes& sum : sums) total += sum[0];
    return total;
}

FOR_EACH_CPU float multiply_add_few(std::size_t repeats) { return chains<kFewChains>(repeats); }

FOR_EACH_CPU float multiply_add_many(std::size_t repeats) { return chains<kManyChains>(repeats); }

// Off the CPU of the caller: a new thread often starts behind it, though others are idle.
void move_away([[maybe_unused]] std::thread& thread) {
#if defined(__linux__)
    cpu_set_t allowed;
    const int here = ::sched_getcpu();
    if (here < 0 || ::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    if (CPU_COUNT(&allowed) < 2) return;
    CPU_CLR(here, &allowed);
    static_cast<void>(pthread_setaffinity_np(thread.native_handle(), sizeof allowed, &allowed));
#endif
}

// Calls work(i) for i below `threads`, at once.
template <class Work>
void at_once(unsigned threads, const Work& work) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) {
        others.emplace_back([&work, i] { work(i); });
        move_away(others.back());
    }
    work(0U);
    for (std::thread& other : others) other.join();
}

using Reader = std::uint64_t (*)(const std::uint64_t*, std::size_t);

double read_speed(std::span<const std::uint64_t> buffer, Reader reader, unsigned threads,
                  double seconds) {
    const std::size_t part = buffer.size() / threads;
    return run({"", "", static_cast<double>(buffer.size() * 8), 0, 0,
                [&] {
                    at_once(threads,
                            [&](unsigned i) { keep(reader(buffer.data() + i * part, part)); });
                }},
               seconds)
        .gb_per_second;
}

using Multiplier = float (*)(std::size_t);

double compute_speed(Multiplier multiply, int n_chains, unsigned threads, double seconds) {
    const std::size_t repeats = unless_smoke(1000000, 1000);
    const double flops = 2.0 * 16 * n_chains * static_cast<double>(repeats) * threads;
    return run({"", "", 0, flops, 0,
                [&] { at_once(threads, [&](unsigned) { keep(multiply(repeats)); }); }},
               seconds)
        .gflop_per_second;
}

// The better of two ways to read: which one a machine likes depends on its prefetchers.
Limits measure_limits(std::span<const std::uint64_t> buffer, unsigned threads, double seconds) {
    return {std::max(read_speed(buffer, sum_one_stream, threads, seconds / 2),
                     read_speed(buffer, sum_four_streams, threads, seconds / 2)),
            std::max(compute_speed(multiply_add_few, kFewChains, threads, seconds / 2),
                     compute_speed(multiply_add_many, kManyChains, threads, seconds / 2))};
}

std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        const std::size_t colon = line.find(": ");
        if (line.starts_with("model name") && colon != std::string::npos) {
            return line.substr(colon + 2);
        }
    }
    return "unknown";
}

std::string now() {
    const std::time_t time = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&time, &utc);
    char text[32];
    return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc)};
}

}  // namespace

Machine measure_machine(double seconds) {
    const std::size_t count = unless_smoke(std::size_t{32} << 20, 4096);
    const std::shared_ptr<std::byte> memory = large_memory(count * sizeof(std::uint64_t));
    auto* const words = reinterpret_cast<std::uint64_t*>(memory.get());
    std::fill_n(words, count, 1);
    const std::span<const std::uint64_t> buffer(words, count);
    return {cpu_name(),
            std::thread::hardware_concurrency(),
#if defined(__clang__)
            "clang " __clang_version__,
#else
            "gcc " __VERSION__,
#endif
            PYDEDUP_SOURCE_VERSION,
            PYDEDUP_SOURCE_COMMIT,
            now(),
            measure_limits(buffer, 1, seconds),
            measure_limits(buffer, 2, seconds)};
}

}  // namespace bench
