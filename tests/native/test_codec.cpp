// SPDX-License-Identifier: Apache-2.0
// Block encodings: round trips, and bytes that nobody wrote (the same cases under ASan and UBSan
// are the memory-safety test). Planes and Huffman coding by themselves are in test_huffman.cpp.
#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <vector>

#include "blocks.hpp"
#include "check.hpp"
#include "kernels.hpp"
#include "pydedup/codec.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

Buffer weights(Dtype dtype, std::size_t n, std::mt19937_64& random) {
    std::normal_distribution<float> draw(0.0F, 0.02F);
    const std::size_t item = item_bytes(dtype);
    Buffer bytes(n * item);
    for (std::size_t i = 0; i < n; ++i) {
        const float value = draw(random);
        const double wide = value;
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const auto half = static_cast<std::uint16_t>(bits >> 16);
        const auto small = static_cast<std::int64_t>(value * 1000);
        switch (dtype) {
            case Dtype::f64:
                std::memcpy(&bytes[i * item], &wide, 8);
                break;
            case Dtype::f32:
                std::memcpy(&bytes[i * item], &value, 4);
                break;
            case Dtype::f16:
            case Dtype::bf16:
                std::memcpy(&bytes[i * item], &half, 2);
                break;
            default:
                std::memcpy(&bytes[i * item], &small, item);
        }
    }
    return bytes;
}

BlockView view_of(const Buffer& bytes, const EncodedBlock& encoded, Dtype dtype, std::size_t rows,
                  std::size_t cols) {
    return {at(bytes),
            encoded.length,
            encoded.encoding,
            dtype,
            static_cast<std::uint32_t>(rows),
            static_cast<std::uint32_t>(cols),
            0};
}

TEST(blocks_of_every_dtype_and_shape_come_back) {
    std::mt19937_64 random(6);
    for (const Dtype dtype : kDtypes) {
        const std::size_t item = item_bytes(dtype);
        for (const auto& [rows, cols] : {std::pair<std::size_t, std::size_t>{1, 1},
                                         {1, 7},
                                         {3, 5},
                                         {17, 33},
                                         {64, 64},
                                         {1, 4097},
                                         {200, 50}}) {
            for (int kind = 0; kind < 4; ++kind) {
                const std::size_t stride = cols * item + (kind == 3 ? 24 : 0);
                Buffer source = kind == 0   ? Buffer(rows * stride, 0)
                                : kind == 1 ? random_bytes(rows * stride, random)
                                : kind == 2 ? weights(dtype, rows * cols, random)
                                            : skewed_bytes(rows * stride, 0.3, random);
                const std::size_t raw = rows * cols * item;
                Buffer encoded(raw);
                const EncodedBlock result =
                    encode_block({at(source), rows, cols, stride, dtype}, true, {at(encoded), raw});
                if (result.encoding == Encoding::planes) {
                    CHECK(result.length * 20 <= raw * 19);
                } else {
                    CHECK(result.length == raw);
                }
                encoded.resize(result.length);  // decoding must not look behind
                encoded.shrink_to_fit();
                Buffer back(rows * stride, 0xEE);
                decode_block(view_of(encoded, result, dtype, rows, cols), at(back), stride);
                for (std::size_t r = 0; r < rows; ++r) {
                    CHECK(std::memcmp(&back[r * stride], &source[r * stride], cols * item) == 0);
                    const std::size_t end = (r + 1) * stride;
                    for (std::size_t b = r * stride + cols * item; b < end; ++b) {
                        CHECK(back[b] == 0xEE);
                    }
                }
            }
        }
    }
}

TEST(weights_save_what_their_exponents_can) {
    std::mt19937_64 random(7);
    const auto ratio = [&](Dtype dtype) {
        const std::size_t n = 8192;
        const Buffer source = weights(dtype, n, random);
        Buffer encoded(source.size());
        const EncodedBlock result =
            encode_block({at(source), 128, 64, 64 * item_bytes(dtype), dtype}, true,
                         {at(encoded), encoded.size()});
        CHECK(result.encoding == Encoding::planes);
        return static_cast<double>(result.length) / static_cast<double>(source.size());
    };
    CHECK(ratio(Dtype::f32) < 0.85);
    CHECK(ratio(Dtype::bf16) < 0.69);
    CHECK(ratio(Dtype::i64) < 0.25);  // seven planes of sign bytes, about a bit each
}

TEST(an_encoded_block_is_never_trusted) {
    std::mt19937_64 random(8);
    const std::size_t rows = 40;
    const std::size_t cols = 64;
    const Buffer source = weights(Dtype::f32, rows * cols, random);
    Buffer encoded(source.size());
    const EncodedBlock result = encode_block({at(source), rows, cols, cols * 4, Dtype::f32}, true,
                                             {at(encoded), encoded.size()});
    CHECK(result.encoding == Encoding::planes);
    encoded.resize(result.length);
    Buffer out(source.size());
    const auto decodes = [&](const Buffer& bytes, Dtype dtype, std::size_t r, std::size_t c) {
        const Buffer exact(bytes);  // no slack behind the block
        Buffer to(r * c * item_bytes(dtype) + 1);
        try {
            decode_block(
                view_of(exact, {Encoding::planes, static_cast<std::uint32_t>(exact.size())}, dtype,
                        r, c),
                at(to), c * item_bytes(dtype));
            return true;
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page ||
                  error.code() == ErrorCode::unsupported_format);
            return false;
        }
    };
    CHECK(decodes(encoded, Dtype::f32, rows, cols));
    CHECK(!decodes(encoded, Dtype::u32, rows, cols));
    CHECK(!decodes(encoded, Dtype::f32, rows, cols + 1));
    CHECK(!decodes(encoded, Dtype::f64, rows, cols / 2));
    for (std::size_t n = 0; n < encoded.size(); ++n) {
        CHECK(!decodes(Buffer(encoded.begin(), encoded.begin() + static_cast<std::ptrdiff_t>(n)),
                       Dtype::f32, rows, cols));
    }
    Buffer longer = encoded;
    longer.push_back(0);
    CHECK(!decodes(longer, Dtype::f32, rows, cols));
    // Flipped bits may decode to something (the page's checksum finds them), never do harm.
    for (int round = 0; round < 20000; ++round) {
        Buffer damaged = encoded;
        // Most of the damage where the structure is: headers, code table, stream sizes.
        const std::size_t reach = round % 4 == 0 ? damaged.size() : 96;
        for (std::uint64_t flips = 1 + random() % 3; flips-- > 0;) {
            damaged[random() % reach] ^= static_cast<std::uint8_t>(1U << random() % 8);
        }
        static_cast<void>(decodes(damaged, Dtype::f32, rows, cols));
    }
    // Valid headers in front of noise reach the code table and the decoder.
    for (int round = 0; round < 5000; ++round) {
        Buffer noise = random_bytes(16 + random() % 2000, random);
        const Buffer frame = {1, 1, 0, 0, 0, 8, 0, 0, 2, 0, 0, 0};
        std::copy(frame.begin(), frame.end(), noise.begin());
        const auto length = static_cast<std::uint32_t>(noise.size() - 16);
        std::memcpy(&noise[12], &length, 4);
        if (round % 2 == 0 && noise.size() > 20) {
            noise[16] = 0;  // a complete code over the range 0 .. 1: streams of noise
            noise[17] = 0;
            noise[18] = 1;
            noise[19] = 0x11;
        }
        static_cast<void>(decodes(noise, Dtype::u8, 1, 2048));
    }
}

TEST(planes_written_by_hand_are_refused_one_beyond_the_format) {
    const auto decodes = [](std::uint8_t kind, std::uint8_t value, const Buffer& payload) {
        Buffer block = {1, 1, 0, 0, 8, 0, 0, 0, kind, value, 0, 0};  // eight bytes, one plane
        const auto length = static_cast<std::uint32_t>(payload.size());
        block.resize(16);
        std::memcpy(&block[12], &length, 4);
        block.insert(block.end(), payload.begin(), payload.end());
        block.shrink_to_fit();
        Buffer out(8);
        try {
            decode_block(view_of(block, {Encoding::planes, 16 + length}, Dtype::u8, 1, 8), at(out),
                         8);
            return true;
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::corrupt_page);
            return false;
        }
    };
    CHECK(decodes(1, 7, {}));
    CHECK(!decodes(1, 7, {0}));
    CHECK(decodes(0, 0, Buffer(8)));
    CHECK(!decodes(0, 0, Buffer(7)));
    CHECK(!decodes(0, 0, Buffer(9)));
    CHECK(!decodes(0, 7, Buffer(8)));
    // Huffman: codes 0 and 1, of a bit each, and four streams of two symbols.
    const Buffer by_range = {0, 0, 1, 0x11};
    Buffer by_bitmap(34);
    by_bitmap[0] = 1;
    by_bitmap[1] = 3;
    by_bitmap[33] = 0x11;
    const auto huffman = [&](Buffer payload, std::uint8_t third, const Buffer& streams) {
        const Buffer sizes = {1, 0, 0, 0, 1, 0, 0, 0, third, 0, 0, 0};
        payload.insert(payload.end(), sizes.begin(), sizes.end());
        payload.insert(payload.end(), streams.begin(), streams.end());
        return decodes(2, 0, payload);
    };
    const Buffer streams = {0x40, 0x80, 0xC0, 0x40};
    CHECK(huffman(by_range, 1, streams));
    CHECK(huffman(by_bitmap, 1, streams));
    CHECK(!huffman(by_range, 1, {0x40, 0x80, 0xC0, 0x41}));  // a bit behind the last code
    CHECK(!huffman(by_range, 1, {0x40, 0x80, 0xC0}));
    CHECK(!huffman(by_range, 1, {0x40, 0x80, 0xC0, 0x40, 0}));
    CHECK(!huffman(by_range, 3, streams));  // the third stream ends behind the plane
    Buffer unused = by_bitmap;              // of three byte values, the second has no code
    unused[1] = 7;
    unused[33] = 0x01;
    unused.push_back(0x01);
    CHECK(!huffman(unused, 1, streams));
    CHECK(!huffman({0, 0, 2, 0x11, 0}, 1, streams));
    // Codes of 1, 2, 3, ... bits, the last two of them equally long: 11 are the most.
    const auto longest = [&](unsigned bits) {
        Buffer payload = {0, 0, static_cast<std::uint8_t>(bits)};
        for (unsigned s = 0; s <= bits; s += 2) {
            const unsigned low = std::min(s + 1, bits);
            const unsigned high = s == bits ? 0 : std::min(s + 2, bits);
            payload.push_back(static_cast<std::uint8_t>(low | high << 4));
        }
        return huffman(payload, 1, {0, 0, 0, 0});
    };
    CHECK(longest(10));
    CHECK(longest(11));
    for (unsigned bits = 12; bits < 16; ++bits) CHECK(!longest(bits));
    Buffer stray = by_range;  // of three byte values, half a byte is left
    stray[2] = 2;
    stray[3] = 0x21;
    stray.push_back(0x02);
    CHECK(huffman(stray, 1, {0, 0, 0, 0}));
    stray.back() = 0x12;
    CHECK(!huffman(stray, 1, {0, 0, 0, 0}));
}

TEST(versions_and_arguments_are_checked) {
    const Buffer zeros(4096, 0);
    Buffer encoded(4096);
    const EncodedBlock result =
        encode_block({at(zeros), 32, 32, 128, Dtype::f32}, true, {at(encoded), encoded.size()});
    CHECK(result.encoding == Encoding::planes);
    CHECK(result.length == 8 + 4 * 8);  // four constant planes
    Buffer out(4096);
    encoded[0] = 2;
    CHECK_THROWS(ErrorCode::unsupported_format,
                 decode_block(view_of(encoded, result, Dtype::f32, 32, 32), at(out), 128));
    encoded[0] = 0;
    CHECK_THROWS(ErrorCode::corrupt_page,
                 decode_block(view_of(encoded, result, Dtype::f32, 32, 32), at(out), 128));
    encoded[0] = 1;
    CHECK_THROWS(ErrorCode::invalid_argument,
                 decode_block(view_of(encoded, result, Dtype::f32, 32, 32), at(out), 127));
    BlockView unknown = view_of(encoded, result, Dtype::f32, 32, 32);
    unknown.encoding = static_cast<Encoding>(4);
    CHECK_THROWS(ErrorCode::corrupt_page, decode_block(unknown, at(out), 128));
    unknown = view_of(encoded, result, static_cast<Dtype>(0), 32, 32);
    CHECK_THROWS(ErrorCode::corrupt_page, decode_block(unknown, at(out), 128));
    unknown = view_of(encoded, result, Dtype::f32, 0xFFFFFFFF, 0xFFFFFFFF);
    CHECK_THROWS(ErrorCode::corrupt_page, decode_block(unknown, at(out), SIZE_MAX));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 static_cast<void>(encode_block({at(zeros), 0, 32, 128, Dtype::f32}, true,
                                                {at(encoded), encoded.size()})));
    CHECK_THROWS(ErrorCode::invalid_argument,
                 static_cast<void>(
                     encode_block({at(zeros), 32, 32, 128, Dtype::f32}, true, {at(encoded), 100})));
    Buffer arena(4096);
    std::vector<std::int64_t> offsets(1);
    std::vector<EncodedBlock> blocks(1);
    for (const std::int64_t index : {std::int64_t{-1}, std::int64_t{4}}) {
        CHECK_THROWS(ErrorCode::invalid_argument,
                     static_cast<void>(encode_blocks({at(zeros), 32, 32, 128, Dtype::f32},
                                                     {32, 32, 16, 16}, std::array{index}, true,
                                                     {at(arena), arena.size()}, offsets, blocks)));
    }
}

TEST(many_blocks_are_the_blocks_one_by_one_whatever_the_threads) {
    std::mt19937_64 random(9);
    const std::size_t rows = 150;
    const std::size_t cols = 130;
    Buffer source = weights(Dtype::bf16, rows * cols, random);
    const MatrixRef matrix{at(source), rows, cols, cols * 2, Dtype::bf16};
    const BlockGrid grid{rows, cols, 32, 48};
    std::vector<std::int64_t> indices;
    for (std::size_t i = grid.count(); i-- > 0;) indices.push_back(static_cast<std::int64_t>(i));
    const std::size_t room = raw_bytes_of(matrix, grid, indices);
    CHECK(room == source.size());
    Buffer first;
    for (const unsigned threads : {1U, 4U}) {
        Buffer arena(room);
        std::vector<std::int64_t> offsets(indices.size());
        std::vector<EncodedBlock> encoded(indices.size());
        const std::size_t used = encode_blocks(matrix, grid, indices, true, {at(arena), room},
                                               offsets, encoded, threads);
        arena.resize(used);
        if (first.empty()) first = arena;
        CHECK(arena == first);
        std::size_t end = 0;
        for (std::size_t i = 0; i < indices.size(); ++i) {
            const BlockRect rect = block_rect(grid, static_cast<std::size_t>(indices[i]));
            CHECK(static_cast<std::size_t>(offsets[i]) == end);
            end += encoded[i].length;
            Buffer one(rect.rows * rect.cols * 2);
            const EncodedBlock alone =
                encode_block({matrix.data + rect.row0 * cols * 2 + rect.col0 * 2, rect.rows,
                              rect.cols, cols * 2, Dtype::bf16},
                             true, {at(one), one.size()});
            CHECK(alone.length == encoded[i].length && alone.encoding == encoded[i].encoding);
            CHECK(std::memcmp(one.data(), &arena[static_cast<std::size_t>(offsets[i])],
                              alone.length) == 0);
        }
        CHECK(end == used);
    }
}

}  // namespace

PYDEDUP_TEST_MAIN
