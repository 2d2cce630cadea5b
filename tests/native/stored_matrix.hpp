// SPDX-License-Identifier: Apache-2.0
// What tests of streaming products share: matrices in blocks, and products with them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "check.hpp"
#include "pydedup/gemm.hpp"

namespace pydedup::testing {

// A matrix as blocks in memory of their own.
struct Stored {
    BlockGrid grid;
    Dtype dtype;
    std::vector<std::vector<std::byte>> memory;
    std::vector<BlockView> blocks;
};

template <class T>
Stored store(const std::vector<T>& w, const BlockGrid& grid, Dtype dtype, bool planes) {
    Stored stored{grid, dtype, {}, {}};
    for (std::size_t i = 0; i < grid.count(); ++i) {
        const BlockRect rect = block_rect(grid, i);
        const MatrixRef block{
            reinterpret_cast<const std::byte*>(w.data() + rect.row0 * grid.cols + rect.col0),
            rect.rows, rect.cols, grid.cols * sizeof(T), dtype};
        std::vector<std::byte> bytes(rect.rows * rect.cols * sizeof(T));
        const EncodedBlock encoded = encode_block(block, planes, bytes);
        bytes.resize(encoded.length);
        stored.memory.push_back(std::move(bytes));
        stored.blocks.push_back({stored.memory.back().data(), encoded.length, encoded.encoding,
                                 dtype, static_cast<std::uint32_t>(rect.rows),
                                 static_cast<std::uint32_t>(rect.cols), 0});
    }
    return stored;
}

template <class T>
std::vector<T> multiply(const Stored& w, const std::vector<T>& x, std::size_t m, bool transpose,
                        Activation activation = Activation::none, const T* bias = nullptr,
                        unsigned threads = 1, std::size_t piece = static_cast<std::size_t>(-1)) {
    // Begins as NaN: what is not written shows.
    std::vector<T> y(m * (transpose ? w.grid.cols : w.grid.rows),
                     std::numeric_limits<T>::quiet_NaN());
    Matmul matmul({w.grid, w.dtype, reinterpret_cast<const std::byte*>(x.data()), m,
                   reinterpret_cast<const std::byte*>(bias), activation, transpose,
                   reinterpret_cast<std::byte*>(y.data()), threads});
    for (std::size_t at = 0; at < w.blocks.size();) {
        const std::size_t n = std::min(piece, w.blocks.size() - at);
        matmul.feed(std::span(w.blocks).subspan(at, n));
        at += n;
    }
    CHECK(matmul.fed() == w.grid.count());
    return y;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace pydedup::testing
