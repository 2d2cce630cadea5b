// SPDX-License-Identifier: Apache-2.0
// Pages: made, read, compared.
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "blocks.hpp"
#include "encoded.hpp"
#include "pydedup/codec.hpp"
#include "pydedup/page_content.hpp"
#include "pydedup/page_format.hpp"
#include "python_bytes.hpp"

namespace pydedup {
namespace {

// A slot as it lies in a page, for numpy (docs/format.md, "Page").
struct SlotRecord {
    std::uint8_t encoding;
    std::uint8_t dtype;
    std::uint16_t reserved;
    std::uint32_t rows;
    std::uint32_t cols;
    std::uint32_t length;
    std::uint64_t offset;
    std::uint64_t base;
};
static_assert(sizeof(SlotRecord) == kSlotBytes);

std::vector<StoredBlock> as_stored(const Array<std::uint32_t>& page_index,
                                   const Array<std::uint32_t>& slots) {
    const auto pages = as_span(page_index, "page_index");
    const auto on_page = as_span(slots, "slots");
    check_places(pages.size(), on_page.size());
    std::vector<StoredBlock> stored;
    stored.reserve(pages.size());
    for (std::size_t i = 0; i < pages.size(); ++i) stored.push_back({pages[i], on_page[i]});
    return stored;
}

py::bytes page_with(std::span<const BlockView> blocks) {
    const std::size_t total = page_bytes(blocks);
    auto page = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(total)));
    if (!page) throw py::error_already_set();
    const std::span<std::byte> out(reinterpret_cast<std::byte*>(PyBytes_AS_STRING(page.ptr())),
                                   total);
    {
        const WithoutGil no_gil;
        build_page(blocks, out);
    }
    return page;
}

py::bytes build_page_of(const Array<std::uint8_t>& arena, const Array<std::int64_t>& offsets,
                        const Array<std::int64_t>& lengths, const Array<std::uint8_t>& encodings,
                        const Array<std::uint8_t>& dtypes, const Array<std::uint32_t>& rows,
                        const Array<std::uint32_t>& cols, const Array<std::uint64_t>& bases) {
    const auto memory = as_span(arena, "arena");
    const auto at = as_span(offsets, "offsets");
    const auto length_of = as_span(lengths, "lengths");
    const auto encoding_of = as_span(encodings, "encodings");
    const auto dtype_of = as_span(dtypes, "dtypes");
    const auto rows_of = as_span(rows, "rows");
    const auto cols_of = as_span(cols, "cols");
    const auto base_of = as_span(bases, "bases");
    const std::size_t n = at.size();
    if (length_of.size() != n || encoding_of.size() != n || dtype_of.size() != n ||
        rows_of.size() != n || cols_of.size() != n || base_of.size() != n) {
        throw Error(ErrorCode::invalid_argument, "the columns of a new page differ in length");
    }
    std::vector<BlockView> blocks;
    blocks.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
        const std::span<const std::byte> bytes = encoded_at(memory, at[i], length_of[i], i);
        blocks.push_back({bytes.data(), static_cast<std::uint32_t>(bytes.size()),
                          static_cast<Encoding>(encoding_of[i]), static_cast<Dtype>(dtype_of[i]),
                          rows_of[i], cols_of[i], base_of[i]});
        // Of a page that is taken apart, a block may refer to what lies in front of it.
        blocks.back().before = static_cast<std::uint32_t>(
            std::min<std::uint64_t>(static_cast<std::uint64_t>(at[i]), UINT32_MAX));
    }
    return page_with(blocks);
}

py::bytes gather_page_of(const py::sequence& pages, const Array<std::uint32_t>& page_index,
                         const Array<std::uint32_t>& slots) {
    const HeldBlocks held = hold_blocks(pages, page_index, slots, py::none(), 1);
    return page_with(held.blocks());
}

py::tuple encoded_blocks_of(const py::sequence& pages, const Array<std::uint32_t>& page_index,
                            const Array<std::uint32_t>& slots) {
    const HeldBlocks held = hold_blocks(pages, page_index, slots, py::none(), 1);
    const std::span<const BlockView> blocks = held.blocks();
    std::size_t room = 0;
    for (const BlockView& block : blocks) room += encoded_bytes(block);
    return encoded_columns(blocks.size(), room,
                           [&](std::span<std::byte> bytes, std::span<std::int64_t> starts,
                               std::span<EncodedBlock> encoded) {
                               std::size_t at = 0;
                               for (std::size_t i = 0; i < blocks.size(); ++i) {
                                   const std::size_t length = encoded_bytes(blocks[i]);
                                   copy_encoded(blocks[i], bytes.subspan(at, length));
                                   starts[i] = static_cast<std::int64_t>(at);
                                   encoded[i] = {blocks[i].encoding,
                                                 static_cast<std::uint32_t>(length)};
                                   at += length;
                               }
                               return at;
                           });
}

std::shared_ptr<Page> page_of(const py::bytes& payload) {
    const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(payload.ptr()));
    std::shared_ptr<const std::byte> memory = share_bytes(payload);
    const WithoutGil no_gil;
    return std::make_shared<Page>(std::move(memory), size);
}

py::bytes digest_bytes(const Digest& digest) {
    return {reinterpret_cast<const char*>(&digest), sizeof digest};
}

py::bytes payload_of(const Page& page) {
    if (PyObject* object = bytes_behind(page.owner())) {
        return py::reinterpret_borrow<py::bytes>(object);
    }
    return {reinterpret_cast<const char*>(page.view().bytes().data()), page.nbytes()};
}

// The slot table, read-only: a view that keeps the bytes alive, not the Page; of a page that lies
// in a pool a copy, since bytes would be a copy of the whole page.
py::array slots_of(const Page& page) {
    const py::dtype record = py::dtype::of<SlotRecord>();
    const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(page.n_slots())};
    const std::vector<py::ssize_t> strides{static_cast<py::ssize_t>(kSlotBytes)};
    const std::byte* const first = page.view().bytes().data() + kPageHeaderBytes;
    PyObject* const bytes = bytes_behind(page.owner());
    py::array slots = bytes == nullptr ? py::array(record, shape, strides, first)
                                       : py::array(record, shape, strides, first,
                                                   py::reinterpret_borrow<py::bytes>(bytes));
    slots.attr("flags").attr("writeable") = false;
    return slots;
}

void read_blocks_into(const py::sequence& pages, const Array<std::uint32_t>& page_index,
                      const Array<std::uint32_t>& slots, const Array<std::int64_t>& indices,
                      Array<std::uint8_t> out, int dtype, std::size_t block_rows,
                      std::size_t block_cols, const py::object& bases, unsigned threads) {
    const ChosenBlocks chosen = as_chosen(out, dtype, block_rows, block_cols, indices, "indices");
    auto* const to = reinterpret_cast<std::byte*>(out.mutable_data());  // throws when read-only
    const PageList held = as_pages(pages);
    const std::vector<StoredBlock> stored = as_stored(page_index, slots);
    const HeldBases held_bases = hold_bases(bases, stored.size());
    const WithoutGil no_gil;
    read_blocks(pointers(held), stored, held_bases.view(), chosen.indices, chosen.grid,
                chosen.matrix.dtype, to, chosen.matrix.stride_bytes, threads);
}

py::array_t<bool> blocks_equal_to(const Array<std::uint8_t>& data, int dtype,
                                  std::size_t block_rows, std::size_t block_cols,
                                  const Array<std::int64_t>& indices, const py::sequence& pages,
                                  const Array<std::uint32_t>& page_index,
                                  const Array<std::uint32_t>& slots, const py::object& bases,
                                  unsigned threads) {
    const ChosenBlocks chosen = as_chosen(data, dtype, block_rows, block_cols, indices, "indices");
    const PageList held = as_pages(pages);
    const std::vector<StoredBlock> stored = as_stored(page_index, slots);
    const HeldBases held_bases = hold_bases(bases, stored.size());
    py::array_t<bool> equal(static_cast<py::ssize_t>(chosen.indices.size()));
    const std::span<bool> out(equal.mutable_data(), chosen.indices.size());
    {
        const WithoutGil no_gil;
        blocks_equal(pointers(held), stored, held_bases.view(), chosen.indices, chosen.matrix,
                     chosen.grid, out, threads);
    }
    return equal;
}

py::array_t<std::uint64_t> page_digests_of(const std::shared_ptr<Page>& page, unsigned threads) {
    py::array_t<std::uint64_t> digests({page->n_slots(), std::size_t{2}});
    const std::span<Digest> out(reinterpret_cast<Digest*>(digests.mutable_data()), page->n_slots());
    {
        const WithoutGil no_gil;
        page_digests(*page, out, threads);
    }
    return digests;
}

py::array_t<std::uint64_t> block_digests_of(const py::sequence& pages,
                                            const Array<std::uint32_t>& page_index,
                                            const Array<std::uint32_t>& slots,
                                            const py::object& bases, unsigned threads) {
    const HeldBlocks held = hold_blocks(pages, page_index, slots, bases, threads);
    py::array_t<std::uint64_t> digests({held.blocks().size(), std::size_t{2}});
    const std::span<Digest> out(reinterpret_cast<Digest*>(digests.mutable_data()),
                                held.blocks().size());
    {
        const WithoutGil no_gil;
        block_digests(held.blocks(), out, threads);
    }
    return digests;
}

bool has_factors(const Page& page) {
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) {
        if (has_factors(page.block(slot))) return true;
    }
    return false;
}

// The page and slot of a base.
using BasePlace = std::optional<std::pair<std::shared_ptr<Page>, std::size_t>>;

bool same_block_on(const std::shared_ptr<Page>& page_a, std::size_t slot_a,
                   const std::shared_ptr<Page>& page_b, std::size_t slot_b, const BasePlace& base_a,
                   const BasePlace& base_b) {
    const WithoutGil no_gil;
    BlockView bases[2];
    const auto block_of = [](const Page& page, std::size_t slot, const BasePlace& at,
                             BlockView& base) {
        BlockView block = page.block(slot);
        if (at && at->first && is_delta(block.encoding)) {
            base = at->first->block(at->second);
            block.base_block = &base;
        }
        return block;
    };
    return same_block(block_of(*page_a, slot_a, base_a, bases[0]),
                      block_of(*page_b, slot_b, base_b, bases[1]));
}

}  // namespace

void bind_pages(py::module_& m) {
    PYBIND11_NUMPY_DTYPE(SlotRecord, encoding, dtype, rows, cols, length, offset, base);
    m.attr("PAGE_HEADER_BYTES") = kPageHeaderBytes;
    m.attr("SLOT_BYTES") = kSlotBytes;
    m.attr("BLOCK_ALIGNMENT") = kBlockAlignment;
    m.attr("PAGE_VERSION") = kPageVersion;
    m.attr("DELTA_PAGE_VERSION") = kDeltaPageVersion;
    m.attr("SLOT_DTYPE") = py::dtype::of<SlotRecord>();

    m.def("build_page", &build_page_of, py::arg("arena").noconvert(),
          py::arg("offsets").noconvert(), py::arg("lengths").noconvert(),
          py::arg("encodings").noconvert(), py::arg("dtypes").noconvert(),
          py::arg("rows").noconvert(), py::arg("cols").noconvert(), py::arg("bases").noconvert());
    m.def("encoded_blocks", &encoded_blocks_of, py::arg("pages"), py::arg("page_index").noconvert(),
          py::arg("slots").noconvert());
    m.def("gather_page", &gather_page_of, py::arg("pages"), py::arg("page_index").noconvert(),
          py::arg("slots").noconvert());
    m.def("page_checksum", [](const py::bytes& payload) {
        const Bytes bytes(reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(payload.ptr())),
                          static_cast<std::size_t>(PyBytes_GET_SIZE(payload.ptr())));
        return digest_bytes(PageView::parse(bytes, false).checksum());
    });
    py::class_<Page, std::shared_ptr<Page>>(m, "Page")
        .def(py::init(&page_of), py::arg("payload"))
        .def_property_readonly("nbytes", &Page::nbytes)
        .def_property_readonly("n_slots", &Page::n_slots)
        .def_property_readonly("has_factors", [](const Page& page) { return has_factors(page); })
        .def_property_readonly("checksum",
                               [](const Page& page) { return digest_bytes(page.checksum()); })
        .def_property_readonly("slots", &slots_of)
        .def_property_readonly("payload", &payload_of);
    m.def("read_blocks", &read_blocks_into, py::arg("pages"), py::arg("page_index").noconvert(),
          py::arg("slots").noconvert(), py::arg("indices").noconvert(), py::arg("out").noconvert(),
          py::arg("dtype"), py::arg("block_rows"), py::arg("block_cols"),
          py::arg("bases") = py::none(), py::arg("threads") = 0);
    m.def("blocks_equal", &blocks_equal_to, py::arg("data").noconvert(), py::arg("dtype"),
          py::arg("block_rows"), py::arg("block_cols"), py::arg("indices").noconvert(),
          py::arg("pages"), py::arg("page_index").noconvert(), py::arg("slots").noconvert(),
          py::arg("bases") = py::none(), py::arg("threads") = 0);
    m.def("page_digests", &page_digests_of, py::arg("page").none(false), py::arg("threads") = 0);
    m.def("block_digests", &block_digests_of, py::arg("pages"), py::arg("page_index").noconvert(),
          py::arg("slots").noconvert(), py::arg("bases") = py::none(), py::arg("threads") = 0);
    m.def("same_block", &same_block_on, py::arg("page_a").none(false), py::arg("slot_a"),
          py::arg("page_b").none(false), py::arg("slot_b"), py::arg("base_a") = py::none(),
          py::arg("base_b") = py::none());
}

}  // namespace pydedup
