// SPDX-License-Identifier: Apache-2.0
// Decodes into scratch only where a block is not raw. Stateless and thread-safe.
#include "pydedup/page_content.hpp"

#include <cstring>
#include <string>
#include <vector>

#include "base/parallel.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

// The block's rows, dense; `scratch` keeps them where they had to be decoded.
const std::byte* content(const BlockView& block, std::vector<std::byte>& scratch) {
    if (block.encoding == Encoding::raw) return block.data;
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    scratch.resize(block.rows * row_bytes);
    decode_block(block, scratch.data(), row_bytes);
    return scratch.data();
}

}  // namespace

void page_digests(const Page& page, const StoredBases& bases, std::span<Digest> digests,
                  unsigned threads) {
    if (digests.size() != page.n_slots()) {
        throw Error(ErrorCode::invalid_argument, "page_digests: one digest per slot is needed");
    }
    if (!bases.bases.empty() && bases.bases.size() != page.n_slots()) {
        throw Error(ErrorCode::invalid_argument,
                    "page_digests: " + std::to_string(bases.bases.size()) +
                        " bases came for a page of " + std::to_string(page.n_slots()) + " slots");
    }
    parallel_for(page.n_slots(), 16, thread_count(threads),
                 [&](std::size_t begin, std::size_t end) {
                     std::vector<std::byte> scratch;
                     for (std::size_t slot = begin; slot < end; ++slot) {
                         BlockView base{};
                         const BlockView block = with_base(page.block(slot), bases, slot, base);
                         const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
                         digests[slot] =
                             hash_rows(content(block, scratch), block.rows, row_bytes, row_bytes);
                     }
                 });
}

bool same_block(const BlockView& a, const BlockView& b) {
    if (a.dtype != b.dtype || a.rows != b.rows || a.cols != b.cols) return false;
    const std::size_t bytes = std::size_t{a.rows} * a.cols * item_bytes(a.dtype);
    std::vector<std::byte> scratch_a;
    std::vector<std::byte> scratch_b;
    return std::memcmp(content(a, scratch_a), content(b, scratch_b), bytes) == 0;
}

}  // namespace pydedup
