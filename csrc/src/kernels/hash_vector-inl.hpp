// SPDX-License-Identifier: Apache-2.0
// What the vector kernels share: walking rows. Included INSIDE the namespace of an instruction set
// (no guard on purpose), after HashState and hash_start, hash_stripe, hash_scramble and
// hash_finish were defined for its registers; and hash_tail, where loads can be masked. As many
// stripes of a group as kHashUnroll are code of their own: GCC adds up all of these at the end,
// which with 16 registers it does from memory.

using Keys = const std::uint64_t (*)[kLanes];

// How far ahead memory is asked for what lies in one piece: beyond the next page of 4 KiB, at whose
// ends the hardware's prefetchers stop.
constexpr std::size_t kHashAheadBytes = 8192;
// A single piece of up to so many bytes is not asked for: it was just read or written, mostly, and
// of what is in cache already asking costs a tenth (Zen 4: 57 instead of 64 GB/s).
constexpr std::size_t kHashCachedBytes = std::size_t{1} << 20;
// The same for rows of a matrix, which may lie far apart.
constexpr std::size_t kHashRowsAhead = 2;

inline void ask_for_stripe(const std::uint8_t* data) noexcept {
    for (std::size_t line = 0; line < kStripeBytes; line += 64) __builtin_prefetch(data + line);
}

// The stripe of the last `left` bytes of a row. A hash_tail that is no template goes before it.
template <class State>
inline void hash_tail(const std::uint8_t* data, std::size_t left, const std::uint64_t* key,
                      State& state) noexcept {
    alignas(64) std::uint8_t padded[kStripeBytes] = {};
    __builtin_memcpy(padded, data, left);
    hash_stripe(padded, key, state);
}

template <bool kAsks>
inline void hash_group(const std::uint8_t* data, Keys keys, HashState& state) noexcept {
#pragma GCC unroll kHashUnroll
    for (std::size_t s = 0; s < kGroupStripes; ++s) {
        if constexpr (kAsks) ask_for_stripe(data + s * kStripeBytes + kHashAheadBytes);
        hash_stripe(data + s * kStripeBytes, keys[s], state);
    }
    hash_scramble(state);
}

// Stripes one behind the other, from `data` to `end`.
template <bool kAsks>
inline HashState hash_stripes(const std::uint8_t* data, const std::uint8_t* end, Keys keys,
                              HashState state) noexcept {
    for (; static_cast<std::size_t>(end - data) >= kGroupStripes * kStripeBytes;
         data += kGroupStripes * kStripeBytes) {
        hash_group<kAsks>(data, keys, state);
    }
    for (std::size_t s = 0; data != end; ++s, data += kStripeBytes) {
        hash_stripe(data, keys[s], state);
    }
    return state;
}

// One row of a block; returns the number of the next stripe in its group. What comes `ahead` bytes
// later is asked for.
inline std::size_t hash_row(const std::uint8_t* row, std::size_t row_bytes, std::size_t ahead,
                            Keys keys, std::size_t stripe, HashState& state) noexcept {
    std::size_t at = 0;
    for (; row_bytes - at >= kStripeBytes; at += kStripeBytes) {
        ask_for_stripe(row + at + ahead);
        hash_stripe(row + at, keys[stripe], state);
        if (++stripe == kGroupStripes) {
            hash_scramble(state);
            stripe = 0;
        }
    }
    if (at != row_bytes) {
        hash_tail(row + at, row_bytes - at, keys[stripe], state);
        if (++stripe == kGroupStripes) {
            hash_scramble(state);
            stripe = 0;
        }
    }
    return stripe;
}

void hash_rows(const std::uint8_t* data, std::size_t rows, std::size_t row_bytes,
               std::size_t stride_bytes, std::uint64_t seed, std::uint64_t* out) noexcept {
    std::uint64_t storage[kGroupStripes][kLanes];
    const Keys keys = seeded_keys(seed, storage);
    HashState state;
    hash_start(state);
    // Dense rows of whole stripes are one long row to the stripes.
    if (row_bytes % kStripeBytes == 0 && (stride_bytes == row_bytes || rows == 1)) {
        const std::uint8_t* end = data + rows * row_bytes;
        if (stride_bytes == 0 && row_bytes <= kHashCachedBytes) {
            state = hash_stripes<false>(data, end, keys, state);
        } else {
            state = hash_stripes<true>(data, end, keys, state);
        }
    } else {
        std::size_t stripe = 0;
        const std::size_t ahead =
            stride_bytes == row_bytes ? kHashAheadBytes : kHashRowsAhead * stride_bytes;
        for (std::size_t r = 0; r < rows; ++r) {
            stripe = hash_row(data + r * stride_bytes, row_bytes, ahead, keys, stripe, state);
        }
    }
    hash_finish(state, rows, row_bytes, seed, out);
}

// Blocks side by side are hashed row by row, all at once: memory is read in its own order, which
// the hardware prefetches. Their states stay in the first-level cache.
void hash_panel(const std::uint8_t* data, std::size_t blocks, std::size_t rows,
                std::size_t row_bytes, std::size_t stride_bytes, std::uint64_t seed,
                std::uint64_t* out) noexcept {
    std::uint64_t storage[kGroupStripes][kLanes];
    const Keys keys = seeded_keys(seed, storage);
    HashState states[kPanelBlocks];
    for (std::size_t b = 0; b < blocks; ++b) hash_start(states[b]);
    std::size_t stripe = 0;
    const std::size_t ahead = kHashRowsAhead * stride_bytes;
    for (std::size_t r = 0; r < rows; ++r) {
        const std::uint8_t* row = data + r * stride_bytes;
        std::size_t next = stripe;
        for (std::size_t b = 0; b < blocks; ++b) {
            HashState state = states[b];
            next = hash_row(row + b * row_bytes, row_bytes, ahead, keys, stripe, state);
            states[b] = state;
        }
        stripe = next;
    }
    for (std::size_t b = 0; b < blocks; ++b) {
        hash_finish(states[b], rows, row_bytes, seed, out + 2 * b);
    }
}
