// SPDX-License-Identifier: Apache-2.0
// Splitting and merging planes with 128- and 256-bit vectors. Included INSIDE the namespaces of
// avx2 and avx512 (no guard on purpose): twice as wide vectors gain nothing that can be measured
// beside Huffman decoding, which takes most of the time.
//
// A vector holds one or two lanes of 16 bytes, and unpacking works within lanes. So vector j of n
// (n = bytes of an element) takes the 16 bytes of elements number j in its first lane and number
// j + n in its second: then plane p is simply vector p of an n x n transpose within lanes, and a
// step of 16 elements per lane needs no shuffle across lanes.

struct V128 {
    using Type = __m128i;
    static constexpr std::size_t kElements = 16;  // of a step, whatever their size

    static Type load(const std::uint8_t* from) noexcept {
        return _mm_loadu_si128(reinterpret_cast<const Type*>(from));
    }
    static void store(std::uint8_t* to, Type v) noexcept {
        _mm_storeu_si128(reinterpret_cast<Type*>(to), v);
    }
    static Type load_lanes(const std::uint8_t* from, std::size_t) noexcept { return load(from); }
    static void store_lanes(std::uint8_t* to, std::size_t, Type v) noexcept { store(to, v); }
    static Type table(__m128i t) noexcept { return t; }
    static Type shuffle(Type v, Type t) noexcept { return _mm_shuffle_epi8(v, t); }
    static Type lo8(Type a, Type b) noexcept { return _mm_unpacklo_epi8(a, b); }
    static Type hi8(Type a, Type b) noexcept { return _mm_unpackhi_epi8(a, b); }
    static Type lo16(Type a, Type b) noexcept { return _mm_unpacklo_epi16(a, b); }
    static Type hi16(Type a, Type b) noexcept { return _mm_unpackhi_epi16(a, b); }
    static Type lo32(Type a, Type b) noexcept { return _mm_unpacklo_epi32(a, b); }
    static Type hi32(Type a, Type b) noexcept { return _mm_unpackhi_epi32(a, b); }
    static Type lo64(Type a, Type b) noexcept { return _mm_unpacklo_epi64(a, b); }
    static Type hi64(Type a, Type b) noexcept { return _mm_unpackhi_epi64(a, b); }
};

struct V256 {
    using Type = __m256i;
    static constexpr std::size_t kElements = 32;

    static Type load(const std::uint8_t* from) noexcept {
        return _mm256_loadu_si256(reinterpret_cast<const Type*>(from));
    }
    static void store(std::uint8_t* to, Type v) noexcept {
        _mm256_storeu_si256(reinterpret_cast<Type*>(to), v);
    }
    static Type load_lanes(const std::uint8_t* from, std::size_t apart) noexcept {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(V128::load(from)),
                                       V128::load(from + apart), 1);
    }
    static void store_lanes(std::uint8_t* to, std::size_t apart, Type v) noexcept {
        V128::store(to, _mm256_castsi256_si128(v));
        V128::store(to + apart, _mm256_extracti128_si256(v, 1));
    }
    static Type table(__m128i t) noexcept { return _mm256_broadcastsi128_si256(t); }
    static Type shuffle(Type v, Type t) noexcept { return _mm256_shuffle_epi8(v, t); }
    static Type lo8(Type a, Type b) noexcept { return _mm256_unpacklo_epi8(a, b); }
    static Type hi8(Type a, Type b) noexcept { return _mm256_unpackhi_epi8(a, b); }
    static Type lo16(Type a, Type b) noexcept { return _mm256_unpacklo_epi16(a, b); }
    static Type hi16(Type a, Type b) noexcept { return _mm256_unpackhi_epi16(a, b); }
    static Type lo32(Type a, Type b) noexcept { return _mm256_unpacklo_epi32(a, b); }
    static Type hi32(Type a, Type b) noexcept { return _mm256_unpackhi_epi32(a, b); }
    static Type lo64(Type a, Type b) noexcept { return _mm256_unpacklo_epi64(a, b); }
    static Type hi64(Type a, Type b) noexcept { return _mm256_unpackhi_epi64(a, b); }
};

// The words of a vector, rotated by one bit.
template <class Word, class Vector>
inline Vector rotated_left(Vector v) noexcept {
    using Words __attribute__((vector_size(sizeof(Vector)))) = Word;
    const auto words = reinterpret_cast<Words>(v);
    return reinterpret_cast<Vector>((words << 1) | (words >> (8 * sizeof(Word) - 1)));
}

template <class Word, class Vector>
inline Vector rotated_right(Vector v) noexcept {
    using Words __attribute__((vector_size(sizeof(Vector)))) = Word;
    const auto words = reinterpret_cast<Words>(v);
    return reinterpret_cast<Vector>((words >> 1) | (words << (8 * sizeof(Word) - 1)));
}

// One step each: V::kElements elements at `from` to V::kElements bytes of each plane, and back.

template <class V>
void split_step(const std::uint8_t* from, std::uint16_t, bool rotate, std::uint8_t* to,
                std::size_t plane_bytes) noexcept {
    const auto by_plane =
        V::table(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    auto a = V::load_lanes(from, 32);
    auto b = V::load_lanes(from + 16, 32);
    if (rotate) {
        a = rotated_left<std::uint16_t>(a);
        b = rotated_left<std::uint16_t>(b);
    }
    a = V::shuffle(a, by_plane);
    b = V::shuffle(b, by_plane);
    V::store(to, V::lo64(a, b));
    V::store(to + plane_bytes, V::hi64(a, b));
}

template <class V>
void merge_step(const std::uint8_t* const* planes, std::size_t at, std::uint16_t, bool rotate,
                std::uint8_t* to) noexcept {
    const auto a = V::load(planes[0] + at);
    const auto b = V::load(planes[1] + at);
    auto lo = V::lo8(a, b);
    auto hi = V::hi8(a, b);
    if (rotate) {
        lo = rotated_right<std::uint16_t>(lo);
        hi = rotated_right<std::uint16_t>(hi);
    }
    V::store_lanes(to, 32, lo);
    V::store_lanes(to + 16, 32, hi);
}

template <class V>
void split_step(const std::uint8_t* from, std::uint32_t, bool rotate, std::uint8_t* to,
                std::size_t plane_bytes) noexcept {
    const auto by_plane =
        V::table(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    typename V::Type v[4];
    for (std::size_t j = 0; j < 4; ++j) {
        v[j] = V::load_lanes(from + 16 * j, 64);
        if (rotate) v[j] = rotated_left<std::uint32_t>(v[j]);
        v[j] = V::shuffle(v[j], by_plane);
    }
    const auto lo01 = V::lo32(v[0], v[1]);  // planes 0 and 1 of the first half
    const auto hi01 = V::hi32(v[0], v[1]);  // planes 2 and 3
    const auto lo23 = V::lo32(v[2], v[3]);
    const auto hi23 = V::hi32(v[2], v[3]);
    V::store(to, V::lo64(lo01, lo23));
    V::store(to + plane_bytes, V::hi64(lo01, lo23));
    V::store(to + 2 * plane_bytes, V::lo64(hi01, hi23));
    V::store(to + 3 * plane_bytes, V::hi64(hi01, hi23));
}

template <class V>
void merge_step(const std::uint8_t* const* planes, std::size_t at, std::uint32_t, bool rotate,
                std::uint8_t* to) noexcept {
    const auto p0 = V::load(planes[0] + at);
    const auto p1 = V::load(planes[1] + at);
    const auto p2 = V::load(planes[2] + at);
    const auto p3 = V::load(planes[3] + at);
    const auto lo01 = V::lo8(p0, p1);
    const auto hi01 = V::hi8(p0, p1);
    const auto lo23 = V::lo8(p2, p3);
    const auto hi23 = V::hi8(p2, p3);
    typename V::Type v[4] = {V::lo16(lo01, lo23), V::hi16(lo01, lo23), V::lo16(hi01, hi23),
                             V::hi16(hi01, hi23)};
    for (std::size_t j = 0; j < 4; ++j) {
        V::store_lanes(to + 16 * j, 64, rotate ? rotated_right<std::uint32_t>(v[j]) : v[j]);
    }
}

template <class V>
void split_step(const std::uint8_t* from, std::uint64_t, bool rotate, std::uint8_t* to,
                std::size_t plane_bytes) noexcept {
    const auto by_plane =
        V::table(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    typename V::Type v[8];
    for (std::size_t j = 0; j < 8; ++j) {
        v[j] = V::load_lanes(from + 16 * j, 128);
        if (rotate) v[j] = rotated_left<std::uint64_t>(v[j]);
        v[j] = V::shuffle(v[j], by_plane);
    }
    // An 8 x 8 transpose of pairs of bytes: pairs of vectors, of fours, of eights.
    typename V::Type w[8];
    for (std::size_t j = 0; j < 4; ++j) {
        w[j] = V::lo16(v[2 * j], v[2 * j + 1]);      // planes 0 to 3
        w[4 + j] = V::hi16(v[2 * j], v[2 * j + 1]);  // planes 4 to 7
    }
    for (std::size_t half = 0; half < 8; half += 4) {
        const auto lo01 = V::lo32(w[half], w[half + 1]);
        const auto hi01 = V::hi32(w[half], w[half + 1]);
        const auto lo23 = V::lo32(w[half + 2], w[half + 3]);
        const auto hi23 = V::hi32(w[half + 2], w[half + 3]);
        V::store(to + half * plane_bytes, V::lo64(lo01, lo23));
        V::store(to + (half + 1) * plane_bytes, V::hi64(lo01, lo23));
        V::store(to + (half + 2) * plane_bytes, V::lo64(hi01, hi23));
        V::store(to + (half + 3) * plane_bytes, V::hi64(hi01, hi23));
    }
}

template <class V>
void merge_step(const std::uint8_t* const* planes, std::size_t at, std::uint64_t, bool rotate,
                std::uint8_t* to) noexcept {
    typename V::Type lo[4];  // bytes 2k, 2k + 1 of the first half of each lane
    typename V::Type hi[4];
    for (std::size_t k = 0; k < 4; ++k) {
        const auto even = V::load(planes[2 * k] + at);
        const auto odd = V::load(planes[2 * k + 1] + at);
        lo[k] = V::lo8(even, odd);
        hi[k] = V::hi8(even, odd);
    }
    typename V::Type v[8];
    for (std::size_t half = 0; half < 2; ++half) {
        const typename V::Type* w = half == 0 ? lo : hi;
        const auto lo01 = V::lo16(w[0], w[1]);
        const auto hi01 = V::hi16(w[0], w[1]);
        const auto lo23 = V::lo16(w[2], w[3]);
        const auto hi23 = V::hi16(w[2], w[3]);
        v[4 * half] = V::lo32(lo01, lo23);
        v[4 * half + 1] = V::hi32(lo01, lo23);
        v[4 * half + 2] = V::lo32(hi01, hi23);
        v[4 * half + 3] = V::hi32(hi01, hi23);
    }
    for (std::size_t j = 0; j < 8; ++j) {
        V::store_lanes(to + 16 * j, 128, rotate ? rotated_right<std::uint64_t>(v[j]) : v[j]);
    }
}

struct VectorRows {
    template <class Word>
    static void split(const std::uint8_t* elements, std::size_t cols, std::size_t plane_bytes,
                      bool rotate, std::uint8_t* planes) noexcept {
        std::size_t i = 0;
        if constexpr (sizeof(Word) > 1) {
            for (; i + V256::kElements <= cols; i += V256::kElements) {
                split_step<V256>(elements + i * sizeof(Word), Word{}, rotate, planes + i,
                                 plane_bytes);
            }
            if (i + V128::kElements <= cols) {
                split_step<V128>(elements + i * sizeof(Word), Word{}, rotate, planes + i,
                                 plane_bytes);
                i += V128::kElements;
            }
        }
        ScalarRows::split<Word>(elements + i * sizeof(Word), cols - i, plane_bytes, rotate,
                                planes + i);
    }

    template <class Word>
    static void merge(const std::uint8_t* const* planes, std::size_t at, std::size_t cols,
                      bool rotate, std::uint8_t* elements) noexcept {
        std::size_t i = 0;
        if constexpr (sizeof(Word) > 1) {
            for (; i + V256::kElements <= cols; i += V256::kElements) {
                merge_step<V256>(planes, at + i, Word{}, rotate, elements + i * sizeof(Word));
            }
            if (i + V128::kElements <= cols) {
                merge_step<V128>(planes, at + i, Word{}, rotate, elements + i * sizeof(Word));
                i += V128::kElements;
            }
        }
        ScalarRows::merge<Word>(planes, at + i, cols - i, rotate, elements + i * sizeof(Word));
    }
};
