// SPDX-License-Identifier: Apache-2.0
// Saved similarity indexes: loading refuses the bytes, or gives an index that works, and that saves
// to bytes which load to the same again.
#include <cmath>

#include "fuzz.hpp"
#include "pydedup/error.hpp"
#include "pydedup/similarity.hpp"

namespace pydedup::fuzz {
namespace {

constexpr std::size_t kMostElements = std::size_t{1} << 16;

std::vector<float> block_values(std::size_t count, std::uint32_t kind) {
    Random random;
    std::vector<float> values(count);
    for (float& value : values) {
        value = static_cast<float>(random.next() % 1000) - 400.0F + static_cast<float>(kind % 7);
    }
    return values;
}

void use(L2Index& index) {
    const LshParameters& p = index.parameters();
    const std::vector<std::int64_t> ids = index.ids();
    require(ids.size() == index.size(), "as many ids as blocks");
    for (std::size_t i = 1; i < ids.size(); ++i) require(ids[i - 1] < ids[i], "ids ascend");
    if (p.rows * p.cols > kMostElements) return;
    const std::vector<double> values(p.rows * p.cols + 1);
    std::vector<float> floats = block_values(p.rows * p.cols, 1);
    const bool f32 = p.dtype == Dtype::f32;
    const auto* data = f32 ? reinterpret_cast<const std::byte*>(floats.data())
                           : reinterpret_cast<const std::byte*>(values.data());
    const BlockBatch batch = dense_blocks(data, 1, p.rows, p.cols, p.dtype);
    std::int64_t found[3];
    double distances[3];
    index.query(batch, 3, found, distances, 1);
    for (int i = 0; i < 3; ++i) {
        require(found[i] == -1 || index.contains(found[i]), "finds what it holds");
        require(!(distances[i] < 0), "distances are not negative");
    }
    if (!ids.empty()) {
        index.remove({ids.data(), 1});
        require(!index.contains(ids.front()), "removed");
        index.add(batch, {ids.data(), 1}, 1);
        require(index.contains(ids.front()) && index.size() == ids.size(), "added again");
    }
}

}  // namespace

std::vector<Input> seeds() {
    std::vector<Input> made;
    for (const Dtype dtype : {Dtype::f32, Dtype::f64}) {
        for (const std::size_t blocks : {0U, 1U, 9U}) {
            L2Index index({dtype, 4, 8, 0.5, 6, 2, 7});
            const std::vector<float> floats = block_values(blocks * 32, 3);
            const std::vector<double> doubles(floats.begin(), floats.end());
            const auto* data = dtype == Dtype::f32
                                   ? reinterpret_cast<const std::byte*>(floats.data())
                                   : reinterpret_cast<const std::byte*>(doubles.data());
            std::vector<std::int64_t> ids;
            ids.reserve(blocks);
            for (std::size_t i = 0; i < blocks; ++i)
                ids.push_back(static_cast<std::int64_t>(5 * i));
            if (blocks != 0) index.add(dense_blocks(data, blocks, 4, 8, dtype), ids, 1);
            const std::vector<std::byte> saved = index.save();
            for (const std::uint8_t first : {std::uint8_t{0}, std::uint8_t{1}}) {
                append(made.emplace_back(Input{first}), saved);
            }
        }
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup;
    fuzz::Reader reader(data, size);
    const bool repair = reader.byte() % 2 == 1;
    fuzz::Input bytes = reader.rest();
    if (repair) fuzz::repair_checksum(bytes);
    std::unique_ptr<L2Index> index;
    try {
        index = L2Index::load(fuzz::as_bytes(bytes), 1);
    } catch (const Error&) {
        return 0;
    }
    const std::vector<std::byte> saved = index->save();
    const std::unique_ptr<L2Index> again = L2Index::load(saved, 1);
    fuzz::require(again->save() == saved, "saved, loaded and saved it is the same");
    fuzz::require(again->ids() == index->ids(), "with the same ids");
    fuzz::use(*index);
    return 0;
}
