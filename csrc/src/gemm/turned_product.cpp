// SPDX-License-Identifier: Apache-2.0
#include "gemm/turned_product.hpp"

#include <algorithm>

#include "base/rounding.hpp"
#include "dispatch/tile_registers.hpp"
#include "gemm/activation.hpp"
#include "gemm/ahead.hpp"
#include "gemm/bf16_parts.hpp"
#include "gemm/packed_x.hpp"

namespace pydedup::detail {
namespace {

// Weights of a task, and rows of x that they are multiplied with while those are in the
// second-level cache; columns of both that are so from the first one.
constexpr std::size_t kPackedBytes = std::size_t{768} << 10;
constexpr std::size_t kRows = 64;
constexpr std::size_t kColumnsInAPass = 384;
// A group has so many columns of y at least: x is read from memory for each.
constexpr std::size_t kLeastColumns = 128;
// A task has so many rows at least, if there is more than one for each thread.
constexpr std::size_t kLeastRows = 256;
// Strips by more columns are no faster where y is in bf16 (measured).
constexpr std::size_t kMostColumnsOfStrip = 512;
// Rows of x that a tile takes at once.
constexpr std::size_t kRowsOfTile = 8;

// Whether kernels take strips of rows by many tiles.
bool takes_strips(const GemmKernels& kernels) noexcept {
    return kernels.bf16.turned_to_bf16 != nullptr;
}

// Elements of W that are packed for one column of y.
std::size_t packed_columns(const BlockGrid& grid, const GemmKernels& kernels) noexcept {
    return round_up(grid.cols, takes_strips(kernels) ? kCutColumns : std::size_t{2});
}

}  // namespace

TurnedProduct::TurnedProduct(const Matmul::Problem& problem, const GemmKernels& kernels, float* y,
                             unsigned threads)
    : problem_(problem),
      kernels_(kernels),
      tile_(kernels.bf16.tiles[0]),
      bias_(reinterpret_cast<const float*>(problem.bias)),
      y_(y),
      halves_(problem.y_is_bf16 ? reinterpret_cast<std::uint16_t*>(problem.y) : nullptr) {
    const BlockGrid& grid = problem.grid;
    const std::size_t panels = grid.grid_rows();
    // Of the last rows of a panel some may be there only to fill up a tile.
    const std::size_t rows =
        round_up(std::min<std::size_t>(grid.block_rows, grid.rows), tile_.width);
    const std::size_t bytes = rows * packed_columns(grid, kernels) * sizeof(std::uint16_t);
    // Columns are to be added up in the order of blocks.
    const std::size_t together = takes_strips(kernels) ? kCutColumns : 2;
    const bool has_pairs = grid.block_cols % together == 0 || grid.grid_cols() == 1;
    if (!problem.x_is_bf16 || problem.weights != Dtype::bf16 || problem.variants != nullptr ||
        !problem.places.empty() || tile_.group != 2 || !has_pairs ||
        (tile_.tile_nt_pieces != nullptr && !takes_strips(kernels)) ||
        (takes_strips(kernels) && y == nullptr && grid.cols > kMostColumnsOfStrip) ||
        kPackedBytes / bytes * rows < kLeastColumns || 8 * rows * panels > 9 * grid.rows) {
        return;
    }
    const std::size_t rest = problem.m % tile_.width;
    rows_ = problem.m - (fill(rest, tile_.width) ? 0 : rest);
    const std::size_t groups = ceil_div(panels, kPackedBytes / bytes);
    std::size_t chunks = 1;
    while (groups * chunks % threads != 0) ++chunks;
    // It saves work on x and y, and has more on W for each chunk: with so many rows it is even
    // (measured).
    const std::size_t even = ceil_div(grid.rows * grid.cols, grid.cols + 2 * grid.rows);
    const std::size_t least = std::max(kLeastRows, 2 * even);
    while (groups * chunks < 4 * std::size_t{threads} && rows_ >= 2 * chunks * least) {
        chunks *= 2;
    }
    const std::size_t chunk =
        round_up(ceil_div(rows_, chunks), takes_strips(kernels) ? kTurnedRows : kRowsOfTile);
    if (chunk < even) return;
    panels_ = ceil_div(panels, groups);
    chunk_ = chunk;
}

void TurnedProduct::multiply(std::size_t chunk, std::size_t group,
                             std::span<const BlockView> blocks, WeightReader<float>& reader,
                             Scratch<std::uint16_t>& packed, Scratch<float>& sums,
                             std::atomic<bool>& subnormal) const {
    const std::size_t begin = chunk * chunk_;
    const std::size_t end = std::min(rows_, begin + chunk_);
    const std::size_t cols = problem_.grid.cols;
    const std::vector<Columns> tiles = pack(blocks, group, reader, packed);
    const bool in_strips = takes_strips(kernels_);
    const std::size_t strip = in_strips ? kTurnedRows : kRows;
    float* const acc = sums.at_least(strip * tile_.width);
    const TileRegisters registers(kernels_.bf16);
    for (std::size_t row = begin; row < end; row += strip) {
        const Rows rows{row, std::min(strip, end - row)};
        const std::uint16_t* const x = x_at(row);
        const std::size_t count = rows.count * cols;
        const std::size_t done = in_strips ? multiply_strip(rows, end, tiles, subnormal) : 0;
        // Once for each row.
        if (done == 0 && group == 0 && has_subnormal(x, count)) subnormal = true;
        if (subnormal) return;
        const std::size_t next = std::min(strip, end - row - rows.count) * cols;
        const auto next_at = [&](std::size_t t) { return x + count + t * next / tiles.size(); };
        for (std::size_t t = done; t < tiles.size(); ++t) {
            ask_for_y(rows, tiles[t]);
            if (in_strips) {
                const GemmPiece<std::uint16_t> piece{tiles[t].weights, x, cols, cols, nullptr};
                tile_.tile_nt_pieces(&piece, 1, rows.count, true, acc);
            } else {
                std::fill_n(acc, rows.count * tile_.width, 0.0F);
                for (std::size_t c = 0; c < cols; c += kColumnsInAPass) {
                    tile_.tile_nt(tiles[t].weights + c * tile_.width, x + c, rows.count,
                                  std::min(kColumnsInAPass, cols - c), cols,
                                  {next_at(t), next_at(t + 1), nullptr, nullptr}, acc);
                }
            }
            store(rows, tiles[t], acc);
        }
    }
}

std::size_t TurnedProduct::multiply_strip(const Rows& rows, std::size_t end,
                                          std::span<const Columns> tiles,
                                          std::atomic<bool>& subnormal) const {
    if (rows.count < kTurnedRows || problem_.activation != Activation::none) return 0;
    std::size_t full = 0;
    while (full < tiles.size() && tiles[full].count == tile_.width) ++full;
    if (full == 0) return 0;
    const BlockGrid& grid = problem_.grid;
    const std::size_t column = tiles.front().begin;
    const std::size_t after = rows.begin + kTurnedRows;
    const TurnedRows given{x_at(rows.begin),
                           grid.cols,
                           grid.cols,
                           tiles.front().weights,
                           full,
                           tile_.width * packed_columns(grid, kernels_),
                           bias_ == nullptr ? nullptr : bias_ + column,
                           after + kTurnedRows <= end ? x_at(after) : nullptr};
    const std::size_t at = rows.begin * grid.rows + column;
    const bool found = y_ == nullptr ? kernels_.bf16.turned_to_bf16(given, halves_ + at, grid.rows)
                                     : kernels_.bf16.turned_to_f32(given, y_ + at, grid.rows);
    if (found) subnormal = true;
    return full;
}

std::vector<TurnedProduct::Columns> TurnedProduct::pack(std::span<const BlockView> blocks,
                                                        std::size_t group,
                                                        WeightReader<float>& reader,
                                                        Scratch<std::uint16_t>& memory) const {
    const BlockGrid& grid = problem_.grid;
    const auto [first, end] = panels(group);
    const std::size_t elements = tile_.width * packed_columns(grid, kernels_);
    std::vector<Columns> tiles;
    for (std::size_t p = first; p < end; ++p) {
        const BlockRect rect = block_rect(grid, p * grid.grid_cols());
        for (std::size_t r = 0; r < rect.rows; r += tile_.width) {
            tiles.push_back({rect.row0 + r, std::min(tile_.width, rect.rows - r), nullptr});
        }
    }
    std::uint16_t* to = memory.at_least(tiles.size() * elements);
    for (Columns& tile : tiles) {
        tile.weights = to;
        // Zeros: of a tile that is not full anywhere, else for columns behind the last.
        const bool is_full = tile.count == tile_.width;
        const std::size_t used = is_full ? tile_.width * round_up(grid.cols, std::size_t{2}) : 0;
        std::fill_n(to + used, elements - used, std::uint16_t{0});
        to += elements;
    }
    std::size_t tile0 = 0;  // of the panel
    for (std::size_t p = first; p < end; ++p) {
        const std::size_t number = p * grid.grid_cols();
        for (std::size_t b = 0; b < grid.grid_cols(); ++b) {
            const BlockView& block = blocks[number + b];
            const auto* const w = reader.as<std::uint16_t>(block);
            for (std::size_t r = 0; r < block.rows; r += tile_.width) {
                const Columns& columns = tiles[tile0 + r / tile_.width];
                kernels_.bf16.pack_pairs(w + r * block.cols, block.cols, columns.count, block.cols,
                                         columns.weights + b * grid.block_cols * tile_.width,
                                         2 * tile_.width);
            }
        }
        tile0 += ceil_div(block_rect(grid, number).rows, tile_.width);
    }
    return tiles;
}

void TurnedProduct::ask_for_y(const Rows& rows, const Columns& columns) const noexcept {
    const std::size_t ld = problem_.grid.rows;
    const std::size_t at = rows.begin * ld + columns.begin;
    if (y_ != nullptr) {
        ask_to_write(y_ + at, ld, rows.count, columns.count);
    } else {
        ask_to_write(halves_ + at, ld, rows.count, columns.count);
    }
}

void TurnedProduct::store(const Rows& rows, const Columns& columns, float* sums) const noexcept {
    const float* const bias = bias_ == nullptr ? nullptr : bias_ + columns.begin;
    const std::size_t ld = problem_.grid.rows;
    const bool is_finished = y_ == nullptr && problem_.activation == Activation::none;
    for (std::size_t i = 0; i < rows.count && !is_finished; ++i) {
        finish_row(sums + i * tile_.width, columns.count, bias, problem_.activation);
    }
    if (y_ == nullptr) {
        kernels_.bf16.rows_to_bf16(sums, tile_.width, rows.count, columns.count,
                                   is_finished ? bias : nullptr,
                                   halves_ + rows.begin * ld + columns.begin, ld);
        return;
    }
    for (std::size_t i = 0; i < rows.count; ++i) {
        std::copy_n(sums + i * tile_.width, columns.count,
                    y_ + (rows.begin + i) * ld + columns.begin);
    }
}

}  // namespace pydedup::detail
