// SPDX-License-Identifier: Apache-2.0
// x @ W: columns of blocks.
#include "dispatch/tile_registers.hpp"
#include "gemm/matmul_typed.hpp"
#include "gemm/transpose.hpp"

namespace pydedup {
namespace {

using detail::ceil_div;
using detail::PackedX;
using detail::WeightReader;

// Bytes of y that a task of a transposed product adds to.
constexpr std::size_t kMaxSumBytes = std::size_t{256} << 10;

}  // namespace

template <class T>
std::size_t Matmul::Typed<T>::columns_together(unsigned threads) const noexcept {
    const std::size_t rows = std::min(p_.m, detail::kMaxTaskRows);
    const std::size_t fitting = kMaxSumBytes / (rows * p_.grid.block_cols * sizeof(T));
    const std::size_t enough = p_.grid.grid_cols() / (detail::kPiecesPerThread * threads);
    return std::max<std::size_t>(std::min(fitting, enough), 1);
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_nn_tiles(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                         std::size_t column0, std::size_t column1, std::size_t t0,
                                         std::size_t t1, Worker& worker) const {
    std::optional<TileRegisters> registers;
    if constexpr (!std::is_same_v<E, T>) registers.emplace(kernels_.bf16);
    const BlockGrid& grid = p_.grid;
    const std::size_t columns = grid.grid_cols();
    const std::size_t end = fed_ + blocks.size();
    const std::size_t sum0 = x.sums_before(t0);
    const std::size_t per_column = x.sums_before(t1) - sum0;
    const auto width = [&](std::size_t column) { return block_rect(grid, column).cols; };
    const std::size_t last_end = (column1 - column0 - 1) * grid.block_cols + width(column1 - 1);
    T* const sums = worker.sums.at_least(per_column * last_end);
    const auto sums_of = [&](std::size_t column, std::size_t t) {
        return sums + per_column * (column - column0) * grid.block_cols +
               (x.sums_before(t) - sum0) * width(column);
    };
    const auto y_of = [&](std::size_t column, std::size_t t) {
        return y_ + x.tile(t).row0 * n_ + column * grid.block_cols;
    };
    const auto first_of = [&](std::size_t column) {
        return column + ceil_div(fed_ - std::min(fed_, column), columns) * columns;
    };
    for (std::size_t column = column0; column < column1; ++column) {
        if (first_of(column) >= end) continue;
        for (std::size_t t = t0; t < t1; ++t) {
            const auto& tile = x.tile(t);
            T* const to = sums_of(column, t);
            if (first_of(column) == column) {
                std::fill_n(to, tile.sums() * width(column), T{0});
            } else {
                detail::transpose(y_of(column, t), n_, tile.rows, width(column), to, tile.sums());
            }
        }
    }
    const std::size_t strip = columns_in_a_pass(x.tile(t0).kernel->width);
    for (std::size_t row = fed_ / columns; row * columns < end; ++row) {
        const std::size_t begin = std::max(fed_, row * columns + column0);
        const std::size_t stop = std::min(end, row * columns + column1);
        for (std::size_t number = begin; number < stop; ++number) {
            const BlockView& block = blocks[number - fed_];
            T* const w = worker.apart.at_least(std::size_t{block.rows} * block.cols);
            detail::transpose(worker.reader.read(block), block.cols, block.rows, block.cols, w,
                              block.rows);
            const std::size_t after = number + 1 < stop ? number + 1 : begin + columns;
            const Next<E> next = next_block<E>(blocks, after - fed_);
            if constexpr (!std::is_same_v<E, T>) {
                const std::size_t column = number % columns;
                BlockRect rect = block_rect(grid, column);
                rect.rows = rect.cols;  // of W, exchanged
                cut_and_multiply(x, row, {w, block.cols, block.rows}, next, std::nullopt,
                                 TileSums{sums_of(column, t0), rect, t0, t1}, worker);
            } else {
                for (std::size_t r = 0; r < block.rows; r += strip) {
                    const std::size_t n = std::min<std::size_t>(strip, block.rows - r);
                    for (std::size_t t = t0; t < t1; ++t) {
                        const Next<T> part =
                            next.part(r * block.cols, n * block.cols, t - t0, t1 - t0);
                        x.tile(t).kernel->tile_nt(x.at(row, t, r), w + r, block.cols, n, block.rows,
                                                  {part.begin, part.end, nullptr, nullptr},
                                                  sums_of(number % columns, t));
                    }
                }
            }
        }
    }
    for (std::size_t column = column0; column < column1; ++column) {
        if (first_of(column) >= end) continue;
        for (std::size_t t = t0; t < t1; ++t) {
            const auto& tile = x.tile(t);
            detail::transpose_apart(sums_of(column, t), tile.sums(), width(column), tile.rows,
                                    y_of(column, t), n_);
        }
        if (end + columns > grid.count() + column) {
            const std::size_t rows = x.tile(t1 - 1).row0 + x.tile(t1 - 1).rows;
            finish(x.tile(t0).row0, rows, column * grid.block_cols, width(column));
        }
    }
}

template <class T>
void Matmul::Typed<T>::multiply_nn(std::span<const BlockView> blocks, std::size_t column0,
                                   std::size_t column1, std::size_t i0, std::size_t i1,
                                   WeightReader<T>& reader) const {
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

template std::size_t Matmul::Typed<float>::columns_together(unsigned) const noexcept;
template void Matmul::Typed<float>::multiply_nn_tiles(const PackedX<float, float>&,
                                                      std::span<const BlockView>, std::size_t,
                                                      std::size_t, std::size_t, std::size_t,
                                                      Worker&) const;
template void Matmul::Typed<float>::multiply_nn_tiles(const PackedX<std::uint16_t, float>&,
                                                      std::span<const BlockView>, std::size_t,
                                                      std::size_t, std::size_t, std::size_t,
                                                      Worker&) const;
template void Matmul::Typed<float>::multiply_nn(std::span<const BlockView>, std::size_t,
                                                std::size_t, std::size_t, std::size_t,
                                                WeightReader<float>&) const;
template std::size_t Matmul::Typed<double>::columns_together(unsigned) const noexcept;
template void Matmul::Typed<double>::multiply_nn_tiles(const PackedX<double, double>&,
                                                       std::span<const BlockView>, std::size_t,
                                                       std::size_t, std::size_t, std::size_t,
                                                       Worker&) const;
template void Matmul::Typed<double>::multiply_nn(std::span<const BlockView>, std::size_t,
                                                 std::size_t, std::size_t, std::size_t,
                                                 WeightReader<double>&) const;

}  // namespace pydedup
