// Softmax cross-entropy on the CPU, compiled once per instruction set (see foreach_isa.h).
// Formulas: csrc/cross_entropy.h. Two ways through the logits: along the classes of one row at a
// time, or across a tile of rows, one vector lane each, where classes are few or lie far apart.

constexpr int64_t kBlock = 2048; // classes at a time along a row: 8 KiB of float stay in L1 for every pass
constexpr int64_t kTile = 512;   // rows of a tile
constexpr int64_t kTileClasses = 32; // classes of a tile held at a time: 16 KiB of float
constexpr int64_t kKept = 16384;     // exponentials kept for the gradient: 64 KiB of float stay in L2

// ---------------------------------------------------------------------------------------------
// Pieces of the formula

// What each row's target says. An ignored row and one out of range are not counted.
template <class A>
struct RowTarget {
  int64_t index = -1; // -1: probabilities, or not counted
  bool counted = true;
  A weight = 1; // of class `index`
};

template <class A>
LOSSOPS_INLINE RowTarget<A> read_target(const CrossEntropyProblem& a, int64_t offset, bool* bad_target) {
  if (!a.index_target()) return {};
  const int64_t y = load_index(a.target.dtype, a.target.data, offset);
  if (y == a.ignore_index) return {-1, false, 0};
  if (static_cast<uint64_t>(y) >= static_cast<uint64_t>(a.classes)) {
    __atomic_store_n(bad_target, true, __ATOMIC_RELAXED);
    return {-1, false, 0};
  }
  return {y, true, a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[y]};
}

// t_c = w_c*(keep*p_c + spread), where a class index adds keep*w at its class instead of keep*p.
template <class A>
struct Smoothing {
  A keep, spread;
  explicit Smoothing(const CrossEntropyProblem& a)
      : keep(static_cast<A>(1 - a.label_smoothing)),
        spread(static_cast<A>(a.label_smoothing / static_cast<double>(a.classes))) {}
};

template <bool kProbabilities, class A>
LOSSOPS_INLINE A target_weight(A w, const A* p, int64_t i, Smoothing<A> s) {
  if constexpr (kProbabilities) return w * (s.keep * p[i] + s.spread);
  return w * s.spread;
}

// The logit that sums are taken relative to: an all -inf start must not turn into -inf - -inf.
template <class A>
LOSSOPS_INLINE A anchor(A max) {
  return max == -std::numeric_limits<A>::infinity() ? A(0) : max;
}

// Of one row so far: sums are relative to anchor(max).
template <class A>
struct RowState {
  A max = -std::numeric_limits<A>::infinity();
  A sum = 0;        // of exp(z - max)
  A target_sum = 0; // S, of t
  A dot = 0;        // of t*(z - max)

  LOSSOPS_INLINE void raise(A new_max) {
    if (new_max == max) return;
    if (max != -std::numeric_limits<A>::infinity()) sum *= exp(max - new_max);
    if (target_sum != 0) dot += target_sum * (anchor(max) - anchor(new_max));
    max = new_max;
  }
  void merge(RowState other) {
    const A new_max = other.max > max ? other.max : max;
    raise(new_max);
    other.raise(new_max);
    sum += other.sum;
    target_sum += other.target_sum;
    dot += other.dot;
  }
};

// Stats of row r: max, log_sum and S, in planes of rows.count.
template <class A>
struct Stats {
  A *max, *log_sum, *target_sum; // target_sum may be null: then S is the weight of the target
  explicit Stats(const CrossEntropyProblem& a)
      : max(static_cast<A*>(a.stats)),
        log_sum(max + a.rows.count),
        target_sum(a.has_target_sum() ? log_sum + a.rows.count : nullptr) {}
};

// ---------------------------------------------------------------------------------------------
// Along a row

template <class A>
const A* load_classes(const ClassTensor& t, int64_t offset, int64_t c, int64_t n, A* buffer) {
  return load(t.dtype, t.data, offset + c * t.class_stride, t.class_stride, n, buffer);
}

// The n logits (say) from class c on as the loops below can read them: bfloat16 as it stands, widened in
// passing, since a shift is cheaper than a copy; anything else in the accumulation type.
template <class A, class F>
LOSSOPS_INLINE void with_values(const ClassTensor& t, int64_t offset, int64_t c, int64_t n, A* buffer,
                                const F& f) {
  if constexpr (std::is_same_v<A, float>) {
    if (t.dtype == DType::bf16 && t.class_stride == 1)
      return f(static_cast<const BFloat16*>(t.data) + offset + c);
  }
  f(load_classes(t, offset, c, n, buffer));
}

// Likewise the place of n gradients, to which `stream` leads past the caches; not in bfloat16, whose
// arithmetic takes longer than its stores.
template <class A, class F>
LOSSOPS_INLINE void with_place(const ClassTensor& t, int64_t offset, int64_t c, int64_t n, A* buffer,
                               bool stream, const F& f) {
  const int64_t first = offset + c * t.class_stride;
  if constexpr (std::is_same_v<A, float>) {
    if (t.dtype == DType::bf16 && t.class_stride == 1) return f(static_cast<BFloat16*>(t.data) + first);
  }
  A* dz = destination(t.dtype, t.data, first, t.class_stride, buffer, stream);
  f(dz);
  store(t.dtype, dz, t.data, first, t.class_stride, n, stream);
}

// f(kProbabilities, p, w): the block's probabilities and class weights, as the loops want them.
template <class A, class F>
LOSSOPS_INLINE void with_target(const CrossEntropyProblem& a, int64_t offset, int64_t c, int64_t n, A* buffer,
                                const F& f) {
  const A* w = a.weight == nullptr ? nullptr : static_cast<const A*>(a.weight) + c;
  const A* p = a.index_target() ? nullptr : load_classes(a.target, offset, c, n, buffer);
  const std::true_type probabilities;
  const std::false_type index;
  if (p != nullptr && w != nullptr)
    f(probabilities, p, w);
  else if (p != nullptr)
    f(probabilities, p, Uniform<A>{1});
  else if (w != nullptr && a.label_smoothing != 0)
    f(index, p, w);
  else
    f(index, p, Uniform<A>{1});
}

// Calls f(i, seen) for kLanes elements from i on, until all n have been met. The last of the calls reaches
// back over elements that were `seen`, for a remainder that went one by one would cost as much as a block.
template <class A, class F>
LOSSOPS_INLINE void for_each_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, std::integral_constant<int64_t, 0>());
  if (i < n) f(n - kLanes<A>, kLanes<A> - (n - i));
}

template <class Z, class A>
LOSSOPS_INLINE A block_max(const Z* z, int64_t n, A max) {
  const auto larger = [](A a, A b) { return a > b ? a : b; };
  if (n < kLanes<A>) {
    for (int64_t i = 0; i < n; ++i) max = larger(widen(z[i]), max);
    return max;
  }
  alignas(64) A lanes[kLanes<A>];
  for (A& lane : lanes) lane = max;
  for_each_lanes<A>(n, [&](int64_t i, auto) LOSSOPS_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t k = 0; k < kLanes<A>; ++k) lanes[k] = larger(widen(z[i + k]), lanes[k]);
  });
  return fold(lanes, larger);
}

// Where a row's exponentials go beside their sum: nowhere, or to where its gradient will find them.
struct Forgotten {
  template <class A>
  LOSSOPS_INLINE void put(int64_t, A) const {}
};
template <class A>
struct Kept {
  A* e;
  LOSSOPS_INLINE void put(int64_t i, A value) const {
    e[i] = value;
  }
};

// Sends for what stands two blocks further on, or two rows of one block: the arithmetic of a block is too
// long for the hardware to look past it, and with exponentials to store it hardly looks ahead at all.
template <class A, class T>
LOSSOPS_INLINE void send_for_next(const T* lanes, int64_t n) {
  constexpr int64_t line = 64, bytes = kLanes<A> * sizeof(T);
  const uintptr_t at =
      reinterpret_cast<uintptr_t>(lanes) + 2 * n * sizeof(T); // perhaps of nothing: no pointer
  for (int64_t b = 0; b < bytes; b += line) __builtin_prefetch(reinterpret_cast<const void*>(at + b));
}

template <class Z, class A, class Keep = Forgotten>
LOSSOPS_INLINE A block_sum_exp(const Z* z, int64_t n, A ref, Keep kept = {}) {
  alignas(64) A sum[kLanes<A>] = {};
  const auto add = [&](int64_t i, int64_t k, bool seen) LOSSOPS_INLINE_LAMBDA {
    const A e = exp(widen(z[i]) - ref);
    kept.put(i, e);
    sum[k] += seen ? A(0) : e;
  };
  if (n < kLanes<A>) {
    for (int64_t i = 0; i < n; ++i) add(i, 0, false);
    return sum[0];
  }
  for_each_lanes<A>(n, [&](int64_t i, auto seen) LOSSOPS_INLINE_LAMBDA {
    send_for_next<A>(z + i, n);
#pragma omp simd
    for (int64_t k = 0; k < kLanes<A>; ++k) add(i + k, k, k < seen);
  });
  return fold(sum, [](A a, A b) { return a + b; });
}

// t*(z - ref), and 0 for the NaN of a weight 0 at a logit of -inf. A NaN of z or t is not lost: it is
// in the sum of exponentials or of weights too. By mask: of a select before a sum the compiler makes
// a branch, and the loop is not vectorised.
template <class A>
LOSSOPS_INLINE A target_term(A t, A distance) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const A term = t * distance;
  const Bits mask = term == term ? ~Bits{0} : Bits{0};
  return bits_as<A>(bits_as<Bits>(term) & mask);
}

// Adds exp(z_c - ref), t_c and t_c*(z_c - ref).
template <bool kProbabilities, class Z, class A, class Weight, class Keep>
LOSSOPS_INLINE void block_sums(const Z* z, const A* p, Weight w, int64_t n, A ref, Smoothing<A> s, Keep kept,
                               RowState<A>& state) {
  alignas(64) A sum[kLanes<A>] = {}, target_sum[kLanes<A>] = {}, dot[kLanes<A>] = {};
  const auto add = [&](int64_t i, int64_t k, bool seen) LOSSOPS_INLINE_LAMBDA {
    const A distance = widen(z[i]) - ref;
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    const A e = exp(distance), term = target_term(t, distance);
    kept.put(i, e);
    sum[k] += seen ? A(0) : e;
    target_sum[k] += seen ? A(0) : t;
    dot[k] += seen ? A(0) : term;
  };
  if (n < kLanes<A>) {
    for (int64_t i = 0; i < n; ++i) add(i, 0, false);
  } else {
    for_each_lanes<A>(n, [&](int64_t i, auto seen) LOSSOPS_INLINE_LAMBDA {
      send_for_next<A>(z + i, n);
      if constexpr (kProbabilities) send_for_next<A>(p + i, n);
#pragma omp simd
      for (int64_t k = 0; k < kLanes<A>; ++k) add(i + k, k, k < seen);
    });
  }
  const auto plus = [](A a, A b) { return a + b; };
  state.sum += fold(sum, plus);
  state.target_sum += fold(target_sum, plus);
  state.dot += fold(dot, plus);
}

// The row's state over the classes [c0, c1), without a class index's own term. Exponentials are kept of one
// block only: a later block may have a larger maximum.
template <class A, class Keep>
RowState<A> row_state(const CrossEntropyProblem& a, const int64_t* o, int64_t c0, int64_t c1, Keep kept) {
  alignas(64) A z_buffer[kBlock], p_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  RowState<A> state;
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    with_values(a.logits, o[kLogits], c, n, z_buffer, [&](const auto* z) {
      state.raise(block_max(z, n, state.max));
      const A ref = anchor(state.max);
      if (!a.has_target_sum()) {
        state.sum += block_sum_exp(z, n, ref, kept);
        return;
      }
      with_target<A>(a, o[kTarget], c, n, p_buffer, [&](auto probabilities, const A* p, auto w) {
        block_sums<decltype(probabilities)::value>(z, p, w, n, ref, smoothing, kept, state);
      });
    });
  }
  return state;
}

// What the backward passes know of a row before they look at its logits.
template <class A>
struct RowGradient {
  RowTarget<A> target;
  A max, log_sum;
  A grad;  // g, upstream gradient of the row's loss: 0 leaves zeros, whatever the logits are
  A scale; // g*S*exp(-log_sum), which makes g*S*softmax of exp(z - max)
};

template <class A>
LOSSOPS_INLINE RowGradient<A> row_gradient(const CrossEntropyBackward& a, const int64_t* o) {
  const Stats<A> stats(a);
  RowGradient<A> r;
  r.target = read_target<A>(a, o[kTarget], a.bad_target);
  r.max = stats.max[o[kRow]];
  r.log_sum = stats.log_sum[o[kRow]];
  if (!r.target.counted) {
    r.grad = 0;
  } else {
    const double grad = load_one<double>(a.grad_loss_dtype, a.grad_loss, o[kGradLoss]);
    r.grad = static_cast<A>(a.normalizer == nullptr ? grad : grad / *a.normalizer);
  }
  const A target_sum = stats.target_sum != nullptr ? stats.target_sum[o[kRow]] : r.target.weight;
  r.scale = r.grad * target_sum * exp(-r.log_sum);
  return r;
}

// exp(z - max), where it was not kept.
template <class Z, class Row>
struct Exponentials {
  const Z* z;
  Row max;
  LOSSOPS_INLINE auto operator[](int64_t i) const {
    return exp(widen(z[i]) - max[i]);
  }
};

// dz = g*(S*softmax - t), without a class index's own term; `e` is exp(z - max). Row values are Uniform along
// a row, arrays across a tile; the class weight the other way round. Nothing may be computed `again` where dz
// stands in z's place.
template <bool kProbabilities, class E, class A, class Row, class Weight, class D>
LOSSOPS_INLINE void logit_gradient(E e, const A* p, int64_t n, bool again, Row scale, Row grad, Weight w,
                                   Smoothing<A> s, D* dz) {
  for_each_lane<A>(n, again, [&](int64_t i) LOSSOPS_INLINE_LAMBDA {
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    const A value = scale[i] * e[i] - grad[i] * t;
    if constexpr (std::is_same_v<Row, Uniform<A>>)
      narrow(value, dz[i]); // a row without a gradient is not looked at
    else
      narrow(grad[i] == 0 ? A(0) : value, dz[i]);
  });
}

// dp = g*keep*w*(lse - z)
template <class Z, class A, class Row, class Weight, class D>
LOSSOPS_INLINE void target_gradient(const Z* z, int64_t n, Row max, Row log_sum, Row grad, Weight w, A keep,
                                    D* dp) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    narrow(grad[i] == 0 ? A(0) : grad[i] * keep * w[i] * (log_sum[i] - (widen(z[i]) - max[i])), dp[i]);
}

template <class A>
void zero_classes(const ClassTensor& out, int64_t offset, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) store_one(out.dtype, A(0), out.data, offset + c * out.class_stride);
}

// Gradients of the classes [c0, c1) of one row, of whose exponentials all may have been `kept`.
template <class A>
void backward_row(const CrossEntropyBackward& a, const int64_t* o, int64_t c0, int64_t c1,
                  const A* kept = nullptr) {
  alignas(64) A z_buffer[kBlock], p_buffer[kBlock], out_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  const RowGradient<A> r = row_gradient<A>(a, o);
  if (r.grad == 0) {
    if (a.grad_logits.data != nullptr) zero_classes<A>(a.grad_logits, o[kGradLogits], c0, c1);
    if (a.grad_target.data != nullptr) zero_classes<A>(a.grad_target, o[kGradTarget], c0, c1);
    return;
  }
  const Uniform<A> max{r.max}, log_sum{r.log_sum}, grad{r.grad}, scale{r.scale};
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    const auto write = [&](const ClassTensor& t, CrossEntropyOperand k, const auto& compute) {
      with_place(t, o[k], c, n, out_buffer, is_streamed(a.rows.count * a.classes, t.dtype), compute);
    };
    with_target<A>(a, o[kTarget], c, n, p_buffer, [&](auto probabilities, const A* p, auto w) {
      const auto to_logits = [&](auto e, bool in_place, auto* dz) {
        const int64_t y = r.target.index - c;
        const bool here = r.target.index >= 0 && 0 <= y && y < n;
        // Before it is overwritten; else when the loop has brought it in, and nothing waits for it.
        A own = here && in_place ? e[y] : A(0);
        logit_gradient<decltype(probabilities)::value>(e, p, n, !in_place, scale, grad, w, smoothing, dz);
        if (!here) return;
        if (!in_place) own = e[y];
        const A t = w[y] * smoothing.spread + smoothing.keep * r.target.weight;
        narrow(r.scale * own - r.grad * t, dz[y]);
      };
      if (kept != nullptr)
        return write(a.grad_logits, kGradLogits, [&](auto* dz) { to_logits(kept, false, dz); });
      with_values(a.logits, o[kLogits], c, n, z_buffer, [&](const auto* z) {
        using Z = std::remove_const_t<std::remove_reference_t<decltype(*z)>>;
        if (a.grad_target.data != nullptr)
          write(a.grad_target, kGradTarget,
                [&](auto* dp) { target_gradient(z, n, max, log_sum, grad, w, smoothing.keep, dp); });
        if (a.grad_logits.data != nullptr)
          write(a.grad_logits, kGradLogits, [&](auto* dz) {
            to_logits(Exponentials<Z, Uniform<A>>{z, max}, static_cast<const void*>(z) == dz, dz);
          });
      });
    });
  }
}

// ---------------------------------------------------------------------------------------------
// Across a tile of rows

// Up to kTileClasses classes of a tile: one array of rows for each class. Where two passes follow, as
// copies: classes that lie a power of two apart share their cache sets and would be gone by the second.
template <class A>
struct TileLoad {
  alignas(64) A buffer[kTileClasses * kTile];
  const A* classes[kTileClasses];
  int64_t class_size; // from one class's copy to the next

  void operator()(const ClassTensor& t, int64_t offset, int64_t row_stride, int64_t c0, int64_t k, int64_t n,
                  bool copies) {
    class_size = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    if (t.class_stride == 1 && row_stride == k) {
      // Short rows one behind the other: widened as they lie, then turned.
      alignas(64) A flat[kTileClasses * kTile];
      const A* rows = load(t.dtype, t.data, offset + c0, 1, n * k, flat);
      for (int64_t c = 0; c < k; ++c) {
        load_as(rows + c, k, n, buffer + c * class_size);
        classes[c] = buffer + c * class_size;
      }
      return;
    }
    for (int64_t c = 0; c < k; ++c) {
      A* copy = buffer + c * class_size;
      const A* z = load(t.dtype, t.data, offset + (c0 + c) * t.class_stride, row_stride, n, copy);
      if (copies && z != copy) std::copy(z, z + n, copy);
      classes[c] = copies ? copy : z;
    }
  }
};

// The targets of a tile: class index (-1: probabilities, or not counted), whether the row is counted,
// and the weight of its target, 0 where it is not.
template <class A>
struct TileTarget {
  alignas(64) int32_t index[kTile];
  alignas(64) A counted[kTile], class_weight[kTile];
  const A* weight = counted;

  TileTarget(const CrossEntropyProblem& a, const int64_t* o, int64_t n, bool* bad_target) {
    if (!a.index_target()) {
      std::fill(index, index + n, -1);
      std::fill(counted, counted + n, A(1));
      std::fill(class_weight, class_weight + n, A(0));
      if (a.classes == 0) weight = class_weight; // torch: the mean over no classes is NaN
      return;
    }
    with_type(a.target.dtype, [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      if constexpr (std::is_integral_v<T>) {
        const T* target = static_cast<const T*>(a.target.data) + o[kTarget];
        if (read(target, a.rows.inner_stride(kTarget), n, a.classes, a.ignore_index))
          __atomic_store_n(bad_target, true, __ATOMIC_RELAXED);
      }
    });
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) counted[i] = index[i] >= 0 ? A(1) : A(0);
    if (a.weight == nullptr) return;
    const A* w = static_cast<const A*>(a.weight);
    for (int64_t i = 0; i < n; ++i) class_weight[i] = index[i] >= 0 ? w[index[i]] : A(0);
    weight = class_weight;
  }

 private:
  // Fills in `index`; true where a class index is out of range.
  template <class T>
  LOSSOPS_INLINE bool read(const T* target, int64_t stride, int64_t n, int64_t classes,
                           int64_t ignore_index) {
    int64_t bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t y = target[i * stride];
      const int64_t inside = static_cast<uint64_t>(y) < static_cast<uint64_t>(classes) ? 1 : 0;
      const int64_t ignored = y == ignore_index ? 1 : 0;
      bad |= (inside | ignored) ^ 1;
      index[i] = static_cast<int32_t>((inside & ~ignored) != 0 ? y : int64_t{-1});
    }
    return bad != 0;
  }
};

// The logits of the targets that lie among the k classes from c0 on.
template <class A>
LOSSOPS_INLINE void tile_pick(const A* z, int64_t class_size, const int32_t* index, int32_t c0, int32_t k,
                              int64_t n, A* __restrict picked) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int32_t y = index[i] - c0;
    const bool here = 0 <= y && y < k;
    const A value = z[(here ? y : 0) * class_size + i];
    picked[i] = here ? value : picked[i];
  }
}

// Over k classes whose copies lie class_size apart, with a few rows in registers; rows up to the next
// multiple of kLanes are computed too, and mean nothing.
template <class A>
LOSSOPS_INLINE void tile_max(const A* z, int64_t class_size, int64_t k, int64_t n, A* max) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    alignas(64) A lanes[kLanes<A>];
    std::copy(max + i, max + i + kLanes<A>, lanes);
    for (int64_t c = 0; c < k; ++c) {
      const A* of_class = z + c * class_size + i;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<A>; ++l) lanes[l] = of_class[l] > lanes[l] ? of_class[l] : lanes[l];
    }
    std::copy(lanes, lanes + kLanes<A>, max + i);
  }
}

template <class A>
LOSSOPS_INLINE void tile_add_exp(const A* z, int64_t class_size, int64_t k, const A* ref, int64_t n, A* sum) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    alignas(64) A lanes[kLanes<A>], of_row[kLanes<A>];
    std::copy(sum + i, sum + i + kLanes<A>, lanes);
    std::copy(ref + i, ref + i + kLanes<A>, of_row);
    for (int64_t c = 0; c < k; ++c) {
      const A* of_class = z + c * class_size + i;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<A>; ++l) lanes[l] += exp(of_class[l] - of_row[l]);
    }
    std::copy(lanes, lanes + kLanes<A>, sum + i);
  }
}

template <bool kProbabilities, class A>
LOSSOPS_INLINE void tile_add_target(const A* z, const A* p, const A* ref, A w, int64_t n, Smoothing<A> s,
                                    A* __restrict target_sum, A* __restrict dot) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A t = target_weight<kProbabilities, A>(w, p, i, s);
    target_sum[i] += t;
    dot[i] += target_term(t, z[i] - ref[i]);
  }
}

// From sums to losses, with a class index's own term (keep is 0 for probabilities). A row that is not
// counted leaves zeros. On return max and sum hold the stats.
template <class A>
LOSSOPS_INLINE void tile_finish(A keep, const A* weight, const A* target_logit, const A* counted, int64_t n,
                                A* __restrict max, A* __restrict sum, A* __restrict target_sum,
                                A* __restrict dot, A* __restrict loss) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A t = keep * weight[i];
    const A log_sum = log(sum[i]);
    const A s = target_sum[i] + t;
    const A value = s * log_sum - (dot[i] + target_term(t, target_logit[i] - anchor(max[i])));
    max[i] = counted[i] != 0 ? max[i] : A(0);
    sum[i] = counted[i] != 0 ? log_sum : A(0);
    target_sum[i] = counted[i] != 0 ? s : A(0);
    loss[i] = counted[i] != 0 ? value : A(0);
  }
}

template <class A>
LOSSOPS_INLINE double tile_sum(const A* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// Of up to kTile rows, once their logits have been read.
template <class A>
struct ForwardRows {
  alignas(64) A max[kTile], sum[kTile], target_sum[kTile], dot[kTile];
  alignas(64) A target_logit[kTile], weight_buffer[kTile], counted_buffer[kTile];
  const A *weight = weight_buffer, *counted = counted_buffer;

  void put(int64_t i, const CrossEntropyForward& a, const int64_t* o, RowTarget<A> target,
           RowState<A> state) {
    max[i] = state.max;
    sum[i] = state.sum;
    target_sum[i] = state.target_sum;
    dot[i] = state.dot;
    target_logit[i] = target.index < 0 ? A(0)
                                       : load_one<A>(a.logits.dtype, a.logits.data,
                                                     o[kLogits] + target.index * a.logits.class_stride);
    weight_buffer[i] = target.weight;
    counted_buffer[i] = target.counted ? A(1) : A(0);
  }

  // Writes losses and stats of the rows from o on.
  void finish(const CrossEntropyForward& a, const int64_t* o, int64_t n, double& loss_sum,
              double& weight_sum) {
    alignas(64) A loss[kTile];
    const A keep = a.index_target() ? Smoothing<A>(a).keep : A(0);
    tile_finish(keep, weight, target_logit, counted, n, max, sum, target_sum, dot, loss);
    loss_sum += tile_sum(loss, n);
    weight_sum += tile_sum(weight, n);
    const Stats<A> stats(a);
    const int64_t stride = a.rows.inner_stride(kRow);
    store_as(max, stride, n, stats.max + o[kRow]);
    store_as(sum, stride, n, stats.log_sum + o[kRow]);
    if (stats.target_sum != nullptr) store_as(target_sum, stride, n, stats.target_sum + o[kRow]);
    if (a.reduction != Reduction::none) return;
    A* out = destination(a.loss_dtype, a.loss, o[kRow], stride, loss);
    if (out != loss) std::copy(loss, loss + n, out);
    store(a.loss_dtype, loss, a.loss, o[kRow], stride, n);
  }
};

// An ignored row is not read: nothing in it can reach the loss, NaN included.
// `kept_of(i)` is where the exponentials of row i go.
template <class A, class KeptOf>
void forward_rows(const CrossEntropyForward& a, const int64_t* o, int64_t n, double& loss_sum,
                  double& weight_sum, const KeptOf& kept_of) {
  ForwardRows<A> rows;
  int64_t i = 0;
  for_each_row(a.rows, o, n, [&](const int64_t* at) {
    const RowTarget<A> target = read_target<A>(a, at[kTarget], a.bad_target);
    rows.put(i, a, at, target,
             target.counted ? row_state<A>(a, at, 0, a.classes, kept_of(i)) : RowState<A>());
    ++i;
  });
  rows.finish(a, o, n, loss_sum, weight_sum);
}

template <class A>
void forward_tile(const CrossEntropyForward& a, const int64_t* o, int64_t n, double& loss_sum,
                  double& weight_sum) {
  TileLoad<A> z, p;
  ForwardRows<A> rows;
  A *max = rows.max, *sum = rows.sum, *target_sum = rows.target_sum, *dot = rows.dot;
  alignas(64) A ref[kTile], part_sum[kTile], part_target[kTile], part_dot[kTile];
  const Smoothing<A> smoothing(a);
  const TileTarget<A> target(a, o, n, a.bad_target);
  const bool index_target = a.index_target();
  for (int64_t i = 0; i < n; ++i) {
    max[i] = -std::numeric_limits<A>::infinity();
    sum[i] = a.classes == 0 ? A(1) : A(0); // no classes: a loss of 0, not 0*log 0
    target_sum[i] = dot[i] = rows.target_logit[i] = 0;
  }
  for (int64_t c0 = 0; c0 < a.classes; c0 += kTileClasses) {
    const int64_t k = std::min(kTileClasses, a.classes - c0);
    z(a.logits, o[kLogits], a.rows.inner_stride(kLogits), c0, k, n, true);
    if (!index_target) p(a.target, o[kTarget], a.rows.inner_stride(kTarget), c0, k, n, true);
    std::copy(max, max + n, ref);
    tile_max(z.buffer, z.class_size, k, n, ref);
    if (c0 > 0) {
      for (int64_t i = 0; i < n; ++i) {
        RowState<A> state{max[i], sum[i], target_sum[i], dot[i]};
        state.raise(ref[i]);
        sum[i] = state.sum;
        dot[i] = state.dot;
      }
    }
    std::copy(ref, ref + n, max);
    for (int64_t i = 0; i < n; ++i) ref[i] = anchor(max[i]);
    // Later classes are summed by themselves first: added one by one to a long sum, many would lose digits.
    const bool first = c0 == 0;
    A* sums = first ? sum : part_sum;
    A* targets = first ? target_sum : part_target;
    A* dots = first ? dot : part_dot;
    if (!first) {
      std::fill(part_sum, part_sum + n, A(0));
      std::fill(part_target, part_target + n, A(0));
      std::fill(part_dot, part_dot + n, A(0));
    }
    tile_add_exp(z.buffer, z.class_size, k, ref, n, sums);
    for (int64_t c = 0; c < (a.has_target_sum() ? k : 0); ++c) {
      const A w = a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[c0 + c];
      if (index_target)
        tile_add_target<false, A>(z.classes[c], nullptr, ref, w, n, smoothing, targets, dots);
      else
        tile_add_target<true>(z.classes[c], p.classes[c], ref, w, n, smoothing, targets, dots);
    }
    for (int64_t i = 0; i < (first ? 0 : n); ++i) {
      sum[i] += part_sum[i];
      target_sum[i] += part_target[i];
      dot[i] += part_dot[i];
    }
    if (index_target)
      tile_pick(z.buffer, z.class_size, target.index, static_cast<int32_t>(c0), static_cast<int32_t>(k), n,
                rows.target_logit);
  }
  rows.weight = target.weight;
  rows.counted = target.counted;
  rows.finish(a, o, n, loss_sum, weight_sum);
}

// What the backward passes know of a tile's rows before they look at the logits.
template <class A>
struct TileGradient {
  TileTarget<A> target;
  alignas(64) A max_buffer[kTile], log_sum_buffer[kTile],
      target_sum_buffer[kTile], grad[kTile], scale[kTile]; // as in RowGradient
  const A *max, *log_sum;

  TileGradient(const CrossEntropyBackward& a, const int64_t* o, int64_t n) : target(a, o, n, a.bad_target) {
    const Stats<A> stats(a);
    const int64_t stride = a.rows.inner_stride(kRow);
    max = load(dtype_of<A>, stats.max, o[kRow], stride, n, max_buffer);
    log_sum = load(dtype_of<A>, stats.log_sum, o[kRow], stride, n, log_sum_buffer);
    const A* target_sum = stats.target_sum == nullptr
                              ? target.weight
                              : load(dtype_of<A>, stats.target_sum, o[kRow], stride, n, target_sum_buffer);
    const double divisor = a.normalizer == nullptr ? 1 : *a.normalizer;
    const int64_t grad_stride = a.rows.inner_stride(kGradLoss);
    if (grad_stride == 0) {
      const A one = static_cast<A>(load_one<double>(a.grad_loss_dtype, a.grad_loss, o[kGradLoss]) / divisor);
      std::fill(grad, grad + n, one);
    } else {
      alignas(64) double buffer[kTile];
      const double* g = load(a.grad_loss_dtype, a.grad_loss, o[kGradLoss], grad_stride, n, buffer);
      for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<A>(g[i] / divisor);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      grad[i] = target.counted[i] != 0 ? grad[i] : A(0);
      scale[i] = grad[i] * target_sum[i] * exp(-log_sum[i]);
    }
  }
};

template <class A>
void backward_tile(const CrossEntropyBackward& a, const int64_t* o, int64_t n) {
  TileLoad<A> z, p;
  alignas(64) A buffer[kTileClasses * kTile];
  A* out[kTileClasses];
  const Smoothing<A> smoothing(a);
  const TileGradient<A> r(a, o, n);
  const A *max = r.max, *log_sum = r.log_sum, *grad = r.grad, *scale = r.scale;
  for (int64_t c0 = 0; c0 < a.classes; c0 += kTileClasses) {
    const int64_t k = std::min(kTileClasses, a.classes - c0);
    z(a.logits, o[kLogits], a.rows.inner_stride(kLogits), c0, k, n, false);
    if (!a.index_target()) p(a.target, o[kTarget], a.rows.inner_stride(kTarget), c0, k, n, false);
    const auto weight = [&](int64_t c) {
      return Uniform<A>{a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[c0 + c]};
    };
    const auto place = [&](const ClassTensor& t, int64_t offset, int64_t row_stride) {
      for (int64_t c = 0; c < k; ++c)
        out[c] =
            destination(t.dtype, t.data, offset + (c0 + c) * t.class_stride, row_stride, buffer + c * kTile);
    };
    const auto write = [&](const ClassTensor& t, int64_t offset, int64_t row_stride) {
      for (int64_t c = 0; c < k; ++c)
        store(t.dtype, out[c], t.data, offset + (c0 + c) * t.class_stride, row_stride, n);
    };
    if (a.grad_target.data != nullptr) {
      place(a.grad_target, o[kGradTarget], a.rows.inner_stride(kGradTarget));
      for (int64_t c = 0; c < k; ++c)
        target_gradient(z.classes[c], n, max, log_sum, grad, weight(c), smoothing.keep, out[c]);
      write(a.grad_target, o[kGradTarget], a.rows.inner_stride(kGradTarget));
    }
    if (a.grad_logits.data == nullptr) continue;
    place(a.grad_logits, o[kGradLogits], a.rows.inner_stride(kGradLogits));
    for (int64_t c = 0; c < k; ++c) {
      const Exponentials<A, const A*> e{z.classes[c], max};
      const bool again = z.classes[c] != out[c];
      if (a.index_target())
        logit_gradient<false>(e, static_cast<const A*>(nullptr), n, again, scale, grad, weight(c), smoothing,
                              out[c]);
      else
        logit_gradient<true>(e, p.classes[c], n, again, scale, grad, weight(c), smoothing, out[c]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t y = r.target.index[i] - c0;
      if (0 <= y && y < k && grad[i] != 0) out[y][i] -= grad[i] * smoothing.keep * r.target.weight[i];
    }
    write(a.grad_logits, o[kGradLogits], a.rows.inner_stride(kGradLogits));
  }
}

// Repeats each value for the classes of its row. Whole vectors, the last of which the next row
// overwrites: `out` has kSpread elements to spare.
constexpr int64_t kSpread = 16;
template <class A>
LOSSOPS_INLINE void spread(const A* values, int64_t rows, int64_t classes, A* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < classes; c += kSpread) {
      A* at = out + i * classes + c;
#pragma omp simd
      for (int64_t k = 0; k < kSpread; ++k) at[k] = values[i];
    }
  }
}

// Short rows that stand one behind the other: the tile's elements in one go, as they lie.
constexpr int64_t kFlat = 1024;

inline bool is_flat(const CrossEntropyBackward& a) {
  return a.classes > 0 && a.index_target() && a.logits.class_stride == 1 &&
         a.rows.inner_stride(kLogits) == a.classes && a.grad_logits.class_stride == 1 &&
         a.rows.inner_stride(kGradLogits) == a.classes && a.classes <= kFlat &&
         (a.weight == nullptr || a.label_smoothing == 0);
}

// `live`: 0 where no gradient arrives. `own`: what a class index takes from its class, 0 elsewhere.
template <bool kSmoothing, class Z, class A, class Own, class D>
LOSSOPS_INLINE void flat_gradient(const Z* z, int64_t n, const A* max, const A* scale, const A* live, Own own,
                                  A spread, D* dz) {
  for_each_lane<A>(n, static_cast<const void*>(z) != dz, [&](int64_t i) LOSSOPS_INLINE_LAMBDA {
    A value = scale[i] * exp(widen(z[i]) - max[i]) - own[i];
    if constexpr (kSmoothing) value -= live[i] * spread;
    narrow(live[i] == 0 ? A(0) : value, dz[i]);
  });
}

template <class A>
void backward_flat(const CrossEntropyBackward& a, const int64_t* o, int64_t n) {
  alignas(64) A max[kFlat + kSpread], scale[kFlat + kSpread], grad[kFlat + kSpread];
  alignas(64) A z_buffer[kFlat], out_buffer[kFlat], own[kFlat] = {};
  const Smoothing<A> smoothing(a);
  const TileGradient<A> r(a, o, n);
  const int64_t group = kFlat / a.classes;
  for (int64_t i0 = 0; i0 < n; i0 += group) {
    const int64_t rows = std::min(group, n - i0), elements = rows * a.classes;
    spread(r.max + i0, rows, a.classes, max);
    spread(r.scale + i0, rows, a.classes, scale);
    if (smoothing.spread != 0) spread(r.grad + i0, rows, a.classes, grad);
    const auto gradient = [&](const auto* z, auto own_terms, auto* dz) {
      if (smoothing.spread != 0)
        flat_gradient<true>(z, elements, max, scale, grad, own_terms, smoothing.spread, dz);
      else
        flat_gradient<false>(z, elements, max, scale, scale, own_terms, A(0), dz);
    };
    const auto for_each_own = [&](const auto& f) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = r.target.index[i0 + i];
        if (y >= 0) f(i * a.classes + y, r.grad[i0 + i] * smoothing.keep * r.target.weight[i0 + i]);
      }
    };
    with_values(a.logits, o[kLogits], i0 * a.classes, elements, z_buffer, [&](const auto* z) {
      with_place(a.grad_logits, o[kGradLogits], i0 * a.classes, elements, out_buffer, false, [&](auto* dz) {
        if constexpr (std::is_same_v<A, std::remove_reference_t<decltype(*dz)>>) {
          gradient(z, Uniform<A>{0}, dz);
          for_each_own([&](int64_t at, A term) { dz[at] -= term; });
        } else { // too late once it is rounded
          for_each_own([&](int64_t at, A term) { own[at] = term; });
          gradient(z, static_cast<const A*>(own), dz);
          for_each_own([&](int64_t at, A) { own[at] = 0; });
        }
      });
    });
  }
}

// ---------------------------------------------------------------------------------------------
// Ranges of rows: what a thread is given

// Along the rows unless classes are few or only neighbouring rows lie side by side.
inline bool along_rows(const CrossEntropyProblem& a) {
  constexpr int64_t few_classes = 48, few_rows = 8;
  if (a.classes == 0) return false;
  if (a.classes > std::numeric_limits<int32_t>::max()) return true; // tiles index classes in 32 bits
  if (a.logits.class_stride == 1 || a.rows.inner_stride(kLogits) != 1) return a.classes >= few_classes;
  return a.rows.inner_size() < few_rows;
}

inline bool keeps_exponentials(const CrossEntropyProblem& a) {
  return along_rows(a) && a.classes <= kBlock;
}

template <class A>
int64_t kept_stride(const CrossEntropyProblem& a) {
  return (a.classes + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Rows at a time: where they lie side by side, enough of each class for the prefetcher to follow its
// stream; else few enough for L1 to keep the tile while it is turned.
inline int64_t tile_rows(const CrossEntropyProblem& a) {
  return a.rows.inner_stride(kLogits) == 1 && a.classes > 1 ? kTile : 128;
}

// The same, or as many rows as their exponentials can be kept of.
template <class A>
int64_t run_rows(const CrossEntropyProblem& a) {
  return keeps_exponentials(a) ? std::min(kTile, kKept / kept_stride<A>(a)) : tile_rows(a);
}

// What forward_range will add to the divisor of the mean, bit for bit.
template <class A>
void weigh_range(const CrossEntropyForward& a, int64_t begin, int64_t end, double& weight_sum) {
  for_each_run(a.rows, begin, end, run_rows<A>(a), [&](const int64_t* o, int64_t n) {
    weight_sum += tile_sum(TileTarget<A>(a, o, n, a.bad_target).weight, n);
  });
}

template <class A>
void forward_range(const CrossEntropyForward& a, int64_t begin, int64_t end, double& loss_sum,
                   double& weight_sum) {
  const bool rows = along_rows(a);
  for_each_run(a.rows, begin, end, run_rows<A>(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return forward_tile<A>(a, o, n, loss_sum, weight_sum);
    forward_rows<A>(a, o, n, loss_sum, weight_sum, [](int64_t) { return Forgotten(); });
  });
}

// A piece of one long row, and the joining of its pieces in order.
template <class A>
void forward_chunk(const CrossEntropyForward& a, int64_t row, int64_t c0, int64_t c1, void* state) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  if (read_target<A>(a, o[kTarget], a.bad_target).counted)
    *static_cast<RowState<A>*>(state) = row_state<A>(a, o, c0, c1, Forgotten());
  else
    *static_cast<RowState<A>*>(state) = RowState<A>();
}

template <class A>
void forward_join(const CrossEntropyForward& a, int64_t row, const void* states, int64_t state_bytes,
                  int64_t chunks, double& loss_sum, double& weight_sum) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  RowState<A> state;
  for (int64_t k = 0; k < chunks; ++k)
    state.merge(*reinterpret_cast<const RowState<A>*>(static_cast<const char*>(states) + k * state_bytes));
  ForwardRows<A> rows;
  rows.put(0, a, o, read_target<A>(a, o[kTarget], a.bad_target), state);
  rows.finish(a, o, 1, loss_sum, weight_sum);
}

template <class A>
void backward_chunk(const CrossEntropyBackward& a, int64_t row, int64_t c0, int64_t c1) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  backward_row<A>(a, o, c0, c1);
  end_of_stream();
}

template <class A>
void backward_range(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  const bool rows = along_rows(a), flat = is_flat(a);
  for_each_run(a.rows, begin, end, run_rows<A>(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return flat ? backward_flat<A>(a, o, n) : backward_tile<A>(a, o, n);
    for_each_row(a.rows, o, n, [&](const int64_t* at) { backward_row<A>(a, at, 0, a.classes); });
  });
  end_of_stream();
}

// Both passes over the rows while they are in the caches: the same results, bit for bit. `gradient` has no
// gradient of a target.
template <class A>
void forward_backward_range(const CrossEntropyForward& a, const CrossEntropyBackward& gradient, int64_t begin,
                            int64_t end, double& loss_sum, double& weight_sum) {
  if (!keeps_exponentials(a)) {
    forward_range<A>(a, begin, end, loss_sum, weight_sum);
    backward_range<A>(gradient, begin, end);
    return;
  }
  alignas(64) A kept[kKept];
  const int64_t stride = kept_stride<A>(a);
  for_each_run(a.rows, begin, end, run_rows<A>(a), [&](const int64_t* o, int64_t n) {
    forward_rows<A>(a, o, n, loss_sum, weight_sum, [&](int64_t i) { return Kept<A>{kept + i * stride}; });
    const A* of_row = kept;
    for_each_row(a.rows, o, n, [&](const int64_t* at) {
      backward_row<A>(gradient, at, 0, a.classes, of_row);
      of_row += stride;
    });
  });
  end_of_stream();
}
