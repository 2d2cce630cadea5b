// SPDX-License-Identifier: Apache-2.0
// The files of tests/golden with the core alone, so that they hold wherever it can be compiled:
// what one machine stored, every other reads, and would have stored the same.
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"
#include "kernels.hpp"
#include "pydedup/hash.hpp"
#include "pydedup/page_format.hpp"

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

// The text behind `"key":` from `at` on, which then points behind it. The file is ours, of one
// form: a JSON list of objects with these three keys in this order.
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

// Bytes of a digest in the order of memory, as hexadecimal.
std::string hex(const std::uint64_t (&halves)[2]) {
    std::string text;
    for (const std::uint64_t half : halves) {
        for (unsigned byte = 0; byte < 8; ++byte) {
            const auto value = static_cast<unsigned>(half >> (8 * byte)) & 0xFFU;
            text += "0123456789abcdef"[value >> 4];
            text += "0123456789abcdef"[value & 15U];
        }
    }
    return text;
}

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
            CHECK(hex(out) == vector.digest);
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

PYDEDUP_TEST_MAIN
