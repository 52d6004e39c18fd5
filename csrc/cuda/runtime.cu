#include "runtime.h"

#include "launch.h"

#ifndef LOSSOPS_CUDA_ARCHITECTURES
#error "LOSSOPS_CUDA_ARCHITECTURES is set by setup.py"
#endif

#define LOSSOPS_STRING(x) #x
#define LOSSOPS_VERSION_STRING(major, minor, build) \
  LOSSOPS_STRING(major) "." LOSSOPS_STRING(minor) "." LOSSOPS_STRING(build)

namespace lossops::cuda {

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // An error means a capture that this stream's work would break, and is the capture's own to report.
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "lossops");
  return device;
}

BuildInfo build_info() {
  return {LOSSOPS_VERSION_STRING(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__),
          LOSSOPS_CUDA_ARCHITECTURES};
}

} // namespace lossops::cuda
