// SPDX-License-Identifier: Apache-2.0
#include "gemm/activation.hpp"

#include <cmath>
#include <numbers>

#include "base/parallel.hpp"
#include "pydedup/error.hpp"

namespace pydedup {

std::optional<Activation> activation_named(std::string_view name) noexcept {
    if (name == "none") return Activation::none;
    if (name == "relu") return Activation::relu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "silu") return Activation::silu;
    if (name == "sigmoid") return Activation::sigmoid;
    if (name == "tanh") return Activation::tanh;
    return std::nullopt;
}

namespace detail {
namespace {

template <class T, class F>
void apply(T* row, std::size_t count, F f) noexcept {
    for (std::size_t j = 0; j < count; ++j) row[j] = f(row[j]);
}

// Hendrycks and Gimpel 2016, arXiv 1606.08415; the tanh form is their approximation.
template <class T>
T gelu(T v) noexcept {
    return T{0.5} * v * (T{1} + std::erf(v * std::numbers::sqrt2_v<T> / 2));
}

template <class T>
T gelu_tanh(T v) noexcept {
    const T scale = std::numbers::sqrt2_v<T> * std::numbers::inv_sqrtpi_v<T>;  // sqrt(2 / pi)
    return T{0.5} * v * (T{1} + std::tanh(scale * (v + T(0.044715) * v * v * v)));
}

template <class T>
T sigmoid(T v) noexcept {
    return T{1} / (T{1} + std::exp(-v));
}

}  // namespace

template <class T>
void finish_row(T* row, std::size_t count, const T* bias, Activation activation) noexcept {
    if (bias != nullptr) {
        for (std::size_t j = 0; j < count; ++j) row[j] += bias[j];
    }
    switch (activation) {
        case Activation::none:
            return;
        case Activation::relu:  // a NaN is not below 0 and stays
            return apply(row, count, [](T v) noexcept { return v < T{0} ? T{0} : v; });
        case Activation::gelu:
            return apply(row, count, gelu<T>);
        case Activation::gelu_tanh:
            return apply(row, count, gelu_tanh<T>);
        case Activation::silu:
            return apply(row, count, [](T v) noexcept { return v / (T{1} + std::exp(-v)); });
        case Activation::sigmoid:
            return apply(row, count, sigmoid<T>);
        case Activation::tanh:
            return apply(row, count, [](T v) noexcept { return std::tanh(v); });
    }
}

template void finish_row<float>(float*, std::size_t, const float*, Activation) noexcept;
template void finish_row<double>(double*, std::size_t, const double*, Activation) noexcept;

}  // namespace detail

namespace {

// About 100 us of the dearest activation: below, a second thread is not worth making.
constexpr std::size_t kValuesPerPiece = 16384;

template <class T>
void activate_all(T* values, std::size_t count, Activation activation, unsigned threads) {
    parallel_for(count, kValuesPerPiece, thread_count(threads),
                 [&](std::size_t begin, std::size_t end) {
                     detail::finish_row<T>(values + begin, end - begin, nullptr, activation);
                 });
}

}  // namespace

void activate(std::byte* values, Dtype dtype, std::size_t count, Activation activation,
              unsigned threads) {
    switch (dtype) {
        case Dtype::f32:
            return activate_all(reinterpret_cast<float*>(values), count, activation, threads);
        case Dtype::f64:
            return activate_all(reinterpret_cast<double*>(values), count, activation, threads);
        default:
            throw Error(ErrorCode::invalid_argument, "activations take f32 or f64 values");
    }
}

}  // namespace pydedup
