// SPDX-License-Identifier: Apache-2.0
// What the blocks of a page hold, whatever their encoding: digests and comparison. For those who
// check a store, not for those who serve from it.
#pragma once

#include <span>

#include "pydedup/hash.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {

/// digests[i] = hash of the decoded content of a block, as hash_blocks() gives for the source;
/// deltas come with their bases. `digests.size()` is blocks.size(). Throws Error{corrupt_page} when
/// a block does not decode.
void block_digests(std::span<const BlockView> blocks, std::span<Digest> digests,
                   unsigned threads = 0);

/// The same for each slot of a page without deltas. `digests.size()` is page.n_slots().
void page_digests(const Page& page, std::span<Digest> digests, unsigned threads = 0);

/// Whether two stored blocks, deltas with their bases, have the same dtype, shape and decoded
/// bytes.
[[nodiscard]] bool same_block(const BlockView& a, const BlockView& b);

}  // namespace pydedup
