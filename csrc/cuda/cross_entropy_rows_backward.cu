// Row functions of softmax cross-entropy on the GPU, backward and second derivative.
#include "cross_entropy_rows.cuh"

namespace lossops::cuda {
namespace {

// Sums of the kLanes threads that share a row, in the first of them.
template <int kLanes, int N, class A>
LOSSOPS_DEVICE void merge_sums(A (&sums)[N], int turn) {
  static_assert(kLanes % kWarp == 0);
#pragma unroll
  for (A& sum : sums) sum = lanes_sum<kWarp>(sum);
  if constexpr (kLanes > kWarp) {
    constexpr int kWarps = kLanes / kWarp;
    __shared__ A shared[2][N][kWarps];
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (is_first<kWarp>()) shared[turn][i][warp] = sums[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[i] = 0;
      for (int w = 0; w < kWarps; ++w) sums[i] += shared[turn][i][w];
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Backward

// What the derivatives know of a row before they look at its logits.
template <class A>
struct RowGradients {
  RowTarget<A> target;
  bool active = false; // a gradient is not 0
  A ref = 0, log_sum = 0, entropy = 0;
  A of_log_sum = 0, of_target_sum = 0, of_dot = 0, of_entropy = 0; // upstream
  A of_picked = 0;
  A index_term = 0; // what a class index adds to G at its own class

  RowGradients() = default;
  LOSSOPS_DEVICE RowGradients(const CrossEntropyRowsBackward& a, const int64_t* o, Smoothing<A> smoothing)
      : target(read_target<A>(a, o)) {
    if (!target.counted) return;
    const A* const planes = static_cast<const A*>(a.stats) + o[kRow];
    const A* const upstream = static_cast<const A*>(a.grad_rows) + o[kRow];
    const int64_t n = a.rows.count;
    ref = anchor(planes[kMax * n]);
    log_sum = planes[kLogSum * n];
    of_log_sum = upstream[kLogSum * n];
    of_target_sum = upstream[kTargetSum * n];
    of_dot = upstream[kDot * n];
    of_picked = a.index_target() ? upstream[kPicked * n] : A(0);
    if (a.entropy) {
      entropy = planes[kEntropy * n];
      of_entropy = upstream[kEntropy * n];
    }
    active = of_log_sum != 0 || of_target_sum != 0 || of_dot != 0 || of_picked != 0 || of_entropy != 0;
    index_term = times(of_dot, smoothing.keep * target.weight) + of_picked;
  }

  LOSSOPS_DEVICE A log_softmax(A u) const {
    return (u - ref) - log_sum;
  }
  // G, but for what t and a class index add.
  template <class T>
  LOSSOPS_DEVICE A of_softmax(A u) const {
    const A l = log_softmax(u), p = exponential<T>(l);
    return times(p, of_log_sum - of_entropy * (l + entropy));
  }
  // To the probability of a class with weight w.
  LOSSOPS_DEVICE A to_target(A u, A w, Smoothing<A> smoothing) const {
    return smoothing.keep * w * (of_target_sum + times(of_dot, u - ref));
  }
};

// From G to the gradient of the logits z; adds up that of the scale where it is wanted.
template <int N, class A>
LOSSOPS_DEVICE void through_transform(const Transform<A>& transform, const A (&z)[N], const A (&u)[N],
                                      A (&g)[N], bool wants_scale, A& scale_sum) {
  if (transform.cap != 0) {
#pragma unroll
    for (int k = 0; k < N; ++k) g[k] *= transform.slope(u[k]);
  }
  if (wants_scale) {
    A part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) part += times(g[k], z[k]);
    scale_sum += part;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) g[k] *= transform.scale;
}

// The rows of a block as begin() of for_each_row leaves them for the threads that share each.
template <class A>
struct SharedGradients {
  A number[8][kChunk];
  int place[kChunk]; // of the class index, or kNoClass, or kIgnored where no gradient is active

  LOSSOPS_DEVICE void set(int slot, const RowGradients<A>& r, const Piece& piece) {
    number[0][slot] = r.ref;
    number[1][slot] = r.log_sum;
    number[2][slot] = r.entropy;
    number[3][slot] = r.of_log_sum;
    number[4][slot] = r.of_entropy;
    number[5][slot] = r.of_dot;
    number[6][slot] = r.of_target_sum;
    number[7][slot] = r.index_term;
    place[slot] = r.active ? piece.place(r.target.index) : kIgnored;
  }
  LOSSOPS_DEVICE RowGradients<A> get(int slot) const {
    RowGradients<A> r;
    r.ref = number[0][slot];
    r.log_sum = number[1][slot];
    r.entropy = number[2][slot];
    r.of_log_sum = number[3][slot];
    r.of_entropy = number[4][slot];
    r.of_dot = number[5][slot];
    r.of_target_sum = number[6][slot];
    r.index_term = number[7][slot];
    r.active = place[slot] != kIgnored;
    return r;
  }
};

// The gradient may overwrite the logits: a thread has read an element before it writes it, and no other does.
// Returns the thread's part of grad_scale.
template <class T, class A, int kLanes, bool kDense>
LOSSOPS_DEVICE A write_gradient(const CrossEntropyRowsBackward& a, const int64_t* o, const Piece& piece,
                                const RowGradients<A>& r, int y, const Transform<A>& transform, int lane) {
  const Smoothing<A> smoothing(a);
  // Without class weights every class gives the same; nothing, were the gradient infinite.
  const A smoothed = times(smoothing.spread, r.of_dot);
  const Classes<T, A> z(a.logits, o[kLogits], piece.begin),
      p(a.index_target() ? ClassTensor() : a.target, o[kTarget], piece.begin),
      dz(a.grad_logits, o[kGradLogits], piece.begin), dp(a.grad_target, o[kGradTarget], piece.begin);
  const Packs packs = Packs::of_gradient<kLanes, kDense>(piece.size, z, p, dz, dp);
  const Weights<A> weights(a, piece.begin, packs.begin);
  A scale_sum = 0;
  const auto write = [&](auto unroll, auto width, auto shifted, int first, int end) {
    constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
    constexpr int kShifted = decltype(shifted)::value;
    typename Classes<T, A>::template Raw<kWidth> logits[kCount] = {}, probabilities[kCount] = {};
    if (r.active) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int c = first + i * kWidth * kLanes;
        if (c >= end) continue;
        logits[i] = z.template fetch<kWidth, kShifted>(c);
        if (kDense && p.present()) probabilities[i] = p.template fetch<kWidth, kShifted>(c);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int c = first + i * kWidth * kLanes;
      if (c >= end) continue;
      A logit[kWidth], u[kWidth], t[kWidth], out[kWidth] = {};
      z.template widen_raw<kWidth>(logits[i], logit);
      transform.apply(logit, u);
      if constexpr (kDense) {
        A w[kWidth];
        weights.load(c, w);
        target_weights<kWidth>(p, probabilities[i], w, smoothing, t);
        if (dp.present()) {
          if (r.active) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) out[k] = r.to_target(u[k], w[k], smoothing);
          }
          dp.store(c, out);
        }
      }
      if (r.active) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          out[k] = r.template of_softmax<T>(u[k]) + (kDense ? r.of_dot * t[k] : smoothed);
        if (static_cast<unsigned>(y - c) < kWidth) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) out[k] += c + k == y ? r.index_term : A(0);
        }
        through_transform(transform, logit, u, out, a.grad_scale != nullptr, scale_sum);
      }
      if (dz.present()) dz.store(c, out);
    }
  };
  for_classes<T, kLanes, kDense, true>(piece.size, packs, lane, write);
  return scale_sum;
}

template <class T, class A, int kLanes, bool kDense>
__global__ void __launch_bounds__(kThreads, kResidentGradient<T, A, kDense>)
    gradient_of_rows(const __grid_constant__ CrossEntropyRowsBackward a, const __grid_constant__ Rows rows,
                     A* of_slice) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  const Transform<A> transform(a);
  __shared__ SharedGradients<A> shared;
  const auto begin = [&](int slot, int64_t row) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    shared.set(slot, RowGradients<A>(a, o, Smoothing<A>(a)), piece);
  };
  const auto work = [&](int slot, int64_t row, bool, int turn) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    A sums[1] = {write_gradient<T, A, kLanes, kDense>(a, o, piece, shared.get(slot), shared.place[slot],
                                                      transform, lane)};
    if (a.grad_scale == nullptr) return;
    merge_sums<kLanes>(sums, turn);
    if (!is_first<kLanes>()) return;
    if (rows.slices > 1)
      of_slice[row * rows.slices + piece.slice] = sums[0];
    else
      static_cast<A*>(a.grad_scale)[o[kRow]] = sums[0];
  };
  for_each_row<kLanes>(a, rows, begin, work, [](int, int64_t) {});
}

// A thread a row.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_slices(const __grid_constant__ CrossEntropyRowsBackward a, int64_t slices, const A* of_slice) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= a.rows.count) return;
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  A sum = 0;
  for (int64_t slice = 0; slice < slices; ++slice) sum += of_slice[row * slices + slice];
  static_cast<A*>(a.grad_scale)[o[kRow]] = sum;
}

template <class T, class A, bool kShort>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    gradient_of_tiles(const __grid_constant__ CrossEntropyRowsBackward a,
                      const __grid_constant__ Tiling tiling, const __grid_constant__ ShortRows short_rows) {
  using Row = RowPack<T, A, 1>;
  __shared__ A shared[kShort ? 1 : kThreads];
  const int lane = kShort ? 0 : threadIdx.x / tiling.across, lanes = kShort ? 1 : kThreads / tiling.across;
  const int classes = static_cast<int>(a.classes);
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const A* weight = static_cast<const A*>(a.weight);
  for_each_tile<1, true>(a, tiling, [&](int64_t row) {
    const bool here = row < a.rows.count;
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o); // where there is none, nothing is read or written
    const TileRow<T, A, kShort> z(a.logits, o[kLogits], short_rows),
        dz(a.grad_logits, o[kGradLogits], short_rows);
    const Row p(kShort || a.index_target() ? ClassTensor() : a.target, o[kTarget]),
        dp(kShort ? ClassTensor() : a.grad_target, o[kGradTarget]);
    if constexpr (kShort) {
      __syncthreads(); // the tile before has been written
      ShortTile(a, short_rows, row / kThreads)
          .template copy<true>(static_cast<T*>(a.logits.data), short_rows_memory<T>(), short_rows);
      __syncthreads();
    }
    RowGradients<A> r;
    if (here) r = RowGradients<A>(a, o, smoothing);
    A scale_sum = 0;
    const auto write = [&](auto count, int first) {
      constexpr int kCount = decltype(count)::value;
      typename Row::Raw raw[kCount] = {}, probabilities[kCount] = {};
      A logit[kCount], u[kCount], out[kCount];
      if (r.active) {
        z.fetch(first, lanes, raw);
#pragma unroll
        for (int k = 0; k < kCount; ++k)
          if (p.present()) probabilities[k] = p.fetch(first + k * lanes);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) logit[k] = Row::element(raw[k], 0);
      transform.apply(logit, u);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int c = first + k * lanes;
        const A w = weight == nullptr ? A(1) : weight[c];
        const A t = w * (smoothing.keep * Row::element(probabilities[k], 0) + smoothing.spread);
        out[k] = r.template of_softmax<T>(u[k]) + times(t, r.of_dot);
        if (c == r.target.index) out[k] += r.index_term;
        if (dp.present()) dp.store(c, {r.active ? r.to_target(u[k], w, smoothing) : A(0)});
      }
      if (r.active) through_transform(transform, logit, u, out, a.grad_scale != nullptr, scale_sum);
#pragma unroll
      for (int k = 0; k < kCount; ++k) out[k] = r.active ? out[k] : A(0);
      if (dz.present()) dz.store(first, lanes, out);
    };
    if (here) for_tile_classes<kTileClasses, kShort>(lane, lanes, classes, write);
    if (kShort && dz.present()) {
      __syncthreads();
      if constexpr (kShort)
        ShortTile(a, short_rows, row / kThreads)
            .template copy<false>(static_cast<T*>(a.grad_logits.data), short_rows_memory<T>(), short_rows);
    }
    if (a.grad_scale == nullptr) return;
    if (!kShort && lanes > 1) { // the rows' other threads
      __syncthreads();          // the tile before has been read
      shared[threadIdx.x] = scale_sum;
      __syncthreads();
      if (lane == 0)
        for (int i = threadIdx.x + tiling.across; i < kThreads; i += tiling.across) scale_sum += shared[i];
    }
    if (here && lane == 0) static_cast<A*>(a.grad_scale)[o[kRow]] = scale_sum;
  });
}

// ---------------------------------------------------------------------------------------------
// Second derivative: the tangent's sums over each slice, then the products

// What both passes need of one class; t with what a class index adds, `tau` the tangent of the scale.
template <class A>
struct TangentAt {
  A z, v, u, d, h, l, p, t;

  LOSSOPS_DEVICE TangentAt(const CrossEntropyRowsBackwardBackward& a, const int64_t* o, int64_t c,
                           const RowGradients<A>& r, const Transform<A>& transform, A tau) {
    const auto load = [&](const ClassTensor& tensor, CrossEntropyOperand operand) {
      return load_any<A>(tensor.dtype, tensor.data, o[operand] + c * tensor.class_stride);
    };
    const Smoothing<A> smoothing(a);
    z = load(a.logits, kLogits);
    v = a.tangent.data == nullptr ? A(0) : load(a.tangent, kTangent);
    u = transform.of(z);
    d = transform.slope(u);
    h = v * transform.scale * d + times(tau, times(d, z));
    l = r.log_softmax(u);
    p = exponential<AnyType>(l);
    t = smoothing.spread;
    if (!a.index_target()) t += smoothing.keep * load(a.target, kTarget);
    if (a.weight != nullptr) t *= static_cast<const A*>(a.weight)[c];
    if (c == r.target.index) t += smoothing.keep * r.target.weight;
  }
};

template <class A>
LOSSOPS_DEVICE A scale_tangent(const CrossEntropyRowsBackwardBackward& a) {
  return a.scale_tangent == nullptr ? A(0) : *static_cast<const A*>(a.scale_tangent);
}

template <class A>
struct TangentSums {
  A mean = 0;    // M
  A dot = 0;     // of t and h
  A picked = 0;  // h of the class index
  A entropy = 0; // K
};

template <int kLanes, class A>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    tangent_sums(const __grid_constant__ CrossEntropyRowsBackwardBackward a,
                 const __grid_constant__ Rows rows, TangentSums<A>* of_slice) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  const Transform<A> transform(a);
  const A tau = scale_tangent<A>(a);
  const auto work = [&](int, int64_t row, bool, int turn) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    const RowGradients<A> r(a, o, Smoothing<A>(a));
    A sums[4] = {};
    for (int i = lane; r.target.counted && i < piece.size; i += kLanes) {
      const TangentAt<A> at(a, o, piece.begin + i, r, transform, tau);
      sums[0] += times(at.p, at.h);
      sums[1] += times(at.t, at.h);
      if (piece.begin + i == r.target.index) sums[2] = at.h;
      sums[3] += times(at.p, at.h * (at.l + r.entropy));
    }
    merge_sums<kLanes>(sums, turn);
    if (is_first<kLanes>()) of_slice[row * rows.slices + piece.slice] = {sums[0], sums[1], sums[2], sums[3]};
  };
  for_each_row<kLanes>(a, rows, [](int, int64_t) {}, work, [](int, int64_t) {});
}

template <class A>
LOSSOPS_DEVICE void store_row_dots(const CrossEntropyRowsBackwardBackward& a, int64_t row,
                                   const RowTarget<A>& target, const TangentSums<A>& sums) {
  const bool bad = a.index_target() && target.counted && target.index < 0; // and its weight NaN
  A dots[kPlanes] = {};
  dots[kLogSum] = sums.mean;
  dots[kDot] = bad ? target.weight : sums.dot;
  dots[kPicked] = bad ? target.weight : sums.picked;
  dots[kEntropy] = -sums.entropy;
  A* const out = static_cast<A*>(a.row_dots) + row;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane)
    if (plane < a.planes()) out[plane * a.rows.count] = dots[plane];
}

// To one class's logit, which is returned, and to the scale.
template <class A>
LOSSOPS_DEVICE A second_gradient(const TangentAt<A>& at, const RowGradients<A>& r, const TangentSums<A>& sums,
                                 const Transform<A>& transform, A tau, A index_term, A& scale_sum) {
  const A distance = at.h - sums.mean;
  const A q = times(
      at.p, r.of_log_sum * distance - times(r.of_entropy, distance * (at.l + r.entropy + 1) - sums.entropy));
  const A g = r.template of_softmax<AnyType>(at.u) + times(r.of_dot, at.t) + index_term;
  const A b =
      times(at.d, (at.v * transform.scale + tau * at.z) * -2 * at.u * transform.per_cap * transform.per_cap);
  const A bend = transform.cap == 0 ? A(0) : b;
  scale_sum += times(q, times(at.d, at.z)) + times(g, at.v * at.d + times(bend, at.z));
  return transform.scale * at.d * q + times(g, tau * at.d + bend * transform.scale);
}

template <int kLanes, class A>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    second_products(const __grid_constant__ CrossEntropyRowsBackwardBackward a,
                    const __grid_constant__ Rows rows, const TangentSums<A>* of_slice, A* scale_of_slice) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  const Transform<A> transform(a);
  const Smoothing<A> smoothing(a);
  const A tau = scale_tangent<A>(a);
  const auto work = [&](int, int64_t row, bool, int turn) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    const RowGradients<A> r(a, o, smoothing);
    TangentSums<A> sums;
    for (int64_t slice = 0; slice < rows.slices; ++slice) {
      const TangentSums<A>& part = of_slice[row * rows.slices + slice];
      sums.mean += part.mean;
      sums.dot += part.dot;
      sums.picked += part.picked;
      sums.entropy += part.entropy;
    }
    if (is_first<kLanes>() && piece.slice == 0) store_row_dots(a, o[kRow], r.target, sums);
    const Classes<AnyType, A> dz(a.grad_logits, o[kGradLogits], piece.begin),
        dp(a.grad_target, o[kGradTarget], piece.begin);
    A scale[1] = {};
    for (int i = lane; i < piece.size; i += kLanes) {
      const int64_t c = piece.begin + i;
      A by_logit = 0, by_target = 0;
      if (r.active) {
        const TangentAt<A> at(a, o, c, r, transform, tau);
        by_logit =
            second_gradient(at, r, sums, transform, tau, c == r.target.index ? r.of_picked : A(0), scale[0]);
        const A w = a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[c];
        by_target = times(r.of_dot, smoothing.keep * w * at.h);
      }
      if (dz.present()) dz.store(i, {by_logit});
      if (dp.present()) dp.store(i, {by_target});
    }
    if (a.grad_scale == nullptr) return;
    merge_sums<kLanes>(scale, turn);
    if (!is_first<kLanes>()) return;
    if (rows.slices > 1)
      scale_of_slice[row * rows.slices + piece.slice] = scale[0];
    else
      static_cast<A*>(a.grad_scale)[o[kRow]] = scale[0];
  };
  for_each_row<kLanes>(a, rows, [](int, int64_t) {}, work, [](int, int64_t) {});
}

// ---------------------------------------------------------------------------------------------
// Launching

// Sums of grad_scale over the slices of rows, where there are any.
template <class A>
void launch_add_slices(const char* op, const CrossEntropyRowsBackward& a, const Plan& plan, const A* of_slice,
                       cudaStream_t stream) {
  if (a.grad_scale == nullptr || plan.rows.slices == 1) return;
  add_slices<A>
      <<<blocks_of_rows(op, a.rows.count, kThreads), kThreads, 0, stream>>>(a, plan.rows.slices, of_slice);
  check_launch(op);
}

Plan plan_of_second(const CrossEntropyRowsBackwardBackward& a) {
  Plan plan = plan_of(a);
  plan.typed = false;
  plan.plan_rows(a);
  return plan;
}

} // namespace

int64_t workspace_bytes(const CrossEntropyRowsBackward& a) {
  const Plan plan = plan_of(a);
  if (a.grad_scale == nullptr || plan.rows.slices == 1) return 0;
  return a.rows.count * plan.rows.slices * static_cast<int64_t>(sizeof(double));
}

void launch(const CrossEntropyRowsBackward& a, void* workspace, void* stream_) {
  constexpr const char* op = "cross_entropy_rows_backward";
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.rows.count == 0) return;
  if (a.grad_logits.data == nullptr && a.grad_target.data == nullptr && a.grad_scale == nullptr) return;
  const Plan plan = plan_of(a);
  trace("cross_entropy_rows_backward", plan);
  const unsigned blocks = grid(op, plan.blocks);
  if (plan.way == Plan::kTiles || plan.way == Plan::kShort) {
    with_tiles(a, plan, [&](auto element, auto accumulation, auto is_short, int64_t shared_bytes) {
      using T = typename decltype(element)::type;
      using A = typename decltype(accumulation)::type;
      gradient_of_tiles<T, A, decltype(is_short)::value>
          <<<blocks, kThreads, shared_bytes, stream>>>(a, plan.tiling, plan.short_rows);
    });
    return check_launch(op);
  }
  with_rows(a, plan, is_dense(a, plan), [&](auto element, auto accumulation, auto lanes, auto flag) {
    using T = typename decltype(element)::type;
    using A = typename decltype(accumulation)::type;
    gradient_of_rows<T, A, decltype(lanes)::value, decltype(flag)::value>
        <<<blocks, kThreads, 0, stream>>>(a, plan.rows, static_cast<A*>(workspace));
    check_launch(op);
  });
  with_types(a, false, [&](auto, auto accumulation) {
    using A = typename decltype(accumulation)::type;
    launch_add_slices(op, a, plan, static_cast<const A*>(workspace), stream);
  });
}

int64_t workspace_bytes(const CrossEntropyRowsBackwardBackward& a) {
  const Plan plan = plan_of_second(a);
  return a.rows.count * plan.rows.slices * static_cast<int64_t>(sizeof(TangentSums<double>) + sizeof(double));
}

void launch(const CrossEntropyRowsBackwardBackward& a, void* workspace, void* stream_) {
  constexpr const char* op = "cross_entropy_rows_backward_backward";
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.rows.count == 0) return;
  const Plan plan = plan_of_second(a);
  trace("cross_entropy_rows_backward_backward", plan);
  const unsigned blocks = grid(op, plan.blocks);
  with_types(a, false, [&](auto, auto accumulation) {
    using A = typename decltype(accumulation)::type;
    auto* of_slice = static_cast<TangentSums<A>*>(workspace);
    A* scale_of_slice = reinterpret_cast<A*>(of_slice + a.rows.count * plan.rows.slices);
    with_flag(plan.way == Plan::kByWarp, [&](auto flag) {
      constexpr int kLanes = decltype(flag)::value ? kWarp : kThreads;
      tangent_sums<kLanes, A><<<blocks, kThreads, 0, stream>>>(a, plan.rows, of_slice);
      check_launch(op);
      second_products<kLanes, A><<<blocks, kThreads, 0, stream>>>(a, plan.rows, of_slice, scale_of_slice);
      check_launch(op);
    });
    launch_add_slices<A>(op, a, plan, scale_of_slice, stream);
  });
}

bool take_bad_target_of_rows_backward(BadTarget& bad_target) {
  return take_record(bad_target);
}

} // namespace lossops::cuda
