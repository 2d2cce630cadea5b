// SPDX-License-Identifier: Apache-2.0
// Chosen blocks of a matrix, and blocks as they are encoded, as Python has them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pydedup/codec.hpp"

namespace pydedup {

// Blocks of a matrix, whose memory is borrowed.
struct ChosenBlocks {
    MatrixRef matrix;
    BlockGrid grid;
    std::vector<std::int64_t> indices;

    [[nodiscard]] BaseBlocks as_bases() const noexcept { return {matrix, grid, indices}; }
};

inline ChosenBlocks as_chosen(const Array<std::uint8_t>& data, int dtype, std::size_t block_rows,
                              std::size_t block_cols, const Array<std::int64_t>& indices,
                              const char* name) {
    const MatrixRef matrix = as_matrix(data, as_dtype(dtype));
    return {matrix, as_grid(matrix.rows, matrix.cols, block_rows, block_cols),
            as_copy(indices, name)};
}

// Returns what `encode` makes of n blocks: their bytes one after the other, at most `room`, and of
// each its offset there, its length and its encoding.
template <typename Encode>
py::tuple encoded_columns(std::size_t n, std::size_t room, const Encode& encode) {
    py::array_t<std::uint8_t> arena(static_cast<py::ssize_t>(room));
    const auto count = static_cast<py::ssize_t>(n);
    py::array_t<std::int64_t> offsets(count);
    py::array_t<std::int64_t> lengths(count);
    py::array_t<std::uint8_t> encodings(count);
    const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(arena.mutable_data()), room);
    const std::span<std::int64_t> starts(offsets.mutable_data(), n);
    std::int64_t* const length_of = lengths.mutable_data();
    std::uint8_t* const encoding_of = encodings.mutable_data();
    std::size_t used = 0;
    {
        const WithoutGil no_gil;
        std::vector<EncodedBlock> encoded(n);
        used = encode(bytes, starts, encoded);
        for (std::size_t i = 0; i < n; ++i) {
            length_of[i] = encoded[i].length;
            encoding_of[i] = static_cast<std::uint8_t>(encoded[i].encoding);
        }
    }
    arena.resize({static_cast<py::ssize_t>(used)}, false);
    return py::make_tuple(std::move(arena), std::move(offsets), std::move(lengths),
                          std::move(encodings));
}

// Block i as it is encoded.
inline std::span<const std::byte> encoded_at(std::span<const std::uint8_t> arena,
                                             std::int64_t offset, std::int64_t bytes,
                                             std::size_t i) {
    const auto start = static_cast<std::uint64_t>(offset);
    const auto length = static_cast<std::uint64_t>(bytes);
    if (start > arena.size() || length > arena.size() - start || length > UINT32_MAX) {
        throw Error(ErrorCode::invalid_argument,
                    "encoded block " + std::to_string(i) + " lies outside of the arena");
    }
    return std::as_bytes(arena.subspan(start, length));
}

}  // namespace pydedup
