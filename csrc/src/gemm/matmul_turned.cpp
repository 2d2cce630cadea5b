// SPDX-License-Identifier: Apache-2.0
// Products of many rows of x where W is packed, not x (turned_product.hpp, turned_cut_product.hpp):
// their tasks, and the rows that they leave.
#include <algorithm>
#include <atomic>

#include "gemm/matmul_typed.hpp"
#include "gemm/turned_cut_product.hpp"
#include "gemm/turned_product.hpp"

namespace pydedup {

using detail::AlignedArray;
using detail::TurnedCutProduct;
using detail::TurnedProduct;

template <class T>
template <class E>
bool Matmul::Typed<T>::multiply_turned(const Packing<E, T>& packing,
                                       std::span<const BlockView> blocks, unsigned threads) {
    if (cuts_w<E>()) return multiply_turned_cut(packing, blocks, threads);
    const TurnedProduct turned(p_, kernels_, y_, threads);
    if (!turned.gains()) return false;
    const std::size_t chunks = turned.chunks();
    each_task((chunks + 1) * turned.groups(), threads, [&](std::size_t i, Worker& worker) {
        const std::size_t group = i / (chunks + 1);
        const std::size_t chunk = i % (chunks + 1);
        if (chunk < chunks) {
            turned.multiply(chunk, group, blocks, worker.reader, worker.x_pairs, worker.sums,
                            subnormal_);
        } else if (turned.rows() < p_.m) {
            const auto [begin, end] = turned.panels(group);
            multiply_rows(packing, blocks, turned.rows(), p_.m - turned.rows(), begin, end, worker);
        }
    });
    return true;
}

template <class T>
template <class E>
bool Matmul::Typed<T>::multiply_turned_cut(const Packing<E, T>& packing,
                                           std::span<const BlockView> blocks, unsigned threads) {
    const TurnedCutProduct turned(p_, kernels_, x_, y_, threads);
    if (!turned.gains()) return false;
    const AlignedArray<std::uint16_t> packed(turned.packed_elements());
    for (std::size_t group = 0; group < turned.groups(); ++group) {
        const auto [begin, end] = turned.panels(group);
        const std::size_t first = begin * p_.grid.grid_cols();
        std::atomic<bool> is_cut{true};
        each_task(end * p_.grid.grid_cols() - first, threads, [&](std::size_t i, Worker& worker) {
            const std::size_t number = first + i;
            if (!turned.pack(blocks[number], number, group, worker.reader, packed.data())) {
                is_cut = false;
            }
        });
        each_task(turned.chunks() + 1, threads, [&](std::size_t chunk, Worker& worker) {
            const auto otherwise = [&](const TurnedCutProduct::Rows& rows) {
                multiply_rows(packing, blocks, rows.begin, rows.count, begin, end, worker);
            };
            if (chunk == turned.chunks()) {
                if (turned.rows() < p_.m) otherwise({turned.rows(), p_.m - turned.rows()});
            } else if (is_cut) {
                turned.multiply(turned.rows_of(chunk), group, packed.data(), worker.strips,
                                otherwise);
            } else {
                otherwise(turned.rows_of(chunk));
            }
        });
    }
    return true;
}

template <class T>
template <class E>
void Matmul::Typed<T>::multiply_rows(const Packing<E, T>& packing,
                                     std::span<const BlockView> blocks, std::size_t row,
                                     std::size_t rows, std::size_t begin, std::size_t end,
                                     Worker& worker) const {
    const auto x = packing.pack(row, rows, 1, worker.template memory_of_x<E>());
    if (!subnormal_) multiply_panels(x, blocks, begin, end, 0, x.n_tiles(), worker);
}

template bool Matmul::Typed<float>::multiply_turned(const Packing<std::uint16_t, float>&,
                                                    std::span<const BlockView>, unsigned);

}  // namespace pydedup
