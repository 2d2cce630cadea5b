// SPDX-License-Identifier: Apache-2.0
// Block encodings.
#include <optional>
#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "encoded.hpp"
#include "pydedup/codec.hpp"

namespace pydedup {
namespace {

py::tuple encode_blocks_of(const Array<std::uint8_t>& data, int dtype, std::size_t block_rows,
                           std::size_t block_cols, const Array<std::int64_t>& indices, bool planes,
                           unsigned threads) {
    const ChosenBlocks chosen = as_chosen(data, dtype, block_rows, block_cols, indices, "indices");
    return encoded_columns(chosen.indices.size(),
                           raw_bytes_of(chosen.matrix, chosen.grid, chosen.indices),
                           [&](std::span<std::byte> bytes, std::span<std::int64_t> starts,
                               std::span<EncodedBlock> encoded) {
                               return encode_blocks(chosen.matrix, chosen.grid, chosen.indices,
                                                    planes, bytes, starts, encoded, threads);
                           });
}

// Factors as Python has them: rank, exponent, those of rows and of columns, and which each block
// has.
using PyFactors = std::tuple<unsigned, int, Array<std::int32_t>, Array<std::int32_t>,
                             Array<std::int64_t>, Array<std::int64_t>>;

class GivenFactors {
  public:
    explicit GivenFactors(const std::optional<PyFactors>& given) {
        if (!given) return;
        const auto& [rank, exponent, rows, cols, row_of, col_of] = *given;
        rows_ = as_copy(rows, "factors.of_rows");
        cols_ = as_copy(cols, "factors.of_cols");
        row_of_ = as_copy(row_of, "factors.row_of");
        col_of_ = as_copy(col_of, "factors.col_of");
        factors_ = {rank, exponent, rows_, cols_, row_of_, col_of_};
    }

    [[nodiscard]] const LowRankFactors* get() const noexcept {
        return factors_ ? &*factors_ : nullptr;
    }

  private:
    std::vector<std::int32_t> rows_;
    std::vector<std::int32_t> cols_;
    std::vector<std::int64_t> row_of_;
    std::vector<std::int64_t> col_of_;
    std::optional<LowRankFactors> factors_;
};

py::tuple encode_deltas_of(const Array<std::uint8_t>& data, int dtype, std::size_t block_rows,
                           std::size_t block_cols, const Array<std::int64_t>& indices,
                           const Array<std::uint8_t>& base_data, int base_dtype,
                           std::size_t base_block_rows, std::size_t base_block_cols,
                           const Array<std::int64_t>& base_indices,
                           const Array<std::int64_t>& limits, std::optional<double> max_rel_error,
                           const std::optional<PyFactors>& factors, bool is_transposed,
                           unsigned threads) {
    const GivenFactors moved_by(factors);
    const ChosenBlocks chosen = as_chosen(data, dtype, block_rows, block_cols, indices, "indices");
    const ChosenBlocks base_blocks = as_chosen(base_data, base_dtype, base_block_rows,
                                               base_block_cols, base_indices, "base_indices");
    const BaseBlocks bases = base_blocks.as_bases();
    const std::vector<std::int64_t> most = as_copy(limits, "limits");
    std::uint64_t room = 0;
    for (const std::int64_t limit : most) {
        if (limit < 0 || limit > INT64_MAX / 2 - static_cast<std::int64_t>(room)) {
            throw Error(ErrorCode::invalid_argument,
                        "limits must not be negative, nor 2**62 bytes in all, got " +
                            std::to_string(limit));
        }
        room += static_cast<std::uint64_t>(limit);
    }
    return encoded_columns(chosen.indices.size(), room,
                           [&](std::span<std::byte> bytes, std::span<std::int64_t> starts,
                               std::span<EncodedBlock> encoded) {
                               return encode_deltas(chosen.matrix, chosen.grid, chosen.indices,
                                                    bases, most, max_rel_error, bytes, starts,
                                                    encoded, threads, moved_by.get(),
                                                    is_transposed);
                           });
}

py::array_t<std::int64_t> estimate_deltas_of(
    const Array<std::uint8_t>& data, int dtype, std::size_t block_rows, std::size_t block_cols,
    const Array<std::int64_t>& indices, const Array<std::uint8_t>& base_data, int base_dtype,
    std::size_t base_block_rows, std::size_t base_block_cols,
    const Array<std::int64_t>& base_indices, std::optional<double> max_rel_error,
    unsigned threads) {
    const ChosenBlocks chosen = as_chosen(data, dtype, block_rows, block_cols, indices, "indices");
    const ChosenBlocks base_blocks = as_chosen(base_data, base_dtype, base_block_rows,
                                               base_block_cols, base_indices, "base_indices");
    const BaseBlocks bases = base_blocks.as_bases();
    py::array_t<std::int64_t> estimates(static_cast<py::ssize_t>(chosen.indices.size()));
    const std::span<std::int64_t> out(estimates.mutable_data(), chosen.indices.size());
    {
        const WithoutGil no_gil;
        estimate_deltas(chosen.matrix, chosen.grid, chosen.indices, bases, max_rel_error, out,
                        threads);
    }
    return estimates;
}

py::array_t<bool> have_factors_of(const Array<std::uint8_t>& arena,
                                  const Array<std::int64_t>& offsets,
                                  const Array<std::int64_t>& lengths,
                                  const Array<std::uint8_t>& encodings) {
    const auto memory = as_span(arena, "arena");
    const auto at = as_span(offsets, "offsets");
    const auto length_of = as_span(lengths, "lengths");
    const auto encoding_of = as_span(encodings, "encodings");
    if (length_of.size() != at.size() || encoding_of.size() != at.size()) {
        throw Error(ErrorCode::invalid_argument, "the columns of encoded blocks differ in length");
    }
    py::array_t<bool> found(static_cast<py::ssize_t>(at.size()));
    bool* const out = found.mutable_data();
    for (std::size_t i = 0; i < at.size(); ++i) {
        const std::span<const std::byte> bytes = encoded_at(memory, at[i], length_of[i], i);
        BlockView block{};
        block.data = bytes.data();
        block.length = static_cast<std::uint32_t>(bytes.size());
        block.encoding = static_cast<Encoding>(encoding_of[i]);
        out[i] = has_factors(block);
    }
    return found;
}

}  // namespace

void bind_codec(py::module_& m) {
    m.def("encode_blocks", &encode_blocks_of, py::arg("data").noconvert(), py::arg("dtype"),
          py::arg("block_rows"), py::arg("block_cols"), py::arg("indices").noconvert(),
          py::arg("planes"), py::arg("threads") = 0);
    m.def("encode_deltas", &encode_deltas_of, py::arg("data").noconvert(), py::arg("dtype"),
          py::arg("block_rows"), py::arg("block_cols"), py::arg("indices").noconvert(),
          py::arg("base_data").noconvert(), py::arg("base_dtype"), py::arg("base_block_rows"),
          py::arg("base_block_cols"), py::arg("base_indices").noconvert(),
          py::arg("limits").noconvert(), py::arg("max_rel_error"),
          py::arg("factors").noconvert() = py::none(), py::arg("is_transposed") = false,
          py::arg("threads") = 0);
    m.def("estimate_deltas", &estimate_deltas_of, py::arg("data").noconvert(), py::arg("dtype"),
          py::arg("block_rows"), py::arg("block_cols"), py::arg("indices").noconvert(),
          py::arg("base_data").noconvert(), py::arg("base_dtype"), py::arg("base_block_rows"),
          py::arg("base_block_cols"), py::arg("base_indices").noconvert(), py::arg("max_rel_error"),
          py::arg("threads") = 0);
    m.def("have_factors", &have_factors_of, py::arg("arena").noconvert(),
          py::arg("offsets").noconvert(), py::arg("lengths").noconvert(),
          py::arg("encodings").noconvert());
}

}  // namespace pydedup
