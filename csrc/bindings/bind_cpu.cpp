// SPDX-License-Identifier: Apache-2.0
#include "bindings.hpp"
#include "pydedup/cpu.hpp"

namespace pydedup {

void bind_cpu(py::module_& m) {
    m.def("version", [] { return PYDEDUP_VERSION; });
    m.def("active_kernel", &active_kernel);
    m.def("active_kernel_reason", &active_kernel_reason);
    m.def("default_threads", &default_threads);
    m.def("limit_threads", &limit_threads);
    m.def("kernel_infos", [] {
        py::list infos;
        for (const KernelInfo& info : kernel_infos()) {
            infos.append(py::make_tuple(info.name, info.built, info.runnable, info.note));
        }
        return infos;
    });
}

}  // namespace pydedup
