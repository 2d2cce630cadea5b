// SPDX-License-Identifier: Apache-2.0
// Products of f32 numbers, each cut into three bf16 numbers (AMX): x once, as it is packed, and a
// block of W as it is read, for all tiles of x.
#include <algorithm>

#include "gemm/matmul_typed.hpp"

namespace pydedup {
namespace {

using detail::PackedX;

}  // namespace

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_cut(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                    std::size_t number, std::size_t next, bool next_has_new_x,
                                    const TileSums& to, Worker& worker) const {
    if constexpr (!std::is_same_v<E, T>) {
        const BlockView& block = blocks[number - fed_];
        const std::size_t columns = p_.grid.grid_cols();
        const bool asks_for_x = next_has_new_x && x.bytes(to.t0, to.t1) > detail::kCachedBytes;
        cut_and_multiply(
            x, place(number) % columns, {worker.reader.read(block), block.rows, block.cols},
            next_block<E>(blocks, next - fed_),
            asks_for_x ? std::optional(place(next) % columns) : std::nullopt, to, worker);
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::cut_and_multiply(const PackedX<E, T>& x, std::size_t column,
                                        const Numbers& w, const Next<E>& next,
                                        std::optional<std::size_t> next_column, const TileSums& to,
                                        Worker& worker) const {
    const std::size_t part = cut_elements(w.rows, w.cols);
    E* const cut = worker.cut.at_least(detail::kCutParts * part);
    const bool is_cut = kernels_.bf16.cut_block(w.begin, w.rows, w.cols, w.cols, cut);
    // A pass reads as much of x as one of other products, in three parts.
    const std::size_t strip =
        columns_in_a_pass(x.tile(0).kernel->width * detail::kCutParts * sizeof(E) / sizeof(T));
    const auto of_next = static_cast<std::size_t>(next.end - next.begin);
    for (std::size_t c = 0; is_cut && c < w.cols; c += strip) {
        const std::size_t n = std::min(strip, w.cols - c);
        for (std::size_t t = to.t0; t < to.t1; ++t) {
            const auto& kernel = *x.tile(t).kernel;
            const Next<E> part_w =
                next.part(of_next * c / w.cols, of_next * n / w.cols, t - to.t0, to.t1 - to.t0);
            const Next<E> next_x =
                next_column ? Next<E>{x.at(*next_column, t, 0), x.end_of(*next_column, t)}
                            : Next<E>{};
            const Next<E> part_x = next_x.part(c * kernel.width, n * kernel.width, 0, 1);
            kernel.tile_nt_cut(x.at(column, t, c), x.part_elements(), cut + cut_elements(w.rows, c),
                               part, w.rows, n,
                               {part_w.begin, part_w.end, part_x.begin, part_x.end}, to.of(x, t));
        }
    }
    for (std::size_t t = to.t0; t < to.t1; ++t) {
        const std::uint32_t rows = is_cut ? x.uncut(column, t) : ~std::uint32_t{0};
        if (rows != 0) add_uncut(x.tile(t), rows, column, w, to.of(x, t), worker);
    }
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::add_uncut(const Tile& tile, std::uint32_t rows, std::size_t column,
                                 const Numbers& w, T* sums, Worker& worker) const {
    const std::size_t ldx = p_.transpose ? p_.grid.rows : p_.grid.cols;
    const std::size_t strip = p_.transpose ? p_.grid.block_rows : p_.grid.block_cols;
    // Always the same four rows at once: how many they are shows in the last bits of each, and what
    // is in a row must not show in another.
    constexpr std::size_t kTogether = 4;
    T* const apart = worker.part_of_y.at_least(kTogether * w.rows);
    for (std::size_t begin = 0; begin < tile.rows; begin += kTogether) {
        if ((rows >> begin & ((1U << kTogether) - 1U)) == 0) continue;
        const std::size_t m = std::min(kTogether, tile.rows - begin);
        std::fill_n(apart, m * w.rows, T{0});
        own().dot_nt(x_ + (tile.row0 + begin) * ldx + column * strip, ldx, m, w.begin, w.rows,
                     w.cols, w.cols, apart, w.rows);
        for (std::size_t i = 0; i < m; ++i) {
            if ((rows >> (begin + i) & 1U) == 0) continue;
            for (std::size_t r = 0; r < w.rows; ++r) {
                sums[r * tile.kernel->width + begin + i] += apart[i * w.rows + r];
            }
        }
    }
}

template void Matmul::Typed<float>::multiply_cut(const PackedX<float, float>&,
                                                 std::span<const BlockView>, std::size_t,
                                                 std::size_t, bool, const TileSums&, Worker&) const;
template void Matmul::Typed<float>::multiply_cut(const PackedX<std::uint16_t, float>&,
                                                 std::span<const BlockView>, std::size_t,
                                                 std::size_t, bool, const TileSums&, Worker&) const;
template void Matmul::Typed<float>::cut_and_multiply(const PackedX<std::uint16_t, float>&,
                                                     std::size_t, const Numbers&,
                                                     const Next<std::uint16_t>&,
                                                     std::optional<std::size_t>, const TileSums&,
                                                     Worker&) const;
template void Matmul::Typed<double>::multiply_cut(const PackedX<double, double>&,
                                                  std::span<const BlockView>, std::size_t,
                                                  std::size_t, bool, const TileSums&,
                                                  Worker&) const;

}  // namespace pydedup
