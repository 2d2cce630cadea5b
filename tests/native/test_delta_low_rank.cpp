// SPDX-License-Identifier: Apache-2.0
// Deltas on bases that factors moved: the sum is the same as in integers, blocks come back, pages
// have a factor of several blocks once, and what docs/format.md does not allow is refused.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "check.hpp"
#include "codec/delta_encoder.hpp"
#include "codec/low_rank.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/error.hpp"
#include "pydedup/page_format.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::array kFloats = {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr std::int32_t kLargest = (1 << 23) - 1;
constexpr std::size_t kHead = 12;      // bytes before those of version 3
constexpr std::size_t kFactorsAt = 4;  // from there: a dtype, a rank and an exponent

struct Factors {
    unsigned rank;
    int exponent;
    std::vector<std::int32_t> of_rows, of_cols;

    [[nodiscard]] detail::LowRank view() const { return {rank, exponent, of_rows, of_cols}; }
};

Factors random_factors(std::size_t rows, std::size_t cols, unsigned rank, std::int32_t largest,
                       int exponent, std::mt19937_64& random) {
    std::uniform_int_distribution<std::int32_t> draw(-largest, largest);
    Factors factors{rank, exponent, std::vector<std::int32_t>(rank * rows),
                    std::vector<std::int32_t>(rank * cols)};
    for (std::int32_t& number : factors.of_rows) number = draw(random);
    for (std::int32_t& number : factors.of_cols) number = draw(random);
    return factors;
}

Buffer moved_by(const Factors& factors, const Buffer& base, std::size_t rows, std::size_t cols,
                Dtype dtype) {
    Buffer moved(base.size());
    detail::add_low_rank(factors.view(), base.data(), rows, cols, dtype, moved.data());
    return moved;
}

// One element as docs/format.md says it.
Buffer moved_element(const Buffer& x, std::int64_t sum, int exponent, Dtype dtype) {
    const double value = as_doubles(x, dtype)[0];
    if (std::isnan(value)) return as_dtype({value}, dtype);
    if (sum == 0 || std::isinf(value)) return x;
    const double moved = value + std::ldexp(static_cast<double>(sum), exponent);
    if (dtype == Dtype::f64) return as_dtype({moved}, dtype);
    return as_dtype({static_cast<double>(static_cast<float>(moved))}, dtype);
}

// Numbers of every kind, or weights.
Buffer elements(std::size_t count, bool any, Dtype dtype, std::mt19937_64& random) {
    if (any) return random_bytes(count * item_bytes(dtype), random);
    Buffer weights = as_dtype(normal(count, 0.02, random), dtype);
    const std::vector<double> odd = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-310, 65504, 3e38};
    const Buffer some = as_dtype(odd, dtype);
    for (std::size_t i = 0; i < odd.size() && 3 * i < count; ++i) {
        std::memcpy(&weights[3 * i * item_bytes(dtype)], &some[i * item_bytes(dtype)],
                    item_bytes(dtype));
    }
    return weights;
}

TEST(a_moved_base_is_the_sum_in_integers) {
    std::mt19937_64 random(1);
    for (const Dtype dtype : kFloats) {
        const std::size_t item = item_bytes(dtype);
        for (const auto& [rows, cols] :
             {std::pair<std::size_t, std::size_t>{1, 1}, {1, 37}, {29, 1}, {13, 21}}) {
            for (const unsigned rank : {1U, 3U, 64U}) {
                for (const int exponent : {-900, -80, -30, -14, 0, 60, 900}) {
                    for (const std::int32_t largest : {0, 1, 90, kLargest}) {
                        const Factors factors =
                            random_factors(rows, cols, rank, largest, exponent, random);
                        const Buffer base =
                            elements(rows * cols, exponent % 20 == 0, dtype, random);
                        const Buffer moved = moved_by(factors, base, rows, cols, dtype);
                        Buffer expected;
                        for (std::size_t i = 0; i < rows * cols; ++i) {
                            std::int64_t sum = 0;
                            for (unsigned k = 0; k < rank; ++k) {
                                sum += std::int64_t{factors.of_rows[k * rows + i / cols]} *
                                       factors.of_cols[k * cols + i % cols];
                            }
                            const auto* const from = base.data() + i * item;
                            const Buffer element =
                                moved_element(Buffer(from, from + item), sum, exponent, dtype);
                            expected.insert(expected.end(), element.begin(), element.end());
                        }
                        // Not the bits of a NaN that f64 and f32 keep.
                        const std::vector<double> want = as_doubles(expected, dtype);
                        for (std::size_t i = 0; i < rows * cols; ++i) {
                            const bool same =
                                std::memcmp(&moved[i * item], &expected[i * item], item) == 0;
                            const bool stays =
                                std::memcmp(&moved[i * item], &base[i * item], item) == 0;
                            CHECK(same || (item >= 4 && std::isnan(want[i]) && stays));
                        }
                        // Into the base's own memory as well.
                        Buffer inside = base;
                        detail::add_low_rank(factors.view(), inside.data(), rows, cols, dtype,
                                             inside.data());
                        CHECK(inside == moved);
                    }
                }
            }
        }
    }
}

Encoded encode(const MatrixRef& block, const MatrixRef& base, const Factors& factors,
               std::optional<double> max_rel_error = std::nullopt,
               std::optional<std::size_t> most = std::nullopt) {
    Encoded result;
    result.bytes.resize(most.value_or(block.rows * block.cols * item_bytes(block.dtype)));
    const detail::LowRank low_rank = factors.view();
    detail::DeltaEncoder encoder;
    const auto encoded = encoder.encode(
        block, base, max_rel_error, {at(result.bytes), result.bytes.size()}, {false, &low_rank});
    if (!encoded) return {};
    result.bytes.resize(encoded->length);
    result.bytes.shrink_to_fit();
    result.encoding = encoded->encoding;
    return result;
}

std::uint8_t form_of(const Encoded& delta) { return delta.bytes[1]; }

// How a block differs from its moved base.
enum class Change { none, few, some_small, some_large, all };

Buffer changed(const Buffer& block, Dtype dtype, Change how, std::mt19937_64& random) {
    Buffer result = block;
    const std::size_t item = item_bytes(dtype);
    for (std::size_t i = 0; i < block.size(); i += item) {
        const bool is_changed = how == Change::all || (how == Change::few && i / item % 61 == 3) ||
                                (how != Change::few && random() % 9 == 0);
        if (how == Change::none || !is_changed) continue;
        std::uint64_t bits = 0;
        std::memcpy(&bits, &block[i], item);
        // Large: all of the element but its sign and exponent.
        bits ^= how == Change::some_large && item > 2 ? random() >> (item == 8 ? 12 : 41)
                                                      : random() % 7;
        std::memcpy(&result[i], &bits, item);
    }
    return result;
}

TEST(blocks_of_every_dtype_shape_and_form_come_back) {
    std::mt19937_64 random(2);
    std::array<std::size_t, 3> forms{};
    for (const Dtype dtype : kFloats) {
        for (const auto& [rows, cols] :
             {std::pair<std::size_t, std::size_t>{64, 64}, {1, 4097}, {4097, 1}, {31, 67}}) {
            for (const Dtype of_base : kFloats) {
                for (const Change how : {Change::none, Change::few, Change::some_small,
                                         Change::some_large, Change::all}) {
                    const Factors factors = random_factors(rows, cols, 2, 100, -24, random);
                    const Buffer base = elements(rows * cols, false, of_base, random);
                    Buffer converted(rows * cols * item_bytes(dtype));
                    detail::convert_floats(base.data(), of_base, rows * cols, converted.data(),
                                           dtype);
                    const Buffer block = changed(moved_by(factors, converted, rows, cols, dtype),
                                                 dtype, how, random);
                    const Encoded delta = encode(matrix(block, rows, cols, dtype),
                                                 matrix(base, rows, cols, of_base), factors);
                    if (delta.bytes.empty()) {
                        // All bits of a narrow float: there may be nothing to win.
                        CHECK(how == Change::all || item_bytes(dtype) == 2);
                        continue;
                    }
                    CHECK(delta.bytes[0] == 3);
                    CHECK(delta.encoding == Encoding::delta);
                    ++forms[form_of(delta)];
                    if (how == Change::none || how == Change::few) CHECK(form_of(delta) != 1);
                    CHECK(decode(delta, view(base, rows, cols, of_base), dtype) == block);
                    // It is taken at its own size, and not at one byte less.
                    const std::size_t size = delta.bytes.size();
                    const MatrixRef to = matrix(block, rows, cols, dtype);
                    const MatrixRef from = matrix(base, rows, cols, of_base);
                    CHECK(encode(to, from, factors, std::nullopt, size).bytes == delta.bytes);
                    CHECK(encode(to, from, factors, std::nullopt, size - 1).bytes.empty());
                }
            }
        }
    }
    for (const std::size_t count : forms) CHECK(count > 10);
}

TEST(rare_differences_of_any_size_come_back) {
    std::mt19937_64 random(3);
    for (const Dtype dtype : {Dtype::f64, Dtype::f32}) {
        const Factors factors = random_factors(64, 64, 1, 50, -24, random);
        const Buffer base = as_dtype(normal(4096, 0.02, random), dtype);
        Buffer block = moved_by(factors, base, 64, 64, dtype);
        const std::size_t item = item_bytes(dtype);
        // z - 1 of 253, 254, 255, 256 and so on, and of all bits; often enough for the form.
        const std::vector<std::uint64_t> by = {
            126, 127, 128, 129, 1U << 14U, 1U << 30U, std::uint64_t{1} << 62U};
        for (std::size_t i = 0; i < 4096; i += 6) {
            std::uint64_t bits = 0;
            std::memcpy(&bits, &block[i * item], item);
            bits += i % 300 != 0 ? random() % 2 : by[i / 300 % by.size()];
            std::memcpy(&block[i * item], &bits, item);
        }
        const Encoded delta =
            encode(matrix(block, 64, 64, dtype), matrix(base, 64, 64, dtype), factors);
        CHECK(form_of(delta) == 2);
        CHECK(decode(delta, view(base, 64, 64, dtype), dtype) == block);
    }
}

TEST(pruned_and_narrow_blocks_of_low_rank_relatives_come_back) {
    std::mt19937_64 random(4);
    for (const Dtype dtype : kFloats) {
        const Factors factors = random_factors(64, 48, 4, 60, -26, random);
        const Buffer base = as_dtype(normal(64 * 48, 0.02, random), dtype);
        Buffer block = moved_by(factors, base, 64, 48, dtype);
        const std::size_t item = item_bytes(dtype);
        for (std::size_t i = 0; i < block.size(); i += 2 * item) std::memset(&block[i], 0, item);
        const Encoded masked =
            encode(matrix(block, 64, 48, dtype), matrix(base, 64, 48, dtype), factors);
        CHECK(masked.bytes.size() < 1200);
        CHECK(decode(masked, view(base, 64, 48, dtype), dtype) == block);
        for (const Dtype wide : {Dtype::f64, Dtype::f32}) {
            if (item_bytes(wide) <= item) continue;
            Buffer saved(64 * 48 * item_bytes(wide));
            detail::convert_floats(block.data(), dtype, 64 * 48, saved.data(), wide);
            const Encoded narrow =
                encode(matrix(saved, 64, 48, wide), matrix(base, 64, 48, dtype), factors);
            CHECK(narrow.bytes[kHead] == static_cast<std::uint8_t>(dtype));
            CHECK(narrow.bytes.size() == masked.bytes.size());
            CHECK(decode(narrow, view(base, 64, 48, dtype), wide) == saved);
        }
    }
}

double norm(const std::vector<double>& values) {
    double squares = 0;
    for (const double value : values) squares += value * value;
    return std::sqrt(squares);
}

TEST(an_error_bound_is_kept_on_a_moved_base) {
    std::mt19937_64 random(5);
    for (const Dtype dtype : kFloats) {
        for (const double bound : {1e-2, 2e-3, 1e-4}) {
            for (const double spread : {0.0, 1e-5, 1e-3}) {
                const Factors factors = random_factors(61, 67, 8, 200, -24, random);
                const Buffer base = as_dtype(normal(61 * 67, 0.02, random), dtype);
                std::vector<double> want =
                    as_doubles(moved_by(factors, base, 61, 67, dtype), dtype);
                const std::vector<double> noise = normal(want.size(), spread, random);
                for (std::size_t i = 0; i < want.size(); ++i) {
                    want[i] = i % 31 == 0 ? 0 : want[i] + noise[i];
                }
                const Buffer block = as_dtype(want, dtype);
                want = as_doubles(block, dtype);
                const Encoded delta = encode(matrix(block, 61, 67, dtype),
                                             matrix(base, 61, 67, dtype), factors, bound);
                if (delta.bytes.empty()) {
                    CHECK(spread > bound * 0.02);
                    continue;
                }
                std::vector<double> off =
                    as_doubles(decode(delta, view(base, 61, 67, dtype), dtype), dtype);
                for (std::size_t i = 0; i < off.size(); ++i) {
                    CHECK(want[i] != 0 || off[i] == 0);
                    off[i] -= want[i];
                }
                CHECK(norm(off) <= bound * norm(want) * (1 + 1e-12));
            }
        }
    }
}

TEST(factors_that_a_delta_cannot_have_are_refused) {
    std::mt19937_64 random(6);
    const Buffer base = as_dtype(normal(64, 0.02, random), Dtype::f32);
    const MatrixRef block = matrix(base, 8, 8, Dtype::f32);
    const auto refused = [&](const Factors& factors) {
        CHECK_THROWS(ErrorCode::invalid_argument, static_cast<void>(encode(block, block, factors)));
    };
    const Factors sound = random_factors(8, 8, 1, 1, 0, random);
    refused({0, 0, {}, {}});
    refused(random_factors(8, 8, 65, 1, 0, random));
    refused(random_factors(8, 8, 1, 1, 901, random));
    refused(random_factors(8, 8, 1, 1, -901, random));
    refused(random_factors(7, 8, 1, 1, 0, random));
    refused(random_factors(8, 9, 1, 1, 0, random));
    for (const std::int32_t number : {kLargest + 1, -kLargest - 1, INT32_MIN, INT32_MAX}) {
        Factors factors = sound;
        factors.of_cols[5] = number;
        refused(factors);
    }
    const Buffer ints(64 * 4);
    const MatrixRef whole = matrix(ints, 8, 8, Dtype::i32);
    CHECK_THROWS(ErrorCode::invalid_argument, static_cast<void>(encode(whole, whole, sound)));
}

// What put_low_rank() wrote.
const char* read_back(const detail::Sink& bytes, std::size_t rows, std::size_t cols,
                      detail::ReadLowRank& low_rank) {
    detail::Source source{{bytes.data(), bytes.size()}};
    const char* wrong = detail::get_low_rank(source, rows, cols, bytes.data(), 0, low_rank);
    CHECK(wrong != nullptr || source.left.empty());
    return wrong;
}

TEST(of_factors_only_what_moves_something_takes_memory) {
    constexpr std::size_t kRows = 67, kCols = 41;
    std::mt19937_64 random(18);
    for (int round = 0; round < 40; ++round) {
        const unsigned rank = 1 + static_cast<unsigned>(random() % 64);
        Factors factors = random_factors(kRows, kCols, rank, kLargest, -30, random);
        for (unsigned k = 0; k < rank; ++k) {
            if (random() % 2 != 0) std::fill_n(factors.of_rows.data() + k * kRows, kRows, 0);
            if (random() % 4 == 0) std::fill_n(factors.of_cols.data() + k * kCols, kCols, 0);
        }
        detail::Sink bytes;
        detail::put_low_rank(bytes, factors.view());
        detail::ReadLowRank back;
        CHECK(read_back(bytes, kRows, kCols, back) == nullptr);
        CHECK(back.rank >= 1 && back.rank <= rank && back.exponent == -30);
        CHECK(back.of_rows.size() == back.rank * kRows && back.of_cols.size() == back.rank * kCols);
        const Buffer base = as_dtype(normal(kRows * kCols, 0.02, random), Dtype::f32);
        Buffer moved(base.size());
        detail::add_low_rank(back.view(), base.data(), kRows, kCols, Dtype::f32, moved.data());
        CHECK(moved == moved_by(factors, base, kRows, kCols, Dtype::f32));
    }

    constexpr std::size_t kMany = 1 << 22;
    detail::Sink bytes;
    const Factors zeros{64, 0, std::vector<std::int32_t>(64 * kMany),
                        std::vector<std::int32_t>(64, 1)};
    detail::put_low_rank(bytes, zeros.view());
    detail::ReadLowRank back;
    CHECK(read_back(bytes, kMany, 1, back) == nullptr);
    CHECK(back.rank == 1 && back.of_rows.capacity() <= 2 * kMany);

    // Also of what moves nothing, each number must be one.
    const Factors sound{2, 0, {0, 0, 1, 0}, {kLargest, 0, 3, 4}};
    bytes.clear();
    detail::put_low_rank(bytes, sound.view());
    CHECK(read_back(bytes, 2, 2, back) == nullptr && back.rank == 1);
    CHECK((back.of_rows == std::vector<std::int32_t>{1, 0}));
    CHECK((back.of_cols == std::vector<std::int32_t>{3, 4}));
    constexpr std::array<std::uint8_t, 3> kTooFar = {0, 0, 0x80};  // -2^23
    std::copy(kTooFar.begin(), kTooFar.end(), bytes.end() - 7);
    CHECK(read_back(bytes, 2, 2, back) != nullptr);
}

// A delta of one number per row and column on a base of ones, behind some bytes of its page.
class ByHand {
  public:
    explicit ByHand(Dtype dtype = Dtype::f32) : dtype_(dtype), base_(as_dtype(ones(), dtype)) {
        const Factors none{1, 0, std::vector<std::int32_t>(4), std::vector<std::int32_t>(4)};
        const Encoded delta = encode(matrix(base_, 4, 4, dtype), matrix(base_, 4, 4, dtype), none);
        head_.assign(delta.bytes.begin(), delta.bytes.begin() + kHead);
    }

    // What comes behind the dtype of the differences and in front of the mask is `factors`.
    [[nodiscard]] bool decodes(const Buffer& factors, const Buffer& before = {},
                               std::optional<Dtype> narrow = std::nullopt) const {
        Buffer page = before;
        page.insert(page.end(), head_.begin(), head_.end());
        page.push_back(static_cast<std::uint8_t>(narrow.value_or(dtype_)));
        page.insert(page.end(), factors.begin(), factors.end());
        page.insert(page.end(), {0, 0});  // no mask, no change
        page.shrink_to_fit();
        BlockView delta = view(page, 4, 4, dtype_, Encoding::delta);
        delta.data += before.size();
        delta.length -= static_cast<std::uint32_t>(before.size());
        delta.before = static_cast<std::uint32_t>(before.size());
        static_cast<void>(encoded_bytes(delta));
        out_.assign(16 * item_bytes(dtype_), 0);
        try {
            decode_delta(delta, view(base_, 4, 4, dtype_), at(out_), 4 * item_bytes(dtype_));
            return true;
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page);
            return false;
        }
    }
    [[nodiscard]] std::vector<double> values() const { return as_doubles(out_, dtype_); }

  private:
    static std::vector<double> ones() { return std::vector<double>(16, 1.0); }

    Dtype dtype_;
    Buffer base_, head_;
    mutable Buffer out_;
};

TEST(factors_are_read_as_the_format_says) {
    const ByHand delta;
    // Rank 1, exponent 0; rows of 3 bits: 1, 2, 3, -3; columns of 2 bits: 1, 0, -1, 1.
    const Buffer rows = {3, 0b11010001, 0b1010};
    const Buffer cols = {2, 0b01110001};
    const auto joined = [](std::initializer_list<Buffer> parts) {
        Buffer all;
        for (const Buffer& part : parts) all.insert(all.end(), part.begin(), part.end());
        return all;
    };
    const Buffer start = {1, 0, 0};
    const Buffer inside = {0};
    CHECK(delta.decodes(joined({start, inside, rows, inside, cols})));
    CHECK(delta.values() ==
          std::vector<double>({2, 1, 0, 2, 3, 1, -1, 3, 4, 1, -2, 4, -2, 1, 4, -2}));
    const std::vector<double> expected = delta.values();
    // The same from in front of the block, of both factors in any order and place.
    CHECK(delta.decodes(joined({start, {3}, inside, cols}), rows));
    CHECK(delta.values() == expected);
    CHECK(delta.decodes(joined({start, {7}, {3}}), joined({{9, 9}, rows, {9, 9}, cols})) == false);
    CHECK(delta.decodes(joined({start, {7}, {2}}), joined({{9, 9}, rows, {9, 9}, cols})));
    CHECK(delta.values() == expected);
    CHECK(delta.decodes(joined({start, {3}, {5}}), joined({cols, rows})));
    CHECK(delta.values() == expected);
    // In front of the page, or of what there is of it; not whole before the block; its own bytes.
    CHECK(!delta.decodes(joined({start, {4}, inside, cols}), rows));
    CHECK(!delta.decodes(joined({start, {3}, inside, cols})));
    CHECK(!delta.decodes(joined({start, {2}, inside, cols}), rows));
    CHECK(!delta.decodes(joined({start, {1}, inside, cols}), {3}));
    CHECK(!delta.decodes(joined({start, Buffer(9, 0xFF), {1}, inside, cols}), rows));
    CHECK(!delta.decodes(joined({start, {0x83, 0}, inside, cols}), rows));  // a superfluous byte
    CHECK(!delta.decodes(joined({start, {0x83}})));
    // Ranks, exponents, widths, numbers and bits that there are not.
    for (const auto& [low, high, is_sound] :
         {std::tuple<std::uint8_t, std::uint8_t, bool>{0x84, 0x03, true},
          {0x85, 0x03, false},
          {0x7C, 0xFC, true},
          {0x7B, 0xFC, false}}) {
        CHECK(delta.decodes(joined({{1, low, high}, inside, rows, inside, cols})) == is_sound);
    }
    CHECK(!delta.decodes(joined({{0, 0, 0}, inside, inside})));
    const auto of_zeros = [&](std::uint8_t rank) {
        return joined({{rank, 0, 0}, inside, Buffer(rank, 0), inside, Buffer(rank, 0)});
    };
    CHECK(delta.decodes(of_zeros(64)));
    CHECK(delta.values() == std::vector<double>(16, 1.0));
    CHECK(!delta.decodes(of_zeros(65)));
    const auto of_rows = [&](const Buffer& factor) {
        return joined({start, inside, factor, inside, cols});
    };
    Buffer widest(13, 0);
    widest[0] = 24;
    CHECK(delta.decodes(of_rows(widest)));
    widest[3] = 0x80;  // -2^23
    CHECK(!delta.decodes(of_rows(widest)));
    widest[1] = 1;
    CHECK(delta.decodes(of_rows(widest)));
    CHECK(delta.values()[0] == 2.0 - (1 << 23));
    Buffer wider(14, 0);
    wider[0] = 25;
    CHECK(!delta.decodes(of_rows(wider)));
    CHECK(!delta.decodes(of_rows({3, 0b11010001, 0b11010})));  // stray bits
    CHECK(!delta.decodes(of_rows({})));
    CHECK(!delta.decodes(start));
    CHECK(!delta.decodes({}));
    // Only floats have any, and no floats that are not narrower.
    const Buffer whole = joined({start, inside, rows, inside, cols});
    CHECK(!delta.decodes(whole, {}, Dtype::f64));
    CHECK(!delta.decodes(whole, {}, Dtype::i32));
    CHECK(!delta.decodes(whole, {}, static_cast<Dtype>(0)));
    CHECK(delta.decodes(whole, {}, Dtype::bf16));
    CHECK(delta.values() == expected);
}

// Deltas with factors in common: of one row of blocks, each with columns of its own, and then of
// another row with the same columns; with raw blocks and bases in between.
struct Sample {
    std::vector<Buffer> bases, contents;
    std::vector<Encoded> deltas;
    std::vector<BlockView> views;
};

Sample sample(std::size_t rows, std::size_t cols, unsigned rank, std::int32_t largest) {
    std::mt19937_64 random(7);
    Sample all;
    std::vector<Factors> down, across;
    for (int i = 0; i < 2; ++i) {
        down.push_back(random_factors(rows, cols, rank, largest, -30, random));
        across.push_back(random_factors(rows, cols, rank, largest, -30, random));
    }
    for (const auto& [i, j] : {std::pair{0, 0}, {0, 1}, {1, 0}, {1, 1}, {0, 0}}) {
        const Factors factors{rank, -30, down[static_cast<std::size_t>(i)].of_rows,
                              across[static_cast<std::size_t>(j)].of_cols};
        const std::optional<double> bound = i == 1 ? std::optional(1e-3) : std::nullopt;
        all.bases.push_back(as_dtype(normal(rows * cols, 0.02, random), Dtype::f32));
        const Buffer block = changed(moved_by(factors, all.bases.back(), rows, cols, Dtype::f32),
                                     Dtype::f32, Change::few, random);
        all.deltas.push_back(encode(matrix(block, rows, cols, Dtype::f32),
                                    matrix(all.bases.back(), rows, cols, Dtype::f32), factors,
                                    bound));
        all.contents.push_back(
            decode(all.deltas.back(), view(all.bases.back(), rows, cols, Dtype::f32), Dtype::f32));
    }
    for (std::size_t i = 0; i < all.deltas.size(); ++i) {
        if (i % 2 == 1) all.views.push_back(view(all.bases[i], rows, cols, Dtype::f32));
        all.views.push_back(
            view(all.deltas[i].bytes, rows, cols, Dtype::f32, all.deltas[i].encoding));
    }
    return all;
}

Buffer page_of(const std::vector<BlockView>& blocks) {
    Buffer page(page_bytes(blocks), 0xAA);
    build_page(blocks, {at(page), page.size()});
    return page;
}

std::vector<BlockView> blocks_on(const Buffer& page) {
    const PageView parsed = PageView::parse({at(page), page.size()});
    std::vector<BlockView> blocks;
    for (std::size_t slot = 0; slot < parsed.n_slots(); ++slot) {
        blocks.push_back(parsed.block(slot));
    }
    return blocks;
}

Buffer alone(const BlockView& block) {
    Buffer bytes(encoded_bytes(block));
    copy_encoded(block, {at(bytes), bytes.size()});
    return bytes;
}

// That a page holds these blocks, and each comes off it as it was.
void check_page(const Buffer& page, const std::vector<BlockView>& of) {
    const std::vector<BlockView> blocks = blocks_on(page);
    CHECK(blocks.size() == of.size());
    for (std::size_t i = 0; i < of.size(); ++i) {
        CHECK(has_factors(blocks[i]) == has_factors(of[i]));
        CHECK(alone(blocks[i]) == alone(of[i]));
    }
    CHECK(page_of(blocks) == page);  // taken from it and put there again
}

TEST(a_page_has_a_factor_of_several_blocks_once) {
    const Sample all = sample(64, 48, 8, 5000);
    const Buffer page = page_of(all.views);
    check_page(page, all.views);
    const std::vector<BlockView> blocks = blocks_on(page);
    std::vector<std::uint32_t> saved;
    std::size_t next = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        if (!is_delta(blocks[i].encoding)) continue;
        saved.push_back(all.views[i].length - blocks[i].length);
        Buffer out(64 * 48 * 4);
        const BlockView base = view(all.bases[next], 64, 48, Dtype::f32);
        decode_delta(blocks[i], base, at(out), 48 * 4);
        CHECK(out == all.contents[next]);
        ++next;
    }
    const std::uint32_t rows = 8 + 64 * 8 * 14 / 8;
    const std::uint32_t cols = 8 + 48 * 8 * 14 / 8;
    const auto is_about = [](std::uint32_t got, std::uint32_t want) {
        return got <= want && got + 6 >= want;  // what says where takes up to 3 bytes each
    };
    CHECK(saved[0] == 0);
    CHECK(is_about(saved[1], rows));
    CHECK(is_about(saved[2], cols));
    CHECK(is_about(saved[3], rows + cols));
    CHECK(is_about(saved[4], rows + cols));
}

TEST(pages_of_blocks_of_pages_are_those_of_the_blocks) {
    const Sample all = sample(64, 48, 8, 5000);
    const Buffer first = page_of(all.views);
    const std::vector<BlockView> on_page = blocks_on(first);
    std::mt19937_64 random(8);
    std::vector<std::size_t> order(all.views.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (int round = 0; round < 20; ++round) {
        std::shuffle(order.begin(), order.end(), random);
        const auto count = static_cast<std::ptrdiff_t>(1 + random() % order.size());
        std::vector<BlockView> some, same;
        for (auto i = order.begin(); i != order.begin() + count; ++i) {
            some.push_back(all.views[*i]);
            same.push_back(on_page[*i]);
        }
        const Buffer page = page_of(some);
        check_page(page, some);
        CHECK(page_of(same) == page);
        CHECK(page_bytes(same) == page.size());
    }
}

TEST(factors_of_few_bytes_are_in_every_block) {
    const Sample all = sample(400, 1, 1, 100);  // that of the column has 2 or 3 bytes
    const Buffer page = page_of(all.views);
    check_page(page, all.views);
    for (const BlockView& block : blocks_on(page)) {
        if (!is_delta(block.encoding)) continue;
        const auto places = detail::find_factors(block);
        CHECK(places && places->of_cols.size() <= 3);
        CHECK(places && places->of_cols.data() > block.data);
    }
}

TEST(a_factor_of_rows_may_be_that_of_columns) {
    std::mt19937_64 random(9);
    const Buffer base = as_dtype(normal(32 * 32, 0.02, random), Dtype::f32);
    Factors factors = random_factors(32, 32, 4, 3000, -30, random);
    factors.of_cols = factors.of_rows;
    const Buffer block = moved_by(factors, base, 32, 32, Dtype::f32);
    const Encoded delta =
        encode(matrix(block, 32, 32, Dtype::f32), matrix(base, 32, 32, Dtype::f32), factors);
    const BlockView once = view(delta.bytes, 32, 32, Dtype::f32, Encoding::delta);
    const Buffer page = page_of({once, once});
    check_page(page, {once, once});
    const std::vector<BlockView> blocks = blocks_on(page);
    CHECK(blocks[0].length == once.length);  // nothing within a block refers to it
    CHECK(blocks[1].length < 40);
    Buffer out(block.size());
    decode_delta(blocks[1], view(base, 32, 32, Dtype::f32), at(out), 32 * 4);
    CHECK(out == block);
}

// Decodes or is refused; nothing else, under ASan and UBSan.
bool is_handled(const BlockView& delta, const BlockView& base) {
    Buffer out(std::size_t{delta.rows} * delta.cols * item_bytes(delta.dtype));
    try {
        const Buffer bytes = alone(delta);
        std::vector<BlockView> one = {delta};
        if (!bytes.empty() && bytes.size() < out.size()) static_cast<void>(page_of(one));
        decode_delta(delta, base, at(out), delta.cols * item_bytes(delta.dtype));
        return true;
    } catch (const Error& error) {
        return error.code() == ErrorCode::corrupt_page ||
               error.code() == ErrorCode::unsupported_format ||
               error.code() == ErrorCode::invalid_argument;
    }
}

TEST(damaged_deltas_with_factors_are_refused_or_decode) {
    const Sample all = sample(16, 24, 3, 90);
    const Buffer page = page_of(all.views);
    const std::vector<BlockView> blocks = blocks_on(page);
    std::mt19937_64 random(10);
    std::size_t next = 0;
    for (const BlockView& block : blocks) {
        if (!is_delta(block.encoding)) continue;
        const BlockView base = view(all.bases[next], 16, 24, Dtype::f32);
        const auto start = static_cast<std::size_t>(block.data - at(page));
        for (std::uint32_t length = 0; length < block.length; ++length) {
            BlockView cut = block;
            cut.length = length;
            CHECK(is_handled(cut, base));
        }
        for (std::size_t damage = 0; damage < 4 * block.length; ++damage) {
            Buffer changed(page.begin(),
                           page.begin() + static_cast<std::ptrdiff_t>(start + block.length));
            BlockView damaged = block;
            changed[start + damage / 4] ^= static_cast<std::uint8_t>(1 + random() % 255);
            if (damage % 2 == 0) changed[random() % changed.size()] = 0xFF;
            changed.shrink_to_fit();
            damaged.data = at(changed) + start;
            damaged.before = static_cast<std::uint32_t>(random() % (start + 1));
            CHECK(is_handled(damaged, base));
        }
        ++next;
    }
}

TEST(batches_of_deltas_with_factors_are_alike_for_any_number_of_threads) {
    std::mt19937_64 random(11);
    const std::size_t rows = 64 * 12;
    const Buffer base = as_dtype(normal(rows * 64, 0.02, random), Dtype::f32);
    const Factors all = random_factors(rows, 64, 2, 300, -28, random);
    const Buffer block =
        changed(moved_by(all, base, rows, 64, Dtype::f32), Dtype::f32, Change::some_small, random);
    const BlockGrid grid{rows, 64, 64, 32};
    std::vector<std::int64_t> indices(grid.count()), row_of, col_of;
    std::vector<std::int32_t> of_rows(2 * rows), of_cols(2 * 64);
    for (std::size_t part = 0; part < 12; ++part) {
        for (std::size_t i = 0; i < 128; ++i) {
            of_rows[part * 128 + i] = all.of_rows[i / 64 * rows + part * 64 + i % 64];
        }
    }
    for (std::size_t part = 0; part < 2; ++part) {
        for (std::size_t i = 0; i < 64; ++i) {
            of_cols[part * 64 + i] = all.of_cols[i / 32 * 64 + part * 32 + i % 32];
        }
    }
    for (std::size_t i = 0; i < indices.size(); ++i) {
        indices[i] = static_cast<std::int64_t>(i);
        row_of.push_back(indices[i] / 2);
        col_of.push_back(indices[i] % 2);
    }
    const LowRankFactors factors{2, -28, of_rows, of_cols, row_of, col_of};
    const std::vector<std::int64_t> limits(indices.size(), 4000);
    const BaseBlocks bases{matrix(base, rows, 64, Dtype::f32), grid, indices};
    std::vector<Buffer> arenas;
    for (const unsigned threads : {1U, 3U}) {
        Buffer arena(4000 * indices.size());
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        arena.resize(encode_deltas(matrix(block, rows, 64, Dtype::f32), grid, indices, bases,
                                   limits, std::nullopt, {at(arena), arena.size()}, offsets,
                                   encoded, threads, &factors));
        for (std::size_t i = 0; i < indices.size(); ++i) {
            const auto from = arena.begin() + offsets[i];
            const Encoded delta{Buffer(from, from + encoded[i].length), encoded[i].encoding};
            const Buffer of_base = copied(block_of(bases.matrix, grid, i));
            const Buffer want = copied(block_of(matrix(block, rows, 64, Dtype::f32), grid, i));
            CHECK(delta.bytes[0] == 3);
            CHECK(decode(delta, view(of_base, 64, 32, Dtype::f32), Dtype::f32) == want);
        }
        arenas.push_back(arena);
    }
    CHECK(arenas[0] == arenas[1]);
    for (const auto& [which, row, col] :
         {std::tuple<std::size_t, std::int64_t, std::int64_t>{0, 12, 0}, {3, -1, 0}, {5, 0, 2}}) {
        auto [rows_of, cols_of] = std::pair(row_of, col_of);
        rows_of[which] = row;
        cols_of[which] = col;
        const LowRankFactors wrong{2, -28, of_rows, of_cols, rows_of, cols_of};
        Buffer arena(4000 * indices.size());
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(encode_deltas(
                         matrix(block, rows, 64, Dtype::f32), grid, indices, bases, limits,
                         std::nullopt, {at(arena), arena.size()}, offsets, encoded, 1, &wrong)));
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
