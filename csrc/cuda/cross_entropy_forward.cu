// Softmax cross-entropy on the GPU, forward.
#include "cross_entropy_plan.h"

namespace lossops::cuda {
namespace {

// What the forward knows of a row: its loss and the stats.
template <class A>
struct RowResult {
  A loss = 0, max = 0, log_sum = 0, target_sum = 0;

  RowResult() = default;
  LOSSOPS_DEVICE RowResult(const CrossEntropyForward& a, RowState<A> state, RowTarget<A> target,
                           A target_logit, Sums& sums) {
    if (!target.counted) return;
    if (a.index_target()) {
      const A t = Smoothing<A>(a).keep * target.weight;
      state.target_sum += t;
      if (target.index >= 0) state.dot += target_term(t, target_logit - anchor(state.max));
    }
    max = state.max;
    log_sum = a.classes == 0 ? A(0) : logarithm(state.sum);
    target_sum = state.target_sum;
    loss = target_sum * log_sum - state.dot; // NaN where the index is out of range: S is
    sums.add({static_cast<double>(loss), static_cast<double>(target.weight)});
  }

  LOSSOPS_DEVICE void store(const CrossEntropyForward& a, int64_t row) const {
    const Stats<A> stats(a);
    stats.max[row] = max;
    stats.log_sum[row] = log_sum;
    if (stats.target_sum != nullptr) stats.target_sum[row] = target_sum;
    if (a.reduction == Reduction::none) store_any(a.loss_dtype, a.loss, row, loss);
  }
};

// ---------------------------------------------------------------------------------------------
// Rows by a block, a warp or a few lanes of one

template <class T, class A, int kLanes, bool kDense>
LOSSOPS_DEVICE RowState<A> row_state(const CrossEntropyProblem& a, const int64_t* o, const Piece& piece,
                                     int lane) {
  const Classes<T, A> z(a.logits, o[kLogits], piece.begin);
  const Classes<T, A> p(a.index_target() ? ClassTensor() : a.target, o[kTarget], piece.begin);
  const Packs packs = kDense ? Packs::of<kLanes>(piece.size, z, p) : Packs::of<kLanes>(piece.size, z);
  const Weights<A> weights(a, piece.begin, packs.begin);
  const Smoothing<A> smoothing(a);
  RowState<A> state;
  const auto add = [&](auto unroll, auto width, auto shifted, int first, int end) {
    constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
    constexpr int kShifted = decltype(shifted)::value;
    typename Classes<T, A>::template Raw<kWidth> logits[kCount], probabilities[kCount] = {};
    A w[kCount][kWidth];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int c = first + u * kWidth * kLanes;
      if (c >= end) continue;
      logits[u] = z.template fetch<kWidth, 0>(c);
      if (kDense && p.present()) probabilities[u] = p.template fetch<kWidth, kShifted>(c);
      if (kDense) weights.load(c, w[u]);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (first + u * kWidth * kLanes >= end) continue;
      A logit[kWidth], t[kWidth];
      z.template widen_raw<kWidth>(logits[u], logit);
      if (kDense) target_weights<kWidth>(p, probabilities[u], w[u], smoothing, t);
      state.template add<T, kDense>(logit, t);
      if (!kDense && a.has_target_sum()) state.add_ones(logit);
    }
  };
  for_classes<T, kLanes, kDense, kDense>(piece.size, packs, lane, add);
  if (!kDense && a.has_target_sum()) state.scale_targets(smoothing.spread);
  return state;
}

// With one slice to a row: the rows' results and of_block; else only the slices' states, for join_slices.
template <class T, class A, int kLanes, bool kDense>
__global__ void __launch_bounds__(kThreads, kResidentRows<T, A, kDense>)
    forward_rows(const __grid_constant__ CrossEntropyForward a, const __grid_constant__ Rows rows,
                 const __grid_constant__ BlockSums block, RowState<A>* of_slice) {
  const int lane = threadIdx.x % kLanes;
  const Piece piece(a, rows);
  Sums sums;
  __shared__ int64_t indices[kChunk]; // of the targets
  __shared__ A states[5][kChunk];
  RowTarget<A> target; // of the row that this thread begins and ends
  for_each_row<kLanes>(
      a, rows,
      [&](int slot, int64_t row) {
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o);
        target = read_target<A>(a, o);
        indices[slot] = target.counted ? target.index : kIgnored;
      },
      [&](int slot, int64_t row, bool here, int turn) {
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o); // where there is none, nothing is read or written
        RowState<A> state;
        // An ignored row is not read: nothing in it can reach the loss, NaN included.
        const int64_t index = here ? indices[slot] : kIgnored;
        A target_logit = 0;
        if (index != kIgnored) {
          // Early, so that it comes with the row; slices leave it to join_slices.
          if (is_first<kLanes>() && rows.slices == 1) target_logit = logit_at<A>(a, o, index);
          state = row_state<T, A, kLanes, kDense>(a, o, piece, lane);
        }
        state = merge<kLanes>(state, turn, a.has_target_sum());
        if (!is_first<kLanes>() || !here) return;
        if (rows.slices > 1) {
          of_slice[row * rows.slices + piece.slice] = state;
        } else {
          states[0][slot] = state.max;
          states[1][slot] = state.sum;
          states[2][slot] = state.target_sum;
          states[3][slot] = state.dot;
          states[4][slot] = target_logit;
        }
      },
      [&](int slot, int64_t row) {
        if (rows.slices > 1) return;
        int64_t o[kCrossEntropyOperands];
        a.rows.offsets(row, o);
        RowState<A> state;
        state.max = states[0][slot];
        state.sum = states[1][slot];
        state.target_sum = states[2][slot];
        state.dot = states[3][slot];
        RowResult<A>(a, state, target, states[4][slot], sums).store(a, o[kRow]);
      });
  if (rows.slices > 1) return;
  block.put(rows.per_block == 1 ? sums : block_sums<kThreads>(sums));
}

// One block, a warp a row: there are no more than a few hundred.
template <class A>
__global__ void __launch_bounds__(kThreads, kResident<A, false>)
    join_slices(const __grid_constant__ CrossEntropyForward a, int64_t slices, const RowState<A>* of_slice,
                const __grid_constant__ Result result) {
  const int lane = threadIdx.x % kWarp;
  Sums sums;
  for (int64_t row = threadIdx.x / kWarp; row < a.rows.count; row += kThreads / kWarp) {
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(row, o);
    RowState<A> state;
    for (int64_t slice = lane; slice < slices; slice += kWarp) state.merge(of_slice[row * slices + slice]);
    state.template merge_lanes<kWarp>(a.has_target_sum());
    if (!is_first<kWarp>()) continue;
    const RowTarget<A> target = read_target<A>(a, o);
    RowResult<A>(a, state, target, logit_at<A>(a, o, target.index), sums).store(a, o[kRow]);
  }
  const Sums total = block_sums<kThreads>(sums);
  if (threadIdx.x == 0) result.write(total);
}

// ---------------------------------------------------------------------------------------------
// Short rows

template <class T, class A>
__global__ void __launch_bounds__(kShortThreads, kResident<A, false>)
    forward_short_rows(const __grid_constant__ CrossEntropyForward a, const __grid_constant__ ShortRows rows,
                       const __grid_constant__ BlockSums block) {
  T* shared = short_rows_memory<T>();
  T* z = shared + threadIdx.x * rows.stride;
  const Smoothing<A> smoothing(a);
  const A* weight = static_cast<const A*>(a.weight);
  Sums sums;
  for (int64_t t = blockIdx.x; t < rows.tiles; t += gridDim.x) {
    const ShortTile tile(a, rows, t);
    tile.copy<true>(static_cast<T*>(a.logits.data), shared, rows);
    int64_t o[kCrossEntropyOperands];
    RowTarget<A> target;
    if (tile.row < a.rows.count) {
      a.rows.offsets(tile.row, o);
      target = read_target<A>(a, o);
    }
    __syncthreads();
    if (tile.row < a.rows.count) {
      RowState<A> state;
      A target_logit = 0;
      if (target.counted) {
        for_short_row<A>(z, rows, [&](int, A logit) { state.max = larger(state.max, logit); });
        const A ref = anchor(state.max);
        for_short_row<A>(z, rows, [&](int, A logit) { state.sum += exponential<T>(logit - ref); });
        if (smoothing.spread != 0) {
          for_short_row<A>(z, rows, [&](int c, A logit) {
            const A t_c = weight == nullptr ? smoothing.spread : weight[c] * smoothing.spread;
            state.target_sum += t_c;
            state.dot += target_term(t_c, logit - ref);
          });
        }
        if (target.index >= 0) target_logit = widen<A>(z[target.index]);
      }
      RowResult<A>(a, state, target, target_logit, sums).store(a, o[kRow]);
    }
    __syncthreads(); // before the next tile takes the memory
  }
  block.put(block_sums<kShortThreads>(sums));
}

// ---------------------------------------------------------------------------------------------
// Tiles

// The results of kRows rows side by side: as packs where they lie so.
template <class A, int kRows>
LOSSOPS_DEVICE void store_rows(const CrossEntropyForward& a, int64_t (&o)[kCrossEntropyOperands],
                               const RowResult<A> (&results)[kRows]) {
  constexpr int kPack = kPackSize<A>;
  if constexpr (kRows % kPack == 0) {
    // Where rows are in packs, their number is a multiple of one, and so is the first of each that lie so.
    if (a.reduction != Reduction::none && a.rows.inner_stride(kRow) == 1) {
      const Stats<A> stats(a);
#pragma unroll
      for (int first = 0; first < kRows; first += kPack) {
        Pack<A> max, log_sum, target_sum;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          max.value[k] = results[first + k].max;
          log_sum.value[k] = results[first + k].log_sum;
          target_sum.value[k] = results[first + k].target_sum;
        }
        store_pack(stats.max + o[kRow] + first, max);
        store_pack(stats.log_sum + o[kRow] + first, log_sum);
        if (stats.target_sum != nullptr) store_pack(stats.target_sum + o[kRow] + first, target_sum);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) results[k].store(a, o[kRow] + k * a.rows.inner_stride(kRow));
}

template <class T, class A, int kRows, bool kDense>
__global__ void __launch_bounds__(kThreads, kResidentTiles<T, A, kDense>)
    forward_tiles(const __grid_constant__ CrossEntropyForward a, const __grid_constant__ Tiling tiling,
                  const __grid_constant__ BlockSums block) {
  using Row = RowPack<T, A, kRows>;
  constexpr int kClasses = kDense && sizeof(T) != 4 ? 2 : 4; // at a time
  __shared__ A shared[5][kRows == 1 ? kThreads : 1];
  const int lane = threadIdx.x / tiling.across, lanes = kThreads / tiling.across;
  const int classes = static_cast<int>(a.classes);
  const Smoothing<A> smoothing(a);
  const A* weight = static_cast<const A*>(a.weight);
  Sums sums;
  for_each_tile<kRows, false>(a, tiling, [&](int64_t first) {
    const bool here = first < a.rows.count;
    int64_t o[kCrossEntropyOperands];
    a.rows.offsets(first, o); // where there are none, nothing is read or written
    const Row z(a.logits, o[kLogits]), p(a.index_target() ? ClassTensor() : a.target, o[kTarget]);
    RowState<A> state[kRows];
    // The targets' logits are picked up on the way: to come back for them costs a sector each.
    int index[kRows];
    A target_logit[kRows] = {};
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      index[k] = here ? place_of_target(a, o[kTarget] + k * a.rows.inner_stride(kTarget)) : kNoClass;
    const auto add = [&](auto count, int first_class) {
      constexpr int kCount = decltype(count)::value;
      typename Row::Raw raw[kCount], probabilities[kCount] = {};
      A w[kCount];
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int c = first_class + u * lanes;
        raw[u] = z.fetch(c);
        if (kDense && p.present()) probabilities[u] = p.fetch(c);
        w[u] = kDense && weight != nullptr ? weight[c] : A(1);
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        A logit[kCount], t[kCount];
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          logit[u] = Row::element(raw[u], k);
          if (index[k] == first_class + u * lanes) target_logit[k] = logit[u];
          if constexpr (kDense)
            t[u] = w[u] * (smoothing.keep * Row::element(probabilities[u], k) + smoothing.spread);
        }
        state[k].template add<T, kDense>(logit, t);
      }
    };
    if (here) for_tile_classes<kClasses, false>(lane, lanes, classes, add);
    if (kRows == 1 && lanes > 1) { // the rows' other threads
      __syncthreads();             // the tile before has been read
      shared[0][threadIdx.x] = state[0].max;
      shared[1][threadIdx.x] = state[0].sum;
      shared[2][threadIdx.x] = state[0].target_sum;
      shared[3][threadIdx.x] = state[0].dot;
      shared[4][threadIdx.x] = target_logit[0];
      __syncthreads();
      if (lane == 0) {
        for (int i = threadIdx.x + tiling.across; i < kThreads; i += tiling.across) {
          RowState<A> other;
          other.max = shared[0][i];
          other.sum = shared[1][i];
          other.target_sum = shared[2][i];
          other.dot = shared[3][i];
          state[0].merge(other);
          target_logit[0] += shared[4][i]; // one thread's alone is not 0
        }
      }
    }
    if (!here || lane != 0) return;
    RowResult<A> results[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      results[k] = RowResult<A>(a, state[k], read_target<A>(a, o), target_logit[k], sums);
      o[kTarget] += a.rows.inner_stride(kTarget);
    }
    store_rows<A, kRows>(a, o, results);
  });
  block.put(block_sums<kThreads>(sums));
}

// ---------------------------------------------------------------------------------------------
// Launching

// Only kernels that know the dtype have rows of so few packs.
template <class T, class A, bool kDense>
void launch_few_lanes(const CrossEntropyForward& a, const Plan& plan, const BlockSums& sums,
                      RowState<A>* of_slice, unsigned blocks, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, AnyType>)
    forward_rows<T, A, kFewLanes, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.rows, sums, of_slice);
}

template <class T, class A, bool kDense>
void launch_tiles(const CrossEntropyForward& a, const Plan& plan, const BlockSums& sums, unsigned blocks,
                  cudaStream_t stream) {
  with_flag(plan.tiling.packs, [&](auto packs) {
    constexpr int kRows = decltype(packs)::value ? kPackSize<T> : 1;
    forward_tiles<T, A, kRows, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.tiling, sums);
  });
}

} // namespace

int64_t workspace_bytes(const CrossEntropyForward& a) {
  const Plan plan = plan_of(a);
  if (plan.rows.slices > 1)
    return a.rows.count * plan.rows.slices * static_cast<int64_t>(sizeof(RowState<double>));
  return plan.blocks * static_cast<int64_t>(sizeof(Sums));
}

void launch(const CrossEntropyForward& a, void* workspace, void* stream_) {
  constexpr const char* op = "cross_entropy";
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = plan_of(a);
  const BlockSums sums{static_cast<Sums*>(workspace), {a.reduction, a.loss_dtype, a.loss, a.normalizer}};
  const bool dense = is_dense(a, plan);
  if (plan.blocks > 0) {
    trace("cross_entropy_forward", plan);
    const unsigned blocks = grid(op, plan.blocks);
    with_types(a, plan.typed, [&](auto element, auto accumulation) {
      using T = typename decltype(element)::type;
      using A = typename decltype(accumulation)::type;
      if constexpr (!std::is_same_v<T, AnyType>) {
        if (plan.way == Plan::kShort)
          return forward_short_rows<T, A>
              <<<blocks, kShortThreads, plan.short_rows_bytes(a), stream>>>(a, plan.short_rows, sums);
      }
      with_flag(dense || std::is_same_v<T, AnyType>, [&](auto flag) {
        constexpr bool kDense = decltype(flag)::value;
        if constexpr (kDense || !std::is_same_v<T, AnyType>) {
          auto* of_slice = static_cast<RowState<A>*>(workspace);
          if (plan.way == Plan::kTiles)
            launch_tiles<T, A, kDense>(a, plan, sums, blocks, stream);
          else if (plan.way == Plan::kByLanes)
            launch_few_lanes<T, A, kDense>(a, plan, sums, of_slice, blocks, stream);
          else if (plan.way == Plan::kByWarp)
            forward_rows<T, A, kWarp, kDense><<<blocks, kThreads, 0, stream>>>(a, plan.rows, sums, of_slice);
          else
            forward_rows<T, A, kThreads, kDense>
                <<<blocks, kThreads, 0, stream>>>(a, plan.rows, sums, of_slice);
        }
      });
    });
    check_launch(op);
  }
  if (plan.rows.slices == 1) {
    if (plan.blocks == 1) return;
    reduce_blocks<<<1, kReduceThreads, 0, stream>>>(sums, static_cast<int>(plan.blocks));
  } else if (a.use_double) {
    join_slices<double><<<1, kThreads, 0, stream>>>(
        a, plan.rows.slices, static_cast<const RowState<double>*>(workspace), sums.result);
  } else {
    join_slices<float><<<1, kThreads, 0, stream>>>(
        a, plan.rows.slices, static_cast<const RowState<float>*>(workspace), sums.result);
  }
  check_launch(op);
}

bool take_bad_target(BadTarget& bad_target) {
  check(cudaDeviceSynchronize(), "check_async_errors");
  bool found = take_record(bad_target);
  for (const auto take :
       {take_bad_target_of_backward, take_bad_target_of_rows, take_bad_target_of_rows_backward}) {
    BadTarget other; // of the same target, unless that was changed in between
    const bool more = take(other);
    if (!found && more) bad_target = other;
    found = found || more;
  }
  return found;
}

} // namespace lossops::cuda
