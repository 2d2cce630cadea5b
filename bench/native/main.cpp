// SPDX-License-Identifier: Apache-2.0
// pydedup_bench [--list] [--json] [--seconds S] [NAME-PREFIX ...]
//
// Runs the workloads whose names begin with one of the prefixes (all without). GB/s and GFLOP/s are
// also given as a share of what this machine was just measured to read and to compute per thread.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "harness.hpp"
#include "pydedup/cpu.hpp"

namespace {

struct Options {
    bool list = false;
    bool json = false;
    double seconds = 0.5;
    std::vector<std::string> prefixes;
};

Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--list") {
            options.list = true;
        } else if (argument == "--json") {
            options.json = true;
        } else if (argument == "--seconds" && i + 1 < argc) {
            options.seconds = std::atof(argv[++i]);
        } else if (argument.starts_with("-")) {
            std::fprintf(
                stderr, "usage: pydedup_bench [--list] [--json] [--seconds S] [NAME-PREFIX ...]\n");
            std::exit(argument == "--help" ? 0 : 2);
        } else {
            options.prefixes.push_back(argument);
        }
    }
    return options;
}

bool wanted(const Options& options, const std::string& name) {
    if (options.prefixes.empty()) return true;
    for (const std::string& prefix : options.prefixes) {
        if (name.starts_with(prefix)) return true;
    }
    return false;
}

void print(const bench::Result& r, const bench::Machine& machine, bool json) {
    const double of_read = 100.0 * r.gb_per_second / machine.read_gb_per_second;
    const double of_peak = 100.0 * r.gflop_per_second / machine.peak_gflop_per_second;
    if (json) {
        std::printf(
            "{\"name\": \"%s\", \"what\": \"%s\", \"seconds\": %.9g, \"spread_percent\": %.3g, "
            "\"rounds\": %zu, \"gb_per_second\": %.5g, \"gflop_per_second\": %.5g, "
            "\"items_per_second\": %.5g}",
            r.name.c_str(), r.what.c_str(), r.seconds, r.spread, r.rounds, r.gb_per_second,
            r.gflop_per_second, r.items_per_second);
        return;
    }
    std::printf("%-24s %10.3f ms  +-%4.1f %%", r.name.c_str(), 1e3 * r.seconds, r.spread);
    if (r.gb_per_second > 0) std::printf("  %7.2f GB/s (%4.0f %%)", r.gb_per_second, of_read);
    if (r.gflop_per_second > 0)
        std::printf("  %7.1f GFLOP/s (%4.0f %%)", r.gflop_per_second, of_peak);
    if (r.items_per_second > 0) std::printf("  %8.3g items/s", r.items_per_second);
    std::printf("  %s\n", r.what.c_str());
    std::fflush(stdout);
}

int run(const Options& options) {
    std::vector<bench::Entry> entries;
    for (const auto& group : {bench::hash_entries(), bench::codec_entries(),
                              bench::packing_entries(), bench::gemm_entries()}) {
        entries.insert(entries.end(), group.begin(), group.end());
    }
    if (options.list) {
        for (const bench::Entry& entry : entries) std::printf("%s\n", entry.name.c_str());
        return 0;
    }
    const bench::Machine machine = bench::measure_machine(options.seconds);
    if (options.json) {
        std::printf(
            "{\"kernel\": \"%s\", \"machine\": {\"read_gb_per_second\": %.5g, "
            "\"peak_gflop_per_second\": %.5g}, \"results\": [\n",
            pydedup::active_kernel().c_str(), machine.read_gb_per_second,
            machine.peak_gflop_per_second);
    } else {
        std::printf("kernel %s; one thread reads %.1f GB/s from memory and computes %.1f GFLOP/s\n",
                    pydedup::active_kernel().c_str(), machine.read_gb_per_second,
                    machine.peak_gflop_per_second);
    }
    bool first = true;
    for (const bench::Entry& entry : entries) {
        if (!wanted(options, entry.name)) continue;
        const bench::Result result = bench::run(entry.make(), options.seconds);
        if (options.json && !first) std::printf(",\n");
        first = false;
        print(result, machine, options.json);
    }
    if (options.json) std::printf("\n]}\n");
    if (first) std::fprintf(stderr, "no workload begins with that; see --list\n");
    return first ? 2 : 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(parse(argc, argv));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "pydedup_bench: %s\n", error.what());
        return 1;
    }
}
