// SPDX-License-Identifier: Apache-2.0
// Factors: their numbers; a product of two of them, exact, so in whatever order; and elements that
// such sums move. Included by delta_common-inl.hpp alone, inside the namespace of each instruction
// set (no guard on purpose), behind what is made there of its own instructions: unpack_first(),
// add_products(), add_pairs().

void delta_unpack(const std::uint8_t* from, std::size_t position, unsigned width, std::size_t count,
                  std::int32_t* to) noexcept {
    const unsigned unused = 32 - width;
    const std::size_t first = unpack_first(from, position, width, count, to);
    for (std::size_t i = first; i < count; ++i) {
        const std::size_t at = position + i * width;
        const std::uint64_t word = load_le64(from + at / 8) >> (at % 8);
        to[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) << unused) >> unused;
    }
}

using HalfInts __attribute__((vector_size(kVectorBytes / 2))) = std::int32_t;

struct OfNumbers {
    using Number = double;
    using Vector = Doubles;

    static void add(Vector& sums, const Vector& one, const Vector& other) noexcept {
        add_products(sums, one, other);
    }
    static void store(const Vector& sums, double* to) noexcept {
        __builtin_memcpy(to, &sums, sizeof sums);
    }
};

struct OfPairs {
    using Number = std::int32_t;
    using Vector = Ints;

    static void add(Vector& sums, const Vector& one, const Vector& other) noexcept {
        add_pairs(sums, one, other);
    }
    static void store(const Vector& sums, double* to) noexcept {
        HalfInts halves[2];
        __builtin_memcpy(halves, &sums, sizeof halves);
        for (std::size_t h = 0; h < 2; ++h) {
            const Doubles wide = __builtin_convertvector(halves[h], Doubles);
            __builtin_memcpy(to + h * kVector / 2, &wide, sizeof wide);
        }
    }
};

// Two vectors of columns, whose sums stay in registers, so that what is read serves all rows.
template <class Of>
inline void multiply(const typename Of::Number* of_rows, std::size_t rows,
                     const typename Of::Number* of_cols, std::size_t cols, std::size_t rank,
                     double* sums) noexcept {
    using Vector = typename Of::Vector;
    constexpr std::size_t kLanes = kVectorBytes / sizeof(typename Of::Number);
    static_assert(kProductLanes % (2 * kLanes) == 0);
    for (std::size_t j = 0; j < cols; j += 2 * kLanes) {
        Vector total[kProductRows][2] = {};
        for (std::size_t k = 0; k < rank; ++k) {
            Vector factors[2];
            load_vector(factors[0], of_cols + k * cols + j);
            load_vector(factors[1], of_cols + k * cols + j + kLanes);
#pragma GCC unroll 4
            for (std::size_t r = 0; r < kProductRows; ++r) {
                const Vector number = of_rows[k * rows + r] - Vector{};
                Of::add(total[r][0], number, factors[0]);
                Of::add(total[r][1], number, factors[1]);
            }
        }
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kProductRows; ++r) {
            Of::store(total[r][0], sums + r * cols + j);
            Of::store(total[r][1], sums + r * cols + j + kLanes);
        }
    }
}

void delta_products(const double* of_rows, std::size_t rows, const double* of_cols,
                    std::size_t cols, std::size_t rank, double* sums) noexcept {
    multiply<OfNumbers>(of_rows, rows, of_cols, cols, rank, sums);
}

void delta_pair_products(const std::int32_t* of_rows, std::size_t rows, const std::int32_t* of_cols,
                         std::size_t cols, std::size_t n_pairs, double* sums) noexcept {
    multiply<OfPairs>(of_rows, rows, of_cols, cols, n_pairs, sums);
}

// x + sum * scale. A sum of 0 adds -0, which leaves every x as it is, also -0; what is infinite
// stays.
inline double moved_by(double x, double sum, double scale) noexcept {
    return x + (0.0 - sum) * -scale;
}

// A piece of elements in place: loops of one length, of which compilers make vectors. Of NaN, the
// bits remain.
inline void move_piece(std::uint64_t* words, const double* sums, double scale) noexcept {
    double values[kProductLanes];
    __builtin_memcpy(values, words, sizeof values);
    for (std::size_t i = 0; i < kProductLanes; ++i) {
        values[i] = moved_by(values[i], sums[i], scale);
    }
    std::uint64_t moved[kProductLanes];
    __builtin_memcpy(moved, values, sizeof moved);
    for (std::size_t i = 0; i < kProductLanes; ++i) {
        const bool is_nan = (words[i] & 0x7FFFFFFFFFFFFFFFU) > 0x7FF0000000000000U;
        words[i] = is_nan ? words[i] : moved[i];
    }
}

inline void move_floats(const std::uint32_t* bits, const double* sums, double scale,
                        std::uint32_t* moved) noexcept {
    float values[kProductLanes];
    __builtin_memcpy(values, bits, sizeof values);
    for (std::size_t i = 0; i < kProductLanes; ++i) {
        values[i] = static_cast<float>(moved_by(values[i], sums[i], scale));
    }
    __builtin_memcpy(moved, values, sizeof values);
}

inline bool is_nan(std::uint32_t bits) noexcept { return (bits & 0x7FFFFFFFU) > 0x7F800000U; }

inline void move_piece(std::uint32_t* words, const double* sums, double scale) noexcept {
    std::uint32_t moved[kProductLanes];
    move_floats(words, sums, scale, moved);
    for (std::size_t i = 0; i < kProductLanes; ++i) {
        words[i] = is_nan(words[i]) ? words[i] : moved[i];
    }
}

// Of bf16, the quiet NaN of its sign.
inline void move_piece(std::uint16_t* words, const double* sums, double scale) noexcept {
    std::uint32_t bits[kProductLanes];
    for (std::size_t i = 0; i < kProductLanes; ++i) bits[i] = std::uint32_t{words[i]} << 16;
    std::uint32_t moved[kProductLanes];
    move_floats(bits, sums, scale, moved);
    for (std::size_t i = 0; i < kProductLanes; ++i) {
        const std::uint32_t rounded = moved[i] + 0x7FFFU + (moved[i] >> 16 & 1U);
        const std::uint32_t nan = (bits[i] & 0x80000000U) | 0x7FC00000U;
        words[i] = static_cast<std::uint16_t>((is_nan(bits[i]) ? nan : rounded) >> 16);
    }
}

template <class Word>
inline void move_elements(const std::uint8_t* x, const double* sums, std::size_t count,
                          double scale, std::uint8_t* y) noexcept {
    constexpr std::size_t kBytes = kProductLanes * sizeof(Word);
    Word words[kProductLanes];
    for (; count >= kProductLanes; count -= kProductLanes) {
        __builtin_memcpy(words, x, kBytes);
        move_piece(words, sums, scale);
        __builtin_memcpy(y, words, kBytes);
        x += kBytes;
        y += kBytes;
        sums += kProductLanes;
    }
    if (count == 0) return;
    __builtin_memset(words, 0, kBytes);
    __builtin_memcpy(words, x, count * sizeof(Word));
    move_piece(words, sums, scale);
    __builtin_memcpy(y, words, count * sizeof(Word));
}

void delta_move(const std::uint8_t* x, const double* sums, std::size_t count, DeltaLayout layout,
                double scale, std::uint8_t* y) noexcept {
    switch (layout.item_bytes) {
        case 8:
            return move_elements<std::uint64_t>(x, sums, count, scale, y);
        case 4:
            return move_elements<std::uint32_t>(x, sums, count, scale, y);
        default:
            return move_elements<std::uint16_t>(x, sums, count, scale, y);
    }
}
