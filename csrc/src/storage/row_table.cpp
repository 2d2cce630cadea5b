// SPDX-License-Identifier: Apache-2.0
// Where the time of a gather goes: 4,096 rows of 1,200 bytes are 5 MB, which two threads copy in
// 0.2 ms. Anything done per block or page has to be far below that, so per call there is one look
// at a 4-byte number for each row (its page), and one addition for each piece (a row in a block).
// Where blocks lie, row_places.hpp knows.
#include "pydedup/row_table.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/parallel.hpp"
#include "gemm/weights.hpp"
#include "pydedup/error.hpp"
#include "pydedup/gemm.hpp"
#include "storage/row_places.hpp"
#include "storage/row_sums.hpp"

namespace pydedup {
namespace {

// Rows per piece of parallel work: a row is a few hundred bytes, a piece should take 10 us or more.
constexpr std::size_t kRowsPerPiece = 256;
// Bytes to copy or add from which on a second thread is worth waking.
constexpr std::size_t kParallelBytes = std::size_t{1} << 20;
// Pieces by which the next ones are asked of memory ahead of their use: about 100 ns of work.
constexpr std::size_t kPiecesAhead = 16;
// Bytes of a piece that are asked for; what follows, the hardware fetches by itself.
constexpr std::size_t kPrefetchBytes = 256;
// Bytes that encoded blocks may take while they are decoded; the others have to wait.
constexpr std::size_t kTileBytes = std::size_t{16} << 20;

[[nodiscard]] unsigned threads_for(std::size_t bytes, unsigned requested) noexcept {
    return bytes < kParallelBytes ? 1 : thread_count(requested);
}

}  // namespace

class RowTable::Impl : public detail::RowPlaces {
  public:
    using RowPlaces::RowPlaces;

    // `here` is the ids of some pages, with these pages, or the numbers of some blocks, with these.
    template <class Here>
    void take(std::span<const std::int64_t> names, std::span<const Here> here,
              std::span<const std::int64_t> ids, std::byte* out, unsigned threads,
              std::span<DecodedBlocks* const> decoded) const {
        check_ids(ids);
        const auto call = begin(names, here, decoded);
        const std::size_t row_bytes = grid_.cols * item_;
        const unsigned workers = threads_for(ids.size() * row_bytes, threads);
        each_part(call, ids, threads, [&](const auto& pieces) {
            parallel_for(
                ids.size(), kRowsPerPiece, workers, [&](std::size_t first, std::size_t last) {
                    copy_rows(pieces, ids.subspan(first, last - first), out + first * row_bytes);
                });
        });
    }

    template <class Here>
    void bag(std::span<const std::int64_t> names, std::span<const Here> here, Bags& bags,
             BagMode mode, std::byte* out, unsigned threads,
             std::span<DecodedBlocks* const> decoded) const {
        if (bags.is_weighted() && mode != BagMode::sum) {
            throw Error(ErrorCode::invalid_argument, "weights are for sums");
        }
        const auto in_use = bags.lock();
        const std::span<const std::int64_t> ids = bags.ids();
        check_ids(ids);
        const auto call = begin(names, here, decoded);
        const std::size_t n_bags = bags.count();
        const unsigned workers = threads_for(ids.size() * grid_.cols * item_, threads);
        // As many bags as hold about kRowsPerPiece rows.
        const std::size_t rows = std::max<std::size_t>(ids.size(), 1);
        const std::size_t grain = std::max<std::size_t>(n_bags * kRowsPerPiece / rows / 2, 1);
        each_part(call, ids, threads, [&](const auto& pieces) {
            parallel_for(n_bags, grain, workers, [&](std::size_t first, std::size_t last) {
                if (compute_dtype(dtype_) == Dtype::f64) {
                    reduce<double>(pieces, bags, mode, out, first, last);
                } else {
                    reduce<float>(pieces, bags, mode, out, first, last);
                }
            });
        });
    }

  private:
    // Calls body(pieces) for all blocks at once where none needs decoding, or for some after
    // others, as each_tile() does.
    template <class Body>
    void each_part(const Call& call, std::span<const std::int64_t> ids, unsigned threads,
                   const Body& body) const {
        if (grid_cols_ == 0 || ids.empty()) return;
        const Plain plain{*this, call, 0, grid_.rows};
        if (call.all_plain) return body(plain);
        const std::vector<std::size_t> blocks = blocks_at_hand(call, ids);
        each_tile(
            blocks, threads, body, [&](std::size_t i) { return plain.block(blocks[i]); },
            [&](std::size_t i, std::byte* to, std::size_t stride) {
                BlockView base{};
                const BlockView view = block(call, blocks[i], base);
                if (detail::is_in_place(view)) return view.data;  // kept decoded
                decode_block(view, to, stride);
                return static_cast<const std::byte*>(to);
            });
    }

    template <class Body>
    void each_part(const BlockCall& call, std::span<const std::int64_t> ids, unsigned threads,
                   const Body& body) const {
        if (grid_cols_ == 0 || ids.empty()) return;
        std::vector<std::pair<std::size_t, const BlockView*>> views;
        views.reserve(call.numbers.size());
        for (std::size_t i = 0; i < call.numbers.size(); ++i) {
            views.emplace_back(static_cast<std::size_t>(call.numbers[i]), &call.views[i]);
        }
        std::sort(views.begin(), views.end());
        std::vector<std::size_t> blocks;
        blocks.reserve(views.size());
        for (const auto& [b, view] : views) blocks.push_back(b);
        each_tile(
            blocks, threads, body,
            [&](std::size_t i) {
                const BlockView& view = *views[i].second;
                return detail::is_in_place(view) ? view.data : nullptr;
            },
            [&](std::size_t i, std::byte* to, std::size_t stride) {
                decode_block(*views[i].second, to, stride);
                return static_cast<const std::byte*>(to);
            });
    }

    // Calls body(pieces) with blocks, whose numbers ascend, until all had their turn: with so many
    // after one another that those to decode take kTileBytes at most. in_place(i) is where block i
    // lies, or nullptr: then decode(i, to, stride) returns where it is afterwards.
    template <class Body, class InPlace, class Decode>
    void each_tile(const std::vector<std::size_t>& blocks, unsigned threads, const Body& body,
                   const InPlace& in_place, const Decode& decode) const {
        struct Encoded {
            std::size_t block, offset;
        };
        detail::Scratch<std::byte> scratch;
        std::vector<const std::byte*> at;
        std::vector<Encoded> encoded;
        for (std::size_t begin = 0; begin < blocks.size();) {
            const std::size_t first_block = blocks[begin];
            at.clear();
            encoded.clear();
            std::size_t bytes = 0;
            std::size_t end = begin;
            for (; end < blocks.size(); ++end) {
                at.resize(blocks[end] - first_block + 1, nullptr);
                at.back() = in_place(end);
                if (at.back() != nullptr) continue;
                const BlockRect rect = block_rect(grid_, blocks[end]);
                const std::size_t room = (rect.rows * rect.cols * item_ + 63) / 64 * 64;
                if (!encoded.empty() && bytes + room > kTileBytes) break;
                encoded.push_back({end, bytes});
                bytes += room;
            }
            std::byte* const tile = scratch.at_least(bytes);
            parallel_for(encoded.size(), 4, threads_for(bytes, threads),
                         [&](std::size_t first, std::size_t last) {
                             for (std::size_t i = first; i < last; ++i) {
                                 const auto [block, offset] = encoded[i];
                                 const std::size_t b = blocks[block];
                                 at[b - first_block] = decode(block, tile + offset,
                                                              block_rect(grid_, b).cols * item_);
                             }
                         });
            at.resize(blocks[end - 1] - first_block + 1);
            body(Some{at, first_block, first_row_in(first_block / grid_cols_),
                      first_row_in(blocks[end - 1] / grid_cols_ + 1)});
            begin = end;
        }
    }

    // Calls use(first element, first column, columns) for each piece of a row that is here.
    template <class Pieces, class Use>
    void each_piece(const Pieces& pieces, std::int64_t id, const Use& use) const {
        const std::size_t row = block_row(static_cast<std::size_t>(id));
        const std::size_t in_block = static_cast<std::size_t>(id) - row * grid_.block_rows;
        std::size_t col0 = 0;
        for (std::size_t c = 0; c < grid_cols_; ++c, col0 += grid_.block_cols) {
            const std::byte* const block = pieces.block(row * grid_cols_ + c);
            const std::size_t cols = std::min(grid_.block_cols, grid_.cols - col0);
            if (block != nullptr) use(block + in_block * cols * item_, col0, cols);
        }
    }

    // Each piece is asked of memory when its turn is known, and copied kPiecesAhead pieces later.
    template <class Pieces>
    void copy_rows(const Pieces& pieces, std::span<const std::int64_t> ids, std::byte* out) const {
        struct Copy {
            const std::byte* from;
            std::byte* to;
            std::size_t bytes;
            void operator()() const noexcept { std::memcpy(to, from, bytes); }
        };
        Copy ring[kPiecesAhead];
        std::size_t n = 0;
        for (const std::int64_t id : ids) {
            each_piece(pieces, id, [&](const std::byte* from, std::size_t col0, std::size_t cols) {
                const std::size_t bytes = cols * item_;
                const std::size_t near = std::min(bytes, kPrefetchBytes);
                for (std::size_t at = 0; at < near; at += 64) __builtin_prefetch(from + at);
                Copy& copy = ring[n % kPiecesAhead];
                if (n >= kPiecesAhead) copy();
                copy = {from, out + col0 * item_, bytes};
                ++n;
            });
            out += grid_.cols * item_;
        }
        for (std::size_t i = n < kPiecesAhead ? 0 : n - kPiecesAhead; i < n; ++i) {
            ring[i % kPiecesAhead]();
        }
    }

    template <class T, class Pieces>
    void reduce(const Pieces& pieces, Bags& bags, BagMode mode, std::byte* out, std::size_t first,
                std::size_t last) const {
        Bags::Scratch sorting;
        detail::Together<T> together;
        detail::Scratch<T> scratch;
        for (std::size_t b = first; b < last; ++b) {
            T* const to = reinterpret_cast<T*>(out) + b * grid_.cols;
            const auto [ids, weights] = bags.sorted(b, sorting);
            const auto place_of = [ids = ids](std::size_t row) {
                return static_cast<std::size_t>(
                    std::lower_bound(ids.begin(), ids.end(), static_cast<std::int64_t>(row)) -
                    ids.begin());
            };
            const std::size_t end = place_of(pieces.end_row);
            for (std::size_t begin = place_of(pieces.first_row); begin < end;) {
                const std::size_t stop = std::min(end, begin + detail::kRowsTogether);
                std::size_t col0 = 0;
                for (std::size_t c = 0; c < grid_cols_; ++c, col0 += grid_.block_cols) {
                    const std::size_t cols = std::min(grid_.block_cols, grid_.cols - col0);
                    together.count = 0;
                    for (std::size_t i = begin; i < stop; ++i) {
                        const auto id = static_cast<std::size_t>(ids[i]);
                        const std::size_t row = block_row(id);
                        const std::byte* const block = pieces.block(row * grid_cols_ + c);
                        if (block == nullptr) continue;
                        together.rows[together.count] =
                            block + (id - row * grid_.block_rows) * cols * item_;
                        if (weights != nullptr) {
                            together.scales[together.count] = static_cast<T>(weights[i]);
                        }
                        ++together.count;
                    }
                    reduce_together(together, dtype_, weights != nullptr, cols, mode, to + col0,
                                    scratch);
                }
                begin = stop;
            }
        }
    }
};

RowTable::RowTable(const BlockGrid& grid, Dtype dtype, std::span<const std::int64_t> page_ids,
                   std::span<const std::uint32_t> slots,
                   std::span<const std::int64_t> base_page_ids,
                   std::span<const std::uint32_t> base_slots)
    : impl_(std::make_unique<Impl>(grid, dtype, page_ids, slots, base_page_ids, base_slots)) {}

RowTable::~RowTable() = default;

const BlockGrid& RowTable::grid() const noexcept { return impl_->grid(); }

Dtype RowTable::dtype() const noexcept { return impl_->dtype(); }

std::vector<std::int64_t> RowTable::pages_of(std::span<const std::int64_t> ids) const {
    return impl_->pages_of(ids);
}

void RowTable::take(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages,
                    std::span<const std::int64_t> ids, std::byte* out, unsigned threads,
                    std::span<DecodedBlocks* const> decoded) const {
    impl_->take(page_ids, pages, ids, out, threads, decoded);
}

void RowTable::take(std::span<const std::int64_t> numbers, std::span<const BlockView> views,
                    std::span<const std::int64_t> ids, std::byte* out, unsigned threads) const {
    impl_->take(numbers, views, ids, out, threads, {});
}

void RowTable::bag(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages,
                   Bags& bags, BagMode mode, std::byte* out, unsigned threads,
                   std::span<DecodedBlocks* const> decoded) const {
    impl_->bag(page_ids, pages, bags, mode, out, threads, decoded);
}

void RowTable::bag(std::span<const std::int64_t> numbers, std::span<const BlockView> views,
                   Bags& bags, BagMode mode, std::byte* out, unsigned threads) const {
    impl_->bag(numbers, views, bags, mode, out, threads, {});
}

}  // namespace pydedup
