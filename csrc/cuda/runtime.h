// What the ops ask the CUDA runtime, and what was built.
#pragma once

namespace lossops::cuda {

// Whether launches into this cudaStream_t are being recorded into a graph: then nothing may wait for it.
bool is_capturing(void* stream);

int current_device();

struct BuildInfo {
  const char* toolkit;       // 13.0.88
  const char* architectures; // sm_80 sm_90 compute_90
};

BuildInfo build_info();

} // namespace lossops::cuda
