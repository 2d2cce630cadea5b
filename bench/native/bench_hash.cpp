// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "harness.hpp"
#include "hash_pieces.hpp"
#include "pydedup/hash.hpp"

namespace bench {
namespace {

using pydedup::BlockGrid;
using pydedup::Digest;
using pydedup::MatrixRef;

Entry piece_entry(const HashPiece& piece) {
    const std::string name = std::string("hash.cached-") + piece.name;
    return {name, [name, piece] {
                auto data = piece_bytes(piece);
                return Workload{name, piece.what, static_cast<double>(piece.bytes), 0, 1, [=] {
                                    keep(pydedup::hash_bytes({reinterpret_cast<const std::byte*>(
                                                                  piece_start(*data, piece)),
                                                              piece.bytes}));
                                }};
            }};
}

struct Shape {
    std::size_t rows, cols, block_rows, block_cols;
};

Entry matrix_entry(const std::string& name, const std::string& what, const Shape& shape,
                   unsigned threads = 1) {
    return {name, [=] {
                const std::size_t rows = unless_smoke(shape.rows, 2 * shape.block_rows);
                const auto values = large_memory(rows * shape.cols * sizeof(float));
                std::minstd_rand random(1);
                for (float& value :
                     std::span(reinterpret_cast<float*>(values.get()), rows * shape.cols)) {
                    value = static_cast<float>(random() >> 8);
                }
                const BlockGrid grid{rows, shape.cols, shape.block_rows, shape.block_cols};
                auto digests = std::make_shared<std::vector<Digest>>(grid.count());
                const MatrixRef ref{values.get(), rows, shape.cols, shape.cols * 4,
                                    pydedup::Dtype::f32};
                return Workload{name,
                                what,
                                static_cast<double>(rows * shape.cols * 4),
                                0,
                                static_cast<double>(grid.count()),
                                [=] {
                                    hash_blocks(ref, grid, 0, *digests, threads);
                                    keep(values.get());
                                },
                                threads};
            }};
}

}  // namespace

std::vector<Entry> hash_entries() {
    std::vector<Entry> entries;
    for (const HashPiece& piece : kHashPieces) entries.push_back(piece_entry(piece));
    entries.insert(
        entries.end(),
        {matrix_entry("hash.cached-64x64", "64x64 f32 blocks of 128x384, in cache",
                      {128, 384, 64, 64}),
         matrix_entry("hash.memory-64k", "64 KiB rows, 128 MiB from memory",
                      {2048, 16384, 1, 16384}),
         matrix_entry("hash.memory-64x64", "64x64 f32 blocks of 32768x1024, from memory",
                      {32768, 1024, 64, 64}),
         matrix_entry("hash.memory-64x64-t2", "the same with two threads", {32768, 1024, 64, 64},
                      2),
         matrix_entry("hash.memory-80x50", "80x50 f32 blocks of 400000x50 (GloVe), from memory",
                      {400000, 50, 80, 50})});
    return entries;
}

}  // namespace bench
