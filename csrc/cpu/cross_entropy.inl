// Softmax cross-entropy on the CPU, compiled once per instruction set (see foreach_isa.h).
// Formulas: csrc/cross_entropy.h. Two ways through the logits: along the classes of one row at a
// time, or across a tile of rows, one vector lane each, where classes are few or lie far apart.

constexpr int64_t kBlock = 2048; // classes at a time along a row: 8 KiB of float stay in L1 for every pass
constexpr int64_t kTile = 512;   // rows of a tile
constexpr int64_t kTileClasses = 32; // classes of a tile held at a time: 16 KiB of float

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

// Several maxima side by side: one alone would wait for its own latency at every step.
template <class A>
LOSSOPS_INLINE A block_max(const A* z, int64_t n, A max) {
  constexpr int64_t kLanes = 256 / sizeof(A);
  int64_t i = 0;
  if (n >= kLanes) {
    alignas(64) A lanes[kLanes];
    std::copy(z, z + kLanes, lanes);
    for (i = kLanes; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] = z[i + k] > lanes[k] ? z[i + k] : lanes[k];
    }
#pragma omp simd reduction(max : max)
    for (int64_t k = 0; k < kLanes; ++k) max = lanes[k] > max ? lanes[k] : max;
  }
#pragma omp simd reduction(max : max)
  for (int64_t k = i; k < n; ++k) max = z[k] > max ? z[k] : max;
  return max;
}

template <class A>
LOSSOPS_INLINE A block_sum_exp(const A* z, int64_t n, A ref) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exp(z[i] - ref);
  return sum;
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

// Adds the terms t_c*(z_c - ref).
template <bool kProbabilities, class A, class Weight>
LOSSOPS_INLINE void block_target(const A* z, const A* p, Weight w, int64_t n, A ref, Smoothing<A> s,
                                 RowState<A>& state) {
  A target_sum = 0, dot = 0;
#pragma omp simd reduction(+ : target_sum, dot)
  for (int64_t i = 0; i < n; ++i) {
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    target_sum += t;
    dot += target_term(t, z[i] - ref);
  }
  state.target_sum += target_sum;
  state.dot += dot;
}

// The row's state over the classes [c0, c1), without a class index's own term.
template <class A>
RowState<A> row_state(const CrossEntropyProblem& a, const int64_t* o, int64_t c0, int64_t c1) {
  alignas(64) A z_buffer[kBlock], p_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  const bool probabilities = !a.index_target();
  RowState<A> state;
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    const A* z = load(a.logits.dtype, a.logits.data, o[kLogits] + c * a.logits.class_stride,
                      a.logits.class_stride, n, z_buffer);
    state.raise(block_max(z, n, state.max));
    const A ref = anchor(state.max);
    state.sum += block_sum_exp(z, n, ref);
    if (!a.has_target_sum()) continue;
    const A* w = static_cast<const A*>(a.weight);
    if (probabilities) {
      const A* p = load(a.target.dtype, a.target.data, o[kTarget] + c * a.target.class_stride,
                        a.target.class_stride, n, p_buffer);
      if (w != nullptr)
        block_target<true>(z, p, w + c, n, ref, smoothing, state);
      else
        block_target<true>(z, p, Uniform<A>{1}, n, ref, smoothing, state);
    } else {
      if (w != nullptr)
        block_target<false, A>(z, nullptr, w + c, n, ref, smoothing, state);
      else
        block_target<false, A>(z, nullptr, Uniform<A>{1}, n, ref, smoothing, state);
    }
  }
  return state;
}

// Writes what the forward knows of one row.
template <class A>
LOSSOPS_INLINE void finish_row(const CrossEntropyForward& a, int64_t row, RowState<A> state,
                               RowTarget<A> target, A target_logit, double& loss_sum, double& weight_sum) {
  A loss = 0, log_sum = 0, max = 0;
  if (target.counted) {
    if (target.index >= 0) {
      const A t = Smoothing<A>(a).keep * target.weight;
      state.target_sum += t;
      state.dot += target_term(t, target_logit - anchor(state.max));
    }
    max = state.max;
    log_sum = log(state.sum);
    loss = state.target_sum * log_sum - state.dot;
    loss_sum += loss;
    weight_sum += target.weight;
  }
  const Stats<A> stats(a);
  stats.max[row] = max;
  stats.log_sum[row] = log_sum;
  if (stats.target_sum != nullptr) stats.target_sum[row] = target.counted ? state.target_sum : A(0);
  if (a.reduction == Reduction::none) store_one(a.loss_dtype, loss, a.loss, row);
}

template <class A>
void finish_row(const CrossEntropyForward& a, const int64_t* o, const RowState<A>& state, double& loss_sum,
                double& weight_sum) {
  const RowTarget<A> target = read_target<A>(a, o[kTarget], a.bad_target);
  const A target_logit = target.index < 0 ? A(0)
                                          : load_one<A>(a.logits.dtype, a.logits.data,
                                                        o[kLogits] + target.index * a.logits.class_stride);
  finish_row(a, o[kRow], state, target, target_logit, loss_sum, weight_sum);
}

template <class A>
void forward_row(const CrossEntropyForward& a, const int64_t* o, double& loss_sum, double& weight_sum) {
  // An ignored row is not read: nothing in it can reach the loss, NaN included.
  const bool counted = read_target<A>(a, o[kTarget], a.bad_target).counted;
  finish_row(a, o, counted ? row_state<A>(a, o, 0, a.classes) : RowState<A>(), loss_sum, weight_sum);
}

// What the backward passes know of a row before they look at its logits.
template <class A>
struct RowGradient {
  RowTarget<A> target;
  A max, log_sum;
  A target_sum; // S
  A grad;       // upstream gradient of the row's loss: 0 leaves zeros, whatever the logits are
};

template <class A>
LOSSOPS_INLINE RowGradient<A> row_gradient(const CrossEntropyBackward& a, const int64_t* o) {
  const Stats<A> stats(a);
  RowGradient<A> r;
  r.target = read_target<A>(a, o[kTarget], a.bad_target);
  r.max = stats.max[o[kRow]];
  r.log_sum = stats.log_sum[o[kRow]];
  r.target_sum = stats.target_sum != nullptr ? stats.target_sum[o[kRow]] : r.target.weight;
  if (!r.target.counted) {
    r.grad = 0;
  } else {
    const double grad = load_one<double>(a.grad_loss_dtype, a.grad_loss, o[kGradLoss]);
    r.grad = static_cast<A>(a.normalizer == nullptr ? grad : grad / *a.normalizer);
  }
  return r;
}

// dz = g*(S*softmax - t), without a class index's own term. Row values are Uniform along a row,
// arrays across a tile; the class weight the other way round.
template <bool kProbabilities, class A, class Row, class Weight>
LOSSOPS_INLINE void logit_gradient(const A* z, const A* p, int64_t n, Row max, Row log_sum, Row grad_sum,
                                   Row grad, Weight w, Smoothing<A> s, A* dz) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    const A value = grad_sum[i] * exp((z[i] - max[i]) - log_sum[i]) - grad[i] * t;
    if constexpr (std::is_same_v<Row, Uniform<A>>)
      dz[i] = value; // a row without a gradient is not looked at
    else
      dz[i] = grad[i] == 0 ? A(0) : value;
  }
}

// dp = g*keep*w*(lse - z)
template <class A, class Row, class Weight>
LOSSOPS_INLINE void target_gradient(const A* z, int64_t n, Row max, Row log_sum, Row grad, Weight w, A keep,
                                    A* dp) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    dp[i] = grad[i] == 0 ? A(0) : grad[i] * keep * w[i] * (log_sum[i] - (z[i] - max[i]));
}

template <class A>
void zero_classes(const ClassTensor& out, int64_t offset, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) store_one(out.dtype, A(0), out.data, offset + c * out.class_stride);
}

// Gradients of the classes [c0, c1) of one row.
template <class A>
void backward_row(const CrossEntropyBackward& a, const int64_t* o, int64_t c0, int64_t c1) {
  alignas(64) A z_buffer[kBlock], p_buffer[kBlock], out_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  const RowGradient<A> r = row_gradient<A>(a, o);
  if (r.grad == 0) {
    if (a.grad_logits.data != nullptr) zero_classes<A>(a.grad_logits, o[kGradLogits], c0, c1);
    if (a.grad_target.data != nullptr) zero_classes<A>(a.grad_target, o[kGradTarget], c0, c1);
    return;
  }
  const Uniform<A> max{r.max}, log_sum{r.log_sum}, grad{r.grad}, grad_sum{r.grad * r.target_sum};
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    const A* z = load(a.logits.dtype, a.logits.data, o[kLogits] + c * a.logits.class_stride,
                      a.logits.class_stride, n, z_buffer);
    const A* w = a.weight == nullptr ? nullptr : static_cast<const A*>(a.weight) + c;
    if (a.grad_target.data != nullptr) {
      const int64_t stride = a.grad_target.class_stride, offset = o[kGradTarget] + c * stride;
      A* dp = destination(a.grad_target.dtype, a.grad_target.data, offset, stride, out_buffer);
      if (w != nullptr)
        target_gradient(z, n, max, log_sum, grad, w, smoothing.keep, dp);
      else
        target_gradient(z, n, max, log_sum, grad, Uniform<A>{1}, smoothing.keep, dp);
      store(a.grad_target.dtype, dp, a.grad_target.data, offset, stride, n);
    }
    if (a.grad_logits.data == nullptr) continue;
    const int64_t stride = a.grad_logits.class_stride, offset = o[kGradLogits] + c * stride;
    A* dz = destination(a.grad_logits.dtype, a.grad_logits.data, offset, stride, out_buffer);
    if (!a.index_target()) {
      const A* p = load(a.target.dtype, a.target.data, o[kTarget] + c * a.target.class_stride,
                        a.target.class_stride, n, p_buffer);
      if (w != nullptr)
        logit_gradient<true>(z, p, n, max, log_sum, grad_sum, grad, w, smoothing, dz);
      else
        logit_gradient<true>(z, p, n, max, log_sum, grad_sum, grad, Uniform<A>{1}, smoothing, dz);
    } else {
      if (w != nullptr && smoothing.spread != 0)
        logit_gradient<false, A>(z, nullptr, n, max, log_sum, grad_sum, grad, w, smoothing, dz);
      else
        logit_gradient<false, A>(z, nullptr, n, max, log_sum, grad_sum, grad, Uniform<A>{1}, smoothing, dz);
      const int64_t y = r.target.index - c;
      if (0 <= y && y < n) dz[y] -= r.grad * smoothing.keep * r.target.weight;
    }
    store(a.grad_logits.dtype, dz, a.grad_logits.data, offset, stride, n);
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
    class_size = (n + 15) / 16 * 16;
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

template <class A>
LOSSOPS_INLINE void tile_max(const A* z, int64_t n, A* __restrict max) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) max[i] = z[i] > max[i] ? z[i] : max[i];
}

template <class A>
LOSSOPS_INLINE void tile_add_exp(const A* z, const A* ref, int64_t n, A* __restrict sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += exp(z[i] - ref[i]);
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

template <class A>
void forward_tile(const CrossEntropyForward& a, const int64_t* o, int64_t n, double& loss_sum,
                  double& weight_sum) {
  TileLoad<A> z, p;
  alignas(64) A max[kTile], sum[kTile], target_sum[kTile], dot[kTile], ref[kTile], target_logit[kTile];
  alignas(64) A part_sum[kTile], part_target[kTile], part_dot[kTile];
  const Smoothing<A> smoothing(a);
  const TileTarget<A> target(a, o, n, a.bad_target);
  const bool index_target = a.index_target();
  for (int64_t i = 0; i < n; ++i) {
    max[i] = -std::numeric_limits<A>::infinity();
    sum[i] = a.classes == 0 ? A(1) : A(0); // no classes: a loss of 0, not 0*log 0
    target_sum[i] = dot[i] = target_logit[i] = 0;
  }
  for (int64_t c0 = 0; c0 < a.classes; c0 += kTileClasses) {
    const int64_t k = std::min(kTileClasses, a.classes - c0);
    z(a.logits, o[kLogits], a.rows.inner_stride(kLogits), c0, k, n, true);
    if (!index_target) p(a.target, o[kTarget], a.rows.inner_stride(kTarget), c0, k, n, true);
    std::copy(max, max + n, ref);
    for (int64_t c = 0; c < k; ++c) tile_max(z.classes[c], n, ref);
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
    for (int64_t c = 0; c < k; ++c) {
      tile_add_exp(z.classes[c], ref, n, sums);
      if (!a.has_target_sum()) continue;
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
                target_logit);
  }
  alignas(64) A loss[kTile];
  const A keep = index_target ? smoothing.keep : A(0);
  tile_finish(keep, target.weight, target_logit, target.counted, n, max, sum, target_sum, dot, loss);
  loss_sum += tile_sum(loss, n);
  weight_sum += tile_sum(target.weight, n);
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

// What the backward passes know of a tile's rows before they look at the logits.
template <class A>
struct TileGradient {
  TileTarget<A> target;
  alignas(64) A max_buffer[kTile], log_sum_buffer[kTile],
      target_sum_buffer[kTile], grad[kTile], grad_sum[kTile];
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
      grad_sum[i] = grad[i] * target_sum[i];
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
  const A *max = r.max, *log_sum = r.log_sum, *grad = r.grad, *grad_sum = r.grad_sum;
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
      if (a.index_target())
        logit_gradient<false, A>(z.classes[c], nullptr, n, max, log_sum, grad_sum, grad, weight(c), smoothing,
                                 out[c]);
      else
        logit_gradient<true>(z.classes[c], p.classes[c], n, max, log_sum, grad_sum, grad, weight(c),
                             smoothing, out[c]);
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

template <class A>
void backward_flat(const CrossEntropyBackward& a, const int64_t* o, int64_t n) {
  alignas(64) A max[kFlat + kSpread], log_sum[kFlat + kSpread], grad_sum[kFlat + kSpread],
      grad[kFlat + kSpread];
  alignas(64) A z_buffer[kFlat], out_buffer[kFlat];
  const Smoothing<A> smoothing(a);
  const TileGradient<A> r(a, o, n);
  const int64_t group = kFlat / a.classes;
  for (int64_t i0 = 0; i0 < n; i0 += group) {
    const int64_t rows = std::min(group, n - i0), elements = rows * a.classes;
    const int64_t offset = o[kGradLogits] + i0 * a.classes;
    spread(r.max + i0, rows, a.classes, max);
    spread(r.log_sum + i0, rows, a.classes, log_sum);
    spread(r.grad_sum + i0, rows, a.classes, grad_sum);
    if (smoothing.spread != 0) spread(r.grad + i0, rows, a.classes, grad);
    const A* z = load(a.logits.dtype, a.logits.data, o[kLogits] + i0 * a.classes, 1, elements, z_buffer);
    A* dz = destination(a.grad_logits.dtype, a.grad_logits.data, offset, 1, out_buffer);
    const A* g = smoothing.spread != 0 ? grad : grad_sum; // without smoothing g only tells a 0
    logit_gradient<false, A, const A*>(z, nullptr, elements, max, log_sum, grad_sum, g, Uniform<A>{1},
                                       smoothing, dz);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = r.target.index[i0 + i];
      if (y >= 0) dz[i * a.classes + y] -= r.grad[i0 + i] * smoothing.keep * r.target.weight[i0 + i];
    }
    store(a.grad_logits.dtype, dz, a.grad_logits.data, offset, 1, elements);
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

// Rows at a time: where they lie side by side, enough of each class for the prefetcher to follow its
// stream; else few enough for L1 to keep the tile while it is turned.
inline int64_t tile_rows(const CrossEntropyProblem& a) {
  return a.rows.inner_stride(kLogits) == 1 && a.classes > 1 ? kTile : 128;
}

template <class A>
void forward_range(const CrossEntropyForward& a, int64_t begin, int64_t end, double& loss_sum,
                   double& weight_sum) {
  const bool rows = along_rows(a);
  for_each_run(a.rows, begin, end, tile_rows(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return forward_tile<A>(a, o, n, loss_sum, weight_sum);
    for_each_row(a.rows, o, n, [&](const int64_t* at) { forward_row<A>(a, at, loss_sum, weight_sum); });
  });
}

// A piece of one long row, and the joining of its pieces in order.
template <class A>
void forward_chunk(const CrossEntropyForward& a, int64_t row, int64_t c0, int64_t c1, void* state) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  if (read_target<A>(a, o[kTarget], a.bad_target).counted)
    *static_cast<RowState<A>*>(state) = row_state<A>(a, o, c0, c1);
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
  finish_row(a, o, state, loss_sum, weight_sum);
}

template <class A>
void backward_chunk(const CrossEntropyBackward& a, int64_t row, int64_t c0, int64_t c1) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  backward_row<A>(a, o, c0, c1);
}

template <class A>
void backward_range(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  const bool rows = along_rows(a), flat = is_flat(a);
  for_each_run(a.rows, begin, end, tile_rows(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return flat ? backward_flat<A>(a, o, n) : backward_tile<A>(a, o, n);
    for_each_row(a.rows, o, n, [&](const int64_t* at) { backward_row<A>(a, at, 0, a.classes); });
  });
}
