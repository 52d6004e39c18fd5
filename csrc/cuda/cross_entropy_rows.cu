// Row functions of softmax cross-entropy on the GPU, forward.
#include <limits>

#include "cross_entropy_rows.cuh"

namespace lossops::cuda {
namespace {

// What RowState has of a row's u so far, the sum that the entropy is made of, and where the largest u is.
template <class A, class Index = int>
struct PlaneState : RowState<A> {
  static constexpr Index kNowhere = std::numeric_limits<Index>::max();
  static constexpr Index kNaN = std::numeric_limits<Index>::min(); // + c: the first NaN is at class c
  A moment = 0;                                                    // of exp(u - max)*(u - max)
  Index best = kNowhere;

  LOSSOPS_DEVICE void raise(A new_max) {
    if (new_max != this->max) {
      const A distance = this->max - new_max, factor = exponential<A>(distance);
      moment = times(factor, moment + this->sum * distance);
    }
    RowState<A>::raise(new_max);
  }

  // N of the u, of classes c, c + step, ..., before or after those so far; their t where kDense.
  template <class T, bool kDense, int N>
  LOSSOPS_DEVICE void add(const A (&u)[N], const A (&t)[N], int c, int step, bool entropy) {
    A largest = u[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = larger(largest, u[k]);
    if (largest >= this->max) {
      int first = c;
#pragma unroll
      for (int k = N - 1; k >= 0; --k)
        if (u[k] == largest) first = c + k * step;
      if (largest > this->max && best >= 0) best = kNowhere;
      best = min(best, first);
      raise(largest);
    }
    RowState<A>::template add<T, kDense>(u, t);
    if (this->sum != this->sum) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (u[k] != u[k]) best = min(best, kNaN + c + k * step);
    }
    if (!entropy) return;
    const A ref = anchor(this->max);
    A part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) part += times(exponential<T>(u[k] - ref), u[k] - ref);
    moment += part;
  }

  LOSSOPS_DEVICE void merge(PlaneState other) {
    if (best < 0 || other.best < 0 || this->max == other.max)
      best = min(best, other.best);
    else if (other.max > this->max)
      best = other.best;
    const A new_max = larger(this->max, other.max);
    raise(new_max);
    other.raise(new_max);
    this->sum += other.sum;
    this->target_sum += other.target_sum;
    this->dot += other.dot;
    moment += other.moment;
  }

  template <int kLanes>
  LOSSOPS_DEVICE void merge_lanes() {
    const A own = this->max;
    raise(lanes_max<kLanes>(own));
    if (best >= 0 && own != this->max) best = kNowhere;
    best = lanes_min<kLanes>(best);
    this->sum = lanes_sum<kLanes>(this->sum);
    this->target_sum = lanes_sum<kLanes>(this->target_sum);
    this->dot = lanes_sum<kLanes>(this->dot);
    moment = lanes_sum<kLanes>(moment);
  }

  // A slice's state as one of the row that it begins in at class `begin`.
  LOSSOPS_DEVICE PlaneState<A, int64_t> of_row(int64_t begin) const {
    PlaneState<A, int64_t> state;
    static_cast<RowState<A>&>(state) = *this;
    state.moment = moment;
    if (best != kNowhere) state.best = best < 0 ? state.kNaN + (best - kNaN) + begin : best + begin;
    return state;
  }
  LOSSOPS_DEVICE int64_t predicted() const {
    return best < 0 ? best - kNaN : best;
  }
};

// States of threads, in shared memory, which takes no constructor.
template <class A, int kCount>
struct SharedStates {
  A number[5][kCount];
  int best[kCount];

  LOSSOPS_DEVICE void set(int i, const PlaneState<A>& state) {
    number[0][i] = state.max;
    number[1][i] = state.sum;
    number[2][i] = state.target_sum;
    number[3][i] = state.dot;
    number[4][i] = state.moment;
    best[i] = state.best;
  }
  LOSSOPS_DEVICE PlaneState<A> get(int i) const {
    PlaneState<A> state;
    state.max = number[0][i];
    state.sum = number[1][i];
    state.target_sum = number[2][i];
    state.dot = number[3][i];
    state.moment = number[4][i];
    state.best = best[i];
    return state;
  }
};

// The state of the kLanes threads that share a row, in the first of them; `turn` as for merge() of RowState.
template <int kLanes, class A>
LOSSOPS_DEVICE PlaneState<A> merge(PlaneState<A> state, int turn) {
  static_assert(kLanes % kWarp == 0);
  state.template merge_lanes<kWarp>();
  if constexpr (kLanes > kWarp) {
    constexpr int kWarps = kLanes / kWarp;
    __shared__ SharedStates<A, kWarps> shared[2];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (is_first<kWarp>()) shared[turn].set(warp, state);
    __syncthreads();
    state = lane < kWarps ? shared[turn].get(lane) : PlaneState<A>();
    if (warp == 0) state.template merge_lanes<kWarp>();
  }
  return state;
}

template <class A, class Index>
LOSSOPS_DEVICE void store_planes(const CrossEntropyRowsForward& a, const int64_t* o,
                                 PlaneState<A, Index> state, RowTarget<A> target, A target_logit,
                                 const Transform<A>& transform) {
  A planes[kPlanes] = {};
  if (target.counted) {
    planes[kTargetWeight] = target.weight;
    if (a.classes > 0) {
      planes[kMax] = state.max;
      planes[kLogSum] = logarithm(state.sum);
      planes[kEntropy] = planes[kLogSum] - state.moment / state.sum;
    }
    if (target.index >= 0) {
      const A t = Smoothing<A>(a).keep * target.weight;
      planes[kPicked] = transform.of(target_logit) - anchor(state.max);
      state.target_sum += t;
      state.dot += target_term(t, planes[kPicked]);
    }
    planes[kTargetSum] = state.target_sum;
    planes[kDot] = state.dot;
    if (a.index_target() && target.index < 0) { // out of range: the weight is NaN
      for (const int plane : {kLogSum, kTargetSum, kDot, kPicked, kEntropy}) planes[plane] = target.weight;
    }
  }
  A* const out = static_cast<A*>(a.stats) + o[kRow];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane)
    if (plane < a.planes()) out[plane * a.rows.count] = planes[plane];
  if (a.predicted != nullptr) a.predicted[o[kRow]] = target.counted && a.classes > 0 ? state.predicted() : -1;
}

// ---------------------------------------------------------------------------------------------
// Forward

template <class T, class A, int kLanes, bool kDense>
LOSSOPS_DEVICE PlaneState<A> plane_state(const CrossEntropyRowsForward& a, const int64_t* o,
                                         const Piece& piece, const Transform<A>& transform, int lane) {
  const Classes<T, A> z(a.logits, o[kLogits], piece.begin);
  const Classes<T, A> p(a.index_target() ? ClassTensor() : a.target, o[kTarget], piece.begin);
  const Packs packs = kDense ? Packs::of<kLanes>(piece.size, z, p) : Packs::of<kLanes>(piece.size, z);
  const Weights<A> weights(a, piece.begin, packs.begin);
  const Smoothing<A> smoothing(a);
  PlaneState<A> state;
  const auto add = [&](auto unroll, auto width, auto shifted, int first, int end) {
    constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
    constexpr int kShifted = decltype(shifted)::value;
    typename Classes<T, A>::template Raw<kWidth> logits[kCount], probabilities[kCount] = {};
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int c = first + u * kWidth * kLanes;
      if (c >= end) continue;
      logits[u] = z.template fetch<kWidth, 0>(c);
      if (kDense && p.present()) probabilities[u] = p.template fetch<kWidth, kShifted>(c);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int c = first + u * kWidth * kLanes;
      if (c >= end) continue;
      A logit[kWidth], t[kWidth];
      z.template widen_raw<kWidth>(logits[u], logit);
      if constexpr (kDense) {
        A w[kWidth];
        weights.load(c, w);
        target_weights<kWidth>(p, probabilities[u], w, smoothing, t);
      }
      A transformed[kWidth];
      transform.apply(logit, transformed);
      state.template add<T, kDense>(transformed, t, c, 1, a.entropy);
    }
  };
  for_classes<T, kLanes, kDense, kDense>(piece.size, packs, lane, add);
  return state;
}

// With one slice to a row: the planes; else only the slices' states, for join_planes.
template <class T, class A, int kLanes, bool kDense>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    planes_of_rows(const __grid_constant__ CrossEntropyRowsForward a, const __grid_constant__ Rows rows,
                   PlaneState<A>* of_slice) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  const Transform<A> transform(a);
  __shared__ int64_t indices[kChunk]; // of the targets
  __shared__ A target_logits[kChunk];
  __shared__ SharedStates<A, kChunk> states;
  RowTarget<A> target; // of the row that this thread begins and ends
  for_each_row<kLanes>(
      a, rows,
      [&](int slot, int64_t row) {
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o);
        target = read_target<A>(a, o);
        indices[slot] = target.counted ? target.index : kIgnored;
      },
      [&](int slot, int64_t row, bool, int turn) {
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o);
        PlaneState<A> state;
        const int64_t index = indices[slot];
        A target_logit = 0;
        if (index != kIgnored) {
          // Early, so that it comes with the row; slices leave it to join_planes.
          if (is_first<kLanes>() && rows.slices == 1) target_logit = logit_at<A>(a, o, index);
          state = plane_state<T, A, kLanes, kDense>(a, o, piece, transform, lane);
        }
        state = merge<kLanes>(state, turn);
        if (!is_first<kLanes>()) return;
        if (rows.slices > 1) {
          of_slice[row * rows.slices + piece.slice] = state;
        } else {
          states.set(slot, state);
          target_logits[slot] = target_logit;
        }
      },
      [&](int slot, int64_t row) {
        if (rows.slices > 1) return;
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o);
        store_planes(a, o, states.get(slot), target, target_logits[slot], transform);
      });
}

// A warp a row.
template <class A>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    join_planes(const __grid_constant__ CrossEntropyRowsForward a, const __grid_constant__ Rows rows,
                const PlaneState<A>* of_slice) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (row >= a.rows.count) return; // the whole warp
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  PlaneState<A, int64_t> state;
  for (int64_t slice = lane; slice < rows.slices; slice += kWarp)
    state.merge(of_slice[row * rows.slices + slice].of_row(slice * rows.slice_size));
  state.template merge_lanes<kWarp>();
  if (!is_first<kWarp>()) return;
  const RowTarget<A> target = read_target<A>(a, o);
  store_planes(a, o, state, target, logit_at<A>(a, o, target.index), Transform<A>(a));
}

template <class T, class A, bool kShort>
__global__ void __launch_bounds__(kThreads, kResidentPlanes<A>)
    planes_of_tiles(const __grid_constant__ CrossEntropyRowsForward a, const __grid_constant__ Tiling tiling,
                    const __grid_constant__ ShortRows short_rows) {
  using Row = RowPack<T, A, 1>;
  __shared__ SharedStates<A, kShort ? 1 : kThreads> shared;
  __shared__ A target_logits[kShort ? 1 : kThreads];
  const int lane = kShort ? 0 : threadIdx.x / tiling.across, lanes = kShort ? 1 : kThreads / tiling.across;
  const int classes = static_cast<int>(a.classes);
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const A* weight = static_cast<const A*>(a.weight);
  for_each_tile<1, false>(a, tiling, [&](int64_t row) {
    const bool here = row < a.rows.count;
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o); // where there is none, nothing is read or written
    const TileRow<T, A, kShort> z(a.logits, o[kLogits], short_rows);
    const Row p(kShort || a.index_target() ? ClassTensor() : a.target, o[kTarget]);
    if constexpr (kShort) {
      __syncthreads(); // the tile before has been read
      ShortTile(a, short_rows, row / kThreads)
          .template copy<true>(static_cast<T*>(a.logits.data), short_rows_memory<T>(), short_rows);
      __syncthreads();
    }
    const RowTarget<A> target = here ? read_target<A>(a, o) : RowTarget<A>{kNoClass, false};
    PlaneState<A> state;
    A target_logit = 0; // picked up on the way: to come back for it costs a sector
    const auto add = [&](auto count, int first) {
      constexpr int kCount = decltype(count)::value;
      typename Row::Raw raw[kCount], probabilities[kCount] = {};
      A logit[kCount], u[kCount], t[kCount];
      z.fetch(first, lanes, raw);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (p.present()) probabilities[k] = p.fetch(first + k * lanes);
        t[k] = weight != nullptr ? weight[first + k * lanes] : A(1);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        logit[k] = Row::element(raw[k], 0);
        if (first + k * lanes == target.index) target_logit = logit[k];
        t[k] *= smoothing.keep * Row::element(probabilities[k], 0) + smoothing.spread;
      }
      transform.apply(logit, u);
      state.template add<T, true>(u, t, first, lanes, a.entropy);
    };
    if (target.counted) for_tile_classes<kTileClasses, kShort>(lane, lanes, classes, add);
    if (!kShort && lanes > 1) { // the rows' other threads
      __syncthreads();          // the tile before has been read
      shared.set(threadIdx.x, state);
      target_logits[threadIdx.x] = target_logit;
      __syncthreads();
      if (lane == 0) {
        for (int i = threadIdx.x + tiling.across; i < kThreads; i += tiling.across) {
          state.merge(shared.get(i));
          target_logit += target_logits[i]; // one thread's alone is not 0
        }
      }
    }
    if (!here || lane != 0) return;
    store_planes(a, o, state, target, target_logit, transform);
  });
}

} // namespace

// ---------------------------------------------------------------------------------------------
// Launching

int64_t workspace_bytes(const CrossEntropyRowsForward& a) {
  const Plan plan = plan_of(a);
  if (plan.rows.slices == 1) return 0;
  return a.rows.count * plan.rows.slices * static_cast<int64_t>(sizeof(PlaneState<double>));
}

void launch(const CrossEntropyRowsForward& a, void* workspace, void* stream_) {
  constexpr const char* op = "cross_entropy_rows_forward";
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (a.rows.count == 0) return;
  const Plan plan = plan_of(a);
  trace("cross_entropy_rows_forward", plan);
  const unsigned blocks = grid(op, plan.blocks);
  if (plan.way == Plan::kTiles || plan.way == Plan::kShort) {
    with_tiles(a, plan, [&](auto element, auto accumulation, auto is_short, int64_t shared_bytes) {
      using T = typename decltype(element)::type;
      using A = typename decltype(accumulation)::type;
      planes_of_tiles<T, A, decltype(is_short)::value>
          <<<blocks, kThreads, shared_bytes, stream>>>(a, plan.tiling, plan.short_rows);
    });
    return check_launch(op);
  }
  // Not is_dense: smoothing's one sum beside the planes would cost all other options more than it saves
  // there.
  with_rows(a, plan, a.has_target_sum(), [&](auto element, auto accumulation, auto lanes, auto dense) {
    using T = typename decltype(element)::type;
    using A = typename decltype(accumulation)::type;
    planes_of_rows<T, A, decltype(lanes)::value, decltype(dense)::value>
        <<<blocks, kThreads, 0, stream>>>(a, plan.rows, static_cast<PlaneState<A>*>(workspace));
  });
  check_launch(op);
  if (plan.rows.slices == 1) return;
  with_types(a, false, [&](auto, auto accumulation) {
    using A = typename decltype(accumulation)::type;
    join_planes<A><<<blocks_of_rows(op, a.rows.count, kThreads / kWarp), kThreads, 0, stream>>>(
        a, plan.rows, static_cast<const PlaneState<A>*>(workspace));
  });
  check_launch(op);
}

bool take_bad_target_of_rows(BadTarget& bad_target) {
  return take_record(bad_target);
}

} // namespace lossops::cuda
