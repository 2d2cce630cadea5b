// SPDX-License-Identifier: Apache-2.0
// Rows and bags of a table on two pages, and convolutions.
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "pydedup/conv.hpp"
#include "pydedup/row_table.hpp"
#include "workloads.hpp"

namespace gate {
namespace {

using namespace pydedup;

constexpr std::size_t kBlock = 64;

struct Table {
    std::vector<Page> held;
    std::vector<const Page*> pages;
    std::vector<std::int64_t> page_ids{0, 1};
    std::unique_ptr<RowTable> rows;
    std::vector<std::int64_t> ids, edges;
    Buffer out;
};

// 256 x 300, the blocks on the two pages in turn; 8 bags of 32 rows.
std::shared_ptr<Table> make_table(Dtype dtype) {
    auto table = std::make_shared<Table>();
    const BlockGrid grid{256, 300, kBlock, kBlock};
    const Buffer numbers = weights(kBlock * kBlock, dtype);
    std::vector<BlockView> on_page[2];
    std::vector<std::int64_t> page_of;
    std::vector<std::uint32_t> slots;
    for (std::size_t b = 0; b < grid.count(); ++b) {
        const BlockRect rect = block_rect(grid, b);
        std::vector<BlockView>& blocks = on_page[b % 2];
        page_of.push_back(static_cast<std::int64_t>(b % 2));
        slots.push_back(static_cast<std::uint32_t>(blocks.size()));
        blocks.push_back({numbers->data(),
                          static_cast<std::uint32_t>(rect.rows * rect.cols * item_bytes(dtype)),
                          Encoding::raw, dtype, static_cast<std::uint32_t>(rect.rows),
                          static_cast<std::uint32_t>(rect.cols), 0});
    }
    for (const std::vector<BlockView>& blocks : on_page) {
        const std::size_t bytes = page_bytes(blocks);
        const std::shared_ptr<std::byte> memory(new std::byte[bytes],
                                                [](const std::byte* at) { delete[] at; });
        build_page(blocks, {memory.get(), bytes});
        table->held.emplace_back(memory, bytes);
    }
    for (const Page& page : table->held) table->pages.push_back(&page);
    table->rows = std::make_unique<RowTable>(grid, dtype, page_of, slots);
    std::minstd_rand random(1);
    for (std::int64_t i = 0; i < 256; ++i) table->ids.push_back((random() >> 7) % 256);
    for (std::int64_t i = 0; i <= 256; i += 32) table->edges.push_back(i);
    table->out = make_buffer(256 * 300 * sizeof(float));
    return table;
}

Workload gather(const std::string& name) {
    return {name, [] {
                const auto table = make_table(Dtype::f32);
                return [=] {
                    table->rows->take(table->page_ids, table->pages, table->ids, table->out->data(),
                                      1);
                };
            }};
}

Workload bag(const std::string& name, Dtype dtype, BagMode mode, bool weighted) {
    return {name, [=] {
                const auto table = make_table(dtype);
                return [=] {
                    std::optional<std::vector<double>> factors;
                    if (weighted) factors.emplace(table->ids.size(), 0.5);
                    Bags bags(table->ids, table->edges, std::move(factors));
                    table->rows->bag(table->page_ids, table->pages, bags, mode, table->out->data(),
                                     1);
                };
            }};
}

// An image of 20 x 20, kernels of 3 x 3 with a border of zeros or of 1 x 1.
Workload conv(const std::string& name, std::size_t channels, std::size_t out, std::size_t kernel,
              std::size_t stride, std::size_t groups) {
    return {name, [=] {
                constexpr std::size_t kSize = 20;
                const std::size_t pad = kernel / 2;
                const ConvShape shape{1,      channels, kSize, kSize, out, kernel, kernel, stride,
                                      stride, 1,        1,     pad,   pad, pad,    pad,    groups};
                const BlockGrid grid{out, channels / groups * kernel * kernel, kBlock, kBlock};
                const Buffer x = weights(channels * kSize * kSize, Dtype::f32);
                const Buffer w = weights(out * grid.cols, Dtype::f32);
                const Buffer y = make_buffer(out * shape.out_h() * shape.out_w() * sizeof(float));
                std::vector<BlockView> blocks;
                const std::byte* at = w->data();
                for (std::size_t b = 0; b < grid.count(); ++b) {
                    const BlockRect rect = block_rect(grid, b);
                    const std::size_t bytes = rect.rows * rect.cols * sizeof(float);
                    blocks.push_back({at, static_cast<std::uint32_t>(bytes), Encoding::raw,
                                      Dtype::f32, static_cast<std::uint32_t>(rect.rows),
                                      static_cast<std::uint32_t>(rect.cols), 0});
                    at += bytes;
                }
                return [=, held = w] {
                    Conv2d convolution({grid, Dtype::f32, shape, x->data(), nullptr,
                                        Activation::none, y->data(), 1});
                    convolution.feed(blocks);
                };
            }};
}

}  // namespace

std::vector<Workload> rows_workloads() {
    return {gather("rows.gather"), bag("rows.bag", Dtype::f32, BagMode::sum, false),
            bag("rows.bag-weighted", Dtype::f32, BagMode::sum, true),
            bag("rows.bag-bf16", Dtype::bf16, BagMode::sum, false),
            bag("rows.bag-max", Dtype::f32, BagMode::max, false)};
}

std::vector<Workload> conv_workloads() {
    return {conv("conv.3x3", 16, 64, 3, 1, 1), conv("conv.3x3-stride-2", 16, 64, 3, 2, 1),
            conv("conv.1x1", 64, 64, 1, 1, 1), conv("conv.depthwise", 64, 64, 3, 1, 64)};
}

}  // namespace gate
