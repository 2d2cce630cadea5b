// SPDX-License-Identifier: Apache-2.0
// pydedup_bench: the native benchmark harness. kHelp says what it does; workloads are in
// bench_<area>.cpp, timing is in harness.cpp, the machine's limits in machine.cpp.
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "harness.hpp"
#include "machine.hpp"
#include "pydedup/cpu.hpp"
#include "pydedup/error.hpp"
#include "report.hpp"

namespace {

constexpr const char* kHelp =
    R"(usage: pydedup_bench [OPTION...] [NAME-PREFIX...]

Runs the native workloads whose names begin with one of the prefixes; without any, all of them.
Each is run once to warm up, then for the given time. Shown are the median of a round, half of the
distance between the quartiles in percent of it, and what of these the workload has: GB/s it reads,
GFLOP/s it computes (each also in percent of what this machine was just measured to do with the
same number of threads, one or two), items/s.

  --list           print the names and what they are
  --filter TEXT    of those, run the ones with TEXT in their name; may be given several times
  --kernel NAME    the kernel to run with: a demand, as PYDEDUP_KERNEL is (scalar, avx2, ...)
  --seconds S      time for each workload (0.5)
  --json           print one JSON document instead of lines
  --smoke          run each once, on little data where it can; the numbers mean nothing
  --help           print this

Compare two JSON documents with bench/compare.py. Exit status: 0, 1 for a failure, 2 for wrong
arguments.
)";

struct BadArguments : std::runtime_error {
    using runtime_error::runtime_error;
};

struct Options {
    bool help = false;
    bool list = false;
    bool json = false;
    bool smoke = false;
    double seconds = 0.5;
    std::string kernel;
    std::vector<std::string> filters;
    std::vector<std::string> prefixes;
};

double as_seconds(const std::string& value) {
    double seconds = 0;
    const char* end = value.data() + value.size();
    const auto [stop, error] = std::from_chars(value.data(), end, seconds);
    if (error != std::errc{} || stop != end || !(seconds > 0) || seconds > 3600) {
        throw BadArguments("--seconds takes a number above 0, up to 3600, got '" + value + "'");
    }
    return seconds;
}

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        const auto value = [&]() -> const std::string& {
            if (i + 1 == arguments.size()) throw BadArguments(argument + " needs a value");
            return arguments[++i];
        };
        if (argument == "--help") {
            options.help = true;
        } else if (argument == "--list") {
            options.list = true;
        } else if (argument == "--json") {
            options.json = true;
        } else if (argument == "--smoke") {
            options.smoke = true;
        } else if (argument == "--seconds") {
            options.seconds = as_seconds(value());
        } else if (argument == "--kernel") {
            options.kernel = value();
        } else if (argument == "--filter") {
            options.filters.push_back(value());
        } else if (argument.starts_with("-") || argument.empty()) {
            throw BadArguments("unknown option '" + argument + "'");
        } else {
            options.prefixes.push_back(argument);
        }
    }
    return options;
}

std::vector<bench::Entry> all_entries() {
    std::vector<bench::Entry> entries;
    for (const auto& group :
         {bench::hash_entries(), bench::xxh3_entries(), bench::codec_entries(),
          bench::packing_entries(), bench::gemm_entries(), bench::rows_entries(),
          bench::conv_entries(), bench::similarity_entries()}) {
        entries.insert(entries.end(), group.begin(), group.end());
    }
    return entries;
}

// Each prefix and each filter must fit something: a name that was mistyped is no empty run.
std::vector<bench::Entry> chosen(const Options& options) {
    std::vector<bench::Entry> entries = all_entries();
    const auto narrow = [&entries](const std::vector<std::string>& wanted, const char* kind,
                                   auto fits) {
        if (wanted.empty()) return;
        for (const std::string& text : wanted) {
            bool any = false;
            for (const bench::Entry& entry : entries) any = any || fits(entry.name, text);
            if (!any)
                throw BadArguments("no workload " + std::string(kind) + " '" + text +
                                   "'; see --list");
        }
        std::erase_if(entries, [&](const bench::Entry& entry) {
            for (const std::string& text : wanted) {
                if (fits(entry.name, text)) return false;
            }
            return true;
        });
    };
    narrow(options.prefixes, "begins with",
           [](std::string_view name, const std::string& text) { return name.starts_with(text); });
    narrow(options.filters, "that was chosen contains",
           [](std::string_view name, const std::string& text) {
               return name.find(text) != std::string_view::npos;
           });
    return entries;
}

std::string kernel_in_use() {
    try {
        return pydedup::active_kernel();
    } catch (const pydedup::Error& error) {
        throw BadArguments(error.what());
    }
}

int run(const Options& options) {
    if (options.help) {
        std::fputs(kHelp, stdout);
        return 0;
    }
    if (!options.kernel.empty()) setenv("PYDEDUP_KERNEL", options.kernel.c_str(), 1);
    bench::set_smoke(options.smoke);
    const std::vector<bench::Entry> entries = chosen(options);
    if (options.list) {
        bench::set_smoke(true);
        for (const bench::Entry& entry : entries) {
            std::printf("%-26s %s\n", entry.name.c_str(), entry.make().what.c_str());
        }
        return 0;
    }
    const std::string kernel = kernel_in_use();
    const double seconds = options.smoke ? 0 : options.seconds;
    const bench::Machine machine = bench::measure_machine(seconds);
    if (!options.json) std::fputs(bench::heading(machine, kernel).c_str(), stdout);
    std::vector<bench::Result> results;
    for (const bench::Entry& entry : entries) {
        results.push_back(bench::run(entry.make(), seconds));
        std::FILE* out = options.json ? stderr : stdout;  // progress, or the result itself
        std::fputs(bench::line(results.back(), machine).c_str(), out);
        std::fflush(out);
    }
    if (options.json) {
        std::fputs(bench::json_document(results, machine, kernel, seconds).c_str(), stdout);
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(parse({argv + 1, argv + argc}));
    } catch (const BadArguments& error) {
        std::fprintf(stderr, "pydedup_bench: %s\n(--help says what there is)\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "pydedup_bench: %s\n", error.what());
        return 1;
    }
}
