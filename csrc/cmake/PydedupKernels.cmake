# SPDX-License-Identifier: Apache-2.0
# One translation unit per instruction set, each an object library of its own flags:
# ISA flags never reach any other file. A name is in PYDEDUP_HAVE_<ISA> exactly when
# its table exists at link time; whether the CPU can run it is asked at run time.
include(CheckCXXCompilerFlag)

set(PYDEDUP_AVX2_FLAGS -mavx2 -mfma -mf16c -mbmi2)
set(PYDEDUP_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2)

function(pydedup_add_isa core isa source)
  add_library(pydedup_kernels_${isa} OBJECT ${source})
  target_include_directories(pydedup_kernels_${isa} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/src)
  # -ffp-contract=off: what is persisted must not depend on where a compiler fuses; kernels that
  # may fuse say so with intrinsics. -fno-lto: the gate below reads real symbols.
  target_compile_options(pydedup_kernels_${isa} PRIVATE -O3 -Wall -Wextra -Wshadow
    -fno-exceptions -fno-rtti -fno-asynchronous-unwind-tables -ffp-contract=off -fno-lto ${ARGN})
  set_target_properties(pydedup_kernels_${isa} PROPERTIES
    POSITION_INDEPENDENT_CODE ON INTERPROCEDURAL_OPTIMIZATION OFF)
  # Intrinsics of GCC before 12.4 start from what is not set, on purpose (GCC's bug 105593): 1,500 warnings.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12.4)
    target_compile_options(pydedup_kernels_${isa} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  if(PYDEDUP_SANITIZE)
    target_compile_options(pydedup_kernels_${isa} PRIVATE -fsanitize=${PYDEDUP_SANITIZE})
  endif()
  target_sources(${core} PRIVATE $<TARGET_OBJECTS:pydedup_kernels_${isa}>)
  string(TOUPPER ${isa} upper)
  target_compile_definitions(${core} PRIVATE PYDEDUP_HAVE_${upper}=1)
  # No weak symbols: a shared inline function compiled with ISA flags could be the copy
  # that the linker keeps for everybody.
  add_custom_command(TARGET ${core} POST_BUILD
    COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:pydedup_kernels_${isa}>"
            -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/CheckNoWeakSymbols.cmake
    VERBATIM COMMAND_EXPAND_LISTS)
endfunction()

function(pydedup_add_kernels core)
  # The reference stays plain: no vectoriser.
  pydedup_add_isa(${core} scalar src/kernels/scalar.cpp -fno-tree-vectorize)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    check_cxx_compiler_flag("-mavx2 -mfma -mf16c" PYDEDUP_CXX_AVX2)
    if(PYDEDUP_CXX_AVX2)
      pydedup_add_isa(${core} avx2 src/kernels/avx2.cpp ${PYDEDUP_AVX2_FLAGS})
    endif()
    check_cxx_compiler_flag("-mavx512f -mavx512bw -mavx512dq -mavx512vl" PYDEDUP_CXX_AVX512)
    if(PYDEDUP_CXX_AVX512)
      pydedup_add_isa(${core} avx512 src/kernels/avx512.cpp ${PYDEDUP_AVX512_FLAGS})
      check_cxx_compiler_flag("-mavx512f -mavx512bw -mavx512vl -mavx512bf16" PYDEDUP_CXX_AVX512BF16)
      if(PYDEDUP_CXX_AVX512BF16)
        pydedup_add_isa(${core} avx512bf16 src/kernels/avx512bf16.cpp
          ${PYDEDUP_AVX512_FLAGS} -mavx512bf16)
      endif()
      # The registers of AMX have to be asked of the operating system: so far, of Linux alone.
      check_cxx_compiler_flag("-mavx512f -mavx512bw -mamx-tile -mamx-bf16" PYDEDUP_CXX_AMX)
      if(PYDEDUP_CXX_AMX AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
        pydedup_add_isa(${core} amx src/kernels/amx.cpp
          ${PYDEDUP_AVX512_FLAGS} -mamx-tile -mamx-bf16)
      endif()
    endif()
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
    pydedup_add_isa(${core} neon src/kernels/neon.cpp)  # in every aarch64: no flags
  endif()
endfunction()
