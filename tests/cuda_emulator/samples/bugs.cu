// A mistake each, and beside it the same without: a kernel is right where Fixed.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "bugs.h"

namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr unsigned kThreads = 64;
constexpr unsigned kBlocks = 4;

template <bool Fixed>
__global__ void missing_barrier(float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = threadIdx.x;
  if (Fixed) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool Fixed>
__global__ void missing_syncwarp(float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = 0;
  __syncwarp();
  tile[threadIdx.x] = threadIdx.x;
  if (Fixed) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool Fixed>
__global__ void missing_fence(float* out, unsigned* counter) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = blockIdx.x;
  if (Fixed) __threadfence();
  if (atomicAdd(counter, 1) != gridDim.x - 1) return;
  if (Fixed) __threadfence();
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += out[i];
  out[gridDim.x] = sum;
}

template <bool Fixed>
__global__ void missing_atomic(float*, unsigned* counter) {
  if (Fixed) {
    atomicAdd(counter, 1);
  } else {
    ++*counter;
  }
}

template <bool Fixed>
__global__ void mask_of_exited(float* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(Fixed ? 0xffff : kAll, out[threadIdx.x], 1);
}

template <bool Fixed>
__global__ void mask_without_caller(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(Fixed ? kAll : 0xffff, out[threadIdx.x], 1);
}

template <bool Fixed>
__global__ void masks_differ(float* out) {
  const bool low = threadIdx.x % 32 < 16;
  out[threadIdx.x] = __shfl_xor_sync(low && !Fixed ? 0x1ffff : kAll, out[threadIdx.x], 1);
}

template <bool Fixed>
__global__ void barrier_of_some(float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = 1;
  if (Fixed || threadIdx.x < 32) __syncthreads();
  if (!Fixed && threadIdx.x >= 32) __shfl_xor_sync(kAll, 1, 1);
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Fixed>
__global__ void deadlock(float* out) {
  float value = 1;
  if (Fixed || threadIdx.x % 2 == 0) value = __shfl_xor_sync(kAll, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

template <bool Fixed>
__global__ void past_global(float* out) {
  out[threadIdx.x + (Fixed ? 0 : kBlocks * kThreads)] = 1;
}

template <bool Fixed>
__global__ void past_shared(float* out) {
  __shared__ float tile[kThreads];
  __shared__ float next[kThreads];
  next[threadIdx.x] = 0;
  tile[threadIdx.x + (Fixed ? 0 : 1)] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x] + next[threadIdx.x ^ 1];
}

template <bool Fixed>
__global__ void past_dynamic_shared(float* out) {
  extern __shared__ float tile[];
  tile[threadIdx.x + (Fixed ? 0 : 1)] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[(Fixed ? 0 : 1)];
}

template <bool Fixed>
__global__ void unwritten_shared(float* out) {
  __shared__ float tile[kThreads];
  if (Fixed || threadIdx.x != 5) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool Fixed>
__global__ void misaligned(float* out) {
  auto* to = reinterpret_cast<float4*>(out + (Fixed ? 0 : 1));
  to[threadIdx.x / 4] = {1, 2, 3, 4};
}

template <bool Fixed>
__global__ void null_pointer(float* out, unsigned* zero) {
  auto* to = Fixed ? out : reinterpret_cast<float*>(static_cast<size_t>(*zero));
  to[threadIdx.x] = 1;
}

template <bool Fixed>
__global__ void division_by_zero(float* out, unsigned* zero) {
  out[threadIdx.x] = 7 / (Fixed ? *zero + 1 : *zero);
}

struct Bug {
  const char* name;
  void (*launch)(bool fixed, float* out, unsigned* counter);
};

#define BUG(name, blocks, shared, ...)                         \
  {#name, [](bool fixed, float* out, unsigned* counter) {      \
     (void)out;                                                \
     (void)counter;                                            \
     if (fixed) {                                              \
       name<true><<<blocks, kThreads, shared>>>(__VA_ARGS__);  \
     } else {                                                  \
       name<false><<<blocks, kThreads, shared>>>(__VA_ARGS__); \
     }                                                         \
   }}

const Bug kBugs[] = {
    BUG(missing_barrier, 1, 0, out),
    BUG(missing_syncwarp, 1, 0, out),
    BUG(missing_fence, kBlocks, 0, out, counter),
    BUG(missing_atomic, kBlocks, 0, out, counter),
    BUG(mask_of_exited, 1, 0, out),
    BUG(mask_without_caller, 1, 0, out),
    BUG(masks_differ, 1, 0, out),
    BUG(barrier_of_some, 1, 0, out),
    BUG(deadlock, 1, 0, out),
    BUG(past_global, 1, 0, out),
    BUG(past_shared, 1, 0, out),
    BUG(past_dynamic_shared, 1, kThreads * sizeof(float), out),
    BUG(unwritten_shared, 1, 0, out),
    BUG(misaligned, 1, 0, out),
    BUG(null_pointer, 1, 0, out, counter),
    BUG(division_by_zero, 1, 0, out, counter),
};

} // namespace

bool launch_bug(const char* name, bool fixed) {
  // malloc's 16 bytes of alignment, and its exact end for ASan.
  auto* out = static_cast<float*>(calloc(kBlocks * kThreads, sizeof(float)));
  auto* counter = static_cast<unsigned*>(calloc(1, sizeof(unsigned)));
  bool known = false;
  for (const Bug& bug : kBugs) {
    if (strcmp(bug.name, name) != 0) continue;
    known = true;
    bug.launch(fixed, out, counter);
  }
  free(out);
  free(counter);
  return known && cudaGetLastError() == cudaSuccess;
}
