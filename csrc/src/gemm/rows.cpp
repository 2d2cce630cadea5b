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

// Rows per piece of parallel work: a row is a few hundred bytes, a piece should take 10 us or more.
constexpr std::size_t kRowsPerPiece = 256;
// Bytes to copy or add below which one thread is faster than making a second.
constexpr std::size_t kMinBytesPerThread = std::size_t{1} << 20;

// Ids by which the next rows are asked of memory ahead of their use: about 100 ns of work.
constexpr std::size_t kPrefetchAhead = 8;
// Bytes of a row that are asked for; what follows, the hardware fetches by itself.
constexpr std::size_t kPrefetchBytes = 256;

// Bytes that encoded blocks may take while they are decoded; the rest of the set has to wait.
constexpr std::size_t kTileBytes = std::size_t{16} << 20;

// The blocks of a set as plain rows in memory, found by block row in constant time.
class Rows {
  public:
    explicit Rows(const BlockSet& set) : blocks_(set.blocks), block_rows_(set.grid.block_rows) {
        if (set.indices.size() != set.blocks.size()) {
            throw Error(ErrorCode::invalid_argument, "each block needs one index");
        }
        pieces_.reserve(set.blocks.size());
        first_of_row_.assign(set.grid.grid_rows() + 1, 0);
        std::int64_t before = -1;
        for (std::size_t i = 0; i < set.blocks.size(); ++i) {
            const std::int64_t given = set.indices[i];
            if (given <= before || static_cast<std::size_t>(given) >= set.grid.count()) {
                throw Error(ErrorCode::invalid_argument,
                            "block indices must ascend within the grid of " +
                                std::to_string(set.grid.count()) + "; got " +
                                std::to_string(given) + " after " + std::to_string(before));
            }
            before = given;
            const auto index = static_cast<std::size_t>(given);
            detail::check_block(set.blocks[i], set.grid, set.dtype, index);
            const BlockRect rect = block_rect(set.grid, index);
            pieces_.push_back(
                {set.blocks[i].data, set.blocks[i].row_bytes(), rect.row0, rect.col0, rect.cols});
            ++first_of_row_[index / set.grid.grid_cols() + 1];
        }
        for (std::size_t g = 1; g < first_of_row_.size(); ++g) {
            first_of_row_[g] += first_of_row_[g - 1];
        }
    }

    /// Calls body() for one part of the set after the other, the part's blocks being decoded. All
    /// that needs no decoding is one part, and so are encoded blocks of kTileBytes.
    template <class Body>
    void each_part(unsigned threads, const Body& body) {
        for (std::size_t begin = 0; begin < pieces_.size(); begin = part_end_) {
            part_begin_ = begin;
            decode_from(begin, threads);
            body();
        }
    }

    /// Calls use(first byte, bytes, first column, columns) for each block of the part that holds a
    /// piece of row `id`.
    template <class Use>
    void each_piece(std::size_t id, const Use& use) const {
        const std::size_t block_row = id / block_rows_;
        const std::size_t end = std::min(first_of_row_[block_row + 1], part_end_);
        for (std::size_t i = std::max(first_of_row_[block_row], part_begin_); i < end; ++i) {
            const Piece& piece = pieces_[i];
            use(piece.rows + (id - piece.row0) * piece.row_bytes, piece.row_bytes, piece.col0,
                piece.cols);
        }
    }

    void prefetch(std::size_t id) const noexcept {
        each_piece(id, [](const std::byte* from, std::size_t bytes, std::size_t, std::size_t) {
            const std::size_t n = std::min(bytes, kPrefetchBytes);
            for (std::size_t at = 0; at < n; at += 64) __builtin_prefetch(from + at);
        });
    }

  private:
    // What a block holds of the rows from row0 on: columns [col0, col0 + cols).
    struct Piece {
        const std::byte* rows;
        std::size_t row_bytes, row0, col0, cols;
    };

    // Decodes blocks from `begin` on, as many as the tile holds but at least one, and sets the
    // part's end behind them.
    void decode_from(std::size_t begin, unsigned threads) {
        std::vector<std::size_t> encoded;
        std::vector<std::size_t> at;
        std::size_t bytes = 0;
        std::size_t i = begin;
        for (; i < blocks_.size(); ++i) {
            if (detail::is_in_place(blocks_[i])) continue;
            const std::size_t room = (blocks_[i].raw_bytes() + 63) / 64 * 64;
            if (!encoded.empty() && bytes + room > kTileBytes) break;
            encoded.push_back(i);
            at.push_back(bytes);
            bytes += room;
        }
        part_end_ = i;
        std::byte* const tile = tile_.at_least(bytes);
        const unsigned workers = bytes < kMinBytesPerThread ? 1 : thread_count(threads);
        parallel_for(encoded.size(), 4, workers, [&](std::size_t first, std::size_t last) {
            for (std::size_t e = first; e < last; ++e) {
                const BlockView& block = blocks_[encoded[e]];
                decode_block(block, tile + at[e], block.row_bytes());
                pieces_[encoded[e]].rows = tile + at[e];
            }
        });
    }

    const std::span<const BlockView> blocks_;
    const std::size_t block_rows_;
    std::vector<Piece> pieces_;
    std::vector<std::size_t> first_of_row_;  // index into the pieces, per block row; and the end
    std::size_t part_begin_ = 0;
    std::size_t part_end_ = 0;
    detail::Scratch<std::byte> tile_;
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
void max_row(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t j = 0; j < count; ++j) {
        // Written so that a NaN on either side is kept.
        to[j] = from[j] <= to[j] || std::isnan(to[j]) ? to[j] : from[j];
    }
}

template <class T>
void reduce_bags(const BlockSet& set, const Rows& rows, std::span<const std::int64_t> ids,
                 std::span<const std::int64_t> bags, BagMode mode, T* out, unsigned threads) {
    const GemmKernels& kernel = kernels().gemm;
    const GemmKernelsOf<T>& own = detail::of_type<T>(kernel);
    const bool same = set.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64);
    parallel_for(ids.size(), kRowsPerPiece, threads, [&](std::size_t begin, std::size_t end) {
        // A bag belongs to the piece in which it starts.
        while (begin < end && begin > 0 && bags[begin] == bags[begin - 1]) ++begin;
        if (begin == end) return;
        while (end < ids.size() && bags[end] == bags[end - 1]) ++end;
        detail::Scratch<T> scratch;
        for (std::size_t i = begin; i < end; ++i) {
            if (i + kPrefetchAhead < end) {
                rows.prefetch(static_cast<std::size_t>(ids[i + kPrefetchAhead]));
            }
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
                        own.add_to(values, cols, to + col0);
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
    Rows rows(set);
    const std::size_t item = item_bytes(set.dtype);
    const std::size_t row_bytes = set.grid.cols * item;
    const unsigned workers = threads_for(ids.size() * row_bytes, threads);
    const auto copy = [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            if (i + kPrefetchAhead < end) {
                rows.prefetch(static_cast<std::size_t>(ids[i + kPrefetchAhead]));
            }
            std::byte* const to = out + static_cast<std::size_t>(positions[i]) * row_bytes;
            rows.each_piece(static_cast<std::size_t>(ids[i]),
                            [&](const std::byte* from, std::size_t bytes, std::size_t col0,
                                std::size_t) { std::memcpy(to + col0 * item, from, bytes); });
        }
    };
    rows.each_part(threads, [&] { parallel_for(ids.size(), kRowsPerPiece, workers, copy); });
}

void bag_rows(const BlockSet& set, std::span<const std::int64_t> ids,
              std::span<const std::int64_t> bags, BagMode mode, std::byte* out,
              std::size_t out_rows, unsigned threads) {
    check_rows(set, ids, bags, out_rows);
    if (!std::is_sorted(bags.begin(), bags.end())) {
        throw Error(ErrorCode::invalid_argument, "bags must ascend");
    }
    Rows rows(set);
    const unsigned workers =
        threads_for(ids.size() * set.grid.cols * item_bytes(set.dtype), threads);
    rows.each_part(threads, [&] {
        if (compute_dtype(set.dtype) == Dtype::f64) {
            reduce_bags(set, rows, ids, bags, mode, reinterpret_cast<double*>(out), workers);
        } else {
            reduce_bags(set, rows, ids, bags, mode, reinterpret_cast<float*>(out), workers);
        }
    });
}

}  // namespace pydedup
