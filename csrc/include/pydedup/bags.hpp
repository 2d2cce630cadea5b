// SPDX-License-Identifier: Apache-2.0
// Bags of rows of a table: what RowTable adds up.
//
// The rows of a bag are added up by ascending row numbers. Sums are then the same bits whatever
// pages are at hand, however blocks are encoded and in whatever order ids are given, as blocks can
// be walked over in this order with few of them in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

namespace pydedup {

/// Used by one call at a time, others wait.
class Bags {
  public:
    /// Bag b has the rows ids[edges[b]] to ids[edges[b + 1] - 1], each times its weight if there
    /// are weights. Throws Error{invalid_argument} when edges do not ascend from 0 to ids.size(),
    /// or there is not one weight for each id.
    Bags(std::vector<std::int64_t> ids, std::vector<std::int64_t> edges,
         std::optional<std::vector<double>> weights = std::nullopt);

    [[nodiscard]] std::size_t count() const noexcept { return edges_.size() - 1; }
    [[nodiscard]] bool is_weighted() const noexcept { return weights_.has_value(); }
    /// Those of all bags; within a bag in any order.
    [[nodiscard]] std::span<const std::int64_t> ids() const noexcept { return ids_; }

    /// A row of a bag that has weights.
    struct Weighted {
        std::int64_t id;
        double weight;
    };
    /// Memory for sorting, of one thread.
    struct Scratch {
        std::vector<std::int64_t> ids;
        std::vector<Weighted> rows, others;
    };
    struct Bag {
        std::span<const std::int64_t> ids;
        const double* weights;  // one for each, or nullptr
    };
    /// One bag by ascending ids, what belongs to one id as it was given. It is sorted in place when
    /// it is first asked for: on one thread, others may ask for other bags.
    [[nodiscard]] Bag sorted(std::size_t b, Scratch& scratch);

    /// To be held for as long as a call uses the bags.
    [[nodiscard]] std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

  private:
    static void sort(std::span<std::int64_t> ids, double* weights, Scratch& scratch);

    std::vector<std::int64_t> ids_, edges_;
    std::optional<std::vector<double>> weights_;
    std::vector<std::uint8_t> is_sorted_;  // per bag
    std::mutex mutex_;
};

}  // namespace pydedup
