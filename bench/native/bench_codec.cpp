// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/codec.hpp"

namespace bench {
namespace {

using namespace pydedup;

struct Data {
    std::vector<std::byte> matrix;
    std::vector<std::byte> arena;
    std::vector<std::byte> decoded;
    std::vector<std::int64_t> indices, offsets;
    std::vector<EncodedBlock> encoded;
    MatrixRef ref{};
    BlockGrid grid{};
};

// Weights as they are in practice: normal with a small deviation, so exponents are skewed.
std::shared_ptr<Data> weights(Dtype dtype) {
    auto data = std::make_shared<Data>();
    const std::size_t rows = 4096;
    const std::size_t cols = 1024;
    const std::size_t item = item_bytes(dtype);
    data->matrix.resize(rows * cols * item);
    std::minstd_rand random(1);
    std::normal_distribution<float> normal(0.0F, 0.02F);
    for (std::size_t i = 0; i < rows * cols; ++i) {
        const float value = normal(random);
        // bf16 is the upper half of f32 (truncated).
        std::memcpy(data->matrix.data() + i * item,
                    reinterpret_cast<const std::byte*>(&value) + (4 - item), item);
    }
    data->ref = {data->matrix.data(), rows, cols, cols * item, dtype};
    data->grid = {rows, cols, 256 / item, 64};
    data->indices.resize(data->grid.count());
    for (std::size_t i = 0; i < data->indices.size(); ++i) {
        data->indices[i] = static_cast<std::int64_t>(i);
    }
    data->arena.resize(raw_bytes_of(data->ref, data->grid, data->indices));
    data->decoded.resize(data->grid.block_rows * data->grid.block_cols * item);
    data->offsets.resize(data->indices.size());
    data->encoded.resize(data->indices.size());
    return data;
}

void encode(Data& data) {
    keep(encode_blocks(data.ref, data.grid, data.indices, true, data.arena, data.offsets,
                       data.encoded, 1));
}

Workload encoding(const char* name, Dtype dtype) {
    auto data = weights(dtype);
    return {name,
            "16 KiB blocks of normal weights to planes, one thread",
            static_cast<double>(data->matrix.size()),
            0,
            static_cast<double>(data->indices.size()),
            [data] { encode(*data); }};
}

Workload decoding(const char* name, Dtype dtype) {
    auto data = weights(dtype);
    encode(*data);
    const auto rows = static_cast<std::uint32_t>(data->grid.block_rows);
    return {name,
            "and back, into one scratch block",
            static_cast<double>(data->matrix.size()),
            0,
            static_cast<double>(data->indices.size()),
            [data, dtype, rows] {
                for (std::size_t i = 0; i < data->indices.size(); ++i) {
                    const BlockView block{data->arena.data() + data->offsets[i],
                                          data->encoded[i].length,
                                          data->encoded[i].encoding,
                                          dtype,
                                          rows,
                                          64,
                                          0};
                    decode_block(block, data->decoded.data(), block.row_bytes());
                }
                keep(data->decoded.data());
            }};
}

}  // namespace

std::vector<Entry> codec_entries() {
    return {
        {"codec.encode-f32", [] { return encoding("codec.encode-f32", Dtype::f32); }},
        {"codec.encode-bf16", [] { return encoding("codec.encode-bf16", Dtype::bf16); }},
        {"codec.decode-f32", [] { return decoding("codec.decode-f32", Dtype::f32); }},
        {"codec.decode-bf16", [] { return decoding("codec.decode-bf16", Dtype::bf16); }},
    };
}

}  // namespace bench
