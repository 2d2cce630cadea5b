// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
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
    const std::size_t rows = unless_smoke(4096, 256);
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
    std::vector<std::int32_t> of_rows, of_cols;
    std::vector<std::int64_t> row_of, col_of;
    std::optional<LowRankFactors> factors;
};

void encode(Versions& v) {
    Data& data = *v.base;
    keep(encode_deltas(v.ref, data.grid, data.indices, {data.ref, data.grid, data.indices},
                       v.limits, v.bound, data.arena, data.offsets, data.encoded, 1,
                       v.factors ? &*v.factors : nullptr));
}

std::shared_ptr<Versions> unmoved(Dtype dtype, std::optional<double> bound) {
    auto v = std::make_shared<Versions>();
    v->base = weights(dtype);
    Data& data = *v->base;
    v->moved = data.matrix;
    v->ref = data.ref;
    v->ref.data = v->moved.data();
    v->limits.assign(data.indices.size(),
                     data.grid.block_rows * data.grid.block_cols * item_bytes(dtype) - 1);
    v->estimates.resize(data.indices.size());
    v->bound = bound;
    return v;
}

// Element i becomes to(element, i), of which a narrow dtype has the upper part.
template <class To>
void move(Versions& v, To to) {
    const std::size_t item = item_bytes(v.ref.dtype);
    for (std::size_t i = 0; i < v.moved.size() / item; ++i) {
        float value = 0;
        auto* const upper = reinterpret_cast<std::byte*>(&value) + (4 - item);
        std::memcpy(upper, &v.moved[i * item], item);
        value = to(value, i);
        std::memcpy(&v.moved[i * item], upper, item);
    }
}

std::shared_ptr<Versions> versions(Dtype dtype, std::optional<double> bound) {
    auto v = unmoved(dtype, bound);
    std::minstd_rand random(2);
    std::normal_distribution<float> normal(0.0F, 0.0002F);
    move(*v, [&](float value, std::size_t) { return value + normal(random); });
    encode(*v);
    return v;
}

// After an adapter of this rank was merged, whose factors have as many bits as ingest finds; one
// element of ten is off by one, as sums are that were rounded otherwise.
std::shared_ptr<Versions> merged(Dtype dtype, unsigned rank) {
    auto v = unmoved(dtype, std::nullopt);
    const BlockGrid& grid = v->base->grid;
    const int bits = dtype == Dtype::f32 ? 22 : 7;
    const double largest = std::ldexp(1.0, bits);
    const int exponent = static_cast<int>(std::lround(
        std::log2(0.0002 / (largest * largest / 3 * std::sqrt(static_cast<double>(rank))))));
    std::minstd_rand random(2);
    const auto draw = [&](std::size_t n) {
        std::uniform_int_distribution<std::int32_t> number(-(1 << bits), 1 << bits);
        std::vector<std::int32_t> numbers(n * rank);
        for (std::int32_t& of : numbers) of = number(random);
        return numbers;
    };
    v->of_rows = draw(grid.rows);
    v->of_cols = draw(grid.cols);
    for (const std::int64_t i : v->base->indices) {
        const BlockRect rect = block_rect(grid, static_cast<std::size_t>(i));
        v->row_of.push_back(static_cast<std::int64_t>(rect.row0 / grid.block_rows));
        v->col_of.push_back(static_cast<std::int64_t>(rect.col0 / grid.block_cols));
    }
    v->factors = LowRankFactors{rank, exponent, v->of_rows, v->of_cols, v->row_of, v->col_of};
    const auto number = [rank](const std::vector<std::int32_t>& of, std::size_t at,
                               std::size_t block, unsigned k) {
        return static_cast<double>(of[(at / block * rank + k) * block + at % block]);
    };
    const unsigned unused = dtype == Dtype::f32 ? 0 : 16;
    move(*v, [&](float value, std::size_t i) {
        double sum = 0;
        for (unsigned k = 0; k < rank; ++k) {
            sum += number(v->of_rows, i / grid.cols, grid.block_rows, k) *
                   number(v->of_cols, i % grid.cols, grid.block_cols, k);
        }
        auto moved = std::bit_cast<std::uint32_t>(
            static_cast<float>(static_cast<double>(value) + std::ldexp(sum, exponent)));
        if (unused != 0) moved += 0x7FFF + (moved >> unused & 1);
        if (random() % 10 == 0) moved += 1U << unused;
        return std::bit_cast<float>(moved);
    });
    encode(*v);
    return v;
}

Workload deltas(const std::string& name, const std::string& about,
                const std::shared_ptr<Versions>& v, void (*run)(Versions&)) {
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
    std::vector<Entry> entries = {
        {"codec.encode-f32", [] { return encoding("codec.encode-f32", Dtype::f32); }},
        {"codec.encode-bf16", [] { return encoding("codec.encode-bf16", Dtype::bf16); }},
        {"codec.decode-f32", [] { return decoding("codec.decode-f32", Dtype::f32); }},
        {"codec.decode-bf16", [] { return decoding("codec.decode-bf16", Dtype::bf16); }},
        {"delta.encode-f32",
         [] {
             return deltas("delta.encode-f32", "16 KiB blocks moved by 1 % of their spread, exact",
                           versions(Dtype::f32, std::nullopt), encode);
         }},
        {"delta.decode-f32",
         [] {
             return deltas("delta.decode-f32", "and back", versions(Dtype::f32, std::nullopt),
                           decode);
         }},
        {"delta.estimate-f32",
         [] {
             return deltas("delta.estimate-f32", "their sizes, by sample",
                           versions(Dtype::f32, std::nullopt), estimate);
         }},
        {"delta.encode-bf16",
         [] {
             return deltas("delta.encode-bf16", "the same in bf16, twice as many elements",
                           versions(Dtype::bf16, std::nullopt), encode);
         }},
        {"delta.decode-bf16",
         [] {
             return deltas("delta.decode-bf16", "and back", versions(Dtype::bf16, std::nullopt),
                           decode);
         }},
        {"delta.encode-f32-bounded",
         [] {
             return deltas("delta.encode-f32-bounded", "the same within 0.1 % of the norm",
                           versions(Dtype::f32, 0.001), encode);
         }},
        {"delta.decode-f32-bounded",
         [] {
             return deltas("delta.decode-f32-bounded", "and back", versions(Dtype::f32, 0.001),
                           decode);
         }},
    };
    for (const auto& [dtype, of] : {std::pair{Dtype::f32, "f32"}, {Dtype::bf16, "bf16"}}) {
        for (const unsigned rank : {8U, 32U}) {
            const std::string what = "-" + std::string(of) + "-rank-" + std::to_string(rank);
            const auto add = [&](const std::string& name, const char* about,
                                 void (*run)(Versions&)) {
                entries.push_back({name, [=, dtype = dtype] {
                                       return deltas(name, about, merged(dtype, rank), run);
                                   }});
            };
            add("delta.encode" + what, "16 KiB blocks moved by factors of this rank", encode);
            add("delta.decode" + what, "and back", decode);
        }
    }
    return entries;
}

}  // namespace bench
