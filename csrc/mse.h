// Contract of the mean squared error kernels: what one call computes, for every device.
//   loss_i      = w_i*(x_i - y_i)^2
//   dloss/dx_i  = 2*w_i*(x_i - y_i) = -dloss/dy_i
//   jvp_i       = 2*w_i*(x_i - y_i)*(dx_i - dy_i)
// Each formula is linear in its last difference, so that forward, backward and jvp, applied to one
// another's arguments, are the derivatives of every order. Where a mask says that an element does not
// count, each is 0 and so is w_i, whatever the other operands hold there: chosen, not multiplied, for
// 0 times NaN is NaN.
#pragma once

#include "layout.h"

namespace lossops {

enum MSEOperand {
  kInput,
  kTargetElement,
  kWeight,
  kInputTangent,
  kTargetTangent,
  kGrad,
  kOut,
  kOutTarget,
  kMSEOperands
};

struct Elements {
  void* data = nullptr; // null: absent
  DType dtype = DType::f32;
};

// The mask is walked on its own: one byte for a row of a few elements would cut the walk of the others
// into runs of these few. Both walks go by the input's strides, and so in one order.
enum MaskOperand { kMaskedInput, kMask, kMaskOperands };

struct MSEProblem {
  bool use_double = false; // accumulate in float64 instead of float32
  Positions<kMSEOperands> elements;
  Elements input, target, weight;
  const uint8_t* mask = nullptr; // an element counts where its byte is not 0; null: all do
  Positions<kMaskOperands> mask_elements;
};

// The loss, or its derivative along a tangent where input_tangent is given.
struct MSEForward : MSEProblem {
  Elements input_tangent, target_tangent;
  Reduction reduction = Reduction::mean;
  Elements out;                 // one element each for none, else one element
  double* normalizer = nullptr; // what mean divides by: the number of elements or the sum of weights
};

struct MSEBackward : MSEProblem {
  Elements grad;                      // of the loss: one value (strides 0) or one an element
  const double* normalizer = nullptr; // divides grad, or null
  Elements grad_input, grad_target;   // data may be null
};

namespace cpu {
// With `gradient`, of the same operands, that too: unit by unit, while these are in the caches. A normalizer
// that it reads must have been set.
void launch(const MSEForward&, const MSEBackward* gradient = nullptr);
void launch(const MSEBackward&);
} // namespace cpu

namespace cuda {

// Device memory that a call needs beside its operands.
int64_t workspace_bytes(const MSEForward&);
int64_t workspace_bytes(const MSEBackward&);

// On the current device and this cudaStream_t; returns before the kernels have run.
void launch(const MSEForward&, void* workspace, void* stream);
void launch(const MSEBackward&, void* workspace, void* stream);

} // namespace cuda

} // namespace lossops
