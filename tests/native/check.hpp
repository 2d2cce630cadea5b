// SPDX-License-Identifier: Apache-2.0
// A test file is a program: TEST(name) { ... } cases, CHECK(...) inside, PYDEDUP_TEST_MAIN at the
// end. A failed check is reported and the case goes on; the program fails if any did. A program
// without a case fails too, so broken registration is noticed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "pydedup/error.hpp"

namespace pydedup::testing {

struct Case {
    const char* name;
    void (*run)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> list;
    return list;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Registration {
    Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
    ++failures();
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

inline void check(bool holds, const char* file, int line, const char* what) {
    if (!holds) fail(file, line, std::string("does not hold: ") + what);
}

template <class Call>
void check_throws(ErrorCode code, const Call& call, const char* file, int line, const char* what) {
    try {
        call();
    } catch (const Error& error) {
        if (error.code() != code) {
            fail(file, line, std::string("other error from ") + what + ": " + error.what());
        }
        return;
    }
    fail(file, line, std::string("no error from ") + what);
}

/// Share of long tests to run, PYDEDUP_TEST_PERCENT, for emulators, where a second takes a minute.
inline std::size_t test_percent() {
    const char* percent = std::getenv("PYDEDUP_TEST_PERCENT");
    return percent == nullptr ? 100 : std::strtoul(percent, nullptr, 10);
}

/// That share of `count` rounds, at least one.
inline std::size_t scaled(std::size_t count) {
    const std::size_t share = count * test_percent() / 100;
    return share == 0 ? 1 : share;
}

/// Whether to run the next one of many cases: true for that share of the calls, the first included.
inline bool sampled() {
    static std::uint32_t position = 0;
    const std::uint64_t here = position;
    position += 0x9E3779B9U;  // steps of the golden ratio are in tune with no loop around the cases
    return here * 100 >> 32 < test_percent();
}

inline int run_all() {
    for (const Case& test : cases()) {
        const int before = failures();
        try {
            test.run();
        } catch (const std::exception& error) {
            fail(test.name, 0, std::string("unexpected exception: ") + error.what());
        }
        std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
    }
    return failures() == 0 && !cases().empty() ? 0 : 1;
}

}  // namespace pydedup::testing

#define TEST(name)                                                                 \
    static void name();                                                            \
    static const pydedup::testing::Registration registration_##name{#name, &name}; \
    static void name()
#define CHECK(...) pydedup::testing::check((__VA_ARGS__), __FILE__, __LINE__, #__VA_ARGS__)
#define CHECK_THROWS(code, ...) \
    pydedup::testing::check_throws(code, [&] { __VA_ARGS__; }, __FILE__, __LINE__, #__VA_ARGS__)
#define PYDEDUP_TEST_MAIN \
    int main() { return pydedup::testing::run_all(); }
