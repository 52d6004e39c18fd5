// Mean squared error on the CPU, compiled once per instruction set (see foreach_isa.h).
// Formulas: csrc/mse.h.

constexpr int64_t kBlock = 1024; // elements at a time: the widened copies of five operands fit L1

// One operand of a run. Whatever is the same for the whole run (a broadcast operand, an absent
// weight) is spread over the buffer, so that the loops below read arrays only.
template <class A>
const A* load_operand(const Elements& t, int64_t offset, int64_t stride, int64_t n, A absent, A* buffer) {
  if (t.data != nullptr && stride != 0) return load(t.dtype, t.data, offset, stride, n, buffer);
  std::fill(buffer, buffer + n, t.data == nullptr ? absent : load_one<A>(t.dtype, t.data, offset));
  return buffer;
}

template <class A>
struct Buffers {
  alignas(64) A input[kBlock], target[kBlock], weight[kBlock], extra[kBlock], other[kBlock];
};

// Sums in double of short sums in A: exact enough whether or not the short ones are vectorised. Without
// weights (null) each counts 1.
template <class A, class F>
LOSSOPS_INLINE void add_piecewise(int64_t n, const F& term, const A* w, double& sum, double& weight_sum) {
  constexpr int64_t kPiece = 128;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t end = std::min(n, begin + kPiece);
    A part = 0, weight_part = 0;
    if (w == nullptr) {
#pragma omp simd reduction(+ : part)
      for (int64_t i = begin; i < end; ++i) part += term(i);
      weight_part = static_cast<A>(end - begin);
    } else {
#pragma omp simd reduction(+ : part, weight_part)
      for (int64_t i = begin; i < end; ++i) {
        part += term(i);
        weight_part += w[i];
      }
    }
    sum += part;
    weight_sum += weight_part;
  }
}

template <class A>
void forward_run(const MSEForward& a, const int64_t* o, int64_t n, double& sum, double& weight_sum) {
  Buffers<A> b;
  const auto operand = [&](const Elements& t, MSEOperand k, A absent, A* buffer) {
    return load_operand(t, o[k], a.elements.inner_stride(k), n, absent, buffer);
  };
  const A *x = operand(a.input, kInput, 0, b.input), *y = operand(a.target, kTargetElement, 0, b.target);
  const bool weighted = a.weight.data != nullptr;
  const A* w = weighted ? operand(a.weight, kWeight, 1, b.weight) : nullptr;
  if (a.reduction != Reduction::none && a.input_tangent.data == nullptr) {
    if (weighted)
      add_piecewise(n, [&](int64_t i) { return w[i] * ((x[i] - y[i]) * (x[i] - y[i])); }, w, sum, weight_sum);
    else
      add_piecewise(n, [&](int64_t i) { return (x[i] - y[i]) * (x[i] - y[i]); }, w, sum, weight_sum);
    return;
  }
  const int64_t stride = a.elements.inner_stride(kOut);
  const bool none = a.reduction == Reduction::none;
  A* out = none ? destination(a.out.dtype, a.out.data, o[kOut], stride, b.other) : b.other;
  if (!weighted) {
    std::fill(b.weight, b.weight + n, A(1));
    w = b.weight;
  }
  if (a.input_tangent.data == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = w[i] * ((x[i] - y[i]) * (x[i] - y[i]));
  } else {
    const A* dx = operand(a.input_tangent, kInputTangent, 0, b.extra);
    alignas(64) A dy_buffer[kBlock];
    const A* dy = operand(a.target_tangent, kTargetTangent, 0, dy_buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = 2 * w[i] * (x[i] - y[i]) * (dx[i] - dy[i]);
  }
  if (none) {
    store(a.out.dtype, out, a.out.data, o[kOut], stride, n);
    return;
  }
  add_piecewise(n, [&](int64_t i) { return out[i]; }, w, sum, weight_sum);
}

// grad_input = 2*g*w*(x - y), grad_target its negative.
template <class A>
void backward_run(const MSEBackward& a, const int64_t* o, int64_t n) {
  Buffers<A> b;
  const auto operand = [&](const Elements& t, MSEOperand k, A absent, A* buffer) {
    return load_operand(t, o[k], a.elements.inner_stride(k), n, absent, buffer);
  };
  const A *x = operand(a.input, kInput, 0, b.input), *y = operand(a.target, kTargetElement, 0, b.target);
  const double divisor = a.normalizer == nullptr ? 1 : *a.normalizer;
  // A value that serves the whole run is folded into one factor; arrays multiply it.
  A factor = static_cast<A>(2 / divisor);
  const bool one_grad = a.elements.inner_stride(kGrad) == 0;
  if (one_grad) factor = static_cast<A>(2 * load_one<double>(a.grad.dtype, a.grad.data, o[kGrad]) / divisor);
  const A* g = one_grad ? nullptr : operand(a.grad, kGrad, 1, b.extra);
  const A* w = a.weight.data == nullptr ? nullptr : operand(a.weight, kWeight, 1, b.weight);
  const auto write = [&](const Elements& t, MSEOperand k, A sign) {
    if (t.data == nullptr) return;
    const int64_t stride = a.elements.inner_stride(k);
    A* out = destination(t.dtype, t.data, o[k], stride, b.other);
    const A scale = sign * factor;
    const auto fill = [&](auto grad, auto weight) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = scale * grad[i] * weight[i] * (x[i] - y[i]);
    };
    const Uniform<A> one{1};
    if (g != nullptr && w != nullptr)
      fill(g, w);
    else if (g != nullptr)
      fill(g, one);
    else if (w != nullptr)
      fill(one, w);
    else
      fill(one, one);
    store(t.dtype, out, t.data, o[k], stride, n);
  };
  write(a.grad_input, kOut, 1);
  write(a.grad_target, kOutTarget, -1);
}

template <class A>
void forward_range(const MSEForward& a, int64_t begin, int64_t end, double& sum, double& weight_sum) {
  for_each_run(a.elements, begin, end, kBlock,
               [&](const int64_t* o, int64_t n) { forward_run<A>(a, o, n, sum, weight_sum); });
}

template <class A>
void backward_range(const MSEBackward& a, int64_t begin, int64_t end) {
  for_each_run(a.elements, begin, end, kBlock,
               [&](const int64_t* o, int64_t n) { backward_run<A>(a, o, n); });
}
