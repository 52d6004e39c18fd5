// Numbers on the device: dtypes, 16-byte packs of them, exp and log.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../layout.h"

namespace lossops::cuda {

#define LOSSOPS_DEVICE __device__ __forceinline__

// Stands for an element type that is only known at run time, read and written one at a time.
struct AnyType {};

template <class T>
constexpr int kPackSize = 16 / sizeof(T);
template <>
inline constexpr int kPackSize<AnyType> = 1;

template <class A, class T>
LOSSOPS_DEVICE A widen(T x) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat162float(x);
  else
    return static_cast<A>(x);
}

template <class T, class A>
LOSSOPS_DEVICE T round_to(A x) {
  if constexpr (std::is_same_v<T, __half>)
    return std::is_same_v<A, double> ? __double2half(x) : __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return std::is_same_v<A, double> ? __double2bfloat16(x) : __float2bfloat16_rn(x);
  else
    return static_cast<T>(x);
}

template <class A>
LOSSOPS_DEVICE A load_any(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f16: return widen<A>(static_cast<const __half*>(data)[i]);
    case DType::bf16: return widen<A>(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f32: return static_cast<A>(static_cast<const float*>(data)[i]);
    default: return static_cast<A>(static_cast<const double*>(data)[i]);
  }
}

template <class A>
LOSSOPS_DEVICE void store_any(DType dtype, void* data, int64_t i, A x) {
  switch (dtype) {
    case DType::f16: static_cast<__half*>(data)[i] = round_to<__half>(x); break;
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = round_to<__nv_bfloat16>(x); break;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(x); break;
    default: static_cast<double*>(data)[i] = static_cast<double>(x); break;
  }
}

LOSSOPS_DEVICE int64_t load_index(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::u8: return static_cast<const uint8_t*>(data)[i];
    case DType::i32: return static_cast<const int32_t*>(data)[i];
    default: return static_cast<const int64_t*>(data)[i];
  }
}

// kPackSize<T> neighbours, moved by one instruction.
template <class T>
struct alignas(16) Pack {
  T value[kPackSize<T>];
};

template <int kBytes = 16>
LOSSOPS_DEVICE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

template <class T>
LOSSOPS_DEVICE Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(__builtin_assume_aligned(p, 16));
}

// By hand: the compiler may split the assignment of a struct of halves into eight stores.
template <class T>
LOSSOPS_DEVICE void store_pack(T* p, const Pack<T>& pack) {
  const uint4 raw = *reinterpret_cast<const uint4*>(&pack);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(raw.x),
               "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

template <class T, class A>
LOSSOPS_DEVICE void unpack(const Pack<T>& pack, A (&out)[kPackSize<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) { // one by one each would take a register before it is used
    const auto* pairs = reinterpret_cast<const unsigned*>(&pack);
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k += 2) {
      out[k] = __uint_as_float(pairs[k / 2] << 16);
      out[k + 1] = __uint_as_float(pairs[k / 2] & 0xffff0000u);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kPackSize<T>; ++k) out[k] = widen<A>(pack.value[k]);
}

// Two at a time where the hardware rounds pairs.
template <class T, class A>
LOSSOPS_DEVICE Pack<T> pack_rounded(const A (&x)[kPackSize<T>]) {
  Pack<T> pack;
  if constexpr (std::is_same_v<T, __half> && std::is_same_v<A, float>) {
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k += 2)
      *reinterpret_cast<__half2*>(pack.value + k) = __floats2half2_rn(x[k], x[k + 1]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16> && std::is_same_v<A, float>) {
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k += 2)
      *reinterpret_cast<__nv_bfloat162*>(pack.value + k) = __floats2bfloat162_rn(x[k], x[k + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kPackSize<T>; ++k) pack.value[k] = round_to<T>(x[k]);
  }
  return pack;
}

template <class A>
LOSSOPS_DEVICE A infinity() {
  if constexpr (std::is_same_v<A, double>)
    return __longlong_as_double(0x7ff0000000000000LL);
  else
    return __int_as_float(0x7f800000);
}

// For 16-bit logits T the hardware's exponential will do: what its 2^-22 and the rounding of x*log2(e)
// leave is far below the result's last bit, and a subnormal result is nothing beside the row's largest, 1.
template <class T, class A>
LOSSOPS_DEVICE A exponential(A x) {
  if constexpr (std::is_same_v<A, double>) {
    return exp(x);
  } else if constexpr (sizeof(T) == 2) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
  } else {
    return expf(x);
  }
}

// The larger of two; a NaN never is.
LOSSOPS_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}
LOSSOPS_DEVICE double larger(double a, double b) {
  return fmax(a, b);
}

LOSSOPS_DEVICE float logarithm(float x) {
  return logf(x);
}
LOSSOPS_DEVICE double logarithm(double x) {
  return log(x);
}

} // namespace lossops::cuda
