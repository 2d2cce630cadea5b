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
using detail::ImageTiles;
using detail::LastBlockReader;
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
// second-level cache.
constexpr std::size_t kKeptBytes = std::size_t{256} << 10;
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
          image_(problem.x, problem.x_is_bf16, problem.shape, tile_.width, kernels().rows),
          y_(problem.y_is_bf16 ? nullptr : reinterpret_cast<T*>(problem.y)),
          halves_(problem.y_is_bf16 ? reinterpret_cast<Half*>(problem.y) : nullptr),
          plane_(problem.shape.out_h() * problem.shape.out_w()),
          positions_(problem.shape.batch * plane_),
          tiles_(ceil_div(positions_, tile_.width)),
          way_(choose_way()) {}

  protected:
    void convolve(std::span<const BlockView> blocks) override {
        const auto [first, panels, weights, threads] = work_of(blocks);
        const auto [chunk, cuts] = cut(weights, panels, threads);
        const std::size_t chunks = ceil_div(tiles_, chunk);
        const std::size_t per_cut = ceil_div(panels, cuts);
        if (y_ == nullptr && rests(blocks.size(), chunk, per_cut)) {
            wide_y_ = detail::AlignedArray<T>(p_.shape.out_channels * positions_);
            y_ = wide_y_.data();
        }
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
                const std::size_t tile0 = i / cuts * chunk;
                run_task(blocks, {tile0, std::min(tile0 + chunk, tiles_)}, panel0, panel1, worker);
            });
    }

  private:
    using Tile = typename GemmKernelsOf<T>::Tile;
    using Half = std::uint16_t;
    // What is multiplied: numbers as T; both factors cut into bf16 numbers (cut_image.hpp); or
    // bf16 numbers (pair_image.hpp).
    enum class Way : std::uint8_t { plain, cut, pairs };

    struct Range {
        std::size_t begin, end;
        [[nodiscard]] std::size_t size() const noexcept { return end - begin; }
    };
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
        std::size_t chunk;  // tiles in one
        std::size_t cuts;   // of the rows of blocks
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
                const std::size_t tasks = chunks * cuts;
                const double busy = static_cast<double>(tasks) /
                                    static_cast<double>(ceil_div(tasks, threads) * threads);
                // Where rows of blocks are groups of their own, cuts gather nothing twice.
                const double gathers = p_.shape.groups >= panels ? 1.0 : static_cast<double>(cuts);
                const double cost = (static_cast<double>(weights) * lanes * kMultiplyCost +
                                     columns * lanes * gathers * kGatherCost +
                                     static_cast<double>(weights * chunks) * kReadCost) /
                                    busy;
                if (cost < least) {
                    least = cost;
                    best = {chunk, cuts};
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
            if (strip_columns(kChunkTiles) % grid.block_cols != 0) return Way::plain;
            if (p_.weights == Dtype::bf16 && detail::PairImage::fits(kernels_, tile_)) {
                const ConvShape& s = p_.shape;
                const std::size_t count = s.batch * s.channels * s.height * s.width;
                const unsigned threads =
                    detail::useful_threads(p_.threads, static_cast<double>(count));
                const bool are_halves =
                    p_.x_is_bf16
                        ? !detail::has_subnormal(reinterpret_cast<const Half*>(p_.x), count)
                        : detail::bf16_parts(reinterpret_cast<const float*>(p_.x), count, false,
                                             threads) == 1;
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

    // Columns of W in one strip: whole blocks if one fits.
    [[nodiscard]] std::size_t strip_columns(std::size_t tiles) const noexcept {
        const std::size_t fitting =
            std::max<std::size_t>(kGatherBytes / (tiles * tile_.width * sizeof(T)), 1);
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
        const std::size_t strip = strip_columns(tiles.size());
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
        const bool is_few = rows.size() * tiles * tile_.width * sizeof(T) <= kKeptBytes;
        return is_all && is_few ? rows : Range{0, 0};
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
        T* const to = worker.image.at_least(tiles.size() * columns.size() * tile_.width);
        image_.gather(group, columns.begin, columns.end, worker.positions, to);
        have = {group, columns};
        if constexpr (sizeof(T) == 4) {
            if (way_ == Way::cut) {
                worker.parts.cut(kernels_, to, tiles.size(), columns.size(), p_.grid.block_cols);
            }
            if (way_ == Way::pairs) {
                worker.pairs.take(to, tiles.size(), columns.size(), tile_.width);
            }
        }
    }

    // Positions in tile t: all of its lanes, but for the last tile.
    [[nodiscard]] std::size_t positions_of(std::size_t t) const noexcept {
        return std::min(tile_.width, positions_ - t * tile_.width);
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
            std::fill_n(sums, tiles.size() * per_tile, T{0});
        } else if (!is_kept) {
            for (std::size_t t = tiles.begin; t < tiles.end; ++t) {
                load_sums(t, rows, sums + (t - tiles.begin) * per_tile);
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
            store_sums(t, rows, sums + (t - tiles.begin) * per_tile, complete);
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
            for (std::size_t c = part.begin; c < part.end;) {
                std::size_t count = 0;
                std::size_t bytes = 0;
                while (c < part.end && count < kMaxGemmPieces) {
                    const std::size_t column = c / grid.block_cols;
                    const std::size_t number =
                        row0 / grid.block_rows * grid.grid_cols() + column - fed_;
                    const BlockView& block = blocks[number];
                    const bool is_here = detail::WeightReader<T>::template is_here<Half>(block);
                    bytes += std::size_t{rows.size()} * block.cols * sizeof(Half);
                    if (count != 0 && (!is_here || bytes > kTogetherBytes)) break;
                    const Half* const w =
                        worker.halves.read(block) + (rows.begin - row0) * block.cols;
                    pieces[count++] = {w, block.cols, c - gathered.begin};
                    c += block.cols;
                    if (!is_here) break;
                }
                worker.pairs.multiply(kernels_, std::span(pieces, count), rows.size(), sums);
            }
        }
    }

    // Whether sums rest in y between strips or calls, for tasks of so many tiles and rows of
    // blocks.
    [[nodiscard]] bool rests(std::size_t n_blocks, std::size_t tiles,
                             std::size_t panels) const noexcept {
        if (n_blocks != p_.grid.count()) return true;
        const std::size_t rows = std::min<std::size_t>(panels * p_.grid.block_rows, p_.grid.rows);
        return strip_columns(tiles) < p_.grid.cols &&
               rows * tiles * tile_.width * sizeof(T) > kKeptBytes;
    }

    // Calls use(lane, count, first element in y) for each image that tile t has positions of.
    template <class Use>
    void each_image(std::size_t t, const Use& use) const {
        const std::size_t p0 = t * tile_.width;
        const std::size_t p1 = p0 + positions_of(t);
        for (std::size_t p = p0; p < p1;) {
            const std::size_t image = p / plane_;
            const std::size_t n = std::min(p1, (image + 1) * plane_) - p;
            use(p - p0, n, image * p_.shape.out_channels * plane_ + p % plane_);
            p += n;
        }
    }

    void load_sums(std::size_t t, Range rows, T* sums) const {
        each_image(t, [&](std::size_t lane, std::size_t n, std::size_t y) {
            for (std::size_t r = rows.begin; r < rows.end; ++r) {
                detail::copy_row(y_ + y + r * plane_, n,
                                 sums + (r - rows.begin) * tile_.width + lane);
            }
        });
        // Lanes without a position hold what nobody reads, but must hold something.
        for (std::size_t r = 0; r < rows.size(); ++r) {
            std::fill(sums + r * tile_.width + positions_of(t), sums + (r + 1) * tile_.width, T{0});
        }
    }

    void store_sums(std::size_t t, Range rows, T* sums, bool complete) const {
        const std::size_t n_positions = positions_of(t);
        if (complete) {
            for (std::size_t r = rows.begin; r < rows.end; ++r) {
                finish_channel(r, sums + (r - rows.begin) * tile_.width, n_positions);
            }
        }
        each_image(t, [&](std::size_t lane, std::size_t n, std::size_t y) {
            for (std::size_t r = rows.begin; r < rows.end; ++r) {
                const T* const from = sums + (r - rows.begin) * tile_.width + lane;
                if constexpr (sizeof(T) == 4) {
                    if (complete && halves_ != nullptr) {
                        kernels_.f32_to_bf16(from, n, halves_ + y + r * plane_);
                        continue;
                    }
                }
                detail::copy_row(from, n, y_ + y + r * plane_);
            }
        });
    }

    const GemmKernels& kernels_;
    const Tile& tile_;
    const ImageTiles<T> image_;
    // y; where it is wanted in bf16 that is halves_, and sums rest in wide_y_, if they do.
    T* y_;
    Half* const halves_;
    detail::AlignedArray<T> wide_y_;
    const std::size_t plane_;      // elements of one output channel of one image
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
