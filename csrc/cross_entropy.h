// Contract of the softmax cross-entropy kernels: what one call computes, for every device.
//
// For a row of logits u with target weights t_c (t_c = w_c*((1-eps)*onehot_c + eps/C) for a class
// index, w_c*((1-eps)*p_c + eps/C) for probabilities, 0 for an ignored row), with S = sum_c t_c:
//   loss        = S*lse - sum_c t_c*u_c
//   dloss/du_c  = S*softmax_c - t_c
//   dloss/dp_c  = (1-eps)*w_c*(lse - u_c)
// lse is kept as the pair (max, log sum exp(u - max)): their rounded sum would cost the softmax its
// digits at logits of 1e4 and all of them at 1e30.
#pragma once

#include "layout.h"

namespace lossops {

// Operands of a call: each has its own strides over the rows.
enum CrossEntropyOperand {
  kLogits,
  kTarget,
  kRow, // loss of each row, stats, row_dot: contiguous, in the logical order of the rows
  kGradLoss,
  kGradLogits,
  kGradTarget,
  kTangent,
  kCrossEntropyOperands
};

// One tensor with a class dimension.
struct ClassTensor {
  void* data = nullptr; // null: absent
  DType dtype = DType::f32;
  int64_t class_stride = 1;
};

struct CrossEntropyProblem {
  bool use_double = false; // accumulate in float64 instead of float32: any operand is float64
  int64_t classes = 0;
  Positions<kCrossEntropyOperands> rows;
  ClassTensor logits;
  ClassTensor target;           // an integer dtype means class indices (class_stride unused)
  const void* weight = nullptr; // (classes) in the accumulation type, or null
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  // (stat_rows, rows) in the accumulation type: max, log_sum and, where has_target_sum(), S.
  void* stats = nullptr;

  LOSSOPS_HOST_DEVICE bool index_target() const {
    return target.dtype >= DType::u8;
  }
  LOSSOPS_HOST_DEVICE bool has_target_sum() const {
    return !index_target() || label_smoothing != 0;
  }
  LOSSOPS_HOST_DEVICE int stat_rows() const {
    return has_target_sum() ? 3 : 2;
  }
};

struct CrossEntropyForward : CrossEntropyProblem {
  Reduction reduction = Reduction::mean;
  void* loss = nullptr; // one element a row for none, else one element
  DType loss_dtype = DType::f32;
  double* normalizer = nullptr; // what mean divides by
  bool* bad_target = nullptr;   // set when a class index is out of range (CPU)
};

struct CrossEntropyBackward : CrossEntropyProblem {
  const void* grad_loss = nullptr; // strides of kGradLoss: 0 when one value serves all rows
  DType grad_loss_dtype = DType::f32;
  const double* normalizer = nullptr; // divides grad_loss, or null
  ClassTensor grad_logits;            // data may be null
  ClassTensor grad_target;            // probabilities only; data may be null
  bool* bad_target = nullptr;         // as in the forward
};

// Derivative of grad_logits along `tangent` v, with the vector products that double backward needs:
//   row_dot     = sum_c v_c*(S*softmax_c - t_c)            (to grad_loss)
//   grad_logits = g*S*softmax_c*(v_c - sum_k v_k*softmax_k)
//   grad_target = g*(1-eps)*w_c*(sum_k v_k*softmax_k - v_c)
struct CrossEntropyBackwardBackward : CrossEntropyBackward {
  ClassTensor tangent;
  void* row_dot = nullptr; // (rows) in the accumulation type
};

namespace cpu {
void launch(const CrossEntropyForward&);
void launch(const CrossEntropyBackward&);
void launch(const CrossEntropyBackwardBackward&);
} // namespace cpu

namespace cuda {

// Device memory that a call needs beside its operands.
int64_t workspace_bytes(const CrossEntropyForward&);
int64_t workspace_bytes(const CrossEntropyBackward&);
int64_t workspace_bytes(const CrossEntropyBackwardBackward&);

// On the current device and this cudaStream_t; returns before the kernels have run. `bad_target` is not
// used: a class index out of range makes its row NaN and is recorded for take_bad_target.
void launch(const CrossEntropyForward&, void* workspace, void* stream);
void launch(const CrossEntropyBackward&, void* workspace, void* stream);
void launch(const CrossEntropyBackwardBackward&, void* workspace, void* stream);

struct BadTarget {
  int64_t row; // in the logical order of the rows
  int64_t value;
  int64_t classes;
};

// Waits for the current device. True where a kernel has met a class index out of range since the last
// call: then the first that was recorded.
bool take_bad_target(BadTarget&);

} // namespace cuda

} // namespace lossops
