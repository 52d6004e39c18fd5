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

// ---------------------------------------------------------------------------------------------
// Row functions: what every option beyond torch's is put together from, in O(N) arithmetic outside the
// kernels (lossops/cross_entropy.py). With u_c = scale*z_c, or cap*tanh(scale*z_c/cap), p = softmax(u),
// l_c = log p_c, and everything relative to the row's largest u:
enum CrossEntropyPlane {
  kMax,          // m, the largest u; a constant to the derivatives, for the others are relative to it
  kLogSum,       // log sum exp(u_c - m)
  kTargetSum,    // S = sum_c t_c
  kDot,          // sum_c t_c*(u_c - m)
  kPicked,       // u_y - m of a class index y; 0 for probabilities
  kTargetWeight, // w_y of a class index, 1 for probabilities (0 without classes): what a mean divides by
  kEntropy,      // -sum_c p_c*l_c: only where it is asked for
  kPlanes
};
// An ignored row is not read: zeros in all planes, predicted -1. Where m is -inf, u is taken relative to 0.

struct CrossEntropyRowsProblem : CrossEntropyProblem { // stats: (planes(), rows) in the accumulation type
  double scale = 1;
  const void* scale_tensor = nullptr; // one element of the accumulation type that replaces `scale`, or null
  double softcap = 0;                 // 0: none
  bool entropy = false;
  bool* bad_target = nullptr; // as in the forward

  LOSSOPS_HOST_DEVICE int planes() const {
    return entropy ? kPlanes : kEntropy;
  }
  LOSSOPS_HOST_DEVICE bool transforms() const {
    return scale != 1 || scale_tensor != nullptr || softcap != 0;
  }
};

struct CrossEntropyRowsForward : CrossEntropyRowsProblem {
  // (rows): the first class of the largest u, as torch.argmax has it (NaN is the largest); or null
  int64_t* predicted = nullptr;
};

// With the gradients g of the planes (that of kMax and kTargetWeight is not looked at), s the scale and
// f_c = du_c/dz_c = s*d_c, d_c = 1 - (u_c/cap)^2 (1 without a cap):
//   G_c         = p_c*(g_LogSum - g_Entropy*(l_c + Entropy)) + g_Dot*t_c + g_Picked*[c = y]
//   grad_logits = f_c*G_c
//   grad_target = (1-eps)*w_c*(g_TargetSum + g_Dot*(u_c - m))
//   grad_scale  = sum_c G_c*z_c*d_c
// A row whose gradients are all 0 gives zeros, whatever its logits are.
struct CrossEntropyRowsBackward : CrossEntropyRowsProblem {
  const void* grad_rows = nullptr; // like stats
  ClassTensor grad_logits;         // data may be null, or the logits' own with their strides
  ClassTensor grad_target;         // probabilities only; data may be null
  void* grad_scale = nullptr;      // (rows) in the accumulation type, or null
};

// Derivatives of L = sum_c v_c*grad_logits_c + tau*grad_scale = sum_c h_c*G_c, h_c = v_c*f_c + tau*z_c*d_c:
//   row_dots    = dL/dg: LogSum sum p_c*h_c =: M, Dot sum t_c*h_c, Picked h_y,
//                 Entropy -sum p_c*h_c*(l_c + Entropy) =: -K; 0 elsewhere
//   q_c         = dL/du_c through G
//               = p_c*(g_LogSum*(h_c - M) - g_Entropy*(h_c*(l_c + Entropy + 1) - K - M*(l_c + Entropy + 1)))
//   b_c         = (v_c*s + tau*z_c)*(-2*u_c*d_c/cap^2), which d_c has to say: 0 without a cap
//   grad_logits = f_c*q_c + G_c*(tau*d_c + b_c*s)
//   grad_scale  = sum_c z_c*d_c*q_c + G_c*(v_c*d_c + b_c*z_c)
//   grad_target = g_Dot*(1-eps)*w_c*h_c
struct CrossEntropyRowsBackwardBackward : CrossEntropyRowsBackward {
  ClassTensor tangent;                 // v; data may be null: 0
  const void* scale_tangent = nullptr; // tau: one element of the accumulation type, or null: 0
  void* row_dots = nullptr;            // like stats
};

namespace cpu {
// With `gradient`, of the same operands, that too: unit by unit, while the logits are in the caches. What it
// reads of the loss's results is there by then, but for a normalizer, which must have been set.
void launch(const CrossEntropyForward&, const CrossEntropyBackward* gradient = nullptr);
double weigh_rows(const CrossEntropyForward&); // the normalizer that the launch will give
void launch(const CrossEntropyBackward&);
void launch(const CrossEntropyRowsForward&);
void launch(const CrossEntropyRowsBackward&);
void launch(const CrossEntropyRowsBackwardBackward&);
} // namespace cpu

namespace cuda {

// Device memory that a call needs beside its operands.
int64_t workspace_bytes(const CrossEntropyForward&);
int64_t workspace_bytes(const CrossEntropyBackward&);
int64_t workspace_bytes(const CrossEntropyRowsForward&);
int64_t workspace_bytes(const CrossEntropyRowsBackward&);
int64_t workspace_bytes(const CrossEntropyRowsBackwardBackward&);

// On the current device and this cudaStream_t; returns before the kernels have run. `bad_target` is not
// used: a class index out of range makes its row NaN and is recorded for take_bad_target.
void launch(const CrossEntropyForward&, void* workspace, void* stream);
void launch(const CrossEntropyBackward&, void* workspace, void* stream);
void launch(const CrossEntropyRowsForward&, void* workspace, void* stream);
void launch(const CrossEntropyRowsBackward&, void* workspace, void* stream);
void launch(const CrossEntropyRowsBackwardBackward&, void* workspace, void* stream);

struct BadTarget {
  int64_t row; // in the logical order of the rows
  int64_t value;
  int64_t classes;
};

// Waits for the current device. True where a kernel has met a class index out of range since the last
// call: then the first that was recorded.
bool take_bad_target(BadTarget&);

// Of the ops, not of a device (csrc/cross_entropy.cpp): that a device's kernels are given class indices, of
// which check_async_errors asks it from now on; and whether every call is to wait and ask.
void note_class_indices(int device);
bool sync_checks();

} // namespace cuda

} // namespace lossops
