// SPDX-License-Identifier: Apache-2.0
// What bench_hash.cpp has in cache, with XXH3-128 of the xxHash library, compiled for the
// instruction set of the kernel that pydedup uses.
#include <cstdint>
#include <memory>
#include <vector>

#include "harness.hpp"
#include "hash_pieces.hpp"
#include "pydedup/cpu.hpp"

namespace bench {

#if defined(PYDEDUP_BENCH_XXH3)

std::uint64_t xxh3_plain(const void* data, std::size_t bytes);
#if defined(__x86_64__)
std::uint64_t xxh3_avx2(const void* data, std::size_t bytes);
std::uint64_t xxh3_avx512(const void* data, std::size_t bytes);
#endif

namespace {

using Function = std::uint64_t (*)(const void*, std::size_t);

Function xxh3_like(const std::string& kernel) {
#if defined(__x86_64__)
    if (kernel.starts_with("avx512")) return xxh3_avx512;
    if (kernel.starts_with("avx2")) return xxh3_avx2;
#endif
    static_cast<void>(kernel);
    return xxh3_plain;  // SSE2 on x86-64, NEON on AArch64
}

}  // namespace

std::vector<Entry> xxh3_entries() {
    std::vector<Entry> entries;
    for (const HashPiece& piece : kHashPieces) {
        const std::string name = std::string("xxh3.cached-") + piece.name;
        entries.push_back({name, [name, piece] {
                               auto data = piece_bytes(piece);
                               const Function hash = xxh3_like(pydedup::active_kernel());
                               return Workload{
                                   name,
                                   std::string("XXH3-128, ") + piece.what,
                                   static_cast<double>(piece.bytes),
                                   0,
                                   1,
                                   [=] { keep(hash(piece_start(*data, piece), piece.bytes)); }};
                           }});
    }
    return entries;
}

#else

std::vector<Entry> xxh3_entries() { return {}; }

#endif

}  // namespace bench
