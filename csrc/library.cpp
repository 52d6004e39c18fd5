// Every op's schema.
#include "cross_entropy.h"
#include "mse.h"

#include "device.h"

// STABLE_TORCH_LIBRARY pastes its argument as it stands: this expands LOSSOPS_NAMESPACE first.
#define LOSSOPS_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)

// reduction: 0 none, 1 mean, 2 sum. Where a gradient is not needed, its result is an empty tensor.
// `stats` and `normalizer` are what the forward leaves for the backward ops; `rows` are the row functions of
// cross_entropy.h, in planes.
LOSSOPS_LIBRARY(LOSSOPS_NAMESPACE, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? out_dtype) -> (Tensor loss, Tensor stats, Tensor normalizer)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor? normalizer, int ignore_index, float label_smoothing, bool need_logits, bool need_target) "
      "-> (Tensor grad_logits, Tensor grad_target)");
  m.def(
      "cross_entropy_rows_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? scale_tensor, float "
      "scale, "
      "float softcap, int ignore_index, float label_smoothing, bool entropy, bool predicted) "
      "-> (Tensor rows, Tensor predicted)");
  m.def(
      "cross_entropy_rows_backward(Tensor grad_rows, Tensor rows, Tensor logits, Tensor target, "
      "Tensor? weight, Tensor? scale_tensor, float scale, float softcap, int ignore_index, "
      "float label_smoothing, bool need_logits, bool need_target, bool need_scale) "
      "-> (Tensor grad_logits, Tensor grad_target, Tensor grad_scale)");
  m.def(
      "cross_entropy_rows_backward_(Tensor grad_rows, Tensor rows, Tensor(a!) logits, Tensor target, "
      "Tensor? weight, Tensor? scale_tensor, float scale, float softcap, int ignore_index, "
      "float label_smoothing, bool need_target, bool need_scale) "
      "-> (Tensor grad_target, Tensor grad_scale)");
  m.def(
      "cross_entropy_rows_backward_backward(Tensor? tangent, Tensor? scale_tangent, Tensor grad_rows, "
      "Tensor rows, Tensor logits, Tensor target, Tensor? weight, Tensor? scale_tensor, float scale, "
      "float softcap, int ignore_index, float label_smoothing, bool need_logits, bool need_target, "
      "bool need_scale) "
      "-> (Tensor row_dots, Tensor grad_logits, Tensor grad_target, Tensor grad_scale)");
  m.def(
      "mse_forward(Tensor input, Tensor target, Tensor? weight, Tensor? mask, int reduction, "
      "ScalarType? out_dtype) -> (Tensor loss, Tensor normalizer)");
  m.def(
      "mse_jvp(Tensor input, Tensor target, Tensor? weight, Tensor? mask, Tensor input_tangent, "
      "Tensor target_tangent, int reduction, ScalarType? out_dtype) -> (Tensor loss, Tensor normalizer)");
  m.def(
      "mse_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? mask, "
      "Tensor? normalizer, bool need_input, bool need_target) -> (Tensor grad_input, Tensor grad_target)");
  m.def("check_async_errors() -> ()");
  // The CPU's alone: a loss with its gradient for an upstream gradient of 1.
  m.def(
      "cross_entropy_forward_backward(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, ScalarType? out_dtype) "
      "-> (Tensor loss, Tensor stats, Tensor normalizer, Tensor grad_logits)");
  m.def(
      "mse_forward_backward(Tensor input, Tensor target, int reduction, ScalarType? out_dtype) "
      "-> (Tensor loss, Tensor normalizer, Tensor grad_input)");
  // Internal: out = a b, or out += a b, of float32 or float64 matrices of any strides; `out` overlaps
  // neither.
  m.def("multiply_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
}
