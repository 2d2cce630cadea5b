// SPDX-License-Identifier: Apache-2.0
// What a thread works with, scratch above all: made once per thread, not once per task.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace pydedup::detail {

template <class Worker>
class Workers {
  public:
    /// A worker, until this ends.
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

    /// Up to so many are kept for who comes next; without it, none.
    void keep(std::size_t threads) {
        const std::scoped_lock lock(mutex_);
        idle_.reserve(threads);
    }

    /// An idle worker, or what make() returns.
    template <class Make>
    [[nodiscard]] Borrowed borrow(const Make& make) {
        return Borrowed(*this, idle_or(make));
    }

  private:
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
