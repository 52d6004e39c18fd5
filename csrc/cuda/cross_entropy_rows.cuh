// Row functions of softmax cross-entropy on the GPU: what their kernels share. Formulas:
// csrc/cross_entropy.h.
#pragma once

#include "cross_entropy_plan.h"

namespace lossops::cuda {

// Blocks to a multiprocessor: the sums behind the entropy, the place of the maximum and the transform want
// more registers than the plain loss; numbers of twice the size do not fit into those of a quarter of the
// threads. Without target weights the gradient of 16-bit logits leaves room for one block more.
template <class A>
constexpr int kResidentPlanes = std::is_same_v<A, double> ? 3 : 4;
template <class T, class A, bool kDense>
constexpr int kResidentGradient = sizeof(T) == 2 && !kDense ? 5 : kResidentPlanes<A>;

// Whether rows have a kernel without target weights for this dtype: where it is worth its compile time.
template <class T, class A>
constexpr bool kHasSparse = std::is_same_v<A, float> && !std::is_same_v<T, AnyType>;

LOSSOPS_DEVICE float hyperbolic_tangent(float x) {
  return tanhf(x);
}
LOSSOPS_DEVICE double hyperbolic_tangent(double x) {
  return tanh(x);
}

// u of z, and d = 1 - (u/cap)^2. Without a transform u = 1*z, which is exact.
template <class A>
struct Transform {
  A scale, cap, per_cap; // 0: no cap
  LOSSOPS_DEVICE explicit Transform(const CrossEntropyRowsProblem& a)
      : scale(a.scale_tensor == nullptr ? static_cast<A>(a.scale) : *static_cast<const A*>(a.scale_tensor)),
        cap(static_cast<A>(a.softcap)),
        per_cap(cap == 0 ? A(0) : A(1) / cap) {}

  template <int N>
  LOSSOPS_DEVICE void apply(const A (&z)[N], A (&u)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) u[k] = scale * z[k];
    if (cap == 0) return;
#pragma unroll
    for (int k = 0; k < N; ++k) u[k] = cap * hyperbolic_tangent(u[k] * per_cap);
  }
  LOSSOPS_DEVICE A of(A z) const {
    A u[1];
    apply({z}, u);
    return u[0];
  }
  LOSSOPS_DEVICE A slope(A u) const {
    const A t = u * per_cap;
    return cap == 0 ? A(1) : 1 - t * t;
  }
};

// A thread's row of a tile, several classes `step` apart at a time; its copy in shared memory where kShort.
template <class T, class A, bool kShort>
struct TileRow : RowPack<T, A, 1> {
  using RowPack<T, A, 1>::fetch, RowPack<T, A, 1>::store;
  using Raw = typename RowPack<T, A, 1>::Raw;
  LOSSOPS_DEVICE TileRow(const ClassTensor& t, int64_t offset, const ShortRows&)
      : RowPack<T, A, 1>(t, offset) {}
  template <int N>
  LOSSOPS_DEVICE void fetch(int first, int step, Raw (&raw)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) raw[k] = fetch(first + k * step);
  }
  template <int N>
  LOSSOPS_DEVICE void store(int first, int step, const A (&x)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) store(first + k * step, {x[k]});
  }
};

template <class T, class A>
struct TileRow<T, A, true> {
  T* data;
  int together;
  LOSSOPS_DEVICE TileRow(const ClassTensor& t, int64_t, const ShortRows& rows)
      : data(t.data == nullptr ? nullptr : short_rows_memory<T>() + threadIdx.x * rows.stride),
        together(rows.together()) {}
  LOSSOPS_DEVICE bool present() const {
    return data != nullptr;
  }
  template <int N>
  LOSSOPS_DEVICE void fetch(int first, int, T (&raw)[N]) const {
    with_together<T, N>(together, [&](auto count) { load_short<decltype(count)::value>(data + first, raw); });
  }
  template <int N>
  LOSSOPS_DEVICE void store(int first, int, const A (&x)[N]) const {
    T raw[N];
#pragma unroll
    for (int k = 0; k < N; ++k) raw[k] = round_to<T>(x[k]);
    with_together<T, N>(together,
                        [&](auto count) { store_short<decltype(count)::value>(data + first, raw); });
  }
};

constexpr int kTileClasses = 4; // of a row that a thread of a tile reads at a time

// ---------------------------------------------------------------------------------------------
// Launching

inline unsigned blocks_of_rows(const char* op, int64_t rows, int64_t per_block) {
  return grid(op, (rows + per_block - 1) / per_block);
}

// launch(Type<element>, Type<accumulation>, lanes, dense) for the kernel of rows that serves a call.
template <class F>
void with_rows(const CrossEntropyProblem& a, const Plan& plan, bool dense, const F& launch) {
  with_types(a, plan.typed, [&](auto element, auto accumulation) {
    constexpr bool kSparse =
        kHasSparse<typename decltype(element)::type, typename decltype(accumulation)::type>;
    with_flag(dense || !kSparse, [&](auto flag) {
      if constexpr (decltype(flag)::value || kSparse) {
        if (plan.way == Plan::kByWarp)
          launch(element, accumulation, Count<kWarp>(), flag);
        else
          launch(element, accumulation, Count<kThreads>(), flag);
      }
    });
  });
}

// launch(Type<element>, Type<accumulation>, short rows, their shared memory) for the kernel of tiles.
template <class F>
void with_tiles(const CrossEntropyProblem& a, const Plan& plan, const F& launch) {
  static_assert(kShortThreads == kThreads);
  with_types(a, plan.typed, [&](auto element, auto accumulation) {
    constexpr bool kTyped = !std::is_same_v<typename decltype(element)::type, AnyType>;
    with_flag(plan.way == Plan::kShort, [&](auto is_short) {
      if constexpr (kTyped || !decltype(is_short)::value)
        launch(element, accumulation, is_short, is_short ? plan.short_rows_bytes(a) : 0);
    });
  });
}

} // namespace lossops::cuda
