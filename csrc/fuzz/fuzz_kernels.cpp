// SPDX-License-Identifier: Apache-2.0
// The same bytes to every kernel that this machine runs: what is persisted must come out alike.
// Hashes of any shape and stride, byte planes there and back, Huffman tables and streams that
// nobody encoded, and differences of any bits.
#include <cmath>
#include <tuple>

#include "codec/delta_model.hpp"
#include "codec/huffman.hpp"
#include "dispatch/cpu_features.hpp"
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
        // That of other CPUs, with PDEP or without.
        if (cpu_features().avx2) made.push_back(avx2_kernels(!cpu_features().slow_bit_deposit));
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

constexpr Dtype kDeltaDtypes[] = {Dtype::f64, Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f8_e4m3,
                                  Dtype::i64, Dtype::i32, Dtype::i16, Dtype::u8};

// Differences of y to x, exact ones there and back, and what the base says about them.
void exact_deltas(DeltaLayout layout, const std::uint8_t* x, const std::uint8_t* y,
                  std::size_t count, unsigned shift, std::uint32_t reference) {
    const std::size_t item = layout.item_bytes;
    const bool wide = item == 8;
    Input z(count * (wide ? 8 : 4));
    tables().front()->codec.delta.subtract(y, x, count, layout, z.data());
    all_alike("subtract", [&](const KernelTable& table) {
        Input out(z.size());
        table.codec.delta.subtract(y, x, count, layout, out.data());
        return out;
    });
    all_alike("add", [&](const KernelTable& table) {
        Input whole(count * item);
        table.codec.delta.add(x, z.data(), count, layout, 0, whole.data());
        require(std::memcmp(whole.data(), y, whole.size()) == 0, "adding undoes subtracting");
        Input shifted(count * item);
        table.codec.delta.add(x, z.data(), count, layout, shift, shifted.data());
        return shifted;
    });
    // Element by element, which no vector has a part in.
    const DeltaKernels& alone = tables().front()->codec.delta;
    const std::size_t z_item = wide ? 8 : 4;
    Input classes(count);
    std::uint64_t all = 0;
    for (std::size_t i = 0; i < count; ++i) {
        all |= alone.classify(z.data() + i * z_item, 1, wide, classes.data() + i);
    }
    all_alike("classify", [&](const KernelTable& table) {
        Input out(count);
        require(table.codec.delta.classify(z.data(), count, wide, out.data()) == all,
                "all differences");
        require(out == classes, "classes are those of single elements");
        return out;
    });
    detail::Alphabet alphabet;
    alphabet.set_classes(0, wide ? 128 : 64);
    all_alike("raw bits", [&](const KernelTable& table) {
        Input raw(8 * count + 16);
        raw.resize(static_cast<std::size_t>(
            table.codec.delta.write_raw(z.data(), classes.data(), count, wide,
                                        alphabet.widths.data(), raw.data()) -
            raw.data()));
        raw.shrink_to_fit();
        Input back(z.size());
        table.codec.delta.read_raw(raw.data(), raw.size(), classes.data(), count, wide,
                                   alphabet.bases.data(), alphabet.widths.data(), back.data());
        require(back == z, "raw bits come back");
        return raw;
    });
    if (layout.mantissa_bits == 0) return;
    const std::uint8_t first[] = {0, 1, 7, 128, 255};
    all_alike("features", [&](const KernelTable& table) {
        const DeltaKernels& delta = table.codec.delta;
        Input exponents(count);
        Input mantissas(count);
        Input contexts(count);
        delta.exponents(x, count, layout, reference, exponents.data());
        delta.mantissas(x, count, layout, mantissas.data());
        delta.map_features(mantissas.data(), count, first, 5, 3, contexts.data());
        return std::tuple(exponents, mantissas, contexts);
    });
}

template <class Float>
void quantised_deltas(const Float* x, const Float* y, std::size_t count, double step) {
    constexpr bool kWide = sizeof(Float) == 8;
    const DeltaKernels& alone = tables().front()->codec.delta;
    std::vector<std::uint32_t> z(count);
    std::vector<Float> values(count);
    double lane[kErrorLanes];
    bool good = true;
    for (std::size_t i = 0; i < count; ++i) {
        good &= alone.quantise(y + i, x + i, 1, kWide, step, &z[i], lane);
        alone.dequantise(x + i, &z[i], 1, kWide, step, &values[i]);
    }
    all_alike("errors", [&](const KernelTable& table) {
        const DeltaKernels& delta = table.codec.delta;
        std::vector<std::uint32_t> found(count);
        std::vector<double> lanes(kErrorLanes);
        std::vector<double> only(kErrorLanes);
        const bool is_good = delta.quantise(y, x, count, kWide, step, found.data(), lanes.data());
        require(is_good == good, "whether all can be quantised");
        require(found == z, "quantised differences are those of single elements");
        require(delta.quantise(y, x, count, kWide, step, nullptr, only.data()) == good,
                "whether all could be quantised");
        std::vector<Float> back(count);
        delta.dequantise(x, z.data(), count, kWide, step, back.data());
        require(std::memcmp(back.data(), values.data(), count * sizeof(Float)) == 0,
                "values are those of single elements");
        if (!good) return std::vector<double>();  // any NaN
        require(lanes == only, "errors of what is stored");
        return lanes;
    });
}

void deltas(Reader& reader) {
    const Dtype dtype = kDeltaDtypes[reader.byte() % std::size(kDeltaDtypes)];
    const DeltaLayout layout = detail::delta_layout(dtype);
    const std::size_t item = layout.item_bytes;
    const auto shift = static_cast<unsigned>(reader.byte() % (8 * item));
    const std::uint32_t reference = reader.word();
    const double step = std::ldexp(256 + reader.byte(), reader.byte() % 100 - 68);
    const Input data = reader.rest();
    const std::size_t count = data.size() / (2 * item);
    if (count == 0) return;
    const std::uint8_t* const x = data.data();
    const std::uint8_t* const y = x + count * item;
    exact_deltas(layout, x, y, count, shift, reference);
    if (dtype == Dtype::f64) {
        quantised_deltas(reinterpret_cast<const double*>(x), reinterpret_cast<const double*>(y),
                         count, step);
    } else if (dtype == Dtype::f32) {
        quantised_deltas(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(y),
                         count, step);
    }
}

template <class Float>
Input delta_seed(std::uint8_t dtype, std::size_t count) {
    Random random;
    std::vector<Float> elements(2 * count);
    for (std::size_t i = 0; i < count; ++i) {
        const auto number = [&] { return static_cast<Float>(random.next() % 2048) - 1024; };
        elements[i] = number() / 8192;
        elements[count + i] = i % 19 == 0 ? 0 : elements[i] + number() / (1 << 21);
    }
    Input input{3, dtype, 5, 126, 0, 17, 51};  // a step of about 2^-9
    append(input, std::as_bytes(std::span(elements)));
    return input;
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
    for (const std::size_t count : {16U, 300U, 1000U}) {
        made.push_back(delta_seed<double>(0, count));
        for (const std::uint8_t dtype : {1, 2, 3, 4, 6, 7, 8}) {
            made.push_back(delta_seed<float>(dtype, count));
        }
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup::fuzz;
    Reader reader(data, size);
    switch (reader.byte() % 4) {
        case 0:
            hashes(reader);
            break;
        case 1:
            planes(reader);
            break;
        case 2:
            huffman(reader);
            break;
        default:
            deltas(reader);
    }
    return 0;
}
