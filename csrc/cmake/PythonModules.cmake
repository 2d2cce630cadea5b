# SPDX-License-Identifier: Apache-2.0
# The two Python modules. Only _core links the native core (one copy of its state);
# _pages is stateless Cython and links nothing of it.
set(PYBIND11_FINDPYTHON ON)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
include(UseCython)

file(GLOB PYDEDUP_BINDING_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/bindings/*.cpp)
pybind11_add_module(_core MODULE NO_EXTRAS ${PYDEDUP_BINDING_SOURCES})
target_link_libraries(_core PRIVATE pydedup_core)
# One file by itself takes 8 s to compile, whatever is in it: pybind11. A unit for each of two cores.
set_target_properties(_core PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)
# A hidden copy of libstdc++ of its own: wheels then run on older systems, and other extension
# modules load beside it. (mysql-connector's wants libstdc++ in the static TLS block, which fails
# once another module has thrown an exception or used std::call_once through the shared one.)
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_LINK_OPTIONS
  -static-libstdc++ -Wl,--version-script=${CMAKE_CURRENT_LIST_DIR}/core.map)
check_cxx_source_compiles("#include <string>
int main(int n, char**) { return static_cast<int>(std::string(static_cast<unsigned>(n), 'x').size()); }"
  PYDEDUP_STATIC_LIBSTDCXX)
if(PYDEDUP_STATIC_LIBSTDCXX)
  target_link_options(_core PRIVATE ${CMAKE_REQUIRED_LINK_OPTIONS})
endif()
unset(CMAKE_REQUIRED_LINK_OPTIONS)
target_compile_definitions(_core PRIVATE PYDEDUP_VERSION="${SKBUILD_PROJECT_VERSION}")
install(TARGETS _core LIBRARY DESTINATION pydedup)

if(EXISTS ${PROJECT_SOURCE_DIR}/pydedup/_pages.pyx)
  cython_transpile(${PROJECT_SOURCE_DIR}/pydedup/_pages.pyx LANGUAGE C OUTPUT_VARIABLE PYDEDUP_PAGES_C)
  python_add_library(_pages MODULE WITH_SOABI ${PYDEDUP_PAGES_C})
  install(TARGETS _pages LIBRARY DESTINATION pydedup)
endif()
