// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
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

// The same weights after a fine-tune that moved each by 1 % of their spread, as deltas.
struct Versions {
    std::shared_ptr<Data> base;
    std::vector<std::byte> moved;
    MatrixRef ref{};
    std::vector<std::int64_t> limits, estimates;
    std::optional<double> bound;
};

void encode(Versions& v) {
    Data& data = *v.base;
    keep(encode_deltas(v.ref, data.grid, data.indices, {data.ref, data.grid, data.indices},
                       v.limits, v.bound, data.arena, data.offsets, data.encoded, 1));
}

std::shared_ptr<Versions> versions(Dtype dtype, std::optional<double> bound) {
    auto v = std::make_shared<Versions>();
    v->base = weights(dtype);
    Data& data = *v->base;
    v->moved = data.matrix;
    std::minstd_rand random(2);
    std::normal_distribution<float> normal(0.0F, 0.0002F);
    const std::size_t item = item_bytes(dtype);
    for (std::size_t i = 0; i < v->moved.size(); i += item) {
        float value = 0;
        auto* const upper = reinterpret_cast<std::byte*>(&value) + (4 - item);
        std::memcpy(upper, &v->moved[i], item);
        value += normal(random);
        std::memcpy(&v->moved[i], upper, item);
    }
    v->ref = data.ref;
    v->ref.data = v->moved.data();
    v->limits.assign(data.indices.size(), data.grid.block_rows * data.grid.block_cols * item - 1);
    v->estimates.resize(data.indices.size());
    v->bound = bound;
    encode(*v);
    return v;
}

Workload deltas(const char* name, const char* about, Dtype dtype, std::optional<double> bound,
                void (*run)(Versions&)) {
    auto v = versions(dtype, bound);
    return {name,
            about,
            static_cast<double>(v->moved.size()),
            0,
            static_cast<double>(v->base->indices.size()),
            [v, run] { run(*v); }};
}

void estimate(Versions& v) {
    Data& data = *v.base;
    estimate_deltas(v.ref, data.grid, data.indices, {data.ref, data.grid, data.indices}, v.bound,
                    v.estimates, 1);
    keep(v.estimates.data());
}

// Bases lie in rows of their matrix: the same block for all, as raw bytes, would be noticed.
void decode(Versions& v) {
    Data& data = *v.base;
    const auto rows = static_cast<std::uint32_t>(data.grid.block_rows);
    const std::size_t item = item_bytes(data.ref.dtype);
    const std::size_t row_bytes = data.grid.block_cols * item;
    std::vector<std::byte> base(rows * row_bytes);
    for (std::size_t i = 0; i < data.indices.size(); ++i) {
        const BlockRect rect = block_rect(data.grid, i);
        for (std::size_t r = 0; r < rows; ++r) {
            std::memcpy(&base[r * row_bytes],
                        data.ref.data + (rect.row0 + r) * data.ref.stride_bytes + rect.col0 * item,
                        row_bytes);
        }
        decode_delta({data.arena.data() + data.offsets[i], data.encoded[i].length,
                      data.encoded[i].encoding, data.ref.dtype, rows, 64, 1},
                     {base.data(), static_cast<std::uint32_t>(base.size()), Encoding::raw,
                      data.ref.dtype, rows, 64, 0},
                     data.decoded.data(), row_bytes);
    }
    keep(data.decoded.data());
}

}  // namespace

std::vector<Entry> codec_entries() {
    return {
        {"codec.encode-f32", [] { return encoding("codec.encode-f32", Dtype::f32); }},
        {"codec.encode-bf16", [] { return encoding("codec.encode-bf16", Dtype::bf16); }},
        {"codec.decode-f32", [] { return decoding("codec.decode-f32", Dtype::f32); }},
        {"codec.decode-bf16", [] { return decoding("codec.decode-bf16", Dtype::bf16); }},
        {"delta.encode-f32",
         [] {
             return deltas("delta.encode-f32", "16 KiB blocks moved by 1 % of their spread, exact",
                           Dtype::f32, std::nullopt, encode);
         }},
        {"delta.decode-f32",
         [] { return deltas("delta.decode-f32", "and back", Dtype::f32, std::nullopt, decode); }},
        {"delta.estimate-f32",
         [] {
             return deltas("delta.estimate-f32", "their sizes, by sample", Dtype::f32, std::nullopt,
                           estimate);
         }},
        {"delta.encode-bf16",
         [] {
             return deltas("delta.encode-bf16", "the same in bf16, twice as many elements",
                           Dtype::bf16, std::nullopt, encode);
         }},
        {"delta.decode-bf16",
         [] { return deltas("delta.decode-bf16", "and back", Dtype::bf16, std::nullopt, decode); }},
        {"delta.encode-f32-bounded",
         [] {
             return deltas("delta.encode-f32-bounded", "the same within 0.1 % of the norm",
                           Dtype::f32, 0.001, encode);
         }},
        {"delta.decode-f32-bounded",
         [] { return deltas("delta.decode-f32-bounded", "and back", Dtype::f32, 0.001, decode); }},
    };
}

}  // namespace bench
