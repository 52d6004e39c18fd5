// Softmax cross-entropy on the GPU, backward.
#include "cross_entropy_plan.h"

namespace lossops::cuda {
namespace {

// What the backward passes know of a row before they look at its logits.
template <class A>
struct RowGradient {
  RowTarget<A> target;
  A max{}, log_sum{}, target_sum{}; // of a row that counts
  A grad = 0;       // upstream gradient of the row's loss: 0 leaves zeros, whatever the logits are
  A index_term = 0; // what a class index takes from its own class

  RowGradient() = default;
  LOSSOPS_DEVICE RowGradient(const CrossEntropyBackward& a, const int64_t* o, Smoothing<A> smoothing)
      : target(read_target<A>(a, o)) {
    if (!target.counted) return;
    const Stats<A> stats(a);
    max = stats.max[o[kRow]];
    log_sum = stats.log_sum[o[kRow]];
    target_sum = stats.target_sum != nullptr ? stats.target_sum[o[kRow]] : target.weight;
    double upstream = load_any<double>(a.grad_loss_dtype, a.grad_loss, o[kGradLoss]);
    if (a.normalizer != nullptr) upstream /= *a.normalizer;
    grad = static_cast<A>(upstream);
    index_term = grad * smoothing.keep * target.weight;
  }

  template <class T>
  LOSSOPS_DEVICE A softmax(A z) const {
    return exponential<T>((z - max) - log_sum);
  }
};

// ---------------------------------------------------------------------------------------------
// Rows by a block, a warp or a few lanes of one

template <class T, class A, int kLanes, bool kDense>
__global__ void __launch_bounds__(kThreads, kResidentRows<T, A, kDense>)
    backward_rows(const __grid_constant__ CrossEntropyBackward a, const __grid_constant__ Rows rows) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  const Smoothing<A> smoothing(a);
  __shared__ A maxima[kChunk], log_sums[kChunk], grads[kChunk], target_sums[kChunk], index_terms[kChunk];
  __shared__ int places[kChunk];
  const auto begin = [&](int slot, int64_t row) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    const RowGradient<A> r(a, o, smoothing);
    maxima[slot] = r.max;
    log_sums[slot] = r.log_sum;
    grads[slot] = r.grad;
    target_sums[slot] = r.target_sum;
    index_terms[slot] = r.index_term;
    places[slot] = piece.place(r.target.index);
  };
  const auto work = [&](int slot, int64_t row, bool here, int) {
    if (!here) return;
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    RowGradient<A> r;
    r.max = maxima[slot];
    r.log_sum = log_sums[slot];
    r.grad = grads[slot];
    r.target_sum = target_sums[slot];
    r.index_term = index_terms[slot];
    const int y = places[slot];
    const A grad_sum = r.grad * r.target_sum;
    // Without class weights every class gives the same; nothing, were the gradient infinite.
    const A smoothed = times(smoothing.spread, r.grad);
    const Classes<T, A> z(a.logits, o[kLogits], piece.begin),
        p(a.index_target() ? ClassTensor() : a.target, o[kTarget], piece.begin),
        dz(a.grad_logits, o[kGradLogits], piece.begin), dp(a.grad_target, o[kGradTarget], piece.begin);
    const Packs packs = Packs::of_gradient<kLanes, kDense>(piece.size, z, p, dz, dp);
    const Weights<A> weights(a, piece.begin, packs.begin);
    const auto write = [&](auto unroll, auto width, auto shifted, int first, int end) {
      constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
      constexpr int kShifted = decltype(shifted)::value;
      typename Classes<T, A>::template Raw<kWidth> logits[kCount] = {}, probabilities[kCount] = {};
      A w[kCount][kWidth] = {};
      if (r.grad != 0) {
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const int c = first + u * kWidth * kLanes;
          if (c >= end) continue;
          logits[u] = z.template fetch<kWidth, kShifted>(c);
          if (kDense && p.present()) probabilities[u] = p.template fetch<kWidth, kShifted>(c);
          if (kDense) weights.load(c, w[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int c = first + u * kWidth * kLanes;
        if (c >= end) continue;
        A logit[kWidth], t[kWidth], out[kWidth];
        z.template widen_raw<kWidth>(logits[u], logit);
        if (kDense) target_weights<kWidth>(p, probabilities[u], w[u], smoothing, t);
        if (kDense && dp.present()) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k)
            out[k] =
                r.grad == 0 ? A(0) : r.grad * smoothing.keep * w[u][k] * (r.log_sum - (logit[k] - r.max));
          dp.store(c, out);
        }
        if (kDense && !dz.present()) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          out[k] = grad_sum * r.template softmax<T>(logit[k]);
          out[k] -= kDense ? r.grad * t[k] : smoothed;
        }
        if (static_cast<unsigned>(y - c) < kWidth) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) out[k] -= c + k == y ? r.index_term : A(0);
        }
        if (r.grad == 0) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) out[k] = 0;
        }
        dz.store(c, out);
      }
    };
    for_classes<T, kLanes, kDense, true>(piece.size, packs, lane, write);
  };
  for_each_row<kLanes>(a, rows, begin, work, [](int, int64_t) {});
}

// ---------------------------------------------------------------------------------------------
// Short rows

template <class T, class A>
__global__ void __launch_bounds__(kShortThreads, kResident<A, false>)
    backward_short_rows(const __grid_constant__ CrossEntropyBackward a,
                        const __grid_constant__ ShortRows rows) {
  T* shared = short_rows_memory<T>();
  T* z = shared + threadIdx.x * rows.stride;
  const Smoothing<A> smoothing(a);
  const A* weight = static_cast<const A*>(a.weight);
  for (int64_t t = blockIdx.x; t < rows.tiles; t += gridDim.x) {
    const ShortTile tile(a, rows, rows.tiles - 1 - t); // as for_each_tile has it
    tile.copy<true>(static_cast<T*>(a.logits.data), shared, rows);
    RowGradient<A> r;
    if (tile.row < a.rows.count) {
      int64_t o[kCrossEntropyOperands];
      a.rows.offsets(tile.row, o);
      r = RowGradient<A>(a, o, smoothing);
    }
    __syncthreads();
    if (tile.row < a.rows.count) {
      const A grad_sum = r.grad * r.target_sum;
      const int y = static_cast<int>(r.target.index);
      for_short_row<A>(z, rows, [&](int c, A logit) {
        A value = grad_sum * r.template softmax<T>(logit);
        if (smoothing.spread != 0)
          value -= r.grad * (weight == nullptr ? smoothing.spread : weight[c] * smoothing.spread);
        if (c == y) value -= r.index_term;
        return r.grad == 0 ? A(0) : value;
      });
    }
    __syncthreads();
    tile.copy<false>(static_cast<T*>(a.grad_logits.data), shared, rows);
    __syncthreads(); // before the next tile takes the memory
  }
}

// ---------------------------------------------------------------------------------------------
// Tiles

template <class T, class A, int kRows, bool kDense>
__global__ void __launch_bounds__(kThreads, kResident<A, true>)
    backward_tiles(const __grid_constant__ CrossEntropyBackward a, const __grid_constant__ Tiling tiling) {
  using Row = RowPack<T, A, kRows>;
  constexpr int kClasses = kDense || kRows > 4 ? 2 : 4; // at a time
  const int lane = threadIdx.x / tiling.across, lanes = kThreads / tiling.across;
  const int classes = static_cast<int>(a.classes);
  const Smoothing<A> smoothing(a);
  const A* weight = static_cast<const A*>(a.weight);
  for_each_tile<kRows, true>(a, tiling, [&](int64_t first) {
    if (first >= a.rows.count) return;
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(first, o);
    const Row z(a.logits, o[kLogits]), p(a.index_target() ? ClassTensor() : a.target, o[kTarget]),
        dz(a.grad_logits, o[kGradLogits]), dp(a.grad_target, o[kGradTarget]);
    RowGradient<A> r[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k, step(a, o)) r[k] = RowGradient<A>(a, o, smoothing);
    const auto write = [&](auto count, int first_class) {
      constexpr int kCount = decltype(count)::value;
      typename Row::Raw raw[kCount], probabilities[kCount] = {};
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        raw[u] = z.fetch(first_class + u * lanes);
        if (kDense && p.present()) probabilities[u] = p.fetch(first_class + u * lanes);
      }
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int c = first_class + u * lanes;
        const A w = !kDense || weight == nullptr ? A(1) : weight[c];
        A out[kRows];
        if (kDense && dp.present()) {
#pragma unroll
          for (int k = 0; k < kRows; ++k)
            out[k] = r[k].grad == 0 ? A(0)
                                    : r[k].grad * smoothing.keep * w *
                                          (r[k].log_sum - (Row::element(raw[u], k) - r[k].max));
          dp.store(c, out);
        }
        if (kDense && !dz.present()) continue;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          A value = r[k].grad * r[k].target_sum * r[k].template softmax<T>(Row::element(raw[u], k));
          if constexpr (kDense)
            value -=
                r[k].grad * (w * (smoothing.keep * Row::element(probabilities[u], k) + smoothing.spread));
          if (c == r[k].target.index) value -= r[k].index_term;
          out[k] = r[k].grad == 0 ? A(0) : value;
        }
        dz.store(c, out);
      }
    };
    for_tile_classes<kClasses, false>(lane, lanes, classes, write);
  });
}

// ---------------------------------------------------------------------------------------------
// Launching

// Only kernels that know the dtype have rows of so few packs.
template <class T, class A, bool kDense>
void launch_few_lanes(const CrossEntropyBackward& a, const Plan& plan, unsigned blocks, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, AnyType>)
    backward_rows<T, A, kFewLanes, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.rows);
}

template <class T, class A, bool kDense>
void launch_tiles(const CrossEntropyBackward& a, const Plan& plan, unsigned blocks, cudaStream_t stream) {
  with_flag(plan.tiling.packs, [&](auto packs) {
    constexpr int kRows = decltype(packs)::value ? kPackSize<T> : 1;
    backward_tiles<T, A, kRows, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.tiling);
  });
}

} // namespace

int64_t workspace_bytes(const CrossEntropyBackward&) {
  return 0;
}

void launch(const CrossEntropyBackward& a, void*, void* stream_) {
  constexpr const char* op = "cross_entropy_backward";
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.rows.count == 0 || a.classes == 0 || (a.grad_logits.data == nullptr && a.grad_target.data == nullptr))
    return;
  Plan plan = plan_of(a);
  trace("cross_entropy_backward", plan);
  const unsigned blocks = grid(op, plan.blocks);
  const bool dense = is_dense(a, plan);
  with_types(a, plan.typed, [&](auto element, auto accumulation) {
    using T = typename decltype(element)::type;
    using A = typename decltype(accumulation)::type;
    if constexpr (!std::is_same_v<T, AnyType>) {
      if (plan.way == Plan::kShort)
        return backward_short_rows<T, A>
            <<<blocks, kShortThreads, plan.short_rows_bytes(a), stream>>>(a, plan.short_rows);
    }
    with_flag(dense || std::is_same_v<T, AnyType>, [&](auto flag) {
      constexpr bool kDense = decltype(flag)::value;
      if constexpr (kDense || !std::is_same_v<T, AnyType>) {
        if (plan.way == Plan::kTiles)
          launch_tiles<T, A, kDense>(a, plan, blocks, stream);
        else if (plan.way == Plan::kByLanes)
          launch_few_lanes<T, A, kDense>(a, plan, blocks, stream);
        else if (plan.way == Plan::kByWarp)
          backward_rows<T, A, kWarp, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.rows);
        else
          backward_rows<T, A, kThreads, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.rows);
      }
    });
  });
  check_launch(op);
}

bool take_bad_target_of_backward(BadTarget& bad_target) {
  return take_record(bad_target);
}

} // namespace lossops::cuda
