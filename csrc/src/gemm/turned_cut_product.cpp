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
// Longer rows gain nothing (measured).
constexpr std::size_t kMostColumnsOfStrip = 768;
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
        problem.variants != nullptr || !problem.places.empty() || grid.cols > kMostColumnsOfStrip) {
        return;
    }
    // Packing W is work that packing x is not, and comes out even with a third of these (measured).
    if (problem.m < 3 * grid.rows * grid.cols / (grid.cols + 2 * grid.rows)) return;
    const std::size_t bytes = tiles_of_panel() * elements_of_tile() * sizeof(std::uint16_t);
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
    const std::size_t begin = chunk * chunk_;
    const std::size_t end = std::min(rows_, begin + chunk_);
    std::uint16_t* const w = packed.at_least(panels_ * tiles_of_panel() * elements_of_tile());
    if (pack(blocks, group, reader, w)) {
        multiply_packed(begin, end, group, w, strips, otherwise);
    } else {
        otherwise(begin, end - begin);
    }
}

bool TurnedCutProduct::pack(std::span<const BlockView> blocks, std::size_t group,
                            WeightReader<float>& reader, std::uint16_t* to) const {
    constexpr std::size_t kPart = kTurnedRows * kCutColumns;
    const BlockGrid& grid = problem_.grid;
    const std::size_t steps_of_block = grid.block_cols / kCutColumns;
    const auto [first, end] = panels(group);
    for (std::size_t number = first * grid.grid_cols(); number < end * grid.grid_cols(); ++number) {
        const BlockView& block = blocks[number];
        const std::size_t tile0 = (number / grid.grid_cols() - first) * tiles_of_panel();
        const std::size_t step0 = number % grid.grid_cols() * steps_of_block;
        const float* const w = reader.read(block);
        for (std::size_t r = 0; r < block.rows; r += kTurnedRows) {
            const std::size_t rows = std::min<std::size_t>(kTurnedRows, block.rows - r);
            std::uint16_t* step =
                to + (tile0 + r / kTurnedRows) * elements_of_tile() + step0 * kTurnedCutStep;
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

void TurnedCutProduct::multiply_packed(std::size_t row, std::size_t end, std::size_t group,
                                       const std::uint16_t* packed, Scratch<std::uint16_t>& strips,
                                       const Otherwise& otherwise) const {
    const BlockGrid& grid = problem_.grid;
    const auto [first_panel, end_panel] = panels(group);
    const std::size_t column = first_panel * grid.block_rows;
    const std::size_t columns = std::min(end_panel * grid.block_rows, grid.rows) - column;
    std::uint16_t* strip = strips.at_least(2 * elements_of_tile());
    std::uint16_t* other = strip + elements_of_tile();
    const auto rows_from = [&](std::size_t from, std::uint16_t* to) {
        return RowsToCut{x_ + from * grid.cols, grid.cols, std::min(kTurnedRows, end - from),
                         grid.cols, to};
    };
    bool is_cut = kernels_.cut_strip(rows_from(row, strip));
    while (row < end) {
        if (!is_cut) {
            const std::size_t count = std::min(kTurnedRows, end - row);
            otherwise(row, count);
            row += count;
            is_cut = kernels_.cut_strip(rows_from(row, strip));
            continue;
        }
        const TileRegisters registers(kernels_);  // `otherwise` has its own
        for (; is_cut && row < end; std::swap(strip, other)) {
            const std::size_t count = std::min(kTurnedRows, end - row);
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
