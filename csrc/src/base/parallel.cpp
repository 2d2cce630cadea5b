// SPDX-License-Identifier: Apache-2.0
// The threads behind parallel_for. One pool per process, whose threads sleep until it ends; a
// forked child has none of them.
//
// A job lies on the stack of its caller, and in the queue for as long as it wants more helpers. Its
// fields are read and written under the mutex only; so when its caller has taken it out of the
// queue and sees no helper active, nobody refers to it any more.
#include "base/parallel.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/of_this_process.hpp"

namespace pydedup {

namespace {

thread_local unsigned most_threads = 0;  // of calls of this thread; 0 for no bound

unsigned find_threads() noexcept {
    const char* text = std::getenv("PYDEDUP_THREADS");
    const long wanted = text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    if (wanted > 0) return static_cast<unsigned>(std::min(wanted, 4096L));
    return std::max(std::thread::hardware_concurrency(), 1U);
}

}  // namespace

unsigned limit_threads(unsigned most) noexcept { return std::exchange(most_threads, most); }

// Without a lock, which would be held for ever in a child that is forked meanwhile.
unsigned default_threads() noexcept {
    static std::atomic<unsigned> found{0};
    unsigned threads = found.load(std::memory_order_relaxed);
    if (threads == 0) {
        threads = find_threads();
        found.store(threads, std::memory_order_relaxed);
    }
    return most_threads == 0 ? threads : std::min(threads, most_threads);
}

namespace detail {
namespace {

// How long a thread looks for more work, or its caller for the end of the last piece, before it
// sleeps. Calls from Python follow each other within 50 to 150 us, of which the core itself takes
// up to 50 to look at what it was given; a thread that slept then costs 300 us and more in a
// virtual machine (EPYC, 4096 x 4096 by one row: 1.78 ms with 50 us here, 1.41 ms with 200).
constexpr std::chrono::microseconds kSpin{200};
// More threads are never made, whatever is asked for.
constexpr unsigned kMaxThreads = 256;

void pause_briefly() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Does not yield: beside any other process that computes, however nice, that gives it a whole slice
// (Emerald Rapids, Linux 6, a compiler at nice 10: 4096 x 4096 by one row 2.6 ms, without 1.55).
// Except on the only CPU, where what is waited for cannot come meanwhile (work of 36 us by 8
// threads: 246 us, with it 36).
template <class Condition>
void spin_until(const Condition& condition, const std::atomic<bool>& one_cpu) noexcept {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return;
            pause_briefly();
        }
        if (one_cpu.load(std::memory_order_relaxed)) std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < end);
}

[[nodiscard]] bool may_use_one_cpu() noexcept {
#if defined(__linux__)
    cpu_set_t allowed;
    return ::sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) == 1;
#else
    return std::thread::hardware_concurrency() == 1;
#endif
}

#if defined(__linux__)
// Keeps threads that are about to be woken off the CPU of the thread that wakes them. The kernel
// would often queue them behind it for a millisecond and more, though others are idle: in a virtual
// machine it takes a halted CPU for one that the host has taken away. Like new threads, they are
// bound to what the thread that wakes them may use.
class Spread {
  public:
    void apart_from_caller(const std::vector<pthread_t>& threads) noexcept {
        cpu_set_t allowed;
        const int here = ::sched_getcpu();
        if (here < 0 || ::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        if (CPU_COUNT(&allowed) > 1) CPU_CLR(here, &allowed);
        if (done_ == threads.size() && CPU_EQUAL(&allowed, &last_)) return;
        for (const pthread_t thread : threads) {
            static_cast<void>(pthread_setaffinity_np(thread, sizeof allowed, &allowed));
        }
        done_ = threads.size();
        last_ = allowed;
    }

  private:
    std::size_t done_ = 0;  // threads that are bound to last_
    cpu_set_t last_{};
};
#else
struct Spread {
    void apart_from_caller(const std::vector<pthread_t>&) noexcept {}
};
#endif

struct Job {
    void (*run)(void*) noexcept;
    void* context;
    unsigned wanted;     // helpers that it could still use
    unsigned active{0};  // helpers at work
};

class Pool {
  public:
    [[nodiscard]] bool is_of_this_process() const noexcept { return process_ == ::getpid(); }

    void run(unsigned helpers, void (*body)(void*) noexcept, void* context) noexcept {
        Job job{body, context, helpers};
        const bool queued = enqueue(job, helpers);
        body(context);
        if (queued) finish(job);
    }

  private:
    bool enqueue(Job& job, unsigned helpers) noexcept {
        unsigned sleeping = 0;
        try {
            const std::lock_guard lock(mutex_);
            const std::size_t there = threads_.size();
            make_threads(std::min(helpers, kMaxThreads));
            if (threads_.empty()) return false;
            queue_.push_back(&job);
            sleeping = sleeping_;
            if (sleeping != 0 || threads_.size() != there) one_cpu_ = may_use_one_cpu();
            if (sleeping != 0) spread_.apart_from_caller(threads_);
        } catch (...) {  // no memory for the queue: then the caller works alone
            return false;
        }
        arrivals_.fetch_add(1, std::memory_order_release);
        if (sleeping == 0) return true;
        if (helpers == 1) {
            work_.notify_one();
        } else {
            work_.notify_all();
        }
        return true;
    }

    void finish(Job& job) noexcept {
        std::unique_lock lock(mutex_);
        std::erase(queue_, &job);
        while (job.active != 0) {
            const std::uint64_t seen = ended_.load(std::memory_order_relaxed);
            lock.unlock();
            spin_until([&] { return ended_.load(std::memory_order_acquire) != seen; }, one_cpu_);
            lock.lock();
            if (job.active != 0 && ended_.load(std::memory_order_relaxed) == seen) {
                done_.wait(lock);
            }
        }
    }

    // As many as asked for, or as the system grants. Signals are for the threads of the program,
    // but for those of a thread's own faults: blocked, they end the process before a handler has
    // told of it (Python's faulthandler, a sanitizer).
    void make_threads(unsigned count) {
        if (threads_.size() >= count) return;
        threads_.reserve(count);
        sigset_t all;
        sigset_t before;
        sigfillset(&all);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (threads_.size() < count && make_thread()) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    bool make_thread() {
        try {
            std::thread thread([this] { work(); });
            threads_.push_back(thread.native_handle());
            thread.detach();
            return true;
        } catch (const std::exception&) {  // no more threads, or no memory
            return false;
        }
    }

    [[noreturn]] void work() noexcept {
        std::unique_lock lock(mutex_);
        for (;;) {
            if (!queue_.empty()) {
                help(*queue_.front(), lock);
                continue;
            }
            const std::uint64_t seen = arrivals_.load(std::memory_order_relaxed);
            lock.unlock();
            spin_until([&] { return arrivals_.load(std::memory_order_acquire) != seen; }, one_cpu_);
            lock.lock();
            ++sleeping_;
            work_.wait(lock, [&] { return !queue_.empty(); });
            --sleeping_;
        }
    }

    void help(Job& job, std::unique_lock<std::mutex>& lock) noexcept {
        if (--job.wanted == 0) queue_.pop_front();
        ++job.active;
        lock.unlock();
        job.run(job.context);
        lock.lock();
        --job.active;
        ended_.fetch_add(1, std::memory_order_release);
        done_.notify_all();
    }

    const pid_t process_ = ::getpid();
    std::mutex mutex_;
    std::condition_variable work_;  // the queue is not empty
    std::condition_variable done_;  // a helper has ended
    std::deque<Job*> queue_;
    std::vector<pthread_t> threads_;
    Spread spread_;
    unsigned sleeping_ = 0;
    std::atomic<bool> one_cpu_{false};  // whether the last caller who looked may use no more
    // Counters to look at without the mutex: jobs that came, helpers that ended.
    std::atomic<std::uint64_t> arrivals_{0};
    std::atomic<std::uint64_t> ended_{0};
};

}  // namespace

void run_with_helpers(unsigned helpers, void (*run)(void*) noexcept, void* context) noexcept {
    Pool* const threads = helpers == 0 ? nullptr : of_this_process<Pool>();
    if (threads == nullptr) {
        run(context);
    } else {
        threads->run(helpers, run, context);
    }
}

}  // namespace detail
}  // namespace pydedup
