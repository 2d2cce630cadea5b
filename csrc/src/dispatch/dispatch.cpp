// SPDX-License-Identifier: Apache-2.0
// Chooses the kernel table once. A name in PYDEDUP_KERNEL is a demand: what cannot be had is an
// error with its reason, never another kernel, so a test or benchmark measures what it names.
// A table is used only after it gave the reference's answers (known_answers.cpp).
#include "dispatch/dispatch.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "dispatch/cpu_features.hpp"
#include "dispatch/known_answers.hpp"
#include "pydedup/cpu.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

// Short: `pydedup kernels` shows them beside three columns, and a terminal may have 80 characters.
constexpr const char* kNeedsAvx2 = "AVX2, FMA, F16C and BMI2";
constexpr const char* kNeedsAvx512 = "AVX-512 F, BW, DQ and VL";
constexpr const char* kNeedsAvx512InHalves = "AVX-512 F, BW, DQ, VL (in two halves here)";
constexpr const char* kNeedsAvx512Bf16 = "AVX-512 F, BW, DQ, VL and BF16";
constexpr const char* kNeedsAmx = "AVX-512 F, BW, DQ, VL, AMX-BF16, Linux 5.16";
constexpr const char* kSlowPairs = "this CPU multiplies pairs of bf16 more slowly than f32";
constexpr const char* kNeedsNeon = "aarch64";

using Candidates = std::array<KernelCandidate, 6>;

#if defined(PYDEDUP_HAVE_AVX512)
[[maybe_unused]] KernelTable avx512_with(const char* name, const GemmKernels& gemm,
                                         const Bf16GemmKernels& bf16) noexcept {
    KernelTable made = kAvx512Kernels;
    made.name = name;
    made.gemm = gemm;
    made.gemm.bf16 = bf16;
    return made;
}
#endif

Candidates list_candidates() noexcept {
    const CpuFeatures cpu = cpu_features();
    const KernelTable* neon = nullptr;
    const KernelTable* avx512 = nullptr;
    const KernelTable* avx512bf16 = nullptr;
#if defined(PYDEDUP_HAVE_NEON)
    neon = &kNeonKernels;
#endif
#if defined(PYDEDUP_HAVE_AVX512)
    avx512 = &kAvx512Kernels;
#endif
#if defined(PYDEDUP_HAVE_AVX512) && defined(PYDEDUP_HAVE_AVX512BF16)
    static const KernelTable with_pairs =
        avx512_with("avx512bf16", kAvx512Kernels.gemm, kAvx512Bf16GemmKernels);
    avx512bf16 = &with_pairs;
#endif
    return {{
        {"scalar", &kScalarKernels, true, "any CPU"},
        {"neon", neon, cpu.neon, kNeedsNeon},
        {"avx2", avx2_kernels(cpu.slow_bit_deposit), cpu.avx2, kNeedsAvx2},
        {"avx512", avx512, cpu.avx512, cpu.avx512_in_halves ? kNeedsAvx512InHalves : kNeedsAvx512},
        {"avx512bf16", avx512bf16, cpu.avx512bf16, kNeedsAvx512Bf16,
         cpu.slow_bf16_pairs ? kSlowPairs : nullptr},
        {"amx", amx_kernels(cpu.slow_f32_in_tiles), cpu.amx, kNeedsAmx},
    }};
}

// Made when the library is loaded: see choice().
const Candidates kCandidates = list_candidates();

std::string names_that_run(std::span<const KernelCandidate> candidates) {
    std::string list;
    for (const KernelCandidate& c : candidates) {
        if (c.table == nullptr || !c.runnable) continue;
        if (!list.empty()) list += ", ";
        list += c.name;
    }
    return list;
}

// One of three reasons in `error` when there is none.
const KernelTable* find(std::span<const KernelCandidate> candidates, std::string_view name,
                        std::string& error) {
    const std::string quoted = "kernel '" + std::string(name) + "' ";
    const std::string advice = "; here run: " + names_that_run(candidates);
    for (const KernelCandidate& c : candidates) {
        if (name != c.name) continue;
        if (c.table == nullptr) {
            error.append(quoted).append("is not built into this pydedup (it needs ");
            error.append(c.needs).append(")").append(advice);
        } else if (!c.runnable) {
            error.append(quoted).append("cannot run on this machine: it needs ");
            error.append(c.needs).append(advice);
        }
        return error.empty() ? c.table : nullptr;
    }
    error = quoted + "is unknown" + advice;
    return nullptr;
}

// Without a lock, which would be held for ever in a child that is forked meanwhile: threads that
// are the first together all choose, and one choice is kept. Never destroyed: used until exit.
const KernelChoice& choice() {
    static std::atomic<const KernelChoice*> kept{nullptr};
    const KernelChoice* made = kept.load(std::memory_order_acquire);
    if (made == nullptr) {
        auto fresh = std::make_unique<const KernelChoice>(
            choose_kernel(kernel_candidates(), std::getenv("PYDEDUP_KERNEL")));
        if (kept.compare_exchange_strong(made, fresh.get(), std::memory_order_acq_rel)) {
            made = fresh.release();
        }
    }
    return *made;
}

}  // namespace

const KernelTable* avx2_kernels([[maybe_unused]] bool slow_bit_deposit) noexcept {
#if defined(PYDEDUP_HAVE_AVX2)
    static const KernelTable without_pdep = [] {
        KernelTable made = kAvx2Kernels;
        made.codec.delta = kAvx2DeltaWithoutPdep;
        return made;
    }();
    return slow_bit_deposit ? &without_pdep : &kAvx2Kernels;
#else
    return nullptr;
#endif
}

const KernelTable* amx_kernels([[maybe_unused]] bool slow_f32_in_tiles) noexcept {
#if defined(PYDEDUP_HAVE_AVX512) && defined(PYDEDUP_HAVE_AMX)
    static const KernelTable with_tiles =
        avx512_with("amx", kAvx512GemmAskingSoon, kAmxGemmKernels);
    static const KernelTable without_cuts = [] {
        KernelTable made = with_tiles;
        for (auto& tile : made.gemm.bf16.tiles) tile.tile_nt_cut = nullptr;
        return made;
    }();
    return slow_f32_in_tiles ? &without_cuts : &with_tiles;
#else
    return nullptr;
#endif
}

std::span<const KernelCandidate> kernel_candidates() { return kCandidates; }

KernelChoice choose_kernel(std::span<const KernelCandidate> candidates, const char* demand) {
    KernelChoice made;
    if (demand != nullptr && *demand != '\0') {
        made.table = find(candidates, demand, made.error);
        if (made.table != nullptr) {
            if (const char* group = first_wrong_group(*made.table); group != nullptr) {
                made.table = nullptr;
                made.error = "kernel '" + std::string(demand) + "' gives wrong answers (" + group +
                             "): this build or this CPU is faulty";
            }
        }
        if (made.table == nullptr) made.error = "PYDEDUP_KERNEL: " + made.error;
        made.reason = "demanded by PYDEDUP_KERNEL";
        return made;
    }
    std::string passed_over;
    for (std::size_t i = candidates.size(); i-- > 0 && made.table == nullptr;) {
        const KernelCandidate& c = candidates[i];
        if (c.table == nullptr || !c.runnable) continue;  // kernel_infos() says so
        if (c.slower != nullptr) {
            passed_over += std::string("; ") + c.name + ": " + c.slower;
        } else if (const char* group = first_wrong_group(*c.table); group != nullptr) {
            passed_over += std::string("; ") + c.name + " gave wrong answers (" + group + ")";
        } else {
            made.table = c.table;
        }
    }
    made.reason = "the fastest measured kernel that runs here" + passed_over;
    if (made.table == nullptr) made.error = "no kernel gives right answers" + passed_over;
    return made;
}

const KernelTable& kernels() {
    const KernelChoice& made = choice();
    if (made.table == nullptr) throw Error(ErrorCode::kernel_unavailable, made.error);
    return *made.table;
}

const KernelTable& kernels_named(std::string_view name) {
    std::string error;
    const KernelTable* table = find(kernel_candidates(), name, error);
    if (table == nullptr) throw Error(ErrorCode::kernel_unavailable, error);
    return *table;
}

std::string active_kernel() { return kernels().name; }

std::string active_kernel_reason() {
    static_cast<void>(kernels());
    return choice().reason;
}

std::vector<KernelInfo> kernel_infos() {
    std::vector<KernelInfo> infos;
    for (const KernelCandidate& c : kernel_candidates()) {
        const std::string needs = std::string("needs ") + c.needs;
        infos.push_back({c.name, c.table != nullptr, c.runnable,
                         c.table != nullptr ? needs : "not built into this pydedup; " + needs});
    }
    return infos;
}

}  // namespace pydedup
