// SPDX-License-Identifier: Apache-2.0
// Rows by number and bags of rows: any layout and encoding, a part of the pages at a time, many
// threads, pages that are not what the table says; and the kernels that add rows up.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "check.hpp"
#include "gemm_reference.hpp"
#include "kernels.hpp"
#include "pydedup/row_table.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

std::shared_ptr<Page> make_page(std::span<const BlockView> blocks, std::size_t shift = 0) {
    const std::size_t size = page_bytes(blocks);
    const std::shared_ptr<std::byte> memory(new std::byte[size + shift],
                                            [](const std::byte* p) { delete[] p; });
    build_page(blocks, {memory.get(), size});
    std::memmove(memory.get() + shift, memory.get(), size);
    return std::make_shared<Page>(std::shared_ptr<const std::byte>(memory, memory.get() + shift),
                                  size);
}

// A matrix on pages, its blocks dealt out to them in turn. Page number p has the id 10 * p + 3.
struct Stored {
    BlockGrid grid;
    Dtype dtype;
    std::vector<std::int64_t> page_of;
    std::vector<std::uint32_t> slots;
    std::vector<std::int64_t> page_ids;
    std::vector<std::shared_ptr<Page>> pages;

    [[nodiscard]] std::vector<const Page*> plain() const {
        std::vector<const Page*> list;
        for (const auto& page : pages) list.push_back(page.get());
        return list;
    }
};

template <class T>
Stored store(const std::vector<T>& w, const BlockGrid& grid, Dtype dtype, bool planes,
             std::size_t n_pages, std::size_t shift = 0) {
    Stored stored{grid, dtype, {}, {}, {}, {}};
    std::vector<std::vector<std::byte>> memory;
    std::vector<std::vector<BlockView>> on_page(n_pages);
    for (std::size_t i = 0; i < grid.count(); ++i) {
        const BlockRect rect = block_rect(grid, i);
        const MatrixRef block{
            reinterpret_cast<const std::byte*>(w.data() + rect.row0 * grid.cols + rect.col0),
            rect.rows, rect.cols, grid.cols * sizeof(T), dtype};
        std::vector<std::byte>& bytes = memory.emplace_back(rect.rows * rect.cols * sizeof(T));
        // Every other block raw, so that pages hold both.
        const EncodedBlock encoded = encode_block(block, planes && i % 2 == 0, bytes);
        const std::size_t page = i % n_pages;
        stored.page_of.push_back(static_cast<std::int64_t>(10 * page + 3));
        stored.slots.push_back(static_cast<std::uint32_t>(on_page[page].size()));
        on_page[page].push_back({bytes.data(), encoded.length, encoded.encoding, dtype,
                                 static_cast<std::uint32_t>(rect.rows),
                                 static_cast<std::uint32_t>(rect.cols), 0});
    }
    for (std::size_t p = 0; p < n_pages; ++p) {
        stored.page_ids.push_back(static_cast<std::int64_t>(10 * p + 3));
        stored.pages.push_back(make_page(on_page[p], shift));
    }
    return stored;
}

std::unique_ptr<RowTable> open_table(const Stored& stored) {
    return std::make_unique<RowTable>(stored.grid, stored.dtype, stored.page_of, stored.slots);
}

std::vector<std::int64_t> random_ids(std::size_t count, std::size_t rows) {
    std::uniform_int_distribution<std::int64_t> row(0, static_cast<std::int64_t>(rows) - 1);
    std::vector<std::int64_t> ids(count);
    for (std::int64_t& id : ids) id = row(rng());
    return ids;
}

// ---- the table ---------------------------------------------------------------------------------

TEST(rows_and_bags_come_from_the_pages_at_hand) {
    const BlockGrid grid{50, 30, 8, 7};
    auto w = normal<float>(grid.rows * grid.cols);
    for (float& value : w) value = std::round(value * 4);  // small blocks that can be encoded
    const auto ids = random_ids(700, grid.rows);
    std::vector<double> weights;
    for (const float value : normal<float>(ids.size())) weights.push_back(value);
    std::vector<std::int64_t> edges{0, 0};  // begins with an empty bag
    while (edges.back() + 9 < 700) edges.push_back(edges.back() + 9);
    edges.push_back(700);
    const std::size_t n_bags = edges.size() - 1;
    for (const bool planes : {false, true}) {
        for (const std::size_t shift : {std::size_t{0}, std::size_t{1}}) {  // misaligned elements
            const Stored stored = store(w, grid, Dtype::f32, planes, 5, shift);
            const auto table = open_table(stored);
            const auto pages = stored.plain();
            for (const unsigned threads : {1U, 3U}) {
                std::vector<float> out(ids.size() * grid.cols, -1.0F);
                std::vector<float> sums(n_bags * grid.cols, 0.0F);
                std::vector<float> scaled(n_bags * grid.cols, 0.0F);
                std::vector<float> tops(n_bags * grid.cols, -INFINITY);
                const auto bytes = [](auto& v) { return reinterpret_cast<std::byte*>(v.data()); };
                Bags plain(ids, edges), weighted(ids, edges, weights);
                // Two pages, then the others: each call fills in the pieces that it has.
                for (const auto& [at, n] : {std::pair{std::size_t{0}, std::size_t{2}}, {2, 3}}) {
                    const auto some = std::span(stored.page_ids).subspan(at, n);
                    const auto held = std::span<const Page* const>(pages).subspan(at, n);
                    table->take(some, held, ids, bytes(out), threads);
                    table->bag(some, held, plain, BagMode::sum, bytes(sums), threads);
                    table->bag(some, held, weighted, BagMode::sum, bytes(scaled), threads);
                    table->bag(some, held, plain, BagMode::max, bytes(tops), threads);
                }
                // Blocks at hand, of which every other one may have to be decoded.
                std::vector<float> of_blocks(n_bags * grid.cols, 0.0F);
                std::vector<std::int64_t> numbers;
                std::vector<BlockView> views;
                for (std::size_t b = 0; b < grid.count(); ++b) {
                    numbers.push_back(static_cast<std::int64_t>(b));
                    views.push_back(pages[b % pages.size()]->block(stored.slots[b]));
                }
                CHECK((views[0].encoding == Encoding::planes) == planes);
                for (const auto& [at, n] :
                     {std::pair{std::size_t{0}, std::size_t{9}}, {9, grid.count() - 9}}) {
                    table->bag(std::span(numbers).subspan(at, n),
                               std::span<const BlockView>(views).subspan(at, n), plain,
                               BagMode::sum, bytes(of_blocks), threads);
                }
                // In any order of the ids, and all pages at once: the same bits.
                auto other_ids = ids;
                for (std::size_t b = 0; b < n_bags; ++b) {
                    std::reverse(other_ids.begin() + edges[b], other_ids.begin() + edges[b + 1]);
                }
                std::vector<float> at_once(n_bags * grid.cols, 0.0F);
                Bags others(other_ids, edges);
                table->bag(stored.page_ids, pages, others, BagMode::sum, bytes(at_once), threads);
                CHECK(at_once == of_blocks);
                bool rows_hold = true;
                std::vector<double> want(sums.size(), 0.0), want_scaled(sums.size(), 0.0);
                std::vector<float> want_tops(tops.size(), -INFINITY);
                std::size_t bag = 0;
                for (std::size_t i = 0; i < ids.size(); ++i) {
                    while (static_cast<std::size_t>(edges[bag + 1]) <= i) ++bag;
                    for (std::size_t c = 0; c < grid.cols; ++c) {
                        const float value = w[static_cast<std::size_t>(ids[i]) * grid.cols + c];
                        rows_hold = rows_hold && out[i * grid.cols + c] == value;
                        want[bag * grid.cols + c] += value;
                        want_scaled[bag * grid.cols + c] += value * weights[i];
                        float& top = want_tops[bag * grid.cols + c];
                        top = std::max(top, value);
                    }
                }
                CHECK(rows_hold);
                CHECK(tops == want_tops);
                bool sums_hold = true;
                for (std::size_t i = 0; i < sums.size(); ++i) {
                    sums_hold = sums_hold && std::abs(sums[i] - want[i]) < 1e-4 &&
                                std::abs(scaled[i] - want_scaled[i]) < 1e-4 &&
                                std::abs(of_blocks[i] - want[i]) < 1e-4;
                }
                CHECK(sums_hold);
            }
        }
    }
}

TEST(bags_are_sorted_by_ids_and_weights_stay_with_theirs) {
    for (const std::size_t count : {0, 1, 2, 23, 24, 300}) {
        for (const std::int64_t most : {std::int64_t{3}, std::int64_t{200}, std::int64_t{1} << 40,
                                        std::numeric_limits<std::int64_t>::max()}) {
            std::uniform_int_distribution<std::int64_t> number(0, most);
            std::vector<std::int64_t> ids{most, 0};  // a bag before
            std::vector<double> weights{0.5, 0.25};
            std::vector<Bags::Weighted> want;
            for (std::size_t i = 0; i < count; ++i) {
                ids.push_back(number(rng()));
                weights.push_back(static_cast<double>(i));
                want.push_back({ids.back(), weights.back()});
            }
            std::stable_sort(want.begin(), want.end(),
                             [](const auto& a, const auto& b) { return a.id < b.id; });
            const std::vector<std::int64_t> edges{0, 2, static_cast<std::int64_t>(count) + 2};
            Bags plain(ids, edges), weighted(ids, edges, weights);
            Bags::Scratch scratch;
            for (int round = 0; round < 2; ++round) {
                const Bags::Bag one = plain.sorted(1, scratch);
                const Bags::Bag other = weighted.sorted(1, scratch);
                bool holds = one.ids.size() == count && other.ids.size() == count;
                for (std::size_t i = 0; holds && i < count; ++i) {
                    holds = one.ids[i] == want[i].id && other.ids[i] == want[i].id &&
                            other.weights[i] == want[i].weight;
                }
                CHECK(holds && one.weights == nullptr);
            }
            const Bags::Bag before = weighted.sorted(0, scratch);
            CHECK(before.ids[0] == 0 && before.weights[0] == 0.25 && before.weights[1] == 0.5);
        }
    }
}

TEST(pages_of_names_what_is_needed) {
    const BlockGrid grid{40, 12, 4, 5};  // 3 blocks side by side
    const Stored stored = store(normal<float>(480), grid, Dtype::f32, false, 7);
    const auto table = open_table(stored);
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{3}}) {
        const auto ids = random_ids(count, grid.rows);
        std::vector<std::int64_t> want;
        for (const std::int64_t id : ids) {
            for (std::size_t c = 0; c < 3; ++c) {
                want.push_back(stored.page_of[static_cast<std::size_t>(id) / 4 * 3 + c]);
            }
        }
        std::sort(want.begin(), want.end());
        want.erase(std::unique(want.begin(), want.end()), want.end());
        CHECK(table->pages_of(ids) == want);
    }
}

TEST(matrices_without_elements_have_empty_rows) {
    const std::vector<std::int64_t> ids{0, 2, 1};
    const std::span<const Page* const> no_pages;
    const std::span<const BlockView> no_blocks;
    const RowTable narrow({3, 0, 1, 1}, Dtype::f32, {}, {});
    CHECK(narrow.pages_of(ids).empty());
    narrow.take({}, no_pages, ids, nullptr);
    narrow.take({}, no_blocks, ids, nullptr);
    const RowTable empty({0, 5, 1, 1}, Dtype::f32, {}, {});
    CHECK_THROWS(ErrorCode::invalid_argument, empty.take({}, no_pages, ids, nullptr));
    CHECK_THROWS(ErrorCode::invalid_argument, empty.take({}, no_blocks, ids, nullptr));
    empty.take({}, no_pages, {}, nullptr);
    empty.take({}, no_blocks, {}, nullptr);
}

TEST(what_does_not_fit_is_refused) {
    const BlockGrid grid{4, 4, 2, 2};
    const Stored stored = store(normal<float>(16), grid, Dtype::f32, false, 2);
    const auto table = open_table(stored);
    const auto pages = stored.plain();
    std::vector<float> out(16);
    auto* const to = reinterpret_cast<std::byte*>(out.data());
    const std::vector<std::int64_t> good{0, 1}, above{4}, below{-1}, swapped{13, 3}, strange{3, 14};
    const auto wrong = ErrorCode::invalid_argument;
    CHECK_THROWS(wrong, table->take(stored.page_ids, pages, above, to));
    CHECK_THROWS(wrong, table->take(stored.page_ids, pages, below, to));
    CHECK_THROWS(wrong, static_cast<void>(table->pages_of(above)));
    CHECK_THROWS(wrong, table->take(swapped, pages, good, to));
    CHECK_THROWS(wrong, table->take(strange, pages, good, to));
    CHECK_THROWS(wrong, table->take(std::span(stored.page_ids).first(1), pages, good, to));
    for (const std::vector<std::int64_t>& edges : std::vector<std::vector<std::int64_t>>{
             {}, {0}, {0, 1}, {1, 2}, {0, 2, 1, 2}, {0, 3}, {0, -1, 2}}) {
        CHECK_THROWS(wrong, Bags(good, edges));
    }
    CHECK_THROWS(wrong, Bags(good, {0, 2}, std::vector<double>{1.0}));
    CHECK_THROWS(wrong, Bags(good, {0, 2}, std::vector<double>{}));
    Bags scaled(good, {0, 2}, std::vector<double>{1.0, 2.0});
    CHECK_THROWS(wrong, table->bag(stored.page_ids, pages, scaled, BagMode::max, to));
    for (const auto& ids : {above, below}) {
        Bags outside(ids, {0, 1});
        CHECK_THROWS(wrong, table->bag(stored.page_ids, pages, outside, BagMode::sum, to));
    }
    CHECK_THROWS(wrong,
                 RowTable(grid, Dtype::f32, std::span(stored.page_of).first(3), stored.slots));
    CHECK_THROWS(wrong,
                 RowTable(grid, Dtype::f32, stored.page_of, std::span(stored.slots).first(3)));
}

TEST(pages_with_other_blocks_are_corrupt) {
    const BlockGrid grid{4, 4, 2, 2};
    const std::vector<std::int64_t> ids{0, 3};
    std::vector<float> out(8);
    auto* const to = reinterpret_cast<std::byte*>(out.data());
    const Stored stored = store(normal<float>(16), grid, Dtype::f32, false, 2);
    const auto wrong = ErrorCode::corrupt_page;
    // Another dtype, another shape, a slot that is not there.
    const RowTable halves(grid, Dtype::i32, stored.page_of, stored.slots);
    CHECK_THROWS(wrong, halves.take(stored.page_ids, stored.plain(), ids, to));
    const Stored tall = store(normal<float>(16), {4, 4, 1, 4}, Dtype::f32, false, 2);
    const auto table = open_table(stored);
    CHECK_THROWS(wrong, table->take(tall.page_ids, tall.plain(), ids, to));
    auto slots = stored.slots;
    slots[1] = 9;
    const RowTable beyond(grid, Dtype::f32, stored.page_of, slots);
    CHECK_THROWS(wrong, beyond.take(stored.page_ids, stored.plain(), ids, to));
    // The same blocks read anew are fine, others under the same id are not.
    table->take(stored.page_ids, stored.plain(), ids, to);
    const auto first = out;
    Stored again = stored;
    for (auto& page : again.pages) {
        std::vector<BlockView> blocks;
        for (std::size_t slot = 0; slot < page->n_slots(); ++slot) {
            blocks.push_back(page->block(slot));
        }
        page = make_page(blocks);
    }
    table->take(again.page_ids, again.plain(), ids, to);
    CHECK(out == first);
    const Stored other = store(normal<float>(16), grid, Dtype::f32, false, 2);
    CHECK_THROWS(wrong, table->take(other.page_ids, other.plain(), ids, to));
}

TEST(many_threads_learn_one_table) {
    const BlockGrid grid{300, 20, 7, 6};
    const auto w = normal<float>(grid.rows * grid.cols);
    const Stored stored = store(w, grid, Dtype::f32, true, 9);
    const auto table = open_table(stored);
    const auto pages = stored.plain();
    const auto ids = random_ids(400, grid.rows);
    std::vector<float> want(ids.size() * grid.cols);
    for (std::size_t i = 0; i < ids.size(); ++i) {
        std::copy_n(w.begin() + ids[i] * static_cast<std::int64_t>(grid.cols), grid.cols,
                    want.begin() + static_cast<std::int64_t>(i * grid.cols));
    }
    std::vector<std::vector<float>> outs(4, std::vector<float>(want.size()));
    {
        std::vector<std::jthread> threads;
        for (std::size_t t = 0; t < outs.size(); ++t) {
            threads.emplace_back([&, t] {
                auto* const out = reinterpret_cast<std::byte*>(outs[t].data());
                // A page of its own, while the others learn theirs; then all.
                table->take(std::span(stored.page_ids).subspan(t, 1),
                            std::span(pages).subspan(t, 1), ids, out);
                table->take(stored.page_ids, pages, ids, out, 2);
            });
        }
    }
    for (const auto& out : outs) CHECK(out == want);
}

// ---- kernels -----------------------------------------------------------------------------------

template <class T>
void check_sums(RowsKernels::Sum<T, T> sum, std::size_t count, std::size_t n, bool scaled) {
    const auto rows = normal<T>(count * n);
    const auto scale = normal<T>(n);
    const auto before = normal<T>(count);
    std::vector<const T*> from;
    for (std::size_t i = 0; i < n; ++i) from.push_back(rows.data() + i * count);
    auto after = before;
    after.push_back(T{99});  // must stay
    sum(from.data(), n, scaled ? scale.data() : nullptr, count, after.data());
    bool holds = after.back() == T{99};
    for (std::size_t j = 0; j < count; ++j) {
        long double want = before[j];
        double magnitude = std::abs(before[j]);
        for (std::size_t i = 0; i < n; ++i) {
            const long double term =
                static_cast<long double>(rows[i * count + j]) * (scaled ? scale[i] : T{1});
            want += term;
            magnitude += static_cast<double>(std::abs(term));
        }
        holds =
            holds && std::abs(static_cast<double>(after[j] - want)) <= bound<T>(n + 1, magnitude);
    }
    CHECK(holds);
}

TEST(every_kernel_adds_rows) {
    for (const KernelTable* table : runnable_kernels()) {
        for (const std::size_t count : {1, 3, 7, 16, 44, 64, 65, 131, 300}) {
            for (const std::size_t n : {0, 1, 2, 9, 40}) {
                for (const bool scaled : {false, true}) {
                    check_sums<float>(table->rows.sum_f32, count, n, scaled);
                    check_sums<double>(table->rows.sum_f64, count, n, scaled);
                }
            }
        }
    }
}

TEST(every_kernel_widens_halves_as_the_reference) {
    // Small integers are exact in both formats, and so are their sums: all kernels agree.
    const auto as_bf16 = [](int value) {
        const auto wide = static_cast<float>(value);
        std::uint32_t bits;
        std::memcpy(&bits, &wide, 4);
        return static_cast<std::uint16_t>(bits >> 16);
    };
    const auto as_f16 = [](int value) {  // of 0 to 15: exponent and 10 bits of mantissa
        if (value == 0) return std::uint16_t{0};
        int exponent = 0;
        while (value >> (exponent + 1) != 0) ++exponent;
        return static_cast<std::uint16_t>((exponent + 15) << 10 |
                                          (value << 10 >> exponent & 0x3FF));
    };
    std::uniform_int_distribution<int> draw(0, 15);
    for (const KernelTable* table : runnable_kernels()) {
        for (const std::size_t count : {1, 5, 8, 37, 64, 150}) {
            std::vector<std::uint16_t> bf16(12 * count), f16(12 * count);
            std::vector<float> want(count, 1.0F);
            for (std::size_t k = 0; k < bf16.size(); ++k) {
                const int value = draw(rng());
                bf16[k] = as_bf16(value);
                f16[k] = as_f16(value);
                want[k % count] += static_cast<float>(value) * 2.0F;
            }
            const std::vector<float> scale(12, 2.0F);
            for (const bool brain : {true, false}) {
                std::vector<const std::uint16_t*> from;
                for (std::size_t i = 0; i < 12; ++i) {
                    from.push_back((brain ? bf16 : f16).data() + i * count);
                }
                std::vector<float> sum(count, 1.0F);
                (brain ? table->rows.sum_bf16 : table->rows.sum_f16)(from.data(), 12, scale.data(),
                                                                     count, sum.data());
                CHECK(sum == want);
            }
        }
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
