// SPDX-License-Identifier: Apache-2.0
// Delta encodings: round trips of every dtype, error bounds, sizes, and other bases.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/convert.hpp"
#include "codec/delta_pair.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/codec.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

TEST(exact_deltas_of_every_dtype_and_shape_come_back) {
    std::mt19937_64 random(1);
    std::size_t n_smaller = 0;
    for (const Dtype dtype : kDtypes) {
        const std::size_t item = item_bytes(dtype);
        for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{1, 1},
                                         {1, 7},
                                         {3, 5},
                                         {17, 33},
                                         {64, 64},
                                         {1, 4097},
                                         {200, 50},
                                         {700, 3}}) {
            for (int kind = 0; kind < 8; ++kind) {
                const std::size_t stride = cols * item + (kind == 3 ? 24 : 0);
                const Buffer base =
                    kind == 6 ? Buffer(rows * stride, 0) : random_bytes(rows * stride, random);
                Buffer block = base;
                if (kind == 1) {  // any bits at all
                    block = random_bytes(rows * stride, random);
                } else if (kind == 2) {  // a few changes
                    block[random() % block.size()] ^= 1;
                    block[random() % block.size()] ^= 128;
                } else if (kind >= 3) {  // low bits everywhere, or in every third row
                    for (std::size_t r = 0; r < rows; r += kind == 4 ? 3 : 1) {
                        for (std::size_t c = 0; c < cols; ++c) {
                            block[r * stride + c * item] ^=
                                static_cast<std::uint8_t>(random() % (kind == 5 ? 2 : 16));
                        }
                    }
                }
                const Encoded delta = encode({at(block), rows, cols, stride, dtype},
                                             {at(base), rows, cols, stride, dtype});
                if (delta.bytes.empty()) continue;
                ++n_smaller;
                CHECK(delta.encoding == Encoding::delta);
                Buffer dense(rows * cols * item);
                for (std::size_t r = 0; r < rows; ++r) {
                    std::memcpy(&dense[r * cols * item], &base[r * stride], cols * item);
                }
                Buffer back(rows * stride, 0xEE);
                decode_delta(view(delta.bytes, rows, cols, dtype, delta.encoding),
                             view(dense, rows, cols, dtype), at(back), stride);
                for (std::size_t r = 0; r < rows; ++r) {
                    CHECK(std::memcmp(&back[r * stride], &block[r * stride], cols * item) == 0);
                    for (std::size_t b = r * stride + cols * item; b < (r + 1) * stride; ++b) {
                        CHECK(back[b] == 0xEE);
                    }
                }
                const std::size_t estimate =
                    estimate_delta({at(block), rows, cols, stride, dtype},
                                   {at(base), rows, cols, stride, dtype}, std::nullopt);
                CHECK(estimate <= rows * cols * item);
            }
        }
    }
    CHECK(n_smaller > 300);
}

TEST(a_base_of_planes_or_of_another_dtype) {
    std::mt19937_64 random(2);
    const std::size_t rows = 48;
    const std::size_t cols = 64;
    constexpr std::array kFloats = {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16};
    const std::vector<double> values = normal(rows * cols, 0.02, random);
    std::vector<double> moved = values;
    for (double& value : moved) value *= 1.0 + 1e-3 * static_cast<double>(random() % 3);
    for (const Dtype from : kFloats) {
        const Buffer base = as_dtype(values, from);
        Buffer planes(base.size());
        const EncodedBlock packed =
            encode_block(matrix(base, rows, cols, from), true, {at(planes), planes.size()});
        planes.resize(packed.length);
        CHECK(packed.encoding == Encoding::planes);
        for (const Dtype to : kFloats) {
            const Buffer block = as_dtype(moved, to);
            for (const auto bound : {std::optional<double>(), std::optional<double>(0.01)}) {
                const Encoded delta =
                    encode(matrix(block, rows, cols, to), matrix(base, rows, cols, from), bound);
                CHECK(!delta.bytes.empty());
                const Buffer raw = decode(delta, view(base, rows, cols, from), to);
                CHECK(raw == decode(delta, view(planes, rows, cols, from, Encoding::planes), to));
                if (delta.encoding == Encoding::delta) CHECK(raw == block);
            }
        }
    }
}

double relative_error(const std::vector<double>& want, const std::vector<double>& got) {
    double error = 0;
    double norm = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        error += (want[i] - got[i]) * (want[i] - got[i]);
        norm += want[i] * want[i];
    }
    return std::sqrt(error / norm);
}

TEST(quantised_deltas_keep_their_bound_and_zeros) {
    std::mt19937_64 random(3);
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16}) {
        for (const auto& [rows, cols] :
             {std::pair<std::size_t, std::size_t>{1, 3}, {5, 7}, {64, 64}, {1, 5000}}) {
            for (const double bound : {1e-6, 1e-3, 0.05, 0.9}) {
                for (int kind = 0; kind < 4; ++kind) {
                    const std::vector<double> values = normal(rows * cols, 0.02, random);
                    const std::vector<double> noise =
                        normal(rows * cols, kind == 1 ? 0.1 : 2e-4, random);
                    std::vector<double> moved = values;
                    for (std::size_t i = 0; i < moved.size(); ++i) {
                        if (kind != 2 || i / cols % 4 == 0) moved[i] += noise[i];
                        if (kind == 3 && random() % 4 == 0) moved[i] = 0;
                    }
                    const Buffer base = as_dtype(values, dtype);
                    const Buffer block = as_dtype(moved, dtype);
                    const Encoded delta = encode(matrix(block, rows, cols, dtype),
                                                 matrix(base, rows, cols, dtype), bound);
                    if (delta.bytes.empty()) continue;
                    const Buffer back = decode(delta, view(base, rows, cols, dtype), dtype);
                    if (delta.encoding == Encoding::delta) {
                        CHECK(back == block);
                        continue;
                    }
                    const std::vector<double> want = as_doubles(block, dtype);
                    const std::vector<double> got = as_doubles(back, dtype);
                    CHECK(relative_error(want, got) <= bound);
                    for (std::size_t i = 0; i < want.size(); ++i) {
                        CHECK(want[i] != 0 || got[i] == 0);
                    }
                }
            }
        }
    }
}

TEST(what_cannot_be_quantised_is_exact) {
    std::mt19937_64 random(4);
    const std::size_t rows = 32;
    const std::size_t cols = 32;
    const std::vector<double> values = normal(rows * cols, 0.02, random);
    const double inf = std::numeric_limits<double>::infinity();
    for (const double strange : {inf, -inf, std::nan(""), 1e38, 1e-44}) {
        for (const bool in_base : {false, true}) {
            std::vector<double> moved = values;
            for (double& value : moved) value *= 1.0001;
            std::vector<double> from = values;
            (in_base ? from : moved)[77] = strange;
            const Buffer base = as_dtype(from, Dtype::f32);
            const Buffer block = as_dtype(moved, Dtype::f32);
            const Encoded delta = encode(matrix(block, rows, cols, Dtype::f32),
                                         matrix(base, rows, cols, Dtype::f32), 1e-3);
            CHECK(!delta.bytes.empty());
            const Buffer back = decode(delta, view(base, rows, cols, Dtype::f32), Dtype::f32);
            if (delta.encoding == Encoding::delta) {
                CHECK(back == block);
            } else {
                CHECK(relative_error(as_doubles(block, Dtype::f32), as_doubles(back, Dtype::f32)) <=
                      1e-3);
            }
        }
    }
    // A block of zeros has no error to spare.
    const Buffer zeros(rows * cols * 4, 0);
    const Buffer base = as_dtype(values, Dtype::f32);
    const Encoded delta =
        encode(matrix(zeros, rows, cols, Dtype::f32), matrix(base, rows, cols, Dtype::f32), 0.5);
    if (!delta.bytes.empty()) {
        CHECK(decode(delta, view(base, rows, cols, Dtype::f32), Dtype::f32) == zeros);
    }
}

double share(Dtype dtype, double spread, std::optional<double> bound, std::mt19937_64& random) {
    const std::vector<double> values = normal(64 * 64, 0.02, random);
    const std::vector<double> noise = normal(64 * 64, spread, random);
    std::vector<double> moved = values;
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] += noise[i];
    const Buffer base = as_dtype(values, dtype);
    const Buffer block = as_dtype(moved, dtype);
    const Encoded delta = encode(matrix(block, 64, 64, dtype), matrix(base, 64, 64, dtype), bound);
    CHECK(!delta.bytes.empty());
    const double bytes = static_cast<double>(delta.bytes.size());
    const double estimate = static_cast<double>(
        estimate_delta(matrix(block, 64, 64, dtype), matrix(base, 64, 64, dtype), bound));
    CHECK(std::abs(estimate / bytes - 1.0) < 0.15);
    return bytes / static_cast<double>(block.size());
}

TEST(deltas_are_as_small_as_promised) {
    std::mt19937_64 random(5);
    CHECK(share(Dtype::f32, 2e-4, std::nullopt, random) < 0.636);
    CHECK(share(Dtype::bf16, 2e-4, std::nullopt, random) < 0.275);
    CHECK(share(Dtype::f32, 2e-4, 1e-3, random) < 0.13);
}

TEST(of_exact_and_quantised_the_smaller_one_is_taken) {
    std::mt19937_64 random(6);
    const auto encodings = [&](Dtype dtype, double spread, double bound) {
        std::vector<double> values = normal(64 * 64, 0.02, random);
        const Buffer base = as_dtype(values, dtype);
        const std::vector<double> noise = normal(64 * 64, spread, random);
        for (std::size_t i = 0; i < values.size(); ++i) values[i] += noise[i];
        const Buffer block = as_dtype(values, dtype);
        const MatrixRef a = matrix(block, 64, 64, dtype);
        const MatrixRef b = matrix(base, 64, 64, dtype);
        return std::pair(encode(a, b, bound), encode(a, b));
    };
    // Both take more than a quarter of what is raw.
    const auto [loose, all_bits] = encodings(Dtype::f32, 0.1, 1e-4);
    CHECK(loose.encoding == Encoding::quantised);
    CHECK(4 * loose.bytes.size() > 64 * 64 * 4 && loose.bytes.size() < all_bits.bytes.size());
    const auto [narrow, exact] = encodings(Dtype::bf16, 2e-4, 2e-4);
    CHECK(narrow.encoding == Encoding::delta && narrow.bytes == exact.bytes);
}

TEST(what_all_differences_are_multiples_of_costs_nothing) {
    std::mt19937_64 random(7);
    const auto bytes_of = [&](std::uint32_t factor) {
        std::vector<std::uint32_t> base(64 * 64);
        std::vector<std::uint32_t> block(64 * 64);
        for (std::size_t i = 0; i < base.size(); ++i) {
            base[i] = static_cast<std::uint32_t>(random());
            block[i] = base[i] + factor * static_cast<std::uint32_t>(random() % 100'000);
        }
        const auto as_i32 = [](const std::vector<std::uint32_t>& values) {
            return MatrixRef{reinterpret_cast<const std::byte*>(values.data()), 64, 64, 64 * 4,
                             Dtype::i32};
        };
        return static_cast<double>(encode(as_i32(block), as_i32(base)).bytes.size());
    };
    CHECK(bytes_of(1 << 12) < 1.05 * bytes_of(1));
}

TEST(few_changes_cost_few_bytes) {
    std::mt19937_64 random(6);
    const Buffer base = as_dtype(normal(4096, 0.02, random), Dtype::f32);
    const auto bytes_of = [&](const Buffer& block) {
        const Encoded delta =
            encode(matrix(block, 64, 64, Dtype::f32), matrix(base, 64, 64, Dtype::f32));
        CHECK(decode(delta, view(base, 64, 64, Dtype::f32), Dtype::f32) == block);
        return delta.bytes.size();
    };
    CHECK(bytes_of(base) <= 16);
    Buffer one = base;
    one[4 * 1000] ^= 1;
    CHECK(bytes_of(one) <= 24);
    Buffer rows = base;  // three rows of 64 changed by at most a byte
    for (const std::size_t r : {3U, 30U, 63U}) {
        for (std::size_t c = 0; c < 64; ++c)
            rows[(r * 64 + c) * 4] ^= static_cast<std::uint8_t>(random());
    }
    CHECK(bytes_of(rows) <= 3 * 64 + 160);
    Buffer decay = base;  // the same relative change everywhere: a function of the mantissa
    for (std::size_t i = 0; i < 4096; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, &decay[4 * i], 4);
        bits -= 900U + (bits & 0x7FFFFFU) / 0x200000U * 300U;
        std::memcpy(&decay[4 * i], &bits, 4);
    }
    CHECK(bytes_of(decay) <= 500);
}

TEST(estimates_do_not_fall_for_periods) {
    std::mt19937_64 random(11);
    const Buffer base = as_dtype(normal(4096, 0.02, random), Dtype::f32);
    for (const std::size_t period : {2U, 4U, 8U}) {
        for (std::size_t phase = 0; phase < period; ++phase) {
            Buffer block = base;
            for (std::size_t r = phase; r < 64; r += period) {
                for (std::size_t b = 0; b < 2; ++b) {
                    for (std::size_t c = 0; c < 64; ++c) {
                        block[(r * 64 + c) * 4 + b] ^= static_cast<std::uint8_t>(random());
                    }
                }
            }
            const MatrixRef to = matrix(block, 64, 64, Dtype::f32);
            const MatrixRef from = matrix(base, 64, 64, Dtype::f32);
            const auto bytes = static_cast<double>(encode(to, from).bytes.size());
            const auto estimate = static_cast<double>(estimate_delta(to, from, std::nullopt));
            CHECK(estimate > 0.4 * bytes && estimate < 2.0 * bytes);
        }
    }
}

TEST(another_base_is_noticed) {
    std::mt19937_64 random(7);
    const Buffer base = as_dtype(normal(1024, 0.02, random), Dtype::f32);
    Buffer block = base;
    for (std::size_t i = 0; i < block.size(); i += 4) block[i] ^= 3;
    const Encoded delta =
        encode(matrix(block, 32, 32, Dtype::f32), matrix(base, 32, 32, Dtype::f32));
    Buffer other = base;
    other[555] ^= 4;
    Buffer out(block.size());
    const BlockView stored = view(delta.bytes, 32, 32, Dtype::f32, delta.encoding);
    const auto with = [&](const BlockView& from) { decode_delta(stored, from, at(out), 128); };
    CHECK_THROWS(ErrorCode::corrupt_page, with(view(other, 32, 32, Dtype::f32)));
    CHECK_THROWS(ErrorCode::corrupt_page, with(view(base, 16, 64, Dtype::f32)));
    CHECK_THROWS(ErrorCode::corrupt_page, with(view(base, 32, 32, Dtype::u32)));
    CHECK_THROWS(ErrorCode::corrupt_page, with(stored));
    BlockView cut = view(base, 32, 32, Dtype::f32);
    cut.length -= 4;
    CHECK_THROWS(ErrorCode::corrupt_page, with(cut));
    CHECK_THROWS(ErrorCode::corrupt_page, decode_block(stored, at(out), 128));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 decode_delta(stored, view(base, 32, 32, Dtype::f32), at(out), 127));
    BlockView as_raw = stored;
    as_raw.encoding = Encoding::raw;
    CHECK_THROWS(ErrorCode::corrupt_page,
                 decode_delta(as_raw, view(base, 32, 32, Dtype::f32), at(out), 128));
}

// Who wrote into a base while a delta was made of it made the encoder write behind its results.
TEST(a_base_that_changes_meanwhile_is_looked_at_once) {
    std::mt19937_64 random(8);
    for (const Dtype of_block : {Dtype::f32, Dtype::bf16}) {
        constexpr std::size_t kRows = 16;
        constexpr std::size_t kCols = 64;
        const Buffer block = as_dtype(normal(kRows * kCols, 1.0, random), of_block);
        Buffer base = as_dtype(normal(kRows * kCols, 1.0, random), Dtype::f32);
        Buffer before(base.size());
        detail::convert_floats(base.data(), Dtype::f32, kRows * kCols, before.data(), of_block);
        before.resize(block.size());
        const detail::PairOf both({at(block), kRows, kCols, kCols * item_bytes(of_block), of_block},
                                  {at(base), kRows, kCols, kCols * 4, Dtype::f32});
        std::memset(base.data(), 0xFF, base.size());
        CHECK(std::memcmp(both.pair.base, before.data(), before.size()) == 0);
    }
}

TEST(arguments_are_checked) {
    const Buffer zeros(4096, 0);
    Buffer out(4096);
    const std::span<std::byte> room(at(out), out.size());
    const MatrixRef f32 = matrix(zeros, 32, 32, Dtype::f32);
    const auto refused = [&](const MatrixRef& block, const MatrixRef& base,
                             std::optional<double> bound) {
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(encode_delta(block, base, bound, room)));
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(estimate_delta(block, base, bound)));
    };
    refused(f32, matrix(zeros, 16, 64, Dtype::f32), std::nullopt);
    refused(f32, matrix(zeros, 32, 32, Dtype::u32), std::nullopt);
    refused(matrix(zeros, 32, 32, Dtype::f8_e4m3), f32, std::nullopt);
    refused({at(zeros), 0, 32, 128, Dtype::f32}, {at(zeros), 0, 32, 128, Dtype::f32}, std::nullopt);
    for (const double bound : {0.0, -1.0, 1.0, std::nan("")}) refused(f32, f32, bound);
    // A limit that is too small is no error.
    CHECK(!encode_delta(f32, f32, std::nullopt, room.first(3)).has_value());
    CHECK(encode_delta(f32, f32, std::nullopt, room.first(16)).has_value());
}

}  // namespace

PYDEDUP_TEST_MAIN
