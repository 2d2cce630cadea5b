// SPDX-License-Identifier: Apache-2.0
// The serialised index (docs/format.md, "Similarity index"). Bands are not in it: they follow from
// the sketches. Reading trusts nothing, whatever the checksum says.
#include <bit>
#include <cmath>
#include <cstring>

#include "base/endian.hpp"
#include "pydedup/hash.hpp"
#include "similarity/batch.hpp"
#include "similarity/index.hpp"

namespace pydedup {
namespace {

using similarity::IndexState;
using similarity::kNone;
using similarity::Probe;

constexpr char kMagic[4] = {'P', 'D', 'L', 'S'};
constexpr std::size_t kHeaderBytes = 96;
constexpr std::size_t kSummed = 24;  // the checksum is of the bytes from here on

[[noreturn]] void corrupt(const std::string& what) {
    throw Error(ErrorCode::corrupt_page, "a similarity index is damaged: " + what);
}

Digest checksum_of(Bytes bytes) {
    return hash_bytes(bytes.subspan(kSummed), load_le<std::uint64_t>(bytes.data()));
}

class Writer {
  public:
    template <class T>
    void put(T value) {
        const std::size_t at = out_.size();
        out_.resize(at + sizeof value);
        store_le(out_.data() + at, value);
    }
    void put_bytes(const void* from, std::size_t count) {
        const auto* bytes = static_cast<const std::byte*>(from);
        out_.insert(out_.end(), bytes, bytes + count);
    }
    // Seven bits a byte, lowest first; the highest bit says that more follow.
    void put_varint(std::uint64_t value) {
        for (; value >= 0x80; value >>= 7) put(static_cast<std::uint8_t>(value | 0x80));
        put(static_cast<std::uint8_t>(value));
    }
    void put_id(std::int64_t id) {
        const auto step = static_cast<std::uint64_t>(id) - static_cast<std::uint64_t>(last_);
        put_varint((step << 1) ^ (0 - (step >> 63)));
        last_ = id;
    }
    void reserve(std::size_t bytes) { out_.reserve(bytes); }
    [[nodiscard]] std::vector<std::byte>& bytes() noexcept { return out_; }

  private:
    std::vector<std::byte> out_;
    std::int64_t last_ = 0;
};

class Reader {
  public:
    explicit Reader(Bytes bytes) : bytes_(bytes) {}

    template <class T>
    T get() {
        return load_le<T>(take(sizeof(T)).data());
    }
    Bytes take(std::size_t count) {
        if (count > bytes_.size() - at_) corrupt("it ends too early");
        at_ += count;
        return bytes_.subspan(at_ - count, count);
    }
    std::uint64_t get_varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const auto byte = std::to_integer<std::uint64_t>(take(1)[0]);
            if (shift == 63 && byte > 1) break;
            value |= (byte & 0x7F) << shift;
            if (byte < 0x80) {
                if (byte == 0 && shift != 0) break;  // a longer form than needed
                return value;
            }
        }
        corrupt("a number is not in its shortest form");
    }
    std::int64_t get_id() {
        const std::uint64_t coded = get_varint();
        const std::uint64_t step = (coded >> 1) ^ (0 - (coded & 1));
        last_ = static_cast<std::int64_t>(static_cast<std::uint64_t>(last_) + step);
        return last_;
    }
    [[nodiscard]] std::size_t left() const noexcept { return bytes_.size() - at_; }

  private:
    Bytes bytes_;
    std::size_t at_ = 0;
    std::int64_t last_ = 0;
};

struct Header {
    LshParameters parameters;
    std::size_t groups, members, others;
    std::size_t projections;
};

Header read_header(Bytes bytes) {
    if (bytes.size() < kHeaderBytes) corrupt("it is shorter than its header");
    Reader in(bytes);
    if (std::memcmp(in.take(4).data(), kMagic, 4) != 0) corrupt("it does not begin with PDLS");
    const auto version = in.get<std::uint16_t>();
    if (version > kSimilarityVersion) {
        throw Error(ErrorCode::unsupported_format,
                    "a similarity index has version " + std::to_string(version) +
                        "; this pydedup reads up to " + std::to_string(kSimilarityVersion));
    }
    if (version != kSimilarityVersion || in.get<std::uint16_t>() != kHeaderBytes) {
        corrupt("its header is no header");
    }
    const Digest digest{in.get<std::uint64_t>(), in.get<std::uint64_t>()};
    if (in.get<std::uint64_t>() != bytes.size()) corrupt("its length is not the stated one");
    if (checksum_of(bytes) != digest) corrupt("its checksum does not match");
    Header header{};
    header.parameters.r = std::bit_cast<double>(in.get<std::uint64_t>());
    header.parameters.seed = in.get<std::uint64_t>();
    header.parameters.rows = in.get<std::uint64_t>();
    header.parameters.cols = in.get<std::uint64_t>();
    header.groups = in.get<std::uint64_t>();
    header.members = in.get<std::uint64_t>();
    header.others = in.get<std::uint64_t>();
    header.parameters.bands = in.get<std::uint16_t>();
    header.parameters.band_rows = in.get<std::uint16_t>();
    header.projections = in.get<std::uint16_t>();
    header.parameters.dtype = static_cast<Dtype>(in.get<std::uint8_t>());
    if (in.get<std::uint8_t>() != 0) corrupt("reserved bytes are not 0");
    return header;
}

void check_sketch(std::span<const std::int16_t> sketch, double rms) {
    bool is_zero = true;
    for (const std::int16_t projection : sketch) {
        if (std::abs(int{projection}) > similarity::kSketchMost) {
            corrupt("a projection is out of range");
        }
        is_zero = is_zero && projection == 0;
    }
    if (!(rms >= 0 && std::isfinite(rms)) || std::signbit(rms) || (rms == 0 && !is_zero)) {
        corrupt("the root mean square of a sketch is out of range");
    }
}

std::unique_ptr<IndexState> make_index(const Header& header) {
    try {
        return std::make_unique<IndexState>(header.parameters);
    } catch (const Error& error) {
        corrupt(error.what());
    }
}

}  // namespace

std::vector<std::byte> similarity::IndexState::save() const {
    const std::size_t length = sketcher.projections();
    const std::size_t n_groups = rms.size() - dead_groups;
    std::vector<std::int64_t> others;
    const std::vector<bool> is_free = free_places();
    for (std::size_t m = 0; m < members.size(); ++m) {
        if (!is_free[m] && members[m].group == kNone) others.push_back(member_ids[m]);
    }
    std::sort(others.begin(), others.end());

    Writer out;
    out.reserve(kHeaderBytes + n_groups * (sizeof(double) + 2 * length) + 8 * size());
    out.put_bytes(kMagic, 4);
    out.put(kSimilarityVersion);
    out.put(static_cast<std::uint16_t>(kHeaderBytes));
    out.put(std::uint64_t{0});  // the checksum, and the length, are known at the end
    out.put(std::uint64_t{0});
    out.put(std::uint64_t{0});
    out.put(std::bit_cast<std::uint64_t>(parameters.r));
    out.put(parameters.seed);
    out.put(static_cast<std::uint64_t>(parameters.rows));
    out.put(static_cast<std::uint64_t>(parameters.cols));
    out.put(static_cast<std::uint64_t>(n_groups));
    out.put(static_cast<std::uint64_t>(size() - others.size()));
    out.put(static_cast<std::uint64_t>(others.size()));
    out.put(static_cast<std::uint16_t>(parameters.bands));
    out.put(static_cast<std::uint16_t>(parameters.band_rows));
    out.put(static_cast<std::uint16_t>(length));
    out.put(static_cast<std::uint8_t>(parameters.dtype));
    out.put(std::uint8_t{0});
    const auto for_groups = [&](const auto& body) {
        for (std::size_t g = 0; g < rms.size(); ++g) {
            if (first_member[g] != kNone) body(g);
        }
    };
    static_assert(std::endian::native == std::endian::little);
    for_groups([&](std::size_t g) { out.put_bytes(&rms[g], sizeof(double)); });
    for_groups([&](std::size_t g) { out.put_bytes(sketch_of(g), 2 * length); });
    for_groups([&](std::size_t g) {
        std::uint64_t count = 0;
        for (std::uint32_t m = first_member[g]; m != kNone; m = members[m].next) ++count;
        out.put_varint(count);
    });
    for_groups([&](std::size_t g) {
        for (std::uint32_t m = first_member[g]; m != kNone; m = members[m].next) {
            out.put_id(member_ids[m]);
        }
    });
    for (const std::int64_t id : others) out.put_id(id);

    std::vector<std::byte>& bytes = out.bytes();
    store_le(bytes.data() + kSummed, static_cast<std::uint64_t>(bytes.size()));
    const Digest digest = checksum_of(bytes);
    store_le(bytes.data() + 8, digest.lo);
    store_le(bytes.data() + 16, digest.hi);
    return std::move(bytes);
}

std::unique_ptr<L2Index> L2Index::load(Bytes bytes, unsigned threads) {
    const Header header = read_header(bytes);
    std::unique_ptr<IndexState> index = make_index(header);
    const std::size_t length = index->sketcher.projections();
    if (header.projections != length) corrupt("it has another number of projections");

    // Every group takes these bytes, every id one: counts above that are refused before any
    // memory is asked for.
    Reader in(bytes.subspan(kHeaderBytes));
    const std::size_t group_bytes = sizeof(double) + 2 * length + 1;
    if (header.groups > in.left() / group_bytes || header.members > in.left() ||
        header.others > in.left()) {
        corrupt("its counts do not fit its length");
    }
    const Bytes all_rms = in.take(header.groups * sizeof(double));
    const Bytes all_sketches = in.take(header.groups * 2 * length);
    std::vector<std::uint64_t> counts(header.groups);
    std::uint64_t total = 0;
    for (std::uint64_t& count : counts) {
        count = in.get_varint();
        if (count == 0) corrupt("a sketch has no blocks");
        if (count > header.members - total) corrupt("its sketches have more blocks than stated");
        total += count;
    }
    if (total != header.members) corrupt("its sketches have fewer blocks than stated");

    index->make_room(header.groups, header.members + header.others, threads);
    std::vector<std::int16_t> sketch(length);
    const auto take_id = [&] {
        const std::int64_t id = in.get_id();
        if (id < 0 || index->numbers.find(id, index->member_ids) != kNone) {
            corrupt("an id is negative or occurs twice");
        }
        return id;
    };
    for (std::size_t g = 0; g < header.groups; ++g) {
        Probe probe{};
        std::memcpy(&probe.rms, all_rms.data() + g * sizeof(double), sizeof(double));
        std::memcpy(sketch.data(), all_sketches.data() + g * 2 * length, 2 * length);
        check_sketch(sketch, probe.rms);
        probe.twin_key = index->twin_key(sketch.data(), probe.rms);
        if (index->twin_of(sketch.data(), probe) != kNone) corrupt("a sketch occurs twice");
        const std::uint32_t group = index->append_group(sketch.data(), probe);
        for (std::uint64_t i = 0; i < counts[g]; ++i) index->append_member(take_id(), group);
    }
    std::int64_t before = -1;
    for (std::size_t i = 0; i < header.others; ++i) {
        const std::int64_t id = take_id();
        if (id <= before) corrupt("ids without a sketch are not ascending");
        before = id;
        index->append_member(id, kNone);
    }
    if (in.left() != 0) corrupt("bytes follow its end");
    index->link_groups(threads);
    return std::unique_ptr<L2Index>(new L2Index(std::move(index)));
}

}  // namespace pydedup
