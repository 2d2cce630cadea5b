// SPDX-License-Identifier: Apache-2.0
// A matrix product in one dtype of sums: which thread computes what, on which block, in which
// order.
//
// A task is a range of columns of y (a panel of W: one row of blocks, or a few columns of blocks
// when transposed) by a chunk of rows of x. Tasks share nothing that they write, and each walks its
// blocks in order, so neither the threads nor the cuts between calls of feed() show in the result.
// A panel that is cut by the end of a call keeps its sums, as they are.
//
// matmul.cpp has the frame and what takes few rows of x, matmul_tiles.cpp what takes x in tiles,
// matmul_cut.cpp what cuts both factors into bf16 numbers, matmul_together.cpp several blocks at
// once, matmul_members.cpp rows of several variants, matmul_transposed.cpp x @ W, and
// matmul_turned.cpp the tasks where W is packed, not x.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "base/parallel.hpp"
#include "base/rounding.hpp"
#include "dispatch/dispatch.hpp"
#include "gemm/ahead.hpp"
#include "gemm/matmul_impl.hpp"
#include "gemm/matmul_sizes.hpp"
#include "gemm/packed_x.hpp"
#include "gemm/weights.hpp"
#include "gemm/workers.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup {

template <class T>
class Matmul::Typed final : public Matmul::Impl {
  public:
    explicit Typed(const Problem& problem);

  protected:
    void multiply(std::span<const BlockView> blocks) override;

  private:
    // What multiply() does, but for y in bf16 that rests as T.
    void multiply_all(std::span<const BlockView> blocks);

    [[nodiscard]] const GemmKernelsOf<T>& own() const noexcept {
        return detail::of_type<T>(kernels_);
    }

    [[nodiscard]] unsigned threads_for(std::size_t work) const noexcept;

    // Whether products are of pairs, if x allows.
    [[nodiscard]] bool takes_pairs() const noexcept;
    // Whether numbers of W, too, are cut into three bf16 numbers, if x allows.
    [[nodiscard]] bool takes_cuts() const noexcept;
    // x, in f32 or bf16, is packed for products of pairs;
    template <class S>
    void set_pairs(const S* x, const detail::ToPairs& pairs);
    // or as it is, if at all;
    void set_packed();
    // or for products whose factors are both cut;
    void set_cuts();
    // which x in bf16 is not: here it is widened.
    void widen_x();

    // One panel by rows (or tiles of rows) of x [unit0, unit1).
    struct Task {
        std::size_t panel, unit0, unit1;
    };
    // A block, the variants that have it, where in the grid it belongs (the row counted from the
    // first of a task), and a tile of which `having` rows are theirs.
    struct Use {
        std::uint64_t members;
        std::size_t number, row, column, tile, having;
    };
    // Which of so many.
    struct Turn {
        std::size_t number, of;
    };
    struct Worker {
        detail::WeightReader<T> reader;
        detail::Scratch<T> sums;
        detail::Scratch<T> apart;
        detail::Scratch<T> part_of_y;
        std::vector<Use> alone, dots, tiled;  // two by the variant that has them; one in order
        detail::Scratch<T> x;
        detail::Scratch<std::uint16_t> x_pairs, cut, packed_w, strips;

        template <class E>
        [[nodiscard]] detail::Scratch<E>& memory_of_x() noexcept {
            if constexpr (std::is_same_v<E, T>) {
                return x;
            } else {
                return x_pairs;
            }
        }
    };

    // How rows of x are packed as elements E, into memory that is given.
    template <class E, class A>
    struct Packing {
        using Packed = detail::PackedX<E, A>;
        std::function<Packed(std::size_t row0, std::size_t rows, unsigned threads,
                             detail::Scratch<E>& memory)>
            pack;                      // none: it is not
        std::size_t rows = 0;          // rows of x that are,
        std::size_t width = 1;         // of the widest tile,
        std::size_t bytes_of_row = 0;  // and bytes of a row, packed
        detail::Scratch<E> memory = {};
        std::optional<Packed> all = {};  // once they are
        // Rows of one variant each, for blocks that it alone has: a tile of `all` would have rows
        // of others, and take as long for all of them.
        struct Alone {
            detail::Scratch<E> memory = {};
            std::optional<Packed> x = {};
            std::size_t sum0 = 0;  // sums of those before, for one row of W
        };
        std::vector<Alone> alone = {};  // by variant; none where rows are not taken so
        std::size_t sums_alone = 0;     // of all of these, for one row of W
    };

    template <class S, class E, class A>
    void set_packing(Packing<E, A>& packing, const S* x, std::size_t rows, std::size_t cols,
                     std::size_t strip, std::span<const GemmTile<E, A>> tiles,
                     const detail::ToPairs& pairs);

    // Elements that will be needed next.
    template <class E>
    struct Next {
        const E* begin = nullptr;
        const E* end = nullptr;

        // Of the elements [from, from + count), as far as there are so many, what tile `number` of
        // `tiles` asks for.
        [[nodiscard]] Next part(std::size_t from, std::size_t count, std::size_t number,
                                std::size_t tiles) const noexcept {
            constexpr std::size_t kLine = 64 / sizeof(E);
            const std::size_t each = detail::round_up(detail::ceil_div(count, tiles), kLine);
            const auto at = [&](std::size_t tile) {
                const std::size_t index = from + std::min(tile * each, count);
                return begin + std::min(index, static_cast<std::size_t>(end - begin));
            };
            return {at(number), at(number + 1)};
        }
    };

    // Deals out panels by `units` of `unit_rows` rows of x each: as many as fit a task, fewer where
    // there would be too few pieces for the threads.
    template <class Body>
    void run(std::size_t panels, std::size_t units, std::size_t unit_rows, unsigned threads,
             const Body& body) {
        const std::size_t rows = units * unit_rows;
        const std::size_t wanted =
            threads == 1 ? 1 : detail::ceil_div(detail::kPiecesPerThread * threads, panels);
        const std::size_t chunks =
            std::max(detail::ceil_div(rows, detail::kMaxTaskRows),
                     std::min(wanted, detail::ceil_div(rows, detail::kMinTaskRows)));
        const std::size_t chunk = detail::ceil_div(units, chunks);
        const std::size_t per_panel = detail::ceil_div(units, chunk);
        each_task(panels * per_panel, threads, [&](std::size_t i, Worker& worker) {
            const std::size_t unit = i % per_panel * chunk;
            body(Task{i / per_panel, unit, std::min(units, unit + chunk)}, worker);
        });
    }

    template <class Body>
    void each_task(std::size_t count, unsigned threads, const Body& body) {
        workers_.each(
            count, threads,
            [&] {
                return Worker{
                    detail::WeightReader<T>(kernels_), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
            },
            [](Worker&) {}, body);
    }

    void finish(std::size_t i0, std::size_t i1, std::size_t j0, std::size_t count) const noexcept;

    // Memory for y as T, if there is none yet.
    void need_y();
    // All of y in bf16, if that is wanted, of what it is as T.
    void round_y();

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

    // ---- few rows of x: matmul.cpp

    void multiply_dots(std::span<const BlockView> blocks, std::size_t row, std::size_t i0,
                       std::size_t i1, detail::WeightReader<T>& reader) const;
    void dot(const T* x, std::size_t m, const BlockView& block, T* y, std::size_t ldy,
             detail::WeightReader<T>& reader) const;

    // ---- x in tiles: matmul_tiles.cpp

    // All rows that are packed: so they are from now on.
    template <class E, class A>
    [[nodiscard]] const detail::PackedX<E, A>& packed_whole(Packing<E, A>& packing) {
        if (!packing.all) {
            const unsigned threads = threads_for(packing.rows * packing.bytes_of_row / sizeof(E));
            packing.all.emplace(packing.pack(0, packing.rows, threads, packing.memory));
        }
        return *packing.all;
    }
    template <class E>
    void multiply_packed(Packing<E, T>& packing, std::span<const BlockView> blocks,
                         std::size_t first, std::size_t panels, unsigned threads);
    // Chunks of rows of x, each packed by a task that multiplies it with all panels while it is in
    // its second-level cache: all of x, packed, is memory that is new each time. 0 where x is
    // packed as a whole: where threads would have too few rows, or more blocks are to come, with
    // which x would be packed again.
    template <class E>
    [[nodiscard]] std::size_t chunks_of(const Packing<E, T>& packing,
                                        std::span<const BlockView> blocks,
                                        unsigned threads) const noexcept;
    // Rows of blocks, from `first` on: whole ones, if there are several.
    struct Rows {
        std::size_t first, count;
    };
    // Sums of tiles [t0, t1) of x for one row of blocks.
    struct TileSums {
        T* begin;
        BlockRect rect;
        std::size_t t0, t1;

        template <class E>
        [[nodiscard]] T* of(const detail::PackedX<E, T>& x, std::size_t t) const noexcept {
            return begin + (x.sums_before(t) - x.sums_before(t0)) * rect.rows;
        }
    };
    [[nodiscard]] Rows rows_from(std::size_t row, std::size_t end,
                                 std::size_t n_blocks) const noexcept;
    // Rows of blocks [begin, end) by tiles [t0, t1) of x.
    template <class E>
    void multiply_panels(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                         std::size_t begin, std::size_t end, std::size_t t0, std::size_t t1,
                         Worker& worker) const;
    template <class E>
    void multiply_tiles(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                        const Rows& rows, std::size_t t0, std::size_t t1, Worker& worker) const;
    // Block `number` by tiles of x, while memory is asked for block `next`, and for its x if that
    // is another.
    template <class E>
    void multiply_block(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                        std::size_t number, std::size_t next, bool next_has_new_x,
                        const TileSums& to, Worker& worker) const;
    template <class E>
    void store_tiles(const detail::PackedX<E, T>& x, const TileSums& from, Worker& worker) const;
    // n columns of a block by those of tile t of x, in all parts of it.
    template <class E>
    static void multiply_tile(const detail::PackedX<E, T>& x, std::size_t column, std::size_t t,
                              std::size_t c, const E* w, std::size_t n, const BlockView& block,
                              const GemmNext<E>& next, T* sums) noexcept {
        for (unsigned part = 0; part < x.n_parts(); ++part) {
            x.tile(t).kernel->tile_nt(x.at(column, t, c, part), w, block.rows, n, block.cols,
                                      part == 0 ? next : GemmNext<E>{}, sums);
        }
    }
    // Sums are stored into rows that lie far apart: each line is a miss of its own.
    template <class Tile>
    void ask_for_y(const Tile& tile, const BlockRect& rect) const noexcept;
    template <class Tile>
    void store_tile(const Tile& tile, const BlockRect& rect, T* sums, Worker& worker) const;
    template <class E>
    void finish_tiles(const detail::PackedX<E, T>& x, const BlockRect& rect, std::size_t t0,
                      std::size_t t1) const noexcept;
    template <class Tile>
    static void store_sums(const Tile& tile, std::size_t columns, const T* sums, T* to,
                           std::size_t ld) noexcept;

    // ---- W packed, not x: matmul_turned.cpp

    // Whether all of the product was made so.
    template <class E>
    [[nodiscard]] bool multiply_turned(const Packing<E, T>& packing,
                                       std::span<const BlockView> blocks, unsigned threads);

    // ---- W cut into bf16 numbers: matmul_cut.cpp

    // Whether E are bf16 numbers that W is cut into.
    template <class E>
    [[nodiscard]] bool cuts_w() const noexcept {
        return !std::is_same_v<E, T> && p_.weights != Dtype::bf16;
    }
    // What multiply_block() does, of a block that is cut.
    template <class E>
    void multiply_cut(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                      std::size_t number, std::size_t next, bool next_has_new_x, const TileSums& to,
                      Worker& worker) const;
    // Numbers of W, rows x cols, that `rows` columns of y are made of.
    struct Numbers {
        const T* begin;
        std::size_t rows, cols;
    };
    // Cuts them, and multiplies them with tiles of x in strip `column`, while memory is asked for
    // what is next, and for x of strip `next_column`, if there is one.
    template <class E>
    void cut_and_multiply(const detail::PackedX<E, T>& x, std::size_t column, const Numbers& w,
                          const Next<E>& next, std::optional<std::size_t> next_column,
                          const TileSums& to, Worker& worker) const;
    // Adds what rows of a tile, one a bit, are that could not be cut, or whose block could not.
    template <class Tile>
    void add_uncut(const Tile& tile, std::uint32_t rows, std::size_t column, const Numbers& w,
                   T* sums, Worker& worker) const;

    // ---- several blocks at once: matmul_together.cpp

    // How many blocks from `number` on tile t of x takes at once: such as lie as they are in their
    // pages. 0 where a kernel does not do that.
    template <class E>
    [[nodiscard]] std::size_t blocks_together(const detail::PackedX<E, T>& x,
                                              std::span<const BlockView> blocks, std::size_t number,
                                              std::size_t end, std::size_t t) const noexcept;
    // n blocks by tiles of x, in all parts of it: sums begin `anew`, and where W's row of blocks
    // `ends` go to y. For the first tile, blocks from `next` on are asked for: to spread that over
    // all tiles takes longer (AMX, 32 rows: a sixth).
    template <class E>
    void multiply_together(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                           std::size_t number, std::size_t n, std::size_t next, const TileSums& to,
                           bool anew, bool ends, Worker& worker) const;
    // Where a row of W is short (AMX): rows of it stay in the first-level cache, all their blocks
    // one after another, and sums go to y from there.
    template <class E>
    [[nodiscard]] bool takes_whole_rows(const detail::PackedX<E, T>& x,
                                        std::span<const BlockView> blocks,
                                        const Rows& rows) const noexcept;
    template <class E>
    void multiply_whole_rows(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                             const Rows& rows, std::size_t t0, std::size_t t1,
                             Worker& worker) const;

    // ---- rows of several variants: matmul_members.cpp

    // Packs rows of one variant each, where all rows are one task and several are its own.
    template <class E>
    void pack_alone(Packing<E, T>& packing, unsigned threads) const;
    template <class E>
    [[nodiscard]] const Packing<E, T>& packing() const noexcept {
        if constexpr (std::is_same_v<E, T>) {
            return packed_;
        } else {
            return pairs_;
        }
    }
    // Rows of blocks, each block for those rows of tiles [t0, t1) that have it: what one variant
    // alone has, one variant after another, as its blocks lie together in memory, by tiles of its
    // own rows or by dot products that go straight to y; the rest by tiles of all rows. In any way
    // blocks of a row come in their order.
    template <class E>
    void multiply_for_members(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                              const Rows& rows, std::size_t t0, std::size_t t1,
                              Worker& worker) const;
    template <class E>
    void find_uses(const detail::PackedX<E, T>& x, const Rows& rows, std::size_t n_blocks,
                   std::size_t t0, std::size_t t1, Worker& worker) const;
    // What a variant has alone: by tiles of its own rows, with the sums of all of these for a row
    // of blocks,
    template <class E>
    void multiply_alone(std::span<const BlockView> blocks,
                        const std::function<T*(std::size_t row)>& sums_of, Worker& worker) const;
    // or by dot products.
    template <class E>
    void multiply_dots_of(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                          Worker& worker) const;
    // These sums go to y.
    template <class E>
    void store_alone(const BlockRect& rect, const T* sums) const noexcept;
    // A block for those rows of a tile that have it: nothing of it, not even a NaN, stays in the
    // sums of others.
    template <class E>
    void multiply_tile_for(const detail::PackedX<E, T>& x, const Use& use, const BlockView& block,
                           const E* w, const Next<E>& next, const Turn& turn, T* sums,
                           Worker& worker) const;
    // Adds the dot products in y to the sums of a tile, which take their place there.
    template <class Tile>
    void add_dots(const Tile& tile, const BlockRect& rect, T* sums) const noexcept;

    // ---- x @ W: matmul_transposed.cpp

    // Columns of blocks in one panel. Neighbours in a row of blocks lie together in memory, so more
    // columns are longer reads; but their part of y should stay in the second-level cache.
    [[nodiscard]] std::size_t columns_together(unsigned threads) const noexcept;
    // Columns [column0, column1) of blocks for tiles [t0, t1) of x. With its rows and columns
    // exchanged, a block is multiplied as for x @ W.T: that takes as long as a few rows of x do.
    template <class E>
    void multiply_nn_tiles(const detail::PackedX<E, T>& x, std::span<const BlockView> blocks,
                           std::size_t column0, std::size_t column1, std::size_t t0, std::size_t t1,
                           Worker& worker) const;
    // Columns [column0, column1) of blocks, for rows [i0, i1) of x.
    void multiply_nn(std::span<const BlockView> blocks, std::size_t column0, std::size_t column1,
                     std::size_t i0, std::size_t i1, detail::WeightReader<T>& reader) const;

    // ---- of both

    // How many panels, of so many columns of y, a task takes. Where x does not stay in the
    // second-level cache from one to the next, each of its strips is multiplied with several
    // while it is there: its way from the third level takes longer than that of W (AMX, 512 rows:
    // a fifth of all time). With variants so that blocks of one come together (a twentieth).
    template <class E>
    [[nodiscard]] std::size_t panels_together(const detail::PackedX<E, T>& x, std::size_t panels,
                                              std::size_t columns,
                                              unsigned threads) const noexcept {
        const auto& kernel = *x.tile(0).kernel;
        const std::size_t tiles = std::min(x.n_tiles(), detail::kMaxTaskRows / kernel.width);
        if (p_.variants == nullptr && x.bytes(0, tiles) <= detail::kCachedBytes) return 1;
        const std::size_t sums =
            (x.sums_before(tiles) + packing<E>().sums_alone) * columns * sizeof(T);
        const std::size_t most =
            kernel.tile_nt_pieces == nullptr ? detail::kSumBytes : detail::kSumBytesTogether;
        const std::size_t pieces = threads == 1 ? 1 : detail::kPiecesPerThread * threads;
        const std::size_t chunks = x.n_tiles() / tiles;
        return std::max<std::size_t>(std::min(most / sums, panels * chunks / pieces), 1);
    }

    // Whole groups of any tile, of which the largest are 32 bf16 numbers.
    [[nodiscard]] static std::size_t columns_in_a_pass(std::size_t tile_width) noexcept {
        constexpr std::size_t kGroup = 32;
        const std::size_t fitting = detail::kPassBytes / (tile_width * sizeof(T));
        return std::max<std::size_t>(fitting / kGroup, 1) * kGroup;
    }

    // Tile t of x for block `number`.
    template <class E>
    [[nodiscard]] Next<E> x_of(const detail::PackedX<E, T>& x, std::size_t number,
                               std::size_t t) const noexcept {
        const std::size_t column = place(number) % p_.grid.grid_cols();
        return {x.at(column, t, 0), x.end_of(column, t)};
    }

    // The block at an index, when there is one and its memory is worth asking for.
    template <class E>
    [[nodiscard]] static Next<E> next_block(std::span<const BlockView> blocks,
                                            std::size_t index) noexcept {
        if (index >= blocks.size()) return {};
        const GemmNext<E> ahead = detail::ahead_of<E>(blocks[index]);
        return {ahead.w, ahead.w_end};
    }

    const GemmKernels& kernels_;
    const T* x_;
    detail::AlignedArray<T> wide_;  // x_, where x came in bf16 and cannot stay that
    const T* const bias_;
    // y; where it is wanted in bf16 that is halves_, and y_ may be nullptr: then each tile is
    // rounded as it is stored.
    T* y_;
    std::uint16_t* const halves_;
    detail::AlignedArray<T> wide_y_;
    const std::size_t n_;    // columns of y
    std::size_t tiled_ = 0;  // rows of x that a transposed product takes by tiles
    // x as the kernels want it: none for dot products, pairs_ for products of bf16 numbers.
    Packing<T, T> packed_;
    Packing<std::uint16_t, float> pairs_;
    std::atomic<bool> subnormal_{false};  // some of x, which pairs_ cannot have
    detail::Workers<Worker> workers_;
    // Sums of the panel that a call of feed() began or went on with, but did not end: of the call
    // before, and of this one.
    detail::AlignedArray<T> begun_, to_go_on_;
};

}  // namespace pydedup
