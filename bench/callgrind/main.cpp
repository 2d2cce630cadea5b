// SPDX-License-Identifier: Apache-2.0
// pydedup_callgrind: run by gate.py under `valgrind --tool=callgrind --instr-atstart=no`. Each
// workload's counts are dumped under its name. `--about` prints what counts depend on.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <string>

#include "pydedup/cpu.hpp"
#include "pydedup/error.hpp"
#include "workloads.hpp"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang++";
constexpr int kCompilerMajor = __clang_major__;
#else
constexpr const char* kCompiler = "g++";
constexpr int kCompilerMajor = __GNUC__;
#endif

void count_all() {
    for (const gate::Workload& workload : gate::workloads()) {
        const std::function<void()> call = workload.prepare();
        call();  // what happens once (dispatch, threads, tables) is not counted
        CALLGRIND_START_INSTRUMENTATION;
        CALLGRIND_ZERO_STATS;
        call();
        CALLGRIND_DUMP_STATS_AT(workload.name.c_str());
        CALLGRIND_STOP_INSTRUMENTATION;
    }
}

}  // namespace

int main(int argc, char** argv) {
    try {
        if (argc == 2 && std::string(argv[1]) == "--about") {
            std::printf("{\"compiler\": \"%s %d\", \"kernel\": \"%s\"}\n", kCompiler,
                        kCompilerMajor, pydedup::active_kernel().c_str());
            return 0;
        }
        if (argc != 1) {
            std::fprintf(stderr, "usage: pydedup_callgrind [--about]\n");
            return 2;
        }
        std::fprintf(stderr, "counting kernel %s\n", pydedup::active_kernel().c_str());
        count_all();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "pydedup_callgrind: %s\n", error.what());
        return 1;
    }
}
