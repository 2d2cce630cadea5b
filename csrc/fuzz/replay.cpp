// SPDX-License-Identifier: Apache-2.0
// The driver without libFuzzer: replay [--rounds N] [--write FOLDER] [FILE-OR-FOLDER...]
//
// Runs the seeds of a target, N inputs mutated from them (always the same ones), and the files that
// are named: what was once found must stay mended. --write only writes the seeds, for libFuzzer.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "fuzz.hpp"

namespace {

using pydedup::fuzz::Input;
using pydedup::fuzz::Random;

void run(const Input& input) {
    // A copy in memory of its own size, so that ASan sees every byte read too far.
    const Input copy(input.begin(), input.end());
    static_cast<void>(LLVMFuzzerTestOneInput(copy.data(), copy.size()));
}

// A few changes of the kinds that break parsers: flipped bits, extreme values, cut and doubled
// pieces.
Input mutated(Input input, Random& random) {
    for (std::uint32_t changes = 1 + random.next() % 4; changes > 0; --changes) {
        if (input.empty()) input.push_back(0);
        const std::size_t at = random.next() % input.size();
        switch (random.next() % 6) {
            case 0:
                input[at] ^= static_cast<std::uint8_t>(1U << random.next() % 8);
                break;
            case 1:
                input[at] = static_cast<std::uint8_t>(random.next());
                break;
            case 2: {
                const std::uint8_t extremes[] = {0, 1, 0x7F, 0x80, 0xFE, 0xFF};
                const std::uint8_t value = extremes[random.next() % 6];
                const std::size_t end = std::min(input.size(), at + 1 + random.next() % 8);
                for (std::size_t i = at; i < end; ++i) input[i] = value;
                break;
            }
            case 3:
                input.resize(at);
                break;
            case 4: {
                const Input piece(input.begin() + static_cast<std::ptrdiff_t>(at), input.end());
                input.insert(input.end(), piece.begin(), piece.end());
                break;
            }
            default:
                // Headers are at the front: try those more often.
                input[at % std::min<std::size_t>(input.size(), 96)] =
                    static_cast<std::uint8_t>(random.next());
        }
    }
    return input;
}

void run_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        std::fprintf(stderr, "cannot read %s\n", path.c_str());
        std::exit(2);
    }
    std::printf("%s\n", path.c_str());
    std::fflush(stdout);
    run(Input(std::istreambuf_iterator<char>(file), {}));
}

void run_path(const std::filesystem::path& path) {
    if (!std::filesystem::is_directory(path)) return run_file(path);
    for (const auto& entry : std::filesystem::directory_iterator(path)) run_file(entry.path());
}

void write_seeds(const std::vector<Input>& seeds, const std::filesystem::path& folder) {
    std::filesystem::create_directories(folder);
    for (std::size_t i = 0; i < seeds.size(); ++i) {
        std::ofstream file(folder / ("seed-" + std::to_string(i)), std::ios::binary);
        file.write(reinterpret_cast<const char*>(seeds[i].data()),
                   static_cast<std::streamsize>(seeds[i].size()));
        if (!file.flush()) {
            std::fprintf(stderr, "cannot write to %s\n", folder.c_str());
            std::exit(2);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Input> seeds = pydedup::fuzz::seeds();
    long rounds = 0;
    std::vector<std::filesystem::path> paths;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--write" && i + 1 < argc) {
            write_seeds(seeds, argv[++i]);
            return 0;
        }
        if (argument == "--rounds" && i + 1 < argc) {
            rounds = std::strtol(argv[++i], nullptr, 10);
        } else if (argument.starts_with("--")) {
            std::fprintf(stderr, "usage: %s [--rounds N] [--write FOLDER] [PATH...]\n", argv[0]);
            return 2;
        } else {
            paths.emplace_back(argument);
        }
    }
    if (seeds.empty()) {
        std::fprintf(stderr, "this target has no seeds\n");
        return 1;
    }
    run({});
    for (const Input& seed : seeds) run(seed);
    Random random;
    for (long round = 0; round < rounds; ++round) {
        run(mutated(seeds[random.next() % seeds.size()], random));
    }
    for (const std::filesystem::path& path : paths) run_path(path);
    std::printf("%zu seeds, %ld mutations, %zu paths\n", seeds.size(), rounds, paths.size());
    return 0;
}
