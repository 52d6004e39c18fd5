// What came with sm_80 and sm_90: copies that run on, reductions of a warp, clusters of blocks.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

namespace {

// Every block of a cluster sums its part, and adds up the sums of all.
__global__ void __cluster_dims__(4) cluster_sum(const int* from, int* to) {
  __shared__ int sum;
  const auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, from[blockIdx.x * blockDim.x + threadIdx.x]);
  cluster.sync();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
      total += *cluster.map_shared_rank(&sum, rank);
    to[blockIdx.x] = total;
  }
  cluster.sync(); // no block may end while another reads its memory
}

__global__ void copy_ahead(const float4* from, float4* to) {
  __shared__ float4 stages[2][32];
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_memcpy_async(&stages[stage][threadIdx.x], from + stage * 32 + threadIdx.x, sizeof(float4));
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);
  __syncwarp();
  to[threadIdx.x] = stages[0][31 - threadIdx.x];
  __pipeline_wait_prior(0);
  __syncwarp();
  to[32 + threadIdx.x] = stages[1][31 - threadIdx.x];
}

__global__ void warp_sums(int* out) {
  const auto lane = static_cast<int>(threadIdx.x);
  out[lane] = __reduce_add_sync(0xffffffff, lane);
  out[32 + lane] = __reduce_min_sync(0xffffffff, lane - 7);
  out[64 + lane] = static_cast<int>(__reduce_max_sync(0xffffffff, static_cast<unsigned>(lane - 7)));
}

// Which memory it is shows only while it runs.
__global__ void any_memory(float* global, int choice) {
  __shared__ float shared[32];
  shared[threadIdx.x] = 1;
  __syncwarp();
  float* either = choice < 0 ? global : shared;
  either[threadIdx.x] += 2;
  __syncwarp();
  global[threadIdx.x] += 10 * shared[31 - threadIdx.x];
}

} // namespace

extern "C" {

int launch_cluster_sum(const int* from, int* to, int blocks) {
  cluster_sum<<<blocks, 64>>>(from, to);
  return cudaGetLastError();
}

int launch_copy_ahead(const void* from, void* to) {
  copy_ahead<<<1, 32>>>(static_cast<const float4*>(from), static_cast<float4*>(to));
  return cudaGetLastError();
}

int launch_warp_sums(int* out) {
  warp_sums<<<1, 32>>>(out);
  return cudaGetLastError();
}

int launch_any_memory(float* global, int choice) {
  any_memory<<<1, 32>>>(global, choice);
  return cudaGetLastError();
}

} // extern "C"
