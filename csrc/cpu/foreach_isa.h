// Compiles the file LOSSOPS_KERNELS once per instruction set, each time in a namespace of that name.
// The kernels are plain loops; the compiler vectorises them for the target in force. System headers
// come first: inside a region their inline functions would be compiled for that target too, and the
// linker may keep that copy for everybody. What a region is compiled for stands in macros of ours:
// GCC's own (__AVX2__, __FMA__) stay those of the command line, whatever a pragma says.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "memory.h"

#undef LOSSOPS_X86_KERNELS
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LOSSOPS_X86_KERNELS 1
#else
#define LOSSOPS_X86_KERNELS 0 // the baseline is what the compiler targets by itself
#endif

#ifdef LOSSOPS_KERNELS

#define LOSSOPS_VECTOR_BYTES 16
#define LOSSOPS_FMA 0
namespace lossops::cpu::baseline {
#include "numeric.inl"
#include LOSSOPS_KERNELS
} // namespace lossops::cpu::baseline
#undef LOSSOPS_VECTOR_BYTES
#undef LOSSOPS_FMA

#if LOSSOPS_X86_KERNELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LOSSOPS_VECTOR_BYTES 32
#define LOSSOPS_FMA 1
namespace lossops::cpu::avx2 {
#include "numeric.inl"
#include LOSSOPS_KERNELS
} // namespace lossops::cpu::avx2
#undef LOSSOPS_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LOSSOPS_VECTOR_BYTES 64
namespace lossops::cpu::avx512 {
#include "numeric.inl"
#include LOSSOPS_KERNELS
} // namespace lossops::cpu::avx512
#undef LOSSOPS_VECTOR_BYTES
#undef LOSSOPS_FMA
#pragma GCC pop_options

#endif // LOSSOPS_X86_KERNELS

// Calls FUNCTION, a template of LOSSOPS_KERNELS, for the instruction set `isa` (asked for before any
// thread starts: a bad LOSSOPS_CPU_ISA throws) and the
// accumulation type of the problem ARGS.
#if LOSSOPS_X86_KERNELS
#define LOSSOPS_FOR_ISA(...)                      \
  switch (isa) {                                  \
    case Isa::avx512: avx512::__VA_ARGS__; break; \
    case Isa::avx2: avx2::__VA_ARGS__; break;     \
    default: baseline::__VA_ARGS__;               \
  }
#else
#define LOSSOPS_FOR_ISA(...) static_cast<void>(isa), baseline::__VA_ARGS__;
#endif
#define LOSSOPS_CALL(FUNCTION, ARGS, ...)                \
  if ((ARGS).use_double) {                               \
    LOSSOPS_FOR_ISA(FUNCTION<double>(ARGS, __VA_ARGS__)) \
  } else {                                               \
    LOSSOPS_FOR_ISA(FUNCTION<float>(ARGS, __VA_ARGS__))  \
  }

#endif // LOSSOPS_KERNELS
