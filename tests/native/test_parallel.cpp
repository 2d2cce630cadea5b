// SPDX-License-Identifier: Apache-2.0
// parallel_for: every index once, errors, nesting, many callers at once, and children of a fork.
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/parallel.hpp"
#include "check.hpp"

using namespace pydedup;

namespace {

bool covers(std::size_t count, std::size_t grain, unsigned threads) {
    std::vector<std::atomic<int>> seen(count);
    parallel_for(count, grain, threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) ++seen[i];
    });
    for (const auto& times : seen) {
        if (times != 1) return false;
    }
    return true;
}

// Each piece waits until all others have begun: with so many threads that ends, however late they
// are.
bool all_come(unsigned threads) {
    std::atomic<unsigned> begun{0};
    parallel_for(threads, 1, threads, [&](std::size_t, std::size_t) {
        ++begun;
        while (begun < threads) std::this_thread::yield();
    });
    return begun == threads;
}

TEST(every_index_comes_once) {
    for (const std::size_t count : {0, 1, 2, 7, 64, 1000}) {
        for (const std::size_t grain : {1, 3, 64, 5000}) {
            for (const unsigned threads : {1U, 2U, 5U}) CHECK(covers(count, grain, threads));
        }
    }
}

TEST(the_end_of_the_range_does_not_overflow) {
    const auto most = static_cast<std::size_t>(-1);
    std::size_t last = 0;
    parallel_for(most, most - 1, 1, [&](std::size_t, std::size_t end) { last = end; });
    CHECK(last == most);
}

TEST(the_first_error_reaches_the_caller) {
    for (int round = 0; round < 20; ++round) {
        std::atomic<int> ended{0};
        bool caught = false;
        try {
            parallel_for(100, 1, 4, [&](std::size_t begin, std::size_t) {
                if (begin == 10) throw std::runtime_error("ten");
                ++ended;
            });
        } catch (const std::runtime_error& error) {
            caught = std::string(error.what()) == "ten";
        }
        CHECK(caught);
        CHECK(ended < 100);
    }
}

TEST(work_inside_of_work) {
    std::atomic<int> sum{0};
    parallel_for(8, 1, 4, [&](std::size_t, std::size_t) {
        parallel_for(100, 7, 3, [&](std::size_t begin, std::size_t end) {
            sum += static_cast<int>(end - begin);
        });
    });
    CHECK(sum == 800);
}

TEST(many_callers_share_the_threads) {
    std::vector<std::thread> callers;
    std::atomic<int> right{0};
    for (unsigned caller = 0; caller < 6; ++caller) {
        callers.emplace_back([&right, caller] {
            for (int round = 0; round < 200; ++round) right += covers(40, 1, 2 + caller) ? 1 : 0;
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(right == 6 * 200);
}

TEST(helpers_do_come) { CHECK(all_come(2)); }

TEST(signals_are_for_the_program_but_those_of_a_fault) {
    std::atomic<int> begun{0};
    sigset_t blocked;
    sigemptyset(&blocked);
    const auto caller = std::this_thread::get_id();
    parallel_for(2, 1, 2, [&](std::size_t, std::size_t) {
        ++begun;
        while (begun < 2) std::this_thread::yield();
        if (std::this_thread::get_id() == caller) return;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    });
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGCHLD, SIGALRM}) {
        CHECK(sigismember(&blocked, number) == 1);
    }
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
        CHECK(sigismember(&blocked, fault) == 0);
    }
}

TEST(after_a_pause_they_come_again) {
    for (int round = 0; round < 5; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough to fall asleep
        CHECK(all_come(3));
    }
}

#if defined(__linux__)
// A function, so that the compiler does not make of it what is faster where there are no threads.
[[gnu::noinline]] double work(std::size_t begin, std::size_t end) {
    double sum = 0;
    for (std::size_t i = begin; i < end; ++i) sum += 1.0 / static_cast<double>(i + 1);
    return sum;
}

// Seconds of CPU time, of all threads, that short calls from one CPU take.
double seconds_on_one_cpu(unsigned threads) {
    double seconds = 0;
    std::thread([&] {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(sched_getcpu(), &one);
        CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        const std::clock_t started = std::clock();
        std::atomic<double> sum{0};
        for (int call = 0; call < 400; ++call) {
            parallel_for(8, 1, threads, [&](std::size_t begin, std::size_t end) {
                sum = work(begin * 2000, end * 2000);
            });
        }
        seconds = static_cast<double>(std::clock() - started) / CLOCKS_PER_SEC;
    }).join();
    return seconds;
}

TEST(on_the_only_cpu_nobody_waits_in_the_way_of_work) {
    CHECK(seconds_on_one_cpu(8) < 3 * seconds_on_one_cpu(1));
}
#endif

TEST(who_makes_the_threads_goes_on_with_its_signals) {
    sigset_t before;
    sigset_t mine;
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &mine, &before);
    CHECK(covers(14, 1, 14));  // more than there are yet
    pthread_sigmask(SIG_SETMASK, &before, &mine);
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGCHLD, SIGALRM}) {
        CHECK(sigismember(&mine, number) == 0);  // Ctrl-C reaches it
    }
    CHECK(sigismember(&mine, SIGUSR1) == 1);
}

#if !defined(__SANITIZE_THREAD__)  // which allows no threads after a fork
TEST(a_forked_child_has_threads_of_its_own) {
    // AddressSanitizer's memory is locked now and then by a thread that starts, in a child for
    // ever: all that were made must have started.
    CHECK(all_come(14));
    const pid_t child = fork();
    if (child == 0) _exit(all_come(2) && covers(100, 1, 3) ? 0 : 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(covers(100, 1, 3));
}
#endif

}  // namespace

PYDEDUP_TEST_MAIN
