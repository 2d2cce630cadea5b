// SPDX-License-Identifier: Apache-2.0
// Products with x in tiles, as the micro-kernels read it (packed_x.hpp).
#include <algorithm>

#include "dispatch/tile_registers.hpp"
#include "gemm/activation.hpp"
#include "gemm/matmul_typed.hpp"
#include "gemm/transpose.hpp"

namespace pydedup {
namespace {

using detail::AlignedArray;
using detail::PackedX;

}  // namespace

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_panels(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                       std::size_t begin, std::size_t end, std::size_t t0,
                                       std::size_t t1, Worker& worker) const {
    while (begin < end) {
        const Rows rows = rows_from(begin, end, blocks.size());
        multiply_tiles(x, blocks, rows, t0, t1, worker);
        begin += rows.count;
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_packed(Packing<E, T>& packing, std::span<const BlockView> blocks,
                                       std::size_t first, std::size_t panels, unsigned threads) {
    if constexpr (!std::is_same_v<E, T>) {
        if (blocks.size() == count() && multiply_turned(packing, blocks, threads)) return;
    }
    if (const std::size_t chunks = chunks_of(packing, blocks, threads); chunks != 0) {
        const std::size_t tiles = detail::ceil_div(packing.rows, packing.width);
        // The larger chunks first: threads that take them in turns end at the same time.
        const auto row_of = [&](std::size_t chunk) {
            const std::size_t tile = detail::even_part(tiles, chunks, chunk);
            return std::min(packing.rows, tile * packing.width);
        };
        each_task(chunks, threads, [&](std::size_t i, Worker& worker) {
            const std::size_t row0 = row_of(i);
            const auto x =
                packing.pack(row0, row_of(i + 1) - row0, 1, worker.template memory_of_x<E>());
            if (subnormal_) return;  // found here, or by another thread
            const std::size_t together = panels_together(x, panels, p_.grid.block_rows, 1);
            for (std::size_t row = 0; row < panels; row += together) {
                multiply_panels(x, blocks, row, std::min(panels, row + together), 0, x.n_tiles(),
                                worker);
            }
        });
        return;
    }
    const PackedX<E, T>& x = packed_whole(packing);
    if (subnormal_) return;
    pack_alone(packing, threads);
    const bool is_one_task = !packing.alone.empty();
    // Of the last panel what comes later will need the sums.
    const std::size_t last = first + panels - 1;
    if (!part_of_row(last, blocks.size()).ends) {
        to_go_on_ = AlignedArray<T>((x.sums_before(x.n_tiles()) + packing.sums_alone) *
                                    block_rect(p_.grid, last * p_.grid.grid_cols()).rows);
    }
    const std::size_t together = panels_together(x, panels, p_.grid.block_rows, threads);
    run(detail::ceil_div(panels, together), is_one_task ? 1 : x.n_tiles(), packing.width, threads,
        [&](const Task& task, Worker& worker) {
            const std::size_t row = task.panel * together;
            multiply_panels(x, blocks, first + row, first + std::min(panels, row + together),
                            task.unit0, is_one_task ? x.n_tiles() : task.unit1, worker);
        });
    begun_ = std::move(to_go_on_);
}

template <class T>
template <class E>
std::size_t Matmul::Typed<T>::chunks_of(const Packing<E, T>& packing,
                                        std::span<const BlockView> blocks,
                                        unsigned threads) const noexcept {
    if (p_.variants != nullptr || blocks.size() != count()) return 0;
    const std::size_t tiles = detail::ceil_div(packing.rows, packing.width);
    const auto tiles_of = [&](std::size_t rows) { return detail::ceil_div(rows, packing.width); };
    // What has to be decoded, widened or cut is so once for each chunk.
    const bool is_here = std::ranges::all_of(blocks, [](const BlockView& block) {
        return detail::WeightReader<T>::template is_here<E>(block);
    });
    std::size_t bytes = detail::kChunkBytes;
    const std::size_t wanted = is_here ? detail::kMinChunkRows : detail::kMaxTaskRows;
    std::size_t least = is_here ? detail::kLeastChunkRows : detail::kMaxTaskRows * 3 / 4;
    std::size_t enough = threads == 1 ? 1 : 2 * threads;
    if (is_here && cuts_w<E>()) {
        // Cutting is for all of W, the way of x between cores for all of x.
        bytes = detail::kCutChunkBytes;
        least = std::clamp(detail::kCutRowsOfPanel * p_.grid.grid_rows(), detail::kLeastCutRows,
                           detail::kEnoughCutRows);
        enough = threads;
    }
    const std::size_t fitting = bytes / (packing.bytes_of_row * packing.width);
    const std::size_t most = std::clamp(fitting, tiles_of(wanted), tiles_of(detail::kMaxTaskRows));
    const std::size_t chunks =
        std::max(detail::round_up(detail::ceil_div(tiles, most), std::size_t{threads}), enough);
    return packing.rows < chunks * least ? 0 : chunks;
}

template <class T>
auto Matmul::Typed<T>::rows_from(std::size_t row, std::size_t end,
                                 std::size_t n_blocks) const noexcept -> Rows {
    std::size_t count = 0;
    while (row + count < end) {
        const Part part = part_of_row(row + count, n_blocks);
        if (!part.starts || !part.ends) break;
        ++count;
    }
    return {row, std::max<std::size_t>(count, 1)};
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_tiles(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                      const Rows& rows, std::size_t t0, std::size_t t1,
                                      Worker& worker) const {
    std::optional<TileRegisters> registers;
    if constexpr (!std::is_same_v<E, T>) registers.emplace(kernels_.bf16);
    if (p_.variants != nullptr) {
        multiply_for_members(x, blocks, rows, t0, t1, worker);
        return;
    }
    if (takes_whole_rows(x, blocks, rows)) {
        multiply_whole_rows(x, blocks, rows, t0, t1, worker);
        return;
    }
    const std::size_t grid_cols = p_.grid.grid_cols();
    const Part part = part_of_row(rows.first, blocks.size());
    const BlockRect rect = block_rect(p_.grid, rows.first * grid_cols);
    const BlockRect last = block_rect(p_.grid, (rows.first + rows.count - 1) * grid_cols);
    const std::size_t sum0 = x.sums_before(t0);
    const std::size_t per_row = x.sums_before(t1) - sum0;
    const std::size_t count = per_row * (last.row0 + last.rows - rect.row0);
    T* const sums = part.ends ? worker.sums.at_least(count) : to_go_on_.data() + sum0 * rect.rows;
    if (!part.starts) std::copy_n(begun_.data() + sum0 * rect.rows, count, sums);
    const auto sums_of = [&](std::size_t i) {
        BlockRect of_row = i + 1 == rows.count ? last : rect;
        of_row.row0 = rect.row0 + i * p_.grid.block_rows;
        return TileSums{sums + per_row * i * p_.grid.block_rows, of_row, t0, t1};
    };
    for (std::size_t number = part.begin; number < part.end;) {
        std::size_t together = blocks_together(x, blocks, number, part.end, t0);
        for (std::size_t i = 1; i < rows.count && together > 0; ++i) {
            together = std::min(together, blocks_together(x, blocks, number + i * grid_cols,
                                                          part.end + i * grid_cols, t0));
        }
        const std::size_t after = number + std::max<std::size_t>(together, 1);
        const bool anew = part.starts && number == part.begin;
        const bool ends = part.ends && after == part.end;
        for (std::size_t i = 0; i < rows.count; ++i) {
            const bool is_last = i + 1 == rows.count;
            const std::size_t at = number + i * grid_cols;
            const std::size_t next = is_last ? after : at + grid_cols;
            const TileSums to = sums_of(i);
            if (ends) ask_for_y(x.tile(t0), to.rect);
            // In either way a block is summed in its own order: which one must not depend on
            // others.
            const std::size_t n =
                together > 0 ? together : blocks_together(x, blocks, at, at + 1, t0);
            if (n > 0) {
                multiply_together(x, blocks, at, n, next, to, anew, ends, worker);
                continue;
            }
            if (anew) std::fill_n(to.begin, per_row * to.rect.rows, T{0});
            if (cuts_w<E>()) {
                multiply_cut(x, blocks, at, next, is_last && after < part.end, to, worker);
            } else {
                multiply_block(x, blocks, at, next, is_last && after < part.end, to, worker);
            }
            if (ends) store_tiles(x, to, worker);
        }
        number = after;
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_block(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                      std::size_t number, std::size_t next, bool next_has_new_x,
                                      const TileSums& to, Worker& worker) const {
    const std::size_t column = place(number) % p_.grid.grid_cols();
    // Not of the first tile here: sums of x in parts have the order of the passes.
    const std::size_t strip = columns_in_a_pass(x.tile(0).kernel->width);
    const bool asks_for_x = next_has_new_x && x.bytes(to.t0, to.t1) > detail::kCachedBytes;
    const BlockView& block = blocks[number - fed_];
    const Next<E> next_w = next_block<E>(blocks, next - fed_);
    const E* const w = worker.reader.template as<E>(block);
    for (std::size_t c = 0; c < block.cols; c += strip) {
        const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
        for (std::size_t t = to.t0; t < to.t1; ++t) {
            const Next<E> part_w =
                next_w.part(c * block.rows, n * block.rows, t - to.t0, to.t1 - to.t0);
            const Next<E> next_x = asks_for_x ? x_of(x, next, t) : Next<E>{};
            const std::size_t elements = x.tile(t).kernel->width;
            const Next<E> part_x = next_x.part(c * elements, n * elements, 0, 1);
            multiply_tile(x, column, t, c, w + c, n, block,
                          {part_w.begin, part_w.end, part_x.begin, part_x.end}, to.of(x, t));
        }
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::store_tiles(const PackedX<E, T>& x, const TileSums& from,
                                   Worker& worker) const {
    for (std::size_t t = from.t0; t < from.t1; ++t) {
        if (t + 1 < from.t1) ask_for_y(x.tile(t + 1), from.rect);
        store_tile(x.tile(t), from.rect, from.of(x, t), worker);
    }
    finish_tiles(x, from.rect, from.t0, from.t1);
}

template <class T>
template <class E>
void Matmul::Typed<T>::finish_tiles(const PackedX<E, T>& x, const BlockRect& rect, std::size_t t0,
                                    std::size_t t1) const noexcept {
    if (y_ == nullptr) return;
    const auto& last = x.tile(t1 - 1);
    finish(x.tile(t0).row0, last.row0 + last.rows, rect.row0, rect.rows);
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::store_tile(const Tile& tile, const BlockRect& rect, T* sums,
                                  Worker& worker) const {
    if (p_.variants != nullptr) add_dots(tile, rect, sums);
    if (y_ != nullptr) {
        T* const y = y_ + tile.row0 * n_ + rect.row0;
        if constexpr (!std::is_same_v<Tile, detail::RowTile<T, T>>) {
            if (tile.kernel->sums() == 1) {
                kernels_.bf16.columns_to_f32(sums, tile.sums(), rect.rows, tile.rows, y, n_);
                return;
            }
        }
        store_sums(tile, rect.rows, sums, y, n_);
        return;
    }
    if constexpr (sizeof(T) == 4) {
        const T* const bias = bias_ == nullptr ? nullptr : bias_ + rect.row0;
        std::uint16_t* const y = halves_ + tile.row0 * n_ + rect.row0;
        const auto straight = kernels_.bf16.columns_to_bf16;
        if (straight != nullptr && tile.kernel->sums() == 1 && p_.activation == Activation::none) {
            straight(sums, tile.sums(), rect.rows, tile.rows, bias, y, n_);
            return;
        }
        T* const part = worker.part_of_y.at_least(tile.rows * rect.rows);
        store_sums(tile, rect.rows, sums, part, rect.rows);
        for (std::size_t i = 0; i < tile.rows; ++i) {
            T* const row = part + i * rect.rows;
            detail::finish_row(row, rect.rows, bias, p_.activation);
            kernels_.f32_to_bf16(row, rect.rows, y + i * n_);
        }
    }
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::ask_for_y(const Tile& tile, const BlockRect& rect) const noexcept {
    const std::size_t at = tile.row0 * n_ + rect.row0;
    if (y_ != nullptr) {
        detail::ask_to_write(y_ + at, n_, tile.rows, rect.rows);
    } else {
        detail::ask_to_write(halves_ + at, n_, tile.rows, rect.rows);
    }
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::store_sums(const Tile& tile, std::size_t columns, const T* sums, T* to,
                                  std::size_t ld) noexcept {
    const std::size_t group = tile.kernel->sums();
    const std::size_t lanes = tile.sums();
    if (group == 1) {
        detail::transpose_apart(sums, lanes, columns, tile.rows, to, ld);
        return;
    }
    for (std::size_t i = 0; i < tile.rows; ++i) {
        for (std::size_t r = 0; r < columns; ++r) {
            const T* const from = sums + r * lanes + i * group;
            T sum = from[0];
            for (std::size_t j = 1; j < group; ++j) sum += from[j];
            to[i * ld + r] = sum;
        }
    }
}

template void Matmul::Typed<float>::multiply_panels(const PackedX<std::uint16_t, float>&,
                                                    std::span<const BlockView>, std::size_t,
                                                    std::size_t, std::size_t, std::size_t,
                                                    Worker&) const;
template void Matmul::Typed<float>::multiply_packed(Packing<float, float>&,
                                                    std::span<const BlockView>, std::size_t,
                                                    std::size_t, unsigned);
template void Matmul::Typed<float>::multiply_packed(Packing<std::uint16_t, float>&,
                                                    std::span<const BlockView>, std::size_t,
                                                    std::size_t, unsigned);
template void Matmul::Typed<double>::multiply_packed(Packing<double, double>&,
                                                     std::span<const BlockView>, std::size_t,
                                                     std::size_t, unsigned);

template void Matmul::Typed<float>::store_tiles(const PackedX<float, float>&, const TileSums&,
                                                Worker&) const;
template void Matmul::Typed<float>::store_tiles(const PackedX<std::uint16_t, float>&,
                                                const TileSums&, Worker&) const;
template void Matmul::Typed<double>::store_tiles(const PackedX<double, double>&, const TileSums&,
                                                 Worker&) const;
template void Matmul::Typed<float>::store_sums(const detail::RowTile<float, float>&, std::size_t,
                                               const float*, float*, std::size_t) noexcept;
template void Matmul::Typed<float>::store_sums(const detail::RowTile<std::uint16_t, float>&,
                                               std::size_t, const float*, float*,
                                               std::size_t) noexcept;
template void Matmul::Typed<double>::store_sums(const detail::RowTile<double, double>&, std::size_t,
                                                const double*, double*, std::size_t) noexcept;
template void Matmul::Typed<float>::store_tile(const detail::RowTile<float, float>&,
                                               const BlockRect&, float*, Worker&) const;
template void Matmul::Typed<float>::finish_tiles(const PackedX<float, float>&, const BlockRect&,
                                                 std::size_t, std::size_t) const noexcept;
template void Matmul::Typed<float>::ask_for_y(const detail::RowTile<float, float>&,
                                              const BlockRect&) const noexcept;
template void Matmul::Typed<float>::store_tile(const detail::RowTile<std::uint16_t, float>&,
                                               const BlockRect&, float*, Worker&) const;
template void Matmul::Typed<float>::finish_tiles(const PackedX<std::uint16_t, float>&,
                                                 const BlockRect&, std::size_t,
                                                 std::size_t) const noexcept;
template void Matmul::Typed<float>::ask_for_y(const detail::RowTile<std::uint16_t, float>&,
                                              const BlockRect&) const noexcept;
template void Matmul::Typed<double>::store_tile(const detail::RowTile<double, double>&,
                                                const BlockRect&, double*, Worker&) const;
template void Matmul::Typed<double>::finish_tiles(const PackedX<double, double>&, const BlockRect&,
                                                  std::size_t, std::size_t) const noexcept;
template void Matmul::Typed<double>::ask_for_y(const detail::RowTile<double, double>&,
                                               const BlockRect&) const noexcept;

}  // namespace pydedup
