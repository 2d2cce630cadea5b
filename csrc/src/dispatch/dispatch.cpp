// SPDX-License-Identifier: Apache-2.0
// Chooses the kernel table once. A name in PYDEDUP_KERNEL is a demand: what cannot be had is an
// error with its reason, never another kernel, so a test or benchmark measures what it names.
// A vector table is trusted only after it gave the reference's answer to a fixed question.
#include "dispatch/dispatch.hpp"

#include <array>
#include <cstdlib>
#include <string>

#include "dispatch/cpu_features.hpp"
#include "pydedup/cpu.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

struct Candidate {
    const char* name;
    const KernelTable* table;  // nullptr: not built
    bool runnable;
    const char* needs;
};

// In order of preference, fastest measured last (docs/kernels.md).
std::array<Candidate, 3> candidates() noexcept {
    const CpuFeatures cpu = cpu_features();
    const KernelTable* avx2 = nullptr;
    const KernelTable* avx512 = nullptr;
#if defined(PYDEDUP_HAVE_AVX2)
    avx2 = &kAvx2Kernels;
#endif
#if defined(PYDEDUP_HAVE_AVX512)
    avx512 = &kAvx512Kernels;
#endif
    return {{
        {"scalar", &kScalarKernels, true, "any CPU"},
        {"avx2", avx2, cpu.avx2, "AVX2, FMA, F16C and BMI2"},
        {"avx512", avx512, cpu.avx512, "AVX-512 F, BW, DQ and VL"},
    }};
}

using Question = std::array<std::uint8_t, 700>;

Question fixed_question() noexcept {
    Question question{};
    std::uint32_t state = 1;
    for (std::uint8_t& byte : question) {
        state = state * 1664525U + 1013904223U;
        byte = static_cast<std::uint8_t>(state >> 24);
    }
    return question;
}

bool hashes_like_reference(const KernelTable& table, const Question& question) noexcept {
    for (const std::size_t row_bytes : {std::size_t{700}, std::size_t{200}, std::size_t{128}}) {
        std::uint64_t want[2];
        std::uint64_t got[2];
        const std::size_t rows = question.size() / row_bytes;
        kScalarKernels.hash.hash_rows(question.data(), rows, row_bytes, row_bytes, 7, want);
        table.hash.hash_rows(question.data(), rows, row_bytes, row_bytes, 7, got);
        if (want[0] != got[0] || want[1] != got[1]) return false;
    }
    return true;
}

bool splits_like_reference(const KernelTable& table, const Question& question) noexcept {
    for (const std::size_t item : {std::size_t{2}, std::size_t{4}, std::size_t{8}}) {
        Question want{};
        Question got{};
        const std::size_t cols = question.size() / 7 / item;
        kScalarKernels.codec.split_planes(question.data(), 100, 7, cols, item, true, want.data());
        table.codec.split_planes(question.data(), 100, 7, cols, item, true, got.data());
        if (want != got) return false;
    }
    return true;
}

// What is persisted must not depend on the kernel.
bool answers_like_reference(const KernelTable& table) noexcept {
    const Question question = fixed_question();
    return hashes_like_reference(table, question) && splits_like_reference(table, question);
}

std::string names() {
    std::string list;
    for (const Candidate& c : candidates())
        list += (list.empty() ? "" : ", ") + std::string(c.name);
    return list;
}

struct Choice {
    const KernelTable* table = nullptr;
    std::string reason;
    std::string error;
};

const KernelTable* find(std::string_view name, std::string& error) {
    for (const Candidate& c : candidates()) {
        if (name != c.name) continue;
        if (c.table == nullptr) {
            error = "kernel '" + std::string(name) + "' is not built into this pydedup";
        } else if (!c.runnable) {
            error = "kernel '" + std::string(name) + "' cannot run here: it needs " + c.needs;
        }
        return error.empty() ? c.table : nullptr;
    }
    error = "kernel '" + std::string(name) + "' is unknown; choose one of: " + names();
    return nullptr;
}

Choice choose() {
    Choice choice;
    if (const char* demand = std::getenv("PYDEDUP_KERNEL"); demand != nullptr && *demand != '\0') {
        choice.table = find(demand, choice.error);
        if (choice.table == nullptr) choice.error = "PYDEDUP_KERNEL: " + choice.error;
        choice.reason = "demanded by PYDEDUP_KERNEL";
        return choice;
    }
    for (const Candidate& c : candidates()) {
        if (c.table == nullptr || !c.runnable) continue;
        if (!answers_like_reference(*c.table)) {
            choice.reason += std::string(c.name) + " gave wrong known answers; ";
            continue;
        }
        choice.table = c.table;
    }
    choice.reason += "the fastest measured kernel that this CPU runs";
    return choice;
}

const Choice& choice() {
    static const Choice* made = new Choice(choose());  // never destroyed: used until exit
    return *made;
}

}  // namespace

const KernelTable& kernels() {
    const Choice& made = choice();
    if (made.table == nullptr) throw Error(ErrorCode::kernel_unavailable, made.error);
    return *made.table;
}

const KernelTable& kernels_named(std::string_view name) {
    std::string error;
    const KernelTable* table = find(name, error);
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
    for (const Candidate& c : candidates()) {
        std::string note = std::string("needs ") + c.needs;
        if (c.table == nullptr) note = "not built into this pydedup";
        infos.push_back({c.name, c.table != nullptr, c.runnable, note});
    }
    return infos;
}

}  // namespace pydedup
