// SPDX-License-Identifier: Apache-2.0
#include "pydedup/decoded.hpp"

#include <cstring>

#include "base/rounding.hpp"
#include "pydedup/page_memory.hpp"

namespace pydedup {
namespace {

enum State : std::uint8_t { kEmpty, kFilling, kReady };

// Room for a block; 0 for one that needs no decoding, and for one whose shape nothing can hold.
[[nodiscard]] std::size_t room_for(const BlockView& block) noexcept {
    if (block.encoding == Encoding::raw || block.cols == 0) return 0;
    if (block.rows > UINT32_MAX / item_bytes(block.dtype) / block.cols) return 0;
    return detail::round_up(block.raw_bytes(), kBlockAlignment);
}

}  // namespace

// Where one block goes. Only who turns it from empty to filling writes, once.
class DecodedBlocks::Slot final : public BlockKeeper {
  public:
    Slot() = default;
    // Only to make a vector of them, before anybody else has it.
    Slot(const Slot& other) noexcept : of_(other.of_), offset_(other.offset_) {}

    void place(DecodedBlocks* of, std::size_t offset) noexcept {
        of_ = of;
        offset_ = offset;
    }
    [[nodiscard]] bool has_place() const noexcept { return of_ != nullptr; }
    [[nodiscard]] const std::byte* ready() const noexcept {
        return state_.load(std::memory_order_acquire) == kReady ? of_->memory_.get() + offset_
                                                                : nullptr;
    }
    void keep(const BlockView& block, const std::byte* rows, std::size_t stride) noexcept override {
        std::uint8_t expected = kEmpty;
        if (!state_.compare_exchange_strong(expected, kFilling, std::memory_order_relaxed)) return;
        std::byte* const memory = of_->memory();
        if (memory == nullptr) return;  // stays as it is: nobody tries again
        std::byte* to = memory + offset_;
        for (std::size_t row = 0; row < block.rows; ++row, to += block.row_bytes()) {
            std::memcpy(to, rows + row * stride, block.row_bytes());
        }
        state_.store(kReady, std::memory_order_release);
    }

  private:
    DecodedBlocks* of_ = nullptr;
    std::size_t offset_ = 0;
    std::atomic<std::uint8_t> state_{kEmpty};
};

std::size_t decoded_bytes(const PageView& page) {
    std::size_t total = 0;
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) total += room_for(page.block(slot));
    return total;
}

DecodedBlocks::DecodedBlocks(const PageView& page) : slots_(page.n_slots()) {
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) {
        const std::size_t room = room_for(page.block(slot));
        if (room == 0) continue;
        slots_[slot].place(this, nbytes_);
        nbytes_ += room;
    }
}

DecodedBlocks::~DecodedBlocks() = default;

void DecodedBlocks::show(std::size_t slot, BlockView& block) noexcept {
    if (!slots_[slot].has_place()) return;
    if (const std::byte* const at = slots_[slot].ready()) {
        block.data = at;
        block.length = static_cast<std::uint32_t>(block.raw_bytes());
        block.encoding = Encoding::raw;
        block.base = 0;
    } else {
        block.keeper = &slots_[slot];
    }
}

std::byte* DecodedBlocks::memory() noexcept {
    std::call_once(asked_, [this] { memory_ = any_page_memory(nbytes_); });
    return memory_.get();
}

}  // namespace pydedup
