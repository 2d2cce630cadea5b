// SPDX-License-Identifier: Apache-2.0
// What the bindings that read stored blocks share: blocks on pinned pages, arrays of the
// compute dtype, and names of activations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "pydedup/gemm.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {

using PageList = std::vector<std::shared_ptr<Page>>;

[[nodiscard]] inline PageList as_pages(const py::sequence& pages) {
    PageList list;
    list.reserve(pages.size());
    // Objects, not handles: a sequence that is no list may make its items as it is asked for them.
    for (const py::object page : pages) {
        if (!py::isinstance<Page>(page)) {
            throw Error(ErrorCode::invalid_argument,
                        std::string("pages holds a ") + Py_TYPE(page.ptr())->tp_name);
        }
        list.push_back(py::cast<std::shared_ptr<Page>>(page));
    }
    return list;
}

[[nodiscard]] inline std::vector<const Page*> pointers(const PageList& pages) {
    std::vector<const Page*> list;
    list.reserve(pages.size());
    for (const auto& page : pages) list.push_back(page.get());
    return list;
}

/// Blocks are named by two columns: the index of a page, and the slot on it.
inline void check_places(std::size_t n_pages, std::size_t n_slots) {
    if (n_pages != n_slots) {
        throw Error(ErrorCode::invalid_argument, "page_index and slots differ in length");
    }
}

/// The bases of `n_blocks` blocks; keeps their pages alive.
struct HeldBases {
    PageList held;
    std::vector<const Page*> pages;
    std::vector<StoredBlock> at;

    [[nodiscard]] StoredBases view() const noexcept { return {pages, at}; }
};

/// Items `first` and `first + 1`, the last ones, of the tuple `bases`: the index of each block's
/// base among pages (-1 for none), and its slot. Nothing for None.
[[nodiscard]] inline std::vector<StoredBlock> places_of_bases(const py::object& bases,
                                                              std::size_t first,
                                                              std::size_t n_blocks) {
    std::vector<StoredBlock> places;
    if (bases.is_none()) return places;
    const auto parts = py::cast<py::tuple>(bases);
    if (parts.size() != first + 2) {
        throw Error(ErrorCode::invalid_argument,
                    "bases must be " + std::to_string(first + 2) + " columns");
    }
    const auto index = py::cast<Array<std::int64_t>>(parts[first]);
    const auto slots = py::cast<Array<std::uint32_t>>(parts[first + 1]);
    const auto page_of = as_span(index, "bases.page_index");
    const auto slot_of = as_span(slots, "bases.slots");
    if (page_of.size() != n_blocks || slot_of.size() != n_blocks) {
        throw Error(ErrorCode::invalid_argument,
                    std::to_string(n_blocks) + " blocks came with " +
                        std::to_string(page_of.size()) + " page indices and " +
                        std::to_string(slot_of.size()) + " slots of bases");
    }
    places.reserve(n_blocks);
    for (std::size_t i = 0; i < n_blocks; ++i) {
        if (page_of[i] < -1 || page_of[i] >= std::int64_t{kNoPage}) {
            throw Error(ErrorCode::invalid_argument,
                        "bases.page_index has the impossible value " + std::to_string(page_of[i]));
        }
        places.push_back(
            {page_of[i] < 0 ? kNoPage : static_cast<std::uint32_t>(page_of[i]), slot_of[i]});
    }
    return places;
}

/// `bases` is None, or a tuple of pages, index of each block's base among them (-1 for none),
/// slots.
[[nodiscard]] inline HeldBases hold_bases(const py::object& bases, std::size_t n_blocks) {
    HeldBases held;
    if (bases.is_none()) return held;
    held.at = places_of_bases(bases, 1, n_blocks);
    held.held = as_pages(py::cast<py::sequence>(py::cast<py::tuple>(bases)[0]));
    held.pages = pointers(held.held);
    return held;
}

/// Memory for views, kept by each thread from one call to the next: a product makes thousands, and
/// the pages that the system would have to clear for them each time cost more than to fill them.
class Views {
  public:
    Views() noexcept : views_(std::move(spare())) { views_.clear(); }
    ~Views() {
        std::vector<BlockView>& kept = spare();
        if (kept.capacity() < views_.capacity() && views_.capacity() <= kMaxKept) {
            kept = std::move(views_);
        }
    }
    Views(Views&&) noexcept = default;
    Views& operator=(Views&&) = delete;
    Views(const Views&) = delete;
    Views& operator=(const Views&) = delete;

    [[nodiscard]] std::vector<BlockView>& operator*() noexcept { return views_; }
    [[nodiscard]] const std::vector<BlockView>& operator*() const noexcept { return views_; }

  private:
    static constexpr std::size_t kMaxKept = (std::size_t{1} << 20) / sizeof(BlockView);
    [[nodiscard]] static std::vector<BlockView>& spare() noexcept {
        thread_local std::vector<BlockView> kept;
        return kept;
    }
    std::vector<BlockView> views_;
};

/// Blocks on pages, deltas with their bases; keeps the pages alive.
struct HeldBlocks {
    PageList pages;
    HeldBases bases;
    std::vector<BlockView> base_blocks;  // what the blocks point to
    Views views;

    [[nodiscard]] std::span<const BlockView> blocks() const noexcept { return *views; }
};

[[nodiscard]] inline HeldBlocks hold_blocks(const py::sequence& pages,
                                            const Array<std::uint32_t>& page_index,
                                            const Array<std::uint32_t>& slots,
                                            const py::object& bases, unsigned threads) {
    const auto page_of = as_span(page_index, "page_index");
    const auto slot_of = as_span(slots, "slots");
    check_places(page_of.size(), slot_of.size());
    HeldBlocks held;
    held.pages = as_pages(pages);
    std::vector<BlockView>& views = *held.views;
    views.resize(page_of.size());
    view_blocks(pointers(held.pages), page_of, slot_of, views, threads);
    if (bases.is_none()) return held;
    held.bases = hold_bases(bases, views.size());
    const StoredBases of = held.bases.view();
    held.base_blocks.resize(views.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
        views[i] = with_base(views[i], of, i, held.base_blocks[i]);
    }
    return held;
}

/// Held while a product is fed. A second thread is refused meanwhile: both would go on from the
/// same block.
class OnlyFeeder {
  public:
    explicit OnlyFeeder(std::atomic_flag& taken) : taken_(taken) {
        if (taken_.test_and_set(std::memory_order_acquire)) {
            throw Error(ErrorCode::invalid_argument, "two threads feed one product at once");
        }
    }
    ~OnlyFeeder() { taken_.clear(std::memory_order_release); }
    OnlyFeeder(const OnlyFeeder&) = delete;
    OnlyFeeder& operator=(const OnlyFeeder&) = delete;

  private:
    std::atomic_flag& taken_;
};

/// Whether an array has bf16 numbers, which what computes in f32 takes and gives as well.
[[nodiscard]] inline bool is_bf16_for(Dtype compute, const py::array& array) {
    return compute == Dtype::f32 && py::isinstance<py::array_t<std::uint16_t>>(array);
}

/// A C-contiguous array of f64, f32, or bf16 (whose bits numpy has as uint16), borrowed.
[[nodiscard]] inline std::byte* data_of(const py::object& object, Dtype dtype, std::size_t size,
                                        bool writes, const char* name) {
    struct Kind {
        const char* name;
        bool matches;
    };
    const Kind kind =
        dtype == Dtype::f64    ? Kind{"float64", py::isinstance<py::array_t<double>>(object)}
        : dtype == Dtype::bf16 ? Kind{"uint16", py::isinstance<py::array_t<std::uint16_t>>(object)}
                               : Kind{"float32", py::isinstance<py::array_t<float>>(object)};
    const auto array = kind.matches ? py::reinterpret_borrow<py::array>(object) : py::array();
    const bool contiguous = (array.flags() & py::array::c_style) != 0;
    if (!kind.matches || !contiguous || static_cast<std::size_t>(array.size()) != size) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " must be a C-contiguous " +
                                                     kind.name + " array of " +
                                                     std::to_string(size) + " elements");
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) % item_bytes(dtype) != 0) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " is misaligned");
    }
    if (writes && !array.writeable()) {
        throw Error(ErrorCode::invalid_argument, std::string(name) + " is read-only");
    }
    return static_cast<std::byte*>(const_cast<void*>(array.data()));
}

[[nodiscard]] inline Activation as_activation(const std::string& name) {
    const std::optional<Activation> activation = activation_named(name);
    if (!activation) {
        throw Error(ErrorCode::invalid_argument, "unknown activation '" + name + "'");
    }
    return *activation;
}

}  // namespace pydedup
