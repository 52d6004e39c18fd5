// Every op's schema, and the module lossops._C: what was built and which kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

#ifndef LOSSOPS_VERSION
#error "LOSSOPS_VERSION is set by setup.py"
#endif

// reduction: 0 none, 1 mean, 2 sum. Where a gradient is not needed, its result is an empty tensor.
// `stats` and `normalizer` are what the forward leaves for the backward ops.
STABLE_TORCH_LIBRARY(lossops, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? out_dtype) -> (Tensor loss, Tensor stats, Tensor normalizer)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor? normalizer, int ignore_index, float label_smoothing, bool need_logits, bool need_target) "
      "-> (Tensor grad_logits, Tensor grad_target)");
  m.def(
      "cross_entropy_backward_backward(Tensor tangent, Tensor grad_loss, Tensor logits, Tensor target, "
      "Tensor? weight, Tensor stats, int ignore_index, float label_smoothing, bool need_logits, bool "
      "need_target) "
      "-> (Tensor row_dot, Tensor grad_logits, Tensor grad_target)");
  m.def(
      "mse_forward(Tensor input, Tensor target, Tensor? weight, int reduction, ScalarType? out_dtype) "
      "-> (Tensor loss, Tensor normalizer)");
  m.def(
      "mse_jvp(Tensor input, Tensor target, Tensor? weight, Tensor input_tangent, Tensor target_tangent, "
      "int reduction, ScalarType? out_dtype) -> (Tensor loss, Tensor normalizer)");
  m.def(
      "mse_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? normalizer, "
      "bool need_input, bool need_target) -> (Tensor grad_input, Tensor grad_target)");
}

PYBIND11_MODULE(_C, m) {
  using namespace lossops::cpu;
  m.attr("__version__") = LOSSOPS_VERSION;
  m.def(
      "cpu_isa", [] { return isa_name(active_isa()); }, "The instruction set that the CPU kernels run with.");
  m.def("set_cpu_isa", &set_isa, "Chooses one of available_cpu_isas() for all later calls.");
  m.def("available_cpu_isas", &available_isas,
        "The instruction sets built in that this processor has, best first.");
}
