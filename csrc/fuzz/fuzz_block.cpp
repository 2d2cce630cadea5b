// SPDX-License-Identifier: Apache-2.0
// Encoded blocks: decode_block on any encoding, dtype, shape and bytes writes its rectangle and
// nothing else, or refuses. What decodes is the same once encoded and decoded again.
#include "decoding.hpp"

namespace pydedup::fuzz {
namespace {

Gapped decoded(const BlockView& block) {
    Gapped target(block);
    decode_block(block, target.memory.data(), target.stride);
    return target;
}

void check_round_trip(const Gapped& target, const BlockView& block) {
    std::vector<std::byte> encoded(block.raw_bytes());
    const MatrixRef matrix{target.memory.data(), block.rows, block.cols, target.stride,
                           block.dtype};
    const EncodedBlock again = encode_block(matrix, true, encoded);
    require(again.length <= encoded.size(), "encoding never grows a block");
    encoded.resize(again.length);
    encoded.shrink_to_fit();
    const Gapped back = decoded(
        {encoded.data(), again.length, again.encoding, block.dtype, block.rows, block.cols, 0});
    require(back.memory == target.memory, "encoded and decoded again it is the same");
}

Input seed_of(Dtype dtype, std::uint8_t rows, std::uint8_t cols, bool planes, std::uint32_t skew) {
    Random random;
    const std::size_t item = item_bytes(dtype);
    std::vector<std::byte> values(rows * cols * item);
    for (std::byte& value : values) {
        value = static_cast<std::byte>(random.next() % skew * (random.next() % 3));
    }
    std::vector<std::byte> encoded(values.size());
    const EncodedBlock block =
        encode_block({values.data(), rows, cols, cols * item, dtype}, planes, encoded);
    Input input{static_cast<std::uint8_t>(block.encoding),
                static_cast<std::uint8_t>(dtype),
                rows,
                0,
                cols,
                0};
    append(input, {encoded.data(), block.length});
    return input;
}

}  // namespace

std::vector<Input> seeds() {
    std::vector<Input> made;
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::i8, Dtype::i64}) {
        for (const std::uint32_t skew : {1U, 4U, 60U}) {
            made.push_back(seed_of(dtype, 16, 20, true, skew));
        }
        made.push_back(seed_of(dtype, 3, 5, false, 200));
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup;
    fuzz::Reader reader(data, size);
    const auto encoding = static_cast<Encoding>(reader.byte());
    const auto dtype = static_cast<Dtype>(reader.byte());
    const std::uint32_t rows = reader.word();
    const std::uint32_t cols = reader.word();
    // A page refuses shapes without elements and dtypes that it does not know before this is
    // called.
    if (item_bytes(dtype) == 0 || rows == 0 || cols == 0) return 0;
    if (std::size_t{rows} * cols * item_bytes(dtype) > std::size_t{1} << 20) return 0;
    const fuzz::Input payload = reader.rest();
    const BlockView block{fuzz::as_bytes(payload).data(),
                          static_cast<std::uint32_t>(payload.size()),
                          encoding,
                          dtype,
                          rows,
                          cols,
                          0};
    try {
        const fuzz::Gapped target = fuzz::decoded(block);
        target.check_gaps(block);
        fuzz::check_round_trip(target, block);
    } catch (const Error& error) {
        fuzz::check_refusal(error);
    }
    return 0;
}
