// SPDX-License-Identifier: Apache-2.0
// Products of which each row of x has the blocks of its own variant.
#include <algorithm>
#include <bit>
#include <functional>

#include "gemm/matmul_typed.hpp"

namespace pydedup {
namespace {

using detail::PackedX;

// A tile of f32 or f64 takes as long for all its rows as dot products do for this part of them.
// Measured (AVX2): as good as any from a quarter to all; what few rows have is bound by memory.
constexpr std::size_t kFewOfATile = 2;
// Of a block that does not lie behind the one before: as far as a dot product looks ahead.
constexpr std::size_t kJumpBytes = std::size_t{8} << 10;

// Dot products take as long as their block takes to come. Where it lies behind the one before, the
// hardware sees to that; if not, its beginning should be under way.
void ask_for_jump(const BlockView& block, const BlockView& next) noexcept {
    constexpr std::size_t kLine = 64;
    const std::less<> before;  // of any two addresses
    const std::byte* const end = block.data + block.length;
    if (!before(next.data, end) && before(next.data, end + kJumpBytes)) return;
    const std::size_t bytes = std::min<std::size_t>(next.length, kJumpBytes);
    for (std::size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(next.data + at);
}

}  // namespace

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_for_members(const PackedX<E, T>& x,
                                            std::span<const BlockView> blocks, const Part& part,
                                            const BlockRect& rect, std::size_t t0, std::size_t t1,
                                            T* sums, Worker& worker) const {
    find_uses(x, part, t0, t1, worker);
    const std::vector<Use>& uses = worker.tiled;
    for (std::size_t i = 0; i < uses.size();) {
        const std::size_t number = uses[i].number;
        std::size_t end = i + 1;
        while (end < uses.size() && uses[end].number == number) ++end;
        Next<E> next;
        if (end < uses.size()) next = next_block<E>(blocks, uses[end].number - fed_);
        const BlockView& block = blocks[number - fed_];
        const E* const w = worker.reader.template as<E>(block);
        for (; i < end; ++i) {
            T* const to = sums + (x.sums_before(uses[i].tile) - x.sums_before(t0)) * rect.rows;
            multiply_tile_for(x, uses[i], block, w, next, to, worker);
            next = {};
        }
    }
    for (std::size_t i = 0; i < worker.dots.size(); ++i) {
        const Use& use = worker.dots[i];
        const BlockView& block = blocks[use.number - fed_];
        if (i + 1 < worker.dots.size()) {
            ask_for_jump(block, blocks[worker.dots[i + 1].number - fed_]);
        }
        const auto& tile = x.tile(use.tile);
        const std::size_t column = place(use.number) % p_.grid.grid_cols();
        for_rows_with(use.number, tile.row0, tile.row0 + tile.rows,
                      [&](std::size_t begin, std::size_t end) {
                          dot(x_ + begin * p_.grid.cols + column * p_.grid.block_cols, end - begin,
                              block, y_ + begin * n_ + rect.row0, n_, worker.reader);
                      });
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::find_uses(const PackedX<E, T>& x, const Part& part, std::size_t t0,
                                 std::size_t t1, Worker& worker) const {
    worker.dots.clear();
    worker.tiled.clear();
    for (std::size_t number = part.begin; number < part.end; ++number) {
        const std::uint64_t members = members_[number - fed_];
        for (std::size_t t = t0; t < t1; ++t) {
            const auto& tile = x.tile(t);
            std::size_t having = 0;
            for (std::size_t i = 0; i < tile.rows; ++i) {
                having += has(number, tile.row0 + i) ? 1 : 0;
            }
            if (having == 0) continue;
            const bool few = having <= own().dot_max_m ||
                             (std::is_same_v<E, T> && kFewOfATile * having <= tile.kernel->width);
            const bool by_dots = few && std::has_single_bit(members);
            (by_dots ? worker.dots : worker.tiled).push_back({members, number, t, having});
        }
    }
    std::ranges::stable_sort(worker.dots, {}, &Use::members);
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_tile_for(const PackedX<E, T>& x, const Use& use,
                                         const BlockView& block, const E* w, const Next<E>& next,
                                         T* sums, Worker& worker) const {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    const auto& tile = x.tile(use.tile);
    const std::size_t lanes = tile.sums();
    const std::size_t column = place(use.number) % p_.grid.grid_cols();
    const bool is_some = use.having != tile.rows;
    T* const to = is_some ? worker.apart.at_least(block.rows * lanes) : sums;
    if (is_some) std::fill_n(to, block.rows * lanes, T{0});
    const std::size_t strip = columns_in_a_pass(tile.kernel->width);
    for (std::size_t c = 0; c < block.cols; c += strip) {
        const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
        const Next<E> part = next.part(c * block.rows, n * block.rows, 0, 1);
        multiply_tile(x, column, use.tile, c, w + c, n, block,
                      {part.begin, part.end, nullptr, nullptr}, to);
    }
    if (!is_some) return;
    Bits* const mask = worker.mask.at_least(lanes);
    const std::size_t group = tile.kernel->sums();
    for (std::size_t i = 0; i < lanes; ++i) {
        const bool counts = i / group < tile.rows && has(use.number, tile.row0 + i / group);
        mask[i] = counts ? ~Bits{0} : Bits{0};
    }
    for (std::size_t r = 0; r < block.rows; ++r) {
        for (std::size_t i = 0; i < lanes; ++i) {
            sums[r * lanes + i] +=
                std::bit_cast<T>(std::bit_cast<Bits>(to[r * lanes + i]) & mask[i]);
        }
    }
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::add_dots(const Tile& tile, const BlockRect& rect, T* sums) const noexcept {
    const std::size_t group = tile.kernel->sums();
    const std::size_t lanes = tile.sums();
    for (std::size_t i = 0; i < tile.rows; ++i) {
        const T* const y = y_ + (tile.row0 + i) * n_ + rect.row0;
        for (std::size_t r = 0; r < rect.rows; ++r) sums[r * lanes + i * group] += y[r];
    }
}

template void Matmul::Typed<float>::multiply_for_members(const PackedX<float, float>&,
                                                         std::span<const BlockView>, const Part&,
                                                         const BlockRect&, std::size_t, std::size_t,
                                                         float*, Worker&) const;
template void Matmul::Typed<float>::multiply_for_members(const PackedX<std::uint16_t, float>&,
                                                         std::span<const BlockView>, const Part&,
                                                         const BlockRect&, std::size_t, std::size_t,
                                                         float*, Worker&) const;
template void Matmul::Typed<double>::multiply_for_members(const PackedX<double, double>&,
                                                          std::span<const BlockView>, const Part&,
                                                          const BlockRect&, std::size_t,
                                                          std::size_t, double*, Worker&) const;
template void Matmul::Typed<float>::add_dots(const detail::RowTile<float, float>&, const BlockRect&,
                                             float*) const noexcept;
template void Matmul::Typed<float>::add_dots(const detail::RowTile<std::uint16_t, float>&,
                                             const BlockRect&, float*) const noexcept;
template void Matmul::Typed<double>::add_dots(const detail::RowTile<double, double>&,
                                              const BlockRect&, double*) const noexcept;

}  // namespace pydedup
