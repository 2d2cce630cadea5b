// SPDX-License-Identifier: Apache-2.0
// Deltas written by hand: what docs/format.md allows decodes, and what lies one beyond it is
// refused before it is decoded with. And damaged ones: the same cases under ASan and UBSan are the
// memory-safety test.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <random>
#include <vector>

#include "check.hpp"
#include "codec/delta_pair.hpp"
#include "deltas.hpp"
#include "kernels.hpp"
#include "pydedup/error.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

// Deltas on a base of zeros.
class ByHand {
  public:
    ByHand(std::size_t rows, std::size_t cols, Dtype dtype)
        : ByHand(rows, cols, dtype, rows, cols, dtype) {}
    ByHand(std::size_t rows, std::size_t cols, Dtype dtype, std::size_t base_rows,
           std::size_t base_cols, Dtype base_dtype)
        : rows_(rows),
          cols_(cols),
          dtype_(dtype),
          base_rows_(base_rows),
          base_cols_(base_cols),
          base_dtype_(base_dtype),
          base_(base_rows * base_cols * item_bytes(base_dtype), 0) {}

    [[nodiscard]] bool decodes(std::uint8_t form, const Buffer& body,
                               std::optional<double> step = std::nullopt, std::uint8_t shift = 0,
                               std::uint8_t version = 1) const {
        Buffer delta = {version, form, static_cast<std::uint8_t>(base_dtype_), shift};
        const auto put = [&](auto value) {
            std::array<std::uint8_t, sizeof value> bytes;
            std::memcpy(bytes.data(), &value, sizeof value);
            delta.insert(delta.end(), bytes.begin(), bytes.end());
        };
        put(static_cast<std::uint32_t>(rows_ * cols_));
        put(detail::check_of(base_.data(), base_rows_, base_cols_ * item_bytes(base_dtype_)));
        if (step) put(std::bit_cast<std::uint64_t>(*step));
        delta.insert(delta.end(), body.begin(), body.end());
        delta.shrink_to_fit();
        Buffer out(rows_ * cols_ * item_bytes(dtype_));
        const Encoding encoding = step ? Encoding::quantised : Encoding::delta;
        try {
            decode_delta(view(delta, rows_, cols_, dtype_, encoding),
                         view(base_, base_rows_, base_cols_, base_dtype_), at(out),
                         cols_ * item_bytes(dtype_));
            return true;
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page);
            return false;
        }
    }
    [[nodiscard]] Dtype dtype() const { return dtype_; }
    [[nodiscard]] bool sparse(const Buffer& body) const { return decodes(0, body); }
    [[nodiscard]] bool coded(const Buffer& body) const { return decodes(1, body); }

  private:
    std::size_t rows_, cols_;
    Dtype dtype_;
    std::size_t base_rows_, base_cols_;
    Dtype base_dtype_;
    Buffer base_;
};

Buffer joined(std::initializer_list<Buffer> parts) {
    Buffer all;
    for (const Buffer& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
}

const Buffer kOneContext = {1, 0};
const Buffer kOnlySymbol0 = {1, 0};  // two bits: one symbol; eight: which
const Buffer kNoStreams = {0, 0, 0, 0};

Buffer zeros(std::size_t n) { return Buffer(n, 0); }

TEST(a_sparse_delta_changes_its_own_elements) {
    const ByHand bytes(1, 16, Dtype::i8);
    CHECK(bytes.sparse({1, 15, 7}));
    CHECK(!bytes.sparse({1, 16, 7}));  // behind the last element
    CHECK(bytes.sparse({2, 0, 7, 14, 7}));
    CHECK(!bytes.sparse({2, 0, 7, 15, 7}));
    CHECK(bytes.sparse({1, 3, 0xFF, 1}));
    CHECK(!bytes.sparse({1, 3, 0x80, 2}));  // 256
    CHECK(!bytes.sparse({1, 3, 0}));
    CHECK(!bytes.sparse({1, 3, 7, 0}));
    Buffer more_than_64_bits(9, 0x80);
    more_than_64_bits.push_back(2);
    CHECK(!bytes.sparse(more_than_64_bits));
}

TEST(classes_and_dictionaries_end_with_the_values_of_the_dtype) {
    const ByHand bytes(1, 8, Dtype::i8);
    const auto alphabet = [&](const Buffer& of, std::size_t raw) {
        return bytes.coded(joined({kOneContext, of, kOnlySymbol0, kNoStreams, zeros(raw)}));
    };
    // No dictionary, one class: 15 has 6 raw bits, 16 would have 7, 255 would have 126.
    CHECK(alphabet({0, 15, 1}, 6));
    CHECK(!alphabet({0, 16, 1}, 7));
    CHECK(!alphabet({0, 255, 1}, 126));
    CHECK(alphabet({0, 14, 2}, 6));
    CHECK(!alphabet({0, 15, 2}, 6));
    // One run of one value, 255, the largest; one of two; and one that follows on the largest.
    CHECK(alphabet({1, 0xFF, 1, 0, 0, 0}, 0));
    CHECK(!alphabet({1, 0xFF, 1, 1, 0, 0}, 0));
    CHECK(!alphabet({2, 0xFF, 1, 0, 1, 0, 0, 0}, 0));
    // Two runs with a value between them, which would else be one.
    CHECK(alphabet({2, 5, 0, 1, 0, 0, 0}, 0));
    CHECK(!alphabet({2, 5, 0, 0, 0, 0, 0}, 0));
    // No class has no number.
    CHECK(alphabet({1, 5, 0, 0, 0}, 0));
    CHECK(!alphabet({1, 5, 0, 3, 0}, 0));
}

TEST(a_code_ends_with_symbols_that_have_one) {
    const ByHand bytes(1, 8, Dtype::i8);
    const auto code = [&](std::uint8_t last, const char* lengths) {
        Buffer bits(8, 0);  // a code, from symbol 0 to `last`
        std::size_t at = 0;
        const auto put = [&](unsigned bit) {
            bits[at / 8] = static_cast<std::uint8_t>(bits[at / 8] | bit << (at % 8));
            ++at;
        };
        for (const unsigned bit : {0U, 1U, 0U, 0U, 0U, 0U, 0U, 0U, 0U, 0U}) put(bit);
        for (unsigned i = 0; i < 8; ++i) put(last >> i & 1U);
        for (const char* bit = lengths; *bit != 0; ++bit) put(*bit == '1' ? 1 : 0);
        bits.resize((at + 7) / 8);
        return bytes.coded(joined({kOneContext, {1, 5, 2, 0, 0}, bits, {1, 1, 1, 1}, zeros(4)}));
    };
    // Of 6 bits, 1 is the 12th guess; after it, 1 is the first, and 0, for no code, the third.
    CHECK(code(1, "1111111111100"));
    CHECK(!code(2, "1111111111100110"));
}

TEST(a_row_has_a_group_that_there_is) {
    const ByHand bytes(4, 2, Dtype::i8);
    const auto groups = [&](Buffer contexts, std::size_t n) {
        Buffer codes;  // of `n` contexts, all of which have symbol 0 alone
        std::uint64_t held = 0;
        for (std::size_t c = 0; c < n; ++c) held |= std::uint64_t{1} << (10 * c);
        for (std::size_t at = 0; at < 10 * n; at += 8) {
            codes.push_back(static_cast<std::uint8_t>(held >> at));
        }
        return bytes.coded(joined({contexts, {0, 0, 1}, codes, kNoStreams}));
    };
    CHECK(groups({3, 0b10010010, 0, 0, 0}, 3));
    CHECK(!groups({3, 0b11010010, 0, 0, 0}, 3));  // the last row: 3 of 0 to 2
    CHECK(!groups({9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 1));
}

TEST(all_groups_have_32_contexts_at_most) {
    const ByHand floats(2, 2, Dtype::f32);
    const auto contexts = [&](std::uint8_t first, std::uint8_t second) {
        Buffer body = {2, 0b10};  // two rows, a group each
        for (const std::uint8_t n : {first, second}) {
            body.insert(body.end(), {2, n});  // by mantissa
            for (std::uint8_t c = 1; c < n; ++c) body.push_back(c);
        }
        const Buffer codes((2U * (first + second) + 7) / 8, 0);  // none is used
        return floats.coded(joined({body, {0, 0, 1}, codes, kNoStreams}));
    };
    CHECK(contexts(16, 16));
    CHECK(!contexts(16, 17));
    CHECK(!contexts(31, 31));
}

TEST(forms_are_those_of_the_version) {
    const ByHand bytes(1, 4, Dtype::i8);
    CHECK(bytes.decodes(0, {0}));
    CHECK(!bytes.decodes(2, {0}));
    CHECK(!bytes.decodes(3, {0, 0}));
    const Buffer of_bytes = {static_cast<std::uint8_t>(Dtype::i8), 0, 0, 0};
    for (const std::uint8_t version : {2, 5}) {
        CHECK(bytes.decodes(3, of_bytes, std::nullopt, 0, version) == (version == 5));
        CHECK(!bytes.decodes(2, of_bytes, std::nullopt, 0, version));
        CHECK(!bytes.decodes(4, of_bytes, std::nullopt, 0, version));
    }
    CHECK(!bytes.decodes(0xFF, {0}));
    CHECK(!bytes.decodes(0, {0}, std::nullopt, 0, 0));  // and no version 0
}

TEST(a_base_has_the_shape_and_the_kind_of_numbers) {
    const auto on = [](std::size_t rows, std::size_t cols, Dtype dtype) {
        return ByHand(4, 8, Dtype::f32, rows, cols, dtype).sparse({0});
    };
    CHECK(on(4, 8, Dtype::f32));
    CHECK(on(4, 8, Dtype::bf16));
    for (const Dtype dtype : {Dtype::u32, Dtype::i32, Dtype::u16, Dtype::f8_e4m3}) {
        CHECK(!on(4, 8, dtype));
    }
    CHECK(!on(4, 4, Dtype::f32));
    CHECK(!on(4, 9, Dtype::f32));
    CHECK(!on(2, 8, Dtype::f32));
    CHECK(!on(8, 4, Dtype::f32));
}

TEST(unused_bits_are_0) {
    const ByHand bytes(1, 4, Dtype::i8);
    const auto with = [&](std::uint8_t codes, std::uint8_t raw) {  // a raw bit each
        return bytes.coded(joined({kOneContext, {0, 4, 1}, {1, codes}, kNoStreams, {raw}}));
    };
    CHECK(with(0, 0x0F));
    CHECK(!with(0, 0x1F));
    CHECK(!with(4, 0x0F));
    CHECK(!bytes.coded(joined({kOneContext, {0, 4, 1}, {1, 0}, kNoStreams})));  // no raw bits
}

TEST(a_step_is_a_number_of_its_dtype) {
    const Buffer nothing = {0};
    const ByHand single(1, 4, Dtype::f32);
    const ByHand wide(1, 4, Dtype::f64);
    CHECK(single.decodes(0, nothing, 0.5));
    CHECK(!single.decodes(0, nothing, 0.1));  // no f32
    CHECK(wide.decodes(0, nothing, 0.1));
    for (const double step : {0.0, -0.5, HUGE_VAL, std::nan("")}) {
        CHECK(!single.decodes(0, nothing, step));
        CHECK(!wide.decodes(0, nothing, step));
    }
    CHECK(!single.decodes(0, nothing, 0.5, 1));  // exact differences are shifted, steps are not
    CHECK(single.decodes(0, nothing, std::nullopt, 31));
    CHECK(!single.decodes(0, nothing, std::nullopt, 32));
    CHECK(!ByHand(1, 4, Dtype::i8).decodes(0, nothing, 0.5));
}

TEST(differences_are_of_a_narrower_float) {
    const Buffer no_mask_no_change = {0, 0};
    const auto of = [&](Dtype dtype, Dtype narrow, std::uint8_t shift = 0,
                        std::optional<double> step = std::nullopt) {
        const ByHand bytes(1, 4, dtype);
        const Buffer body = joined({{static_cast<std::uint8_t>(narrow)}, no_mask_no_change});
        return bytes.decodes(0, body, step, shift, 2);
    };
    for (const Dtype narrow : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
        CHECK(of(Dtype::f64, narrow));
        CHECK(!of(narrow, Dtype::f64));
        CHECK(of(narrow, narrow));
    }
    CHECK(of(Dtype::f32, Dtype::bf16, 15));
    CHECK(!of(Dtype::f32, Dtype::bf16, 16));
    CHECK(!of(Dtype::f16, Dtype::bf16));
    CHECK(!of(Dtype::f32, Dtype::u16));
    CHECK(!of(Dtype::i32, Dtype::i16));
    CHECK(!of(Dtype::f32, Dtype::f8_e4m3));
    CHECK(!of(Dtype::f32, static_cast<Dtype>(200)));
    CHECK(of(Dtype::f32, Dtype::f32, 0, 0.5));
    CHECK(!of(Dtype::f32, Dtype::bf16, 0, 0.5));  // quantised ones are as they are
}

TEST(a_mask_is_as_long_as_its_block) {
    const Buffer nothing = {0};
    const auto masked = [&](const ByHand& bytes, const Buffer& mask,
                            std::optional<double> step = std::nullopt) {
        const Buffer dtype = {static_cast<std::uint8_t>(bytes.dtype())};
        return bytes.decodes(0, joined({dtype, mask, nothing}), step, 0, 2);
    };
    const ByHand floats(1, 12, Dtype::f32);
    const ByHand ints(1, 12, Dtype::i16);
    const auto bits = [](std::uint8_t kind, std::uint8_t value, std::uint8_t length,
                         const Buffer& payload, std::uint8_t sign = 0, std::uint8_t form = 1) {
        return joined({{form, sign, kind, value, 0, 0, length, 0, 0, 0}, payload});
    };
    for (const ByHand* bytes : {&floats, &ints}) {
        CHECK(masked(*bytes, bits(0, 0, 2, {0xFF, 0x0F})));
        CHECK(!masked(*bytes, bits(0, 0, 2, {0xFF, 0x1F})));  // a thirteenth element
        CHECK(!masked(*bytes, bits(0, 0, 1, {0xFF})));
        CHECK(!masked(*bytes, bits(0, 0, 3, {0xFF, 0x0F, 0})));
        CHECK(!masked(*bytes, bits(0, 0, 200, {0xFF, 0x0F})));
        CHECK(masked(*bytes, bits(1, 0x0F, 0, {})));
        CHECK(!masked(*bytes, bits(1, 0x1F, 0, {})));
        CHECK(!masked(*bytes, bits(0, 9, 2, {0xFF, 0x0F})));  // a value, and it is not constant
        CHECK(!masked(*bytes, bits(3, 0, 2, {0xFF, 0x0F})));
        CHECK(!masked(*bytes, {1, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0xFF, 0x0F}));  // reserved: 0
        CHECK(!masked(*bytes, bits(0, 0, 2, {0xFF, 0x0F}, 2)));
        CHECK(!masked(*bytes, bits(0, 0, 2, {0xFF, 0x0F}, 0, 3)));
        CHECK(!masked(*bytes, {1, 0, 0}));
        CHECK(masked(*bytes, {0}));
        CHECK(!masked(*bytes, {}));
    }
    CHECK(masked(floats, bits(0, 0, 2, {0xFF, 0x0F}), 0.5));
    CHECK(masked(floats, bits(0, 0, 2, {0xFF, 0x0F}, 1)));
    CHECK(!masked(ints, bits(0, 0, 2, {0xFF, 0x0F}, 1)));  // ints have no sign to keep
    CHECK(masked(floats, {2, 0, 1, 0, 0, 0}));
    CHECK(masked(floats, {2, 1, 0xFF, 0xFF, 0xFF, 0x7F}));
    CHECK(!masked(floats, {2, 0, 0, 0, 0, 0}));
    CHECK(!masked(floats, {2, 0, 1, 0, 0, 0x80}));
    CHECK(!masked(floats, {2, 0, 1, 0, 0}));
    CHECK(masked(ints, {2, 0, 1, 0x80}));
    CHECK(!masked(ints, {2, 0, 0, 0}));
}

TEST(a_delta_is_never_trusted) {
    std::mt19937_64 random(8);
    const std::size_t rows = 24;
    const std::size_t cols = 64;
    std::array<std::size_t, 4> forms{};
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64, Dtype::i8}) {
        const std::size_t item = item_bytes(dtype);
        const bool is_float = dtype != Dtype::i8;
        const std::vector<double> values = normal(rows * cols, 0.02, random);
        std::vector<double> moved = values;
        for (std::size_t i = 0; i < moved.size(); ++i) {
            if (i / cols % 5 != 0) moved[i] *= 1.0 + 1e-4 * static_cast<double>(random() % 20);
        }
        Buffer base = is_float ? as_dtype(values, dtype) : random_bytes(rows * cols, random);
        Buffer block = is_float ? as_dtype(moved, dtype) : base;
        if (!is_float) {
            for (std::size_t i = 0; i < block.size(); i += 2) block[i] ^= 5;
        }
        for (int kind = 0; kind < 6; ++kind) {
            Buffer source = block;
            if (kind == 2) {
                source = base;
                for (std::size_t i = 0; i < source.size(); i += 97) source[i] ^= 9;
            } else if (kind == 5) {
                source = base;
                for (std::size_t i = 0; i < source.size(); i += item) {
                    source[i] ^= random() % 7 == 0 ? 1 : 0;
                }
            } else if (kind >= 3) {  // pruned
                for (std::size_t i = 0; i < rows * cols; ++i) {
                    if (random() % 3 == 0) std::memset(&source[i * item], 0, item);
                }
            }
            const Encoded delta = encode(
                matrix(source, rows, cols, dtype), matrix(base, rows, cols, dtype),
                (kind == 1 || kind == 4) && is_float ? std::optional<double>(0.002) : std::nullopt);
            CHECK(!delta.bytes.empty());
            ++forms[delta.bytes[1]];
            const auto decodes = [&](const Buffer& bytes, Encoding encoding) {
                Buffer exact(bytes);
                exact.shrink_to_fit();
                Buffer out(rows * cols * item);
                try {
                    decode_delta(view(exact, rows, cols, dtype, encoding),
                                 view(base, rows, cols, dtype), at(out), cols * item);
                    return true;
                } catch (const Error& error) {
                    CHECK(error.code() == ErrorCode::corrupt_page ||
                          error.code() == ErrorCode::unsupported_format);
                    return false;
                }
            };
            CHECK(decodes(delta.bytes, delta.encoding));
            for (std::size_t n = 0; n < delta.bytes.size(); n += n < 300 ? 1 : 37) {
                CHECK(!decodes(Buffer(delta.bytes.begin(),
                                      delta.bytes.begin() + static_cast<std::ptrdiff_t>(n)),
                               delta.encoding));
            }
            Buffer longer = delta.bytes;
            longer.push_back(0);
            CHECK(!decodes(longer, delta.encoding));
            for (int round = 0; round < 3000; ++round) {
                Buffer damaged = delta.bytes;
                // Most of the damage where the structure is.
                const std::size_t reach =
                    round % 4 == 0 ? damaged.size() : std::min<std::size_t>(damaged.size(), 200);
                for (std::uint64_t flips = 1 + random() % 3; flips-- > 0;) {
                    const std::size_t where = random() % reach;
                    if (where >= 8 && where < 12) continue;  // the base's check: noticed at once
                    damaged[where] ^= static_cast<std::uint8_t>(1U << random() % 8);
                }
                static_cast<void>(
                    decodes(damaged, round % 8 == 7 ? Encoding::quantised : delta.encoding));
            }
            for (int round = 0; round < 1000; ++round) {  // a valid header in front of noise
                Buffer noise = random_bytes(12 + random() % 600, random);
                std::memcpy(noise.data(), delta.bytes.data(), 12);
                noise[1] = static_cast<std::uint8_t>(round % 2);
                if (delta.encoding == Encoding::quantised && noise.size() >= 20) {
                    std::memcpy(&noise[12], &delta.bytes[12], 8);
                }
                const std::size_t body = delta.encoding == Encoding::quantised ? 20 : 12;
                if (round % 2 == 1 && noise.size() > body + 8) {
                    noise[body] = static_cast<std::uint8_t>(1 + random() % 2);
                    noise[body + 1] = 0;
                }
                static_cast<void>(decodes(noise, delta.encoding));
            }
            Buffer newer = delta.bytes;
            newer[0] = 6;
            CHECK(!decodes(newer, delta.encoding));
        }
    }
    CHECK(forms[0] > 0 && forms[1] > 0 && forms[3] > 0);
}

}  // namespace

PYDEDUP_TEST_MAIN
