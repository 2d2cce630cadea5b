// SPDX-License-Identifier: Apache-2.0
// Rows by number and bags of rows, out of a pool or of pages at hand.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "blocks.hpp"
#include "pydedup/buffer_pool.hpp"
#include "pydedup/row_table.hpp"

namespace pydedup {
namespace {

std::unique_ptr<RowTable> make_table(std::size_t rows, std::size_t cols, std::size_t block_rows,
                                     std::size_t block_cols, int dtype,
                                     const Array<std::int64_t>& page_ids,
                                     const Array<std::uint32_t>& slots,
                                     const std::optional<Array<std::int64_t>>& base_page_ids,
                                     const std::optional<Array<std::uint32_t>>& base_slots) {
    const std::vector<std::int64_t> pages = as_copy(page_ids, "page_ids");
    const std::vector<std::uint32_t> slot_of = as_copy(slots, "slots");
    std::vector<std::int64_t> base_pages;
    std::vector<std::uint32_t> base_slot_of;
    if (base_page_ids) base_pages = as_copy(*base_page_ids, "base_page_ids");
    if (base_slots) base_slot_of = as_copy(*base_slots, "base_slots");
    const BlockGrid grid = as_grid(rows, cols, block_rows, block_cols);
    const Dtype type = as_dtype(dtype);
    const WithoutGil no_gil;
    return std::make_unique<RowTable>(grid, type, pages, slot_of, base_pages, base_slot_of);
}

std::byte* rows_out(const RowTable& table, Array<std::uint8_t>& out, std::size_t rows) {
    const std::size_t row_bytes = table.grid().cols * item_bytes(table.dtype());
    if (out.ndim() != 2 || static_cast<std::size_t>(out.shape(0)) != rows ||
        static_cast<std::size_t>(out.shape(1)) != row_bytes) {
        throw Error(ErrorCode::invalid_argument, "out must be uint8 of shape (" +
                                                     std::to_string(rows) + ", " +
                                                     std::to_string(row_bytes) + ")");
    }
    return reinterpret_cast<std::byte*>(out.mutable_data());  // throws when read-only
}

std::unique_ptr<Bags> make_bags(const Array<std::int64_t>& ids, const Array<std::int64_t>& edges,
                                const std::optional<Array<double>>& weights) {
    std::optional<std::vector<double>> factors;
    if (weights) factors = as_copy(*weights, "weights");
    return std::make_unique<Bags>(as_copy(ids, "ids"), as_copy(edges, "edges"), std::move(factors));
}

BagMode as_mode(const std::string& mode) {
    if (mode != "sum" && mode != "max") {
        throw Error(ErrorCode::invalid_argument, "unknown bag mode '" + mode + "'");
    }
    return mode == "sum" ? BagMode::sum : BagMode::max;
}

std::byte* sums_out(const RowTable& table, const Bags& bags, const py::array& out) {
    return data_of(out, compute_dtype(table.dtype()),
                   count_elements(bags.count(), table.grid().cols, "out"), true, "out");
}

// Calls use(page ids, pages, what is decoded) with the pages that pages_of() names out of the pool
// and returns None; or returns their ids, when not all of them are in the pool.
template <class PagesOf, class Use>
py::object with_pool(BufferPool& pool, const PagesOf& pages_of, const Use& use) {
    std::vector<std::int64_t> wanted;
    bool done = false;
    {
        const WithoutGil no_gil;
        wanted = pages_of();
        if (const BufferPool::Pins pins = pool.pin_all(wanted)) {
            use(std::span<const std::int64_t>(wanted), std::span<const Page* const>(pins->pages),
                std::span<DecodedBlocks* const>(pins->decoded));
            done = true;
        }
    }
    if (done) return py::none();
    return as_array(std::move(wanted));
}

py::object take(const RowTable& table, BufferPool& pool, const Array<std::int64_t>& ids,
                Array<std::uint8_t> out, unsigned threads) {
    const std::vector<std::int64_t> wanted = as_copy(ids, "ids");
    std::byte* const to = rows_out(table, out, wanted.size());
    return with_pool(
        pool, [&] { return table.pages_of(wanted); },
        [&](auto page_ids, auto pages, auto decoded) {
            table.take(page_ids, pages, wanted, to, threads, decoded);
        });
}

void take_from(const RowTable& table, const Array<std::int64_t>& page_ids,
               const py::sequence& pages, const Array<std::int64_t>& ids, Array<std::uint8_t> out,
               unsigned threads) {
    const std::vector<std::int64_t> wanted = as_copy(ids, "ids");
    std::byte* const to = rows_out(table, out, wanted.size());
    const std::vector<std::int64_t> numbers = as_copy(page_ids, "page_ids");
    const PageList held = as_pages(pages);
    const std::vector<const Page*> plain = pointers(held);
    const WithoutGil no_gil;
    table.take(std::span<const std::int64_t>(numbers), std::span<const Page* const>(plain), wanted,
               to, threads);
}

void take_blocks(const RowTable& table, const Array<std::int64_t>& numbers,
                 const py::sequence& pages, const Array<std::uint32_t>& page_index,
                 const Array<std::uint32_t>& slots, const py::object& bases,
                 const Array<std::int64_t>& ids, Array<std::uint8_t> out, unsigned threads) {
    const std::vector<std::int64_t> wanted = as_copy(ids, "ids");
    const std::vector<std::int64_t> blocks = as_copy(numbers, "numbers");
    std::byte* const to = rows_out(table, out, wanted.size());
    const HeldBlocks held = hold_blocks(pages, page_index, slots, bases, threads);
    const WithoutGil no_gil;
    table.take(blocks, held.blocks(), wanted, to, threads);
}

py::object bag(const RowTable& table, BufferPool& pool, Bags& bags, const std::string& mode,
               const py::array& out, unsigned threads) {
    const BagMode how = as_mode(mode);
    std::byte* const to = sums_out(table, bags, out);
    return with_pool(
        pool,
        [&] {
            const auto in_use = bags.lock();
            return table.pages_of(bags.ids());
        },
        [&](auto page_ids, auto pages, auto decoded) {
            table.bag(page_ids, pages, bags, how, to, threads, decoded);
        });
}

void bag_blocks(const RowTable& table, const Array<std::int64_t>& numbers,
                const py::sequence& pages, const Array<std::uint32_t>& page_index,
                const Array<std::uint32_t>& slots, const py::object& bases, Bags& bags,
                const std::string& mode, const py::array& out, unsigned threads) {
    const BagMode how = as_mode(mode);
    std::byte* const to = sums_out(table, bags, out);
    const std::vector<std::int64_t> blocks = as_copy(numbers, "numbers");
    const HeldBlocks held = hold_blocks(pages, page_index, slots, bases, threads);
    const WithoutGil no_gil;
    table.bag(blocks, held.blocks(), bags, how, to, threads);
}

}  // namespace

void bind_rows(py::module_& m) {
    py::class_<RowTable>(m, "RowTable")
        .def(py::init(&make_table), py::arg("rows"), py::arg("cols"), py::arg("block_rows"),
             py::arg("block_cols"), py::arg("dtype"), py::arg("page_ids").noconvert(),
             py::arg("slots").noconvert(), py::arg("base_page_ids") = py::none(),
             py::arg("base_slots") = py::none())
        .def("take", &take, py::arg("pool"), py::arg("ids").noconvert(), py::arg("out").noconvert(),
             py::arg("threads") = 0)
        .def("take_from", &take_from, py::arg("page_ids").noconvert(), py::arg("pages"),
             py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("threads") = 0)
        .def("bag", &bag, py::arg("pool"), py::arg("bags"), py::arg("mode"),
             py::arg("out").noconvert(), py::arg("threads") = 0)
        .def("take_blocks", &take_blocks, py::arg("numbers").noconvert(), py::arg("pages"),
             py::arg("page_index").noconvert(), py::arg("slots").noconvert(), py::arg("bases"),
             py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("threads") = 0)
        .def("bag_blocks", &bag_blocks, py::arg("numbers").noconvert(), py::arg("pages"),
             py::arg("page_index").noconvert(), py::arg("slots").noconvert(), py::arg("bases"),
             py::arg("bags"), py::arg("mode"), py::arg("out").noconvert(), py::arg("threads") = 0);
    py::class_<Bags>(m, "Bags").def(py::init(&make_bags), py::arg("ids").noconvert(),
                                    py::arg("edges").noconvert(),
                                    py::arg("weights").noconvert() = py::none());
}

}  // namespace pydedup
