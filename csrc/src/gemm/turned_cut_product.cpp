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
// Longer rows are multiplied so many columns after others, and sums rest in y in between. More of
// those gain nothing (measured).
constexpr std::size_t kColumnsOfPass = 768;
constexpr std::size_t kMostColumns = 2 * kColumnsOfPass;
// A task has so many rows at least, if there is more than one for each thread: W is packed for
// each.
constexpr std::size_t kLeastRowsOfTask = 2048;
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
        problem.variants != nullptr || !problem.places.empty() || grid.cols > kMostColumns) {
        return;
    }
    // Packing W is work that packing x is not, and comes out even with a third of these (measured).
    if (problem.m < 3 * grid.rows * grid.cols / (grid.cols + 2 * grid.rows)) return;
    const std::size_t passes = ceil_div(grid.cols, kColumnsOfPass);
    pass_ = std::min(round_up(ceil_div(grid.cols, passes), grid.block_cols), grid.cols);
    const std::size_t bytes = tiles_of_panel() * elements_of_tile(pass_) * sizeof(std::uint16_t);
    const std::size_t fitting = kPackedBytes / bytes;
    if (fitting * tiles_of_panel() * kTurnedRows < kLeastColumns) return;
    const std::size_t rest = problem.m % kTurnedRows;
    rows_ = problem.m - (fill(rest, kTurnedRows) ? 0 : rest);
    // With few rows each thread has its own groups, if that comes out even, and W is packed once;
    // with many, x is cut for as few groups as there can be.
    const std::size_t panels = grid.grid_rows();
    std::size_t groups = ceil_div(panels, fitting);
    const std::size_t shared = round_up(groups, std::size_t{threads});
    if (rows_ < kLeastRowsOfTask && panels % shared == 0) groups = shared;
    std::size_t chunks = 1;
    while (groups * chunks % threads != 0) ++chunks;
    while (groups * chunks < kTasksPerThread * threads && rows_ >= 2 * chunks * kLeastRowsOfTask) {
        chunks *= 2;
    }
    panels_ = ceil_div(panels, groups);
    chunk_ = round_up(ceil_div(rows_, chunks), kTurnedRows);
}

void TurnedCutProduct::multiply(std::size_t chunk, std::size_t group,
                                std::span<const BlockView> blocks, WeightReader<float>& reader,
                                Scratch<std::uint16_t>& packed, Scratch<std::uint16_t>& strips,
                                const Otherwise& otherwise) const {
    const std::size_t cols = problem_.grid.cols;
    Part part{chunk * chunk_, std::min(rows_, (chunk + 1) * chunk_), 0, 0};
    std::uint16_t* const w = packed.at_least(panels_ * tiles_of_panel() * elements_of_tile(pass_));
    std::vector<bool> uncut(ceil_div(part.end - part.row, kTurnedRows));
    for (; part.column < cols; part.column += part.columns) {
        part.columns = std::min(pass_, cols - part.column);
        if (!pack(blocks, group, part, reader, w)) return otherwise(part.row, part.end - part.row);
        multiply_part(part, group, w, strips, uncut);
    }
    for (std::size_t i = 0; i < uncut.size(); ++i) {
        const std::size_t row = part.row + i * kTurnedRows;
        if (uncut[i]) otherwise(row, std::min(kTurnedRows, part.end - row));
    }
}

bool TurnedCutProduct::pack(std::span<const BlockView> blocks, std::size_t group, const Part& part,
                            WeightReader<float>& reader, std::uint16_t* to) const {
    constexpr std::size_t kPart = kTurnedRows * kCutColumns;
    const BlockGrid& grid = problem_.grid;
    const std::size_t elements = elements_of_tile(part.columns);
    const std::size_t first_block = part.column / grid.block_cols;
    const std::size_t blocks_of_part = ceil_div(part.columns, grid.block_cols);
    const auto [first, end] = panels(group);
    for (std::size_t i = 0; i < (end - first) * blocks_of_part; ++i) {
        const std::size_t panel = i / blocks_of_part;
        const std::size_t b = i % blocks_of_part;
        const BlockView& block = blocks[(first + panel) * grid.grid_cols() + first_block + b];
        const std::size_t step0 = b * (grid.block_cols / kCutColumns);
        const float* const w = reader.read(block);
        for (std::size_t r = 0; r < block.rows; r += kTurnedRows) {
            const std::size_t rows = std::min<std::size_t>(kTurnedRows, block.rows - r);
            std::uint16_t* step = to + (panel * tiles_of_panel() + r / kTurnedRows) * elements +
                                  step0 * kTurnedCutStep;
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
    }
    return true;
}

void TurnedCutProduct::multiply_part(const Part& part, std::size_t group,
                                     const std::uint16_t* packed, Scratch<std::uint16_t>& strips,
                                     std::vector<bool>& uncut) const {
    const BlockGrid& grid = problem_.grid;
    const auto [first, end_panel] = panels(group);
    const std::size_t column = first * grid.block_rows;
    const std::size_t columns = std::min(end_panel * grid.block_rows, grid.rows) - column;
    const bool is_last = part.column + part.columns == grid.cols;
    const float* const bias = bias_ == nullptr || !is_last ? nullptr : bias_ + column;
    std::uint16_t* strip = strips.at_least(2 * elements_of_tile(part.columns));
    std::uint16_t* other = strip + elements_of_tile(part.columns);
    const auto rows_from = [&](std::size_t row, std::uint16_t* to) {
        return RowsToCut{x_ + row * grid.cols + part.column, grid.cols,
                         std::min(kTurnedRows, part.end - row), part.columns, to};
    };
    const TileRegisters registers(kernels_);
    bool is_cut = kernels_.cut_strip(rows_from(part.row, strip));
    for (std::size_t row = part.row; row < part.end; std::swap(strip, other)) {
        const std::size_t number = (row - part.row) / kTurnedRows;
        const std::size_t count = std::min(kTurnedRows, part.end - row);
        float* const y = y_ + row * grid.rows + column;
        row += count;
        const RowsToCut next = rows_from(row, other);
        if (!is_cut) uncut[number] = true;
        if (uncut[number]) {
            is_cut = kernels_.cut_strip(next);
            continue;
        }
        is_cut = kernels_.turned_cut({strip, packed, count, columns, part.column == 0, bias, next},
                                     y, grid.rows);
        for (std::size_t i = 0; i < count && is_last; ++i) {
            if (problem_.activation == Activation::none) break;
            finish_row<float>(y + i * grid.rows, columns, nullptr, problem_.activation);
        }
    }
}

}  // namespace pydedup::detail
