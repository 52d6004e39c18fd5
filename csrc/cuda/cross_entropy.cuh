// Softmax cross-entropy on the GPU: what its kernels share. Formulas: csrc/cross_entropy.h. Four ways
// through the logits:
//   rows by a block    many classes, one behind the other; few rows are cut into slices
//   rows by a warp     fewer classes, or by eight lanes of one
//   short rows         a thread each, from a copy in shared memory
//   tiles              classes far apart: neighbouring rows side by side, a thread each
#pragma once

#include "../cross_entropy.h"
#include "launch.h"
#include "shifted.cuh"

namespace lossops::cuda {

// Small blocks: while one waits for its row's scalars or adds up its sums, there are others to read.
constexpr int kThreads = 128;
// Blocks to a multiprocessor: half of its threads, or a quarter where each has twice the loads in flight
// (target weights, packs of rows) or numbers of twice the size, and needs the registers for them. For
// Blackwell the compiler wants some more for the same code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kHalf = 7;
#else
constexpr int kHalf = 8;
#endif
template <class A, bool kDense>
constexpr int kResident = std::is_same_v<A, double> || kDense ? 4 : kHalf;
template <class T, class A, bool kDense>
constexpr int kResidentRows = sizeof(T) == 2 && kDense ? 5 : kResident<A, kDense>;
template <class T, class A, bool kDense>
constexpr int kResidentTiles = sizeof(T) == 2 && !kDense ? 5 : kResident<A, kDense>;

// Blocks whose sums one block can still add up in a few microseconds; more rows mean more of them a block.
constexpr int64_t kMaxBlocks = 8192;
// Where a row is short, the block's own start and end have to be spread over more of them.
constexpr int64_t kMaxWarpBlocks = 2048, kMaxShortBlocks = 4096;
constexpr int kFewLanes = 8; // of a warp, for rows of a few packs

// ---------------------------------------------------------------------------------------------
// Pieces of the formula

struct BadTargetRecord {
  int found;
  BadTarget first;
};
static __device__ BadTargetRecord bad_target_record; // one for each of the files

static bool take_record(BadTarget& bad_target) {
  constexpr const char* op = "check_async_errors";
  BadTargetRecord record;
  check(cudaMemcpyFromSymbol(&record, bad_target_record, sizeof(record)), op);
  if (record.found == 0) return false;
  bad_target = record.first;
  record.found = 0;
  check(cudaMemcpyToSymbol(bad_target_record, &record, sizeof(record)), op);
  return true;
}

bool take_bad_target_of_backward(BadTarget&);
bool take_bad_target_of_rows(BadTarget&);
bool take_bad_target_of_rows_backward(BadTarget&);

// In place of a class: none, and none because the row is ignored.
constexpr int kNoClass = -1, kIgnored = -2;

// What a row's target says. An ignored row is not counted; one out of range turns to NaN.
template <class A>
struct RowTarget {
  int64_t index; // kNoClass: probabilities, or not counted
  bool counted;
  A weight; // of class `index`
};

template <class A>
LOSSOPS_DEVICE RowTarget<A> read_target(const CrossEntropyProblem& a, const int64_t* o) {
  if (!a.index_target()) return {kNoClass, true, a.classes == 0 ? A(0) : A(1)}; // torch: no classes, no mean
  const int64_t y = load_index(a.target.dtype, a.target.data, o[kTarget]);
  if (y == a.ignore_index) return {kNoClass, false};
  if (static_cast<uint64_t>(y) >= static_cast<uint64_t>(a.classes)) {
    if (!atomicExch(&bad_target_record.found, true)) bad_target_record.first = {o[kRow], y, a.classes};
    return {kNoClass, true, infinity<A>() - infinity<A>()};
  }
  return {y, true, a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[y]};
}

// The class index at `offset` of a target, one out of range too: for those nobody asks.
LOSSOPS_DEVICE int place_of_target(const CrossEntropyProblem& a, int64_t offset) {
  return a.index_target() ? static_cast<int>(load_index(a.target.dtype, a.target.data, offset)) : kNoClass;
}

// x*y, where nothing is nothing: a probability or a slope of 0 at a logit of -inf, a smoothing of 0 of an
// infinite gradient.
template <class A>
LOSSOPS_DEVICE A times(A x, A y) {
  return x == 0 ? A(0) : x * y;
}

// t_c = w_c*(keep*p_c + spread), where a class index adds keep*w at its class instead of keep*p.
template <class A>
struct Smoothing {
  A keep, spread;
  LOSSOPS_DEVICE explicit Smoothing(const CrossEntropyProblem& a)
      : keep(static_cast<A>(1 - a.label_smoothing)),
        spread(a.label_smoothing == 0 ? A(0) : static_cast<A>(a.label_smoothing / a.classes)) {}
};

// The logit that sums are taken relative to: an all -inf start must not turn into -inf - -inf.
template <class A>
LOSSOPS_DEVICE A anchor(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

// t*(z - ref), and 0 for the NaN of a weight 0 at a logit of -inf. A NaN of z or t is not lost: it is
// in the sum of exponentials or of weights too.
template <class A>
LOSSOPS_DEVICE A target_term(A t, A distance) {
  const A term = t * distance;
  return term == term ? term : A(0);
}

// Of one row so far: sums are relative to anchor(max). Aligned, for slices' states to move 16 bytes at a
// time.
template <class A>
struct alignas(16) RowState {
  A max = -infinity<A>();
  A sum = 0;        // of exp(z - max)
  A target_sum = 0; // S, of t
  A dot = 0;        // of t*(z - max)

  LOSSOPS_DEVICE void raise(A new_max) {
    if (new_max == max) return;
    if (max != -infinity<A>()) sum *= exponential<A>(max - new_max);
    if (target_sum != 0) dot += target_sum * (anchor(max) - anchor(new_max));
    max = new_max;
  }

  // N logits of type T; their t where kDense.
  template <class T, bool kDense, int N>
  LOSSOPS_DEVICE void add(const A (&z)[N], const A (&t)[N]) {
    A largest = z[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = larger(largest, z[k]);
    raise(larger(max, largest)); // a NaN never is: it goes into the sum
    const A ref = anchor(max);
    A part = 0, target_part = 0, dot_part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      part += exponential<T>(z[k] - ref);
      if constexpr (kDense) {
        target_part += t[k];
        dot_part += target_term(t[k], z[k] - ref);
      }
    }
    sum += part;
    if constexpr (kDense) {
      target_sum += target_part;
      dot += dot_part;
    }
  }

  // Then, where every class has the same t: as if that were 1, and scale_targets(t) at last.
  template <int N>
  LOSSOPS_DEVICE void add_ones(const A (&z)[N]) {
    const A ref = anchor(max);
#pragma unroll
    for (int k = 0; k < N; ++k) dot += z[k] - ref;
    target_sum += N;
  }

  LOSSOPS_DEVICE void scale_targets(A t) {
    target_sum *= t;
    dot *= t;
  }

  LOSSOPS_DEVICE void merge(RowState other) {
    const A new_max = larger(max, other.max);
    raise(new_max);
    other.raise(new_max);
    sum += other.sum;
    target_sum += other.target_sum;
    dot += other.dot;
  }

  // `targets`: whether there is a target_sum.
  template <int kLanes>
  LOSSOPS_DEVICE void merge_lanes(bool targets) {
    raise(lanes_max<kLanes>(max));
    sum = lanes_sum<kLanes>(sum);
    if (targets) {
      target_sum = lanes_sum<kLanes>(target_sum);
      dot = lanes_sum<kLanes>(dot);
    }
  }
};

// The state of the kLanes threads that share a row, in the first of them. `turn` alternates from call to
// call: a block's next sums must not overwrite those still being read.
template <int kLanes, class A>
LOSSOPS_DEVICE RowState<A> merge(RowState<A> state, int turn, bool targets) {
  state.template merge_lanes<kLanesOfWarp<kLanes>>(targets);
  if constexpr (kLanes > kWarp) {
    constexpr int kWarps = kLanes / kWarp;
    __shared__ A shared[2][4][kWarps]; // not states: shared memory takes no constructor
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (is_first<kWarp>()) {
      shared[turn][0][warp] = state.max;
      shared[turn][1][warp] = state.sum;
      shared[turn][2][warp] = state.target_sum;
      shared[turn][3][warp] = state.dot;
    }
    __syncthreads();
    state = RowState<A>();
    if (lane < kWarps) {
      state.max = shared[turn][0][lane];
      state.sum = shared[turn][1][lane];
      state.target_sum = shared[turn][2][lane];
      state.dot = shared[turn][3][lane];
    }
    if (warp == 0) state.template merge_lanes<kWarp>(targets);
  }
  return state;
}

// Stats of row r: max, log_sum and S, in planes of rows.count.
template <class A>
struct Stats {
  A *max, *log_sum, *target_sum; // target_sum may be null: then S is the weight of the target
  LOSSOPS_DEVICE explicit Stats(const CrossEntropyProblem& a)
      : max(static_cast<A*>(a.stats)),
        log_sum(max + a.rows.count),
        target_sum(a.has_target_sum() ? log_sum + a.rows.count : nullptr) {}
};

template <class A>
LOSSOPS_DEVICE A logit_at(const CrossEntropyProblem& a, const int64_t* o, int64_t c) {
  if (c < 0) return 0; // no class index
  return load_any<A>(a.logits.dtype, a.logits.data, o[kLogits] + c * a.logits.class_stride);
}

// ---------------------------------------------------------------------------------------------
// One row's classes, shared out over threads

// The classes of a row from c0 on, one behind the other.
template <class T, class A>
struct Classes {
  T* data;
  LOSSOPS_DEVICE Classes(const ClassTensor& t, int64_t offset, int64_t c0)
      : data(t.data == nullptr ? nullptr : static_cast<T*>(t.data) + offset + c0) {}
  LOSSOPS_DEVICE bool present() const {
    return data != nullptr;
  }
  // Classes before the first 16-byte boundary.
  LOSSOPS_DEVICE int head() const {
    return static_cast<int>((0 - reinterpret_cast<uintptr_t>(data) / sizeof(T)) % kPackSize<T>);
  }
  // Classes before the first sector that begins a pack or more behind the first class.
  LOSSOPS_DEVICE int shifted_head() const {
    constexpr unsigned kPack = kPackSize<T>;
    return static_cast<int>((kPack - reinterpret_cast<uintptr_t>(data) / sizeof(T)) % (2 * kPack) + kPack);
  }
  // As they lie in memory, and widened only when used: 16-bit types then take twice the registers.
  template <int N>
  using Raw = std::conditional_t<N == 1, T, Pack<T>>;
  // kShiftedLanes: of the threads that share a row, where its packs may lie across boundaries; else 0.
  template <int N, int kShiftedLanes>
  LOSSOPS_DEVICE Raw<N> fetch(int c) const {
    if constexpr (N == 1)
      return data[c];
    else if constexpr (kShiftedLanes > 0)
      return load_shifted<kShiftedLanes>(data + c);
    else
      return load_pack(data + c);
  }
  template <int N>
  static LOSSOPS_DEVICE void widen_raw(const Raw<N>& raw, A (&out)[N]) {
    if constexpr (N == 1)
      out[0] = widen<A>(raw);
    else
      unpack<T>(raw, out);
  }
  template <int N>
  LOSSOPS_DEVICE void store(int c, const A (&x)[N]) const {
    if constexpr (N == 1)
      data[c] = round_to<T>(x[0]);
    else
      store_pack(data + c, pack_rounded<T>(x));
  }
};

template <class A>
struct Classes<AnyType, A> {
  void* data;
  DType dtype;
  int64_t offset, stride;
  LOSSOPS_DEVICE Classes(const ClassTensor& t, int64_t row, int64_t c0)
      : data(t.data), dtype(t.dtype), offset(row + c0 * t.class_stride), stride(t.class_stride) {}
  LOSSOPS_DEVICE bool present() const {
    return data != nullptr;
  }
  LOSSOPS_DEVICE int head() const {
    return 0;
  }
  LOSSOPS_DEVICE int shifted_head() const {
    return head();
  }
  template <int N>
  using Raw = A;
  template <int N, int kShiftedLanes>
  LOSSOPS_DEVICE A fetch(int c) const {
    return load_any<A>(dtype, data, offset + c * stride);
  }
  template <int N>
  static LOSSOPS_DEVICE void widen_raw(A raw, A (&out)[1]) {
    out[0] = raw;
  }
  LOSSOPS_DEVICE void store(int c, const A (&x)[1]) const {
    store_any(dtype, data, offset + c * stride, x[0]);
  }
};

// Packs of each operand in flight before the first is used: as many as there are registers for.
template <class T, bool kDense>
constexpr int kUnroll = kDense && sizeof(T) != 4 ? 2 : 4;

template <int N>
using Count = std::integral_constant<int, N>;

// The classes of a piece of a row that are moved in packs, from `begin` to `end`; the others one by one.
struct Packs {
  int begin, end;
  bool shifted; // some tensor's lie across 16-byte boundaries

  // Cut by the boundaries of `cut`. Shifted packs are read from up to a pack before them to one behind, and
  // come a group of lanes at a time, whose packs of `cut` are whole sectors.
  template <int kLanes, class T, class A, class... Others>
  static LOSSOPS_DEVICE Packs of(int size, const Classes<T, A>& cut, const Others&... others) {
    constexpr int kWidth = kPackSize<T>, kTogether = kLanesOfWarp<kLanes> * kWidth;
    const bool shifted = ((others.present() && others.head() != cut.head()) || ...);
    const int begin = min(shifted ? cut.shifted_head() : cut.head(), size), left = size - begin;
    return {begin, begin + (shifted ? max(left - kWidth, 0) / kTogether * kTogether : left / kWidth * kWidth),
            shifted};
  }

  // Cut by the boundaries of what is written, which cannot be shifted.
  template <int kLanes, bool kDense, class C>
  static LOSSOPS_DEVICE Packs of_gradient(int size, const C& z, const C& p, const C& dz, const C& dp) {
    C cut = z; // a copy: a choice between addresses would put them all into local memory
    if (kDense && dp.present()) cut = dp;
    if (dz.present()) cut = dz;
    if constexpr (!kDense) return of<kLanes>(size, cut, z);
    if (dp.present() && dp.head() != cut.head()) return {size, size, false};
    return of<kLanes>(size, cut, z, p);
  }
};

// Shares n classes out over kLanes threads, in no order. f(unroll, width, shifted, c, end) is given `unroll`
// groups of `width` classes, at c, c + width*kLanes, ..., of which those before `end` are there.
template <class T, int kLanes, bool kDense, bool kMayShift, class F>
LOSSOPS_DEVICE void for_classes(int n, const Packs& packs, int lane, const F& f) {
  constexpr int kWidth = kPackSize<T>, kUnrolled = kUnroll<T, kDense>;
  if constexpr (kWidth > 1) {
    const int singles = n - (packs.end - packs.begin);
#pragma unroll 1
    for (int i = lane; i < singles; i += kLanes)
      f(Count<1>(), Count<1>(), Count<0>(), i < packs.begin ? i : i - packs.begin + packs.end, n);
  }
  if constexpr (kMayShift && kWidth > 1) {
    if (packs.shifted) {
#pragma unroll 1
      for (int c = packs.begin + lane * kWidth; c < packs.end; c += kLanes * kWidth)
        f(Count<1>(), Count<kWidth>(), Count<kLanes>(), c, packs.end);
      return;
    }
  }
#pragma unroll 1 // it is unrolled inside, and registers are few
  for (int c = packs.begin + lane * kWidth; c < packs.end; c += kUnrolled * kLanes * kWidth)
    f(Count<kUnrolled>(), Count<kWidth>(), Count<0>(), c, packs.end);
}

// The class weights of a piece of a row. They are of the accumulation type: where the row's packs begin at
// `head`, they can be read as packs too if that is a boundary for them.
template <class A>
struct Weights {
  const A* data;
  bool packs;
  LOSSOPS_DEVICE Weights(const CrossEntropyProblem& a, int64_t begin, int head)
      : data(a.weight == nullptr ? nullptr : static_cast<const A*>(a.weight) + begin),
        packs(is_aligned(data + head)) {}
  template <int N>
  LOSSOPS_DEVICE void load(int c, A (&w)[N]) const {
    if (data == nullptr) {
#pragma unroll
      for (int k = 0; k < N; ++k) w[k] = 1;
    } else if (N >= kPackSize<A> && packs) {
#pragma unroll
      for (int k = 0; k < N; k += kPackSize<A>) {
        const Pack<A> pack = load_pack(data + c + k);
#pragma unroll
        for (int j = 0; j < kPackSize<A> && k + j < N; ++j) w[k + j] = pack.value[j];
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) w[k] = data[c + k];
    }
  }
};

// t of N classes of the class weights w, without a class index's own term.
template <int N, class A, class P, class Raw>
LOSSOPS_DEVICE void target_weights(const P& p, const Raw& probabilities, const A (&w)[N], Smoothing<A> s,
                                   A (&t)[N]) {
  A probability[N] = {};
  if (p.present()) P::template widen_raw<N>(probabilities, probability);
#pragma unroll
  for (int k = 0; k < N; ++k) t[k] = w[k] * (s.keep * probability[k] + s.spread);
}

// How rows are shared out: a block takes `per_block` rows one after the other, or one of their slices.
struct Rows {
  int64_t per_block;
  int64_t slices; // of a row
  int64_t slice_size;
};

struct Piece {
  int64_t slice, begin;
  int size; // kMaxSlice at most
  LOSSOPS_DEVICE Piece(const CrossEntropyProblem& a, const Rows& rows)
      : slice(blockIdx.x % rows.slices), begin(slice * rows.slice_size) {
    size = static_cast<int>(min(a.classes - begin, rows.slice_size));
  }
  // A class index as one of the slice, or kNoClass.
  LOSSOPS_DEVICE int place(int64_t index) const {
    return begin <= index && index < begin + size ? static_cast<int>(index - begin) : kNoClass;
  }
};

// The rows of a block, kChunk at a time, in three steps between barriers: begin(slot, row) and
// end(slot, row) by one thread for each row, so that what a row's scalars cost is paid for all at once;
// between them work(slot, row, here, turn) by the kLanes threads that share a row. The groups of a warp stay
// together, for they shuffle together: where one has no row left, `here` is false.
constexpr int kChunk = kThreads;

template <int kLanes, class Begin, class Work, class End>
LOSSOPS_DEVICE void for_each_row(const CrossEntropyProblem& a, const Rows& rows, const Begin& begin,
                                 const Work& work, const End& end) {
  constexpr int kGroups = kThreads / kLanes;
  const int group = threadIdx.x / kLanes, in_warp = group % (kWarp / kLanesOfWarp<kLanes>);
  const int64_t first = blockIdx.x / rows.slices * rows.per_block;
  const int64_t last = min(first + rows.per_block, a.rows.count);
  const int thread = threadIdx.x;
  for (int64_t chunk = first; chunk < last; chunk += kChunk) {
    const int n = static_cast<int>(min(last - chunk, int64_t{kChunk}));
    if (thread < n) begin(thread, chunk + thread);
    __syncthreads();
    int turn = 0;
    for (int slot = group; slot - in_warp < n; slot += kGroups, turn ^= 1)
      work(slot, chunk + slot, slot < n, turn);
    __syncthreads();
    if (thread < n) end(thread, chunk + thread);
  }
}

// ---------------------------------------------------------------------------------------------
// Short rows: a thread each, from a copy of the block's rows in shared memory

constexpr int kShortThreads = 128;  // and rows of a block
constexpr int kShortRowBytes = 128; // 16 KiB of shared memory a block at most

// Rows that stand one behind the other, each `classes` long, and in shared memory `stride` apart.
struct ShortRows {
  int64_t tiles; // of kShortThreads rows
  int classes;
  int stride;          // more than `classes` where threads that read one class would meet in a bank
  unsigned reciprocal; // 2^32/classes, rounded up: exact for the few thousand elements of a tile
  // Classes that are moved at once, of rows as many elements apart or a multiple: one by one, threads would
  // meet in a bank.
  LOSSOPS_DEVICE int together() const {
    return stride % 4 == 0 ? 4 : stride % 2 == 0 ? 2 : 1;
  }
};

template <class T>
LOSSOPS_DEVICE T* short_rows_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// A tile of rows, and this thread's row of it.
struct ShortTile {
  int64_t first, row;
  int elements;
  LOSSOPS_DEVICE ShortTile(const CrossEntropyProblem& a, const ShortRows& rows, int64_t tile)
      : first(tile * kShortThreads), row(first + threadIdx.x) {
    elements = static_cast<int>(min(a.rows.count - first, int64_t{kShortThreads})) * rows.classes;
  }

  // To or from shared memory: in packs where both lie alike.
  template <bool kToShared, class T>
  LOSSOPS_DEVICE void copy(T* global, T* shared, const ShortRows& rows) const {
    global += first * rows.classes;
    int begin = 0;
    if (rows.stride == rows.classes && is_aligned(global)) {
      begin = elements / kPackSize<T> * kPackSize<T>;
#pragma unroll 4
      for (int i = threadIdx.x * kPackSize<T>; i < begin; i += kShortThreads * kPackSize<T>) {
        if constexpr (kToShared)
          *reinterpret_cast<Pack<T>*>(shared + i) = load_pack(global + i);
        else
          store_pack(global + i, *reinterpret_cast<const Pack<T>*>(shared + i));
      }
    }
#pragma unroll 4
    for (int i = begin + threadIdx.x; i < elements; i += kShortThreads) {
      const int row_of = static_cast<int>(__umulhi(i, rows.reciprocal));
      T& at = shared[i + row_of * (rows.stride - rows.classes)];
      if constexpr (kToShared)
        at = global[i];
      else
        global[i] = at;
    }
  }
};

// Neighbouring classes of a row in shared memory.
template <class T, int kTogether>
struct alignas(kTogether * sizeof(T)) ShortPack {
  T of[kTogether];
};

template <int kTogether, int N, class T>
LOSSOPS_DEVICE void load_short(const T* from, T (&to)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += kTogether) {
    const auto pack = *reinterpret_cast<const ShortPack<T, kTogether>*>(from + k);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) to[k + j] = pack.of[j];
  }
}

template <int kTogether, int N, class T>
LOSSOPS_DEVICE void store_short(T* to, const T (&from)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += kTogether) {
    ShortPack<T, kTogether> pack;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) pack.of[j] = from[k + j];
    *reinterpret_cast<ShortPack<T, kTogether>*>(to + k) = pack;
  }
}

// f(Count<classes to move at once>), of N classes. Rows of 8-byte elements are never 4 of them apart.
template <class T, int N, class F>
LOSSOPS_DEVICE void with_together(int together, const F& f) {
  if (N % 4 == 0 && sizeof(T) < 8 && together == 4)
    f(Count<N % 4 == 0 ? 4 : 1>());
  else if (N % 2 == 0 && together % 2 == 0)
    f(Count<N % 2 == 0 ? 2 : 1>());
  else
    f(Count<1>());
}

// f(c, logit) for the classes of a thread's row in shared memory, one by one; what it returns, if anything,
// takes the logit's place.
template <class A, class T, class F>
LOSSOPS_DEVICE void for_short_row(T* row, const ShortRows& rows, const F& f) {
  constexpr bool kWrites = !std::is_void_v<decltype(f(0, A()))>;
  with_together<T, 4>(rows.together(), [&](auto together) {
    constexpr int kTogether = decltype(together)::value;
    for (int first = 0; first < rows.classes; first += kTogether) {
      T logit[kTogether];
      load_short<kTogether>(row + first, logit);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if constexpr (kWrites)
          logit[k] = round_to<T>(f(first + k, widen<A>(logit[k])));
        else
          f(first + k, widen<A>(logit[k]));
      }
      if constexpr (kWrites) store_short<kTogether>(row + first, logit);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Tiles: neighbouring rows side by side, the classes walked

// A block's threads: `across` of them side by side, each with a pack of rows, and the rest share out the
// classes of these rows.
struct Tiling {
  int across;
  int64_t tiles;
  bool packs; // of rows to a thread, or one
};

// The rows side by side of one class: kRows of them, a pack or one.
template <class T, class A, int kRows>
struct RowPack {
  using Raw = std::conditional_t<kRows == 1, T, Pack<T>>; // as they lie in memory, and widened when used
  T* data;
  int64_t class_stride;
  LOSSOPS_DEVICE RowPack(const ClassTensor& t, int64_t offset)
      : data(t.data == nullptr ? nullptr : static_cast<T*>(t.data) + offset), class_stride(t.class_stride) {}
  LOSSOPS_DEVICE bool present() const {
    return data != nullptr;
  }
  LOSSOPS_DEVICE Raw fetch(int c) const {
    if constexpr (kRows == 1)
      return data[c * class_stride];
    else
      return load_pack(data + c * class_stride);
  }
  static LOSSOPS_DEVICE A element(const Raw& raw, int k) {
    if constexpr (kRows == 1)
      return widen<A>(raw);
    else
      return widen<A>(raw.value[k]);
  }
  LOSSOPS_DEVICE void store(int c, const A (&x)[kRows]) const {
    if constexpr (kRows == 1)
      data[c * class_stride] = round_to<T>(x[0]);
    else
      store_pack(data + c * class_stride, pack_rounded<T>(x));
  }
};

template <class A>
struct RowPack<AnyType, A, 1> : Classes<AnyType, A> {
  using Raw = A;
  LOSSOPS_DEVICE RowPack(const ClassTensor& t, int64_t offset) : Classes<AnyType, A>(t, offset, 0) {}
  LOSSOPS_DEVICE A fetch(int c) const {
    return load_any<A>(this->dtype, this->data, this->offset + c * this->stride);
  }
  static LOSSOPS_DEVICE A element(A raw, int) {
    return raw;
  }
};

// f(count, c) for `count` classes `step` apart, from c on, of those that a thread begins at `first`: kAtOnce
// of them, in the end one by one, or before that two where pairs are moved.
template <int kAtOnce, bool kPairs, class F>
LOSSOPS_DEVICE void for_tile_classes(int first, int step, int classes, const F& f) {
  int c = first;
  for (; c + (kAtOnce - 1) * step < classes; c += kAtOnce * step) f(Count<kAtOnce>(), c);
  if constexpr (kPairs) {
    if (c + step < classes) {
      f(Count<2>(), c);
      c += 2 * step;
    }
  }
  for (; c < classes; c += step) f(Count<1>(), c);
}

// f(first row) for the tiles of this block. A backward pass begins at the end: there lies what its forward
// read last, and the L2 may still hold it.
template <int kRows, bool kFromEnd, class F>
LOSSOPS_DEVICE void for_each_tile(const CrossEntropyProblem& a, const Tiling& tiling, const F& f) {
  const int64_t width = int64_t{tiling.across} * kRows;
  for (int64_t t = blockIdx.x; t < tiling.tiles; t += gridDim.x)
    f((kFromEnd ? tiling.tiles - 1 - t : t) * width + threadIdx.x % tiling.across * kRows);
}

LOSSOPS_DEVICE void step(const CrossEntropyProblem& a, int64_t (&o)[kCrossEntropyOperands]) {
#pragma unroll
  for (int k = 0; k < kCrossEntropyOperands; ++k) o[k] += a.rows.inner_stride(k);
}

} // namespace lossops::cuda
