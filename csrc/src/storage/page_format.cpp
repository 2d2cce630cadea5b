// SPDX-License-Identifier: Apache-2.0
// The byte layout of a page, in the one place that knows its offsets. Layout rules are strict on
// purpose: blocks lie in slot order, each at the first offset behind the one before that is aligned
// as its encoding asks, and the page ends with the last. So a page has one form only, and overlaps
// cannot be described.
#include "pydedup/page_format.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "base/endian.hpp"
#include "base/rounding.hpp"
#include "codec/low_rank.hpp"
#include "pydedup/error.hpp"
#include "pydedup/hash.hpp"

namespace pydedup {
namespace {

constexpr std::array<char, 4> kMagic = {'P', 'D', 'P', 'G'};

// Header.
constexpr std::size_t kVersionAt = 4;      // u16
constexpr std::size_t kHeaderBytesAt = 6;  // u16
constexpr std::size_t kChecksumAt = 8;     // 16 bytes
constexpr std::size_t kCoveredFrom = 24;   // the checksum covers this to the end, seeded by [0, 8)
constexpr std::size_t kSlotsAt = 24;       // u32
constexpr std::size_t kSlotBytesAt = 28;   // u32
constexpr std::size_t kPageBytesAt = 32;   // u64
constexpr std::size_t kReservedAt = 40;    // 24 bytes of 0

// Slot.
constexpr std::size_t kEncodingAt = 0;      // u8
constexpr std::size_t kDtypeAt = 1;         // u8
constexpr std::size_t kSlotReservedAt = 2;  // u16 of 0
constexpr std::size_t kRowsAt = 4;          // u32
constexpr std::size_t kColsAt = 8;          // u32
constexpr std::size_t kLengthAt = 12;       // u32
constexpr std::size_t kOffsetAt = 16;       // u64
constexpr std::size_t kBaseAt = 24;         // u64

// Where a block begins that follows `end`. Only raw blocks are read where they lie. On pages with
// deltas, which are small, others are not aligned.
constexpr std::size_t begin_of(Encoding encoding, std::uint16_t version, std::size_t end) noexcept {
    if (version >= kDeltaPageVersion && encoding != Encoding::raw) return end;
    return detail::round_up(end, kBlockAlignment);
}

Digest checksum_of(Bytes page) {
    return hash_bytes(page.subspan(kCoveredFrom), load_le<std::uint64_t>(page.data()));
}

[[noreturn]] void corrupt(const std::string& what) {
    throw Error(ErrorCode::corrupt_page, "corrupt page: " + what);
}

[[noreturn]] void corrupt_slot(std::size_t slot, const std::string& what) {
    corrupt("slot " + std::to_string(slot) + " " + what);
}

// Why a slot cannot hold such a block, or nullptr. The same rules for writing and reading.
const char* block_fault(const BlockView& block) noexcept {
    const std::size_t item = item_bytes(block.dtype);
    if (item == 0) return "has an unknown dtype";
    const std::uint64_t count = std::uint64_t{block.rows} * block.cols;
    if (count == 0) return "has no elements";
    if (count > UINT32_MAX / item) return "has a block of 4 GiB or more";
    if (block.length == 0) return "has no bytes";
    switch (block.encoding) {
        case Encoding::raw:
            if (block.length != count * item) return "has a length that does not fit its shape";
            break;
        case Encoding::planes:
            if (block.length >= count * item) return "is longer than its raw block";
            break;
        case Encoding::delta:
        case Encoding::quantised:
            if (block.length >= count * item &&
                detail::bytes_besides_factors(block) >= count * item) {
                return "is longer than its raw block";
            }
            return block.base != 0 ? nullptr : "is a delta and names no base";
        default:
            return "has an unknown encoding";
    }
    return block.base == 0 ? nullptr : "names a base that its encoding does not use";
}

const std::byte* slot_at(Bytes page, std::size_t slot) noexcept {
    return page.data() + kPageHeaderBytes + slot * kSlotBytes;
}

BlockView read_slot(Bytes page, std::size_t slot) noexcept {
    const std::byte* at = slot_at(page, slot);
    const auto offset = load_le<std::uint64_t>(at + kOffsetAt);
    return {page.data() + offset,
            load_le<std::uint32_t>(at + kLengthAt),
            static_cast<Encoding>(at[kEncodingAt]),
            static_cast<Dtype>(at[kDtypeAt]),
            load_le<std::uint32_t>(at + kRowsAt),
            load_le<std::uint32_t>(at + kColsAt),
            load_le<std::uint64_t>(at + kBaseAt),
            nullptr,
            nullptr,
            static_cast<std::uint32_t>(std::min<std::uint64_t>(offset, UINT32_MAX))};
}

std::uint64_t next_serial() noexcept {
    static std::atomic<std::uint64_t> last{0};
    return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

// The oldest version that has all these encodings.
std::uint16_t version_for(std::span<const BlockView> blocks) noexcept {
    for (const BlockView& block : blocks) {
        if (is_delta(block.encoding)) return kDeltaPageVersion;
    }
    return 1;
}

// The factors that blocks of a page hold, each only in the first of them.
class PageFactors {
  public:
    // Bytes that a block takes which begins at byte `offset`; writes them if there is a page.
    std::size_t place(const BlockView& block, std::size_t offset, std::byte* page) {
        const auto places = detail::find_factors(block);
        if (!places) {
            if (page != nullptr) std::memcpy(page + offset, block.data, block.length);
            return block.length;
        }
        std::size_t end = offset;
        const auto put = [&](Bytes bytes) {
            if (page != nullptr) std::copy(bytes.begin(), bytes.end(), page + end);
            end += bytes.size();
        };
        put(places->head);
        for (const Bytes factor : {places->of_rows, places->of_cols}) {
            const std::string_view key(reinterpret_cast<const char*>(factor.data()), factor.size());
            const std::size_t first = found_.try_emplace(key, end + 1).first->second;
            detail::Sink behind;
            // Of an earlier block, and not so small that saying where takes more.
            const bool is_known = first < offset && factor.size() > sizeof(std::uint64_t);
            detail::put_varint(behind, is_known ? offset - first : 0);
            put(std::as_bytes(std::span<const std::uint8_t>(behind)));
            if (!is_known) put(factor);
        }
        put(places->tail);
        return end - offset;
    }

  private:
    std::unordered_map<std::string_view, std::size_t> found_;  // where on the page
};

void check_header(Bytes page) {
    if (page.size() < kPageHeaderBytes) {
        corrupt(std::to_string(page.size()) + " bytes are fewer than a page header");
    }
    if (std::memcmp(page.data(), kMagic.data(), kMagic.size()) != 0) {
        corrupt("it does not begin with the bytes PDPG");
    }
    const auto version = load_le<std::uint16_t>(page.data() + kVersionAt);
    if (version > kPageVersion) {
        throw Error(ErrorCode::unsupported_format,
                    "a page has format version " + std::to_string(version) +
                        ", this pydedup reads up to " + std::to_string(kPageVersion) +
                        "; use a newer pydedup");
    }
    if (version == 0) corrupt("format version 0 does not exist");
    if (load_le<std::uint16_t>(page.data() + kHeaderBytesAt) != kPageHeaderBytes) {
        corrupt("the header has a wrong length");
    }
}

}  // namespace

std::size_t page_bytes(std::span<const BlockView> blocks) {
    const std::uint16_t version = version_for(blocks);
    PageFactors factors;
    std::size_t end = kPageHeaderBytes + blocks.size() * kSlotBytes;
    for (const BlockView& block : blocks) {
        const std::size_t offset = begin_of(block.encoding, version, end);
        end = offset + factors.place(block, offset, nullptr);
    }
    return end;
}

void build_page(std::span<const BlockView> blocks, std::span<std::byte> out) {
    if (blocks.size() > UINT32_MAX) {
        throw Error(ErrorCode::invalid_argument, "a page has fewer than 2^32 slots");
    }
    if (out.size() != page_bytes(blocks)) {
        throw Error(ErrorCode::invalid_argument, "build_page was given memory of a wrong size");
    }
    for (std::size_t slot = 0; slot < blocks.size(); ++slot) {
        if (const char* fault = block_fault(blocks[slot])) {
            throw Error(ErrorCode::invalid_argument,
                        "block " + std::to_string(slot) + " of a new page " + fault);
        }
    }
    const std::uint16_t version = version_for(blocks);
    std::byte* const page = out.data();
    PageFactors factors;
    std::size_t end = kPageHeaderBytes + blocks.size() * kSlotBytes;
    std::memset(page, 0, end);
    std::memcpy(page, kMagic.data(), kMagic.size());
    store_le(page + kVersionAt, version);
    store_le(page + kHeaderBytesAt, static_cast<std::uint16_t>(kPageHeaderBytes));
    store_le(page + kSlotsAt, static_cast<std::uint32_t>(blocks.size()));
    store_le(page + kSlotBytesAt, static_cast<std::uint32_t>(kSlotBytes));
    store_le(page + kPageBytesAt, static_cast<std::uint64_t>(out.size()));
    for (std::size_t slot = 0; slot < blocks.size(); ++slot) {
        const BlockView& block = blocks[slot];
        const std::size_t offset = begin_of(block.encoding, version, end);
        std::byte* const at = page + kPageHeaderBytes + slot * kSlotBytes;
        at[kEncodingAt] = static_cast<std::byte>(block.encoding);
        at[kDtypeAt] = static_cast<std::byte>(block.dtype);
        store_le(at + kRowsAt, block.rows);
        store_le(at + kColsAt, block.cols);
        std::memset(page + end, 0, offset - end);
        const std::size_t length = factors.place(block, offset, page);
        store_le(at + kLengthAt, static_cast<std::uint32_t>(length));
        store_le(at + kOffsetAt, static_cast<std::uint64_t>(offset));
        store_le(at + kBaseAt, block.base);
        end = offset + length;
    }
    const Digest checksum = checksum_of(out);
    store_le(page + kChecksumAt, checksum.lo);
    store_le(page + kChecksumAt + 8, checksum.hi);
}

PageView PageView::parse(Bytes page, bool verify_checksum) {
    check_header(page);
    const std::uint64_t total = load_le<std::uint64_t>(page.data() + kPageBytesAt);
    if (total != page.size()) {
        corrupt("it should have " + std::to_string(total) + " bytes and has " +
                std::to_string(page.size()));
    }
    if (load_le<std::uint32_t>(page.data() + kSlotBytesAt) != kSlotBytes) {
        corrupt("its slots have a wrong length");
    }
    for (std::size_t at = kReservedAt; at < kPageHeaderBytes; ++at) {
        if (page[at] != std::byte{0}) corrupt("reserved byte " + std::to_string(at) + " is not 0");
    }
    PageView view;
    view.bytes_ = page;
    view.n_slots_ = load_le<std::uint32_t>(page.data() + kSlotsAt);
    if (view.n_slots_ > (page.size() - kPageHeaderBytes) / kSlotBytes) {
        corrupt("its " + std::to_string(view.n_slots_) + " slots do not fit into it");
    }
    const auto version = load_le<std::uint16_t>(page.data() + kVersionAt);
    bool has_deltas = false;
    for (std::size_t slot = 0; slot < view.n_slots_; ++slot) {
        has_deltas |= is_delta(static_cast<Encoding>(slot_at(page, slot)[kEncodingAt]));
    }
    if (has_deltas != (version >= kDeltaPageVersion)) {
        corrupt(has_deltas ? "version 1 has no deltas" : "version 2 is for pages with deltas");
    }
    std::size_t end = kPageHeaderBytes + view.n_slots_ * kSlotBytes;
    for (std::size_t slot = 0; slot < view.n_slots_; ++slot) {
        const std::byte* const at = slot_at(page, slot);
        const std::size_t offset = begin_of(static_cast<Encoding>(at[kEncodingAt]), version, end);
        const std::size_t length = load_le<std::uint32_t>(at + kLengthAt);
        if (load_le<std::uint16_t>(at + kSlotReservedAt) != 0) {
            corrupt_slot(slot, "has reserved bytes that are not 0");
        }
        if (load_le<std::uint64_t>(at + kOffsetAt) != offset) {
            corrupt_slot(slot, "does not begin where the one before ends");
        }
        if (offset > page.size() || length > page.size() - offset) {
            corrupt_slot(slot, "reaches behind the end of the page");
        }
        const BlockView block = read_slot(page, slot);
        if (const char* fault = block_fault(block)) corrupt_slot(slot, fault);
        end = offset + length;
    }
    if (end != page.size()) {
        corrupt("its blocks end at byte " + std::to_string(end) + " of " +
                std::to_string(page.size()));
    }
    if (verify_checksum && checksum_of(page) != view.checksum()) {
        corrupt("its bytes do not match their checksum");
    }
    return view;
}

Digest PageView::checksum() const noexcept {
    if (bytes_.empty()) return {0, 0};
    return {load_le<std::uint64_t>(bytes_.data() + kChecksumAt),
            load_le<std::uint64_t>(bytes_.data() + kChecksumAt + 8)};
}

BlockView PageView::block(std::size_t slot) const {
    if (slot >= n_slots_) {
        throw Error(ErrorCode::corrupt_page,
                    "slot " + std::to_string(slot) + " was asked of a page with " +
                        std::to_string(n_slots_) + " slots; run verify on the store");
    }
    return read_slot(bytes_, slot);
}

std::size_t PageView::offset(std::size_t slot) const {
    return static_cast<std::size_t>(block(slot).data - bytes_.data());
}

Page::Page(std::shared_ptr<const std::byte> owner, std::size_t size, bool verify_checksum)
    : owner_(std::move(owner)),
      view_(PageView::parse({owner_.get(), size}, verify_checksum)),
      serial_(next_serial()) {}

}  // namespace pydedup
