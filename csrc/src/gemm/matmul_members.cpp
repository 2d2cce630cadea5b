// SPDX-License-Identifier: Apache-2.0
// Products of which each row of x has the blocks of its own variant.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
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

// Lanes [begin, end) of each of `rows`: few, for which a call of memmove takes longer.
template <class T>
void copy_lanes(const T* from, T* to, std::size_t rows, std::size_t lanes, std::size_t begin,
                std::size_t end) noexcept {
    constexpr std::size_t kFew = 4;
    for (; begin + kFew <= end; begin += kFew) {
        for (std::size_t i = begin; i < rows * lanes; i += lanes) {
            std::memcpy(to + i, from + i, kFew * sizeof(T));
        }
    }
    for (; begin < end; ++begin) {
        for (std::size_t i = begin; i < rows * lanes; i += lanes) to[i] = from[i];
    }
}

}  // namespace

template <class T>
template <class E>
void Matmul::Typed<T>::pack_alone(Packing<E, T>& packing, unsigned threads) const {
    // A task has sums of all of its rows, and which rows it has must not depend on threads.
    if (p_.variants == nullptr || p_.m > detail::kMaxTaskRows || !packing.alone.empty()) return;
    struct Run {
        std::size_t begin, end;
    };
    std::array<Run, kMaxVariants> runs{};  // rows of each variant; none if they lie apart
    std::uint64_t met = 0;
    for (std::size_t begin = 0; begin < p_.m;) {
        const std::uint8_t variant = p_.variants[begin];
        std::size_t end = begin + 1;
        while (end < p_.m && p_.variants[end] == variant) ++end;
        runs[variant] = (met >> variant & 1) != 0 ? Run{0, 0} : Run{begin, end};
        met |= std::uint64_t{1} << variant;
        begin = end;
    }
    std::vector<typename Packing<E, T>::Alone> alone(kMaxVariants);
    parallel_for(kMaxVariants, 1, threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t v = begin; v < end; ++v) {
            const auto [row0, row1] = runs[v];
            auto& one = alone[v];
            if (row1 - row0 > own().dot_max_m) {
                one.x.emplace(packing.pack(row0, row1 - row0, 1, one.memory));
            }
        }
    });
    packing.alone = std::move(alone);
    for (auto& one : packing.alone) {
        one.sum0 = packing.sums_alone;
        if (one.x) packing.sums_alone += one.x->sums_before(one.x->n_tiles());
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_for_members(const PackedX<E, T>& x,
                                            std::span<const BlockView> blocks, const Rows& rows,
                                            std::size_t t0, std::size_t t1, Worker& worker) const {
    const std::size_t grid_cols = p_.grid.grid_cols();
    const Part part = part_of_row(rows.first, blocks.size());
    const std::size_t sum0 = x.sums_before(t0);
    const std::size_t of_tiles = x.sums_before(t1) - sum0;
    const std::size_t per_row = of_tiles + packing<E>().sums_alone;
    const auto rect_of = [&](std::size_t i) {
        return block_rect(p_.grid, (rows.first + i) * grid_cols);
    };
    const BlockRect first = rect_of(0);
    const BlockRect last = rect_of(rows.count - 1);
    const std::size_t count = per_row * (last.row0 + last.rows - first.row0);
    T* const sums = part.ends ? worker.sums.at_least(count) : to_go_on_.data() + sum0 * first.rows;
    const auto sums_of = [&](std::size_t i) {
        return TileSums{sums + per_row * i * p_.grid.block_rows, rect_of(i), t0, t1};
    };
    if (part.starts) {
        std::fill_n(sums, count, T{0});
        const std::size_t end = x.tile(t1 - 1).row0 + x.tile(t1 - 1).rows;
        for (std::size_t i = x.tile(t0).row0; i < end; ++i) {  // dot products are added to it
            std::fill_n(y_ + i * n_ + first.row0, last.row0 + last.rows - first.row0, T{0});
        }
    } else {
        std::copy_n(begun_.data() + sum0 * first.rows, count, sums);
    }
    find_uses(x, rows, blocks.size(), t0, t1, worker);
    const std::vector<Use>& uses = worker.tiled;
    for (std::size_t i = 0; i < uses.size();) {
        const std::size_t number = uses[i].number;
        const std::size_t begin = i;
        std::size_t end = i + 1;
        while (end < uses.size() && uses[end].number == number) ++end;
        Next<E> next;
        if (end < uses.size()) next = next_block<E>(blocks, uses[end].number - fed_);
        const BlockView& block = blocks[number - fed_];
        const E* const w = worker.reader.template as<E>(block);
        const TileSums to = sums_of(uses[i].row);
        for (; i < end; ++i) {
            multiply_tile_for(x, uses[i], block, w, next, {i - begin, end - begin},
                              to.of(x, uses[i].tile), worker);
        }
    }
    const auto alone_of = [&](std::size_t i) {
        const TileSums of_row = sums_of(i);
        return of_row.begin + of_tiles * of_row.rect.rows;
    };
    multiply_alone<E>(blocks, alone_of, worker);
    multiply_dots_of(x, blocks, worker);
    if (!part.ends) return;
    for (std::size_t i = 0; i < rows.count; ++i) {
        store_alone<E>(rect_of(i), alone_of(i));
        store_tiles(x, sums_of(i), worker);
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_dots_of(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                        Worker& worker) const {
    for (std::size_t i = 0; i < worker.dots.size(); ++i) {
        const Use& use = worker.dots[i];
        const BlockView& block = blocks[use.number - fed_];
        if (i + 1 < worker.dots.size()) {
            ask_for_jump(block, blocks[worker.dots[i + 1].number - fed_]);
        }
        const auto& tile = x.tile(use.tile);
        const BlockRect rect = block_rect(p_.grid, place(use.number));
        for_rows_with(use.number, tile.row0, tile.row0 + tile.rows,
                      [&](std::size_t begin, std::size_t end) {
                          dot(x_ + begin * p_.grid.cols + use.column * p_.grid.block_cols,
                              end - begin, block, y_ + begin * n_ + rect.row0, n_, worker.reader);
                      });
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::find_uses(const PackedX<E, T>& x, const Rows& rows, std::size_t n_blocks,
                                 std::size_t t0, std::size_t t1, Worker& worker) const {
    const auto& alone = packing<E>().alone;
    worker.alone.clear();
    worker.dots.clear();
    worker.tiled.clear();
    for (std::size_t row = 0; row < rows.count; ++row) {
        const Part part = part_of_row(rows.first + row, n_blocks);
        for (std::size_t number = part.begin; number < part.end; ++number) {
            const std::uint64_t members = members_of(number);
            const std::size_t column = place(number) % p_.grid.grid_cols();
            if (!alone.empty() && std::has_single_bit(members) &&
                alone[static_cast<std::size_t>(std::countr_zero(members))].x) {
                worker.alone.push_back({members, number, row, column, 0, 0});
                continue;
            }
            for (std::size_t t = t0; t < t1; ++t) {
                const auto& tile = x.tile(t);
                std::size_t having = 0;
                for (std::size_t i = 0; i < tile.rows; ++i) {
                    having += has(number, tile.row0 + i) ? 1 : 0;
                }
                if (having == 0) continue;
                const bool few =
                    having <= own().dot_max_m ||
                    (std::is_same_v<E, T> && kFewOfATile * having <= tile.kernel->width);
                const bool by_dots = few && std::has_single_bit(members);
                (by_dots ? worker.dots : worker.tiled)
                    .push_back({members, number, row, column, t, having});
            }
        }
    }
    // Columns of x by all rows of W, as long as they are in the first-level cache.
    std::ranges::stable_sort(worker.tiled, {}, &Use::column);
    std::ranges::stable_sort(worker.alone, {}, &Use::members);
    std::ranges::stable_sort(worker.dots, {}, &Use::members);
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_alone(std::span<const BlockView> blocks,
                                      const std::function<T*(std::size_t row)>& sums_of,
                                      Worker& worker) const {
    const std::vector<Use>& uses = worker.alone;
    for (std::size_t i = 0; i < uses.size(); ++i) {
        const auto& one =
            packing<E>().alone[static_cast<std::size_t>(std::countr_zero(uses[i].members))];
        const PackedX<E, T>& x = *one.x;
        const BlockView& block = blocks[uses[i].number - fed_];
        const E* const w = worker.reader.template as<E>(block);
        T* const sums = sums_of(uses[i].row);
        Next<E> next;
        if (i + 1 < uses.size()) next = next_block<E>(blocks, uses[i + 1].number - fed_);
        const std::size_t strip = columns_in_a_pass(x.tile(0).kernel->width);
        for (std::size_t c = 0; c < block.cols; c += strip) {
            const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
            for (std::size_t t = 0; t < x.n_tiles(); ++t) {
                const Next<E> part = next.part(c * block.rows, n * block.rows, t, x.n_tiles());
                multiply_tile(x, uses[i].column, t, c, w + c, n, block,
                              {part.begin, part.end, nullptr, nullptr},
                              sums + (one.sum0 + x.sums_before(t)) * block.rows);
            }
        }
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::store_alone(const BlockRect& rect, const T* sums) const noexcept {
    for (const auto& one : packing<E>().alone) {
        for (std::size_t t = 0; one.x && t < one.x->n_tiles(); ++t) {
            const auto& tile = one.x->tile(t);
            store_sums(tile, rect.rows, sums + (one.sum0 + one.x->sums_before(t)) * rect.rows,
                       y_ + tile.row0 * n_ + rect.row0, n_);
        }
    }
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_tile_for(const PackedX<E, T>& x, const Use& use,
                                         const BlockView& block, const E* w, const Next<E>& next,
                                         const Turn& turn, T* sums, Worker& worker) const {
    const auto& tile = x.tile(use.tile);
    const std::size_t lanes = tile.sums();
    // Sums of rows that do not have the block are kept, and come back.
    T* const kept = use.having == tile.rows ? nullptr : worker.apart.at_least(block.rows * lanes);
    const auto for_others = [&](const T* from, T* to) {
        const std::size_t group = tile.kernel->sums();
        for (std::size_t begin = 0; begin < tile.rows;) {
            std::size_t end = begin;
            while (end < tile.rows && !has(use.number, tile.row0 + end)) ++end;
            copy_lanes(from, to, block.rows, lanes, begin * group, end * group);
            begin = end + 1;
        }
    };
    if (kept != nullptr) for_others(sums, kept);
    const std::size_t strip = columns_in_a_pass(tile.kernel->width);
    for (std::size_t c = 0; c < block.cols; c += strip) {
        const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
        const Next<E> part = next.part(c * block.rows, n * block.rows, turn.number, turn.of);
        multiply_tile(x, use.column, use.tile, c, w + c, n, block,
                      {part.begin, part.end, nullptr, nullptr}, sums);
    }
    if (kept != nullptr) for_others(kept, sums);
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

template void Matmul::Typed<float>::pack_alone(Packing<float, float>&, unsigned) const;
template void Matmul::Typed<float>::multiply_for_members(const PackedX<float, float>&,
                                                         std::span<const BlockView>, const Rows&,
                                                         std::size_t, std::size_t, Worker&) const;
template void Matmul::Typed<float>::pack_alone(Packing<std::uint16_t, float>&, unsigned) const;
template void Matmul::Typed<float>::multiply_for_members(const PackedX<std::uint16_t, float>&,
                                                         std::span<const BlockView>, const Rows&,
                                                         std::size_t, std::size_t, Worker&) const;
template void Matmul::Typed<double>::pack_alone(Packing<double, double>&, unsigned) const;
template void Matmul::Typed<double>::multiply_for_members(const PackedX<double, double>&,
                                                          std::span<const BlockView>, const Rows&,
                                                          std::size_t, std::size_t, Worker&) const;
template void Matmul::Typed<float>::add_dots(const detail::RowTile<float, float>&, const BlockRect&,
                                             float*) const noexcept;
template void Matmul::Typed<float>::add_dots(const detail::RowTile<std::uint16_t, float>&,
                                             const BlockRect&, float*) const noexcept;
template void Matmul::Typed<double>::add_dots(const detail::RowTile<double, double>&,
                                              const BlockRect&, double*) const noexcept;

}  // namespace pydedup
