// SPDX-License-Identifier: Apache-2.0
// 32 x 128 random rows of a table of 400,000 x 300 in 64x64 blocks on pages of 1 MiB: gathered, and
// as 32 sums. Each round takes the next of 16 sets of ids: their rows together are 79 MB.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "harness.hpp"
#include "pydedup/row_table.hpp"

namespace bench {
namespace {

using namespace pydedup;

constexpr std::size_t kCols = 300;
constexpr std::size_t kBlock = 64;
constexpr std::size_t kBag = 128;
constexpr std::size_t kBags = 32;
constexpr std::size_t kSets = 16;
constexpr std::size_t kPageBytes = std::size_t{1} << 20;

struct Table {
    std::unique_ptr<RowTable> rows;
    std::vector<Page> held;
    std::vector<const Page*> pages;
    std::vector<std::int64_t> page_ids;  // ascending
    std::vector<std::vector<std::int64_t>> ids;
    std::size_t set = 0;
    std::vector<std::byte> out;
};

Page make_page(std::span<const BlockView> blocks) {
    const std::size_t bytes = page_bytes(blocks);
    std::shared_ptr<std::byte> memory = large_memory(bytes);
    build_page(blocks, {memory.get(), bytes});
    return Page(std::move(memory), bytes);
}

std::shared_ptr<Table> make_table(Dtype dtype) {
    auto table = std::make_shared<Table>();
    const BlockGrid grid{unless_smoke(400000, 4000), kCols, kBlock, kBlock};
    // One block of numbers: what they are has no influence on the time.
    std::vector<std::uint16_t> numbers(kBlock * kBlock * 2);
    std::minstd_rand random(1);
    for (std::uint16_t& half : numbers) half = static_cast<std::uint16_t>(random() & 0x3FFFU);
    std::vector<std::int64_t> page_of;
    std::vector<std::uint32_t> slots;
    std::vector<BlockView> waiting;
    std::size_t bytes = 0;
    const auto write_page = [&] {
        if (waiting.empty()) return;
        table->page_ids.push_back(static_cast<std::int64_t>(table->held.size()));
        table->held.push_back(make_page(waiting));
        waiting.clear();
        bytes = 0;
    };
    for (std::size_t b = 0; b < grid.count(); ++b) {
        const BlockRect rect = block_rect(grid, b);
        const std::size_t size = rect.rows * rect.cols * item_bytes(dtype);
        const std::size_t room = size + kSlotBytes + kBlockAlignment;
        if (bytes + room + kPageHeaderBytes > kPageBytes) write_page();
        bytes += room;
        page_of.push_back(static_cast<std::int64_t>(table->held.size()));
        slots.push_back(static_cast<std::uint32_t>(waiting.size()));
        waiting.push_back({reinterpret_cast<const std::byte*>(numbers.data()),
                           static_cast<std::uint32_t>(size), Encoding::raw, dtype,
                           static_cast<std::uint32_t>(rect.rows),
                           static_cast<std::uint32_t>(rect.cols), 0});
    }
    write_page();
    for (const Page& page : table->held) table->pages.push_back(&page);
    table->rows = std::make_unique<RowTable>(grid, dtype, page_of, slots);
    std::uniform_int_distribution<std::int64_t> row(0, static_cast<std::int64_t>(grid.rows) - 1);
    for (std::size_t set = 0; set < kSets; ++set) {
        std::vector<std::int64_t>& ids = table->ids.emplace_back(kBags * kBag);
        for (std::int64_t& id : ids) id = row(random);
    }
    table->out.resize(kBags * kBag * kCols * sizeof(float));
    return table;
}

Workload rows(const std::string& name, const std::string& what, Dtype dtype, bool bags,
              unsigned threads) {
    const std::shared_ptr<Table> table = make_table(dtype);
    std::vector<std::int64_t> edges;
    for (std::size_t b = 0; b <= kBags; ++b) edges.push_back(static_cast<std::int64_t>(b * kBag));
    return {name,
            what + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads"),
            static_cast<double>(kBags * kBag * kCols * item_bytes(dtype)),
            0,
            static_cast<double>(kBags * kBag),
            [table, edges, bags, threads] {
                const std::vector<std::int64_t>& ids = table->ids[table->set++ % kSets];
                if (bags) {
                    Bags these(ids, edges);
                    table->rows->bag(table->page_ids, table->pages, these, BagMode::sum,
                                     table->out.data(), threads);
                } else {
                    table->rows->take(table->page_ids, table->pages, ids, table->out.data(),
                                      threads);
                }
                keep(table->out.data());
            },
            threads};
}

}  // namespace

std::vector<Entry> rows_entries() {
    std::vector<Entry> entries;
    const auto add = [&](const std::string& what, const std::string& about, Dtype dtype,
                         bool bags) {
        for (const unsigned threads : {1U, 2U}) {
            const std::string name = "rows." + what + "-t" + std::to_string(threads);
            entries.push_back({name, [=] { return rows(name, about, dtype, bags, threads); }});
        }
    };
    add("gather-f32", "4096 rows of 300 f32", Dtype::f32, false);
    add("bag-f32", "32 sums of 128 rows of 300 f32", Dtype::f32, true);
    add("bag-bf16", "32 sums of 128 rows of 300 bf16", Dtype::bf16, true);
    return entries;
}

}  // namespace bench
