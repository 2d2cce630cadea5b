// SPDX-License-Identifier: Apache-2.0
// The hash, version 1: what all kernels share. Included INSIDE the namespace of each instruction
// set (no guard on purpose), so that every copy has internal linkage.
//
// A block is a sequence of stripes of 128 bytes, 16 lanes of 64 bits: each row gives its full
// stripes and, where bytes are left, one more padded with zeros (rows never share a stripe, so the
// stride of the source has no influence). For stripe number s, counted over the block, and lane i
// with data d and key k = key[s % 8][i] (plus the seed on even lanes, minus it on odd ones):
//
//     product[i] += lo32(d ^ k) * hi32(d ^ k)      a keyed product, as in NH (UMAC, RFC 4418)
//     sum[i]     += d                              keeps d alive where a factor is 0
//
// After every 8th stripe product[i] += sum[i ^ 1], sum[i] = 0, and product[i] is scrambled (shift,
// key, multiply), so that the order of groups matters; within a group the keys see to that. At the
// end the sums are added in once more, and two differently keyed folds of 64x64 -> 128 bit
// products, the shape mixed in, give the two halves.
//
// Additions commute, so lanes may be processed in any width: kernels agree by construction.

constexpr std::size_t kStripeBytes = 128;
constexpr std::size_t kLanes = 16;
constexpr std::size_t kGroupStripes = 8;
constexpr std::uint64_t kScrambleFactor = 0x9E3779B1U;  // prime below 2^32 near 2^32 / golden ratio

constexpr std::uint64_t mix_constant(std::uint64_t index) noexcept {
    // SplitMix64 (Steele, Lea, Flood 2014), a bijection of the counter: distinct keys.
    std::uint64_t z = (index + 1) * 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
}

struct HashKeys {
    alignas(64) std::uint64_t stripe[kGroupStripes][kLanes];
    alignas(64) std::uint64_t scramble[kLanes];
    alignas(64) std::uint64_t start[kLanes];
    alignas(64) std::uint64_t fold[2][kLanes];
};

constexpr HashKeys make_hash_keys() noexcept {
    HashKeys keys{};
    std::uint64_t counter = 0;
    for (std::size_t s = 0; s < kGroupStripes; ++s) {
        for (std::size_t i = 0; i < kLanes; ++i) keys.stripe[s][i] = mix_constant(counter++);
    }
    for (std::size_t i = 0; i < kLanes; ++i) keys.scramble[i] = mix_constant(counter++);
    for (std::size_t i = 0; i < kLanes; ++i) keys.start[i] = mix_constant(counter++);
    for (std::size_t h = 0; h < 2; ++h) {
        for (std::size_t i = 0; i < kLanes; ++i) keys.fold[h][i] = mix_constant(counter++);
    }
    return keys;
}

constexpr HashKeys kHashKeys = make_hash_keys();

// The keys of a call: the constant ones, or a seeded copy in `storage`.
inline const std::uint64_t (*seeded_keys(std::uint64_t seed,
                                         std::uint64_t (*storage)[kLanes]) noexcept)[kLanes] {
    if (seed == 0) return kHashKeys.stripe;
    // Two lanes at a time, by hand: from a loop with a condition GCC 12 makes 200 shuffles.
    typedef std::uint64_t Pair __attribute__((vector_size(16)));
    const Pair change = {seed, 0 - seed};
    for (std::size_t s = 0; s < kGroupStripes; ++s) {
        for (std::size_t i = 0; i < kLanes; i += 2) {
            Pair key;
            __builtin_memcpy(&key, &kHashKeys.stripe[s][i], sizeof key);
            key += change;
            __builtin_memcpy(&storage[s][i], &key, sizeof key);
        }
    }
    return storage;
}

inline std::uint64_t fold_multiply(std::uint64_t a, std::uint64_t b) noexcept {
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t avalanche(std::uint64_t x) noexcept {
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ULL;
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93ULL;
    return x ^ (x >> 32);
}

// The last step: `keyed[h]` are the lanes, each product with its neighbour's sum added in,
// exclusive or fold[h].
inline void fold_lanes(const std::uint64_t (*keyed)[kLanes], std::size_t rows,
                       std::size_t row_bytes, std::uint64_t seed, std::uint64_t* out) noexcept {
    for (std::size_t h = 0; h < 2; ++h) {
        const std::uint64_t* key = kHashKeys.fold[h];
        std::uint64_t folded = fold_multiply(rows + key[0], row_bytes + key[1]) + (seed ^ key[2]);
        for (std::size_t i = 0; i < kLanes; i += 2) {
            // Rotating between additions makes the pairs of lanes not interchangeable.
            folded =
                ((folded << 23) | (folded >> 41)) + fold_multiply(keyed[h][i], keyed[h][i + 1]);
        }
        out[h] = avalanche(folded);
    }
}

inline void finish_hash(const std::uint64_t* product, const std::uint64_t* sum, std::size_t rows,
                        std::size_t row_bytes, std::uint64_t seed, std::uint64_t* out) noexcept {
    std::uint64_t keyed[2][kLanes];
    for (std::size_t h = 0; h < 2; ++h) {
        for (std::size_t i = 0; i < kLanes; ++i) {
            keyed[h][i] = (product[i] + sum[i ^ 1]) ^ kHashKeys.fold[h][i];
        }
    }
    fold_lanes(keyed, rows, row_bytes, seed, out);
}
