// SPDX-License-Identifier: Apache-2.0
// Decodes into scratch only where a block is not raw. Stateless and thread-safe.
#include "pydedup/page_content.hpp"

#include <cstring>
#include <vector>

#include "base/parallel.hpp"
#include "pydedup/error.hpp"
#include "storage/block_rows.hpp"

namespace pydedup {

void block_digests(std::span<const BlockView> blocks, std::span<Digest> digests, unsigned threads) {
    if (digests.size() != blocks.size()) {
        throw Error(ErrorCode::invalid_argument, "one digest per block is needed");
    }
    parallel_for(blocks.size(), 16, thread_count(threads), [&](std::size_t begin, std::size_t end) {
        detail::Scratch<std::byte> scratch;
        for (std::size_t i = begin; i < end; ++i) {
            const BlockView& block = blocks[i];
            digests[i] = hash_rows(detail::rows_of(block, scratch), block.rows, block.row_bytes(),
                                   block.row_bytes());
        }
    });
}

void page_digests(const Page& page, std::span<Digest> digests, unsigned threads) {
    std::vector<BlockView> blocks(page.n_slots());
    for (std::size_t slot = 0; slot < blocks.size(); ++slot) blocks[slot] = page.block(slot);
    block_digests(blocks, digests, threads);
}

bool same_block(const BlockView& a, const BlockView& b) {
    if (a.dtype != b.dtype || a.rows != b.rows || a.cols != b.cols) return false;
    const std::size_t bytes = std::size_t{a.rows} * a.cols * item_bytes(a.dtype);
    detail::Scratch<std::byte> scratch_a;
    detail::Scratch<std::byte> scratch_b;
    return std::memcmp(detail::rows_of(a, scratch_a), detail::rows_of(b, scratch_b), bytes) == 0;
}

}  // namespace pydedup
