// SPDX-License-Identifier: Apache-2.0
// What the blocks of a page hold, whatever their encoding: digests and comparison. For those who
// check a store, not for those who serve from it.
#pragma once

#include <span>

#include "pydedup/hash.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup {

/// digests[i] = hash of the decoded content of slot i, as hash_blocks() gives for the source.
/// `digests.size()` is page.n_slots(), and so is `bases.bases.size()` for a page with deltas.
/// Throws Error{corrupt_page} when a block does not decode.
void page_digests(const Page& page, const StoredBases& bases, std::span<Digest> digests,
                  unsigned threads = 0);

/// Whether two stored blocks, deltas with their bases, have the same dtype, shape and decoded
/// bytes.
[[nodiscard]] bool same_block(const BlockView& a, const BlockView& b);

}  // namespace pydedup
