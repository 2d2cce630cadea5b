// SPDX-License-Identifier: Apache-2.0
// Pages: whatever the bytes are, parsing refuses them or everything on the page can be read, and a
// page made of its blocks has the same. The first byte chooses whether the checksum is made right,
// so that what is behind it is reached.
#include <algorithm>
#include <optional>
#include <vector>

#include "codec/low_rank.hpp"
#include "decoding.hpp"
#include "pydedup/page_content.hpp"
#include "pydedup/page_format.hpp"

namespace pydedup::fuzz {
namespace {

constexpr std::size_t kMostBytes = std::size_t{1} << 20;

void check_slots(const PageView& view) {
    std::size_t end = 0;
    for (std::size_t slot = 0; slot < view.n_slots(); ++slot) {
        const BlockView block = view.block(slot);
        const std::size_t offset = view.offset(slot);
        require(offset >= end, "blocks do not overlap");
        require(offset + block.length <= view.bytes().size(), "blocks lie on the page");
        require(block.data == view.bytes().data() + offset, "a block is where its offset says");
        require(item_bytes(block.dtype) != 0, "a dtype that is known");
        require(block.rows > 0 && block.cols > 0, "a block has elements");
        end = offset + block.length;
    }
    bool refused = false;
    try {
        static_cast<void>(view.block(view.n_slots()));
    } catch (const Error&) {
        refused = true;
    }
    require(refused, "a slot that is not there is refused");
}

void check_another_page(const std::vector<BlockView>& blocks) {
    std::vector<std::byte> bytes(page_bytes(blocks));
    build_page(blocks, bytes);
    const PageView page = PageView::parse(bytes);
    for (std::size_t slot = 0; slot < blocks.size(); ++slot) {
        const std::vector<std::byte> copy = copy_alone(blocks[slot]);
        // Of a delta that names no factors, nothing else is known than that it does not decode.
        if (has_factors(blocks[slot]) && !detail::find_factors(blocks[slot])) continue;
        require(copy_alone(page.block(slot)) == copy, "a block is the same on another page");
    }
}

void read_content(const Page& page) {
    std::size_t bytes = 0;
    for (std::size_t slot = 0; slot < page.n_slots(); ++slot) bytes += page.block(slot).raw_bytes();
    // A page of constant planes may stand for gigabytes, rightly.
    if (bytes > kMostBytes) return;
    std::vector<Digest> digests(page.n_slots());
    // Deltas get the block before them for a base, whether or not it is one.
    std::vector<BlockView> blocks(page.n_slots());
    for (std::size_t slot = 0; slot < blocks.size(); ++slot) {
        blocks[slot] = page.block(slot);
        blocks[slot].base_block = &blocks[slot == 0 ? blocks.size() - 1 : slot - 1];
    }
    try {
        block_digests(blocks, digests, 1);
    } catch (const Error&) {
        // One block does not decode.
    }
    std::size_t alone = 0;
    for (BlockView& block : blocks) {
        block.base_block = nullptr;
        alone += encoded_bytes(block);
    }
    if (alone <= kMostBytes) check_another_page(blocks);  // a factor may be named by many
    for (std::size_t slot = 1; slot < std::min<std::size_t>(page.n_slots(), 8); ++slot) {
        try {
            const bool same = same_block(page.block(slot - 1), page.block(slot));
            require(same == same_block(page.block(slot), page.block(slot - 1)), "symmetric");
        } catch (const Error&) {
            // One of the two does not decode.
        }
    }
}

Input page_of(const std::vector<BlockView>& blocks, std::uint8_t first) {
    std::vector<std::byte> page(page_bytes(blocks));
    build_page(blocks, page);
    Input input{first};
    append(input, page);
    return input;
}

}  // namespace

std::vector<Input> seeds() {
    Random random;
    std::vector<std::byte> values(16 * 24 * 4);
    for (std::size_t i = 0; i < values.size(); i += 4) {
        const float value = static_cast<float>(random.next() % 1000) / 4096.0F;
        std::memcpy(values.data() + i, &value, sizeof value);
    }
    std::vector<std::vector<std::byte>> encoded;
    std::vector<BlockView> blocks;
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::u8, Dtype::f64}) {
        const std::size_t item = item_bytes(dtype);
        for (const bool planes : {true, false}) {
            encoded.emplace_back(16 * 24 * item / (item == 8 ? 2 : 1));
            const std::uint32_t rows = item == 8 ? 8 : 16;
            const EncodedBlock block =
                encode_block({values.data(), rows, 24, 24 * item, dtype}, planes, encoded.back());
            blocks.push_back(
                {encoded.back().data(), block.length, block.encoding, dtype, rows, 24, 0});
        }
    }
    // Each delta behind its base. Two have their factors in common.
    std::vector<std::byte> changed = values;
    for (std::size_t i = 0; i < changed.size(); i += 4) {
        changed[i] ^= static_cast<std::byte>(random.next() % 64);
    }
    const MatrixRef base{values.data(), 16, 24, 24 * 4, Dtype::f32};
    const MatrixRef block{changed.data(), 16, 24, 24 * 4, Dtype::f32};
    std::vector<BlockView> deltas;
    for (const bool factored : {true, false, true}) {
        encoded.emplace_back(values.size());
        const std::optional<EncodedBlock> delta =
            factored ? encode_moved(block, base, std::nullopt, encoded.back(), true, false)
                     : encode_delta(block, base, std::nullopt, encoded.back());
        require(delta.has_value(), "a delta is smaller than its block");
        deltas.push_back(blocks[1]);
        deltas.push_back(
            {encoded.back().data(), delta->length, delta->encoding, Dtype::f32, 16, 24, 1});
    }
    std::vector<Input> made;
    for (const std::uint8_t first : {std::uint8_t{0}, std::uint8_t{1}}) {
        made.push_back(page_of({}, first));
        made.push_back(page_of({blocks[0]}, first));
        made.push_back(page_of({blocks[1], blocks[2]}, first));
        made.push_back(page_of(blocks, first));
        made.push_back(page_of(deltas, first));
    }
    return made;
}

}  // namespace pydedup::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace pydedup;
    fuzz::Reader reader(data, size);
    const bool repair = reader.byte() % 2 == 1;
    fuzz::Input bytes = reader.rest();
    if (repair) fuzz::repair_checksum(bytes);
    try {
        const PageView view = PageView::parse(fuzz::as_bytes(bytes));
        fuzz::check_slots(view);
        // Whoever skips the checksum sees the same page.
        fuzz::require(PageView::parse(fuzz::as_bytes(bytes), false).n_slots() == view.n_slots(),
                      "the checksum is one check more, no other reading");
        const std::shared_ptr<const std::byte> owner(fuzz::as_bytes(bytes).data(),
                                                     [](const std::byte*) {});
        fuzz::read_content(Page(owner, bytes.size()));
    } catch (const Error&) {
        // Refused, as most inputs are.
    }
    return 0;
}
