// SPDX-License-Identifier: Apache-2.0
// x, packed for tile_nt as elements E, for sums in A (which x itself is in, or in E): cut into
// strips of columns (one per column of blocks of W), each strip into tiles of rows, and in a tile
// the rows run along the lanes of a vector, `group` columns of each. So all that one block is
// multiplied with lies together. Rows and columns that only fill up a tile are zero.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "base/parallel.hpp"
#include "base/rounding.hpp"
#include "gemm/aligned_array.hpp"
#include "gemm/bf16_parts.hpp"
#include "gemm/transpose.hpp"
#include "kernels/gemm_kernels.hpp"

namespace pydedup::detail {

template <class E, class A>
struct RowTile {
    const GemmTile<E, A>* kernel;
    std::size_t row0;  ///< first row of x
    std::size_t rows;  ///< rows of x in it, at most kernel->width
    std::size_t sum0;  ///< sums of the tiles before it, for one row of W

    /// Elements for one group of columns, and sums for one row of W.
    [[nodiscard]] std::size_t elements() const noexcept { return kernel->width * kernel->group; }
    [[nodiscard]] std::size_t sums() const noexcept { return kernel->width * kernel->sums(); }
};

/// Whether so many rows are taken as a tile of that width: it wastes at most a quarter.
[[nodiscard]] constexpr bool fill(std::size_t rows, std::size_t width) noexcept {
    return 4 * rows >= 3 * width;
}

/// Cuts rows [row, row + left) into tiles, widest first.
template <class E, class A>
std::vector<RowTile<E, A>> cut_rows(std::size_t row, std::size_t left,
                                    std::span<const GemmTile<E, A>> kernels) {
    std::vector<RowTile<E, A>> tiles;
    std::size_t sum = 0;
    while (left > 0) {
        const GemmTile<E, A>* pick = &kernels[0];
        for (const GemmTile<E, A>& tile : kernels) {
            if (tile.width == 0) break;
            pick = &tile;
            if (fill(left, tile.width)) break;
        }
        tiles.push_back({pick, row, std::min(left, pick->width), sum});
        row += tiles.back().rows;
        left -= tiles.back().rows;
        sum += tiles.back().sums();
    }
    return tiles;
}

inline constexpr unsigned kCutParts = 3;

/// How numbers become bf16 numbers.
struct ToPairs {
    const Bf16GemmKernels* kernels = nullptr;
    /// Whether each is cut into three (Bf16GemmKernels::cut, or pack_cut where numbers of W are
    /// cut, too); else it is one already.
    bool cuts = false;
    bool cuts_w = false;
    /// Set where bf16 numbers that are packed, not cut, are subnormal. nullptr: nobody asks.
    std::atomic<bool>* subnormal = nullptr;
};

template <class E, class A>
class PackedX {
  public:
    using Tile = RowTile<E, A>;

    /// Rows [row0, row0 + rows) of x, as `pairs` says where E are bf16 numbers.
    template <class S>
    PackedX(const S* x, std::size_t row0, std::size_t rows, std::size_t cols, std::size_t strip,
            std::span<const GemmTile<E, A>> kernels, unsigned threads, const ToPairs& pairs,
            Scratch<E>& memory)
        : cols_(cols),
          strip_(std::min(strip, cols)),
          pairs_(pairs),
          tiles_(cut_rows(row0, rows, kernels)) {
        const std::size_t strips = ceil_div(cols, strip_);
        places_.reserve(2 * tiles_.size() + 2);
        for (const std::size_t width : {strip_, cols - (strips - 1) * strip_}) {
            std::size_t place = 0;
            for (const Tile& tile : tiles_) {
                places_.push_back(place);
                place += groups(width, tile) * tile.elements();
            }
            places_.push_back(place);
        }
        part_elements_ = (strips - 1) * strip_elements() + places_.back();
        packed_ = memory.at_least(n_parts() * part_elements_);
        if (pairs_.cuts_w) uncut_.resize(strips * tiles_.size());
        // With many rows a tile after another, so that each row is read on where it was left (4096
        // rows, cut: a twentieth of all time); with few, threads share their strips.
        const std::size_t n_tiles = tiles_.size();
        const bool by_tile = n_tiles >= 2 * std::size_t{threads};
        parallel_for(by_tile ? n_tiles : strips, 1, threads,
                     [&](std::size_t begin, std::size_t end) {
                         for (std::size_t i = begin; i < end; ++i) {
                             const std::size_t others = by_tile ? strips : n_tiles;
                             for (std::size_t j = 0; j < others; ++j) {
                                 pack(x, by_tile ? j : i, by_tile ? i : j);
                             }
                         }
                     });
    }

    /// The rows of tile t, one a bit, that could not be cut in strip s: zero here.
    [[nodiscard]] std::uint32_t uncut(std::size_t s, std::size_t t) const noexcept {
        return uncut_[s * tiles_.size() + t];
    }

    /// Elements of one part.
    [[nodiscard]] std::size_t part_elements() const noexcept { return part_elements_; }
    [[nodiscard]] unsigned n_parts() const noexcept { return pairs_.cuts ? kCutParts : 1; }
    [[nodiscard]] std::size_t n_tiles() const noexcept { return tiles_.size(); }
    [[nodiscard]] const Tile& tile(std::size_t t) const noexcept { return tiles_[t]; }

    /// Sums of the tiles before tile t, which may be n_tiles(), for one row of W.
    [[nodiscard]] std::size_t sums_before(std::size_t t) const noexcept {
        if (t < tiles_.size()) return tiles_[t].sum0;
        return tiles_.empty() ? 0 : tiles_.back().sum0 + tiles_.back().sums();
    }

    /// Tile t of strip s from its column c on, a multiple of the tile's group; of one part.
    [[nodiscard]] E* at(std::size_t s, std::size_t t, std::size_t c,
                        unsigned part = 0) const noexcept {
        const bool is_last = cols_ - s * strip_ <= strip_;
        return packed_ + part * part_elements_ + s * strip_elements() +
               places_[t + (is_last ? tiles_.size() + 1 : 0)] + c * tiles_[t].kernel->width;
    }

    /// Bytes of tiles [t0, t1) in all strips and parts, the last strip counted as a whole one.
    [[nodiscard]] std::size_t bytes(std::size_t t0, std::size_t t1) const noexcept {
        return (places_[t1] - places_[t0]) * sizeof(E) * ceil_div(cols_, strip_) * n_parts();
    }

    /// Where tile t of strip s ends.
    [[nodiscard]] const E* end_of(std::size_t s, std::size_t t) const noexcept {
        const bool is_last = cols_ - s * strip_ <= strip_;
        return packed_ + s * strip_elements() + places_[t + 1 + (is_last ? tiles_.size() + 1 : 0)];
    }

  private:
    [[nodiscard]] static std::size_t groups(std::size_t width, const Tile& tile) noexcept {
        return ceil_div(width, tile.kernel->group);
    }

    // Elements of a strip of full width.
    [[nodiscard]] std::size_t strip_elements() const noexcept { return places_[tiles_.size()]; }

    template <class S>
    void pack(const S* x, std::size_t s, std::size_t t) {
        const Tile& tile = tiles_[t];
        const std::size_t width = std::min(strip_, cols_ - s * strip_);
        const S* const from = x + tile.row0 * cols_ + s * strip_;
        if constexpr (std::is_same_v<E, S> && !std::is_same_v<E, A>) {
            if (pairs_.subnormal != nullptr) {
                pack_and_look(from, width, tile, at(s, t, 0));
                return;
            }
        }
        if (!pairs_.cuts) {
            pack_tile(from, cols_, width, tile, at(s, t, 0));
            return;
        }
        if constexpr (!std::is_same_v<E, S>) {
            if (pairs_.cuts_w) {
                E* const to = at(s, t, 0);
                for (unsigned part = 0; part < kCutParts; ++part) {
                    fill_up(width, tile, to + part * part_elements_);
                }
                uncut_[s * tiles_.size() + t] = pairs_.kernels->pack_cut(
                    from, cols_, tile.rows, width, to, part_elements_, tile.elements());
                return;
            }
            const std::size_t count = tile.rows * width;
            const AlignedArray<A> parts(kCutParts * count);
            for (std::size_t i = 0; i < tile.rows; ++i) {
                A* const to = parts.data() + i * width;
                pairs_.kernels->cut(from + i * cols_, width, to, to + count, to + 2 * count);
            }
            for (unsigned part = 0; part < kCutParts; ++part) {
                pack_tile(parts.data() + part * count, width, width, tile, at(s, t, 0, part));
            }
        }
    }

    // Packs a tile of bf16 numbers, and looks at them.
    void pack_and_look(const E* from, std::size_t width, const Tile& tile, E* to) const noexcept {
        bool subnormal = false;
        if (tile.kernel->group == 2) {
            fill_up(width, tile, to);
            subnormal =
                pairs_.kernels->pack_pairs(from, cols_, tile.rows, width, to, tile.elements());
        } else {
            pack_tile(from, cols_, width, tile, to);
            for (std::size_t i = 0; i < tile.rows && !subnormal; ++i) {
                subnormal = has_subnormal(from + i * cols_, width);
            }
        }
        if (subnormal) pairs_.subnormal->store(true, std::memory_order_relaxed);
    }

    static void fill_up(std::size_t width, const Tile& tile, E* to) noexcept {
        if (width % tile.kernel->group != 0 || tile.rows < tile.kernel->width) {
            std::fill_n(to, groups(width, tile) * tile.elements(), E{0});
        }
    }

    // The columns of a group. What a call of memmove makes the loop around it keep on the stack
    // would wait behind these stores, whose lines are another thread's from the product before
    // (8 x 1024 by 1024 x 128, two threads: 23 us instead of 17).
    static void copy_few(const E* from, std::size_t count, E* to) noexcept {
        switch (count) {
            case 2:
                std::copy_n(from, 2, to);
                break;
            case 4:
                std::copy_n(from, 4, to);
                break;
            case 8:
                std::copy_n(from, 8, to);
                break;
            case 16:
                std::copy_n(from, 16, to);
                break;
            default:
                std::copy_n(from, count, to);
        }
    }

    // A cache line of columns at a time: rows of x may lie a power of two apart, and one element
    // of each would evict the next one's line.
    template <class S>
    static void pack_tile(const S* from, std::size_t ld, std::size_t width, const Tile& tile,
                          E* to) noexcept {
        const std::size_t group = tile.kernel->group;
        const std::size_t lanes = tile.kernel->width;
        const std::size_t step = std::max(64 / sizeof(S), group);
        fill_up(width, tile, to);
        if constexpr (std::is_same_v<E, A>) {
            if (group == 1) {
                transpose(from, ld, tile.rows, width, to, tile.elements());
                return;
            }
        } else {
            if (group == 2) {
                transpose_pairs(from, ld, tile.rows, width, to, tile.elements());
                return;
            }
        }
        for (std::size_t c0 = 0; c0 < width; c0 += step) {
            const std::size_t c1 = std::min(width, c0 + step);
            for (std::size_t i = 0; i < tile.rows; ++i) {
                const S* const line = from + i * ld;
                E* const row = to + i * group;
                for (std::size_t c = c0; c < c1; c += group) {
                    const S* const end = line + std::min(c1, c + group);
                    if constexpr (std::is_same_v<E, A>) {
                        copy_few(line + c, static_cast<std::size_t>(end - (line + c)),
                                 row + c * lanes);
                    } else {
                        std::transform(line + c, end, row + c * lanes,
                                       [](S value) { return bf16_bits(value); });
                    }
                }
            }
        }
    }

    std::size_t cols_;
    std::size_t strip_;
    ToPairs pairs_;
    std::size_t part_elements_ = 0;
    std::vector<Tile> tiles_;
    // Where the tiles of a strip of full width begin, and its end; the same for the last strip.
    std::vector<std::size_t> places_;
    std::vector<std::uint32_t> uncut_;  // of W that is cut: by strip and tile
    E* packed_ = nullptr;
};

}  // namespace pydedup::detail
