// SPDX-License-Identifier: Apache-2.0
// The frame around the micro-kernels, and products with few rows of x.
#include "pydedup/gemm.hpp"

#include "gemm/activation.hpp"
#include "gemm/matmul_typed.hpp"
#include "gemm/useful_threads.hpp"

namespace pydedup {
namespace {

using detail::AlignedArray;
using detail::ceil_div;
using detail::PackedX;
using detail::WeightReader;

// Rows of x from which on cutting it gains (2 rows: 1.9 ms instead of 1.4; 8: 1.7 instead of 1.9).
constexpr std::size_t kMinCutRows = 8;
// Rows of x from which on cutting W gains, too.
constexpr std::size_t kMinRowsOfCuts = 112;
// Numbers that a thread widens, or rounds, at once.
constexpr std::size_t kWidenPiece = std::size_t{1} << 14;

}  // namespace

template <class T>
Matmul::Typed<T>::Typed(const Problem& problem)
    : Impl(problem),
      kernels_(kernels().gemm),
      x_(problem.x_is_bf16 ? nullptr : reinterpret_cast<const T*>(problem.x)),
      bias_(reinterpret_cast<const T*>(problem.bias)),
      y_(problem.y_is_bf16 ? nullptr : reinterpret_cast<T*>(problem.y)),
      halves_(problem.y_is_bf16 ? reinterpret_cast<std::uint16_t*>(problem.y) : nullptr),
      n_(problem.transpose ? problem.grid.cols : problem.grid.rows) {
    if (p_.grid.count() == 0) {  // no weights: an empty sum
        need_y();
        std::fill_n(y_, p_.m * n_, T{0});
        finish(0, p_.m, 0, n_);
        round_y();
        return;
    }
    if constexpr (sizeof(T) == 4) {
        if (p_.x_is_bf16) {
            const auto* const x = reinterpret_cast<const std::uint16_t*>(problem.x);
            if (p_.variants == nullptr && takes_pairs()) {  // until one turns out to be subnormal
                set_pairs(x, {&kernels_.bf16, false, false, &subnormal_});
                return;
            }
            widen_x();
        }
        if (takes_cuts()) {
            set_cuts();
            return;
        }
        if (takes_pairs()) {
            const std::size_t count = p_.m * p_.grid.cols;
            const bool may_cut = kernels_.bf16.cut != nullptr && p_.m >= kMinCutRows;
            const unsigned parts = detail::bf16_parts(x_, count, may_cut, threads_for(count));
            if (parts != 0) {
                set_pairs(x_, {&kernels_.bf16, parts != 1, false, nullptr});
                return;
            }
        }
    }
    set_packed();
}

template <class T>
bool Matmul::Typed<T>::takes_pairs() const noexcept {
    return p_.weights == Dtype::bf16 && kernels_.bf16.tiles[0].width != 0 && !p_.transpose &&
           p_.m > own().dot_max_m;
}

template <class T>
bool Matmul::Typed<T>::takes_cuts() const noexcept {
    if (kernels_.bf16.tiles[0].tile_nt_cut == nullptr || p_.m < kMinRowsOfCuts ||
        p_.variants != nullptr || (p_.transpose ? !p_.places.empty() : takes_pairs())) {
        return false;
    }
    // What fills a block up to whole registers must not take longer than that saves.
    const std::size_t rows = std::min<std::size_t>(p_.grid.block_rows, p_.grid.rows);
    const std::size_t cols = std::min<std::size_t>(p_.grid.block_cols, p_.grid.cols);
    const std::size_t filled = p_.transpose ? cut_elements(cols, rows) : cut_elements(rows, cols);
    return 4 * filled <= 5 * rows * cols;
}

template <class T>
void Matmul::Typed<T>::widen_x() {
    if constexpr (sizeof(T) == 4) {
        const auto* const x = reinterpret_cast<const std::uint16_t*>(p_.x);
        const std::size_t count = p_.m * (p_.transpose ? p_.grid.rows : p_.grid.cols);
        wide_ = AlignedArray<T>(count);
        parallel_for(count, kWidenPiece, threads_for(count),
                     [&](std::size_t begin, std::size_t end) {
                         kernels_.bf16_to_f32(x + begin, end - begin, wide_.data() + begin);
                     });
        x_ = wide_.data();
    }
}

template <class T>
void Matmul::Typed<T>::set_cuts() {
    if constexpr (sizeof(T) == 4) {
        const detail::ToPairs pairs{&kernels_.bf16, true, true, nullptr};
        if (!p_.transpose) return set_pairs(x_, pairs);
        const std::span<const GemmTile<std::uint16_t, float>> widest(kernels_.bf16.tiles, 1);
        tiled_ = p_.m / widest[0].width * widest[0].width;
        set_packing(pairs_, x_, tiled_, p_.grid.rows, p_.grid.block_rows, widest, pairs);
    }
}

template <class T>
void Matmul::Typed<T>::set_packed() {
    if (p_.transpose) {
        // Whole tiles of the widest kind, as long as all rows have the same blocks.
        const std::span<const typename GemmKernelsOf<T>::Tile> widest(own().tiles, 1);
        const bool alike = p_.places.empty() && p_.variants == nullptr;
        tiled_ = alike ? p_.m / widest[0].width * widest[0].width : 0;
        if (tiled_ != 0) {
            set_packing(packed_, x_, tiled_, p_.grid.rows, p_.grid.block_rows, widest, {});
        }
    } else if (p_.m > own().dot_max_m) {
        set_packing(packed_, x_, p_.m, p_.grid.cols, p_.grid.block_cols,
                    std::span<const typename GemmKernelsOf<T>::Tile>(own().tiles), {});
    }
}

template <class T>
template <class S, class E, class A>
void Matmul::Typed<T>::set_packing(Packing<E, A>& packing, const S* x, std::size_t rows,
                                   std::size_t cols, std::size_t strip,
                                   std::span<const GemmTile<E, A>> tiles,
                                   const detail::ToPairs& pairs) {
    packing.rows = rows;
    packing.width = tiles[0].width;
    packing.bytes_of_row = cols * sizeof(E) * (pairs.cuts ? detail::kCutParts : 1);
    packing.pack = [=](std::size_t row0, std::size_t count, unsigned threads,
                       detail::Scratch<E>& memory) {
        return PackedX<E, A>(x, row0, count, cols, strip, tiles, threads, pairs, memory);
    };
}

template <class T>
template <class S>
void Matmul::Typed<T>::set_pairs(const S* x, const detail::ToPairs& pairs) {
    if constexpr (sizeof(T) == 4) {
        set_packing(pairs_, x, p_.m, p_.grid.cols, p_.grid.block_cols,
                    std::span<const GemmTile<std::uint16_t, float>>(kernels_.bf16.tiles), pairs);
    }
}

template <class T>
void Matmul::Typed<T>::need_y() {
    if (y_ != nullptr) return;
    wide_y_ = AlignedArray<T>(p_.m * n_);
    y_ = wide_y_.data();
}

template <class T>
void Matmul::Typed<T>::round_y() {
    if constexpr (sizeof(T) == 4) {
        if (halves_ == nullptr || y_ == nullptr) return;
        // x is needed no more, and would lie beside y in both dtypes.
        packed_ = {};
        pairs_ = {};
        wide_ = {};
        const std::size_t count = p_.m * n_;
        parallel_for(count, kWidenPiece, threads_for(count),
                     [&](std::size_t begin, std::size_t end) {
                         kernels_.f32_to_bf16(y_ + begin, end - begin, halves_ + begin);
                     });
    }
}

template <class T>
void Matmul::Typed<T>::multiply(std::span<const BlockView> blocks) {
    const bool is_all = blocks.size() == count();
    // Sums that wait for another block, and those that variants add to, rest in y.
    if (!is_all || p_.transpose || p_.variants != nullptr || !(packed_.pack || pairs_.pack)) {
        need_y();
    }
    multiply_all(blocks);
    if (fed_ + blocks.size() == count()) round_y();
}

template <class T>
void Matmul::Typed<T>::multiply_all(std::span<const BlockView> blocks) {
    const BlockGrid& grid = p_.grid;
    std::size_t weights = 0;
    for (const BlockView& block : blocks) weights += std::size_t{block.rows} * block.cols;
    const unsigned threads = threads_for(weights * p_.m);
    if (p_.transpose) {
        const auto multiply_tiled = [&](auto& packing) {
            const auto& x = packed_whole(packing);
            const std::size_t group =
                panels_together(x, grid.grid_cols(), grid.block_cols, threads);
            run(ceil_div(grid.grid_cols(), group), x.n_tiles(), packing.width, threads,
                [&](const Task& task, Worker& worker) {
                    const std::size_t column = task.panel * group;
                    multiply_nn_tiles(x, blocks, column, std::min(column + group, grid.grid_cols()),
                                      task.unit0, task.unit1, worker);
                });
        };
        if (packed_.pack) multiply_tiled(packed_);
        if constexpr (sizeof(T) == 4) {
            if (pairs_.pack) multiply_tiled(pairs_);
        }
        if (tiled_ == p_.m) return;
        const std::size_t group = columns_together(threads);
        run(ceil_div(grid.grid_cols(), group), p_.m - tiled_, 1, threads,
            [&](const Task& task, Worker& worker) {
                const std::size_t column = task.panel * group;
                multiply_nn(blocks, column, std::min(column + group, grid.grid_cols()),
                            tiled_ + task.unit0, tiled_ + task.unit1, worker.reader);
            });
        return;
    }
    const std::size_t first = place(fed_) / grid.grid_cols();
    const std::size_t panels = place(fed_ + blocks.size() - 1) / grid.grid_cols() - first + 1;
    if (packed_.pack) {
        multiply_packed(packed_, blocks, first, panels, threads);
        return;
    }
    if constexpr (sizeof(T) == 4) {
        if (pairs_.pack) {
            multiply_packed(pairs_, blocks, first, panels, threads);
            if (!subnormal_) return;
            // Nothing that was made of them counts: all of it comes once more, in f32.
            subnormal_ = false;
            pairs_ = {};
            widen_x();
            set_packed();
            multiply_all(blocks);
            return;
        }
    }
    run(panels, p_.m, 1, threads, [&](const Task& task, Worker& worker) {
        multiply_dots(blocks, first + task.panel, task.unit0, task.unit1, worker.reader);
    });
}

template <class T>
unsigned Matmul::Typed<T>::threads_for(std::size_t work) const noexcept {
    return detail::useful_threads(p_.threads, static_cast<double>(work));
}

template <class T>
void Matmul::Typed<T>::finish(std::size_t i0, std::size_t i1, std::size_t j0,
                              std::size_t count) const noexcept {
    for (std::size_t i = i0; i < i1; ++i) {
        detail::finish_row(y_ + i * n_ + j0, count, bias_ == nullptr ? nullptr : bias_ + j0,
                           p_.activation);
    }
}

template <class T>
void Matmul::Typed<T>::multiply_dots(std::span<const BlockView> blocks, std::size_t row,
                                     std::size_t i0, std::size_t i1,
                                     WeightReader<T>& reader) const {
    const Part part = part_of_row(row, blocks.size());
    const BlockRect rect = block_rect(p_.grid, row * p_.grid.grid_cols());
    T* const y = y_ + i0 * n_ + rect.row0;
    if (part.starts) {
        for (std::size_t i = 0; i < i1 - i0; ++i) std::fill_n(y + i * n_, rect.rows, T{0});
    }
    for (std::size_t number = part.begin; number < part.end; ++number) {
        const std::size_t column = place(number) % p_.grid.grid_cols();
        for_rows_with(number, i0, i1, [&](std::size_t begin, std::size_t end) {
            dot(x_ + begin * p_.grid.cols + column * p_.grid.block_cols, end - begin,
                blocks[number - fed_], y_ + begin * n_ + rect.row0, n_, reader);
        });
    }
    if (part.ends) finish(i0, i1, rect.row0, rect.rows);
}

template <class T>
void Matmul::Typed<T>::dot(const T* x, std::size_t m, const BlockView& block, T* y, std::size_t ldy,
                           WeightReader<T>& reader) const {
    const std::size_t ldx = p_.grid.cols;
    if constexpr (sizeof(T) == 4) {
        // Widened as it is read: no scratch between the page and the registers.
        if (block.dtype == Dtype::bf16 || block.dtype == Dtype::f16) {
            const auto* const w = reinterpret_cast<const std::uint16_t*>(reader.stored(block));
            const auto kernel =
                block.dtype == Dtype::bf16 ? kernels_.dot_nt_bf16 : kernels_.dot_nt_f16;
            kernel(x, ldx, m, w, block.rows, block.cols, block.cols, y, ldy);
            return;
        }
    }
    own().dot_nt(x, ldx, m, reader.read(block), block.rows, block.cols, block.cols, y, ldy);
}

template class Matmul::Typed<float>;
template class Matmul::Typed<double>;

Matmul::Matmul(const Problem& problem) {
    if (compute_dtype(problem.weights) == Dtype::f64) {
        impl_ = std::make_unique<Typed<double>>(problem);
    } else {
        impl_ = std::make_unique<Typed<float>>(problem);
    }
}

Matmul::~Matmul() = default;
Matmul::Matmul(Matmul&&) noexcept = default;
Matmul& Matmul::operator=(Matmul&&) noexcept = default;

void Matmul::feed(std::span<const BlockView> blocks, std::span<const std::uint64_t> members) {
    impl_->feed(blocks, members);
}

std::size_t Matmul::fed() const noexcept { return impl_->fed(); }

}  // namespace pydedup
