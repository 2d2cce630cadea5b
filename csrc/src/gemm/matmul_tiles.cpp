// SPDX-License-Identifier: Apache-2.0
// Products with x in tiles, as the micro-kernels read it (packed_x.hpp).
#include <algorithm>
#include <bit>
#include <functional>

#include "dispatch/tile_registers.hpp"
#include "gemm/matmul_typed.hpp"
#include "gemm/transpose.hpp"

namespace pydedup {
namespace {

using detail::AlignedArray;
using detail::PackedX;
using detail::WeightReader;

// Bytes of blocks that a tile is multiplied with at once: half of a 48 KiB first-level cache, which
// every CPU has whose kernels do so (AMX).
constexpr std::size_t kTogetherBytes = std::size_t{24} << 10;
// A tile of f32 or f64 takes as long for all its rows as dot products do for this part of them.
// Measured (AVX2): as good as any from a quarter to all; what few rows have is bound by memory.
constexpr std::size_t kFewOfATile = 2;
// Packed x of so many bytes is in the second-level cache from one row of blocks to the next.
constexpr std::size_t kCachedBytes = std::size_t{256} << 10;
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

template <class E, class T>
[[nodiscard]] const E* read(const BlockView& block, WeightReader<T>& reader) {
    if constexpr (std::is_same_v<E, T>) {
        return reader.read(block);
    } else {
        return reinterpret_cast<const E*>(reader.stored(block));
    }
}

}  // namespace

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_packed(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                       std::size_t first, std::size_t panels, unsigned threads) {
    // Of the last panel what comes later will need the sums.
    const std::size_t last = first + panels - 1;
    if (!part_of_row(last, blocks.size()).ends) {
        to_go_on_ = AlignedArray<T>(x.sums_before(x.n_tiles()) *
                                    block_rect(p_.grid, last * p_.grid.grid_cols()).rows);
    }
    run(panels, x.n_tiles(), x.tile(0).kernel->width, threads,
        [&](const Task& task, Worker& worker) {
            multiply_tiles(x, blocks, first + task.panel, task.unit0, task.unit1, worker);
        });
    begun_ = std::move(to_go_on_);
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_tiles(const PackedX<E, T>& x, std::span<const BlockView> blocks,
                                      std::size_t row, std::size_t t0, std::size_t t1,
                                      Worker& worker) const {
    std::optional<TileRegisters> registers;
    if constexpr (!std::is_same_v<E, T>) registers.emplace(kernels_.bf16);
    const Part part = part_of_row(row, blocks.size());
    const BlockRect rect = block_rect(p_.grid, row * p_.grid.grid_cols());
    const std::size_t sum0 = x.sums_before(t0);
    const std::size_t count = (x.sums_before(t1) - sum0) * rect.rows;
    T* const sums = part.ends ? worker.sums.at_least(count) : to_go_on_.data() + sum0 * rect.rows;
    if (part.starts) {
        std::fill_n(sums, count, T{0});
    } else {
        std::copy_n(begun_.data() + sum0 * rect.rows, count, sums);
    }
    const auto sums_of = [&](std::size_t t) {
        return sums + (x.sums_before(t) - sum0) * rect.rows;
    };
    const std::size_t row0 = x.tile(t0).row0;
    const std::size_t row1 = x.tile(t1 - 1).row0 + x.tile(t1 - 1).rows;
    if (p_.variants != nullptr && part.starts) {  // dot products are added to it
        for (std::size_t i = row0; i < row1; ++i) {
            std::fill_n(y_ + i * n_ + rect.row0, rect.rows, T{0});
        }
    }
    if (!members_.empty()) multiply_for_members(x, blocks, part, rect, t0, t1, sums, worker);
    const std::size_t strip = columns_in_a_pass(x.tile(t0).kernel->width);
    const bool asks_for_x = x.strip_bytes(t0, t1) * p_.grid.grid_cols() > kCachedBytes;
    const std::size_t end = members_.empty() ? part.end : part.begin;
    for (std::size_t number = part.begin; number < end; ++number) {
        const std::size_t column = place(number) % p_.grid.grid_cols();
        const BlockView& block = blocks[number - fed_];
        if (number + 1 == end && part.ends) ask_for_y(x.tile(t0), rect);
        if (const std::size_t n = blocks_together(x, blocks, number, part.end, t0); n > 0) {
            for (std::size_t t = t0; t < t1; ++t) {
                multiply_together(x, blocks, number, n, t, t == t0, sums_of(t));
            }
            number += n - 1;
            continue;
        }
        const Next<E> next = next_block<E>(blocks, number - fed_);
        const E* const w = read<E>(block, worker.reader);
        for (std::size_t c = 0; c < block.cols; c += strip) {
            const std::size_t n = std::min<std::size_t>(strip, block.cols - c);
            for (std::size_t t = t0; t < t1; ++t) {
                const Next<E> part_w = next.part(c * block.rows, n * block.rows, t - t0, t1 - t0);
                const Next<E> next_x =
                    asks_for_x && number + 1 < part.end ? x_of(x, number + 1, t) : Next<E>{};
                const std::size_t elements = x.tile(t).kernel->width;
                const Next<E> part_x = next_x.part(c * elements, n * elements, 0, 1);
                multiply_tile(x, column, t, c, w + c, n, block,
                              {part_w.begin, part_w.end, part_x.begin, part_x.end}, sums_of(t));
            }
        }
    }
    if (!part.ends) return;
    for (std::size_t t = t0; t < t1; ++t) {
        if (t + 1 < t1) ask_for_y(x.tile(t + 1), rect);
        if (p_.variants != nullptr) add_dots(x.tile(t), rect, sums_of(t));
        store_sums(x.tile(t), rect, sums_of(t));
    }
    finish(row0, row1, rect.row0, rect.rows);
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_tile(const PackedX<E, T>& x, std::size_t column, std::size_t t,
                                     std::size_t c, const E* w, std::size_t n,
                                     const BlockView& block, const GemmNext<E>& next,
                                     T* sums) noexcept {
    for (unsigned part = 0; part < x.n_parts(); ++part) {
        x.tile(t).kernel->tile_nt(x.at(column, t, c, part), w, block.rows, n, block.cols,
                                  part == 0 ? next : GemmNext<E>{}, sums);
    }
}

template <class T>
template <class E>
std::size_t Matmul::Typed<T>::blocks_together(const PackedX<E, T>& x,
                                              std::span<const BlockView> blocks, std::size_t number,
                                              std::size_t end, std::size_t t) const noexcept {
    if (x.tile(t).kernel->tile_nt_pieces == nullptr || !members_.empty()) return 0;
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
                                         std::size_t number, std::size_t n, std::size_t t,
                                         bool first, T* sums) const {
    GemmPiece<E> pieces[kMaxGemmPieces];
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const BlockView& block = blocks[number + i - fed_];
        const std::size_t column = place(number + i) % p_.grid.grid_cols();
        const E* const next = first ? next_block<E>(blocks, number + i - fed_, n).begin : nullptr;
        for (unsigned part = 0; part < x.n_parts(); ++part) {
            pieces[count++] = {x.at(column, t, 0, part), reinterpret_cast<const E*>(block.data),
                               block.cols, block.cols, part == 0 ? next : nullptr};
        }
    }
    x.tile(t).kernel->tile_nt_pieces(pieces, count, blocks[number - fed_].rows, sums);
}

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
        if (end < uses.size()) {
            next = next_block<E>(blocks, number - fed_, uses[end].number - number);
        }
        const BlockView& block = blocks[number - fed_];
        const E* const w = read<E>(block, worker.reader);
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

template <class T>
template <class Tile>
void Matmul::Typed<T>::ask_for_y(const Tile& tile, const BlockRect& rect) const noexcept {
    constexpr std::size_t kLine = 64 / sizeof(T);
    for (std::size_t i = 0; i < tile.rows; ++i) {
        const T* const y = y_ + (tile.row0 + i) * n_ + rect.row0;
        for (std::size_t r = 0; r < rect.rows; r += kLine) __builtin_prefetch(y + r, 1, 2);
    }
}

template <class T>
template <class Tile>
void Matmul::Typed<T>::store_sums(const Tile& tile, const BlockRect& rect,
                                  const T* sums) const noexcept {
    const std::size_t group = tile.kernel->sums();
    const std::size_t lanes = tile.sums();
    if (group == 1) {
        detail::transpose_apart(sums, lanes, rect.rows, tile.rows, y_ + tile.row0 * n_ + rect.row0,
                                n_);
        return;
    }
    for (std::size_t i = 0; i < tile.rows; ++i) {
        T* const y = y_ + (tile.row0 + i) * n_ + rect.row0;
        for (std::size_t r = 0; r < rect.rows; ++r) {
            const T* const from = sums + r * lanes + i * group;
            T sum = from[0];
            for (std::size_t j = 1; j < group; ++j) sum += from[j];
            y[r] = sum;
        }
    }
}

template void Matmul::Typed<float>::multiply_packed(const PackedX<float, float>&,
                                                    std::span<const BlockView>, std::size_t,
                                                    std::size_t, unsigned);
template void Matmul::Typed<float>::multiply_packed(const PackedX<std::uint16_t, float>&,
                                                    std::span<const BlockView>, std::size_t,
                                                    std::size_t, unsigned);
template void Matmul::Typed<double>::multiply_packed(const PackedX<double, double>&,
                                                     std::span<const BlockView>, std::size_t,
                                                     std::size_t, unsigned);

}  // namespace pydedup
