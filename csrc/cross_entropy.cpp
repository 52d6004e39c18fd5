// The ops of softmax cross-entropy: checks, allocation, registration. Maths: cross_entropy.h.
#include "cross_entropy.h"

#include "device.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>

namespace lossops {
namespace {

IndexError out_of_bounds(const std::string& op, int64_t target, const std::string& row, int64_t classes,
                         const std::string& ignore_index) {
  return IndexError(sentence(op, ": Target ", target, " is out of bounds: row ", row,
                             " of the target needs a class index from 0 to C-1 for C = ", classes, " or ",
                             ignore_index));
}

// A call's tensors, checked, and the rows they have in common. Holds what it had to copy.
class Operands {
 public:
  Tensor logits, target;
  std::optional<Tensor> weight;
  Sizes row_shape; // without the class dimension
  bool index_target = true;

  Operands(const char* op, Tensor logits_, Tensor target_, std::optional<Tensor> weight_,
           int64_t ignore_index, double label_smoothing)
      : logits(std::move(logits_)), target(std::move(target_)), weight(std::move(weight_)), op_(op) {
    LOSSOPS_CHECK(logits.dim() >= 1, op,
                  ": expected logits of shape (C), (N, C) or (N, C, d1, ...), got a 0-d tensor");
    class_dim_ = logits.dim() == 1 ? 0 : 1;
    row_shape = sizes_of(logits);
    row_shape.erase(class_dim_);
    problem_.classes = logits.size(class_dim_);
    LOSSOPS_CHECK(0 <= label_smoothing && label_smoothing <= 1, op,
                  ": label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
    problem_.label_smoothing = label_smoothing;
    problem_.ignore_index = ignore_index;
    const DType logits_dtype = dtype_of(logits, op, "logits");
    index_target = sizes_of(target) != sizes_of(logits);
    if (index_target)
      check_index_target();
    else
      check_probabilities();
    check_same_device(target, logits, op, "target");
    const DType target_dtype = dtype_of(target, op, "target", index_target);
    problem_.use_double = logits_dtype == DType::f64 || target_dtype == DType::f64 ||
                          (weight && weight->scalar_type() == ScalarType::Double);
    take_weight();
    lay_out_rows();
    problem_.logits = class_tensor(logits, kLogits, logits_dtype);
    problem_.target = index_target ? ClassTensor{target.data_ptr(), target_dtype, 0}
                                   : class_tensor(target, kTarget, target_dtype);
    if (index_target && target.dim() == row_shape.size()) set_strides(strides_of(target), kTarget);
    problem_.weight = weight ? weight->data_ptr() : nullptr;
  }

  // Fills in what every kernel of the family is given, once all operands are laid out.
  void give(CrossEntropyProblem& call) {
    problem_.rows.simplify();
    static_cast<CrossEntropyProblem&>(call) = problem_;
  }

  ClassTensor class_tensor(const Tensor& t, CrossEntropyOperand operand, DType dtype) {
    Sizes strides = strides_of(t);
    const int64_t class_stride = problem_.classes == 1 ? 1 : strides[class_dim_];
    strides.erase(class_dim_);
    set_strides(strides, operand);
    return {t.data_ptr(), dtype, class_stride};
  }
  // Allocates the gradients that are wanted; one that is not is an empty tensor.
  template <class Device, class Call>
  std::tuple<Tensor, Tensor> take_gradients(Call& call, bool need_logits, bool need_target) {
    LOSSOPS_CHECK(!need_target || !index_target, op_,
                  ": expected need_target=False for class indices, which have no gradient");
    const auto gradient = [&](bool need, const Tensor& of, CrossEntropyOperand operand, ClassTensor& out) {
      if (!need) return empty({0}, of.scalar_type(), of);
      Tensor t = empty_elementwise<Device>(of, of.scalar_type());
      out = class_tensor(t, operand, dtype_of(of, op_, "gradient"));
      return t;
    };
    Tensor grad_logits = gradient(need_logits, logits, kGradLogits, call.grad_logits);
    Tensor grad_target = gradient(need_target, need_target ? target : logits, kGradTarget, call.grad_target);
    return {grad_logits, grad_target};
  }

  void take_upstream(CrossEntropyBackward& call, const Tensor& grad_loss, const Tensor& stats,
                     const std::optional<Tensor>& normalizer) {
    call.grad_loss = grad_loss_pointer(grad_loss);
    call.grad_loss_dtype = dtype_of(grad_loss, op_, "grad_loss");
    stats_ = contiguous_planes(stats, stat_rows(), "stats");
    problem_.stats = stats_.data_ptr();
    call.normalizer = normalizer_pointer(normalizer, logits, op_);
  }

  // What every call on row functions is given, before give().
  void take_rows(CrossEntropyRowsProblem& call, const std::optional<Tensor>& scale_tensor, double scale,
                 double softcap) {
    LOSSOPS_CHECK_AS(ValueError, 0 <= softcap && softcap < std::numeric_limits<double>::infinity(), op_,
                     ": expected softcap to be positive and finite, or 0 for none, got ", softcap);
    call.scale = scale;
    call.softcap = softcap;
    call.scale_tensor = scalar_pointer(scale_tensor, "scale_tensor");
  }

  void take_rows_upstream(CrossEntropyRowsBackward& call, const Tensor& grad_rows, const Tensor& rows) {
    const int64_t planes = rows.dim() > 0 ? rows.size(0) : 0;
    LOSSOPS_CHECK(planes == kEntropy || planes == kPlanes, op_,
                  ": expected the rows that cross_entropy_rows_forward returned, got a tensor of shape ",
                  sizes_of(rows));
    call.entropy = planes == kPlanes;
    stats_ = contiguous_planes(rows, planes, "rows");
    grad_rows_ = contiguous_planes(grad_rows, planes, "grad_rows");
    problem_.stats = stats_.data_ptr();
    call.grad_rows = grad_rows_.data_ptr();
  }

  // One value of the accumulation type, or null.
  const void* scalar_pointer(const std::optional<Tensor>& t, const char* name) const {
    if (!t) return nullptr;
    LOSSOPS_CHECK(t->dim() == 0 && t->scalar_type() == accumulation(), op_, ": expected ", name,
                  " to be a 0-d tensor of dtype ", torch::headeronly::toString(accumulation()),
                  ", got shape ", sizes_of(*t), " of ", torch::headeronly::toString(t->scalar_type()));
    check_same_device(*t, logits, op_, name);
    return t->data_ptr();
  }

  // A value for each row, or `planes` of them.
  template <class Device>
  Tensor empty_rows(int64_t planes = 0) const {
    Sizes shape = row_shape;
    if (planes > 0) shape.insert_first(planes);
    return large_empty<Device>(shape, accumulation(), logits);
  }

  // Allocates each row's part of the scale's gradient, or an empty tensor where it is not wanted.
  template <class Device>
  Tensor take_grad_scale(CrossEntropyRowsBackward& call, bool need) const {
    if (!need) return empty({0}, accumulation(), logits);
    Tensor t = empty_rows<Device>();
    call.grad_scale = t.data_ptr();
    return t;
  }

  ScalarType accumulation() const {
    return problem_.use_double ? ScalarType::Double : ScalarType::Float;
  }
  int stat_rows() const {
    return problem_.stat_rows();
  }

  // The first class index out of range in the logical order of the rows, as an IndexError.
  void raise_bad_target() const {
    const Tensor flat = torch::stable::contiguous(target);
    const DType dtype = dtype_of(target, op_, "target", true);
    for (int64_t row = 0; row < flat.numel(); ++row) {
      const void* data = flat.data_ptr();
      const int64_t y = dtype == DType::i64   ? static_cast<const int64_t*>(data)[row]
                        : dtype == DType::i32 ? static_cast<const int32_t*>(data)[row]
                                              : static_cast<const uint8_t*>(data)[row];
      if (y == problem_.ignore_index || (0 <= y && y < problem_.classes)) continue;
      throw bad_target(row, y, problem_.classes);
    }
  }

  IndexError bad_target(int64_t row, int64_t value, int64_t classes) const {
    // A row that another call recorded, replayed from a graph, may lie beyond this one's.
    return out_of_bounds(op_, value, row < problem_.rows.count ? place(row) : std::to_string(row), classes,
                         sentence("ignore_index (", problem_.ignore_index, ")"));
  }

 private:
  Tensor contiguous_planes(const Tensor& t, int64_t planes, const char* name) const {
    Sizes expected = row_shape;
    expected.insert_first(planes);
    LOSSOPS_CHECK(sizes_of(t) == expected && t.scalar_type() == accumulation(), op_, ": expected ", name,
                  " as the forward returned it, of shape ", expected, " and dtype ",
                  torch::headeronly::toString(accumulation()), ", got ", sizes_of(t), " of ",
                  torch::headeronly::toString(t.scalar_type()));
    check_same_device(t, logits, op_, name);
    if (t.is_contiguous()) return t;
    record_copy(name, "contiguous", t); // O(N): a transform moved the batch
    return torch::stable::contiguous(t);
  }

  // One upstream gradient for all rows (0-d: strides stay 0) or one a row.
  const void* grad_loss_pointer(const Tensor& grad) {
    LOSSOPS_CHECK(grad.dim() == 0 || sizes_of(grad) == row_shape, op_, ": expected grad_loss of shape () or ",
                  row_shape, ", got ", sizes_of(grad));
    check_same_device(grad, logits, op_, "grad_loss");
    set_strides(strides_of(grad), kGradLoss);
    return grad.data_ptr();
  }
  void check_index_target() {
    const Sizes got = sizes_of(target);
    const auto words = [&] {
      return sentence(op_, ": expected target of shape ", row_shape, " for logits of shape ",
                      sizes_of(logits), ", got ", got);
    };
    if (logits.dim() == 1) {
      if (got == Sizes{1}) return check_index_dtype(); // torch takes (1,) for ()
      LOSSOPS_CHECK_AS(ValueError, got.size() != 1, words(), ". For 1D input, 1D target must have size 1");
    } else if (got.empty() || got[0] != row_shape[0]) {
      LOSSOPS_CHECK_AS(ValueError, false, words(), ". Expected input batch_size (", row_shape[0],
                       ") to match target batch_size (", got.empty() ? 0 : got[0], ").");
    }
    LOSSOPS_CHECK(
        got == row_shape, words(),
        row_shape.size() == 1 ? ". 0D or 1D target tensor expected, multi-target not supported" : "");
    check_index_dtype();
  }

  void check_index_dtype() {
    LOSSOPS_CHECK(!is_floating(target), op_,
                  ": expected target dtype to be Long, Int or Byte for class indices of shape ",
                  sizes_of(target), ", got ", torch::headeronly::toString(target.scalar_type()),
                  "; class probabilities need the shape of the logits, ", sizes_of(logits));
  }

  void check_probabilities() {
    LOSSOPS_CHECK(is_floating(target), op_,
                  ": Expected floating point type for target with class probabilities, got ",
                  torch::headeronly::toString(target.scalar_type()));
    LOSSOPS_CHECK(problem_.ignore_index < 0, op_,
                  ": ignore_index is not supported for floating point target, got ignore_index ",
                  problem_.ignore_index);
  }

  void take_weight() {
    if (!weight) return;
    LOSSOPS_CHECK(weight->dim() == 1 && weight->numel() == problem_.classes, op_,
                  ": weight tensor should be defined either for all ", problem_.classes,
                  " classes or no classes but got weight tensor of shape: ", sizes_of(*weight));
    check_same_device(*weight, logits, op_, "weight");
    dtype_of(*weight, op_, "weight");
    // C values against N x C logits: the kernels read them in the type they compute in.
    if (weight->scalar_type() != accumulation()) {
      record_copy("class weight", "in the type that the kernels compute in", *weight);
      weight = torch::stable::to(*weight, accumulation());
    }
    if (weight->is_contiguous()) return;
    record_copy("class weight", "contiguous", *weight);
    weight = torch::stable::contiguous(*weight);
  }

  void lay_out_rows() {
    problem_.rows = Positions<kCrossEntropyOperands>(row_shape.data(), row_shape.size());
    set_strides(contiguous_strides(row_shape), kRow);
  }

  void set_strides(const Sizes& strides, CrossEntropyOperand operand) {
    std::copy(strides.begin(), strides.end(), problem_.rows.stride[operand]);
  }

  // A row as its index into the target: 3, or (0, 12, 7) where rows have more dimensions.
  std::string place(int64_t row) const {
    Sizes index = row_shape;
    for (int d = row_shape.size(); d-- > 0; row /= row_shape[d]) index[d] = row % row_shape[d];
    return index.size() == 1 ? std::to_string(index[0]) : sentence(index);
  }

  const char* op_;
  int64_t class_dim_ = 1;
  CrossEntropyProblem problem_;
  Tensor stats_, grad_rows_;
};

// Runs a call, and turns a class index out of range into an IndexError.
template <class Call>
void launch(Cpu, const Operands& operands, Call& call) {
  bool bad_target = false;
  call.bad_target = &bad_target;
  Cpu::launch(call, operands.logits);
  if (bad_target) operands.raise_bad_target();
}

#ifdef LOSSOPS_CUDA

// Devices whose kernels have read class indices. They stay marked: a graph may replay them any time.
std::array<std::atomic<bool>, 128> reads_indices; // torch numbers devices in an int8_t

// The kernels only record an index out of range: finding out means waiting for them.
template <class Call>
void launch(Cuda, const Operands& operands, Call& call) {
  Cuda::launch(call, operands.logits);
  if (!operands.index_target) return;
  const int32_t device = operands.logits.get_device_index();
  cuda::note_class_indices(device);
  if (!cuda::sync_checks()) return;
  const OnCudaDevice here(device);
  cuda::BadTarget bad;
  if (!here.is_capturing() && cuda::take_bad_target(bad))
    throw operands.bad_target(bad.row, bad.value, bad.classes);
}

#endif

void check_async_errors() {
#ifdef LOSSOPS_CUDA
  for (int device = 0; device < static_cast<int>(reads_indices.size()); ++device) {
    if (!reads_indices[device]) continue;
    const OnCudaDevice here(device);
    cuda::BadTarget bad;
    if (cuda::take_bad_target(bad))
      throw out_of_bounds(sentence("cross_entropy on cuda:", device), bad.value, std::to_string(bad.row),
                          bad.classes, "ignore_index");
  }
#endif
}

// A forward call and its results.
template <class Device>
struct Loss {
  CrossEntropyForward call;
  Tensor loss, stats, normalizer;

  // `operands` must have been given all tensors that lie in the rows' order.
  Loss(Operands& operands, const std::optional<Tensor>& weight, int64_t reduction,
       std::optional<ScalarType> out_dtype) {
    constexpr const char* op = "cross_entropy";
    const Tensor& logits = operands.logits;
    call.reduction = reduction_of(reduction, op);
    ScalarType loss_dtype = logits.scalar_type();
    if (!operands.index_target) {
      loss_dtype = promote(loss_dtype, operands.target.scalar_type());
      if (weight) loss_dtype = promote(loss_dtype, weight->scalar_type());
    }
    loss_dtype = out_dtype.value_or(loss_dtype);
    loss = empty(call.reduction == Reduction::none ? operands.row_shape : Sizes{}, loss_dtype, logits);
    stats = operands.empty_rows<Device>(operands.stat_rows());
    normalizer = empty({}, ScalarType::Double, logits);
    operands.give(call);
    call.loss = loss.data_ptr();
    call.loss_dtype = dtype_of(loss, op, "out_dtype");
    call.stats = stats.data_ptr();
    call.normalizer = static_cast<double*>(normalizer.data_ptr());
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target,
                                                         std::optional<Tensor> weight, int64_t reduction,
                                                         int64_t ignore_index, double label_smoothing,
                                                         std::optional<ScalarType> out_dtype) {
  Operands operands("cross_entropy", logits, target, weight, ignore_index, label_smoothing);
  Loss<Device> of(operands, weight, reduction, out_dtype);
  launch(Device{}, operands, of.call);
  return {of.loss, of.stats, of.normalizer};
}

template <class Device>
std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target,
                                                  std::optional<Tensor> weight, Tensor stats,
                                                  std::optional<Tensor> normalizer, int64_t ignore_index,
                                                  double label_smoothing, bool need_logits,
                                                  bool need_target) {
  Operands operands("cross_entropy_backward", logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyBackward call;
  const auto [grad_logits, grad_target] = operands.take_gradients<Device>(call, need_logits, need_target);
  operands.take_upstream(call, grad_loss, stats, normalizer);
  operands.give(call);
  launch(Device{}, operands, call);
  return {grad_logits, grad_target};
}

template <class Device>
std::tuple<Tensor, Tensor> cross_entropy_rows_forward(Tensor logits, Tensor target,
                                                      std::optional<Tensor> weight,
                                                      std::optional<Tensor> scale_tensor, double scale,
                                                      double softcap, int64_t ignore_index,
                                                      double label_smoothing, bool entropy, bool predicted) {
  Operands operands("cross_entropy", logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyRowsForward call;
  operands.take_rows(call, scale_tensor, scale, softcap);
  call.entropy = entropy;
  Tensor rows = operands.empty_rows<Device>(call.planes());
  Tensor largest = empty(predicted ? operands.row_shape : Sizes{0}, ScalarType::Long, logits);
  operands.give(call);
  call.stats = rows.data_ptr();
  if (predicted) call.predicted = static_cast<int64_t*>(largest.data_ptr());
  launch(Device{}, operands, call);
  return {rows, largest};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> cross_entropy_rows_backward(
    Tensor grad_rows, Tensor rows, Tensor logits, Tensor target, std::optional<Tensor> weight,
    std::optional<Tensor> scale_tensor, double scale, double softcap, int64_t ignore_index,
    double label_smoothing, bool need_logits, bool need_target, bool need_scale) {
  Operands operands("cross_entropy_rows_backward", logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyRowsBackward call;
  operands.take_rows(call, scale_tensor, scale, softcap);
  const auto [grad_logits, grad_target] = operands.take_gradients<Device>(call, need_logits, need_target);
  operands.take_rows_upstream(call, grad_rows, rows);
  Tensor grad_scale = operands.take_grad_scale<Device>(call, need_scale);
  operands.give(call);
  launch(Device{}, operands, call);
  return {grad_logits, grad_target, grad_scale};
}

// The gradient of the logits takes their place.
template <class Device>
std::tuple<Tensor, Tensor> cross_entropy_rows_backward_(Tensor grad_rows, Tensor rows, Tensor logits,
                                                        Tensor target, std::optional<Tensor> weight,
                                                        std::optional<Tensor> scale_tensor, double scale,
                                                        double softcap, int64_t ignore_index,
                                                        double label_smoothing, bool need_target,
                                                        bool need_scale) {
  constexpr const char* op = "cross_entropy_rows_backward_";
  Operands operands(op, logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyRowsBackward call;
  operands.take_rows(call, scale_tensor, scale, softcap);
  const auto [none, grad_target] = operands.take_gradients<Device>(call, false, need_target);
  call.grad_logits = operands.class_tensor(logits, kGradLogits, dtype_of(logits, op, "logits"));
  operands.take_rows_upstream(call, grad_rows, rows);
  Tensor grad_scale = operands.take_grad_scale<Device>(call, need_scale);
  operands.give(call);
  launch(Device{}, operands, call);
  return {grad_target, grad_scale};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_rows_backward_backward(
    std::optional<Tensor> tangent, std::optional<Tensor> scale_tangent, Tensor grad_rows, Tensor rows,
    Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> scale_tensor,
    double scale, double softcap, int64_t ignore_index, double label_smoothing, bool need_logits,
    bool need_target, bool need_scale) {
  constexpr const char* op = "cross_entropy_rows_backward_backward";
  Operands operands(op, logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyRowsBackwardBackward call;
  operands.take_rows(call, scale_tensor, scale, softcap);
  const auto [grad_logits, grad_target] = operands.take_gradients<Device>(call, need_logits, need_target);
  operands.take_rows_upstream(call, grad_rows, rows);
  if (tangent) {
    LOSSOPS_CHECK(sizes_of(*tangent) == sizes_of(logits), op, ": expected tangent of the logits' shape ",
                  sizes_of(logits), ", got ", sizes_of(*tangent));
    check_same_device(*tangent, logits, op, "tangent");
    call.tangent = operands.class_tensor(*tangent, kTangent, dtype_of(*tangent, op, "tangent"));
  }
  call.scale_tangent = operands.scalar_pointer(scale_tangent, "scale_tangent");
  Tensor grad_scale = operands.take_grad_scale<Device>(call, need_scale);
  Tensor row_dots = operands.empty_rows<Device>(call.planes());
  operands.give(call);
  call.row_dots = row_dots.data_ptr();
  launch(Device{}, operands, call);
  return {row_dots, grad_logits, grad_target, grad_scale};
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward<Device>));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward<Device>));
  m.impl("cross_entropy_rows_forward", TORCH_BOX(&cross_entropy_rows_forward<Device>));
  m.impl("cross_entropy_rows_backward", TORCH_BOX(&cross_entropy_rows_backward<Device>));
  m.impl("cross_entropy_rows_backward_", TORCH_BOX(&cross_entropy_rows_backward_<Device>));
  m.impl("cross_entropy_rows_backward_backward", TORCH_BOX(&cross_entropy_rows_backward_backward<Device>));
}

LOSSOPS_IMPLEMENT(implement)

#ifndef LOSSOPS_EMULATED

// The loss, and the gradient of the logits for an upstream gradient of 1.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_backward(
    Tensor logits, Tensor target, std::optional<Tensor> weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<ScalarType> out_dtype) {
  static const double one = 1;
  Operands operands("cross_entropy", logits, target, weight, ignore_index, label_smoothing);
  CrossEntropyBackward gradient;
  const Tensor grad_logits = std::get<0>(operands.take_gradients<Cpu>(gradient, true, false));
  Loss<Cpu> of(operands, weight, reduction, out_dtype);
  LOSSOPS_CHECK_AS(ValueError, of.call.reduction != Reduction::none,
                   "cross_entropy_forward_backward: expected reduction 1 (mean) or 2 (sum), got 0");
  static_cast<CrossEntropyProblem&>(gradient) = of.call;
  gradient.grad_loss = &one;
  gradient.grad_loss_dtype = DType::f64;
  bool bad_target = false;
  of.call.bad_target = gradient.bad_target = &bad_target;
  if (of.call.reduction == Reduction::mean) {
    *of.call.normalizer = cpu::weigh_rows(of.call);
    gradient.normalizer = of.call.normalizer;
  }
  cpu::launch(of.call, &gradient);
  if (bad_target) operands.raise_bad_target();
  return {of.loss, of.stats, of.normalizer, grad_logits};
}

STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CPU, m) {
  m.impl("cross_entropy_forward_backward", TORCH_BOX(&cross_entropy_forward_backward));
}

#endif

STABLE_TORCH_LIBRARY_IMPL(LOSSOPS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("check_async_errors", TORCH_BOX(&check_async_errors));
}

} // namespace

#ifdef LOSSOPS_CUDA

void cuda::note_class_indices(int device) {
  reads_indices[std::max(0, device)] = true;
}

bool cuda::sync_checks() {
  static const bool on = [] {
    const char* value = std::getenv("LOSSOPS_SYNC_CHECKS");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

#endif

} // namespace lossops
