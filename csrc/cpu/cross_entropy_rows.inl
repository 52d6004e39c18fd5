// Row functions of softmax cross-entropy on the CPU, compiled once per instruction set (see foreach_isa.h).
// Formulas: csrc/cross_entropy.h. The same two ways through the logits as the plain loss.
#include "cross_entropy.inl"

// ---------------------------------------------------------------------------------------------
// Pieces of the formula

// u of logits z, and d with du/dz = scale*d, du/dscale = z*d.
template <class A>
struct Transform {
  bool active, capped;
  A scale, cap, to_tanh, inverse_cap;

  explicit Transform(const CrossEntropyRowsProblem& a)
      : active(a.transforms()),
        capped(a.softcap != 0),
        scale(a.scale_tensor == nullptr ? static_cast<A>(a.scale) : *static_cast<const A*>(a.scale_tensor)),
        cap(static_cast<A>(a.softcap)),
        to_tanh(capped ? scale / cap : A(0)),
        inverse_cap(capped ? A(1) / cap : A(0)) {}

  LOSSOPS_INLINE A operator()(A z) const {
    return capped ? cap * tanh(to_tanh * z) : scale * z;
  }
  // Returns z itself where there is nothing to do.
  const A* operator()(const A* z, int64_t n, A* u) const {
    if (!active) return z;
    if (capped) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = cap * tanh(to_tanh * z[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) u[i] = scale * z[i];
    }
    return u;
  }
  LOSSOPS_INLINE A slope(A u) const {
    const A t = u * inverse_cap;
    return capped ? 1 - t * t : A(1); // without a cap t of an infinite u would be NaN
  }
};

// Of one row so far, with what entropy and argmax need.
template <class A>
struct RowFunctions : RowState<A> {
  A weighted = 0;      // sum of exp(u - max)*(u - max)
  int64_t largest = 0; // first class where u is max

  LOSSOPS_INLINE void raise(A new_max) {
    const A old = this->max;
    if (new_max != old && old != -std::numeric_limits<A>::infinity())
      weighted = (weighted + this->sum * (old - new_max)) * exp(old - new_max);
    RowState<A>::raise(new_max);
  }
  // `other` is of later classes.
  void merge(RowFunctions other) {
    if (other.max > this->max) largest = other.largest;
    const A new_max = other.max > this->max ? other.max : this->max;
    raise(new_max);
    other.raise(new_max);
    this->sum += other.sum;
    this->target_sum += other.target_sum;
    this->dot += other.dot;
    weighted += other.weighted;
  }
};

template <class A>
LOSSOPS_INLINE void block_sum_entropy(const A* u, int64_t n, A ref, A& sum, A& weighted) {
  A part = 0, weighted_part = 0;
#pragma omp simd reduction(+ : part, weighted_part)
  for (int64_t i = 0; i < n; ++i) {
    const A e = exp(u[i] - ref);
    part += e;
    weighted_part += target_term(e, u[i] - ref);
  }
  sum += part;
  weighted += weighted_part;
}

template <class A>
A* plane(const CrossEntropyRowsProblem& a, const void* planes, CrossEntropyPlane k) {
  return static_cast<A*>(const_cast<void*>(planes)) + k * a.rows.count;
}

// The class that torch.argmax finds, where a NaN may be among them.
template <class A>
int64_t careful_argmax(const CrossEntropyRowsProblem& a, const int64_t* o) {
  const Transform<A> transform(a);
  int64_t largest = 0;
  A most = 0;
  for (int64_t c = 0; c < a.classes; ++c) {
    const A u = transform(load_one<A>(a.logits.dtype, a.logits.data, o[kLogits] + c * a.logits.class_stride));
    if (u != u) return c;
    if (c == 0 || u > most) largest = c, most = u;
  }
  return largest;
}

// ---------------------------------------------------------------------------------------------
// Along a row

// The first place of a value that is there.
template <class A>
LOSSOPS_INLINE int64_t first_of(const A* u, A value) {
  int64_t i = 0;
  while (u[i] != value) ++i;
  return i;
}

// Adds the terms t_c*(u_c - ref).
template <bool kProbabilities, class A, class Weight>
LOSSOPS_INLINE void block_target(const A* u, const A* p, Weight w, int64_t n, A ref, Smoothing<A> s,
                                 RowState<A>& state) {
  A target_sum = 0, dot = 0;
#pragma omp simd reduction(+ : target_sum, dot)
  for (int64_t i = 0; i < n; ++i) {
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    target_sum += t;
    dot += target_term(t, u[i] - ref);
  }
  state.target_sum += target_sum;
  state.dot += dot;
}

// Over the classes [c0, c1), without a class index's own terms.
template <class A>
RowFunctions<A> row_functions(const CrossEntropyRowsForward& a, const int64_t* o, int64_t c0, int64_t c1) {
  alignas(64) A z_buffer[kBlock], u_buffer[kBlock], p_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  RowFunctions<A> state;
  state.largest = c0;
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    const A* u = transform(load_classes(a.logits, o[kLogits], c, n, z_buffer), n, u_buffer);
    const A max = block_max(u, n, state.max);
    if (a.predicted != nullptr && max > state.max) state.largest = c + first_of(u, max);
    state.raise(max);
    const A ref = anchor(state.max);
    if (a.entropy)
      block_sum_entropy(u, n, ref, state.sum, state.weighted);
    else
      state.sum += block_sum_exp(u, n, ref);
    if (!a.has_target_sum()) continue;
    with_target<A>(a, o[kTarget], c, n, p_buffer, [&](auto probabilities, const A* p, auto w) {
      block_target<decltype(probabilities)::value>(u, p, w, n, ref, smoothing, state);
    });
  }
  return state;
}

template <class A>
void write_row(const CrossEntropyRowsForward& a, const int64_t* o, RowFunctions<A> state) {
  const RowTarget<A> target = read_target<A>(a, o[kTarget], a.bad_target);
  const auto put = [&](CrossEntropyPlane k, A value) {
    plane<A>(a, a.stats, k)[o[kRow]] = target.counted ? value : A(0);
  };
  const A ref = anchor(state.max), log_sum = a.classes == 0 ? A(0) : log(state.sum);
  A picked = 0, weight = a.classes == 0 ? A(0) : A(1);
  if (target.index >= 0) {
    const A t = Smoothing<A>(a).keep * target.weight;
    picked = Transform<A>(a)(load_one<A>(a.logits.dtype, a.logits.data,
                                         o[kLogits] + target.index * a.logits.class_stride)) -
             ref;
    weight = target.weight;
    state.target_sum += t;
    state.dot += target_term(t, picked);
  }
  put(kMax, a.classes == 0 ? A(0) : state.max);
  put(kLogSum, log_sum);
  put(kTargetSum, state.target_sum);
  put(kDot, state.dot);
  put(kPicked, picked);
  put(kTargetWeight, weight);
  if (a.entropy) put(kEntropy, a.classes == 0 ? A(0) : log_sum - state.weighted / state.sum);
  if (a.predicted == nullptr) return;
  const bool odd = !(state.sum >= 0); // a NaN, or two infinities
  a.predicted[o[kRow]] = !target.counted || a.classes == 0 ? -1
                         : odd                             ? careful_argmax<A>(a, o)
                                                           : state.largest;
}

// What the backward passes know of rows: along a row Uniform values, across a tile arrays.
template <class Row>
struct Gradients {
  Row max, log_sum, entropy;
  Row of_log_sum, of_target_sum, of_dot, of_entropy;
  Row live; // 0 where no gradient arrives: zeros, whatever the logits are
};

template <class A>
struct RowGradients : Gradients<Uniform<A>> {
  RowTarget<A> target;
  A of_index = 0; // what a class index adds to G at its class

  RowGradients(const CrossEntropyRowsBackward& a, const int64_t* o) {
    target = read_target<A>(a, o[kTarget], a.bad_target);
    const auto read = [&](const void* planes, CrossEntropyPlane k) {
      return Uniform<A>{plane<A>(a, planes, k)[o[kRow]]};
    };
    this->max = read(a.stats, kMax);
    this->log_sum = read(a.stats, kLogSum);
    this->entropy = a.entropy ? read(a.stats, kEntropy) : Uniform<A>{0};
    this->of_log_sum = read(a.grad_rows, kLogSum);
    this->of_target_sum = read(a.grad_rows, kTargetSum);
    this->of_dot = read(a.grad_rows, kDot);
    this->of_entropy = a.entropy ? read(a.grad_rows, kEntropy) : Uniform<A>{0};
    const A of_picked = read(a.grad_rows, kPicked).value;
    const bool any = this->of_log_sum.value != 0 || this->of_target_sum.value != 0 ||
                     this->of_dot.value != 0 || this->of_entropy.value != 0 || of_picked != 0;
    this->live.value = any && target.counted ? 1 : 0;
    if (target.index >= 0) of_index = this->of_dot.value * (Smoothing<A>(a).keep * target.weight) + of_picked;
  }
};

// G without a class index's own term.
template <bool kProbabilities, bool kEntropy, class A, class Row, class Weight>
LOSSOPS_INLINE void softmax_gradient(const A* u, const A* p, int64_t n, const Gradients<Row>& r, Weight w,
                                     Smoothing<A> s, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A l = (u[i] - r.max[i]) - r.log_sum[i];
    const A softmax = exp(l);
    A value;
    if constexpr (kEntropy)
      value = softmax == 0 ? A(0) : softmax * (r.of_log_sum[i] - r.of_entropy[i] * (l + r.entropy[i]));
    else
      value = softmax * r.of_log_sum[i];
    value += r.of_dot[i] * target_weight<kProbabilities, A>(w[i], p, i, s);
    out[i] = r.live[i] == 0 ? A(0) : value;
  }
}

// dp = keep*w*(g_TargetSum + g_Dot*(u - max))
template <class A, class Row, class Weight>
LOSSOPS_INLINE void probability_gradient(const A* u, int64_t n, const Gradients<Row>& r, Weight w, A keep,
                                         A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A of_logit = r.of_dot[i] == 0 ? A(0) : r.of_dot[i] * (u[i] - r.max[i]); // 0 at -inf too
    out[i] = r.live[i] == 0 ? A(0) : keep * w[i] * (r.of_target_sum[i] + of_logit);
  }
}

template <class A>
LOSSOPS_INLINE A block_dot_scale(const A* g, const A* z, const A* u, int64_t n, Transform<A> transform) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += target_term(g[i], z[i] * transform.slope(u[i]));
  return sum;
}

// Gradients of the classes [c0, c1) of one row. Adds to `scale_sum` what the scale gets from them.
template <class A>
void rows_backward_row(const CrossEntropyRowsBackward& a, const int64_t* o, int64_t c0, int64_t c1,
                       A& scale_sum) {
  alignas(64) A z_buffer[kBlock], u_buffer[kBlock], p_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const RowGradients<A> r(a, o);
  if (r.live.value == 0) {
    if (a.grad_logits.data != nullptr) zero_classes<A>(a.grad_logits, o[kGradLogits], c0, c1);
    if (a.grad_target.data != nullptr) zero_classes<A>(a.grad_target, o[kGradTarget], c0, c1);
    return;
  }
  for (int64_t c = c0; c < c1; c += kBlock) {
    const int64_t n = std::min(kBlock, c1 - c);
    const A* z = load_classes(a.logits, o[kLogits], c, n, z_buffer);
    const A* u = transform(z, n, u_buffer);
    const auto write = [&](const ClassTensor& t, CrossEntropyOperand k, const auto& compute) {
      const int64_t offset = o[k] + c * t.class_stride;
      A* out = destination(t.dtype, t.data, offset, t.class_stride, out_buffer);
      compute(out);
      store(t.dtype, out, t.data, offset, t.class_stride, n);
    };
    with_target<A>(a, o[kTarget], c, n, p_buffer, [&](auto probabilities, const A* p, auto w) {
      constexpr bool kProbabilities = decltype(probabilities)::value;
      if (a.grad_target.data != nullptr)
        write(a.grad_target, kGradTarget,
              [&](A* out) { probability_gradient(u, n, r, w, smoothing.keep, out); });
      if (a.grad_logits.data == nullptr && a.grad_scale == nullptr) return;
      const auto gradient = [&](A* out) {
        if (r.of_entropy.value != 0)
          softmax_gradient<kProbabilities, true, A>(u, p, n, r, w, smoothing, out);
        else
          softmax_gradient<kProbabilities, false, A>(u, p, n, r, w, smoothing, out);
        const int64_t y = r.target.index - c;
        if (r.target.index >= 0 && 0 <= y && y < n) out[y] += r.of_index;
      };
      if (!transform.active && a.grad_scale == nullptr) return write(a.grad_logits, kGradLogits, gradient);
      gradient(g_buffer);
      if (a.grad_scale != nullptr) scale_sum += block_dot_scale(g_buffer, z, u, n, transform);
      if (a.grad_logits.data == nullptr) return;
      write(a.grad_logits, kGradLogits, [&](A* out) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = transform.scale * transform.slope(u[i]) * g_buffer[i];
      });
    });
  }
}

// ---------------------------------------------------------------------------------------------
// Second derivative, along a row

// A block of a row and of the direction h that it is taken along.
template <class A>
struct Direction {
  alignas(64) A z_buffer[kBlock], u_buffer[kBlock], v_buffer[kBlock], p_buffer[kBlock], h[kBlock];
  const A *z, *u, *v; // v may be null: 0
  A tau;
  int64_t n = 0;

  explicit Direction(const CrossEntropyRowsBackwardBackward& a)
      : tau(a.scale_tangent == nullptr ? A(0) : *static_cast<const A*>(a.scale_tangent)) {}

  void take(const CrossEntropyRowsBackwardBackward& a, const int64_t* o, Transform<A> transform, int64_t c) {
    n = std::min(kBlock, a.classes - c);
    z = load_classes(a.logits, o[kLogits], c, n, z_buffer);
    u = transform(z, n, u_buffer);
    v = a.tangent.data == nullptr ? nullptr : load_classes(a.tangent, o[kTangent], c, n, v_buffer);
    if (v == nullptr)
      steer(Uniform<A>{0}, transform);
    else
      steer(v, transform);
  }

 private:
  template <class V>
  LOSSOPS_INLINE void steer(V along, Transform<A> transform) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      h[i] =
          along[i] * transform.scale * transform.slope(u[i]) + target_term(tau, z[i] * transform.slope(u[i]));
  }
};

template <class A>
struct Moments {
  A mean = 0;    // M = sum p*h
  A entropy = 0; // K = sum p*h*(l + Entropy)
  A dot = 0;     // sum t*h
};

template <bool kProbabilities, class A, class Weight>
LOSSOPS_INLINE void block_moments(const Direction<A>& d, const A* p, Weight w, const RowGradients<A>& r,
                                  Smoothing<A> s, Moments<A>& m) {
  A mean = 0, entropy = 0, dot = 0;
#pragma omp simd reduction(+ : mean, entropy, dot)
  for (int64_t i = 0; i < d.n; ++i) {
    const A l = (d.u[i] - r.max.value) - r.log_sum.value;
    const A softmax = exp(l), ph = softmax == 0 ? A(0) : softmax * d.h[i];
    mean += ph;
    entropy += ph == 0 ? A(0) : ph * (l + r.entropy.value); // NaN where no logit is finite
    const A t = target_weight<kProbabilities, A>(w[i], p, i, s);
    dot += t == 0 ? A(0) : t * d.h[i];
  }
  m.mean += mean;
  m.entropy += entropy;
  m.dot += dot;
}

template <bool kProbabilities, class A, class V, class Weight>
LOSSOPS_INLINE void block_curvature(const Direction<A>& d, V v, const A* p, Weight w,
                                    const RowGradients<A>& r, Smoothing<A> s, Transform<A> transform,
                                    const Moments<A>& m, int64_t y, A* out, A* scale_terms) {
  const A bend = -2 * transform.inverse_cap * transform.inverse_cap;
#pragma omp simd
  for (int64_t i = 0; i < d.n; ++i) {
    const A l = (d.u[i] - r.max.value) - r.log_sum.value, softmax = exp(l), e = l + r.entropy.value;
    const A centred = d.h[i] - m.mean;
    const A of_entropy = r.of_entropy.value == 0
                             ? A(0)
                             : r.of_entropy.value * (d.h[i] * (e + 1) - m.entropy - m.mean * (e + 1));
    const A q = softmax == 0 ? A(0) : softmax * (r.of_log_sum.value * centred - of_entropy);
    A g = softmax == 0
              ? A(0)
              : softmax * (r.of_log_sum.value - (r.of_entropy.value == 0 ? A(0) : r.of_entropy.value * e));
    g += r.of_dot.value * target_weight<kProbabilities, A>(w[i], p, i, s);
    g += i == y ? r.of_index : A(0);
    const A slope = transform.slope(d.u[i]);
    const A curve = bend * d.u[i] * slope;
    const A b = transform.capped ? v[i] * transform.scale * curve + target_term(d.tau, d.z[i] * curve) : A(0);
    out[i] = transform.scale * slope * q + g * (d.tau * slope + b * transform.scale);
    scale_terms[i] = target_term(q, d.z[i] * slope) + g * (v[i] * slope + target_term(b, d.z[i]));
  }
}

// Two passes over the row: the direction's moments, then the products; the second finds the row in cache.
template <class A>
void rows_backward_backward_row(const CrossEntropyRowsBackwardBackward& a, const int64_t* o) {
  alignas(64) A out_buffer[kBlock], dz[kBlock], scale_terms[kBlock];
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const RowGradients<A> r(a, o);
  const auto put = [&](CrossEntropyPlane k, A value) { plane<A>(a, a.row_dots, k)[o[kRow]] = value; };
  for (int k = 0; k < a.planes(); ++k) put(static_cast<CrossEntropyPlane>(k), 0);
  A* grad_scale = a.grad_scale == nullptr ? nullptr : static_cast<A*>(a.grad_scale) + o[kRow];
  if (grad_scale != nullptr) *grad_scale = 0;
  if (!r.target.counted) {
    if (a.grad_logits.data != nullptr) zero_classes<A>(a.grad_logits, o[kGradLogits], 0, a.classes);
    return;
  }
  Direction<A> d(a);
  Moments<A> m;
  A h_target = 0;
  for (int64_t c = 0; c < a.classes; c += kBlock) {
    d.take(a, o, transform, c);
    with_target<A>(a, o[kTarget], c, d.n, d.p_buffer, [&](auto probabilities, const A* p, auto w) {
      block_moments<decltype(probabilities)::value>(d, p, w, r, smoothing, m);
    });
    const int64_t y = r.target.index - c;
    if (r.target.index >= 0 && 0 <= y && y < d.n) h_target = d.h[y];
  }
  if (r.target.index >= 0) m.dot += smoothing.keep * r.target.weight * h_target;
  put(kLogSum, m.mean);
  put(kDot, m.dot);
  put(kPicked, h_target);
  if (a.entropy) put(kEntropy, -m.entropy);
  A scale_sum = 0;
  for (int64_t c = 0; c < a.classes; c += kBlock) {
    d.take(a, o, transform, c);
    const auto write = [&](const ClassTensor& t, CrossEntropyOperand k, const auto& value) {
      const int64_t offset = o[k] + c * t.class_stride;
      A* out = destination(t.dtype, t.data, offset, t.class_stride, out_buffer);
#pragma omp simd
      for (int64_t i = 0; i < d.n; ++i) out[i] = r.live.value == 0 ? A(0) : value(i);
      store(t.dtype, out, t.data, offset, t.class_stride, d.n);
    };
    with_target<A>(a, o[kTarget], c, d.n, d.p_buffer, [&](auto probabilities, const A* p, auto w) {
      constexpr bool kProbabilities = decltype(probabilities)::value;
      if (a.grad_target.data != nullptr)
        write(a.grad_target, kGradTarget,
              [&](int64_t i) { return r.of_dot.value * smoothing.keep * w[i] * d.h[i]; });
      if (a.grad_logits.data == nullptr && grad_scale == nullptr) return;
      const int64_t y = r.target.index < 0 ? -1 : r.target.index - c;
      if (d.v == nullptr)
        block_curvature<kProbabilities>(d, Uniform<A>{0}, p, w, r, smoothing, transform, m, y, dz,
                                        scale_terms);
      else
        block_curvature<kProbabilities>(d, d.v, p, w, r, smoothing, transform, m, y, dz, scale_terms);
      if (a.grad_logits.data != nullptr) write(a.grad_logits, kGradLogits, [&](int64_t i) { return dz[i]; });
      for (int64_t i = 0; i < d.n; ++i) scale_sum += scale_terms[i];
    });
  }
  if (grad_scale != nullptr && r.live.value != 0) *grad_scale = scale_sum;
}

// ---------------------------------------------------------------------------------------------
// Across a tile of rows

// The k classes from c0 on of a tile, as u: an array of rows for each class. z stays as it was read.
template <class A>
struct TileTransform {
  TileLoad<A> z;
  alignas(64) A buffer[kTileClasses * kTile];
  const A* u[kTileClasses];

  void operator()(const CrossEntropyRowsProblem& a, const int64_t* o, Transform<A> transform, int64_t c0,
                  int64_t k, int64_t n) {
    z(a.logits, o[kLogits], a.rows.inner_stride(kLogits), c0, k, n, true);
    for (int64_t c = 0; c < k; ++c) u[c] = transform(z.classes[c], n, buffer + c * z.class_size);
  }
  const A* all() const {
    return u[0];
  }
};

template <class A>
LOSSOPS_INLINE void tile_add_entropy(const A* u, const A* ref, int64_t n, A* __restrict sum,
                                     A* __restrict weighted) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A e = exp(u[i] - ref[i]);
    sum[i] += e;
    weighted[i] += target_term(e, u[i] - ref[i]);
  }
}

template <class A>
LOSSOPS_INLINE void tile_argmax(const A* u, int32_t c, int64_t n, A* __restrict most,
                                int32_t* __restrict largest) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    largest[i] = u[i] > most[i] ? c : largest[i];
    most[i] = u[i] > most[i] ? u[i] : most[i];
  }
}

template <class A>
void write_plane(const CrossEntropyRowsProblem& a, const void* planes, CrossEntropyPlane k, const int64_t* o,
                 int64_t n, const A* values) {
  store_as(values, a.rows.inner_stride(kRow), n, plane<A>(a, planes, k) + o[kRow]);
}

template <class A>
void rows_forward_tile(const CrossEntropyRowsForward& a, const int64_t* o, int64_t n) {
  TileTransform<A> u;
  TileLoad<A> p;
  alignas(64) A max[kTile], most[kTile], ref[kTile], picked[kTile];
  alignas(64) A sums[4][kTile], parts[4][kTile]; // sum, weighted, target_sum, dot
  alignas(64) int32_t largest[kTile];
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const TileTarget<A> target(a, o, n, a.bad_target);
  std::fill(max, max + n, -std::numeric_limits<A>::infinity());
  std::fill(most, most + n, -std::numeric_limits<A>::infinity());
  std::fill(largest, largest + n, 0);
  std::fill(picked, picked + n, A(0));
  for (auto& of : sums) std::fill(of, of + n, A(0));
  for (int64_t c0 = 0; c0 < a.classes; c0 += kTileClasses) {
    const int64_t k = std::min(kTileClasses, a.classes - c0);
    u(a, o, transform, c0, k, n);
    if (!a.index_target()) p(a.target, o[kTarget], a.rows.inner_stride(kTarget), c0, k, n, true);
    std::copy(max, max + n, ref);
    tile_max(u.all(), u.z.class_size, k, n, ref);
    for (int64_t i = 0; i < n; ++i) {
      RowFunctions<A> state;
      state.max = max[i], state.sum = sums[0][i], state.weighted = sums[1][i];
      state.target_sum = sums[2][i], state.dot = sums[3][i];
      state.raise(ref[i]);
      sums[0][i] = state.sum, sums[1][i] = state.weighted, sums[3][i] = state.dot;
    }
    std::copy(ref, ref + n, max);
    for (int64_t i = 0; i < n; ++i) ref[i] = anchor(max[i]);
    for (auto& of : parts) std::fill(of, of + n, A(0)); // apart first: many added to a long sum lose digits
    if (!a.entropy) tile_add_exp(u.all(), u.z.class_size, k, ref, n, parts[0]);
    for (int64_t c = 0; c < k; ++c) {
      if (a.entropy) tile_add_entropy(u.u[c], ref, n, parts[0], parts[1]);
      if (a.predicted != nullptr) tile_argmax(u.u[c], static_cast<int32_t>(c0 + c), n, most, largest);
      if (!a.has_target_sum()) continue;
      const A w = a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[c0 + c];
      if (a.index_target())
        tile_add_target<false, A>(u.u[c], nullptr, ref, w, n, smoothing, parts[2], parts[3]);
      else
        tile_add_target<true>(u.u[c], p.classes[c], ref, w, n, smoothing, parts[2], parts[3]);
    }
    for (int s = 0; s < 4; ++s)
      for (int64_t i = 0; i < n; ++i) sums[s][i] += parts[s][i];
    if (a.index_target())
      tile_pick(u.all(), u.z.class_size, target.index, static_cast<int32_t>(c0), static_cast<int32_t>(k), n,
                picked);
  }
  write_tile(a, o, n, target, largest, max, picked, sums);
}

template <class A>
void write_tile(const CrossEntropyRowsForward& a, const int64_t* o, int64_t n, const TileTarget<A>& target,
                const int32_t* largest, const A* max, A* picked, A (&sums)[4][kTile]) {
  alignas(64) A out[kPlanes][kTile];
  const A keep = Smoothing<A>(a).keep;
  const bool index = a.index_target(), none = a.classes == 0;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool counted = target.counted[i] != 0;
    const A t = index ? keep * target.weight[i] : A(0);
    const A at = index && counted ? picked[i] - anchor(max[i]) : A(0);
    const A log_sum = none ? A(0) : log(sums[0][i]);
    out[kMax][i] = counted && !none ? max[i] : A(0);
    out[kLogSum][i] = counted ? log_sum : A(0);
    out[kTargetSum][i] = counted ? sums[2][i] + t : A(0);
    out[kDot][i] = counted ? sums[3][i] + target_term(t, at) : A(0);
    out[kPicked][i] = at;
    out[kTargetWeight][i] = counted && !none ? target.weight[i] : A(0);
    out[kEntropy][i] = counted && !none ? log_sum - sums[1][i] / sums[0][i] : A(0);
  }
  for (int k = 0; k < a.planes(); ++k)
    write_plane(a, a.stats, static_cast<CrossEntropyPlane>(k), o, n, out[k]);
  if (a.predicted == nullptr) return;
  int64_t i = 0;
  for_each_row(a.rows, o, n, [&](const int64_t* at) {
    const bool counted = target.counted[i] != 0 && !none;
    const bool odd = !(sums[0][i] >= 0); // a NaN, or two infinities
    a.predicted[at[kRow]] = !counted ? -1 : odd ? careful_argmax<A>(a, at) : largest[i];
    ++i;
  });
}

// What the backward knows of a tile's rows.
template <class A>
struct TileGradients : Gradients<const A*> {
  TileTarget<A> target;
  alignas(64) A buffers[8][kTile], of_index[kTile];

  TileGradients(const CrossEntropyRowsBackward& a, const int64_t* o, int64_t n)
      : target(a, o, n, a.bad_target) {
    const int64_t stride = a.rows.inner_stride(kRow);
    int used = 0;
    const auto read = [&](const void* planes, CrossEntropyPlane k) {
      A* buffer = buffers[used++];
      return load(dtype_of<A>, plane<A>(a, planes, k), o[kRow], stride, n, buffer);
    };
    this->max = read(a.stats, kMax);
    this->log_sum = read(a.stats, kLogSum);
    this->of_log_sum = read(a.grad_rows, kLogSum);
    this->of_target_sum = read(a.grad_rows, kTargetSum);
    this->of_dot = read(a.grad_rows, kDot);
    this->entropy = a.entropy ? read(a.stats, kEntropy) : this->max;
    this->of_entropy = a.entropy ? read(a.grad_rows, kEntropy) : this->max;
    const A* of_picked = read(a.grad_rows, kPicked);
    const A keep = Smoothing<A>(a).keep;
    for (int64_t i = 0; i < n; ++i) {
      const bool any = this->of_log_sum[i] != 0 || this->of_target_sum[i] != 0 || this->of_dot[i] != 0 ||
                       of_picked[i] != 0 || (a.entropy && this->of_entropy[i] != 0);
      of_index[i] = this->of_dot[i] * (keep * target.weight[i]) + of_picked[i];
      live_buffer[i] = any && target.counted[i] != 0 ? A(1) : A(0);
    }
    this->live = live_buffer;
  }

 private:
  alignas(64) A live_buffer[kTile];
};

template <class A>
void rows_backward_tile(const CrossEntropyRowsBackward& a, const int64_t* o, int64_t n) {
  TileTransform<A> u;
  TileLoad<A> p;
  alignas(64) A g[kTileClasses * kTile], out_buffer[kTile], scale_sum[kTile];
  const Smoothing<A> smoothing(a);
  const Transform<A> transform(a);
  const TileGradients<A> r(a, o, n);
  std::fill(scale_sum, scale_sum + n, A(0));
  const auto write = [&](const ClassTensor& t, CrossEntropyOperand k, int64_t c, const auto& compute) {
    const int64_t offset = o[k] + c * t.class_stride, stride = a.rows.inner_stride(k);
    A* out = destination(t.dtype, t.data, offset, stride, out_buffer);
    compute(out);
    store(t.dtype, out, t.data, offset, stride, n);
  };
  for (int64_t c0 = 0; c0 < a.classes; c0 += kTileClasses) {
    const int64_t k = std::min(kTileClasses, a.classes - c0);
    u(a, o, transform, c0, k, n);
    if (!a.index_target()) p(a.target, o[kTarget], a.rows.inner_stride(kTarget), c0, k, n, false);
    for (int64_t c = 0; c < k; ++c) {
      const Uniform<A> w{a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[c0 + c]};
      A* gradient = g + c * kTile;
      if (a.grad_target.data != nullptr)
        write(a.grad_target, kGradTarget, c0 + c,
              [&](A* out) { probability_gradient(u.u[c], n, r, w, smoothing.keep, out); });
      if (a.index_target())
        a.entropy ? softmax_gradient<false, true, A>(u.u[c], nullptr, n, r, w, smoothing, gradient)
                  : softmax_gradient<false, false, A>(u.u[c], nullptr, n, r, w, smoothing, gradient);
      else
        a.entropy ? softmax_gradient<true, true>(u.u[c], p.classes[c], n, r, w, smoothing, gradient)
                  : softmax_gradient<true, false>(u.u[c], p.classes[c], n, r, w, smoothing, gradient);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t y = r.target.index[i] - c0;
      if (r.target.index[i] >= 0 && 0 <= y && y < k && r.live[i] != 0) g[y * kTile + i] += r.of_index[i];
    }
    for (int64_t c = 0; c < k; ++c) {
      const A *gradient = g + c * kTile, *z = u.z.classes[c], *at = u.u[c];
      if (a.grad_scale != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
          scale_sum[i] += target_term(gradient[i], z[i] * transform.slope(at[i]));
      }
      if (a.grad_logits.data == nullptr) continue;
      write(a.grad_logits, kGradLogits, c0 + c, [&](A* out) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A value = transform.scale * transform.slope(at[i]) * gradient[i];
          out[i] = r.live[i] == 0 ? A(0) : value;
        }
      });
    }
  }
  if (a.grad_scale != nullptr)
    store_as(scale_sum, a.rows.inner_stride(kRow), n, static_cast<A*>(a.grad_scale) + o[kRow]);
}

// ---------------------------------------------------------------------------------------------
// Ranges of rows: what a thread is given

template <class A>
void rows_forward_range(const CrossEntropyRowsForward& a, int64_t begin, int64_t end) {
  const bool rows = along_rows(a);
  for_each_run(a.rows, begin, end, tile_rows(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return rows_forward_tile<A>(a, o, n);
    for_each_row(a.rows, o, n, [&](const int64_t* at) {
      // An ignored row is not read.
      const bool counted = read_target<A>(a, at[kTarget], a.bad_target).counted;
      write_row(a, at, counted ? row_functions<A>(a, at, 0, a.classes) : RowFunctions<A>());
    });
  });
}

// A piece of one long row, and the joining of its pieces in order.
template <class A>
void rows_forward_chunk(const CrossEntropyRowsForward& a, int64_t row, int64_t c0, int64_t c1, void* state) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  const bool counted = read_target<A>(a, o[kTarget], a.bad_target).counted;
  *static_cast<RowFunctions<A>*>(state) = counted ? row_functions<A>(a, o, c0, c1) : RowFunctions<A>();
}

template <class A>
void rows_forward_join(const CrossEntropyRowsForward& a, int64_t row, const void* states, int64_t state_bytes,
                       int64_t chunks) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  RowFunctions<A> state;
  for (int64_t k = 0; k < chunks; ++k)
    state.merge(
        *reinterpret_cast<const RowFunctions<A>*>(static_cast<const char*>(states) + k * state_bytes));
  write_row(a, o, state);
}

template <class A>
void rows_backward_chunk(const CrossEntropyRowsBackward& a, int64_t row, int64_t c0, int64_t c1,
                         double& scale_sum) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  A sum = 0;
  rows_backward_row<A>(a, o, c0, c1, sum);
  scale_sum = sum;
}

template <class A>
void put_grad_scale(const CrossEntropyRowsBackward& a, int64_t row, double value) {
  int64_t o[kCrossEntropyOperands];
  a.rows.offsets(row, o);
  static_cast<A*>(a.grad_scale)[o[kRow]] = static_cast<A>(value);
}

template <class A>
void rows_backward_range(const CrossEntropyRowsBackward& a, int64_t begin, int64_t end) {
  const bool rows = along_rows(a);
  for_each_run(a.rows, begin, end, tile_rows(a), [&](const int64_t* o, int64_t n) {
    if (!rows) return rows_backward_tile<A>(a, o, n);
    for_each_row(a.rows, o, n, [&](const int64_t* at) {
      A scale_sum = 0;
      rows_backward_row<A>(a, at, 0, a.classes, scale_sum);
      if (a.grad_scale != nullptr) static_cast<A*>(a.grad_scale)[at[kRow]] = scale_sum;
    });
  });
}

template <class A>
void rows_backward_backward_range(const CrossEntropyRowsBackwardBackward& a, int64_t begin, int64_t end) {
  for_each_run(a.rows, begin, end, tile_rows(a), [&](const int64_t* o, int64_t n) {
    for_each_row(a.rows, o, n, [&](const int64_t* at) { rows_backward_backward_row<A>(a, at); });
  });
}
