// SPDX-License-Identifier: Apache-2.0
// Quantised differences of floats, and floats from them; one element and whole vectors give the
// same bits. Included by delta_common-inl.hpp alone, inside the namespace of each instruction set
// (no guard on purpose).

template <class Float>
struct FloatTraits;
template <>
struct FloatTraits<float> {
    using Word = std::uint32_t;
    static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct FloatTraits<double> {
    using Word = std::uint64_t;
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

template <class Float>
inline std::uint32_t sign_of(Float value) noexcept {
    using Word = typename FloatTraits<Float>::Word;
    Word bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint32_t>(sign_mask(bits));
}

// One element, as the decoder will see it. Returns its error.
template <class Float, bool kStore>
inline double quantise_one(Float y, Float x, Float step, Float scale, std::uint32_t* z,
                           bool& good) noexcept {
    constexpr Float kRound = FloatTraits<Float>::kRound;
    const Float r = (y - x) * scale;
    const bool within = (r < Float{0} ? -r : r) <= static_cast<Float>(kMaxQuantum);  // not NaN
    good &= within;
    const Float q = (r + kRound) - kRound;
    const Float moved = x + q * step;
    const Float back = q == Float{0} ? x : moved;
    if (kStore) {
        auto whole = static_cast<std::uint32_t>(static_cast<std::int32_t>(within ? q : Float{0}));
        if (y == Float{0} && back != Float{0}) whole = static_cast<std::uint32_t>(kZeroMark);
        *z = zigzag(negate_where(whole, sign_of(x)));
    }
    return static_cast<double>(y - back);
}

// A vector of elements; adds the squares of their errors to two vectors of sums.
template <bool kStore>
inline void quantise_vector(const float* y, const float* x, float step, float scale,
                            std::uint32_t* z, Doubles* sums, Words& within) noexcept {
    Floats from;
    Floats to;
    load_vector(from, x);
    load_vector(to, y);
    const Floats r = (to - from) * scale;
    const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Words>(r) & 0x7FFFFFFFU);
    const Words fits = reinterpret_cast<Words>(size <= static_cast<float>(kMaxQuantum));
    within &= fits;
    const Floats q = (r + FloatTraits<float>::kRound) - FloatTraits<float>::kRound;
    const Words still = reinterpret_cast<Words>(q == 0.0F);
    const Words moved = reinterpret_cast<Words>(from + q * step);
    const Floats back =
        reinterpret_cast<Floats>((still & reinterpret_cast<Words>(from)) | (~still & moved));
    const Floats error = to - back;
    HalfFloats halves[2];
    __builtin_memcpy(halves, &error, sizeof halves);
    for (std::size_t h = 0; h < 2; ++h) {
        const Doubles wide = __builtin_convertvector(halves[h], Doubles);
        sums[h] += wide * wide;
    }
    if (kStore) {
        const Floats held = reinterpret_cast<Floats>(reinterpret_cast<Words>(q) & fits);
        const Words whole = reinterpret_cast<Words>(__builtin_convertvector(held, Ints));
        const Words lost =
            reinterpret_cast<Words>(to == 0.0F) & reinterpret_cast<Words>(back != 0.0F);
        const Words marked = (lost & static_cast<std::uint32_t>(kZeroMark)) | (~lost & whole);
        const Words sign = reinterpret_cast<Words>(reinterpret_cast<Ints>(from) >> 31);
        const Words folded = (marked ^ sign) - sign;
        const Words top = reinterpret_cast<Words>(reinterpret_cast<Ints>(folded) >> 31);
        const Words result = (folded << 1) ^ top;
        __builtin_memcpy(z, &result, sizeof result);
    }
}

template <bool kStore>
inline std::size_t quantise_vectors(const float* y, const float* x, std::size_t count, float step,
                                    float scale, std::uint32_t* z, double* sums,
                                    bool& good) noexcept {
    constexpr std::size_t kVectors = kErrorLanes / kVector;
    Words within = ~Words{};
    Doubles lanes[2 * kVectors] = {};
    std::size_t i = 0;
    for (; i + kErrorLanes <= count; i += kErrorLanes) {
#pragma GCC unroll 4
        for (std::size_t v = 0; v < kVectors; ++v) {
            const std::size_t at = i + v * kVector;
            quantise_vector<kStore>(y + at, x + at, step, scale, kStore ? z + at : nullptr,
                                    lanes + 2 * v, within);
        }
    }
    __builtin_memcpy(sums, lanes, sizeof lanes);
    for (std::size_t k = 0; k < kVector; ++k) good &= within[k] != 0;
    return i;
}

template <bool kStore>
inline std::size_t quantise_vectors(const double* y, const double* x, std::size_t count,
                                    double step, double scale, std::uint32_t* z, double* sums,
                                    bool& good) noexcept {
    std::size_t i = 0;
    for (; i + kErrorLanes <= count; i += kErrorLanes) {
        for (std::size_t k = 0; k < kErrorLanes; ++k) {
            const double error = quantise_one<double, kStore>(y[i + k], x[i + k], step, scale,
                                                              kStore ? z + i + k : nullptr, good);
            sums[k] += error * error;
        }
    }
    return i;
}

template <class Float, bool kStore>
inline bool quantise_as(const Float* y, const Float* x, std::size_t count, Float step,
                        std::uint32_t* z, double* lanes) noexcept {
    static_assert(kErrorLanes % kVector == 0);
    const Float scale = Float{1} / step;
    double sums[kErrorLanes] = {};
    bool good = true;
    std::size_t i = quantise_vectors<kStore>(y, x, count, step, scale, z, sums, good);
    for (std::size_t k = 0; i < count; ++i, ++k) {
        const double error =
            quantise_one<Float, kStore>(y[i], x[i], step, scale, kStore ? z + i : nullptr, good);
        sums[k] += error * error;
    }
    for (std::size_t k = 0; k < kErrorLanes; ++k) lanes[k] = sums[k];
    return good;
}

bool delta_quantise(const void* y, const void* x, std::size_t count, bool wide, double step,
                    std::uint32_t* z, double* lanes) noexcept {
    if (wide) {
        const auto* const to = static_cast<const double*>(y);
        const auto* const from = static_cast<const double*>(x);
        return z != nullptr ? quantise_as<double, true>(to, from, count, step, z, lanes)
                            : quantise_as<double, false>(to, from, count, step, z, lanes);
    }
    const auto* const to = static_cast<const float*>(y);
    const auto* const from = static_cast<const float*>(x);
    const auto narrow = static_cast<float>(step);
    return z != nullptr ? quantise_as<float, true>(to, from, count, narrow, z, lanes)
                        : quantise_as<float, false>(to, from, count, narrow, z, lanes);
}

inline std::size_t dequantise_vectors(const float* x, const std::uint32_t* z, std::size_t count,
                                      float step, float* values) noexcept {
    std::size_t i = 0;
    for (; i + kVector <= count; i += kVector) {
        Floats from;
        Words v;
        load_vector(from, x + i);
        load_vector(v, z + i);
        const Words whole = (v >> 1) ^ (0U - (v & 1U));
        const Words sign = reinterpret_cast<Words>(reinterpret_cast<Ints>(from) >> 31);
        const Words q = (whole ^ sign) - sign;
        const Floats size = __builtin_convertvector(reinterpret_cast<Ints>(q), Floats);
        const Words moved = reinterpret_cast<Words>(from + size * step);
        const Words still = reinterpret_cast<Words>(q == 0U);
        const Words value = (still & reinterpret_cast<Words>(from)) | (~still & moved);
        const Words kept = reinterpret_cast<Words>(q != static_cast<std::uint32_t>(kZeroMark));
        const Words result = value & kept;
        __builtin_memcpy(values + i, &result, sizeof result);
    }
    return i;
}

inline std::size_t dequantise_vectors(const double*, const std::uint32_t*, std::size_t, double,
                                      double*) noexcept {
    return 0;
}

template <class Float>
inline void dequantise_as(const Float* x, const std::uint32_t* z, std::size_t count, Float step,
                          Float* values) noexcept {
    for (std::size_t i = dequantise_vectors(x, z, count, step, values); i < count; ++i) {
        const auto q = static_cast<std::int32_t>(negate_where(unzigzag(z[i]), sign_of(x[i])));
        const Float moved = x[i] + static_cast<Float>(q) * step;
        const Float value = q == 0 ? x[i] : moved;
        values[i] = q == kZeroMark ? Float{0} : value;
    }
}

void delta_dequantise(const void* x, const std::uint32_t* z, std::size_t count, bool wide,
                      double step, void* values) noexcept {
    if (wide) {
        dequantise_as(static_cast<const double*>(x), z, count, step, static_cast<double*>(values));
    } else {
        dequantise_as(static_cast<const float*>(x), z, count, static_cast<float>(step),
                      static_cast<float*>(values));
    }
}
