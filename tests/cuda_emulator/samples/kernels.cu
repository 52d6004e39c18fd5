// Kernels without mistakes, in the ways that a loss is written: what they compute is known otherwise.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr unsigned kAll = 0xffffffff;

// Softmax of a row a block: online maximum and sum, shuffles, then shared memory

struct Partial {
  float max, sum;
};

__device__ Partial combine(Partial a, Partial b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, 0};
  return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

__device__ Partial combine_warp(Partial value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partial other = {__shfl_xor_sync(kAll, value.max, offset),
                           __shfl_xor_sync(kAll, value.sum, offset)};
    value = combine(value, other);
  }
  return value;
}

struct Rows {
  const void* from;
  void* to;
  int64_t classes;
  char unused[3000]; // arguments may take 4 KB
};

template <class T>
__global__ void __launch_bounds__(256) softmax_kernel(const __grid_constant__ Rows rows) {
  __shared__ Partial of_warp[32];
  extern __shared__ float exponentials[];
  const auto* from = static_cast<const T*>(rows.from) + blockIdx.x * rows.classes;
  auto* to = static_cast<T*>(rows.to) + blockIdx.x * rows.classes;
  const unsigned lane = threadIdx.x % 32;
  const unsigned warps = blockDim.x / 32;

  Partial own = {-INFINITY, 0};
  for (int64_t c = threadIdx.x; c < rows.classes; c += blockDim.x) {
    own = combine(own, {static_cast<float>(from[c]), 1});
  }
  own = combine_warp(own);
  if (lane == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  const Partial all = combine_warp(lane < warps ? of_warp[lane] : Partial{-INFINITY, 0});

  for (int64_t c = threadIdx.x; c < rows.classes; c += blockDim.x) {
    exponentials[c] = expf(static_cast<float>(from[c]) - all.max);
  }
  __syncthreads();
  // Backwards, so that threads read what others have written.
  for (int64_t c = rows.classes - 1 - threadIdx.x; c >= 0; c -= blockDim.x) {
    to[c] = static_cast<T>(exponentials[c] / all.sum);
  }
}

// 16 bytes at a time, as inline assembly: assignments may be split

__device__ uint4 load(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ void store(uint4* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
}

__global__ void copy_vectors(const uint4* from, uint4* to, int64_t count) {
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  for (int64_t i = first; i < count; i += int64_t(gridDim.x) * blockDim.x) store(to + i, load(from + i));
}

__global__ void copy_strided(const float* from, float* to, int stride) {
  to[threadIdx.x * stride] = from[threadIdx.x * stride];
}

template <int Pitch>
__global__ void transpose(const float* from, float* to) {
  __shared__ float tile[32 * Pitch];
  for (int row = 0; row < 32; ++row) tile[row * Pitch + threadIdx.x] = from[row * 32 + threadIdx.x];
  __syncwarp();
  for (int row = 0; row < 32; ++row) to[row * 32 + threadIdx.x] = tile[threadIdx.x * Pitch + row];
}

// The first of many to find something leaves it in device memory

struct Found {
  int taken;
  int64_t index, value;
};

__device__ Found found;
__device__ int visits = 40;

__global__ void find(const int64_t* values, int64_t count, int64_t limit) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  atomicAdd(&visits, 1);
  if (values[i] < limit || atomicCAS(&found.taken, 0, 1) != 0) return;
  found.index = i;
  found.value = values[i];
  __threadfence();
}

// Functions of one number, and how the warp's other collectives behave

template <class T>
__device__ T apply(int function, T x) {
  switch (function) {
    case 0: return exp(x);
    case 1: return log(x);
    case 2: return T(1) / x;
    case 3: return tanh(x);
    case 4: return log1p(x);
    case 5: return sqrt(x);
    case 6: return rint(x * T(8));
    case 7: return fmax(x, T(0.5));
    default: return T(int64_t(x * T(1000)) / int64_t(7));
  }
}

template <class T>
__global__ void apply_kernel(int function, const T* from, T* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to[i] = apply(function, from[i]);
}

__global__ void warp_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  out[0 * 32 + lane] = __shfl_down_sync(kAll, lane, 3);
  out[1 * 32 + lane] = __shfl_up_sync(kAll, lane, 3);
  out[2 * 32 + lane] = __shfl_sync(kAll, lane, 5);
  out[3 * 32 + lane] = __shfl_xor_sync(kAll, lane, 4, 8);
  out[4 * 32 + lane] = __shfl_down_sync(kAll, lane, 3, 8);
  out[5 * 32 + lane] = __ballot_sync(kAll, lane % 3 == 0);
  out[6 * 32 + lane] = lane < 16 ? __shfl_xor_sync(0xffff, lane, 1) : __shfl_xor_sync(0xffff0000, lane, 2);
  out[7 * 32 + lane] = __any_sync(kAll, lane == 7) + 2 * __all_sync(kAll, lane != 7);
  out[8 * 32 + lane] = __syncthreads_count(lane < 10);
}

} // namespace

extern "C" {

int launch_softmax(int type, const void* from, void* to, int64_t rows, int64_t classes) {
  const Rows arguments = {from, to, classes};
  const auto blocks = static_cast<unsigned>(rows);
  const size_t shared = classes * sizeof(float);
  if (type == 0) softmax_kernel<float><<<blocks, 128, shared>>>(arguments);
  if (type == 1) softmax_kernel<__half><<<blocks, 128, shared>>>(arguments);
  if (type == 2) softmax_kernel<__nv_bfloat16><<<blocks, 128, shared>>>(arguments);
  return cudaGetLastError();
}

int launch_softmax_with_more_shared_memory(const void* from, void* to, int64_t rows, int64_t classes) {
  const auto bytes = static_cast<int>(classes * sizeof(float));
  cudaFuncSetAttribute(softmax_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return launch_softmax(0, from, to, rows, classes);
}

int launch_copy(const void* from, void* to, int64_t bytes) {
  copy_vectors<<<3, 64>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), bytes / 16);
  return cudaGetLastError();
}

int launch_copy_strided(const float* from, float* to, int stride) {
  copy_strided<<<1, 32>>>(from, to, stride);
  return cudaGetLastError();
}

int launch_transpose(const float* from, float* to, int pitch) {
  if (pitch == 32) transpose<32><<<1, 32>>>(from, to);
  if (pitch == 33) transpose<33><<<1, 32>>>(from, to);
  return cudaGetLastError();
}

// index, value, visits
int launch_find(const int64_t* values, int64_t count, int64_t limit, int64_t* out) {
  find<<<static_cast<unsigned>((count + 63) / 64), 64>>>(values, count, limit);
  Found host;
  int host_visits;
  cudaMemcpyFromSymbol(&host, found, sizeof host);
  cudaMemcpyFromSymbol(&host_visits, visits, sizeof host_visits);
  out[0] = host.taken ? host.index : -1;
  out[1] = host.value;
  out[2] = host_visits;
  void* address;
  cudaGetSymbolAddress(&address, found);
  cudaMemset(address, 0, sizeof host);
  const int initial = 40;
  return cudaMemcpyToSymbol(visits, &initial, sizeof initial);
}

int launch_apply(bool use_double, int function, const void* from, void* to, int count) {
  const auto blocks = static_cast<unsigned>((count + 127) / 128);
  if (use_double) {
    apply_kernel<<<blocks, 128>>>(function, static_cast<const double*>(from), static_cast<double*>(to),
                                  count);
  } else {
    apply_kernel<<<blocks, 128>>>(function, static_cast<const float*>(from), static_cast<float*>(to), count);
  }
  return cudaGetLastError();
}

int launch_warp(unsigned* out) {
  warp_kernel<<<1, 32>>>(out);
  return cudaGetLastError();
}

int launch_grid(unsigned x, unsigned y, unsigned threads) {
  copy_vectors<<<dim3(x, y), threads>>>(nullptr, nullptr, 0);
  return cudaGetLastError();
}

} // extern "C"
