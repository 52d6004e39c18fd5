// Launching: from a call's types to a kernel, and errors as sentences.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace lossops::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA said: " + cudaGetErrorString(error));
}

// Of the launch just made. What a kernel does wrong while it runs shows at the next synchronisation.
inline void check_launch(const char* op) {
  check(cudaGetLastError(), op);
}

template <class T>
struct Type {
  using type = T;
};

// f(std::true_type) or f(std::false_type)
template <class F>
void with_flag(bool value, const F& f) {
  if (value)
    f(std::true_type());
  else
    f(std::false_type());
}

} // namespace lossops::cuda
