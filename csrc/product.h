// Matrix products of float32 and float64 on the CPU: out = a b, or out += a b.
//
// torch leaves its own to MKL, where it is built with it, which gives AVX-512 to Intel's processors alone: on
// others it runs at half of what they can multiply.
#pragma once

#include <cstdint>
#include <functional>

namespace lossops {

struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
};

struct Product {
  Matrix a;           // (rows, depth)
  Matrix b;           // (depth, columns)
  void* out;          // (rows, columns), those of a row side by side; overlaps neither a nor b
  int64_t out_stride; // from row to row
  int64_t rows, columns, depth;
  bool add; // to what stands in out
  bool use_double;
};

namespace cpu {

// Whether launch() is faster than MKL here.
bool multiplies_faster();

// `scratch` gives that many bytes, aligned to 64, for as long as the call takes.
void launch(const Product&, const std::function<void*(int64_t)>& scratch);

} // namespace cpu
} // namespace lossops
