// What the ops share: errors as sentences, dtypes, operands' strides, fresh tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "layout.h"
#include "trace.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK // its name until torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace lossops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The pybind11 layer of torch.ops turns these into RuntimeError, ValueError and IndexError.
using RuntimeError = std::runtime_error;
using ValueError = std::invalid_argument;
using IndexError = std::out_of_range;

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// A macro, so that the sentence is only written when it is needed: small calls count microseconds.
#define LOSSOPS_CHECK_AS(ERROR, HOLDS, ...)           \
  do {                                                \
    if (!(HOLDS)) throw ERROR(sentence(__VA_ARGS__)); \
  } while (false)
#define LOSSOPS_CHECK(HOLDS, ...) LOSSOPS_CHECK_AS(RuntimeError, HOLDS, __VA_ARGS__)

// Sizes or strides of a tensor, without an allocation.
class Sizes {
 public:
  Sizes() = default;
  Sizes(std::initializer_list<int64_t> values) {
    for (const int64_t v : values) values_[count_++] = v;
  }
  Sizes(const int64_t* values, int64_t count) : count_(static_cast<int>(count)) {
    LOSSOPS_CHECK(count <= kMaxDims, "lossops: expected tensors of at most ", kMaxDims, " dimensions, got ",
                  count);
    std::copy(values, values + count, values_);
  }
  void insert_first(int64_t value) {
    std::copy_backward(values_, values_ + count_, values_ + count_ + 1);
    values_[0] = value;
    ++count_;
  }
  void erase(int64_t dim) {
    std::copy(values_ + dim + 1, values_ + count_, values_ + dim);
    --count_;
  }
  int size() const {
    return count_;
  }
  bool empty() const {
    return count_ == 0;
  }
  const int64_t* begin() const {
    return values_;
  }
  const int64_t* end() const {
    return values_ + count_;
  }
  const int64_t* data() const {
    return values_;
  }
  int64_t operator[](int64_t d) const {
    return values_[d];
  }
  int64_t& operator[](int64_t d) {
    return values_[d];
  }
  bool operator==(const Sizes& other) const {
    return count_ == other.count_ && std::equal(values_, values_ + count_, other.values_);
  }
  bool operator!=(const Sizes& other) const {
    return !(*this == other);
  }
  // As Python writes a shape: (8, 10), (8,), ().
  friend std::ostream& operator<<(std::ostream& out, const Sizes& s) {
    out << '(';
    for (int d = 0; d < s.count_; ++d) out << (d == 0 ? "" : ", ") << s[d];
    return out << (s.count_ == 1 ? ",)" : ")");
  }

 private:
  int64_t values_[kMaxDims + 1]; // the rows of stats have a dimension more than the rows
  int count_ = 0;
};

inline Sizes sizes_of(const Tensor& t) {
  int64_t* sizes = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  return Sizes(sizes, t.dim());
}

inline Sizes strides_of(const Tensor& t) {
  int64_t* strides = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  return Sizes(strides, t.dim());
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name, bool index = false) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Byte:
      if (index) return DType::u8;
      break;
    case ScalarType::Int:
      if (index) return DType::i32;
      break;
    case ScalarType::Long:
      if (index) return DType::i64;
      break;
    default: break;
  }
  LOSSOPS_CHECK(
      false, op, ": expected ", name, " of dtype ",
      index ? "uint8, int32, int64 or a floating point type" : "float16, bfloat16, float32 or float64",
      ", got ", torch::headeronly::toString(t.scalar_type()));
  return DType::f32;
}

inline bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Half || s == ScalarType::BFloat16 || s == ScalarType::Float ||
         s == ScalarType::Double;
}

// torch's result type of two floating dtypes.
inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Reduction reduction_of(int64_t reduction, const char* op) {
  LOSSOPS_CHECK_AS(ValueError, 0 <= reduction && reduction <= 2, op,
                   ": expected reduction 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  return static_cast<Reduction>(reduction);
}

inline int32_t device_type_of(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// As torch writes it: cpu, cuda:1.
inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? sentence("cuda:", t.get_device_index()) : "another device";
}

inline void check_same_device(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  LOSSOPS_CHECK(
      device_type_of(t) == device_type_of(reference) && t.get_device_index() == reference.get_device_index(),
      op, ": expected ", name, " on ", device_of(reference), ", got ", device_of(t));
}

// torch's own numbers of dtypes.
inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    default: return 1;
  }
}

inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               shim_dtype(dtype), device_type_of(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides = sizes;
  int64_t stride = 1;
  for (int d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  return strides;
}

inline Tensor empty(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, like);
}

// Memory for a tensor of an input's size or for each of its rows, from where the device has it readiest.
template <class Device>
Tensor large_empty(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  return Device::empty_strided(sizes, contiguous_strides(sizes), dtype, like);
}

// A result with an element for each of t's: t's own strides where they are dense, as torch does.
template <class Device>
Tensor empty_elementwise(const Tensor& t, ScalarType dtype) {
  if (t.is_contiguous()) return large_empty<Device>(sizes_of(t), dtype, t);
  return Device::empty_strided(sizes_of(t), strides_of(torch::stable::empty_like(t)), dtype, t);
}

// For lossops.explain: what an op copies before its kernel can read it.
inline void record_copy(const char* name, const char* why, const Tensor& t) {
  if (tracing()) record({name, why, "copy", t.numel() * static_cast<int64_t>(t.element_size())});
}

// The divisor of a mean that the forward returned, or null.
inline const double* normalizer_pointer(const std::optional<Tensor>& normalizer, const Tensor& like,
                                        const char* op) {
  if (!normalizer) return nullptr;
  LOSSOPS_CHECK(normalizer->dim() == 0 && normalizer->scalar_type() == ScalarType::Double, op,
                ": expected normalizer to be a 0-d float64 tensor, got shape ", sizes_of(*normalizer));
  check_same_device(*normalizer, like, op, "normalizer");
  return static_cast<const double*>(normalizer->data_ptr());
}

} // namespace lossops
