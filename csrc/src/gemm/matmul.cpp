// SPDX-License-Identifier: Apache-2.0
// The frame around the micro-kernels: which thread computes what, on which block, in which order.
//
// A task is a range of columns of y (a panel of W: one row of blocks, or a few columns of blocks
// when transposed) by a chunk of rows of x. Tasks share nothing that they write, and each walks its
// blocks in order, so neither the threads nor the cuts between calls of feed() show in the result.
// A panel that is cut by the end of a call keeps its sums, as they are.
#include "pydedup/gemm.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "base/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "dispatch/tile_registers.hpp"
#include "gemm/activation.hpp"
#include "gemm/matmul_impl.hpp"
#include "gemm/packed_x.hpp"
#include "gemm/transpose.hpp"
#include "gemm/weights.hpp"

namespace pydedup {
namespace {

using detail::AlignedArray;
using detail::PackedX;
using detail::Scratch;
using detail::WeightReader;

// Multiply-adds below which a second thread costs more than it brings (25 us to wake one; measured
// on an EPYC with 2 cores).
constexpr std::size_t kMinWorkPerThread = std::size_t{1} << 19;
// Rows of x in one task. At most: their sums for a panel of 64 rows are 128 KiB of f32, which stays
// in the second-level cache beside the block. At least: fewer would read W more often for nothing.
constexpr std::size_t kMaxTaskRows = 512;
constexpr std::size_t kMinTaskRows = 32;
// Bytes of y that a task of a transposed product adds to.
constexpr std::size_t kMaxSumBytes = std::size_t{256} << 10;
// Bytes of x that one pass of a tile reads: half of a 32 KiB first-level cache.
constexpr std::size_t kPassBytes = std::size_t{16} << 10;
// Rows of x from which on cutting it gains (2 rows: 1.9 ms instead of 1.4; 8: 1.7 instead of 1.9).
constexpr std::size_t kMinCutRows = 8;
// Bytes of blocks that a tile is multiplied with at once: half of a 48 KiB first-level cache, which
// every CPU has whose kernels do so (AMX).
constexpr std::size_t kTogetherBytes = std::size_t{24} << 10;
// Largest block to ask for while the one before is computed with: it has to stay in the
// second-level cache until then.
constexpr std::size_t kMaxAheadBytes = std::size_t{256} << 10;
// Pieces per thread that a call should have, so that one late thread does not hold up the rest.
constexpr std::size_t kPiecesPerThread = 4;

[[nodiscard]] std::size_t ceil_div(std::size_t a, std::size_t b) noexcept {
    return (a + b - 1) / b;
}

}  // namespace

template <class T>
class Matmul::Typed final : public Matmul::Impl {
  public:
    explicit Typed(const Problem& problem)
        : Impl(problem),
          kernels_(kernels().gemm),
          x_(reinterpret_cast<const T*>(problem.x)),
          bias_(reinterpret_cast<const T*>(problem.bias)),
          y_(reinterpret_cast<T*>(problem.y)),
          n_(problem.transpose ? problem.grid.cols : problem.grid.rows) {
        if (p_.grid.count() == 0) {  // no weights: an empty sum
            std::fill_n(y_, p_.m * n_, T{0});
            finish(0, p_.m, 0, n_);
        } else if (p_.transpose) {
            // Whole tiles of the widest kind, as long as all rows have the same blocks.
            const std::span<const typename GemmKernelsOf<T>::Tile> widest(own().tiles, 1);
            const bool alike = p_.places.empty() && p_.variants == nullptr;
            tiled_ = alike ? p_.m / widest[0].width * widest[0].width : 0;
            if (tiled_ != 0) {
                packed_.emplace(x_, tiled_, p_.grid.rows, p_.grid.block_rows, widest,
                                threads_for(tiled_ * p_.grid.rows));
            }
        } else if (p_.m > own().dot_max_m) {
            const unsigned threads = threads_for(p_.m * p_.grid.cols);
            if constexpr (sizeof(T) == 4) {
                const Bf16GemmKernels& pairs = kernels_.bf16;
                if (p_.weights == Dtype::bf16 && pairs.tiles[0].width != 0) {
                    const bool may_cut = pairs.cut != nullptr && p_.m >= kMinCutRows;
                    const unsigned parts =
                        detail::bf16_parts(x_, p_.m * p_.grid.cols, may_cut, threads);
                    if (parts != 0) {
                        pairs_.emplace(x_, p_.m, p_.grid.cols, p_.grid.block_cols, pairs.tiles,
                                       threads, parts == 1 ? nullptr : pairs.cut);
                        return;
                    }
                }
            }
            packed_.emplace(x_, p_.m, p_.grid.cols, p_.grid.block_cols, own().tiles, threads);
        }
    }

  protected:
    void multiply(std::span<const BlockView> blocks) override {
        const BlockGrid& grid = p_.grid;
        std::size_t weights = 0;
        for (const BlockView& block : blocks) weights += std::size_t{block.rows} * block.cols;
        const unsigned threads = threads_for(weights * p_.m);
        if (p_.transpose) {
            if (packed_) {
                run(grid.grid_cols(), packed_->n_tiles(), packed_->tile(0).kernel->width, threads,
                    [&](const Task& task, Worker& worker) {
                        multiply_nn_tiles(blocks, task.panel, task.unit0, task.unit1, worker);
                    });
            }
            if (tiled_ == p_.m) return;
            const std::size_t group = columns_together(threads);
            run(ceil_div(grid.grid_cols(), group), p_.m - tiled_, 1, threads,
                [&](const Task& task, Worker& worker) {
                    const std::size_t column = task.panel * group;
                    multiply_nn(blocks, column, std::min(column + group, grid.grid_cols()),
                                tiled_ + task.unit0, tiled_ + task.unit1, worker.reader);
                });
            return;
        }
        const std::size_t first = place(fed_) / grid.grid_cols();
        const std::size_t panels = place(fed_ + blocks.size() - 1) / grid.grid_cols() - first + 1;
        if (packed_) {
            multiply_packed(*packed_, blocks, first, panels, threads);
            return;
        }
        if constexpr (sizeof(T) == 4) {
            if (pairs_) {
                multiply_packed(*pairs_, blocks, first, panels, threads);
                return;
            }
        }
        run(panels, p_.m, 1, threads, [&](const Task& task, Worker& worker) {
            multiply_dots(blocks, first + task.panel, task.unit0, task.unit1, worker.reader);
        });
    }

  private:
    [[nodiscard]] const GemmKernelsOf<T>& own() const noexcept {
        return detail::of_type<T>(kernels_);
    }

    [[nodiscard]] unsigned threads_for(std::size_t work) const noexcept {
        const std::size_t useful = std::max<std::size_t>(work / kMinWorkPerThread, 1);
        return static_cast<unsigned>(std::min<std::size_t>(thread_count(p_.threads), useful));
    }

    // One panel by rows (or tiles of rows) of x [unit0, unit1).
    struct Task {
        std::size_t panel, unit0, unit1;
    };
    struct Worker {
        WeightReader<T> reader;
        Scratch<T> sums;
        Scratch<T> apart;
        Scratch<std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>> mask;
    };

    // Deals out panels by `units` of `unit_rows` rows of x each: as many as fit a task, fewer where
    // there would be too few pieces for the threads.
    template <class Body>
    void run(std::size_t panels, std::size_t units, std::size_t unit_rows, unsigned threads,
             const Body& body) const {
        const std::size_t rows = units * unit_rows;
        const std::size_t wanted = threads == 1 ? 1 : ceil_div(kPiecesPerThread * threads, panels);
        const std::size_t chunks =
            std::max(ceil_div(rows, kMaxTaskRows), std::min(wanted, ceil_div(rows, kMinTaskRows)));
        const std::size_t chunk = ceil_div(units, chunks);
        const std::size_t per_panel = ceil_div(units, chunk);
        parallel_for(panels * per_panel, 1, threads, [&](std::size_t begin, std::size_t end) {
            Worker worker{WeightReader<T>(kernels_), {}, {}, {}};
            for (std::size_t i = begin; i < end; ++i) {
                const std::size_t unit = i % per_panel * chunk;
                body(Task{i / per_panel, unit, std::min(units, unit + chunk)}, worker);
            }
        });
    }

    void finish(std::size_t i0, std::size_t i1, std::size_t j0, std::size_t count) const noexcept {
        for (std::size_t i = i0; i < i1; ++i) {
            detail::finish_row(y_ + i * n_ + j0, count, bias_ == nullptr ? nullptr : bias_ + j0,
                               p_.activation);
        }
    }

    // The blocks of block row `row` that this call brings: numbers [begin, end).
    struct Part {
        std::size_t begin, end;
        bool starts, ends;  // whether it holds the first and the last block of the row
    };
    [[nodiscard]] Part part_of_row(std::size_t row, std::size_t n_blocks) const noexcept {
        const std::size_t first = first_from(row * p_.grid.grid_cols());
        const std::size_t last = first_from((row + 1) * p_.grid.grid_cols());
        const std::size_t begin = std::max(fed_, first);
        const std::size_t end = std::min(fed_ + n_blocks, last);
        return {begin, end, begin == first, end == last};
    }

    void multiply_dots(std::span<const BlockView> blocks, std::size_t row, std::size_t i0,
                       std::size_t i1, WeightReader<T>& reader) const {
        const Part part = part_of_row(row, blocks.size());
        const BlockRect rect = block_rect(p_.grid, row * p_.grid.grid_cols());
        T* const y = y_ + i0 * n_ + rect.row0;
        if (part.starts) {
            for (std::size_t i = 0; i < i1 - i0; ++i) std::fill_n(y + i * n_, rect.rows, T{0});
        }
        for (std::size_t number = part.begin; number < part.end; ++number) {
            const std::size_t column = place(number) % p_.grid.grid_cols();
            for_rows_with(number, i0, i1, [&](std::size_t begin, std::size_t end) {
                dot(x_ + begin * p_.grid.cols + column * p_.grid.block_cols, end - begin,
                    blocks[number - fed_], y_ + begin * n_ + rect.row0, n_, reader);
            });
        }
        if (part.ends) finish(i0, i1, rect.row0, rect.rows);
    }

    void dot(const T* x, std::size_t m, const BlockView& block, T* y, std::size_t ldy,
             WeightReader<T>& reader) const {
        const std::size_t ldx = p_.grid.cols;
        if constexpr (sizeof(T) == 4) {
            // Widened as it is read: no scratch between the page and the registers.
            if (block.dtype == Dtype::bf16 || block.dtype == Dtype::f16) {
                const auto* const w = reinterpret_cast<const std::uint16_t*>(reader.stored(block));
                const auto kernel =
                    block.dtype == Dtype::bf16 ? kernels_.dot_nt_bf16 : kernels_.dot_nt_f16;
                kernel(x, ldx, m, w, block.rows, block.cols, block.cols, y, ldy);
                return;
            }
        }
        own().dot_nt(x, ldx, m, reader.read(block), block.rows, block.cols, block.cols, y, ldy);
    }

    template <class E>
    void multiply_packed(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                         std::size_t first, std::size_t panels, unsigned threads) {
        // Of the last panel what comes later will need the sums.
        const std::size_t last = first + panels - 1;
        if (!part_of_row(last, blocks.size()).ends) {
            to_go_on_ = AlignedArray<T>(x.sums_before(x.n_tiles()) *
                                        block_rect(p_.grid, last * p_.grid.grid_cols()).rows);
        }
        run(panels, x.n_tiles(), x.tile(0).kernel->width, threads,
            [&](const Task& task, Worker& worker) {
                multiply_tiles(x, blocks, first + task.panel, task.unit0, task.unit1, worker);
            });
        begun_ = std::move(to_go_on_);
    }

    template <class E>
    void multiply_tiles(const PackedX<E, T>& x, std::span<const BlockView> blocks, std::size_t row,
                        std::size_t t0, std::size_t t1, Worker& worker) const {
        std::optional<TileRegisters> registers;
        if constexpr (!std::is_same_v<E, T>) registers.emplace(kernels_.bf16);
        const Part part = part_of_row(row, blocks.size());
        const BlockRect rect = block_rect(p_.grid, row * p_.grid.grid_cols());
        const std::size_t sum0 = x.sums_before(t0);
        const std::size_t count = (x.sums_before(t1) - sum0) * rect.rows;
        T* const sums =
            part.ends ? worker.sums.at_least(count) : to_go_on_.data() + sum0 * rect.rows;
        if (part.starts) {
            std::fill_n(sums, count, T{0});
        } else {
            std::copy_n(begun_.data() + sum0 * rect.rows, count, sums);
        }
        const auto sums_of = [&](std::size_t t) {
            return sums + (x.sums_before(t) - sum0) * rect.rows;
        };
        const std::size_t strip = columns_in_a_pass(x.tile(t0).kernel->width);
        for (std::size_t number = part.begin; number < part.end; ++number) {
            const std::size_t column = place(number) % p_.grid.grid_cols();
            const BlockView& block = blocks[number - fed_];
            if (const std::size_t n = blocks_together(x, blocks, number, part.end, t0); n > 0) {
                for (std::size_t t = t0; t < t1; ++t) {
                    multiply_together(x, blocks, number, n, t, t == t0, sums_of(t));
                }
                number += n - 1;
                continue;
            }
            const E* const next = next_block<E>(blocks, number - fed_);
            const bool is_last = number + 1 == part.end || column + 1 == p_.grid.grid_cols();
            const E* next_x = is_last ? nullptr : x.at(column + 1, t0, 0);
            const E* const next_x_end = is_last ? nullptr : x.end_of(column + 1, t1 - 1);
            if (!members_.empty()) {
                for (std::size_t t = t0; t < t1; ++t) {
                    multiply_for_members(x, column, t, block, number, t == t0 ? next : nullptr,
                                         sums_of(t), worker);
                }
                continue;
            }
            const E* const w = read<E>(block, worker.reader);
            for (std::size_t c = 0; c < block.cols; c += strip) {
                const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
                for (std::size_t t = t0; t < t1; ++t) {
                    const E* ahead = nullptr;
                    if (t == t0 && next != nullptr) {
                        ahead = next + c * block.rows;
                    } else if (next_x < next_x_end) {
                        ahead = next_x;
                        next_x += n * block.rows;
                    }
                    multiply_tile(x, column, t, c, w + c, n, block, ahead, sums_of(t));
                }
            }
        }
        if (!part.ends) return;
        for (std::size_t t = t0; t < t1; ++t) store_sums(x.tile(t), rect, sums_of(t));
        finish(x.tile(t0).row0, x.tile(t1 - 1).row0 + x.tile(t1 - 1).rows, rect.row0, rect.rows);
    }

    // n columns of a block by those of tile t of x, in all parts of it.
    template <class E>
    static void multiply_tile(const PackedX<E, T>& x, std::size_t column, std::size_t t,
                              std::size_t c, const E* w, std::size_t n, const BlockView& block,
                              const E* next, T* sums) noexcept {
        for (unsigned part = 0; part < x.n_parts(); ++part) {
            x.tile(t).kernel->tile_nt(x.at(column, t, c, part), w, block.rows, n, block.cols,
                                      part == 0 ? next : nullptr, sums);
        }
    }

    // How many blocks from `number` on tile t of x takes at once: such as lie as they are in their
    // pages. 0 where a kernel does not do that.
    template <class E>
    [[nodiscard]] std::size_t blocks_together(const PackedX<E, T>& x,
                                              std::span<const BlockView> blocks, std::size_t number,
                                              std::size_t end, std::size_t t) const noexcept {
        if (x.tile(t).kernel->tile_nt_pieces == nullptr || !members_.empty()) return 0;
        std::size_t n = 0;
        std::size_t bytes = 0;
        while (n < kMaxGemmPieces / x.n_parts() && number + n < end) {
            const BlockView& block = blocks[number + n - fed_];
            bytes += block.length;
            if (block.encoding != Encoding::raw || bytes > kTogetherBytes) break;
            ++n;
        }
        return n;
    }

    // n blocks by tile t of x, in all parts of it. For the first tile, the blocks that come next
    // are asked for.
    template <class E>
    void multiply_together(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                           std::size_t number, std::size_t n, std::size_t t, bool first,
                           T* sums) const {
        GemmPiece<E> pieces[kMaxGemmPieces];
        std::size_t count = 0;
        for (std::size_t i = 0; i < n; ++i) {
            const BlockView& block = blocks[number + i - fed_];
            const std::size_t column = place(number + i) % p_.grid.grid_cols();
            const E* const next = first ? next_block<E>(blocks, number + i - fed_, n) : nullptr;
            for (unsigned part = 0; part < x.n_parts(); ++part) {
                pieces[count++] = {x.at(column, t, 0, part), reinterpret_cast<const E*>(block.data),
                                   block.cols, block.cols, part == 0 ? next : nullptr};
            }
        }
        x.tile(t).kernel->tile_nt_pieces(pieces, count, blocks[number - fed_].rows, sums);
    }

    // Dot products take as long as their block takes to come: the next one should be under way.
    static void ask_for(const void* memory, std::size_t bytes) noexcept {
        constexpr std::size_t kLine = 64;
        const auto* const from = static_cast<const std::byte*>(memory);
        for (std::size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
    }

    // A block for those rows of a tile that have it. Where these are some, its sums are formed
    // apart, so that nothing of it, not even a NaN, gets into those of other rows.
    template <class E>
    void multiply_for_members(const PackedX<E, T>& x, std::size_t column, std::size_t t,
                              const BlockView& block, std::size_t number, const E* next, T* sums,
                              Worker& worker) const {
        using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
        const auto& tile = x.tile(t);
        std::size_t having = 0;
        for (std::size_t i = 0; i < tile.rows; ++i) having += has(number, tile.row0 + i) ? 1 : 0;
        if (having == 0) return;
        const std::size_t lanes = tile.sums();
        if (having <= own().dot_max_m) {
            if (next != nullptr) ask_for(next, std::size_t{block.rows} * block.cols * sizeof(E));
            T* const products = worker.apart.at_least(having * block.rows);
            for_rows_with(
                number, tile.row0, tile.row0 + tile.rows, [&](std::size_t begin, std::size_t end) {
                    const std::size_t n = end - begin;
                    std::fill_n(products, n * block.rows, T{0});
                    dot(x_ + begin * p_.grid.cols + column * p_.grid.block_cols, n, block, products,
                        block.rows, worker.reader);
                    T* const to = sums + (begin - tile.row0) * tile.kernel->sums();
                    for (std::size_t i = 0; i < n; ++i) {
                        for (std::size_t r = 0; r < block.rows; ++r) {
                            to[r * lanes + i * tile.kernel->sums()] += products[i * block.rows + r];
                        }
                    }
                });
            return;
        }
        const E* const w = read<E>(block, worker.reader);
        const bool is_some = having != tile.rows;
        T* const to = is_some ? worker.apart.at_least(block.rows * lanes) : sums;
        if (is_some) std::fill_n(to, block.rows * lanes, T{0});
        const std::size_t strip = columns_in_a_pass(tile.kernel->width);
        for (std::size_t c = 0; c < block.cols; c += strip) {
            const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
            multiply_tile(x, column, t, c, w + c, n, block,
                          next == nullptr ? nullptr : next + c * block.rows, to);
        }
        if (!is_some) return;
        Bits* const mask = worker.mask.at_least(lanes);
        const std::size_t group = tile.kernel->sums();
        for (std::size_t i = 0; i < lanes; ++i) {
            const bool counts = i / group < tile.rows && has(number, tile.row0 + i / group);
            mask[i] = counts ? ~Bits{0} : Bits{0};
        }
        for (std::size_t r = 0; r < block.rows; ++r) {
            for (std::size_t i = 0; i < lanes; ++i) {
                sums[r * lanes + i] +=
                    std::bit_cast<T>(std::bit_cast<Bits>(to[r * lanes + i]) & mask[i]);
            }
        }
    }

    template <class E>
    [[nodiscard]] static const E* read(const BlockView& block, WeightReader<T>& reader) {
        if constexpr (std::is_same_v<E, T>) {
            return reader.read(block);
        } else {
            return reinterpret_cast<const E*>(reader.stored(block));
        }
    }

    // Whole groups of any tile, of which the largest are 32 bf16 numbers.
    [[nodiscard]] static std::size_t columns_in_a_pass(std::size_t tile_width) noexcept {
        constexpr std::size_t kGroup = 32;
        const std::size_t fitting = kPassBytes / (tile_width * sizeof(T));
        return std::max<std::size_t>(fitting / kGroup, 1) * kGroup;
    }

    // The block so many places on, in its row or column of blocks the next one, when its memory is
    // worth asking for.
    template <class E>
    [[nodiscard]] static const E* next_block(std::span<const BlockView> blocks, std::size_t index,
                                             std::size_t step = 1) noexcept {
        if (index + step >= blocks.size() || blocks[index + step].length > kMaxAheadBytes) {
            return nullptr;
        }
        return reinterpret_cast<const E*>(blocks[index + step].data);
    }

    template <class Tile>
    void store_sums(const Tile& tile, const BlockRect& rect, const T* sums) const noexcept {
        const std::size_t group = tile.kernel->sums();
        const std::size_t lanes = tile.sums();
        if (group == 1) {
            detail::transpose_apart(sums, lanes, rect.rows, tile.rows,
                                    y_ + tile.row0 * n_ + rect.row0, n_);
            return;
        }
        for (std::size_t i = 0; i < tile.rows; ++i) {
            T* const y = y_ + (tile.row0 + i) * n_ + rect.row0;
            for (std::size_t r = 0; r < rect.rows; ++r) {
                const T* const from = sums + r * lanes + i * group;
                T sum = from[0];
                for (std::size_t j = 1; j < group; ++j) sum += from[j];
                y[r] = sum;
            }
        }
    }

    // Columns of blocks in one panel. Neighbours in a row of blocks lie together in memory, so more
    // columns are longer reads; but their part of y should stay in the second-level cache.
    [[nodiscard]] std::size_t columns_together(unsigned threads) const noexcept {
        const std::size_t rows = std::min(p_.m, kMaxTaskRows);
        const std::size_t fitting = kMaxSumBytes / (rows * p_.grid.block_cols * sizeof(T));
        const std::size_t enough = p_.grid.grid_cols() / (kPiecesPerThread * threads);
        return std::max<std::size_t>(std::min(fitting, enough), 1);
    }

    // Column `column` of blocks for tiles [t0, t1) of x. With its rows and columns exchanged, a
    // block is multiplied as for x @ W.T: that takes as long as a few rows of x do.
    void multiply_nn_tiles(std::span<const BlockView> blocks, std::size_t column, std::size_t t0,
                           std::size_t t1, Worker& worker) const {
        const PackedX<T, T>& x = *packed_;
        const std::size_t columns = p_.grid.grid_cols();
        const std::size_t first =
            column + ceil_div(fed_ - std::min(fed_, column), columns) * columns;
        const std::size_t end = fed_ + blocks.size();
        if (first >= end) return;
        const BlockRect rect = block_rect(p_.grid, column);
        const std::size_t sum0 = x.sums_before(t0);
        T* const sums = worker.sums.at_least((x.sums_before(t1) - sum0) * rect.cols);
        const auto sums_of = [&](std::size_t t) {
            return sums + (x.sums_before(t) - sum0) * rect.cols;
        };
        const auto y_of = [&](std::size_t t) { return y_ + x.tile(t).row0 * n_ + rect.col0; };
        for (std::size_t t = t0; t < t1; ++t) {
            const auto& tile = x.tile(t);
            if (first == column) {
                std::fill_n(sums_of(t), tile.sums() * rect.cols, T{0});
            } else {
                detail::transpose(y_of(t), n_, tile.rows, rect.cols, sums_of(t), tile.sums());
            }
        }
        const std::size_t strip = columns_in_a_pass(x.tile(t0).kernel->width);
        for (std::size_t number = first; number < end; number += columns) {
            const BlockView& block = blocks[number - fed_];
            T* const w = worker.apart.at_least(std::size_t{block.rows} * block.cols);
            detail::transpose(worker.reader.read(block), block.cols, block.rows, block.cols, w,
                              block.rows);
            const T* const next = next_block<T>(blocks, number - fed_, columns);
            for (std::size_t r = 0; r < block.rows; r += strip) {
                const std::size_t n = std::min<std::size_t>(strip, block.rows - r);
                for (std::size_t t = t0; t < t1; ++t) {
                    x.tile(t).kernel->tile_nt(
                        x.at(number / columns, t, r), w + r, block.cols, n, block.rows,
                        t == t0 && next != nullptr ? next + r * block.cols : nullptr, sums_of(t));
                }
            }
        }
        for (std::size_t t = t0; t < t1; ++t) {
            const auto& tile = x.tile(t);
            detail::transpose_apart(sums_of(t), tile.sums(), rect.cols, tile.rows, y_of(t), n_);
        }
        if (end + columns > p_.grid.count() + column) {
            finish(x.tile(t0).row0, x.tile(t1 - 1).row0 + x.tile(t1 - 1).rows, rect.col0,
                   rect.cols);
        }
    }

    // Columns [column0, column1) of blocks, for rows [i0, i1) of x.
    void multiply_nn(std::span<const BlockView> blocks, std::size_t column0, std::size_t column1,
                     std::size_t i0, std::size_t i1, WeightReader<T>& reader) const {
        const BlockGrid& grid = p_.grid;
        const std::size_t end = fed_ + blocks.size();
        for (std::size_t row = place(fed_) / grid.grid_cols(); row < grid.grid_rows(); ++row) {
            const std::size_t row0 = row * grid.grid_cols();
            const std::size_t from = std::max(fed_, first_from(row0 + column0));
            if (from >= end) break;
            const std::size_t to = std::min(end, first_from(row0 + column1));
            for (std::size_t number = from; number < to; ++number) {
                const std::size_t at = place(number);
                const BlockRect rect = block_rect(grid, at);
                const BlockView& block = blocks[number - fed_];
                if (row == 0 && (number == 0 || place(number - 1) != at)) {
                    for (std::size_t i = i0; i < i1; ++i) {
                        std::fill_n(y_ + i * n_ + rect.col0, rect.cols, T{0});
                    }
                }
                const T* const w = reader.read(block);
                for_rows_with(number, i0, i1, [&](std::size_t begin, std::size_t stop) {
                    own().block_nn(x_ + begin * grid.rows + row * grid.block_rows, grid.rows,
                                   stop - begin, w, block.rows, block.cols, block.cols,
                                   y_ + begin * n_ + rect.col0, n_);
                });
                const bool is_last = number + 1 == count() || place(number + 1) != at;
                if (row + 1 == grid.grid_rows() && is_last) finish(i0, i1, rect.col0, rect.cols);
            }
        }
    }

    const GemmKernels& kernels_;
    const T* const x_;
    const T* const bias_;
    T* const y_;
    const std::size_t n_;    // columns of y
    std::size_t tiled_ = 0;  // rows of x that a transposed product takes by tiles
    // x as the kernels want it: none for dot products, pairs_ for products of bf16 numbers.
    std::optional<PackedX<T, T>> packed_;
    std::optional<PackedX<std::uint16_t, float>> pairs_;
    // Sums of the panel that a call of feed() began or went on with, but did not end: of the call
    // before, and of this one.
    AlignedArray<T> begun_, to_go_on_;
};

Matmul::Matmul(const Problem& problem) {
    if (compute_dtype(problem.weights) == Dtype::f64) {
        impl_ = std::make_unique<Typed<double>>(problem);
    } else {
        impl_ = std::make_unique<Typed<float>>(problem);
    }
}

Matmul::~Matmul() = default;
Matmul::Matmul(Matmul&&) noexcept = default;
Matmul& Matmul::operator=(Matmul&&) noexcept = default;

void Matmul::feed(std::span<const BlockView> blocks, std::span<const std::uint64_t> members) {
    impl_->feed(blocks, members);
}

std::size_t Matmul::fed() const noexcept { return impl_->fed(); }

}  // namespace pydedup
