// SPDX-License-Identifier: Apache-2.0
// Blocks to bytes and back: the frame of the `planes` encoding around planes. A block which is
// better kept raw costs no more than counting.
#include "pydedup/codec.hpp"

#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "base/block_index.hpp"
#include "base/endian.hpp"
#include "base/parallel.hpp"
#include "base/rounding.hpp"
#include "codec/arena.hpp"
#include "codec/plane.hpp"
#include "dispatch/dispatch.hpp"
#include "pydedup/error.hpp"

namespace pydedup {
namespace {

constexpr std::size_t kMaxPlanes = 8;
// Threads are worth starting for a few milliseconds of work; pieces of about a hundred microseconds
// keep them evenly busy.
constexpr std::size_t kParallelBytes = 2 * 1024 * 1024;
constexpr std::size_t kParallelGrain = 16;
constexpr std::size_t kFrameBytes = 8;

std::size_t frame_bytes(std::size_t n_planes) noexcept {
    return kFrameBytes + n_planes * detail::kPlaneHeaderBytes;
}

// Floats of more than a byte are rotated, so that the sign does not split the exponent.
constexpr bool is_rotated(Dtype dtype) noexcept {
    return dtype == Dtype::f64 || dtype == Dtype::f32 || dtype == Dtype::f16 ||
           dtype == Dtype::bf16;
}

// Memory for the planes of one block; blocks of usual size reuse one piece per thread.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes) {
        if (bytes > kKept) {
            own_ = std::make_unique_for_overwrite<std::uint8_t[]>(bytes);
            data_ = own_.get();
            return;
        }
        thread_local std::unique_ptr<std::uint8_t[]> kept;
        if (!kept) kept = std::make_unique_for_overwrite<std::uint8_t[]>(kKept);
        data_ = kept.get();
    }
    [[nodiscard]] std::uint8_t* data() const noexcept { return data_; }

  private:
    static constexpr std::size_t kKept = 128 * 1024;
    std::unique_ptr<std::uint8_t[]> own_;
    std::uint8_t* data_ = nullptr;
};

const std::uint8_t* bytes_at(const std::byte* at) noexcept {
    return reinterpret_cast<const std::uint8_t*>(at);
}

std::uint8_t* bytes_at(std::byte* at) noexcept { return reinterpret_cast<std::uint8_t*>(at); }

void copy_rows(const std::byte* from, std::size_t from_stride, std::size_t rows,
               std::size_t row_bytes, std::byte* to, std::size_t to_stride) noexcept {
    if (from_stride == row_bytes && to_stride == row_bytes) {
        std::memcpy(to, from, rows * row_bytes);
        return;
    }
    for (std::size_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * to_stride, from + r * from_stride, row_bytes);
    }
}

// Returns the length, or 0 when planes do not save enough.
std::uint32_t encode_planes(const MatrixRef& block, std::span<std::byte> out) {
    const std::size_t count = block.rows * block.cols;
    const std::size_t n_planes = item_bytes(block.dtype);
    const Scratch scratch(count * n_planes);
    kernels().codec.split_planes(bytes_at(block.data), block.stride_bytes, block.rows, block.cols,
                                 n_planes, is_rotated(block.dtype), scratch.data());
    std::array<detail::PlanePlan, kMaxPlanes> plans;
    std::size_t total = frame_bytes(n_planes);
    for (std::size_t p = 0; p < n_planes; ++p) {
        detail::plan_plane({scratch.data() + p * count, count}, plans[p]);
        total += plans[p].length;
    }
    const std::size_t raw = count * n_planes;
    if (total > detail::worth_it(raw)) return 0;

    std::byte* const frame = out.data();
    frame[0] = std::byte{kPlanesVersion};
    frame[1] = static_cast<std::byte>(n_planes);
    frame[2] = static_cast<std::byte>(is_rotated(block.dtype));
    frame[3] = std::byte{0};
    store_le(frame + 4, static_cast<std::uint32_t>(count));
    std::uint8_t* head = bytes_at(frame) + kFrameBytes;
    std::size_t at = frame_bytes(n_planes);
    for (std::size_t p = n_planes; p-- > 0; head += detail::kPlaneHeaderBytes) {
        detail::put_plane_header(plans[p], head);
        detail::put_plane({scratch.data() + p * count, count}, plans[p],
                          {bytes_at(out.data()) + at, out.size() - at});
        at += plans[p].length;
    }
    return static_cast<std::uint32_t>(at);
}

[[noreturn]] void corrupt(const BlockView& block, const std::string& what) {
    throw Error(ErrorCode::corrupt_page, "a block of " + std::to_string(block.rows) + " x " +
                                             std::to_string(block.cols) +
                                             " does not decode: " + what);
}

void decode_planes(const BlockView& block, std::byte* dst, std::size_t dst_stride) {
    const std::size_t count = std::size_t{block.rows} * block.cols;
    const std::size_t n_planes = item_bytes(block.dtype);
    if (block.length < frame_bytes(n_planes)) corrupt(block, "it is shorter than its header");
    const std::byte* const frame = block.data;
    if (const auto version = static_cast<unsigned>(frame[0]); version > kPlanesVersion) {
        throw Error(ErrorCode::unsupported_format,
                    "a block has version " + std::to_string(version) + " of the planes encoding, " +
                        "this pydedup reads up to " + std::to_string(kPlanesVersion) +
                        "; use a newer pydedup");
    }
    if (frame[0] != std::byte{kPlanesVersion} || frame[1] != static_cast<std::byte>(n_planes) ||
        frame[2] != static_cast<std::byte>(is_rotated(block.dtype)) || frame[3] != std::byte{0} ||
        load_le<std::uint32_t>(frame + 4) != count) {
        corrupt(block, "its header does not fit its dtype and shape");
    }
    const Scratch scratch(count * n_planes);
    const CodecKernels& codec = kernels().codec;
    std::array<const std::uint8_t*, kMaxPlanes> planes{};
    const std::uint8_t* head = bytes_at(frame) + kFrameBytes;
    std::span<const std::uint8_t> rest(bytes_at(frame), block.length);
    const std::uint8_t* const end = rest.data() + rest.size();
    rest = rest.subspan(frame_bytes(n_planes));
    for (std::size_t p = n_planes; p-- > 0; head += detail::kPlaneHeaderBytes) {
        detail::ReadPlane plane;
        const char* wrong =
            detail::get_plane(head, rest, end, codec, {scratch.data() + p * count, count}, plane);
        if (wrong != nullptr) corrupt(block, wrong);
        planes[p] = plane.bytes;
        rest = rest.subspan(plane.length);
    }
    if (!rest.empty()) corrupt(block, "bytes are left over");
    codec.merge_planes(planes.data(), block.rows, block.cols, n_planes, is_rotated(block.dtype),
                       bytes_at(dst), dst_stride);
}

}  // namespace

EncodedBlock encode_block(const MatrixRef& block, bool planes, std::span<std::byte> out) {
    const std::size_t row_bytes = block.cols * item_bytes(block.dtype);
    const std::size_t raw = block.rows * row_bytes;
    if (raw == 0 || block.rows > UINT32_MAX || block.cols > UINT32_MAX || raw > UINT32_MAX ||
        raw / block.rows != row_bytes) {
        throw Error(ErrorCode::invalid_argument,
                    "a block of " + std::to_string(block.rows) + " x " +
                        std::to_string(block.cols) +
                        " elements cannot be stored: it must have an element and stay below 4 GiB");
    }
    if (out.size() < raw) {
        throw Error(ErrorCode::invalid_argument, "there is no room for the raw bytes of a block");
    }
    if (planes) {
        if (const std::uint32_t length = encode_planes(block, out.first(raw)); length != 0) {
            return {Encoding::planes, length};
        }
    }
    copy_rows(block.data, block.stride_bytes, block.rows, row_bytes, out.data(), row_bytes);
    return {Encoding::raw, static_cast<std::uint32_t>(raw)};
}

void decode_block(const BlockView& block, std::byte* dst, std::size_t dst_stride_bytes) {
    const std::size_t item = item_bytes(block.dtype);
    const std::uint64_t count = std::uint64_t{block.rows} * block.cols;
    if (item == 0 || count == 0 || count > UINT32_MAX / item) {
        corrupt(block, "its dtype or shape is impossible");
    }
    if (dst_stride_bytes < block.row_bytes()) {
        throw Error(ErrorCode::invalid_argument, "a block's rows do not fit the given stride");
    }
    switch (block.encoding) {
        case Encoding::raw:
            if (block.length != count * item) corrupt(block, "its length is not that of its shape");
            copy_rows(block.data, block.row_bytes(), block.rows, block.row_bytes(), dst,
                      dst_stride_bytes);
            return;
        case Encoding::planes:
            decode_planes(block, dst, dst_stride_bytes);
            break;
        case Encoding::delta:
        case Encoding::quantised:
            if (block.base_block == nullptr) {
                corrupt(block, "it is a delta, and came without its base");
            }
            decode_delta(block, *block.base_block, dst, dst_stride_bytes);
            break;
        default:
            corrupt(block, "encoding " + std::to_string(static_cast<unsigned>(block.encoding)) +
                               " is unknown");
    }
    if (block.keeper != nullptr) block.keeper->keep(block, dst, dst_stride_bytes);
}

std::size_t raw_bytes_of(const MatrixRef& matrix, const BlockGrid& grid,
                         std::span<const std::int64_t> indices) {
    const std::size_t n_blocks = grid.count();
    std::size_t total = 0;
    for (const std::int64_t index : indices) {
        detail::check_block_index(index, n_blocks);
        const BlockRect rect = block_rect(grid, static_cast<std::size_t>(index));
        total += rect.rows * rect.cols * item_bytes(matrix.dtype);
    }
    return total;
}

std::size_t encode_blocks(const MatrixRef& matrix, const BlockGrid& grid,
                          std::span<const std::int64_t> indices, bool planes,
                          std::span<std::byte> arena, std::span<std::int64_t> offsets,
                          std::span<EncodedBlock> encoded, unsigned threads) {
    const std::size_t total = raw_bytes_of(matrix, grid, indices);
    if (arena.size() < total || offsets.size() != indices.size() ||
        encoded.size() != indices.size()) {
        throw Error(ErrorCode::invalid_argument, "encode_blocks was given results of a wrong size");
    }
    const auto block_at = [&](std::size_t i) {
        return block_of(matrix, grid, static_cast<std::size_t>(indices[i]));
    };
    const auto raw_bytes = [](const MatrixRef& block) {
        return block.rows * block.cols * item_bytes(block.dtype);
    };
    std::size_t at = 0;
    for (std::size_t i = 0; i < indices.size(); ++i) {
        offsets[i] = static_cast<std::int64_t>(at);
        at += raw_bytes(block_at(i));
    }
    // Each block first goes where it would begin if all were raw, so that threads need not wait for
    // each other's lengths.
    const unsigned workers = thread_count(threads, total, kParallelBytes);
    parallel_for(indices.size(), kParallelGrain, workers, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
            const MatrixRef block = block_at(i);
            encoded[i] =
                encode_block(block, planes,
                             arena.subspan(static_cast<std::size_t>(offsets[i]), raw_bytes(block)));
        }
    });
    return detail::close_gaps(arena, encoded, offsets);
}

}  // namespace pydedup
