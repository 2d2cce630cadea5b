// SPDX-License-Identifier: Apache-2.0
// Where the time of a gather goes: 4,096 rows of 1,200 bytes are 5 MB, which two threads copy in
// 0.2 ms. Anything done per block or page has to be far below that, so per call there is one look
// at a 4-byte number for each row (its page), and one addition for each piece (a row in a block).
//
// What is learned of a page is kept per block: the offset of its first byte. Pages are immutable,
// so it stays true; a page's serial says that it is still the same one in memory, and when it comes
// anew its checksum says that it is the same as before.
#include "pydedup/row_table.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <mutex>
#include <numeric>
#include <string>

#include "base/parallel.hpp"
#include "dispatch/dispatch.hpp"
#include "gemm/weights.hpp"
#include "pydedup/error.hpp"
#include "pydedup/gemm.hpp"

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
// Rows of a bag that one kernel call adds up.
constexpr std::size_t kRowsTogether = 256;
// Bytes that encoded blocks may take while they are decoded; the others have to wait.
constexpr std::size_t kTileBytes = std::size_t{16} << 20;
// A block row whose blocks are on several pages, those of bases included.
constexpr std::uint32_t kSeveral = UINT32_MAX;

[[nodiscard]] unsigned threads_for(std::size_t bytes, unsigned requested) noexcept {
    return bytes < kParallelBytes ? 1 : thread_count(requested);
}

template <class T>
void max_row(const T* from, std::size_t count, T* to) noexcept {
    for (std::size_t j = 0; j < count; ++j) {
        // Written so that a NaN on either side is kept.
        to[j] = from[j] <= to[j] || std::isnan(to[j]) ? to[j] : from[j];
    }
}

}  // namespace

class RowTable::Impl {
  public:
    Impl(const BlockGrid& grid, Dtype dtype, std::span<const std::int64_t> page_ids,
         std::span<const std::uint32_t> slots, std::span<const std::int64_t> base_page_ids,
         std::span<const std::uint32_t> base_slots)
        : grid_(grid), dtype_(dtype), item_(item_bytes(dtype)), grid_cols_(grid.grid_cols()) {
        const std::size_t count = grid.count();
        if (page_ids.size() != count || slots.size() != count) {
            throw Error(ErrorCode::invalid_argument,
                        std::to_string(page_ids.size()) + " page ids and " +
                            std::to_string(slots.size()) + " slots were given for " +
                            std::to_string(count) + " blocks");
        }
        if (base_page_ids.size() != base_slots.size() ||
            (!base_slots.empty() && base_slots.size() != count)) {
            throw Error(ErrorCode::invalid_argument,
                        std::to_string(base_page_ids.size()) + " page ids and " +
                            std::to_string(base_slots.size()) + " slots of bases were given for " +
                            std::to_string(count) + " blocks");
        }
        page_ids_.assign(page_ids.begin(), page_ids.end());
        std::copy_if(base_page_ids.begin(), base_page_ids.end(), std::back_inserter(page_ids_),
                     [](std::int64_t id) { return id >= 0; });
        std::sort(page_ids_.begin(), page_ids_.end());
        page_ids_.erase(std::unique(page_ids_.begin(), page_ids_.end()), page_ids_.end());
        if (page_ids_.size() >= kSeveral) {
            throw Error(ErrorCode::invalid_argument, "a matrix lies on fewer than 2^32 - 1 pages");
        }
        places_.resize(count);
        slots_.assign(slots.begin(), slots.end());
        known_ = std::vector<Known>(page_ids_.size());
        starts_.assign(page_ids_.size() + 1, 0);
        const auto number_of = [this](std::int64_t id) {
            const auto at = std::lower_bound(page_ids_.begin(), page_ids_.end(), id);
            return static_cast<std::uint32_t>(at - page_ids_.begin());
        };
        for (std::size_t b = 0; b < count; ++b) {
            places_[b].page = number_of(page_ids[b]);
            ++starts_[places_[b].page + 1];
        }
        bases_.reserve(base_slots.size());
        for (std::size_t b = 0; b < base_slots.size(); ++b) {
            const std::int64_t id = base_page_ids[b];
            bases_.push_back({id < 0 ? kNoPage : number_of(id), base_slots[b]});
        }
        std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
        blocks_.resize(count);
        std::vector<std::size_t> next(starts_.begin(), starts_.end() - 1);
        for (std::size_t b = 0; b < count; ++b) blocks_[next[places_[b].page]++] = b;
        row_pages_.resize(grid.grid_rows());
        for (std::size_t row = 0; row < row_pages_.size() && grid_cols_ != 0; ++row) {
            const std::span blocks(places_.data() + row * grid_cols_, grid_cols_);
            const bool same = std::all_of(blocks.begin(), blocks.end(), [&](const Place& place) {
                return place.page == blocks[0].page;
            });
            row_pages_[row] = same ? blocks[0].page : kSeveral;
        }
        for (std::size_t b = 0; b < bases_.size(); ++b) {
            if (bases_[b].page != kNoPage) row_pages_[b / grid_cols_] = kSeveral;
        }
    }

    [[nodiscard]] const BlockGrid& grid() const noexcept { return grid_; }
    [[nodiscard]] Dtype dtype() const noexcept { return dtype_; }

    [[nodiscard]] std::vector<std::int64_t> pages_of(std::span<const std::int64_t> ids) const {
        check_ids(ids);
        std::vector<std::int64_t> pages;
        if (grid_cols_ == 0) return pages;
        std::vector<std::uint8_t> wanted(page_ids_.size(), 0);
        for (const std::int64_t id : ids) {
            const std::size_t row = static_cast<std::size_t>(id) / grid_.block_rows;
            if (row_pages_[row] != kSeveral) {
                wanted[row_pages_[row]] = 1;
                continue;
            }
            const std::size_t first = row * grid_cols_;
            for (std::size_t b = first; b < first + grid_cols_; ++b) wanted[places_[b].page] = 1;
            if (bases_.empty()) continue;
            for (std::size_t b = first; b < first + grid_cols_; ++b) {
                if (bases_[b].page != kNoPage) wanted[bases_[b].page] = 1;
            }
        }
        for (std::size_t p = 0; p < wanted.size(); ++p) {
            if (wanted[p] != 0) pages.push_back(page_ids_[p]);
        }
        return pages;
    }

    // `here` is the ids of some pages, with these pages, or the numbers of some blocks, with these.
    template <class Here>
    void take(std::span<const std::int64_t> names, std::span<const Here> here,
              std::span<const std::int64_t> ids, std::byte* out, unsigned threads) const {
        check_ids(ids);
        const auto call = begin(names, here);
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
    void bag(std::span<const std::int64_t> names, std::span<const Here> here,
             std::span<const std::int64_t> ids, std::span<const std::int64_t> edges,
             const std::byte* weights, BagMode mode, std::byte* out, unsigned threads) const {
        check_ids(ids);
        check_edges(edges, ids.size());
        const auto call = begin(names, here);
        const std::size_t n_bags = edges.size() - 1;
        const unsigned workers = threads_for(ids.size() * grid_.cols * item_, threads);
        // As many bags as hold about kRowsPerPiece rows.
        const std::size_t rows = std::max<std::size_t>(ids.size(), 1);
        const std::size_t grain = std::max<std::size_t>(n_bags * kRowsPerPiece / rows / 2, 1);
        each_part(call, ids, threads, [&](const auto& pieces) {
            parallel_for(n_bags, grain, workers, [&](std::size_t first, std::size_t last) {
                if (compute_dtype(dtype_) == Dtype::f64) {
                    reduce<double>(pieces, ids, edges, weights, mode, out, first, last);
                } else {
                    reduce<float>(pieces, ids, edges, weights, mode, out, first, last);
                }
            });
        });
    }

  private:
    struct Place {
        std::uint32_t page;      // index into page_ids_
        std::uint32_t unit = 0;  // first byte in units of kBlockAlignment; 0: encoded
    };
    // What is known of a page: nothing, while the serial is 0. Places and `checksum` were written
    // before that and never are again.
    struct Known {
        std::atomic<std::uint64_t> serial{0};
        Digest checksum{};
        bool encoded = false;

        Known() = default;
        // Only to make a vector of them, before anybody else has it.
        Known(const Known&) noexcept {}
    };
    // The pages of one call by number: nullptr for those that it does not have.
    struct Call {
        std::vector<const Page*> pages;
        std::vector<const std::byte*> bytes;  // nullptr too where elements lie misaligned
        bool all_plain = true;                // every block is used where it lies
    };
    // The blocks of one call.
    struct BlockCall {
        std::span<const std::int64_t> numbers;
        std::span<const BlockView> views;
    };

    void check_ids(std::span<const std::int64_t> ids) const {
        for (const std::int64_t id : ids) {
            if (static_cast<std::uint64_t>(id) < grid_.rows) continue;
            throw Error(ErrorCode::invalid_argument, "id " + std::to_string(id) +
                                                         " is out of range; the matrix has " +
                                                         std::to_string(grid_.rows) + " rows");
        }
    }

    static void check_edges(std::span<const std::int64_t> edges, std::size_t n_ids) {
        bool good = !edges.empty() && edges.front() == 0 &&
                    edges.back() == static_cast<std::int64_t>(n_ids);
        for (std::size_t i = 1; good && i < edges.size(); ++i) good = edges[i - 1] <= edges[i];
        if (!good) {
            throw Error(ErrorCode::invalid_argument, "edges of bags must ascend from 0 to the " +
                                                         std::to_string(n_ids) + " ids");
        }
    }

    Call begin(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages) const {
        if (page_ids.size() != pages.size()) {
            throw Error(ErrorCode::invalid_argument, "each page needs one id");
        }
        Call call;
        call.pages.resize(page_ids_.size(), nullptr);
        call.bytes.resize(page_ids_.size(), nullptr);
        auto at = page_ids_.begin();
        for (std::size_t i = 0; i < pages.size(); ++i) {
            at = std::lower_bound(at, page_ids_.end(), page_ids[i]);
            if (at == page_ids_.end() || *at != page_ids[i]) {
                throw Error(ErrorCode::invalid_argument,
                            "page " + std::to_string(page_ids[i]) +
                                " is not one of the matrix, or page ids do not ascend");
            }
            const auto number = static_cast<std::size_t>(at - page_ids_.begin());
            const Page& page = *pages[i];
            learn(number, page);
            const std::byte* const bytes = page.view().bytes().data();
            const bool aligned = reinterpret_cast<std::uintptr_t>(bytes) % item_ == 0;
            call.pages[number] = &page;
            call.bytes[number] = aligned ? bytes : nullptr;
            call.all_plain = call.all_plain && aligned && !known_[number].encoded;
        }
        return call;
    }

    BlockCall begin(std::span<const std::int64_t> numbers, std::span<const BlockView> views) const {
        if (numbers.size() != views.size()) {
            throw Error(ErrorCode::invalid_argument, "each block needs one number");
        }
        for (std::size_t i = 0; i < numbers.size(); ++i) {
            if (static_cast<std::uint64_t>(numbers[i]) >= places_.size()) {
                throw Error(ErrorCode::invalid_argument, "block " + std::to_string(numbers[i]) +
                                                             " is out of range; the matrix has " +
                                                             std::to_string(places_.size()) +
                                                             " blocks");
            }
            detail::check_block(views[i], grid_, dtype_, static_cast<std::size_t>(numbers[i]));
        }
        return {numbers, views};
    }

    // Afterwards the places of the page's blocks are known, and hold for this very page.
    void learn(std::size_t number, const Page& page) const {
        Known& known = known_[number];
        if (known.serial.load(std::memory_order_acquire) == page.serial()) return;
        const std::scoped_lock lock(mutex_);
        if (known.serial.load(std::memory_order_relaxed) != 0) {
            if (known.checksum != page.checksum()) {
                throw Error(ErrorCode::corrupt_page,
                            "page " + std::to_string(page_ids_[number]) +
                                " is another one than before; run verify on the store");
            }
            known.serial.store(page.serial(), std::memory_order_release);
            return;
        }
        bool encoded = false;
        for (std::size_t i = starts_[number]; i < starts_[number + 1]; ++i) {
            const std::size_t b = blocks_[i];
            const BlockView block = page.block(slots_[b]);
            detail::check_block(block, grid_, dtype_, b);
            const std::size_t offset = page.view().offset(slots_[b]);
            const bool plain =
                block.encoding == Encoding::raw && offset / kBlockAlignment <= UINT32_MAX;
            places_[b].unit = plain ? static_cast<std::uint32_t>(offset / kBlockAlignment) : 0;
            encoded = encoded || !plain;
        }
        known.encoded = encoded;
        known.checksum = page.checksum();
        known.serial.store(page.serial(), std::memory_order_release);
    }

    // Blocks where they lie on their pages.
    struct Plain {
        const Impl& table;
        const Call& call;
        [[nodiscard]] const std::byte* block(std::size_t b) const noexcept {
            const Place place = table.places_[b];
            const std::byte* const page = call.bytes[place.page];
            if (page == nullptr || place.unit == 0) return nullptr;
            return page + std::size_t{place.unit} * kBlockAlignment;
        }
    };
    // Blocks that were decoded.
    struct Decoded {
        const std::vector<const std::byte*>& at;
        [[nodiscard]] const std::byte* block(std::size_t b) const noexcept { return at[b]; }
    };

    // Calls body(pieces) for the blocks that need no decoding, then for those that do, kTileBytes
    // of them at a time.
    template <class Body>
    void each_part(const Call& call, std::span<const std::int64_t> ids, unsigned threads,
                   const Body& body) const {
        if (grid_cols_ == 0 || ids.empty()) return;
        body(Plain{*this, call});
        if (call.all_plain) return;
        const std::vector<std::size_t> blocks = blocks_to_decode(call, ids);
        std::vector<const std::byte*> decoded(places_.size(), nullptr);
        each_decoded(blocks, threads, decoded, body,
                     [&](std::size_t i, std::byte* to, std::size_t stride) {
                         const std::size_t b = blocks[i];
                         BlockView base{};
                         decode_block(with_base(call.pages[places_[b].page]->block(slots_[b]),
                                                {call.pages, bases_}, b, base),
                                      to, stride);
                     });
    }

    // The same for blocks at hand, where all are used together: those that need no decoding lie
    // beside those that were decoded.
    template <class Body>
    void each_part(const BlockCall& call, std::span<const std::int64_t> ids, unsigned threads,
                   const Body& body) const {
        if (grid_cols_ == 0 || ids.empty()) return;
        const std::vector<std::uint8_t> wanted = rows_wanted(ids);
        std::vector<const std::byte*> at(places_.size(), nullptr);
        std::vector<std::size_t> blocks;
        std::vector<std::size_t> views;
        bool any = false;
        for (std::size_t i = 0; i < call.numbers.size(); ++i) {
            const auto b = static_cast<std::size_t>(call.numbers[i]);
            if (wanted[b / grid_cols_] == 0) continue;
            if (detail::is_in_place(call.views[i])) {
                at[b] = call.views[i].data;
                any = true;
            } else {
                blocks.push_back(b);
                views.push_back(i);
            }
        }
        if (any) body(Decoded{at});
        std::fill(at.begin(), at.end(), nullptr);
        each_decoded(blocks, threads, at, body,
                     [&](std::size_t i, std::byte* to, std::size_t stride) {
                         decode_block(call.views[views[i]], to, stride);
                     });
    }

    // Decodes blocks, kTileBytes of them at a time, and calls body(pieces) with them. `at` has a
    // place for every block, nullptr before and after.
    template <class Body, class Decode>
    void each_decoded(const std::vector<std::size_t>& blocks, unsigned threads,
                      std::vector<const std::byte*>& at, const Body& body,
                      const Decode& decode) const {
        detail::Scratch<std::byte> scratch;
        std::vector<std::size_t> offsets;
        for (std::size_t begin = 0; begin < blocks.size();) {
            offsets.clear();
            std::size_t bytes = 0;
            std::size_t end = begin;
            for (; end < blocks.size(); ++end) {
                const BlockRect rect = block_rect(grid_, blocks[end]);
                const std::size_t room = (rect.rows * rect.cols * item_ + 63) / 64 * 64;
                if (end != begin && bytes + room > kTileBytes) break;
                offsets.push_back(bytes);
                bytes += room;
            }
            std::byte* const tile = scratch.at_least(bytes);
            parallel_for(end - begin, 4, threads_for(bytes, threads),
                         [&](std::size_t first, std::size_t last) {
                             for (std::size_t i = first; i < last; ++i) {
                                 const std::size_t b = blocks[begin + i];
                                 decode(begin + i, tile + offsets[i],
                                        block_rect(grid_, b).cols * item_);
                                 at[b] = tile + offsets[i];
                             }
                         });
            body(Decoded{at});
            for (; begin < end; ++begin) at[blocks[begin]] = nullptr;
        }
    }

    // Per row of blocks: whether one of these rows is in it.
    [[nodiscard]] std::vector<std::uint8_t> rows_wanted(std::span<const std::int64_t> ids) const {
        std::vector<std::uint8_t> wanted(row_pages_.size(), 0);
        for (const std::int64_t id : ids) {
            wanted[static_cast<std::size_t>(id) / grid_.block_rows] = 1;
        }
        return wanted;
    }

    // Of the blocks with a piece of these rows, those that have to be decoded and are here.
    [[nodiscard]] std::vector<std::size_t> blocks_to_decode(
        const Call& call, std::span<const std::int64_t> ids) const {
        const std::vector<std::uint8_t> wanted = rows_wanted(ids);
        std::vector<std::size_t> blocks;
        const Plain plain{*this, call};
        for (std::size_t row = 0; row < wanted.size(); ++row) {
            if (wanted[row] == 0) continue;
            for (std::size_t b = row * grid_cols_; b < (row + 1) * grid_cols_; ++b) {
                if (call.pages[places_[b].page] != nullptr && plain.block(b) == nullptr) {
                    blocks.push_back(b);
                }
            }
        }
        return blocks;
    }

    // Calls use(first element, first column, columns) for each piece of a row that is here.
    template <class Pieces, class Use>
    void each_piece(const Pieces& pieces, std::int64_t id, const Use& use) const {
        const std::size_t row = static_cast<std::size_t>(id) / grid_.block_rows;
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

    // Rows of one bag, in one column of blocks, for one call of a kernel.
    template <class T>
    struct Together {
        const std::byte* rows[kRowsTogether];
        T scales[kRowsTogether];
        std::size_t count = 0;
    };

    template <class T, class Pieces>
    void reduce(const Pieces& pieces, std::span<const std::int64_t> ids,
                std::span<const std::int64_t> edges, const std::byte* weights, BagMode mode,
                std::byte* out, std::size_t first, std::size_t last) const {
        const auto* const scales = reinterpret_cast<const T*>(weights);
        Together<T> together;
        detail::Scratch<T> scratch;
        for (std::size_t b = first; b < last; ++b) {
            T* const to = reinterpret_cast<T*>(out) + b * grid_.cols;
            const auto end = static_cast<std::size_t>(edges[b + 1]);
            for (auto begin = static_cast<std::size_t>(edges[b]); begin < end;) {
                const std::size_t stop = std::min(end, begin + kRowsTogether);
                std::size_t col0 = 0;
                for (std::size_t c = 0; c < grid_cols_; ++c, col0 += grid_.block_cols) {
                    const std::size_t cols = std::min(grid_.block_cols, grid_.cols - col0);
                    together.count = 0;
                    for (std::size_t i = begin; i < stop; ++i) {
                        const auto id = static_cast<std::size_t>(ids[i]);
                        const std::size_t row = id / grid_.block_rows;
                        const std::byte* const block = pieces.block(row * grid_cols_ + c);
                        if (block == nullptr) continue;
                        together.rows[together.count] =
                            block + (id - row * grid_.block_rows) * cols * item_;
                        if (scales != nullptr) together.scales[together.count] = scales[i];
                        ++together.count;
                    }
                    reduce_together(together, scales != nullptr, cols, mode, to + col0, scratch);
                }
                begin = stop;
            }
        }
    }

    template <class T>
    void reduce_together(const Together<T>& together, bool scaled, std::size_t cols, BagMode mode,
                         T* to, detail::Scratch<T>& scratch) const {
        if (together.count == 0) return;
        const KernelTable& table = kernels();
        const T* const scales = scaled ? together.scales : nullptr;
        if (mode == BagMode::sum && sum_in_place(table.rows, together, scales, cols, to)) return;
        const bool same = dtype_ == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64);
        for (std::size_t i = 0; i < together.count; ++i) {
            const T* row = reinterpret_cast<const T*>(together.rows[i]);
            if (!same) {
                T* const wide = scratch.at_least(cols);
                detail::widen(together.rows[i], dtype_, cols, wide, table.gemm);
                row = wide;
            }
            if (mode == BagMode::max) {
                max_row(row, cols, to);
            } else if constexpr (sizeof(T) == 4) {
                table.rows.sum_f32(&row, 1, scaled ? scales + i : nullptr, cols, to);
            } else {
                table.rows.sum_f64(&row, 1, scaled ? scales + i : nullptr, cols, to);
            }
        }
    }

    // Adds up what a kernel reads where it lies; false for other dtypes.
    template <class T>
    [[nodiscard]] bool sum_in_place(const RowsKernels& kernel, const Together<T>& together,
                                    const T* scales, std::size_t cols, T* to) const {
        const auto rows_as = [&]<class W>(const W*) {
            return reinterpret_cast<const W* const*>(together.rows);
        };
        if constexpr (sizeof(T) == 8) {
            if (dtype_ != Dtype::f64) return false;
            kernel.sum_f64(rows_as(static_cast<const double*>(nullptr)), together.count, scales,
                           cols, to);
            return true;
        } else {
            switch (dtype_) {
                case Dtype::f32:
                    kernel.sum_f32(rows_as(static_cast<const float*>(nullptr)), together.count,
                                   scales, cols, to);
                    return true;
                case Dtype::bf16:
                case Dtype::f16:
                    (dtype_ == Dtype::bf16 ? kernel.sum_bf16 : kernel.sum_f16)(
                        rows_as(static_cast<const std::uint16_t*>(nullptr)), together.count, scales,
                        cols, to);
                    return true;
                default:
                    return false;
            }
        }
    }

    const BlockGrid grid_;
    const Dtype dtype_;
    const std::size_t item_;
    const std::size_t grid_cols_;
    std::vector<std::int64_t> page_ids_;    // each once, ascending
    std::vector<std::uint32_t> slots_;      // per block
    std::vector<StoredBlock> bases_;        // per block, pages by number; empty if none is a delta
    std::vector<std::uint32_t> row_pages_;  // per block row: its page, or kSeveral
    std::vector<std::size_t> starts_;       // per page: where its blocks begin in blocks_; the end
    std::vector<std::size_t> blocks_;       // by page
    mutable std::mutex mutex_;              // of what is written below
    mutable std::vector<Known> known_;      // per page
    mutable std::vector<Place> places_;     // per block
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
                    std::span<const std::int64_t> ids, std::byte* out, unsigned threads) const {
    impl_->take(page_ids, pages, ids, out, threads);
}

void RowTable::take(std::span<const std::int64_t> numbers, std::span<const BlockView> views,
                    std::span<const std::int64_t> ids, std::byte* out, unsigned threads) const {
    impl_->take(numbers, views, ids, out, threads);
}

void RowTable::bag(std::span<const std::int64_t> page_ids, std::span<const Page* const> pages,
                   std::span<const std::int64_t> ids, std::span<const std::int64_t> edges,
                   const std::byte* weights, BagMode mode, std::byte* out, unsigned threads) const {
    impl_->bag(page_ids, pages, ids, edges, weights, mode, out, threads);
}

void RowTable::bag(std::span<const std::int64_t> numbers, std::span<const BlockView> views,
                   std::span<const std::int64_t> ids, std::span<const std::int64_t> edges,
                   const std::byte* weights, BagMode mode, std::byte* out, unsigned threads) const {
    impl_->bag(numbers, views, ids, edges, weights, mode, out, threads);
}

}  // namespace pydedup
