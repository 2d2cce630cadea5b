// SPDX-License-Identifier: Apache-2.0
// Pages of the usual capacity (1 MiB) share huge pages two by two, in regions of 8 MiB; larger ones
// have a mapping of their own. A region is given back when its last page goes, except for one: at
// the edge of its budget, a pool evicts and takes in a page at a time.
#include "pydedup/page_memory.hpp"

#include <bit>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "base/aligned_memory.hpp"
#include "base/of_this_process.hpp"
#include "base/rounding.hpp"
#include "pydedup/page_format.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pydedup {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;
constexpr std::size_t kPlace = std::size_t{1} << 20;
constexpr unsigned kPlaces = 8;
constexpr unsigned kAllFree = (1U << kPlaces) - 1;

[[nodiscard]] std::size_t mapped_bytes(std::size_t size) noexcept {
    return detail::round_up(size, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)));
}

/// A mapping of `bytes` (whole pages) that begins at a huge page, or nullptr.
std::byte* map_aligned(std::size_t bytes) noexcept {
    const std::size_t reserved = bytes + kHuge;
    if (reserved < bytes) return nullptr;
    void* const got =
        ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    auto* const first = static_cast<std::byte*>(got);
    const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(got) % kHuge) % kHuge;
    std::byte* const at = first + before;
    if (before != 0) ::munmap(first, before);
    ::munmap(at + bytes, kHuge - before);
    static_cast<void>(::madvise(at, bytes, MADV_HUGEPAGE));
    return at;
}

class Arena {
  public:
    [[nodiscard]] bool is_of_this_process() const noexcept { return process_ == ::getpid(); }

    [[nodiscard]] std::byte* take() noexcept {
        const std::lock_guard lock(mutex_);
        for (Region& region : regions_) {
            if (region.free != 0) return place_in(region);
        }
        try {
            regions_.reserve(regions_.size() + 1);
        } catch (const std::bad_alloc&) {
            return nullptr;
        }
        std::byte* const memory = map_aligned(kPlaces * kPlace);
        if (memory == nullptr) return nullptr;
        return place_in(regions_.emplace_back(memory, kAllFree));
    }

    void give_back(std::byte* place) noexcept {
        std::byte* gone = nullptr;
        {
            const std::lock_guard lock(mutex_);
            unsigned empty = 0;
            std::size_t last_empty = 0;
            for (std::size_t i = 0; i < regions_.size(); ++i) {
                Region& region = regions_[i];
                // A region is larger than its distance to any place but its own.
                const auto offset = reinterpret_cast<std::uintptr_t>(place) -
                                    reinterpret_cast<std::uintptr_t>(region.memory);
                if (offset < kPlaces * kPlace) region.free |= 1U << (offset / kPlace);
                if (region.free == kAllFree) {
                    ++empty;
                    last_empty = i;
                }
            }
            if (empty > 1) {
                gone = regions_[last_empty].memory;
                regions_[last_empty] = regions_.back();
                regions_.pop_back();
            }
        }
        if (gone != nullptr) ::munmap(gone, kPlaces * kPlace);
    }

  private:
    struct Region {
        std::byte* memory;
        unsigned free;  // a bit for each place
        Region(std::byte* at, unsigned places) noexcept : memory(at), free(places) {}
    };

    static std::byte* place_in(Region& region) noexcept {
        const auto place = static_cast<unsigned>(std::countr_zero(region.free));
        region.free &= ~(1U << place);
        return region.memory + place * kPlace;
    }

    const pid_t process_ = ::getpid();
    std::mutex mutex_;
    std::vector<Region> regions_;
};

}  // namespace

std::shared_ptr<std::byte> page_memory(std::size_t size) noexcept {
    try {
        if (size >= kHuge) {
            const std::size_t bytes = mapped_bytes(size);
            std::byte* const memory = bytes < size ? nullptr : map_aligned(bytes);
            if (memory == nullptr) return nullptr;
            return {memory, [bytes](std::byte* at) noexcept { ::munmap(at, bytes); }};
        }
        if (size < kPlace / 4 * 3 || size > kPlace) return nullptr;
        Arena* const owner = of_this_process<Arena>();
        std::byte* const place = owner == nullptr ? nullptr : owner->take();
        if (place == nullptr) return nullptr;
        return {place, [owner](std::byte* at) noexcept {
                    if (owner->is_of_this_process()) owner->give_back(at);
                }};
    } catch (const std::bad_alloc&) {  // the shared_ptr gave the memory back
        return nullptr;
    }
}

#else

std::shared_ptr<std::byte> page_memory(std::size_t) noexcept { return nullptr; }

#endif

std::shared_ptr<std::byte> any_page_memory(std::size_t size) noexcept {
    if (std::shared_ptr<std::byte> place = page_memory(size)) return place;
    try {
        std::shared_ptr<void> memory = detail::aligned_memory(size, kBlockAlignment);
        return std::static_pointer_cast<std::byte>(std::move(memory));
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

}  // namespace pydedup
