// Sums and maxima of a warp and of a block, and the last step of every reduction: from the sums of the
// blocks to one loss. All in a fixed order, so that a result is the same bit for bit in every run.
#pragma once

#include "numeric.cuh"

namespace lossops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Of kLanes threads, those in one warp.
template <int kLanes>
constexpr int kLanesOfWarp = kLanes < kWarp ? kLanes : kWarp;

// Of kLanes neighbours: what they have found out together is for one of them to pass on.
template <int kLanes>
LOSSOPS_DEVICE bool is_first() {
  return threadIdx.x % kLanes == 0;
}

// Of each group of kLanes neighbours, in all of them. Every lane of the warp has to come along.
template <int kLanes, class A>
LOSSOPS_DEVICE A lanes_sum(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

template <int kLanes, class A>
LOSSOPS_DEVICE A lanes_max(A x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

template <int kLanes, class Index>
LOSSOPS_DEVICE Index lanes_min(Index x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = min(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// What a mean needs: the sum of losses and of the weights it is divided by.
struct Sums {
  double loss = 0, weight = 0;

  LOSSOPS_DEVICE void add(const Sums& other) {
    loss += other.loss;
    weight += other.weight;
  }
};

// The block's total, in thread 0.
template <int kThreads>
LOSSOPS_DEVICE Sums block_sums(Sums own) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double loss[kWarps], weight[kWarps];
  own.loss = lanes_sum<kWarp>(own.loss);
  own.weight = lanes_sum<kWarp>(own.weight);
  if (is_first<kWarp>()) {
    loss[threadIdx.x / kWarp] = own.loss;
    weight[threadIdx.x / kWarp] = own.weight;
  }
  __syncthreads();
  Sums total;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) total.add({loss[warp], weight[warp]});
  }
  return total;
}

struct Result {
  Reduction reduction;
  DType dtype;
  void* loss;
  double* normalizer;

  // In one thread.
  LOSSOPS_DEVICE void write(const Sums& total) const {
    *normalizer = total.weight;
    if (reduction == Reduction::none) return;
    store_any<double>(dtype, loss, 0, reduction == Reduction::mean ? total.loss / total.weight : total.loss);
  }
};

// What a kernel's blocks do with their sums: they leave them to reduce_blocks; one that is alone needs none.
struct BlockSums {
  Sums* of_block;
  Result result;

  LOSSOPS_DEVICE void put(const Sums& total) const {
    if (threadIdx.x != 0) return;
    if (gridDim.x == 1)
      result.write(total);
    else
      of_block[blockIdx.x] = total;
  }
};

constexpr int kReduceThreads = 1024;

// One block: the blocks before it are at most a few thousand.
static __global__ void __launch_bounds__(kReduceThreads)
    reduce_blocks(const __grid_constant__ BlockSums sums, int blocks) {
  Sums own;
  for (int i = threadIdx.x; i < blocks; i += kReduceThreads) own.add(sums.of_block[i]);
  const Sums total = block_sums<kReduceThreads>(own);
  if (threadIdx.x == 0) sums.result.write(total);
}

} // namespace lossops::cuda
