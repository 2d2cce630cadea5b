// SPDX-License-Identifier: Apache-2.0
// Rows of a matrix by number, out of the blocks at hand: gather, and sums or maxima of bags of
// them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "gemm/weights.hpp"
#include "pydedup/error.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup {
namespace {

using detail::AlignedArray;

// Rows per piece of parallel work: a row is a few hundred bytes, a piece should take 10 us or more.
constexpr std::size_t kRowsPerPiece = 256;
// Bytes to copy or add below which one thread is faster than making a second.
constexpr std::size_t kMinBytesPerThread = std::size_t{1} << 20;

// The blocks of a set as plain rows in memory, found by block row in constant time.
class Rows {
  public:
    Rows(const BlockSet& set, unsigned threads) : set_(set), rows_of_(set.blocks.size()) {
        if (set.indices.size() != set.blocks.size()) {
            throw Error(ErrorCode::invalid_argument, "each block needs one index");
        }
        std::int64_t before = -1;
        for (std::size_t i = 0; i < set.blocks.size(); ++i) {
            const std::int64_t index = set.indices[i];
            if (index <= before || static_cast<std::size_t>(index) >= set.grid.count()) {
                throw Error(ErrorCode::invalid_argument,
                            "block indices must ascend within the grid of " +
                                std::to_string(set.grid.count()) + "; got " +
                                std::to_string(index) + " after " + std::to_string(before));
            }
            detail::check_block(set.blocks[i], set.grid, set.dtype,
                                static_cast<std::size_t>(index));
            before = index;
        }
        decode(threads);
        first_of_row_.assign(set.grid.grid_rows() + 1, 0);
        for (const std::int64_t index : set.indices) {
            ++first_of_row_[static_cast<std::size_t>(index) / set.grid.grid_cols() + 1];
        }
        for (std::size_t g = 1; g < first_of_row_.size(); ++g)
            first_of_row_[g] += first_of_row_[g - 1];
    }

    /// Calls use(first byte, bytes, first column, columns) for each block at hand that holds a
    /// piece of row `id`.
    template <class Use>
    void each_piece(std::size_t id, const Use& use) const {
        const std::size_t block_row = id / set_.grid.block_rows;
        for (std::uint32_t i = first_of_row_[block_row]; i < first_of_row_[block_row + 1]; ++i) {
            const BlockRect rect = block_rect(set_.grid, static_cast<std::size_t>(set_.indices[i]));
            const std::size_t row_bytes = set_.blocks[i].row_bytes();
            use(rows_of_[i] + (id - rect.row0) * row_bytes, row_bytes, rect.col0, rect.cols);
        }
    }

  private:
    void decode(unsigned threads) {
        std::vector<std::size_t> encoded;
        std::vector<std::size_t> at;
        std::size_t bytes = 0;
        for (std::size_t i = 0; i < set_.blocks.size(); ++i) {
            rows_of_[i] = set_.blocks[i].data;
            if (detail::is_in_place(set_.blocks[i])) continue;
            encoded.push_back(i);
            at.push_back(bytes);
            bytes += (set_.blocks[i].raw_bytes() + 63) / 64 * 64;
        }
        decoded_ = AlignedArray<std::byte>(bytes);
        if (bytes < kMinBytesPerThread) threads = 1;
        parallel_for(encoded.size(), 4, thread_count(threads),
                     [&](std::size_t begin, std::size_t end) {
                         for (std::size_t e = begin; e < end; ++e) {
                             const BlockView& block = set_.blocks[encoded[e]];
                             std::byte* const to = decoded_.data() + at[e];
                             decode_block(block, to, block.row_bytes());
                             rows_of_[encoded[e]] = to;
                         }
                     });
    }

    const BlockSet& set_;
    std::vector<const std::byte*> rows_of_;
    AlignedArray<std::byte> decoded_;
    std::vector<std::uint32_t>
        first_of_row_;  // index into the set, per block row; one more at the end
};

void check_rows(const BlockSet& set, std::span<const std::int64_t> ids,
                std::span<const std::int64_t> to, std::size_t out_rows) {
    if (ids.size() != to.size()) {
        throw Error(ErrorCode::invalid_argument, "there are " + std::to_string(ids.size()) +
                                                     " ids for " + std::to_string(to.size()) +
                                                     " destinations");
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || static_cast<std::size_t>(ids[i]) >= set.grid.rows) {
            throw Error(ErrorCode::invalid_argument, "id " + std::to_string(ids[i]) +
                                                         " at position " + std::to_string(i) +
                                                         " is outside of the matrix's " +
                                                         std::to_string(set.grid.rows) + " rows");
        }
        if (to[i] < 0 || static_cast<std::size_t>(to[i]) >= out_rows) {
            throw Error(ErrorCode::invalid_argument, "destination " + std::to_string(to[i]) +
                                                         " is outside of the output's " +
                                                         std::to_string(out_rows) + " rows");
        }
    }
}

[[nodiscard]] unsigned threads_for(std::size_t bytes, unsigned requested) noexcept {
    return bytes < 2 * kMinBytesPerThread ? 1 : thread_count(requested);
}

template <class T>
void add_row(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t j = 0; j < count; ++j) to[j] += from[j];
}

template <class T>
void max_row(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t j = 0; j < count; ++j) {
        // Written so that a NaN on either side is kept.
        to[j] = from[j] <= to[j] || std::isnan(to[j]) ? to[j] : from[j];
    }
}

template <class T>
void reduce_bags(const BlockSet& set, const Rows& rows, std::span<const std::int64_t> ids,
                 std::span<const std::int64_t> bags, BagMode mode, T* out, unsigned threads) {
    const auto& kernel = kernels().gemm;
    const bool same = set.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64);
    parallel_for(ids.size(), kRowsPerPiece, threads, [&](std::size_t begin, std::size_t end) {
        // A bag belongs to the piece in which it starts.
        while (begin < end && begin > 0 && bags[begin] == bags[begin - 1]) ++begin;
        if (begin == end) return;
        while (end < ids.size() && bags[end] == bags[end - 1]) ++end;
        detail::Scratch<T> scratch;
        for (std::size_t i = begin; i < end; ++i) {
            T* const to = out + static_cast<std::size_t>(bags[i]) * set.grid.cols;
            rows.each_piece(
                static_cast<std::size_t>(ids[i]),
                [&](const std::byte* from, std::size_t, std::size_t col0, std::size_t cols) {
                    const T* values = reinterpret_cast<const T*>(from);
                    if (!same) {
                        T* const wide = scratch.at_least(cols);
                        detail::widen(from, set.dtype, cols, wide, kernel);
                        values = wide;
                    }
                    if (mode == BagMode::sum) {
                        add_row(values, cols, to + col0);
                    } else {
                        max_row(values, cols, to + col0);
                    }
                });
        }
    });
}

}  // namespace

void take_rows(const BlockSet& set, std::span<const std::int64_t> ids,
               std::span<const std::int64_t> positions, std::byte* out, std::size_t out_rows,
               unsigned threads) {
    check_rows(set, ids, positions, out_rows);
    const Rows rows(set, threads);
    const std::size_t item = item_bytes(set.dtype);
    const std::size_t row_bytes = set.grid.cols * item;
    parallel_for(
        ids.size(), kRowsPerPiece, threads_for(ids.size() * row_bytes, threads),
        [&](std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i) {
                std::byte* const to = out + static_cast<std::size_t>(positions[i]) * row_bytes;
                rows.each_piece(static_cast<std::size_t>(ids[i]),
                                [&](const std::byte* from, std::size_t bytes, std::size_t col0,
                                    std::size_t) { std::memcpy(to + col0 * item, from, bytes); });
            }
        });
}

void bag_rows(const BlockSet& set, std::span<const std::int64_t> ids,
              std::span<const std::int64_t> bags, BagMode mode, std::byte* out,
              std::size_t out_rows, unsigned threads) {
    check_rows(set, ids, bags, out_rows);
    if (!std::is_sorted(bags.begin(), bags.end())) {
        throw Error(ErrorCode::invalid_argument, "bags must ascend");
    }
    const Rows rows(set, threads);
    const unsigned workers =
        threads_for(ids.size() * set.grid.cols * item_bytes(set.dtype), threads);
    if (compute_dtype(set.dtype) == Dtype::f64) {
        reduce_bags(set, rows, ids, bags, mode, reinterpret_cast<double*>(out), workers);
    } else {
        reduce_bags(set, rows, ids, bags, mode, reinterpret_cast<float*>(out), workers);
    }
}

}  // namespace pydedup
