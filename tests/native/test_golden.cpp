// SPDX-License-Identifier: Apache-2.0
// The files of tests/golden with the core alone, so that they hold wherever it can be compiled:
// what one machine stored, every other reads, and would have stored the same.
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"
#include "codec/convert.hpp"
#include "kernels.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/page_format.hpp"
#include "pydedup/similarity.hpp"

using namespace pydedup;
using namespace pydedup::testing;

namespace {

std::string read_file(const std::string& name) {
    std::ifstream file(PYDEDUP_GOLDEN_DIR "/" + name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Bytes bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

struct Vector {
    std::size_t length;
    std::uint64_t seed;
    std::string digest;
};

// The text behind `"key":` from `at` on, which then points behind it. The files are ours, of one
// form: lists of objects whose keys come in this order.
std::string value_of(const std::string& json, const std::string& key, std::size_t& at) {
    const std::string quoted = "\"" + key + "\": ";
    const std::size_t begin = json.find(quoted, at);
    if (begin == std::string::npos) return {};
    at = json.find_first_of(",\n", begin);
    return json.substr(begin + quoted.size(), at - begin - quoted.size());
}

std::vector<Vector> hash_vectors() {
    const std::string json = read_file("hash_v1.json");
    std::vector<Vector> vectors;
    for (std::size_t at = 0;;) {
        const std::string length = value_of(json, "length", at);
        if (length.empty()) return vectors;
        const std::string seed = value_of(json, "seed", at);
        const std::string digest = value_of(json, "digest", at);
        vectors.push_back({std::stoull(length), std::stoull(seed), digest.substr(1, 32)});
    }
}

std::string hex(Bytes bytes) {
    std::string text;
    for (const std::byte byte : bytes) {
        text += "0123456789abcdef"[static_cast<unsigned>(byte) >> 4];
        text += "0123456789abcdef"[static_cast<unsigned>(byte) & 15U];
    }
    return text;
}

// In the order of memory, which is little-endian here as on disk.
std::string hex(Digest digest) { return hex(std::as_bytes(std::span(&digest, 1))); }

std::vector<std::uint8_t> golden_input(std::size_t length) {
    std::vector<std::uint8_t> bytes(length);
    std::uint32_t state = 1;
    for (std::uint8_t& byte : bytes) {
        state = state * 1664525U + 1013904223U;
        byte = static_cast<std::uint8_t>(state >> 24);
    }
    return bytes;
}

}  // namespace

TEST(hashes_of_version_1_are_the_same_from_every_kernel) {
    static_assert(kHashVersion == 1);
    const std::vector<Vector> vectors = hash_vectors();
    CHECK(vectors.size() == 60);
    for (const Vector& vector : vectors) {
        const auto data = golden_input(vector.length);
        for (const KernelTable* table : runnable_kernels()) {
            std::uint64_t out[2];
            table->hash.hash_rows(data.data(), 1, data.size(), data.size(), vector.seed, out);
            CHECK(hex(Digest{out[0], out[1]}) == vector.digest);
        }
    }
}

TEST(the_page_of_version_1_is_read) {
    const std::string page_file = read_file("page_v1.page");
    const std::string content = read_file("page_v1.content");
    const PageView page = PageView::parse(bytes_of(page_file));
    CHECK(page.n_slots() == 18);
    std::size_t at = 0;
    std::size_t planes = 0;
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) {
        const BlockView block = page.block(slot);
        const std::size_t size = block.rows * block.row_bytes();
        CHECK(at + size <= content.size());
        std::vector<std::byte> decoded(size);
        decode_block(block, decoded.data(), block.row_bytes());
        CHECK(std::equal(decoded.begin(), decoded.end(), bytes_of(content).begin() + at));
        at += size;
        planes += block.encoding == Encoding::planes;
    }
    CHECK(at == content.size() && planes >= 10);
}

TEST(the_page_of_version_1_is_written_byte_for_byte) {
    const std::string page_file = read_file("page_v1.page");
    const std::string content = read_file("page_v1.content");
    const PageView page = PageView::parse(bytes_of(page_file));
    std::vector<std::vector<std::byte>> memory;
    std::vector<BlockView> blocks;
    std::size_t at = 0;
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) {
        const BlockView block = page.block(slot);
        const std::size_t row_bytes = block.row_bytes();
        memory.emplace_back(block.rows * row_bytes);
        const MatrixRef matrix{bytes_of(content).data() + at, block.rows, block.cols, row_bytes,
                               block.dtype};
        const EncodedBlock encoded = encode_block(matrix, true, memory.back());
        blocks.push_back({memory.back().data(), encoded.length, encoded.encoding, block.dtype,
                          block.rows, block.cols, 0});
        at += memory.back().size();
    }
    std::vector<std::byte> built(page_bytes(blocks));
    build_page(blocks, built);
    CHECK(std::ranges::equal(built, bytes_of(page_file)));
}

// Deltas decode to the same bits; the digest was taken on x86-64 with the scalar kernels.
TEST(the_page_of_version_2_is_read) {
    const std::string page_file = read_file("page_v2.page");
    const PageView page = PageView::parse(bytes_of(page_file));
    CHECK(page.n_slots() == 18);
    std::vector<std::byte> content;
    std::size_t deltas = 0;
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) {
        const BlockView block = page.block(slot);
        std::vector<std::byte> decoded(block.raw_bytes());
        if (is_delta(block.encoding)) {
            decode_delta(block, page.block(block.base - 1), decoded.data(), block.row_bytes());
            ++deltas;
        } else {
            decode_block(block, decoded.data(), block.row_bytes());
        }
        content.insert(content.end(), decoded.begin(), decoded.end());
    }
    CHECK(deltas == 15);
    CHECK(hex(hash_bytes(content)) == "153acae56427cb0ae95c384f04a4a350");
}

namespace {

// Six blocks of numbers in [-1, 1): two equal, one zero, one with a NaN.
std::vector<std::byte> golden_blocks(Dtype dtype, std::size_t elements) {
    std::vector<double> values(6 * elements);
    std::uint32_t state = 1;
    for (double& value : values) {
        state = state * 1664525U + 1013904223U;
        value = (static_cast<double>(state >> 25) - 64) / 64;
    }
    std::copy_n(values.data(), elements, values.data() + 2 * elements);
    std::fill_n(values.data() + 3 * elements, elements, 0.0);
    values.at(5 * elements - 1) = std::nan("");
    std::vector<std::byte> blocks(values.size() * item_bytes(dtype));
    detail::convert_floats(reinterpret_cast<const std::uint8_t*>(values.data()), Dtype::f64,
                           values.size(), reinterpret_cast<std::uint8_t*>(blocks.data()), dtype);
    return blocks;
}

Dtype dtype_named(const std::string& quoted) {
    if (quoted == "\"f32\"") return Dtype::f32;
    if (quoted == "\"f64\"") return Dtype::f64;
    return quoted == "\"f16\"" ? Dtype::f16 : Dtype::bf16;
}

}  // namespace

TEST(similarity_indexes_of_version_1_are_built_byte_for_byte) {
    static_assert(kSimilarityVersion == 1);
    const std::string json = read_file("similarity_v1.json");
    const std::array<std::int64_t, 6> ids{10, std::int64_t{1} << 40, 11, 12, 0, 3};
    std::size_t count = 0;
    for (std::size_t at = 0;; ++count) {
        const std::string name = value_of(json, "dtype", at);
        if (name.empty()) break;
        const Dtype dtype = dtype_named(name);
        const std::string shape = json.substr(json.find('[', at) + 1, 40);
        std::size_t used = 0;
        const std::size_t rows = std::stoull(shape, &used);
        const std::size_t cols = std::stoull(shape.substr(used + 1));
        const std::size_t bands = std::stoull(value_of(json, "bands", at));
        const std::size_t band_rows = std::stoull(value_of(json, "rows", at));
        const std::uint64_t seed = std::stoull(value_of(json, "seed", at));
        const std::string payload = value_of(json, "payload", at);

        L2Index index({dtype, rows, cols, 0.5, bands, band_rows, seed});
        const auto blocks = golden_blocks(dtype, rows * cols);
        index.add(dense_blocks(blocks.data(), ids.size(), rows, cols, dtype), ids);
        CHECK('"' + hex(index.save()) + '"' == payload);
    }
    CHECK(count == 6);
}

PYDEDUP_TEST_MAIN
