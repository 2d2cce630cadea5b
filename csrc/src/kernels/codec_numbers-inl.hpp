// SPDX-License-Identifier: Apache-2.0
// Numbers of 1 to 24 bits each, eight at a time: as many bytes as one has bits. Included INSIDE the
// namespaces of avx2 and avx512 (no guard on purpose), before delta_common-inl.hpp.

// Four numbers that begin in the first of 16 bytes: where the bytes of each are, and how far its
// last bit is from the top of them.
struct FourNumbers {
    std::size_t byte;
    __m128i bytes;
    __m128i above;

    FourNumbers(std::size_t position, unsigned width) noexcept : byte(position / 8) {
        const __m128i first = _mm_add_epi32(
            _mm_set1_epi32(static_cast<int>(position % 8)),
            _mm_mullo_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(static_cast<int>(width))));
        bytes = _mm_add_epi32(_mm_mullo_epi32(_mm_srli_epi32(first, 3), _mm_set1_epi32(0x01010101)),
                              _mm_set1_epi32(0x03020100));
        above = _mm_sub_epi32(_mm_set1_epi32(static_cast<int>(32 - width)),
                              _mm_and_si128(first, _mm_set1_epi32(7)));
    }
};

// How many of the first numbers were unpacked.
inline std::size_t unpack_first(const std::uint8_t* from, std::size_t position, unsigned width,
                                std::size_t count, std::int32_t* to) noexcept {
    const FourNumbers low(position, width);
    const FourNumbers high(position + 4 * std::size_t{width}, width);
    const __m256i bytes = _mm256_setr_m128i(low.bytes, high.bytes);
    const __m256i above = _mm256_setr_m128i(low.above, high.above);
    const __m128i unused = _mm_cvtsi32_si128(static_cast<int>(32 - width));
    const auto load = [](const std::uint8_t* at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    };
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8, from += width) {
        const __m256i both = _mm256_setr_m128i(load(from + low.byte), load(from + high.byte));
        const __m256i top = _mm256_sllv_epi32(_mm256_shuffle_epi8(both, bytes), above);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_sra_epi32(top, unused));
    }
    return i;
}
