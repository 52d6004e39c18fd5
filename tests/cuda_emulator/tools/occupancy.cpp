// occupancy REGISTERS THREADS STATIC_SHARED [DYNAMIC_SHARED]: blocks that fit on a multiprocessor, by the
// toolkit's own formulae. Registers are what `nvcc -Xptxas -v` says of a kernel.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kRegisters = 65536; // of a block, and of a multiprocessor

struct Gpu {
  const char* name;
  int major, minor, multiprocessors, threads;
  size_t shared, shared_opt_in, shared_reserved; // bytes
};

const Gpu kGpus[] = {
    {"T4, sm_75", 7, 5, 40, 1024, 65536, 65536, 0},
    {"A100, sm_80", 8, 0, 108, 2048, 167936, 166912, 1024},
    {"H100, sm_90", 9, 0, 132, 2048, 233472, 232448, 1024},
};

cudaOccDeviceProp properties(const Gpu& gpu) {
  cudaOccDeviceProp result;
  result.computeMajor = gpu.major;
  result.computeMinor = gpu.minor;
  result.maxThreadsPerBlock = 1024;
  result.maxThreadsPerMultiprocessor = gpu.threads;
  result.regsPerBlock = kRegisters;
  result.regsPerMultiprocessor = kRegisters;
  result.warpSize = 32;
  result.sharedMemPerBlock = 49152;
  result.sharedMemPerMultiprocessor = gpu.shared;
  result.sharedMemPerBlockOptin = gpu.shared_opt_in;
  result.reservedSharedMemPerBlock = gpu.shared_reserved;
  result.numSms = gpu.multiprocessors;
  return result;
}

cudaOccFuncAttributes attributes(int registers, int threads, size_t static_shared) {
  cudaOccFuncAttributes result;
  result.maxThreadsPerBlock = threads;
  result.numRegs = registers;
  result.sharedSizeBytes = static_shared;
  result.partitionedGCConfig = PARTITIONED_GC_OFF;
  result.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  result.maxDynamicSharedSizeBytes = 200 << 10;
  result.numBlockBarriers = 1;
  return result;
}

void print(const Gpu& gpu, const cudaOccResult& result, int threads) {
  const int blocks = result.activeBlocksPerMultiprocessor;
  printf("%-12s %2d blocks, %3d%% of its threads, limited by", gpu.name, blocks,
         100 * blocks * threads / gpu.threads);
  if (result.limitingFactors & OCC_LIMIT_WARPS) printf(" warps");
  if (result.limitingFactors & OCC_LIMIT_REGISTERS) printf(" registers");
  if (result.limitingFactors & OCC_LIMIT_SHARED_MEMORY) printf(" shared memory");
  if (result.limitingFactors & OCC_LIMIT_BLOCKS) printf(" blocks");
  printf("\n");
}

} // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "occupancy REGISTERS THREADS STATIC_SHARED [DYNAMIC_SHARED]\n");
    return 2;
  }
  const int threads = atoi(argv[2]);
  const cudaOccFuncAttributes kernel = attributes(atoi(argv[1]), threads, atoi(argv[3]));
  const size_t dynamic_shared = argc > 4 ? atoi(argv[4]) : 0;
  for (const Gpu& gpu : kGpus) {
    const cudaOccDeviceProp device = properties(gpu);
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic_shared) ==
        CUDA_OCC_SUCCESS) {
      print(gpu, result, threads);
    } else {
      printf("%-12s does not take it\n", gpu.name);
    }
  }
}
