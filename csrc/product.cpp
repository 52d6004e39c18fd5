// The op of matrix products on the CPU: checks, scratch memory, registration. What for: product.h.
#include "product.h"

#include <utility>

#include "op.h"

namespace lossops {
namespace {

constexpr const char* kOp = "multiply";

Matrix matrix(const Tensor& t, const Tensor& out, const char* name, int64_t rows, int64_t columns) {
  LOSSOPS_CHECK(sizes_of(t) == Sizes({rows, columns}), kOp, ": expected ", name, " of shape ",
                Sizes({rows, columns}), ", got ", sizes_of(t));
  LOSSOPS_CHECK(t.scalar_type() == out.scalar_type(), kOp, ": expected ", name, " of out's dtype, ",
                torch::headeronly::toString(out.scalar_type()), ", got ",
                torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, out, kOp, name);
  const Sizes strides = strides_of(t);
  return {t.const_data_ptr(), strides[0], strides[1]};
}

void multiply(Tensor out, Tensor a, Tensor b, bool add) {
  LOSSOPS_CHECK(out.dim() == 2 && a.dim() == 2, kOp, ": expected matrices, got out of shape ", sizes_of(out),
                " and a of shape ", sizes_of(a));
  const DType dtype = dtype_of(out, kOp, "out");
  LOSSOPS_CHECK(dtype == DType::f32 || dtype == DType::f64, kOp,
                ": expected out of dtype float32 or float64, got ",
                torch::headeronly::toString(out.scalar_type()));
  const Sizes sizes = sizes_of(out), strides = strides_of(out);
  Product p;
  p.rows = sizes[0];
  p.columns = sizes[1];
  p.depth = sizes_of(a)[1];
  p.a = matrix(a, out, "a", p.rows, p.depth);
  p.b = matrix(b, out, "b", p.depth, p.columns);
  if (p.rows == 0 || p.columns == 0) return;
  if (p.depth == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  p.out = out.mutable_data_ptr();
  p.out_stride = strides[0];
  p.add = add;
  p.use_double = dtype == DType::f64;
  if (strides[1] != 1 && p.columns > 1) { // the product of the transposed matrices, transposed
    LOSSOPS_CHECK(strides[0] == 1 || p.rows == 1, kOp,
                  ": expected out's rows or columns to be contiguous, got strides ", strides);
    std::swap(p.a, p.b);
    std::swap(p.a.row_stride, p.a.column_stride);
    std::swap(p.b.row_stride, p.b.column_stride);
    std::swap(p.rows, p.columns);
    p.out_stride = strides[1];
  }
  LOSSOPS_CHECK(p.rows <= 1 || p.out_stride >= p.columns, kOp,
                ": expected elements of out that do not share their memory, got strides ", strides);
  Tensor scratch;
  cpu::launch(p, [&](int64_t bytes) {
    scratch = empty({bytes}, ScalarType::Byte, out);
    return scratch.mutable_data_ptr();
  });
}

STABLE_TORCH_LIBRARY_IMPL(lossops, CPU, m) {
  m.impl("multiply_", TORCH_BOX(&multiply));
}

} // namespace
} // namespace lossops
