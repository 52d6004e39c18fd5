// Stand-in for libcudart: launches run the translated kernels at once, on the calling thread; device memory
// is host memory, and every stream is synchronous.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <unordered_map>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kDefaultSharedLimit = 48 << 10; // above it a kernel has to opt in
constexpr size_t kSharedLimit = 227 << 10;       // of sm_90

struct Function {
  const Kernel* kernel;
  size_t dynamic_limit;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// What the host code has registered, by the address of its stub or shadow variable.
struct Registry {
  std::unordered_map<const void*, Function> functions;
  std::unordered_map<const void*, const Variable*> variables;
};

// Never destroyed: host code unregisters at exit, in an order of its own.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

thread_local Configuration configuration;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

template <class Entry>
const Entry& find(const Entry* entries, const char* name) {
  for (; entries->name != nullptr; ++entries) {
    if (strcmp(entries->name, name) == 0) return *entries;
  }
  fprintf(stderr, "cuda_emulator: the host code registers %s, which was not translated\n", name);
  abort();
}

Function* function_of(const void* stub) {
  const auto found = registry().functions.find(stub);
  return found == registry().functions.end() ? nullptr : &found->second;
}

const Variable* variable_of(const void* shadow) {
  const auto found = registry().variables.find(shadow);
  return found == registry().variables.end() ? nullptr : found->second;
}

bool valid(dim3 grid, dim3 block) {
  const auto threads = size_t(block.x) * block.y * block.z;
  return grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
         grid.z <= 65535 && threads > 0 && threads <= 1024 && block.z <= 64;
}

// cluster: 0 where the launch does not say.
cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared,
                   unsigned cluster = 0) {
  const Function* function = function_of(stub);
  if (function == nullptr) return cudaErrorInvalidDeviceFunction;
  const Kernel& kernel = *function->kernel;
  if (!valid(grid, block)) return cudaErrorInvalidConfiguration;
  if (kernel.max_threads > 0 && size_t(block.x) * block.y * block.z > kernel.max_threads) {
    return cudaErrorInvalidConfiguration;
  }
  if (dynamic_shared > function->dynamic_limit) return cudaErrorInvalidValue;
  const Vector3 blocks = {grid.x, grid.y, grid.z};
  const Vector3 threads = {block.x, block.y, block.z};
  if (cluster == 0) cluster = kernel.cluster_size;
  if (grid.x % cluster != 0) return cudaErrorInvalidConfiguration;
  run({&kernel, blocks, threads, static_cast<unsigned>(dynamic_shared), cluster, arguments});
  return cudaSuccess;
}

cudaError_t symbol_range(const void* symbol, size_t count, size_t offset, char*& address) {
  const Variable* variable = variable_of(symbol);
  if (variable == nullptr) return cudaErrorInvalidSymbol;
  if (offset + count > variable->bytes) return cudaErrorInvalidValue;
  address = static_cast<char*>(variable->address) + offset;
  return cudaSuccess;
}

} // namespace
} // namespace emulator

using emulator::record;

extern "C" {

// Called by the code that nvcc puts into every host object. The fat binary is registered by the module
// itself (see build.py), whose address is the handle.

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const auto* module = reinterpret_cast<const emulator::Module*>(handle);
  const auto& kernel = emulator::find(module->kernels, name);
  const size_t limit = emulator::kDefaultSharedLimit;
  emulator::registry().functions[stub] = {&kernel,
                                          limit > kernel.static_shared ? limit - kernel.static_shared : 0};
}

void __cudaRegisterVar(void** handle, char* shadow, char*, const char* name, int, size_t, int, int) {
  const auto* module = reinterpret_cast<const emulator::Module*>(handle);
  emulator::registry().variables[shadow] = &emulator::find(module->variables, name);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  emulator::configuration = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = emulator::configuration.grid;
  *block = emulator::configuration.block;
  *shared = emulator::configuration.shared;
  *static_cast<cudaStream_t*>(stream) = emulator::configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return record(emulator::launch(stub, grid, block, arguments, shared));
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return record(emulator::launch(kernel, grid, block, arguments, shared));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  unsigned cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  return record(emulator::launch(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                                 cluster));
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  auto* function = emulator::function_of(stub);
  if (function == nullptr) return record(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || function->kernel->static_shared + value > emulator::kSharedLimit) {
    return record(cudaErrorInvalidValue);
  }
  function->dynamic_limit = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  const auto* function = emulator::function_of(stub);
  if (function == nullptr) return record(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->sharedSizeBytes = function->kernel->static_shared;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(function->dynamic_limit);
  attributes->maxThreadsPerBlock = function->kernel->max_threads > 0 ? function->kernel->max_threads : 1024;
  attributes->numRegs = 32;
  return cudaSuccess;
}

// As many as threads allow: registers are not known here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                   size_t, unsigned) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}

// Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = ::operator new(bytes, std::align_val_t(256));
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  ::operator delete(pointer, std::align_val_t(256));
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return record(emulator::symbol_range(symbol, 0, 0, reinterpret_cast<char*&>(*address)));
}

cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  const auto* variable = emulator::variable_of(symbol);
  if (variable == nullptr) return record(cudaErrorInvalidSymbol);
  *size = variable->bytes;
  return cudaSuccess;
}

cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  char* from = nullptr;
  const auto error = emulator::symbol_range(symbol, bytes, offset, from);
  if (error == cudaSuccess) memcpy(to, from, bytes);
  return record(error);
}

cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                      cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  char* to = nullptr;
  const auto error = emulator::symbol_range(symbol, bytes, offset, to);
  if (error == cudaSuccess) memcpy(to, from, bytes);
  return record(error);
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

// Devices, streams, errors

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return record(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break; // few, so that small tensors fill the device
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = emulator::kDefaultSharedLimit; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::kSharedLimit; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = EMULATOR_ARCHITECTURE / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = EMULATOR_ARCHITECTURE % 10; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: return record(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  return cudaRuntimeGetVersion(version);
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const auto error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  return emulator::last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidSymbol: return "cudaErrorInvalidSymbol";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    default: return "unrecognized error code";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidSymbol: return "invalid device symbol";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    default: return "unrecognized error code";
  }
}

} // extern "C"
