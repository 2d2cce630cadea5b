// SPDX-License-Identifier: Apache-2.0
// What encoded blocks of a page decode to, kept from one use to the next. Whether there is memory
// for that, and for how long, is for the buffer pool to say.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "pydedup/codec.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {

/// Bytes of all encoded blocks of a page, decoded; 0 where none is encoded.
[[nodiscard]] std::size_t decoded_bytes(const PageView& page);

/// The decoded elements of a page's encoded blocks. Each is kept the first time that decode_block()
/// makes it, and is where it is from then on. Safe between threads.
class DecodedBlocks {
  public:
    /// Takes no memory for elements yet.
    explicit DecodedBlocks(const PageView& page);
    ~DecodedBlocks();
    DecodedBlocks(const DecodedBlocks&) = delete;
    DecodedBlocks& operator=(const DecodedBlocks&) = delete;

    /// Makes the view of an encoded block that of its decoded elements, if they are here already;
    /// else it is one that decode_block() keeps the elements of. `slot` is one of the page.
    void show(std::size_t slot, BlockView& block) noexcept;

  private:
    class Slot;  // NOLINT(cppcoreguidelines-virtual-class-destructor): it is final

    [[nodiscard]] std::byte* memory() noexcept;

    std::vector<Slot> slots_;  // of the page
    std::size_t nbytes_ = 0;
    std::once_flag asked_;
    std::shared_ptr<std::byte> memory_;  // set once; nothing when there was none to be had
};

}  // namespace pydedup
