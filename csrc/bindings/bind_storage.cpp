// SPDX-License-Identifier: Apache-2.0
// The buffer pool. Pages of the usual size and larger are copied out of the Python bytes they came
// in, to memory that products walk over faster; others stay there until they are evicted. What was
// read into a PageMemory stays where it is.
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pydedup/buffer_pool.hpp"
#include "pydedup/page_memory.hpp"
#include "pydedup/replay.hpp"
#include "python_bytes.hpp"

namespace pydedup {
namespace {

// _core.Page has non-const holders; nothing in it can be changed from Python.
std::shared_ptr<Page> as_holder(BufferPool::Pin pin) {
    return std::const_pointer_cast<Page>(std::move(pin));
}

py::list pin_pages(BufferPool& pool, const Array<std::int64_t>& ids, bool ahead) {
    const auto wanted = as_span(ids, "ids");
    std::vector<BufferPool::Pin> pins(wanted.size());
    pool.pin(wanted, pins, ahead);
    py::list pages(pins.size());
    for (std::size_t i = 0; i < pins.size(); ++i) {
        pages[i] = pins[i] ? py::cast(as_holder(std::move(pins[i]))) : py::none();
    }
    return pages;
}

std::shared_ptr<Page> insert_page(BufferPool& pool, BufferPool::PageId id, const py::bytes& payload,
                                  bool ahead) {
    const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(payload.ptr()));
    std::shared_ptr<const std::byte> memory = share_bytes(payload);
    const WithoutGil no_gil;
    if (const std::shared_ptr<std::byte> better = page_memory(size)) {
        std::memcpy(better.get(), memory.get(), size);
        memory = better;
    }
    return as_holder(pool.insert(id, Page(std::move(memory), size), ahead));
}

/// Memory that a page is read into. Python may write to it until a pool has adopted it; it lives
/// for as long as either refers to it.
struct PageMemory {
    explicit PageMemory(std::size_t bytes) : memory(any_page_memory(bytes)), size(bytes) {
        if (memory == nullptr) throw std::bad_alloc();
    }

    std::shared_ptr<std::byte> memory;
    std::size_t size;
};

std::shared_ptr<Page> adopt_page(BufferPool& pool, BufferPool::PageId id, const PageMemory& read,
                                 const py::bytes& checksum, bool ahead) {
    const auto expected = static_cast<std::string_view>(checksum);
    std::shared_ptr<const std::byte> memory = read.memory;
    const WithoutGil no_gil;
    Page page(std::move(memory), read.size);
    const Digest carried = page.checksum();
    if (expected != std::string_view(reinterpret_cast<const char*>(&carried), sizeof carried)) {
        throw Error(ErrorCode::corrupt_page, "another page than the one that was asked for");
    }
    return as_holder(pool.insert(id, std::move(page), ahead));
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
    named["decoded_bytes"] = stats.decoded_bytes;
    named["pinned_bytes"] = stats.pinned_bytes;
    named["reserved_bytes"] = stats.reserved_bytes;
    named["budget_bytes"] = stats.budget_bytes;
    return named;
}

// Bytes of the budget that are held, until release() or the end of the object.
class Reserved {
  public:
    explicit Reserved(BufferPool::Reservation held) : held_(std::move(held)) {}
    void release() noexcept { held_.reset(); }

  private:
    BufferPool::Reservation held_;
};

py::tuple trace_of(const BufferPool& pool) {
    BufferPool::Trace trace = pool.recorded();
    return py::make_tuple(as_array(std::move(trace.pages)), as_array(std::move(trace.bytes)),
                          as_array(std::move(trace.calls)), as_array(std::move(trace.owners)),
                          trace.complete);
}

[[nodiscard]] ReplacementPolicy policy_of(const std::string& name) {
    const std::optional<ReplacementPolicy> policy = replacement_named(name);
    if (!policy) {
        throw Error(ErrorCode::invalid_argument, "unknown replacement policy '" + name + "'");
    }
    return *policy;
}

py::tuple replay_trace(const Array<std::int64_t>& pages, const Array<std::uint32_t>& bytes,
                       const Array<std::uint32_t>& calls, const Array<std::int64_t>& owners,
                       std::size_t budget_bytes, const std::optional<std::string>& policy) {
    const std::vector<std::int64_t> used = as_copy(pages, "pages");
    const std::vector<std::uint32_t> sizes = as_copy(bytes, "bytes");
    const std::vector<std::uint32_t> called = as_copy(calls, "calls");
    const std::vector<std::int64_t> callers = as_copy(owners, "owners");
    const ReplayTrace trace{used, sizes, called, callers};
    std::optional<ReplacementPolicy> chosen;
    if (policy) chosen = policy_of(*policy);
    ReplayResult result{};
    {
        const WithoutGil no_gil;
        result = replay(trace, budget_bytes, chosen);
    }
    return py::make_tuple(result.hits, result.misses, result.missed_bytes, result.missed_calls);
}

}  // namespace

// The GIL is kept where the pool only moves entries between lists; it may be held while waiting for
// the pool's mutex, since nobody waits for the GIL under that.
void bind_storage(py::module_& m) {
    py::class_<Reserved>(m, "Reservation").def("release", &Reserved::release);
    py::class_<PageMemory>(m, "PageMemory", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("size"))
        .def_buffer([](PageMemory& page) {
            return py::buffer_info(reinterpret_cast<std::uint8_t*>(page.memory.get()),
                                   static_cast<py::ssize_t>(page.size));
        });
    py::class_<BufferPool>(m, "BufferPool")
        .def(py::init([](std::size_t budget_bytes, const std::string& policy) {
                 return std::make_unique<BufferPool>(budget_bytes, policy_of(policy));
             }),
             py::arg("budget_bytes"), py::arg("policy") = "reuse")
        .def("pin", &pin_pages, py::arg("ids").noconvert(), py::arg("ahead") = false)
        .def("insert", &insert_page, py::arg("id"), py::arg("payload"), py::arg("ahead") = false)
        .def("adopt", &adopt_page, py::arg("id"), py::arg("memory"), py::arg("checksum"),
             py::arg("ahead") = false)
        .def(
            "reserve",
            [](BufferPool& pool, std::size_t bytes) {
                BufferPool::Reservation held;
                {
                    const WithoutGil no_gil;  // pages that go may be Python's
                    held = pool.reserve(bytes);
                }
                return Reserved(std::move(held));
            },
            py::arg("bytes"))
        .def(
            "owns",
            [](BufferPool& pool, std::int64_t owner, const Array<std::int64_t>& pages) {
                pool.owns(owner, as_span(pages, "pages"));
            },
            py::arg("owner"), py::arg("pages").noconvert())
        .def("call", &BufferPool::call, py::arg("owner"))
        .def("record", &BufferPool::record, py::arg("max_uses"))
        .def("recorded", &trace_of)
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
    m.def("replay", &replay_trace, py::arg("pages").noconvert(), py::arg("bytes").noconvert(),
          py::arg("calls").noconvert(), py::arg("owners").noconvert(), py::arg("budget_bytes"),
          py::arg("policy"));
}

}  // namespace pydedup
