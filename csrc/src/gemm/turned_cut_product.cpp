// SPDX-License-Identifier: Apache-2.0
#include "gemm/turned_cut_product.hpp"

#include "dispatch/tile_registers.hpp"
#include "gemm/activation.hpp"
#include "gemm/packed_x.hpp"

namespace pydedup::detail {
namespace {

// Weights of a group: they stay in a second-level cache of 2 MiB beside two strips of x.
constexpr std::size_t kPackedBytes = std::size_t{1280} << 10;
// A group has so many columns of y at least: x is cut for each.
constexpr std::size_t kLeastColumns = 128;
// Longer rows gain nothing, nor do few of them, as W is packed by then (measured: with 384 columns
// 512 rows take as long, with 768 columns 1024).
constexpr std::size_t kMostColumnsOfStrip = 768;
constexpr std::size_t kLeastRows = 640;
// Strips of a task at least: the first one is cut before anything is multiplied.
constexpr std::size_t kLeastStrips = 4;
constexpr std::size_t kTasksPerThread = 4;

}  // namespace

TurnedCutProduct::TurnedCutProduct(const Matmul::Problem& problem, const GemmKernels& kernels,
                                   const float* x, float* y, unsigned threads)
    : problem_(problem),
      kernels_(kernels.bf16),
      x_(x),
      bias_(reinterpret_cast<const float*>(problem.bias)),
      y_(y) {
    const BlockGrid& grid = problem.grid;
    // Blocks fill steps of columns and tiles of rows, but for the last ones.
    const bool fills = (grid.block_cols % kCutColumns == 0 || grid.grid_cols() == 1) &&
                       (grid.block_rows % kTurnedRows == 0 || grid.grid_rows() == 1);
    if (kernels_.turned_cut == nullptr || y == nullptr || problem.transpose || !fills ||
        problem.variants != nullptr || !problem.places.empty() || grid.cols > kMostColumnsOfStrip ||
        problem.m < kLeastRows || 2 * problem.m < 3 * std::size_t{grid.cols}) {
        return;
    }
    const std::size_t bytes = tiles_of_panel() * elements_of_tile() * sizeof(std::uint16_t);
    const std::size_t fitting = kPackedBytes / bytes;
    if (fitting * tiles_of_panel() * kTurnedRows < kLeastColumns) return;
    const std::size_t rest = problem.m % kTurnedRows;
    rows_ = problem.m - (fill(rest, kTurnedRows) ? 0 : rest);
    const std::size_t strips = ceil_div(rows_, kTurnedRows);
    const std::size_t tasks = std::min(
        kTasksPerThread * threads, round_up(ceil_div(strips, kLeastStrips), std::size_t{threads}));
    chunk_ = ceil_div(strips, tasks) * kTurnedRows;
    panels_ = ceil_div(grid.grid_rows(), ceil_div(grid.grid_rows(), fitting));
}

bool TurnedCutProduct::pack(const BlockView& block, std::size_t number, std::size_t group,
                            WeightReader<float>& reader, std::uint16_t* packed) const {
    constexpr std::size_t kPart = kTurnedRows * kCutColumns;
    const BlockGrid& grid = problem_.grid;
    const std::size_t panel = number / grid.grid_cols() - panels(group).first;
    const std::size_t step0 = number % grid.grid_cols() * grid.block_cols / kCutColumns;
    std::uint16_t* const to =
        packed + panel * tiles_of_panel() * elements_of_tile() + step0 * kTurnedCutStep;
    const float* const w = reader.read(block);
    for (std::size_t r = 0; r < block.rows; r += kTurnedRows) {
        const std::size_t rows = std::min<std::size_t>(kTurnedRows, block.rows - r);
        std::uint16_t* step = to + r / kTurnedRows * elements_of_tile();
        for (std::size_t c = 0; c < block.cols; c += kCutColumns, step += kTurnedCutStep) {
            const std::size_t cols = std::min<std::size_t>(kCutColumns, block.cols - c);
            if (rows < kTurnedRows || cols < kCutColumns) {
                std::fill_n(step, kTurnedCutStep, std::uint16_t{0});
            }
            if (kernels_.pack_cut(w + r * block.cols + c, block.cols, rows, cols, step, kPart,
                                  2 * kTurnedRows) != 0) {
                return false;
            }
        }
    }
    return true;
}

void TurnedCutProduct::multiply(const Rows& rows, std::size_t group, const std::uint16_t* packed,
                                Scratch<std::uint16_t>& strips,
                                const std::function<void(const Rows&)>& otherwise) const {
    const BlockGrid& grid = problem_.grid;
    const auto [first, end] = panels(group);
    const std::size_t column = first * grid.block_rows;
    const std::size_t columns = std::min<std::size_t>(end * grid.block_rows, grid.rows) - column;
    const std::size_t end_of_rows = rows.begin + rows.count;
    std::uint16_t* strip = strips.at_least(2 * elements_of_tile());
    std::uint16_t* other = strip + elements_of_tile();
    const auto rows_from = [&](std::size_t row, std::uint16_t* to) {
        return RowsToCut{x_ + row * grid.cols, grid.cols, std::min(kTurnedRows, end_of_rows - row),
                         grid.cols, to};
    };
    std::size_t row = rows.begin;
    bool is_cut = kernels_.cut_strip(rows_from(row, strip));
    while (row < end_of_rows) {
        if (!is_cut) {
            const std::size_t count = std::min(kTurnedRows, end_of_rows - row);
            otherwise({row, count});
            row += count;
            is_cut = kernels_.cut_strip(rows_from(row, strip));
            continue;
        }
        const TileRegisters registers(kernels_);  // `otherwise` has its own
        for (; is_cut && row < end_of_rows; std::swap(strip, other)) {
            const std::size_t count = std::min(kTurnedRows, end_of_rows - row);
            float* const y = y_ + row * grid.rows + column;
            const float* const bias = bias_ == nullptr ? nullptr : bias_ + column;
            row += count;
            is_cut = kernels_.turned_cut(
                {strip, packed, count, columns, bias, rows_from(row, other)}, y, grid.rows);
            for (std::size_t i = 0; i < count && problem_.activation != Activation::none; ++i) {
                finish_row<float>(y + i * grid.rows, columns, nullptr, problem_.activation);
            }
        }
    }
}

}  // namespace pydedup::detail
