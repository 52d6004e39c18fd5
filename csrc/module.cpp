// The module lossops._C: what was built, which kernels run, and a short way into them. No torch here.
#undef TORCH_TARGET_VERSION // under which torch 2.10 to 2.12 refuse their own copy of pybind11

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cross_entropy.h"
#include "mse.h"
#include "product.h"
#include "trace.h"
#ifdef LOSSOPS_CUDA
#include "cuda/runtime.h"
#endif

#ifndef LOSSOPS_VERSION
#error "LOSSOPS_VERSION is set by setup.py"
#endif

// The shortest way into the kernels, for batches so small that the dispatcher costs more than the loss:
// addresses of contiguous float32 tensors on the CPU, which lossops/_small.py has checked and allocated.
namespace lossops {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr float kOne = 1; // an upstream gradient

template <class Problem>
Problem small_cross_entropy(uintptr_t logits, uintptr_t target, char* stats, int64_t rows, int64_t classes) {
  Problem call;
  call.classes = classes;
  call.rows = Positions<kCrossEntropyOperands>(&rows, 1);
  for (const auto operand : {kLogits, kGradLogits}) call.rows.stride[operand][0] = classes;
  for (const auto operand : {kTarget, kRow}) call.rows.stride[operand][0] = 1;
  call.rows.simplify();
  call.logits = {at<void>(logits), DType::f32, 1};
  call.target = {at<void>(target), DType::i64, 0};
  call.stats = stats;
  return call;
}

// What the backward needs, the normalizer of the mean and the stats of all rows, or None where a class index
// is out of range. It is Python bytes: a second tensor would cost more than the kernel. With grad_logits (0:
// none) the gradient too, for an upstream gradient of 1.
pybind11::object small_cross_entropy_forward(uintptr_t logits, uintptr_t target, uintptr_t loss,
                                             uintptr_t grad_logits, int64_t rows, int64_t classes,
                                             int64_t ignore_index) {
  auto kept = pybind11::reinterpret_steal<pybind11::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(sizeof(double) + 2 * rows * sizeof(float))));
  char* const bytes = PyBytes_AsString(kept.ptr());
  auto call = small_cross_entropy<CrossEntropyForward>(logits, target, bytes + sizeof(double), rows, classes);
  call.ignore_index = ignore_index;
  call.loss = at<void>(loss);
  double normalizer = 0;
  bool bad_target = false;
  call.normalizer = &normalizer;
  call.bad_target = &bad_target;
  if (grad_logits == 0) {
    cpu::launch(call);
  } else {
    CrossEntropyBackward gradient;
    static_cast<CrossEntropyProblem&>(gradient) = call;
    normalizer = cpu::weigh_rows(call);
    gradient.grad_loss = &kOne;
    gradient.normalizer = &normalizer;
    gradient.grad_logits = {at<void>(grad_logits), DType::f32, 1};
    gradient.bad_target = &bad_target;
    cpu::launch(call, &gradient);
  }
  if (bad_target) return pybind11::none();
  std::memcpy(bytes, &normalizer, sizeof(double));
  return kept;
}

// False where a class index is out of range: the target was changed since the forward.
bool small_cross_entropy_backward(uintptr_t grad_loss, uintptr_t logits, uintptr_t target,
                                  uintptr_t grad_logits, int64_t rows, int64_t classes, int64_t ignore_index,
                                  const pybind11::bytes& kept) {
  char* const bytes = PyBytes_AsString(kept.ptr());
  double normalizer;
  std::memcpy(&normalizer, bytes, sizeof(double));
  auto call =
      small_cross_entropy<CrossEntropyBackward>(logits, target, bytes + sizeof(double), rows, classes);
  call.ignore_index = ignore_index;
  call.grad_loss = at<void>(grad_loss);
  call.normalizer = &normalizer;
  call.grad_logits = {at<void>(grad_logits), DType::f32, 1};
  bool bad_target = false;
  call.bad_target = &bad_target;
  cpu::launch(call);
  return !bad_target;
}

template <class Problem>
Problem small_mse(uintptr_t input, uintptr_t target, int64_t elements) {
  Problem call;
  call.elements = Positions<kMSEOperands>(&elements, 1);
  for (const auto operand : {kInput, kTargetElement, kOut, kOutTarget}) call.elements.stride[operand][0] = 1;
  call.elements.simplify();
  call.input = {at<void>(input), DType::f32};
  call.target = {at<void>(target), DType::f32};
  return call;
}

// With grad_input (0: none) the gradient too, for an upstream gradient of 1.
void small_mse_forward(uintptr_t input, uintptr_t target, uintptr_t loss, uintptr_t grad_input,
                       int64_t elements) {
  auto call = small_mse<MSEForward>(input, target, elements);
  call.out = {at<void>(loss), DType::f32};
  auto normalizer = static_cast<double>(elements);
  call.normalizer = &normalizer;
  if (grad_input == 0) return cpu::launch(call);
  MSEBackward gradient;
  static_cast<MSEProblem&>(gradient) = call;
  gradient.grad = {const_cast<float*>(&kOne), DType::f32};
  gradient.normalizer = &normalizer;
  gradient.grad_input = {at<void>(grad_input), DType::f32};
  cpu::launch(call, &gradient);
}

void small_mse_backward(uintptr_t grad_loss, uintptr_t input, uintptr_t target, uintptr_t grad_input,
                        int64_t elements) {
  auto call = small_mse<MSEBackward>(input, target, elements);
  const double normalizer = static_cast<double>(elements);
  call.grad = {at<void>(grad_loss), DType::f32};
  call.normalizer = &normalizer;
  call.grad_input = {at<void>(grad_input), DType::f32};
  cpu::launch(call);
}

// (toolkit, architectures), or None where CUDA is not built in.
std::optional<std::pair<std::string, std::string>> cuda_build_info() {
#ifdef LOSSOPS_CUDA
  const cuda::BuildInfo info = cuda::build_info();
  return std::pair(std::string(info.toolkit), std::string(info.architectures));
#else
  return std::nullopt;
#endif
}

// (what, how, device, amount) of every entry; see trace.h.
std::vector<std::tuple<std::string, std::string, std::string, int64_t>> trace_entries() {
  std::vector<std::tuple<std::string, std::string, std::string, int64_t>> entries;
  for (const TraceEntry& e : stop_trace()) entries.emplace_back(e.what, e.how, e.device, e.amount);
  return entries;
}

} // namespace
} // namespace lossops

PYBIND11_MODULE(_C, m) {
  using namespace lossops;
  using namespace lossops::cpu;
  m.attr("__version__") = LOSSOPS_VERSION;
  m.def(
      "cpu_isa", [] { return isa_name(active_isa()); }, "The instruction set that the CPU kernels run with.");
  m.def("set_cpu_isa", &set_isa, "Chooses one of available_cpu_isas() for all later calls.");
  m.def("available_cpu_isas", &available_isas,
        "The instruction sets built in that this processor has, best first.");
  m.def("start_trace", &start_trace, "Records launches and copies from now on, for lossops.explain.");
  m.def("stop_trace", &trace_entries, "What was recorded: (what, how, device, amount) each.");
  m.def("empty_cache", &release_pages, "Returns the pages kept for gradients to the system.");
  m.def("drop_pages", &drop_pages, "Gives the whole pages among these bytes back to the system.");
  m.def("set_stream_bytes", &set_stream_bytes,
        "Gradients of this size and more are written past the caches; returns what it was. For tests.");
  m.def("multiplies_faster", &multiplies_faster,
        "Whether products of float32 and float64 are faster by the op multiply_ than by torch.");
  m.def("cuda_build_info", &cuda_build_info, "The CUDA toolkit and architectures built in, or None.");
  m.def("small_cross_entropy_forward", &small_cross_entropy_forward);
  m.def("small_cross_entropy_backward", &small_cross_entropy_backward);
  m.def("small_mse_forward", &small_mse_forward);
  m.def("small_mse_backward", &small_mse_backward);
}
