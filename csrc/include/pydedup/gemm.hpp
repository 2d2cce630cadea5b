// SPDX-License-Identifier: Apache-2.0
// Products with a matrix that is never materialised: its blocks arrive in order, each is used where
// it lies in its page (raw) or in a scratch tile of one thread (any other encoding), and forgotten.
// Nothing here is global but the helper threads (base/parallel.hpp), of which a forked child makes
// its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "pydedup/codec.hpp"
#include "pydedup/types.hpp"

namespace pydedup {

/// f64 for weights of f64 and of 32- or 64-bit integers, f32 for all others: the narrower of the
/// two that holds every weight exactly (only 64-bit integers beyond 2^53 are rounded).
[[nodiscard]] Dtype compute_dtype(Dtype weights) noexcept;

enum class Activation : std::uint8_t { none, relu, gelu, gelu_tanh, silu, sigmoid, tanh };

/// The activation of that name; nothing for an unknown one.
[[nodiscard]] std::optional<Activation> activation_named(std::string_view name) noexcept;

/// Applies the activation that a product can end with to `count` values of `dtype` (f32 or f64) by
/// itself, in place. NaN stays NaN. Throws Error{invalid_argument} for another dtype.
void activate(std::byte* values, Dtype dtype, std::size_t count, Activation activation,
              unsigned threads = 0);

/// y = activation(x @ W.T + bias), or x @ W + bias when `transpose`, with W streamed.
///
/// Every element of y is summed by one thread in the order of the blocks: the result depends on
/// neither the number of threads nor how the blocks were dealt out to feed(). It may differ in the
/// last bits between kernels, and between few and many rows of x.
///
/// x, bias and y are in compute_dtype(weights) (x and y may be in bf16), contiguous, and stay alive
/// and, but for y, unchanged until the last block was fed. Not safe between threads; distinct
/// objects are independent.
class Matmul {
  public:
    struct Problem {
        BlockGrid grid;  ///< of W, (out, in) as torch's Linear has it
        Dtype weights;
        const std::byte* x;  ///< m x cols, or m x rows when transpose
        std::size_t m;
        const std::byte* bias;  ///< one element per column of y, or nullptr
        Activation activation;
        bool transpose;
        std::byte* y;      ///< m x rows, or m x cols when transpose; written, not read
        unsigned threads;  ///< 0 = one per core
        /// Of each row of x, whose it is: below kMaxVariants. nullptr when all are of one.
        const std::uint8_t* variants = nullptr;
        /// Of each block that will be fed its place in the grid: ascending, each place at least
        /// once. Empty when each comes once.
        std::span<const std::uint32_t> places = {};
        /// x are bf16 numbers, of a product in f32: the result is that of x as f32.
        bool x_is_bf16 = false;
        /// y takes bf16 numbers, of a product in f32: that product, each number rounded to nearest.
        bool y_is_bf16 = false;
    };
    static constexpr unsigned kMaxVariants = 64;

    explicit Matmul(const Problem& problem);
    ~Matmul();
    Matmul(Matmul&&) noexcept;
    Matmul& operator=(Matmul&&) noexcept;

    /// Takes the next blocks, row-major over the grid or as `places` says. y is complete when all
    /// were fed. `members` is empty, or says of each block who has it: bit v for the rows of
    /// variant v; for all other rows it counts as zeros, whatever it holds. Throws
    /// Error{corrupt_page} when a block has another dtype or shape than the grid says (y is then
    /// undefined), Error{invalid_argument} when there are more blocks than the grid has.
    void feed(std::span<const BlockView> blocks, std::span<const std::uint64_t> members = {});

    /// Blocks fed so far.
    [[nodiscard]] std::size_t fed() const noexcept;

  private:
    class Impl;
    template <class T>
    class Typed;
    std::unique_ptr<Impl> impl_;
};

}  // namespace pydedup
