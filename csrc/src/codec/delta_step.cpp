// SPDX-License-Identifier: Apache-2.0
// With steps that are small against the differences, the squared error is count * step^2 / 12; with
// larger ones it grows more slowly. So steps are corrected by the square root of what is missing,
// which settles in a few rounds, and kept between the steps known to be good and bad. Errors are
// sums of a fixed order (kErrorLanes), square roots and divisions are exact to the last bit in
// IEEE arithmetic: every machine finds the same step.
#include "codec/delta_step.hpp"

#include <array>
#include <cmath>
#include <limits>

#include "codec/convert.hpp"

namespace pydedup::detail {
namespace {

constexpr int kMaxRounds = 16;
constexpr double kCloseEnough = 0.995;  // of the allowed squared error
constexpr double kAim = 0.9985;
// Whoever sums the squares in another order must come to the same verdict.
constexpr double kSafety = 1.0 - 1e-9;

double sum_lanes(const std::array<double, kErrorLanes>& lanes) noexcept {
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
}

template <class Float>
double squared_norm(const Float* values, std::size_t count) noexcept {
    std::array<double, kErrorLanes> lanes{};
    std::size_t i = 0;
    for (; i + kErrorLanes <= count; i += kErrorLanes) {
        for (std::size_t k = 0; k < kErrorLanes; ++k) {
            const auto value = static_cast<double>(values[i + k]);
            lanes[k] += value * value;
        }
    }
    for (std::size_t k = 0; i < count; ++i, ++k) {
        const auto value = static_cast<double>(values[i]);
        lanes[k] += value * value;
    }
    return sum_lanes(lanes);
}

template <class Float>
double squared_distance(const Float* a, const Float* b, std::size_t count) noexcept {
    std::array<double, kErrorLanes> lanes{};
    for (std::size_t i = 0; i < count; ++i) {
        const double error = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        lanes[i % kErrorLanes] += error * error;
    }
    return sum_lanes(lanes);
}

// Measures steps; the memory for what decoding gives is made when it is first needed.
class Trial {
  public:
    Trial(const Values& block, const Values& base, const CodecKernels& codec, std::uint32_t* z)
        : block_(block), base_(base), codec_(codec), z_(z) {}

    // The squared error of a step, +inf when it cannot be used. f16 and bf16 are measured after
    // rounding, which is most of their error.
    double error_of(double step) {
        if (block_.dtype() != Dtype::f16 && block_.dtype() != Dtype::bf16) {
            return quantise(step, nullptr);
        }
        return decoded_error(step);
    }

    // The squared error of what decoding gives for z; z is left as it will be encoded.
    double decoded_error(double step) {
        const std::size_t count = block_.count();
        if (!decoded_) {
            decoded_ = std::make_unique_for_overwrite<double[]>(count);
            elements_ = std::make_unique_for_overwrite<std::uint8_t[]>(count * 8);
        }
        if (!std::isfinite(quantise(step, z_))) return kBad;
        dequantise(base_, z_, step, codec_, decoded_.get(), elements_.get());
        if (block_.wide()) {
            return squared_distance(static_cast<const double*>(block_.data()), decoded_.get(),
                                    count);
        }
        auto* const narrow = reinterpret_cast<float*>(decoded_.get());
        convert_floats(elements_.get(), block_.dtype(), count,
                       reinterpret_cast<std::uint8_t*>(narrow), Dtype::f32);
        return squared_distance(static_cast<const float*>(block_.data()), narrow, count);
    }

    static constexpr double kBad = std::numeric_limits<double>::infinity();

  private:
    double quantise(double step, std::uint32_t* z) {
        std::array<double, kErrorLanes> lanes{};
        const bool good = codec_.delta.quantise(block_.data(), base_.data(), block_.count(),
                                                block_.wide(), step, z, lanes.data());
        return good ? sum_lanes(lanes) : kBad;
    }

    const Values& block_;
    const Values& base_;
    const CodecKernels& codec_;
    std::uint32_t* z_;
    std::unique_ptr<double[]> decoded_;
    std::unique_ptr<std::uint8_t[]> elements_;
};

}  // namespace

Values::Values(const std::uint8_t* elements, std::size_t count, Dtype dtype)
    : data_(elements), count_(count), dtype_(dtype) {
    const std::size_t item = wide() ? 8 : 4;
    if (item_bytes(dtype) == item && reinterpret_cast<std::uintptr_t>(elements) % item == 0) return;
    widened_ = std::make_unique_for_overwrite<std::uint8_t[]>(count * item);
    convert_floats(elements, dtype, count, widened_.get(), wide() ? Dtype::f64 : Dtype::f32);
    data_ = widened_.get();
}

bool can_quantise(Dtype dtype) noexcept { return converts(dtype, Dtype::f32); }

void dequantise(const Values& base, const std::uint32_t* z, double step, const CodecKernels& codec,
                void* values, std::uint8_t* elements) {
    codec.delta.dequantise(base.data(), z, base.count(), base.wide(), step, values);
    convert_floats(static_cast<const std::uint8_t*>(values), base.wide() ? Dtype::f64 : Dtype::f32,
                   base.count(), elements, base.dtype());
}

std::optional<double> find_step(const Values& block, const Values& base, double max_rel_error,
                                const CodecKernels& codec, std::uint32_t* z) {
    const std::size_t count = block.count();
    const double norm = block.wide() ? squared_norm(static_cast<const double*>(block.data()), count)
                                     : squared_norm(static_cast<const float*>(block.data()), count);
    const double allowed = max_rel_error * max_rel_error * norm * kSafety;
    if (!(allowed > 0) || !std::isfinite(allowed)) return std::nullopt;
    const auto rounded = [&](double step) {
        return block.wide() ? step : static_cast<double>(static_cast<float>(step));
    };
    const auto usable = [&](double step) {  // so that its reciprocal is a normal number too
        return step > (block.wide() ? 1e-300 : 1e-36) && step < (block.wide() ? 1e300 : 1e36);
    };
    Trial trial(block, base, codec, z);
    double good = 0;
    double bad = std::numeric_limits<double>::infinity();
    double step = rounded(std::sqrt(12.0 * allowed / static_cast<double>(count)));
    for (int round = 0; round < kMaxRounds && usable(step); ++round) {
        const double error = trial.error_of(step);
        if (error <= allowed) {
            good = step;
            if (error >= kCloseEnough * allowed) break;
        } else {
            bad = step;
        }
        double next = step * 0.5;
        if (std::isfinite(error)) {
            next = error > 0 ? step * std::sqrt(kAim * allowed / error) : step * 4;
        } else if (good == 0 && bad == step) {
            next = step * 4;  // too many levels, or not finite: larger steps decide which
            bad = std::numeric_limits<double>::infinity();
        }
        if (!(next > good && next < bad)) {
            if (good == 0 || !std::isfinite(bad)) {
                next = good == 0 ? bad * 0.5 : good * 2;
            } else {
                next = 0.5 * (good + bad);
            }
        }
        next = rounded(next);
        if (next == step || next == good || next == bad) break;
        step = next;
    }
    // Far steps keep every difference: all q are 0, and the largest step is as good as any.
    for (int round = 0; round < 4 && usable(good); ++round) {
        if (trial.decoded_error(good) <= allowed) return good;
        good = rounded(good * 0.999);
    }
    return std::nullopt;
}

}  // namespace pydedup::detail
