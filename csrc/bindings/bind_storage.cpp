// SPDX-License-Identifier: Apache-2.0
// The buffer pool. Pages of the usual size and larger are copied out of the Python bytes they came
// in, to memory that products walk over faster; others stay there until they are evicted.
#include <cstring>
#include <memory>
#include <vector>

#include "bindings.hpp"
#include "pydedup/buffer_pool.hpp"
#include "pydedup/page_memory.hpp"
#include "python_bytes.hpp"

namespace pydedup {
namespace {

// _core.Page has non-const holders; nothing in it can be changed from Python.
std::shared_ptr<Page> as_holder(BufferPool::Pin pin) {
    return std::const_pointer_cast<Page>(std::move(pin));
}

py::list pin_pages(BufferPool& pool, const Array<std::int64_t>& ids) {
    const auto wanted = as_span(ids, "ids");
    std::vector<BufferPool::Pin> pins(wanted.size());
    pool.pin(wanted, pins);
    py::list pages(pins.size());
    for (std::size_t i = 0; i < pins.size(); ++i) {
        pages[i] = pins[i] ? py::cast(as_holder(std::move(pins[i]))) : py::none();
    }
    return pages;
}

std::shared_ptr<Page> insert_page(BufferPool& pool, BufferPool::PageId id,
                                  const py::bytes& payload) {
    const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(payload.ptr()));
    std::shared_ptr<const std::byte> memory = share_bytes(payload);
    const WithoutGil no_gil;
    if (const std::shared_ptr<std::byte> better = page_memory(size)) {
        std::memcpy(better.get(), memory.get(), size);
        memory = better;
    }
    return as_holder(pool.insert(id, Page(std::move(memory), size)));
}

py::dict stats_of(const BufferPool& pool) {
    const BufferPool::Stats stats = pool.stats();
    py::dict named;
    named["hits"] = stats.hits;
    named["misses"] = stats.misses;
    named["inserts"] = stats.inserts;
    named["evictions"] = stats.evictions;
    named["pages"] = stats.pages;
    named["bytes"] = stats.bytes;
    named["pinned_bytes"] = stats.pinned_bytes;
    named["budget_bytes"] = stats.budget_bytes;
    return named;
}

}  // namespace

// The GIL is kept where the pool only moves entries between lists; it may be held while waiting for
// the pool's mutex, since nobody waits for the GIL under that.
void bind_storage(py::module_& m) {
    py::class_<BufferPool>(m, "BufferPool")
        .def(py::init<std::size_t>(), py::arg("budget_bytes"))
        .def("pin", &pin_pages, py::arg("ids").noconvert())
        .def("insert", &insert_page, py::arg("id"), py::arg("payload"))
        .def(
            "count_resident",
            [](const BufferPool& pool, const Array<std::int64_t>& ids) {
                return pool.count_resident(as_span(ids, "ids"));
            },
            py::arg("ids").noconvert())
        .def(
            "drop",
            [](BufferPool& pool, const Array<std::int64_t>& ids) {
                pool.drop(as_span(ids, "ids"));
            },
            py::arg("ids").noconvert())
        .def("clear", &BufferPool::clear)
        .def("stats", &stats_of);
}

}  // namespace pydedup
