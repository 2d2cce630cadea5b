// SPDX-License-Identifier: Apache-2.0
// Pages of one block for tests of the buffer pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "pydedup/buffer_pool.hpp"

namespace pydedup::testing {

using PageId = BufferPool::PageId;

// Pages whose memory is given back are counted.
inline std::atomic<int>& freed() {
    static std::atomic<int> count{0};
    return count;
}

inline Page make_page(std::uint32_t tag, std::uint32_t elements = 1000) {
    const std::vector<std::uint32_t> values(elements, tag);
    const BlockView block{reinterpret_cast<const std::byte*>(values.data()),
                          elements * 4,
                          Encoding::raw,
                          Dtype::u32,
                          1,
                          elements,
                          0};
    const std::size_t size = page_bytes({&block, 1});
    auto* const memory = new std::byte[size];
    build_page({&block, 1}, {memory, size});
    return Page(std::shared_ptr<const std::byte>(memory,
                                                 [](const std::byte* p) {
                                                     ++freed();
                                                     delete[] p;
                                                 }),
                size, false);
}

inline std::uint32_t tag_of(const BufferPool::Pin& pin) {
    return *reinterpret_cast<const std::uint32_t*>(pin->block(0).data);
}

inline std::size_t page_size() { return make_page(0).nbytes(); }

inline BufferPool::Pin pin_one(BufferPool& pool, PageId id) {
    BufferPool::Pin pin;
    pool.pin({&id, 1}, {&pin, 1});
    return pin;
}

inline bool resident(const BufferPool& pool, PageId id) {
    return pool.count_resident({&id, 1}) == 1;
}

}  // namespace pydedup::testing
