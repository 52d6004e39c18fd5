// The devices: how each launches a call, and where its ops are registered.
// A loss includes its contract first, then this.
//
// With LOSSOPS_EMULATED the ops make a second library, for tests: namespace lossops_emulated, the CUDA
// kernels alone, on CPU tensors, launched by an emulator in the place of the CUDA runtime.
#pragma once

#include "cpu/memory.h"
#include "op.h"

#ifdef LOSSOPS_EMULATED
#define LOSSOPS_CUDA
#define LOSSOPS_NAMESPACE lossops_emulated
#else
#define LOSSOPS_NAMESPACE lossops
#endif

#if defined(LOSSOPS_CUDA) && !defined(LOSSOPS_EMULATED)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/runtime.h"
#endif

namespace lossops {

struct Cpu {
  template <class Call>
  static void launch(const Call& call, const Tensor&) {
    cpu::launch(call);
  }
  static void before_first_touch(void* data, int64_t bytes) {
    cpu::use_huge_pages(data, bytes);
  }
};

#ifdef LOSSOPS_CUDA

#ifdef LOSSOPS_EMULATED

class OnCudaDevice {
 public:
  explicit OnCudaDevice(int32_t) {}
  void* stream() const {
    return nullptr;
  }
  bool is_capturing() const {
    return false;
  }
};

#else

// While it lives, this device is the current one.
class OnCudaDevice {
 public:
  explicit OnCudaDevice(int32_t index) : index_(index), guard_(index) {}

  // torch's current cudaStream_t. The function that knows it is in libtorch_cuda, and is looked for when
  // first called: linked, it would keep this library from loading beside a torch without CUDA.
  void* stream() const {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    LOSSOPS_CHECK(get,
                  "lossops: expected a torch with CUDA, and found no current stream in libtorch_cuda.so");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get(index_, &stream));
    return stream;
  }
  bool is_capturing() const {
    return cuda::is_capturing(stream());
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

struct Cuda {
  // The workspace may go as soon as the kernels are queued: torch hands its memory only to what comes
  // later in the same stream.
  template <class Call>
  static void launch(const Call& call, const Tensor& like) {
    const OnCudaDevice here(like.get_device_index());
    const int64_t bytes = cuda::workspace_bytes(call);
    std::optional<Tensor> workspace;
    if (bytes > 0) workspace = empty({bytes}, ScalarType::Byte, like);
    cuda::launch(call, workspace ? workspace->mutable_data_ptr() : nullptr, here.stream());
  }
  static void before_first_touch(void*, int64_t) {}
};

#endif

// LOSSOPS_IMPLEMENT(f) registers, for every device that is built, what f<Device>(library) implements.
#if defined(LOSSOPS_EMULATED)
#define LOSSOPS_IMPLEMENT(f)                             \
  STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CPU, m) { \
    f<Cuda>(m);                                          \
  }
#elif defined(LOSSOPS_CUDA)
#define LOSSOPS_IMPLEMENT(f)                              \
  STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CPU, m) {  \
    f<Cpu>(m);                                            \
  }                                                       \
  STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CUDA, m) { \
    f<Cuda>(m);                                           \
  }
#else
#define LOSSOPS_IMPLEMENT(f)                             \
  STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CPU, m) { \
    f<Cpu>(m);                                           \
  }
#endif

} // namespace lossops
