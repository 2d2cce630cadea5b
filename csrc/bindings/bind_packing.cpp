// SPDX-License-Identifier: Apache-2.0
// Packing of blocks into pages. Id lists travel as (row pointers, ids); the facade builds them.
#include <pybind11/stl.h>  // std::optional

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pydedup/packing.hpp"

namespace pydedup {
namespace {

using Ids = Array<std::int64_t>;

PackAlgorithm as_algorithm(const std::string& name) {
    constexpr std::array<std::pair<const char*, PackAlgorithm>, 5> kNames{{
        {"layout", PackAlgorithm::layout},
        {"two_stage", PackAlgorithm::two_stage},
        {"greedy1", PackAlgorithm::greedy1},
        {"greedy2", PackAlgorithm::greedy2},
        {"baseline", PackAlgorithm::baseline},
    }};
    for (const auto& [known, algorithm] : kNames) {
        if (name == known) return algorithm;
    }
    throw Error(ErrorCode::invalid_argument, "unknown packing algorithm '" + name + "'");
}

IdRows as_rows(const Ids& indptr, const Ids& ids, const char* name) {
    return {as_span(indptr, name), as_span(ids, name)};
}

PackRequest as_request(const Ids& owner_indptr, const Ids& owner_ids, std::uint64_t capacity,
                       const std::optional<Ids>& sizes, const Ids& existing_indptr,
                       const Ids& existing_ids, const std::string& algorithm) {
    PackRequest request{as_rows(owner_indptr, owner_ids, "owners"), capacity};
    if (sizes) request.sizes = as_span(*sizes, "sizes");
    request.existing = as_rows(existing_indptr, existing_ids, "existing");
    request.algorithm = as_algorithm(algorithm);
    return request;
}

}  // namespace

void bind_packing(py::module_& m) {
    m.def(
        "pack_pages",
        [](const Ids& owner_indptr, const Ids& owner_ids, std::uint64_t capacity,
           const std::optional<Ids>& sizes, const Ids& existing_indptr, const Ids& existing_ids,
           const std::optional<Array<double>>& weights, const std::string& algorithm) {
            PackRequest request = as_request(owner_indptr, owner_ids, capacity, sizes,
                                             existing_indptr, existing_ids, algorithm);
            if (weights) request.weights = as_span(*weights, "weights");
            PackResult result;
            {
                const WithoutGil no_gil;
                result = pack_pages(request);
            }
            return py::make_tuple(
                as_array(std::move(result.page_indptr)), as_array(std::move(result.page_ids)),
                as_array(std::move(result.read_indptr)), as_array(std::move(result.read_pages)),
                as_array(std::move(result.least_reads)), result.lower_bound, result.optimal);
        },
        py::arg("owner_indptr").noconvert(), py::arg("owner_ids").noconvert(), py::arg("capacity"),
        py::arg("sizes").noconvert(), py::arg("existing_indptr").noconvert(),
        py::arg("existing_ids").noconvert(), py::arg("weights").noconvert(), py::arg("algorithm"));
    m.def(
        "check_layout",
        [](const Ids& owner_indptr, const Ids& owner_ids, std::uint64_t capacity,
           const std::optional<Ids>& sizes, const Ids& existing_indptr, const Ids& existing_ids,
           const std::string& algorithm, const Ids& page_indptr, const Ids& page_ids,
           const Ids& read_indptr, const Ids& read_pages) {
            const PackRequest request = as_request(owner_indptr, owner_ids, capacity, sizes,
                                                   existing_indptr, existing_ids, algorithm);
            const LayoutClaim claim{as_rows(page_indptr, page_ids, "pages"),
                                    as_rows(read_indptr, read_pages, "reads")};
            const WithoutGil no_gil;
            check_layout(request, claim);
        },
        py::arg("owner_indptr").noconvert(), py::arg("owner_ids").noconvert(), py::arg("capacity"),
        py::arg("sizes").noconvert(), py::arg("existing_indptr").noconvert(),
        py::arg("existing_ids").noconvert(), py::arg("algorithm"),
        py::arg("page_indptr").noconvert(), py::arg("page_ids").noconvert(),
        py::arg("read_indptr").noconvert(), py::arg("read_pages").noconvert());
}

}  // namespace pydedup
