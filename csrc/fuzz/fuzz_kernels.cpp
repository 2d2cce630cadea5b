// SPDX-License-Identifier: Apache-2.0
// The same bytes to every kernel that this machine runs: what is persisted must come out alike.
// Hashes of any shape and stride, byte planes there and back, and Huffman tables and streams that
// nobody encoded.
#include "codec/huffman.hpp"
#include "dispatch/dispatch.hpp"
#include "fuzz.hpp"
#include "pydedup/cpu.hpp"

namespace pydedup::fuzz {
namespace {

const std::vector<const KernelTable*>& tables() {
    static const std::vector<const KernelTable*> list = [] {
        std::vector<const KernelTable*> made;
        for (const KernelInfo& info : kernel_infos()) {
            if (info.built && info.runnable) made.push_back(&kernels_named(info.name));
        }
        return made;
    }();
    return list;
}

// Calls answer(table) for each kernel, the reference first, and wants the same from all.
template <class Answer>
void all_alike(const char* what, const Answer& answer) {
    const auto wanted = answer(*tables().front());
    for (const KernelTable* table : tables()) require(answer(*table) == wanted, what);
}

void hashes(Reader& reader) {
    const std::size_t row_bytes = 1 + reader.word() % 700;
    const std::size_t gap = reader.byte() % 70;
    const std::size_t blocks = 1 + reader.byte() % kPanelBlocks;
    const std::uint64_t seed = reader.byte() * 0x9E3779B97F4A7C15ULL;
    const Input data = reader.rest();
    const std::size_t line = blocks * row_bytes;
    if (data.size() < line) return;
    const std::size_t stride = line + gap;
    const std::size_t rows = 1 + (data.size() - line) / stride;
    all_alike("hash_panel", [&](const KernelTable& table) {
        std::vector<std::uint64_t> out(2 * blocks);
        table.hash.hash_panel(data.data(), blocks, rows, row_bytes, stride, seed, out.data());
        return out;
    });
    all_alike("hash_rows", [&](const KernelTable& table) {
        std::vector<std::uint64_t> out(2);
        table.hash.hash_rows(data.data(), rows, line, stride, seed, out.data());
        return out;
    });
}

void planes(Reader& reader) {
    const std::size_t item = std::size_t{1} << reader.byte() % 4;
    const bool rotate = reader.byte() % 2 == 1 && item > 1;
    const std::size_t cols = 1 + reader.byte();
    const std::size_t gap = reader.byte() % 40;
    const Input data = reader.rest();
    const std::size_t row_bytes = cols * item;
    if (data.size() < row_bytes) return;
    const std::size_t stride = row_bytes + gap;
    const std::size_t rows = 1 + (data.size() - row_bytes) / stride;
    const std::size_t count = rows * cols;
    all_alike("split_planes", [&](const KernelTable& table) {
        Input out(count * item);
        table.codec.split_planes(data.data(), stride, rows, cols, item, rotate, out.data());
        return out;
    });
    Input split(count * item);
    tables().front()->codec.split_planes(data.data(), stride, rows, cols, item, rotate,
                                         split.data());
    const std::uint8_t* pointers[8] = {};
    for (std::size_t p = 0; p < item; ++p) pointers[p] = split.data() + p * count;
    all_alike("merge_planes", [&](const KernelTable& table) {
        Input back(count * item);
        table.codec.merge_planes(pointers, rows, cols, item, rotate, back.data(), row_bytes);
        for (std::size_t r = 0; r < rows; ++r) {
            require(
                std::memcmp(back.data() + r * row_bytes, data.data() + r * stride, row_bytes) == 0,
                "merging undoes splitting");
        }
        return back;
    });
}

void huffman(Reader& reader) {
    const std::size_t count = 1 + reader.word() % 5000;
    const Input payload = reader.rest();
    all_alike("huffman_decode", [&](const KernelTable& table) {
        Input plane(count);
        const char* fault =
            detail::huffman_decode(payload, payload.data() + payload.size(), table.codec, plane);
        if (fault != nullptr) plane.clear();  // undefined then
        plane.push_back(fault == nullptr ? 1 : 0);
        return plane;
    });
}

Input huffman_seed(std::size_t count, std::uint32_t symbols) {
    Random random;
    Input plane(count);
    for (std::uint8_t& value : plane) {
        value = static_cast<std::uint8_t>(random.next() % (1 + random.next() % symbols));
    }
    detail::PlaneHistogram histogram;
    detail::count_bytes(plane, histogram);
    detail::HuffmanPlan plan;
    detail::plan_huffman(histogram, plan);
    Input payload(plan.payload_bytes);
    detail::huffman_encode(plane, plan, payload);
    Input input{2, static_cast<std::uint8_t>((count - 1) & 0xFF),
                static_cast<std::uint8_t>((count - 1) >> 8)};
    input.insert(input.end(), payload.begin(), payload.end());
    return input;
}

}  // namespace

std::vector<Input> seeds() {
    Random random;
    std::vector<Input> made;
    for (const std::uint8_t kind : {std::uint8_t{0}, std::uint8_t{1}}) {
        for (const std::size_t size : {40U, 300U, 2000U}) {
            Input input{kind, 3, 1, 17, 4};
            for (std::size_t i = 0; i < size; ++i) {
                input.push_back(static_cast<std::uint8_t>(random.next()));
            }
            made.push_back(std::move(input));
        }
    }
    for (const std::size_t count : {16U, 1000U, 4096U}) {
        for (const std::uint32_t symbols : {2U, 30U, 256U}) {
            made.push_back(huffman_seed(count, symbols));
        }
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup::fuzz;
    Reader reader(data, size);
    switch (reader.byte() % 3) {
        case 0:
            hashes(reader);
            break;
        case 1:
            planes(reader);
            break;
        default:
            huffman(reader);
    }
    return 0;
}
