// SPDX-License-Identifier: Apache-2.0
// Through the public headers alone: what is counted includes the dispatch and the loops around the
// kernels, and the kernels may be cut differently without a change here.
#include "workloads.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>

#include "pydedup/codec.hpp"
#include "pydedup/gemm.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/packing.hpp"
#include "pydedup/similarity.hpp"

namespace gate {

using namespace pydedup;

Buffer make_buffer(std::size_t bytes) { return std::make_shared<std::vector<std::byte>>(bytes); }

// Sums of three uniform numbers, near enough to weights; made of integers and exact divisions, so
// that every library gives the same.
Buffer weights(std::size_t count, Dtype dtype) {
    const std::size_t item = item_bytes(dtype);
    Buffer data = make_buffer(count * item);
    std::minstd_rand random(1);
    for (std::size_t i = 0; i < count; ++i) {
        float sum = 0;
        for (int j = 0; j < 3; ++j) sum += static_cast<float>(random() >> 15) / 65536.0F - 0.5F;
        const float value = sum / 16;
        // bf16 is the upper half of f32 (truncated).
        std::memcpy(data->data() + i * item,
                    reinterpret_cast<const std::byte*>(&value) + (4 - item), item);
    }
    return data;
}

namespace {

Workload hash_piece(const std::string& name, std::size_t bytes, std::uint64_t seed,
                    std::size_t times) {
    return {name, [=] {
                const Buffer data = weights(bytes / 4 + 1, Dtype::f32);
                return [=] {
                    for (std::size_t i = 0; i < times; ++i) {
                        keep(hash_bytes({data->data(), bytes}, seed));
                    }
                };
            }};
}

Workload hash_matrix(const std::string& name, std::size_t block_rows, std::size_t block_cols) {
    return {name, [=] {
                constexpr std::size_t kRows = 128;
                constexpr std::size_t kCols = 500;
                const Buffer data = weights(kRows * kCols, Dtype::f32);
                const BlockGrid grid{kRows, kCols, block_rows, block_cols};
                auto digests = std::make_shared<std::vector<Digest>>(grid.count());
                return [=] {
                    hash_blocks({data->data(), kRows, kCols, kCols * 4, Dtype::f32}, grid, 0,
                                *digests, 1);
                };
            }};
}

constexpr std::size_t kBlock = 64;

struct Encoded {
    Buffer source, target, decoded;
    MatrixRef ref;
    EncodedBlock block;
};

std::shared_ptr<Encoded> encoded(Dtype dtype) {
    auto made = std::make_shared<Encoded>();
    const std::size_t item = item_bytes(dtype);
    made->source = weights(kBlock * kBlock, dtype);
    made->target = make_buffer(kBlock * kBlock * item);
    made->decoded = make_buffer(kBlock * kBlock * item);
    made->ref = {made->source->data(), kBlock, kBlock, kBlock * item, dtype};
    made->block = encode_block(made->ref, true, *made->target);
    return made;
}

Workload encode(const std::string& name, Dtype dtype) {
    return {name, [=] {
                auto data = encoded(dtype);
                return [=] { keep(encode_block(data->ref, true, *data->target)); };
            }};
}

Workload decode(const std::string& name, Dtype dtype) {
    return {name, [=] {
                auto data = encoded(dtype);
                return [=] {
                    const BlockView view{data->target->data(),
                                         data->block.length,
                                         data->block.encoding,
                                         dtype,
                                         kBlock,
                                         kBlock,
                                         0};
                    decode_block(view, data->decoded->data(), view.row_bytes());
                };
            }};
}

// A fine-tune: nine of ten elements moved a little. `max_error` 0 is an exact delta.
Workload delta(const std::string& name, Dtype dtype, double max_error, bool decoding) {
    return {name, [=] {
                const std::size_t item = item_bytes(dtype);
                const std::size_t bytes = kBlock * kBlock * item;
                const Buffer base = weights(kBlock * kBlock, dtype);
                const Buffer block = make_buffer(bytes);
                for (std::size_t i = 0; i < bytes; i += item) {
                    float value = 0;  // of bf16, the upper half
                    auto* const upper = reinterpret_cast<std::byte*>(&value) + (4 - item);
                    std::memcpy(upper, base->data() + i, item);
                    if (i % 40 != 0) value += value / static_cast<float>(64 + i % 77);
                    std::memcpy(block->data() + i, upper, item);
                }
                const Buffer encoded = make_buffer(bytes);
                const auto encode = [=] {
                    return encode_delta({block->data(), kBlock, kBlock, kBlock * item, dtype},
                                        {base->data(), kBlock, kBlock, kBlock * item, dtype},
                                        max_error > 0 ? std::optional(max_error) : std::nullopt,
                                        *encoded);
                };
                const EncodedBlock made = encode().value();
                std::function<void()> call = [=] { keep(encode()); };
                if (decoding) {
                    call = [=] {
                        decode_delta(
                            {encoded->data(), made.length, made.encoding, dtype, kBlock, kBlock, 1},
                            {base->data(), static_cast<std::uint32_t>(bytes), Encoding::raw, dtype,
                             kBlock, kBlock, 0},
                            block->data(), kBlock * item);
                    };
                }
                return call;
            }};
}

// Moved by factors whose numbers have as many bits as those of merged adapters: all of 23 where
// f32 has them, 8 in bf16, one element in ten being off by one.
struct Merged {
    Buffer base = nullptr, block = nullptr, encoded = nullptr;
    std::vector<std::int32_t> of_rows, of_cols;
    std::vector<std::int64_t> zero{0};
    EncodedBlock made{};
};

std::shared_ptr<Merged> merged(Dtype dtype, unsigned rank) {
    auto data = std::make_shared<Merged>();
    const std::size_t item = item_bytes(dtype);
    const unsigned shift = dtype == Dtype::f32 ? 8 : 23;  // of draws of 31 bits
    data->base = weights(kBlock * kBlock, dtype);
    data->block = make_buffer(data->base->size());
    data->encoded = make_buffer(data->base->size());
    std::minstd_rand random(2);
    for (auto* numbers : {&data->of_rows, &data->of_cols}) {
        for (std::size_t i = 0; i < kBlock * rank; ++i) {
            const auto draw = static_cast<std::int32_t>(random() >> shift);
            numbers->push_back(draw - (1 << (30 - shift)));
        }
    }
    for (std::size_t i = 0; i < kBlock * kBlock; ++i) {
        double sum = 0;
        for (std::size_t k = 0; k < rank; ++k) {
            sum += static_cast<double>(data->of_rows[k * kBlock + i / kBlock]) *
                   data->of_cols[k * kBlock + i % kBlock];
        }
        float value = 0;
        auto* const upper = reinterpret_cast<std::byte*>(&value) + (4 - item);
        std::memcpy(upper, data->base->data() + i * item, item);
        value = static_cast<float>(static_cast<double>(value) +
                                   std::ldexp(sum, dtype == Dtype::f32 ? -57 : -27));
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        if (item == 2) bits += 0x7FFFU + (bits >> 16 & 1U);
        if (random() % 10 == 0) bits += item == 2 ? 1U << 16 : 1U;
        std::memcpy(data->block->data() + i * item,
                    reinterpret_cast<const std::byte*>(&bits) + (4 - item), item);
    }
    return data;
}

Workload delta_with_factors(const std::string& name, Dtype dtype, unsigned rank, bool decoding) {
    return {
        name, [=] {
            auto data = merged(dtype, rank);
            const std::size_t row_bytes = kBlock * item_bytes(dtype);
            const auto encode = [=] {
                const BlockGrid grid{kBlock, kBlock, kBlock, kBlock};
                const LowRankFactors factors{rank,          dtype == Dtype::f32 ? -57 : -27,
                                             data->of_rows, data->of_cols,
                                             data->zero,    data->zero};
                const std::vector<std::int64_t> limit{
                    static_cast<std::int64_t>(data->encoded->size())};
                std::vector<std::int64_t> offset(1);
                keep(encode_deltas(
                    {data->block->data(), kBlock, kBlock, row_bytes, dtype}, grid, data->zero,
                    {{data->base->data(), kBlock, kBlock, row_bytes, dtype}, grid, data->zero},
                    limit, std::nullopt, *data->encoded, offset, {&data->made, 1}, 1, &factors));
            };
            encode();
            std::function<void()> call = encode;
            if (decoding) {
                call = [=] {
                    decode_delta(
                        {data->encoded->data(), data->made.length, data->made.encoding, dtype,
                         kBlock, kBlock, 1},
                        {data->base->data(), static_cast<std::uint32_t>(data->base->size()),
                         Encoding::raw, dtype, kBlock, kBlock, 0},
                        data->block->data(), row_bytes);
                };
            }
            return call;
        }};
}

Workload matmul(const std::string& name, std::size_t m, Dtype dtype, bool transpose = false) {
    return {name, [=] {
                constexpr std::size_t kSize = 256;
                const std::size_t block_bytes = kBlock * kBlock * item_bytes(dtype);
                const Buffer w = weights(kSize * kSize, dtype);
                const Buffer x = weights(m * kSize, Dtype::f32);
                const Buffer y = make_buffer(m * kSize * 4);
                std::vector<BlockView> blocks;
                for (std::size_t at = 0; at < w->size(); at += block_bytes) {
                    blocks.push_back({w->data() + at, static_cast<std::uint32_t>(block_bytes),
                                      Encoding::raw, dtype, kBlock, kBlock, 0});
                }
                return [=, held = w] {
                    Matmul product({{kSize, kSize, kBlock, kBlock},
                                    dtype,
                                    x->data(),
                                    m,
                                    nullptr,
                                    Activation::none,
                                    transpose,
                                    y->data(),
                                    1});
                    product.feed(blocks);
                };
            }};
}

Workload activation(const std::string& name, Activation kind) {
    return {name, [=] {
                const Buffer values = weights(16384, Dtype::f32);
                return [=] { activate(values->data(), Dtype::f32, 16384, kind, 1); };
            }};
}

// 16 blocks of 64x64 one after another.
struct Similar {
    Buffer data;
    BlockBatch batch;
    std::vector<std::int64_t> numbers;
};

std::shared_ptr<Similar> similar_blocks() {
    auto made = std::make_shared<Similar>();
    constexpr std::size_t kCount = 16;
    made->data = weights(kCount * kBlock * kBlock, Dtype::f32);
    made->batch = dense_blocks(made->data->data(), kCount, kBlock, kBlock, Dtype::f32);
    for (std::size_t i = 0; i < kCount; ++i) made->numbers.push_back(static_cast<std::int64_t>(i));
    return made;
}

std::vector<Workload> similarity_workloads() {
    const LshParameters parameters{Dtype::f32, kBlock, kBlock, 0.5, 16, 4, 7};
    return {{"similarity.hashes",
             [=] {
                 auto blocks = similar_blocks();
                 auto index = std::make_shared<L2Index>(parameters);
                 auto out = std::make_shared<std::vector<std::int32_t>>(16 * 64);
                 return [=] { index->hashes(blocks->batch, *out, 1); };
             }},
            {"similarity.compare",
             [] {
                 auto blocks = similar_blocks();
                 auto right = blocks->numbers;
                 std::swap(right.front(), right.back());
                 auto out = std::make_shared<std::vector<Distance>>(16);
                 return [=] {
                     compare_blocks(blocks->batch, blocks->batch, blocks->numbers, right, 0.01, 10,
                                    *out, 1);
                 };
             }},
            {"similarity.magnitudes", [] {
                 auto blocks = similar_blocks();
                 auto out = std::make_shared<std::vector<double>>(16);
                 return [=] { block_magnitudes(blocks->batch, *out, 1); };
             }}};
}

Workload packing(const std::string& name, PackAlgorithm algorithm) {
    return {name, [=] {
                auto ids = std::make_shared<std::vector<std::int64_t>>();
                auto indptr = std::make_shared<std::vector<std::int64_t>>(1, 0);
                for (std::int64_t model = 0; model < 5; ++model) {
                    for (std::int64_t block = 0; block < 2000; ++block) {
                        if (block % 4 < 2 || block % 5 == model) ids->push_back(block);
                    }
                    indptr->push_back(static_cast<std::int64_t>(ids->size()));
                }
                return [=] {
                    PackRequest request{{*indptr, *ids}, 44};
                    request.algorithm = algorithm;
                    keep(pack_pages(request).page_ids.size());
                };
            }};
}

}  // namespace

std::vector<Workload> workloads() {
    std::vector<Workload> all = {
        hash_piece("hash.64-bytes", 64, 0, 64),
        hash_piece("hash.64-bytes-seeded", 64, 7, 64),
        hash_piece("hash.64-kib", 65536, 0, 1),
        hash_piece("hash.64-kib-and-5", 65541, 0, 1),
        hash_matrix("hash.matrix-64x64", 64, 64),
        hash_matrix("hash.matrix-16x7", 16, 7),
        encode("codec.encode-f32", Dtype::f32),
        encode("codec.encode-bf16", Dtype::bf16),
        decode("codec.decode-f32", Dtype::f32),
        decode("codec.decode-bf16", Dtype::bf16),
        delta("codec.encode-delta", Dtype::f32, 0, false),
        delta("codec.decode-delta", Dtype::f32, 0, true),
        delta("codec.encode-delta-bf16", Dtype::bf16, 0, false),
        delta("codec.decode-delta-bf16", Dtype::bf16, 0, true),
        delta("codec.encode-quantised", Dtype::f32, 0.01, false),
        delta("codec.decode-quantised", Dtype::f32, 0.01, true),
        delta_with_factors("codec.encode-rank-8", Dtype::f32, 8, false),
        delta_with_factors("codec.decode-rank-8", Dtype::f32, 8, true),
        delta_with_factors("codec.decode-rank-32", Dtype::f32, 32, true),
        delta_with_factors("codec.encode-rank-8-bf16", Dtype::bf16, 8, false),
        delta_with_factors("codec.decode-rank-8-bf16", Dtype::bf16, 8, true),
        delta_with_factors("codec.decode-rank-32-bf16", Dtype::bf16, 32, true),
        matmul("gemm.nt-m1", 1, Dtype::f32),
        matmul("gemm.nt-m8", 8, Dtype::f32),
        matmul("gemm.nt-m64", 64, Dtype::f32),
        matmul("gemm.nt-m1-bf16", 1, Dtype::bf16),
        matmul("gemm.nt-m64-bf16", 64, Dtype::bf16),
        matmul("gemm.nn-m1", 1, Dtype::f32, true),
        matmul("gemm.nn-m64", 64, Dtype::f32, true),
        activation("gemm.gelu", Activation::gelu),
        packing("pack.layout", PackAlgorithm::layout),
        packing("pack.two-stage", PackAlgorithm::two_stage),
    };
    for (const auto& more : {similarity_workloads(), rows_workloads(), conv_workloads()}) {
        all.insert(all.end(), more.begin(), more.end());
    }
    return all;
}

}  // namespace gate
