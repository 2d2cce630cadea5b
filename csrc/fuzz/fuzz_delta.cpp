// SPDX-License-Identifier: Apache-2.0
// Deltas: decode_delta on any bytes and any base of the right shape writes its rectangle and
// nothing else, or refuses. Exact deltas that were encoded here give their block back. Each is also
// decoded behind another copy of itself, whose factors it may so name.
#include <algorithm>
#include <optional>
#include <vector>

#include "decoding.hpp"

namespace pydedup::fuzz {
namespace {

// The base of an input: it cannot choose its bytes, only how many of its bits vary.
std::vector<std::byte> base_values(std::size_t bytes, std::uint8_t kind) {
    Random random;
    std::vector<std::byte> values(bytes);
    for (std::size_t i = 0; i < bytes; ++i) {
        const bool high = i % 4 >= 2;  // of f32: sign, exponent and the top of the mantissa
        values[i] = static_cast<std::byte>(high && kind % 4 != 0
                                               ? 0x3C + random.next() % (1U + kind / 8U)
                                               : random.next() % (kind % 4 == 1 ? 1U : 256U));
    }
    return values;
}

Input seed_of(Dtype dtype, std::uint8_t rows, std::uint8_t cols, std::uint8_t kind,
              std::optional<double> max_error, bool pruned, bool factored, bool transposed) {
    const std::size_t bytes = std::size_t{rows} * cols * item_bytes(dtype);
    const std::vector<std::byte> base = base_values(bytes, kind);
    const std::size_t item = item_bytes(dtype);
    std::vector<std::byte> values = base;
    for (std::size_t i = 0; transposed && i < std::size_t{rows} * cols; ++i) {
        const std::size_t from = i % cols * rows + i / cols;
        std::copy_n(base.begin() + static_cast<std::ptrdiff_t>(from * item), item,
                    values.begin() + static_cast<std::ptrdiff_t>(i * item));
    }
    Random random;
    for (std::size_t i = 0; i < bytes; i += item) {
        if (random.next() % 3 != 0) values[i] ^= static_cast<std::byte>(random.next() % 64);
        if (pruned && random.next() % 2 != 0) {
            std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(i), item, std::byte{0});
        }
        // What only bf16 has, saved in f32.
        if (pruned && kind == 18 && dtype == Dtype::f32) values[i] = values[i + 1] = std::byte{0};
    }
    const std::size_t stride = cols * item;
    std::vector<std::byte> encoded(bytes);
    const MatrixRef block{values.data(), rows, cols, stride, dtype};
    const std::uint32_t base_rows = transposed ? cols : rows;
    const std::uint32_t base_cols = transposed ? rows : cols;
    const MatrixRef of{base.data(), base_rows, base_cols, base_cols * item, dtype};
    const std::optional<EncodedBlock> delta =
        factored || transposed ? encode_moved(block, of, max_error, encoded, factored, transposed)
                               : encode_delta(block, of, max_error, encoded);
    if (!delta) return {};
    if (delta->encoding == Encoding::delta) {
        std::vector<std::byte> back(bytes);
        decode_delta({encoded.data(), delta->length, delta->encoding, dtype, rows, cols, 1},
                     {base.data(), static_cast<std::uint32_t>(bytes), Encoding::raw, dtype,
                      base_rows, base_cols, 0},
                     back.data(), stride);
        require(back == values, "an exact delta gives its block back");
    }
    const auto code = static_cast<std::uint8_t>(dtype);
    Input input{static_cast<std::uint8_t>(delta->encoding), code, code, kind, rows, 0, cols, 0};
    append(input, {encoded.data(), delta->length});
    return input;
}

std::vector<std::byte> decode(const BlockView& delta, const BlockView& base) {
    Gapped target(delta);
    decode_delta(delta, base, target.memory.data(), target.stride);
    target.check_gaps(delta);
    return target.memory;
}

// Decodes a delta behind a copy of it, and then by itself, with the factors that it names there.
void decode_behind_itself(const Input& payload, BlockView delta, const BlockView& base) {
    std::vector<std::byte> twice(2 * payload.size());
    std::copy_n(delta.data, payload.size(), twice.begin());
    std::copy_n(delta.data, payload.size(),
                twice.begin() + static_cast<std::ptrdiff_t>(payload.size()));
    delta.data = twice.data() + payload.size();
    delta.before = static_cast<std::uint32_t>(payload.size());
    const std::vector<std::byte> alone = copy_alone(delta);
    const std::vector<std::byte> content = decode(delta, base);
    delta.data = alone.data();
    delta.length = static_cast<std::uint32_t>(alone.size());
    delta.before = 0;
    require(decode(delta, base) == content, "a delta with its factors is the same");
}

}  // namespace

std::vector<Input> seeds() {
    std::vector<Input> made;
    for (const Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::i8,
                              Dtype::i32, Dtype::u64, Dtype::f8_e4m3}) {
        for (const std::uint8_t kind : {std::uint8_t{0}, std::uint8_t{1}, std::uint8_t{18}}) {
            for (const double error : {0.0, 0.01, 0.2}) {
                for (const auto& [pruned, factored] :
                     {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
                    if (factored && (dtype > Dtype::bf16 || kind == 0)) continue;
                    const auto bound = error > 0 ? std::optional<double>(error) : std::nullopt;
                    for (const bool transposed : {false, true}) {
                        Input input =
                            seed_of(dtype, 16, 20, kind, bound, pruned, factored, transposed);
                        if (!input.empty()) made.push_back(std::move(input));
                    }
                }
            }
        }
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup;
    fuzz::Reader reader(data, size);
    const auto encoding = static_cast<Encoding>(reader.byte());
    const auto dtype = static_cast<Dtype>(reader.byte());
    const auto base_dtype = static_cast<Dtype>(reader.byte());
    const std::uint8_t kind = reader.byte();
    const std::uint32_t rows = reader.word();
    const std::uint32_t cols = reader.word();
    // A page refuses these before this is called.
    if (item_bytes(dtype) == 0 || item_bytes(base_dtype) == 0 || rows == 0 || cols == 0) return 0;
    if (std::size_t{rows} * cols > std::size_t{1} << 16) return 0;
    const fuzz::Input payload = reader.rest();
    const std::vector<std::byte> values =
        fuzz::base_values(std::size_t{rows} * cols * item_bytes(base_dtype), kind);
    const BlockView delta{fuzz::as_bytes(payload).data(),
                          static_cast<std::uint32_t>(payload.size()),
                          encoding,
                          dtype,
                          rows,
                          cols,
                          1};
    const bool transposed = !payload.empty() && payload[0] == 4;  // by its version
    const BlockView base{values.data(),
                         static_cast<std::uint32_t>(values.size()),
                         Encoding::raw,
                         base_dtype,
                         transposed ? cols : rows,
                         transposed ? rows : cols,
                         0};
    for (const bool behind : {false, true}) {
        try {
            if (behind) {
                fuzz::decode_behind_itself(payload, delta, base);
            } else {
                static_cast<void>(fuzz::decode(delta, base));
            }
        } catch (const Error& error) {
            fuzz::check_refusal(error);
        }
    }
    return 0;
}
