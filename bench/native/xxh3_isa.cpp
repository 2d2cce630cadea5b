// SPDX-License-Identifier: Apache-2.0
// XXH3-128 of the xxHash library, compiled with the flags of one instruction set under the name
// PYDEDUP_XXH3_FUNCTION. Everything else of it stays internal to this file.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstddef>
#include <cstdint>

namespace bench {

std::uint64_t PYDEDUP_XXH3_FUNCTION(const void* data, std::size_t bytes);

std::uint64_t PYDEDUP_XXH3_FUNCTION(const void* data, std::size_t bytes) {
    const XXH128_hash_t hash = XXH3_128bits(data, bytes);
    return hash.low64 ^ hash.high64;
}

}  // namespace bench
