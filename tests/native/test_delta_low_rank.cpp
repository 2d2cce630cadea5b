// SPDX-License-Identifier: Apache-2.0
// Deltas on bases that factors moved: the sum is the same as in integers, blocks come back, and
// what docs/format.md does not allow is refused.
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
#include "kernels.hpp"
#include "low_rank_deltas.hpp"
#include "pydedup/error.hpp"
#include "pydedup/page_format.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

constexpr std::array kFloats = {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr std::int32_t kLargest = (1 << 23) - 1;
constexpr std::size_t kHead = 12;      // bytes before those of version 3
constexpr std::size_t kFactorsAt = 4;  // from there: a dtype, a rank and an exponent

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

std::uint8_t form_of(const Encoded& delta) { return delta.bytes[1]; }

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

}  // namespace

PYDEDUP_TEST_MAIN
