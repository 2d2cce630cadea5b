// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <cmath>
#include <cstdarg>
#include <cstdio>

namespace bench {
namespace {

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

std::string quoted(const std::string& value) {
    std::string out = "\"";
    for (const char c : value) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            out += text("\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        } else {
            out += c;
        }
    }
    return out + '"';
}

// JSON knows neither NaN nor infinity; what says nothing is 0 here and null there.
std::string number(double value) {
    return std::isfinite(value) && value != 0 ? text("%.9g", value) : "null";
}

std::string limits_json(const Limits& limits) {
    return "{\"read_gb_per_second\": " + number(limits.read_gb_per_second) +
           ", \"peak_gflop_per_second\": " + number(limits.peak_gflop_per_second) + "}";
}

double percent(double value, double limit) { return limit > 0 ? 100.0 * value / limit : 0; }

std::string result_json(const Result& r, const Machine& machine) {
    const Limits& limits = machine.limits(r.threads);
    return "  {\"name\": " + quoted(r.name) + ", \"what\": " + quoted(r.what) +
           text(", \"threads\": %u, \"rounds\": %zu", r.threads, r.rounds) +
           ", \"seconds\": " + number(r.seconds) + text(", \"spread_percent\": %.3g", r.spread) +
           ", \"gb_per_second\": " + number(r.gb_per_second) +
           ", \"percent_of_read\": " + number(percent(r.gb_per_second, limits.read_gb_per_second)) +
           ", \"gflop_per_second\": " + number(r.gflop_per_second) + ", \"percent_of_peak\": " +
           number(percent(r.gflop_per_second, limits.peak_gflop_per_second)) +
           ", \"items_per_second\": " + number(r.items_per_second) + "}";
}

}  // namespace

std::string heading(const Machine& machine, const std::string& kernel) {
    return text(
        "pydedup %s %s, kernel %s, %s, %u cores, %s, %s\n"
        "limits of one thread: %.1f GB/s from memory, %.1f GFLOP/s; of two: %.1f and %.1f\n",
        machine.version.c_str(), machine.commit.c_str(), kernel.c_str(), machine.cpu.c_str(),
        machine.cores, machine.compiler.c_str(), machine.date.c_str(),
        machine.one.read_gb_per_second, machine.one.peak_gflop_per_second,
        machine.two.read_gb_per_second, machine.two.peak_gflop_per_second);
}

std::string line(const Result& r, const Machine& machine) {
    const Limits& limits = machine.limits(r.threads);
    std::string out =
        r.seconds < 1e-3
            ? text("%-26s %10.3f us  +-%4.1f %%", r.name.c_str(), 1e6 * r.seconds, r.spread)
            : text("%-26s %10.3f ms  +-%4.1f %%", r.name.c_str(), 1e3 * r.seconds, r.spread);
    if (r.gb_per_second > 0) {
        out += text("  %7.2f GB/s (%4.0f %%)", r.gb_per_second,
                    percent(r.gb_per_second, limits.read_gb_per_second));
    }
    if (r.gflop_per_second > 0) {
        out += text("  %7.1f GFLOP/s (%4.0f %%)", r.gflop_per_second,
                    percent(r.gflop_per_second, limits.peak_gflop_per_second));
    }
    if (r.items_per_second > 0) out += text("  %8.3g items/s", r.items_per_second);
    return out + "  " + r.what + "\n";
}

std::string json_document(const std::vector<Result>& results, const Machine& machine,
                          const std::string& kernel, double seconds) {
    std::string out =
        "{\"format\": 1, \"pydedup\": " + quoted(machine.version) +
        ", \"commit\": " + quoted(machine.commit) + ", \"kernel\": " + quoted(kernel) +
        text(", \"seconds\": %.6g", seconds) + ",\n \"machine\": {\"cpu\": " + quoted(machine.cpu) +
        text(", \"cores\": %u", machine.cores) + ", \"compiler\": " + quoted(machine.compiler) +
        ", \"date\": " + quoted(machine.date) + ",\n  \"one_thread\": " + limits_json(machine.one) +
        ", \"two_threads\": " + limits_json(machine.two) + "},\n \"results\": [\n";
    for (std::size_t i = 0; i < results.size(); ++i) {
        out += result_json(results[i], machine) + (i + 1 < results.size() ? ",\n" : "\n");
    }
    return out + " ]}\n";
}

}  // namespace bench
