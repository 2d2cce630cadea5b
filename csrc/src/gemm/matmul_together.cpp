// SPDX-License-Identifier: Apache-2.0
// Products whose kernel takes several blocks at once (AMX): where they lie as they are in their
// pages, sums are in registers from one to the next.
#include <algorithm>

#include "gemm/matmul_typed.hpp"

namespace pydedup {
namespace {

using detail::PackedX;

// Bytes of blocks that a tile is multiplied with at once: half of a 48 KiB first-level cache, which
// every CPU has whose kernels do so (AMX).
constexpr std::size_t kTogetherBytes = std::size_t{24} << 10;
// Rows of W that fill two such registers: as many, if they are no longer than this, stay in that
// cache while they are multiplied with all tiles, and their sums are in registers from the first
// block to the last. Twice as long, or with an x in parts, they and a tile no longer fit (384
// columns, 32 rows of x: half as long again).
constexpr std::size_t kWholeRows = 32;
constexpr std::size_t kWholeRowBytes = 512;
// Columns of W that fill such a register. What does not is copied into zeros, for each of those
// rows anew (blocks of 65 columns: a third longer).
constexpr std::size_t kWholeColumns = 32;

}  // namespace

template <class T>
template <class E>
std::size_t Matmul::Typed<T>::blocks_together(const PackedX<E, T>& x,
                                              std::span<const BlockView> blocks, std::size_t number,
                                              std::size_t end, std::size_t t) const noexcept {
    if (x.tile(t).kernel->tile_nt_pieces == nullptr || !members_.empty() || cuts_w<E>()) return 0;
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

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_together(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                         std::size_t number, std::size_t n, std::size_t next,
                                         const TileSums& to, bool anew, bool ends,
                                         Worker& worker) const {
    GemmPiece<E> pieces[kMaxGemmPieces];
    std::size_t columns[kMaxGemmPieces];
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const BlockView& block = blocks[number + i - fed_];
        const E* const ahead = next_block<E>(blocks, next + i - fed_).begin;
        for (unsigned part = 0; part < x.n_parts(); ++part) {
            columns[count] = place(number + i) % p_.grid.grid_cols();
            pieces[count++] = {nullptr, reinterpret_cast<const E*>(block.data), block.cols,
                               block.cols, part == 0 ? ahead : nullptr};
        }
    }
    for (std::size_t t = to.t0; t < to.t1; ++t) {
        for (std::size_t i = 0; i < count; ++i) {
            pieces[i].x = x.at(columns[i], t, 0, static_cast<unsigned>(i) % x.n_parts());
            if (t != to.t0) pieces[i].next = nullptr;
        }
        if (ends && t + 1 < to.t1) ask_for_y(x.tile(t + 1), to.rect);
        x.tile(t).kernel->tile_nt_pieces(pieces, count, blocks[number - fed_].rows, anew,
                                         to.of(x, t));
        if (ends) store_tile(x.tile(t), to.rect, to.of(x, t), worker);
    }
    if (ends) finish_tiles(x, to.rect, to.t0, to.t1);
}

template <class T>
template <class E>
bool Matmul::Typed<T>::takes_whole_rows(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                        const Rows& rows) const noexcept {
    if (x.tile(0).kernel->tile_nt_pieces == nullptr || x.n_parts() != 1 || !p_.places.empty() ||
        p_.grid.cols * sizeof(E) > kWholeRowBytes || p_.grid.block_cols % kWholeColumns != 0 ||
        p_.grid.grid_cols() > kMaxGemmPieces) {
        return false;
    }
    const Part first = part_of_row(rows.first, blocks.size());
    const Part last = part_of_row(rows.first + rows.count - 1, blocks.size());
    return first.starts && last.ends &&
           std::all_of(blocks.begin() + static_cast<std::ptrdiff_t>(first.begin - fed_),
                       blocks.begin() + static_cast<std::ptrdiff_t>(last.end - fed_),
                       [](const BlockView& block) { return block.encoding == Encoding::raw; });
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_whole_rows(const PackedX<E, T>& x,
                                           std::span<const BlockView> blocks, const Rows& rows,
                                           std::size_t t0, std::size_t t1, Worker& worker) const {
    GemmPiece<E> pieces[kMaxGemmPieces];
    T* const sums = worker.sums.at_least(kWholeRows * x.tile(t0).sums());
    const std::size_t grid_cols = p_.grid.grid_cols();
    for (std::size_t panel = rows.first; panel < rows.first + rows.count; ++panel) {
        const Part part = part_of_row(panel, blocks.size());
        BlockRect rect = block_rect(p_.grid, panel * grid_cols);
        const std::size_t stop = rect.row0 + rect.rows;
        for (std::size_t r = 0; rect.row0 < stop; r += kWholeRows, rect.row0 += kWholeRows) {
            rect.rows = static_cast<decltype(rect.rows)>(std::min(kWholeRows, stop - rect.row0));
            const bool is_last = rect.row0 + rect.rows == stop;
            std::size_t count = 0;
            for (std::size_t number = part.begin; number < part.end; ++number) {
                const BlockView& block = blocks[number - fed_];
                const auto* const w = reinterpret_cast<const E*>(block.data) + r * block.cols;
                const E* const next = is_last
                                          ? next_block<E>(blocks, number + grid_cols - fed_).begin
                                          : w + kWholeRows * block.cols;
                pieces[count++] = {nullptr, w, block.cols, block.cols, next};
            }
            for (std::size_t t = t0; t < t1; ++t) {
                for (std::size_t i = 0; i < count; ++i) {
                    pieces[i].x = x.at(i, t, 0);
                    if (t != t0) pieces[i].next = nullptr;
                }
                ask_for_y(x.tile(t), rect);
                x.tile(t).kernel->tile_nt_pieces(pieces, count, rect.rows, true, sums);
                store_tile(x.tile(t), rect, sums, worker);
            }
            finish_tiles(x, rect, t0, t1);
        }
    }
}

template bool Matmul::Typed<float>::takes_whole_rows(const PackedX<float, float>&,
                                                     std::span<const BlockView>,
                                                     const Rows&) const noexcept;
template void Matmul::Typed<float>::multiply_whole_rows(const PackedX<float, float>&,
                                                        std::span<const BlockView>, const Rows&,
                                                        std::size_t, std::size_t, Worker&) const;
template std::size_t Matmul::Typed<float>::blocks_together(const PackedX<float, float>&,
                                                           std::span<const BlockView>, std::size_t,
                                                           std::size_t, std::size_t) const noexcept;
template void Matmul::Typed<float>::multiply_together(const PackedX<float, float>&,
                                                      std::span<const BlockView>, std::size_t,
                                                      std::size_t, std::size_t, const TileSums&,
                                                      bool, bool, Worker&) const;
template bool Matmul::Typed<float>::takes_whole_rows(const PackedX<std::uint16_t, float>&,
                                                     std::span<const BlockView>,
                                                     const Rows&) const noexcept;
template void Matmul::Typed<float>::multiply_whole_rows(const PackedX<std::uint16_t, float>&,
                                                        std::span<const BlockView>, const Rows&,
                                                        std::size_t, std::size_t, Worker&) const;
template std::size_t Matmul::Typed<float>::blocks_together(const PackedX<std::uint16_t, float>&,
                                                           std::span<const BlockView>, std::size_t,
                                                           std::size_t, std::size_t) const noexcept;
template void Matmul::Typed<float>::multiply_together(const PackedX<std::uint16_t, float>&,
                                                      std::span<const BlockView>, std::size_t,
                                                      std::size_t, std::size_t, const TileSums&,
                                                      bool, bool, Worker&) const;
template bool Matmul::Typed<double>::takes_whole_rows(const PackedX<double, double>&,
                                                      std::span<const BlockView>,
                                                      const Rows&) const noexcept;
template void Matmul::Typed<double>::multiply_whole_rows(const PackedX<double, double>&,
                                                         std::span<const BlockView>, const Rows&,
                                                         std::size_t, std::size_t, Worker&) const;
template std::size_t Matmul::Typed<double>::blocks_together(const PackedX<double, double>&,
                                                            std::span<const BlockView>, std::size_t,
                                                            std::size_t,
                                                            std::size_t) const noexcept;
template void Matmul::Typed<double>::multiply_together(const PackedX<double, double>&,
                                                       std::span<const BlockView>, std::size_t,
                                                       std::size_t, std::size_t, const TileSums&,
                                                       bool, bool, Worker&) const;

}  // namespace pydedup
