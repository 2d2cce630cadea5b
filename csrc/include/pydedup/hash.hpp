// SPDX-License-Identifier: Apache-2.0
// 128-bit block hash, version 1. The same digest from every kernel, on every machine.
// Not cryptographic: equality is never trusted alone, bytes are compared before sharing.
#pragma once

#include <span>

#include "pydedup/types.hpp"

namespace pydedup {

/// Version of the digest: persisted with a store, changed when any digest would change.
inline constexpr int kHashVersion = 1;

/// Digest of rows x row_bytes bytes that lie `stride_bytes` apart. The stride has no influence on
/// the digest; the shape has.
[[nodiscard]] Digest hash_rows(const std::byte* data, std::size_t rows, std::size_t row_bytes,
                               std::size_t stride_bytes, std::uint64_t seed = 0);

/// Digest of contiguous bytes (one row).
[[nodiscard]] Digest hash_bytes(Bytes bytes, std::uint64_t seed = 0);

/// Digests of all blocks of a matrix, row-major over the grid, without copying a block.
/// `out.size()` is grid.count(). `threads` 0 means one per core for large inputs.
void hash_blocks(const MatrixRef& matrix, const BlockGrid& grid, std::uint64_t seed,
                 std::span<Digest> out, unsigned threads = 0);

}  // namespace pydedup
