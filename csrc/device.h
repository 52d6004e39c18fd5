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

// Of torch 2.11 and later: null in an older one, as weak symbols are that nobody defines.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace lossops {

struct Cpu {
  template <class Call>
  static void launch(const Call& call, const Tensor&) {
    cpu::launch(call);
  }

  // Large tensors on pages of our own, whose storage torch cannot resize.
  static Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype,
                              const Tensor& like) {
    int64_t bytes = element_size(dtype);
    for (const int64_t size : sizes) bytes *= size;
    const bool large = bytes >= cpu::kLargeBytes && torch_from_blob != nullptr;
    const cpu::Pages pages = large ? cpu::take_pages(bytes) : cpu::Pages{};
    if (pages.data == nullptr) {
      Tensor t = lossops::empty_strided(sizes, strides, dtype, like);
      cpu::use_huge_pages(t.mutable_data_ptr(), bytes);
      return t;
    }
    const auto give = [](void* data, void* size) {
      cpu::give_pages({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(size))});
    };
    AtenTensorHandle handle;
    const AOTITorchError code =
        torch_from_blob(pages.data, sizes.size(), sizes.data(), strides.data(), 0, shim_dtype(dtype),
                        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                        give, reinterpret_cast<void*>(static_cast<intptr_t>(pages.bytes)));
    if (code != AOTI_TORCH_SUCCESS) cpu::give_pages(pages);
    STABLE_TORCH_ERROR_CODE_CHECK(code);
    return Tensor(handle);
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
  static Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype,
                              const Tensor& like) {
    return lossops::empty_strided(sizes, strides, dtype, like);
  }
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
