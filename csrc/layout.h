// The shapes and strides of a loss's operands, reduced to what a kernel has to walk.
// Plain C++, shared by every contract and by both devices.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define LOSSOPS_HOST_DEVICE __host__ __device__
#else
#define LOSSOPS_HOST_DEVICE
#endif

namespace lossops {

enum class DType : int8_t { f16, bf16, f32, f64, u8, i32, i64 };

enum class Reduction : int8_t { none, mean, sum }; // torch's own numbering

constexpr int kMaxDims = 64; // torch's own limit for most ops; after joining, real tensors have one to three

// An index space walked in one order by several operands, each with its own strides (in elements;
// 0 for an expanded dimension or an absent operand).
template <int Operands>
struct Positions {
  int dims = 0;
  int64_t count = 1;
  int64_t size[kMaxDims]; // only the first `dims` entries are set, here and below
  int64_t stride[Operands][kMaxDims];

  Positions() = default;
  Positions(const int64_t* sizes, int n) : dims(n) {
    std::copy(sizes, sizes + n, size);
    for (auto& of_operand : stride) std::fill(of_operand, of_operand + n, int64_t{0});
  }

  LOSSOPS_HOST_DEVICE int64_t inner_size() const {
    return dims == 0 ? 1 : size[dims - 1];
  }
  LOSSOPS_HOST_DEVICE int64_t inner_stride(int operand) const {
    return dims == 0 ? 0 : stride[operand][dims - 1];
  }

  LOSSOPS_HOST_DEVICE void offsets(int64_t linear, int64_t (&out)[Operands]) const {
    for (int64_t& offset : out) offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t index = d == 0 ? linear : linear % size[d]; // no division where rows are evenly spaced
      if (d > 0) linear /= size[d];
      for (int k = 0; k < Operands; ++k) out[k] += index * stride[k][d];
    }
  }

  // Orders the dimensions so that the first operand moves least in the innermost one, drops those
  // of size 1 and joins neighbours that every operand walks as one.
  void simplify() {
    count = 1;
    int kept = 0;
    for (int d = 0; d < dims; ++d) {
      count *= size[d];
      if (size[d] != 1) move_dim(d, kept++);
    }
    dims = kept;
    for (int d = 1; d < dims; ++d) { // insertion sort, stable: a handful of dimensions
      for (int e = d; e > 0 && stride[0][e - 1] < stride[0][e]; --e) swap_dims(e - 1, e);
    }
    int last = 0;
    for (int d = 1; d < dims; ++d) {
      if (joins(last, d)) {
        const int64_t joined = size[last] * size[d];
        move_dim(d, last);
        size[last] = joined;
      } else {
        move_dim(d, ++last);
      }
    }
    dims = std::min(dims, last + 1);
  }

 private:
  bool joins(int outer, int inner) const {
    for (int k = 0; k < Operands; ++k)
      if (stride[k][outer] != size[inner] * stride[k][inner]) return false;
    return true;
  }
  void move_dim(int from, int to) {
    size[to] = size[from];
    for (int k = 0; k < Operands; ++k) stride[k][to] = stride[k][from];
  }
  void swap_dims(int a, int b) {
    std::swap(size[a], size[b]);
    for (int k = 0; k < Operands; ++k) std::swap(stride[k][a], stride[k][b]);
  }
};

// Calls f(offsets, n) for runs of at most max_run positions that lie in one innermost dimension and
// together cover [begin, end).
template <int Operands, class F>
inline void for_each_run(const Positions<Operands>& positions, int64_t begin, int64_t end, int64_t max_run,
                         const F& f) {
  int64_t offsets[Operands];
  const int64_t inner = positions.inner_size();
  while (begin < end) {
    const int64_t n = std::min({end - begin, inner - begin % inner, max_run});
    positions.offsets(begin, offsets);
    f(offsets, n);
    begin += n;
  }
}

// Calls f(offsets) for each of the n positions of a run.
template <int Operands, class F>
inline void for_each_row(const Positions<Operands>& positions, const int64_t* run, int64_t n, const F& f) {
  int64_t offsets[Operands];
  std::copy(run, run + Operands, offsets);
  for (int64_t i = 0; i < n; ++i) {
    f(offsets);
    for (int k = 0; k < Operands; ++k) offsets[k] += positions.inner_stride(k);
  }
}

// Work is cut into units by shape alone, never by the number of threads, and each unit's sum is
// added in order: results are the same bit for bit however many threads there are.
constexpr int64_t kMaxUnits = 4096;

struct Units {
  int64_t positions = 0; // in all
  int64_t per_unit = 1;
  int64_t count = 0;

  Units(int64_t positions, int64_t elements_per_position, int64_t elements_per_unit) : positions(positions) {
    const int64_t wanted =
        std::max<int64_t>(1, elements_per_unit / std::max<int64_t>(1, elements_per_position));
    per_unit = std::max(wanted, (positions + kMaxUnits - 1) / kMaxUnits);
    count = (positions + per_unit - 1) / per_unit;
  }
  int64_t begin(int64_t unit) const {
    return unit * per_unit;
  }
  int64_t end(int64_t unit) const {
    return std::min(positions, begin(unit) + per_unit);
  }
};

} // namespace lossops
