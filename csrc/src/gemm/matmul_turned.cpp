// SPDX-License-Identifier: Apache-2.0
// Products of many rows of x where W is packed, not x (turned_product.hpp, turned_cut_product.hpp):
// their tasks, and the rows that they leave.
#include "gemm/matmul_typed.hpp"
#include "gemm/turned_cut_product.hpp"
#include "gemm/turned_product.hpp"

namespace pydedup {

using detail::TurnedCutProduct;
using detail::TurnedProduct;

template <class T>
template <class E>
bool Matmul::Typed<T>::multiply_turned(const Packing<E, T>& packing,
                                       std::span<const BlockView> blocks, unsigned threads) {
    const auto multiply_by = [&](const auto& turned, const auto& multiply) {
        if (!turned.gains()) return false;
        const std::size_t chunks = turned.chunks();
        each_task((chunks + 1) * turned.groups(), threads, [&](std::size_t i, Worker& worker) {
            const std::size_t group = i / (chunks + 1);
            const std::size_t chunk = i % (chunks + 1);
            const auto otherwise = [&](std::size_t row, std::size_t rows) {
                const auto x = packing.pack(row, rows, 1, worker.template memory_of_x<E>());
                const auto [begin, end] = turned.panels(group);
                if (!subnormal_) multiply_panels(x, blocks, begin, end, 0, x.n_tiles(), worker);
            };
            if (chunk < chunks) {
                multiply(chunk, group, worker, otherwise);
            } else if (turned.rows() < p_.m) {  // too few for a tile of that kind
                otherwise(turned.rows(), p_.m - turned.rows());
            }
        });
        return true;
    };
    if (cuts_w<E>()) {
        const TurnedCutProduct turned(p_, kernels_, x_, y_, threads);
        return multiply_by(turned, [&](std::size_t chunk, std::size_t group, Worker& worker,
                                       const auto& otherwise) {
            turned.multiply(chunk, group, blocks, worker.reader, worker.packed_w, worker.strips,
                            otherwise);
        });
    }
    const TurnedProduct turned(p_, kernels_, y_, threads);
    return multiply_by(turned,
                       [&](std::size_t chunk, std::size_t group, Worker& worker, const auto&) {
                           turned.multiply(chunk, group, blocks, worker.reader, worker.packed_w,
                                           worker.sums, subnormal_);
                       });
}

template bool Matmul::Typed<float>::multiply_turned(const Packing<std::uint16_t, float>&,
                                                    std::span<const BlockView>, unsigned);

}  // namespace pydedup
