// SPDX-License-Identifier: Apache-2.0
// What a thread works with, scratch above all: made once per thread, not once per task.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/parallel.hpp"

namespace pydedup::detail {

template <class Worker>
class Workers {
  public:
    /// Calls body(i, worker) for each i < count, on up to so many threads. Each has one worker for
    /// all of its tasks, for which it calls begin(worker) first: from an earlier call, or what
    /// make() returns. What one throws, this throws, after no more tasks were begun.
    template <class Make, class Begin, class Body>
    void each(std::size_t count, unsigned threads, const Make& make, const Begin& begin,
              const Body& body) {
        // A thread borrows once: tasks of few rows take a microsecond, and threads that meet at a
        // lock before each of them as long again.
        const auto borrowers = static_cast<unsigned>(std::min<std::size_t>(threads, count));
        keep(borrowers);
        std::atomic<std::size_t> next{0};
        parallel_for(borrowers, 1, borrowers, [&](std::size_t, std::size_t) {
            const auto worker = borrow(make);
            begin(*worker);
            try {
                for (std::size_t i = next++; i < count; i = next++) body(i, *worker);
            } catch (...) {
                next = count;  // the others need not go on
                throw;
            }
        });
    }

  private:
    // A worker, until this ends.
    class Borrowed {
      public:
        Borrowed(Workers& from, std::unique_ptr<Worker> worker) noexcept
            : from_(from), worker_(std::move(worker)) {}
        ~Borrowed() {
            const std::scoped_lock lock(from_.mutex_);
            if (from_.idle_.size() < from_.idle_.capacity()) {
                from_.idle_.push_back(std::move(worker_));
            }
        }
        Borrowed(const Borrowed&) = delete;
        Borrowed& operator=(const Borrowed&) = delete;

        [[nodiscard]] Worker& operator*() const noexcept { return *worker_; }

      private:
        Workers& from_;
        std::unique_ptr<Worker> worker_;
    };

    // Up to so many are kept for who comes next; without it, none.
    void keep(std::size_t threads) {
        const std::scoped_lock lock(mutex_);
        idle_.reserve(threads);
    }

    // An idle worker, or what make() returns.
    template <class Make>
    [[nodiscard]] Borrowed borrow(const Make& make) {
        return Borrowed(*this, idle_or(make));
    }

    template <class Make>
    [[nodiscard]] std::unique_ptr<Worker> idle_or(const Make& make) {
        {
            const std::scoped_lock lock(mutex_);
            if (!idle_.empty()) {
                std::unique_ptr<Worker> worker = std::move(idle_.back());
                idle_.pop_back();
                return worker;
            }
        }
        return std::make_unique<Worker>(make());
    }

    std::mutex mutex_;
    std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace pydedup::detail
