// The ops of mean squared error: checks, allocation, registration. Maths: mse.h.
#include "mse.h"

#include "device.h"

namespace lossops {
namespace {

// A call's tensors, of one shape (expanded views where the caller broadcast them).
class Operands {
 public:
  Operands(const char* op, const Tensor& input)
      : op_(op), input_(input), sizes_(sizes_of(input)), elements_(sizes_.data(), sizes_.size()) {}

  Elements take(const Tensor& t, MSEOperand operand, const char* name) {
    check_like_input(t, name);
    const Sizes strides = strides_of(t);
    std::copy(strides.begin(), strides.end(), elements_.stride[operand]);
    const DType dtype = dtype_of(t, op_, name);
    use_double_ = use_double_ || dtype == DType::f64;
    return {t.data_ptr(), dtype};
  }

  // One upstream gradient for all elements (0-d: strides stay 0) or one an element.
  Elements take_grad(const Tensor& grad) {
    if (grad.dim() > 0) return take(grad, kGrad, "grad_loss");
    check_same_device(grad, input_, op_, "grad_loss");
    return {grad.data_ptr(), dtype_of(grad, op_, "grad_loss")};
  }

  // What every op is given.
  void take_problem(MSEProblem& call, const Tensor& input, const Tensor& target,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& mask) {
    call.input = take(input, kInput, "input");
    call.target = take(target, kTargetElement, "target");
    if (weight) call.weight = take(*weight, kWeight, "weight");
    if (mask) take_mask(call, *mask);
  }

  void give(MSEProblem& call) {
    elements_.simplify();
    call.elements = elements_;
    call.use_double = use_double_;
  }

 private:
  void check_like_input(const Tensor& t, const char* name) {
    LOSSOPS_CHECK(sizes_of(t) == sizes_, op_, ": expected ", name, " of shape ", sizes_, " like input, got ",
                  sizes_of(t));
    check_same_device(t, input_, op_, name);
  }

  void take_mask(MSEProblem& call, const Tensor& mask) {
    check_like_input(mask, "mask");
    LOSSOPS_CHECK(mask.scalar_type() == ScalarType::Bool, op_, ": expected mask of dtype Bool, got ",
                  torch::headeronly::toString(mask.scalar_type()));
    call.mask = static_cast<const uint8_t*>(mask.data_ptr());
    call.mask_elements = Positions<kMaskOperands>(sizes_.data(), sizes_.size());
    const Sizes of_input = strides_of(input_), strides = strides_of(mask);
    std::copy(of_input.begin(), of_input.end(), call.mask_elements.stride[kMaskedInput]);
    std::copy(strides.begin(), strides.end(), call.mask_elements.stride[kMask]);
    call.mask_elements.simplify();
  }

  const char* op_;
  Tensor input_;
  Sizes sizes_;
  Positions<kMSEOperands> elements_;
  bool use_double_ = false;
};

template <class Device>
std::tuple<Tensor, Tensor> forward(Operands& operands, MSEForward& call, const Tensor& input,
                                   Reduction reduction, ScalarType dtype, const char* op) {
  call.reduction = reduction;
  const bool none = reduction == Reduction::none;
  Tensor loss = none ? empty_elementwise<Device>(input, dtype) : empty({}, dtype, input);
  Tensor normalizer = empty({}, ScalarType::Double, input);
  call.out =
      none ? operands.take(loss, kOut, "loss") : Elements{loss.data_ptr(), dtype_of(loss, op, "out_dtype")};
  call.normalizer = static_cast<double*>(normalizer.data_ptr());
  operands.give(call);
  Device::launch(call, input);
  return {loss, normalizer};
}

template <class Device>
std::tuple<Tensor, Tensor> mse_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                       std::optional<Tensor> mask, int64_t reduction,
                                       std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "mse_loss";
  Operands operands(op, input);
  MSEForward call;
  operands.take_problem(call, input, target, weight, mask);
  ScalarType dtype = promote(input.scalar_type(), target.scalar_type());
  if (weight) dtype = promote(dtype, weight->scalar_type());
  return forward<Device>(operands, call, input, reduction_of(reduction, op), out_dtype.value_or(dtype), op);
}

template <class Device>
std::tuple<Tensor, Tensor> mse_jvp(Tensor input, Tensor target, std::optional<Tensor> weight,
                                   std::optional<Tensor> mask, Tensor input_tangent, Tensor target_tangent,
                                   int64_t reduction, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "mse_jvp";
  Operands operands(op, input);
  MSEForward call;
  operands.take_problem(call, input, target, weight, mask);
  call.input_tangent = operands.take(input_tangent, kInputTangent, "input_tangent");
  call.target_tangent = operands.take(target_tangent, kTargetTangent, "target_tangent");
  const ScalarType dtype = promote(input.scalar_type(), target.scalar_type());
  return forward<Device>(operands, call, input, reduction_of(reduction, op), out_dtype.value_or(dtype), op);
}

template <class Device>
std::tuple<Tensor, Tensor> mse_backward(Tensor grad_loss, Tensor input, Tensor target,
                                        std::optional<Tensor> weight, std::optional<Tensor> mask,
                                        std::optional<Tensor> normalizer, bool need_input, bool need_target) {
  constexpr const char* op = "mse_backward";
  Operands operands(op, input);
  MSEBackward call;
  operands.take_problem(call, input, target, weight, mask);
  call.grad = operands.take_grad(grad_loss);
  const auto gradient = [&](bool need, const Tensor& of, MSEOperand operand, const char* name,
                            Elements& out) {
    if (!need) return empty({0}, of.scalar_type(), of);
    Tensor t = empty_elementwise<Device>(of, of.scalar_type());
    out = operands.take(t, operand, name);
    return t;
  };
  Tensor grad_input = gradient(need_input, input, kOut, "grad_input", call.grad_input);
  Tensor grad_target = gradient(need_target, target, kOutTarget, "grad_target", call.grad_target);
  call.normalizer = normalizer_pointer(normalizer, input, op);
  operands.give(call);
  Device::launch(call, input);
  return {grad_input, grad_target};
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("mse_forward", TORCH_BOX(&mse_forward<Device>));
  m.impl("mse_jvp", TORCH_BOX(&mse_jvp<Device>));
  m.impl("mse_backward", TORCH_BOX(&mse_backward<Device>));
}

LOSSOPS_IMPLEMENT(implement)

#ifndef LOSSOPS_EMULATED

// The loss without weight or mask, and the gradient of the input for an upstream gradient of 1.
std::tuple<Tensor, Tensor, Tensor> mse_forward_backward(Tensor input, Tensor target, int64_t reduction,
                                                        std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "mse_loss";
  static const double one = 1;
  Operands operands(op, input);
  MSEForward call;
  MSEBackward gradient;
  operands.take_problem(call, input, target, std::nullopt, std::nullopt);
  call.reduction = reduction_of(reduction, op);
  LOSSOPS_CHECK_AS(ValueError, call.reduction != Reduction::none,
                   "mse_forward_backward: expected reduction 1 (mean) or 2 (sum), got 0");
  const ScalarType dtype = out_dtype.value_or(promote(input.scalar_type(), target.scalar_type()));
  Tensor loss = empty({}, dtype, input), normalizer = empty({}, ScalarType::Double, input);
  Tensor grad_input = empty_elementwise<Cpu>(input, input.scalar_type());
  gradient.grad_input = operands.take(grad_input, kOut, "grad_input");
  gradient.grad = {const_cast<double*>(&one), DType::f64};
  call.out = {loss.data_ptr(), dtype_of(loss, op, "out_dtype")};
  call.normalizer = static_cast<double*>(normalizer.data_ptr());
  operands.give(call);
  static_cast<MSEProblem&>(gradient) = call;
  *call.normalizer = static_cast<double>(call.elements.count);
  if (call.reduction == Reduction::mean) gradient.normalizer = call.normalizer;
  cpu::launch(call, &gradient);
  return {loss, normalizer, grad_input};
}

STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CPU, m) {
  m.impl("mse_forward_backward", TORCH_BOX(&mse_forward_backward));
}

#endif

} // namespace
} // namespace lossops
