// SPDX-License-Identifier: Apache-2.0
// A task is a chunk of output positions by some rows of blocks. It walks over W's columns in
// strips: gathers the chunk's part of the unfolded image for one strip into scratch, and multiplies
// it with all blocks of the strip, row of blocks after row of blocks. So the image is gathered once
// per task, and W is read once per chunk; between two strips the sums rest in y, as they are, or in
// scratch, if they are few.
#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "base/parallel.hpp"
#include "base/rounding.hpp"
#include "dispatch/dispatch.hpp"
#include "dispatch/tile_registers.hpp"
#include "gemm/ahead.hpp"
#include "gemm/bf16_parts.hpp"
#include "gemm/conv_impl.hpp"
#include "gemm/cut_image.hpp"
#include "gemm/image_sums.hpp"
#include "gemm/image_tiles.hpp"
#include "gemm/pair_image.hpp"
#include "gemm/useful_threads.hpp"
#include "gemm/weights.hpp"
#include "gemm/workers.hpp"

namespace pydedup {
namespace {

using detail::ahead_of;
using detail::AheadShares;
using detail::ceil_div;
using detail::ImageSums;
using detail::ImageTiles;
using detail::LastBlockReader;
using detail::Range;
using detail::Scratch;

// Gathered image per thread: with a block and its sums it stays in a second-level cache that two
// threads share.
constexpr std::size_t kGatherBytes = std::size_t{256} << 10;
// Tiles of a chunk: each block is read once per chunk.
constexpr std::size_t kChunkTiles = 8;
// Rows of a block that are multiplied at a time: sums of 64 KiB for 8 tiles of 32 positions.
constexpr std::size_t kRowsAtOnce = 64;
// Columns of a block that one pass of a tile covers: 32 lanes for them fill half of a 32 KiB
// first-level cache.
constexpr std::size_t kPassBytes = 512;
// Sums of a task that stay in scratch from strip to strip: beside the gathered image, in a
// second-level cache. CPUs that multiply bf16 numbers have one of 1 MiB at least.
constexpr std::size_t kKeptBytes = std::size_t{256} << 10;
constexpr std::size_t kKeptBytesOfPairs = std::size_t{512} << 10;
// Weights that a tile of bf16 numbers is multiplied with at once: half of a 48 KiB first-level
// cache, which every CPU has whose kernels do so (AMX).
constexpr std::size_t kTogetherBytes = std::size_t{24} << 10;
// For choosing how to cut the work, in nanoseconds of one thread (EPYC, AVX-512, f32): a
// multiply-add, gathering an element, reading a weight that another chunk has read already.
constexpr double kMultiplyCost = 0.02;
constexpr double kGatherCost = 0.15;
constexpr double kReadCost = 0.3;

}  // namespace

template <class T>
class Conv2d::Tiled final : public Conv2d::Impl {
  public:
    explicit Tiled(const Problem& problem)
        : Impl(problem),
          kernels_(kernels().gemm),
          tile_(widest_tile(detail::of_type<T>(kernels_))),
          image_(problem.shape, tile_.width, kernels()),
          half_x_(problem.x_is_bf16 ? reinterpret_cast<const Half*>(problem.x) : nullptr),
          sums_(problem, tile_.width, kernels()),
          positions_(problem.shape.batch * problem.shape.out_h() * problem.shape.out_w()),
          tiles_(ceil_div(positions_, tile_.width)),
          way_(choose_way()) {}

  protected:
    void convolve(std::span<const BlockView> blocks) override {
        if constexpr (sizeof(T) == 4) {
            if (way_ == Way::pairs && half_x_ == nullptr) narrow_image();
        }
        if (tiles_ == 0) return;  // no images
        const auto [first, panels, weights, threads] = work_of(blocks);
        const auto [chunks, cuts] = cut(weights, panels, threads);
        const std::size_t per_cut = ceil_div(panels, cuts);
        if (rests(blocks.size(), ceil_div(tiles_, chunks), per_cut)) sums_.will_rest();
        workers_.each(
            chunks * cuts, threads,
            [&] {
                return Worker{LastBlockReader<T>(kernels_), LastBlockReader<T, Half>(kernels_)};
            },
            [](Worker& worker) {
                worker.blocks.forget();
                worker.halves.forget();
            },
            [&](std::size_t i, Worker& worker) {
                const std::size_t panel0 = first + i % cuts * per_cut;
                const std::size_t panel1 = std::min(panel0 + per_cut, first + panels);
                const Range tiles{detail::even_part(tiles_, chunks, i / cuts),
                                  detail::even_part(tiles_, chunks, i / cuts + 1)};
                run_task(blocks, tiles, panel0, panel1, worker);
            });
    }

  private:
    using Tile = typename GemmKernelsOf<T>::Tile;
    using Half = std::uint16_t;
    // What is multiplied: numbers as T; both factors cut into bf16 numbers (cut_image.hpp); or
    // bf16 numbers (pair_image.hpp).
    enum class Way : std::uint8_t { plain, cut, pairs };

    // What lies gathered in a worker's scratch: columns of a group; none at first.
    struct Gathered {
        std::size_t group = 0;
        Range columns{0, 0};
    };
    struct Worker {
        LastBlockReader<T> blocks;
        LastBlockReader<T, Half> halves;
        detail::PositionRuns positions{};
        Scratch<T> image{};
        Scratch<T> sums{};
        detail::CutImage parts{};
        detail::PairImage pairs{};
        Gathered gathered{};
        Range kept{0, 0};  // rows whose sums stay in scratch from strip to strip, if any
    };
    struct Cut {
        std::size_t chunks;  // of the tiles
        std::size_t cuts;    // of the rows of blocks
    };

    // More chunks read W more often, more cuts gather more, too few tasks leave threads idle.
    [[nodiscard]] Cut cut(std::size_t weights, std::size_t panels, unsigned threads) const {
        const double columns = static_cast<double>(p_.grid.cols * p_.shape.groups);
        const double lanes = static_cast<double>(tiles_ * tile_.width);
        Cut best{1, 1};
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t chunk = kChunkTiles; chunk > 0; --chunk) {
            const std::size_t chunks = ceil_div(tiles_, chunk);
            for (std::size_t cuts = 1; cuts <= std::min<std::size_t>(panels, 4 * threads); ++cuts) {
                // What the last thread to end has done: tiles of chunks that have one more or less,
                // by rows of blocks.
                const std::size_t rounds = ceil_div(chunks * cuts, std::size_t{threads});
                const std::size_t larger =
                    std::min(rounds, ceil_div(tiles_ % chunks * cuts, std::size_t{threads}));
                const std::size_t last =
                    (rounds * (tiles_ / chunks) + larger) * ceil_div(panels, cuts);
                const double busy =
                    static_cast<double>(tiles_ * panels) / static_cast<double>(last * threads);
                // Where rows of blocks are groups of their own, cuts gather nothing twice.
                const double gathers = p_.shape.groups >= panels ? 1.0 : static_cast<double>(cuts);
                const double cost = (static_cast<double>(weights) * lanes * kMultiplyCost +
                                     columns * lanes * gathers * kGatherCost +
                                     static_cast<double>(weights * chunks) * kReadCost) /
                                    busy;
                if (cost < least) {
                    least = cost;
                    best = {chunks, cuts};
                }
            }
        }
        return best;
    }

    // The widest of those whose vectors run along positions alone.
    static const Tile& widest_tile(const GemmKernelsOf<T>& of) noexcept {
        const Tile* found = nullptr;
        for (const Tile& tile : of.tiles) {
            if (tile.group == 1 && (found == nullptr || tile.width > found->width)) found = &tile;
        }
        return *found;  // every table has one
    }

    [[nodiscard]] Way choose_way() const {
        if constexpr (sizeof(T) == 4) {
            // Pairs of columns lie in one block, and a block in one strip, however many tiles it
            // has.
            const BlockGrid& grid = p_.grid;
            if (grid.block_cols % 2 != 0 && grid.grid_cols() != 1) return Way::plain;
            if (strip_columns(Way::cut, kChunkTiles) % grid.block_cols != 0) return Way::plain;
            if (p_.weights == Dtype::bf16 && detail::PairImage::fits(kernels_, tile_)) {
                const std::size_t count = elements_of_image();
                const unsigned threads =
                    detail::useful_threads(p_.threads, static_cast<double>(count));
                const bool are_halves =
                    half_x_ != nullptr ? !detail::has_subnormal(half_x_, count, threads)
                                       : detail::bf16_parts(reinterpret_cast<const float*>(p_.x),
                                                            count, false, threads) == 1;
                if (are_halves) return Way::pairs;
            }
            const std::size_t rows = std::min<std::size_t>(
                grid.block_rows, p_.shape.out_channels / std::max<std::size_t>(p_.shape.groups, 1));
            const std::size_t cols = std::min<std::size_t>(grid.block_cols, grid.cols);
            const bool pays = detail::CutImage::pays(kernels_, tile_, positions_, rows, cols);
            return pays ? Way::cut : Way::plain;
        } else {
            return Way::plain;
        }
    }

    // All of it are bf16 numbers.
    void narrow_image() {
        const std::size_t count = elements_of_image();
        narrow_x_ = detail::AlignedArray<Half>(count);
        half_x_ = narrow_x_.data();
        constexpr std::size_t kPiece = std::size_t{1} << 14;
        parallel_for(count, kPiece, detail::useful_threads(p_.threads, static_cast<double>(count)),
                     [&](std::size_t begin, std::size_t end) {
                         kernels_.f32_to_bf16(reinterpret_cast<const float*>(p_.x) + begin,
                                              end - begin, narrow_x_.data() + begin);
                     });
    }

    [[nodiscard]] std::size_t elements_of_image() const noexcept {
        return p_.shape.batch * p_.shape.channels * p_.shape.height * p_.shape.width;
    }

    // Columns of W in one strip: whole blocks if one fits.
    [[nodiscard]] std::size_t strip_columns(Way way, std::size_t tiles) const noexcept {
        const std::size_t element = way == Way::pairs ? sizeof(Half) : sizeof(T);
        const std::size_t fitting =
            std::max<std::size_t>(kGatherBytes / (tiles * tile_.width * element), 1);
        const std::size_t block = p_.grid.block_cols;
        return block <= fitting ? fitting / block * block : fitting;
    }

    void run_task(std::span<const BlockView> blocks, Range tiles, std::size_t panel0,
                  std::size_t panel1, Worker& worker) const {
        std::optional<TileRegisters> registers;
        if (way_ != Way::plain) registers.emplace(kernels_.bf16);
        image_.find_runs(tiles.begin * tile_.width, std::min(tiles.end * tile_.width, positions_),
                         worker.positions);
        worker.gathered = {};
        const std::size_t strip = strip_columns(way_, tiles.size());
        worker.kept = rows_to_keep(blocks.size(), tiles.size(), panel0, panel1);
        for (std::size_t c0 = 0; c0 < p_.grid.cols; c0 += strip) {
            const Range columns{c0, std::min(c0 + strip, p_.grid.cols)};
            for (std::size_t panel = panel0; panel < panel1; ++panel) {
                run_panel(blocks, tiles, panel, columns, worker);
            }
        }
    }

    // All rows of these panels, if all of their blocks are in this call and their sums are few.
    [[nodiscard]] Range rows_to_keep(std::size_t n_blocks, std::size_t tiles, std::size_t panel0,
                                     std::size_t panel1) const noexcept {
        const std::size_t columns = p_.grid.grid_cols();
        const Range rows{panel0 * p_.grid.block_rows,
                         std::min(panel1 * p_.grid.block_rows, p_.grid.rows)};
        const bool is_all = fed_ <= panel0 * columns && fed_ + n_blocks >= panel1 * columns;
        return is_all && can_keep(rows.size(), tiles) ? rows : Range{0, 0};
    }

    [[nodiscard]] bool can_keep(std::size_t rows, std::size_t tiles) const noexcept {
        const std::size_t most = way_ == Way::pairs ? kKeptBytesOfPairs : kKeptBytes;
        return rows * tiles * tile_.width * sizeof(T) <= most;
    }

    // The blocks of one row of blocks that this call brings, as far as they lie in the columns.
    void run_panel(std::span<const BlockView> blocks, Range tiles, std::size_t panel, Range columns,
                   Worker& worker) const {
        const BlockGrid& grid = p_.grid;
        const std::size_t first_block = panel * grid.grid_cols();
        const std::size_t begin = std::max(fed_, first_block) - first_block;
        const std::size_t end =
            std::min(fed_ + blocks.size(), first_block + grid.grid_cols()) - first_block;
        const Range part{std::max(begin * grid.block_cols, columns.begin),
                         std::min(end * grid.block_cols, columns.end)};
        if (part.begin >= part.end) return;
        const BlockRect rect = block_rect(grid, first_block);
        const std::size_t group_rows = p_.shape.out_channels / p_.shape.groups;
        for (std::size_t row = rect.row0; row < rect.row0 + rect.rows;) {
            const std::size_t group = row / group_rows;
            const std::size_t stop =
                std::min({rect.row0 + rect.rows, (group + 1) * group_rows, row + kRowsAtOnce});
            gather(group, tiles, columns, worker);
            run_rows(blocks, tiles, {row, stop}, rect.row0, columns, part, worker);
            row = stop;
        }
    }

    void gather(std::size_t group, Range tiles, Range columns, Worker& worker) const {
        Gathered& have = worker.gathered;
        if (have.columns.end != 0 && have.group == group && have.columns.begin == columns.begin &&
            have.columns.end == columns.end) {
            return;
        }
        have = {group, columns};
        if (way_ == Way::pairs) {
            worker.pairs.gather(image_, half_x_, group, columns.begin, columns.end,
                                worker.positions, tile_.width);
            return;
        }
        T* const to = worker.image.at_least(tiles.size() * columns.size() * tile_.width);
        const auto gather_from = [&](const auto* x) {
            image_.gather(x, group, columns.begin, columns.end, worker.positions, to);
        };
        if constexpr (sizeof(T) == 4) {
            if (half_x_ != nullptr) {
                gather_from(half_x_);
            } else {
                gather_from(reinterpret_cast<const T*>(p_.x));
            }
            if (way_ == Way::cut) {
                worker.parts.cut(kernels_, to, tiles.size(), columns.size(), p_.grid.block_cols);
            }
        } else {
            gather_from(reinterpret_cast<const T*>(p_.x));
        }
    }

    // Rows of one group and one row of blocks, for the columns `part` of what was gathered.
    void run_rows(std::span<const BlockView> blocks, Range tiles, Range rows, std::size_t row0,
                  Range gathered, Range part, Worker& worker) const {
        const BlockGrid& grid = p_.grid;
        const std::size_t per_tile = rows.size() * tile_.width;
        const bool is_kept = worker.kept.size() != 0;
        T* const sums =
            is_kept ? worker.sums.at_least(tiles.size() * worker.kept.size() * tile_.width) +
                          (rows.begin - worker.kept.begin) * tiles.size() * tile_.width
                    : worker.sums.at_least(tiles.size() * per_tile);
        if (part.begin == 0) {
            for (std::size_t t = 0; t < tiles.size(); ++t) sums_.begin(rows, sums + t * per_tile);
        } else if (!is_kept) {
            for (std::size_t t = tiles.begin; t < tiles.end; ++t) {
                sums_.load(t, rows, sums + (t - tiles.begin) * per_tile);
            }
        }
        if (way_ == Way::pairs) {
            multiply_pairs(blocks, rows, row0, gathered, part, sums, worker);
        } else {
            multiply(blocks, tiles, rows, row0, gathered, part, sums, worker);
        }
        const bool complete = part.end == grid.cols;
        if (is_kept && !complete) return;
        for (std::size_t t = tiles.begin; t < tiles.end; ++t) {
            sums_.store(t, rows, sums + (t - tiles.begin) * per_tile, complete);
        }
    }

    // What run_rows() does between the sums of before and those to come.
    void multiply(std::span<const BlockView> blocks, Range tiles, Range rows, std::size_t row0,
                  Range gathered, Range part, T* sums, Worker& worker) const {
        const BlockGrid& grid = p_.grid;
        const T* const image = worker.image.at_least(0);
        constexpr std::size_t kPass = kPassBytes / sizeof(T);
        for (std::size_t c = part.begin; c < part.end;) {
            const std::size_t column = c / grid.block_cols;
            const std::size_t col0 = column * grid.block_cols;
            const std::size_t number = row0 / grid.block_rows * grid.grid_cols() + column - fed_;
            const BlockView& block = blocks[number];
            const T* const w = worker.blocks.read(block) + (rows.begin - row0) * block.cols;
            const std::size_t stop = std::min(part.end, col0 + block.cols);
            const bool has_next = stop < part.end;
            if constexpr (sizeof(T) == 4) {
                if (way_ == Way::cut) {
                    const auto next = has_next ? ahead_of<std::uint16_t>(blocks[number + 1])
                                               : GemmNext<std::uint16_t>{};
                    worker.parts.multiply(kernels_, tile_,
                                          {w + (c - col0), rows.size(), block.cols},
                                          c - gathered.begin, stop - c, next, sums);
                    c = stop;
                    continue;
                }
            }
            AheadShares<T> ahead(has_next ? ahead_of<T>(blocks[number + 1]) : GemmNext<T>{},
                                 tiles.size());
            for (; c < stop; c += std::min(kPass, stop - c)) {
                for (std::size_t t = 0; t < tiles.size(); ++t) {
                    const T* const x =
                        image + (t * gathered.size() + c - gathered.begin) * tile_.width;
                    tile_.tile_nt(x, w + (c - col0), rows.size(), std::min(kPass, stop - c),
                                  block.cols, ahead.take(), sums + t * rows.size() * tile_.width);
                }
            }
        }
    }

    // The same of bf16 numbers: blocks that lie as they are in their pages several at once.
    void multiply_pairs(std::span<const BlockView> blocks, Range rows, std::size_t row0,
                        Range gathered, Range part, T* sums, Worker& worker) const {
        if constexpr (sizeof(T) == 4) {
            const BlockGrid& grid = p_.grid;
            detail::HalfWeights pieces[kMaxGemmPieces];
            const auto block_of = [&](std::size_t column) -> const BlockView& {
                const std::size_t panel = row0 / grid.block_rows;
                return blocks[panel * grid.grid_cols() + column / grid.block_cols - fed_];
            };
            for (std::size_t c = part.begin; c < part.end;) {
                std::size_t count = 0;
                std::size_t bytes = 0;
                while (c < part.end && count < kMaxGemmPieces) {
                    const BlockView& block = block_of(c);
                    const bool is_here = detail::WeightReader<T>::template is_here<Half>(block);
                    bytes += std::size_t{rows.size()} * block.cols * sizeof(Half);
                    if (count != 0 && (!is_here || bytes > kTogetherBytes)) break;
                    const Half* const w =
                        worker.halves.read(block) + (rows.begin - row0) * block.cols;
                    pieces[count++] = {w, block.cols, c - gathered.begin};
                    c += block.cols;
                    if (!is_here) break;
                }
                const GemmNext<Half> next =
                    c < part.end ? ahead_of<Half>(block_of(c)) : GemmNext<Half>{};
                worker.pairs.multiply(kernels_, std::span(pieces, count), rows.size(), next, sums);
            }
        }
    }

    // Whether sums rest in y between strips or calls, for tasks of so many tiles and rows of
    // blocks.
    [[nodiscard]] bool rests(std::size_t n_blocks, std::size_t tiles,
                             std::size_t panels) const noexcept {
        if (n_blocks != p_.grid.count()) return true;
        const std::size_t rows = std::min<std::size_t>(panels * p_.grid.block_rows, p_.grid.rows);
        return strip_columns(way_, tiles) < p_.grid.cols && !can_keep(rows, tiles);
    }

    const GemmKernels& kernels_;
    const Tile& tile_;
    const ImageTiles image_;
    const Half* half_x_;  // the image, if it is given or multiplied in bf16
    detail::AlignedArray<Half> narrow_x_;
    ImageSums<T> sums_;
    const std::size_t positions_;  // of the batch
    const std::size_t tiles_;
    const Way way_;
    detail::Workers<Worker> workers_;
};

std::unique_ptr<Conv2d::Impl> Conv2d::Impl::tiled(const Problem& problem) {
    if (compute_dtype(problem.weights) == Dtype::f64) {
        return std::make_unique<Tiled<double>>(problem);
    }
    return std::make_unique<Tiled<float>>(problem);
}

}  // namespace pydedup
