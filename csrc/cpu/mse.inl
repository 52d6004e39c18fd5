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

// Of a run in which every element counts: there is nothing to choose.
struct Everything {
  template <class A>
  LOSSOPS_INLINE A keep(int64_t, A x) const {
    return x;
  }
  int64_t of(int64_t n) const {
    return n;
  }
};

// Of a run in which some do: all bits set where an element counts, none elsewhere. Taken with a bitwise
// and, which leaves 0 of a NaN too, and which every instruction set has for vectors.
template <class A>
struct Mask {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  const Bits* bits;
  int64_t counted;

  LOSSOPS_INLINE A keep(int64_t i, A x) const {
    return bits_as<A>(bits_as<Bits>(x) & bits[i]);
  }
  int64_t of(int64_t) const {
    return counted;
  }
};

// Spreads n bytes to all the bits of `out`; how many are not 0.
template <class Bits>
LOSSOPS_INLINE int64_t spread_bytes(const uint8_t* bytes, int64_t stride, int64_t n, Bits* __restrict out) {
  if (stride == 0) {
    std::fill(out, out + n, *bytes != 0 ? ~Bits(0) : Bits(0));
    return *bytes != 0 ? n : 0;
  }
  Bits counted = 0;
  if (stride == 1) {
#pragma omp simd reduction(+ : counted)
    for (int64_t i = 0; i < n; ++i) {
      const Bits one = bytes[i] != 0;
      out[i] = Bits(0) - one;
      counted += one;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Bits one = bytes[i * stride] != 0;
      out[i] = Bits(0) - one;
      counted += one;
    }
  }
  return static_cast<int64_t>(counted);
}

// The mask of the n elements from `begin` on, and how many of them count. Rows may be as short as two
// elements: they are told apart as an odometer turns, without a division for each.
template <class Bits>
int64_t load_mask(const MSEProblem& a, int64_t begin, int64_t n, Bits* out) {
  const auto& at = a.mask_elements;
  const int last = at.dims - 1;
  if (last < 0) return spread_bytes(a.mask, 0, n, out);
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = begin % at.size[d];
    begin /= at.size[d];
    offset += index[d] * at.stride[kMask][d];
  }
  int64_t counted = 0;
  for (int64_t done = 0; done < n;) {
    const int64_t run = std::min(n - done, at.size[last] - index[last]);
    counted += spread_bytes(a.mask + offset, at.stride[kMask][last], run, out + done);
    done += run;
    index[last] += run;
    offset += run * at.stride[kMask][last];
    for (int d = last; d > 0 && index[d] == at.size[d]; --d) {
      index[d] = 0;
      offset += at.stride[kMask][d - 1] - at.size[d] * at.stride[kMask][d];
      ++index[d - 1];
    }
  }
  return counted;
}

// Calls some(o, n, mask) for the runs of [begin, end) in which elements count, none(o, n) for all others.
template <class A, class Some, class None>
LOSSOPS_INLINE void for_each_masked_run(const MSEProblem& a, int64_t begin, int64_t end, const Some& some,
                                        const None& none) {
  if (a.mask == nullptr)
    return for_each_run(a.elements, begin, end, kBlock,
                        [&](const int64_t* o, int64_t n) { some(o, n, Everything()); });
  int64_t at = begin;
  for_each_run(a.elements, begin, end, kBlock, [&](const int64_t* o, int64_t n) {
    alignas(64) typename Mask<A>::Bits bits[kBlock];
    const int64_t counted = load_mask(a, at, n, bits);
    at += n;
    if (counted == n)
      some(o, n, Everything());
    else if (counted > 0)
      some(o, n, Mask<A>{bits, counted});
    else
      none(o, n);
  });
}

// Sums of terms and of weights, lane by lane: one vector of them, since memory keeps up with two streams
// better than with four.
template <class A>
struct LaneSums {
  static constexpr int64_t lanes = kLanes<A> / 2;
  alignas(64) double terms[lanes] = {}, weights[lanes] = {};
  double rest = 0, weight_rest = 0;

  void add_to(double& sum, double& weight_sum) {
    const auto plus = [](double a, double b) { return a + b; };
    sum += fold(terms, plus) + rest;
    weight_sum += fold(weights, plus) + weight_rest;
  }
};

// Adds term(i) for each i below n that counts, and its weight (w null: 1): short sums in A, and sums in
// double of these.
template <bool kWeighted, class A, class F, class Counts>
LOSSOPS_INLINE void add_terms(int64_t n, const F& term, const A* w, Counts counts, LaneSums<A>& sums) {
  constexpr int64_t lanes = LaneSums<A>::lanes, piece = 16 * lanes;
  int64_t i = 0;
  for (; i + piece <= n; i += piece) {
    alignas(64) A part[lanes] = {}, weight_part[lanes] = {};
#pragma GCC unroll 1
    for (int64_t j = i; j < i + piece; j += lanes) {
#pragma omp simd
      for (int64_t k = 0; k < lanes; ++k) {
        part[k] += counts.keep(j + k, term(j + k));
        if constexpr (kWeighted) weight_part[k] += counts.keep(j + k, w[j + k]);
      }
    }
#pragma omp simd
    for (int64_t k = 0; k < lanes; ++k) {
      sums.terms[k] += part[k];
      if constexpr (kWeighted) sums.weights[k] += weight_part[k];
    }
  }
  A rest = 0, weight_rest = 0;
  if (i < n) {
#pragma omp simd reduction(+ : rest, weight_rest)
    for (int64_t k = i; k < n; ++k) {
      rest += counts.keep(k, term(k));
      if constexpr (kWeighted) weight_rest += counts.keep(k, w[k]);
    }
  }
  sums.rest += rest;
  sums.weight_rest += kWeighted ? weight_rest : static_cast<double>(counts.of(n));
}

// Adds the losses of n elements, and their weights.
template <class A, class X, class Counts>
LOSSOPS_INLINE void add_losses(const X* x, const X* y, const A* w, int64_t n, Counts counts,
                               LaneSums<A>& sums) {
  const auto square = [&](int64_t i) LOSSOPS_INLINE_LAMBDA {
    const A d = static_cast<A>(widen(x[i])) - static_cast<A>(widen(y[i]));
    return d * d;
  };
  const auto weighted = [&](int64_t i) LOSSOPS_INLINE_LAMBDA { return w[i] * square(i); };
  if (w == nullptr)
    add_terms<false>(n, square, w, counts, sums);
  else
    add_terms<true>(n, weighted, w, counts, sums);
}

// The same of operands that come from memory. It is read in pieces of one operand and then of the other: line
// by line in turns takes half as long again.
template <class A, class X>
LOSSOPS_INLINE void add_far_losses(const X* x, const X* y, const A* w, int64_t n, LaneSums<A>& sums) {
  constexpr int64_t piece = 2048 / sizeof(X);
  alignas(64) X copy[piece];
  for (int64_t i = 0; i < n; i += piece) {
    const int64_t m = std::min(piece, n - i);
#pragma omp simd
    for (int64_t k = 0; k < m; ++k) copy[k] = x[i + k];
    add_losses<A, X>(copy, y + i, w == nullptr ? nullptr : w + i, m, Everything(), sums);
  }
}

template <class A>
void store_zeros(const MSEProblem& a, const Elements& t, MSEOperand k, const int64_t* o, int64_t n) {
  if (t.data == nullptr) return;
  alignas(64) A buffer[kBlock];
  const int64_t stride = a.elements.inner_stride(k);
  A* out = destination(t.dtype, t.data, o[k], stride, buffer);
  std::fill(out, out + n, A(0));
  store(t.dtype, out, t.data, o[k], stride, n);
}

template <class A, class Counts>
void forward_run(const MSEForward& a, const int64_t* o, int64_t n, Counts counts, LaneSums<A>& sums) {
  Buffers<A> b;
  const auto operand = [&](const Elements& t, MSEOperand k, A absent, A* buffer) {
    return load_operand(t, o[k], a.elements.inner_stride(k), n, absent, buffer);
  };
  const A* w = a.weight.data != nullptr ? operand(a.weight, kWeight, 1, b.weight) : nullptr;
  const bool none = a.reduction == Reduction::none, along = a.input_tangent.data != nullptr;
  const A *x = operand(a.input, kInput, 0, b.input), *y = operand(a.target, kTargetElement, 0, b.target);
  if (!none && !along) return add_losses<A>(x, y, w, n, counts, sums);
  const int64_t stride = a.elements.inner_stride(kOut);
  A* out = none ? destination(a.out.dtype, a.out.data, o[kOut], stride, b.other) : b.other;
  const auto fill = [&](auto weight) {
    if (!along) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = counts.keep(i, weight[i] * ((x[i] - y[i]) * (x[i] - y[i])));
      return;
    }
    const A* dx = operand(a.input_tangent, kInputTangent, 0, b.extra);
    alignas(64) A dy_buffer[kBlock];
    const A* dy = operand(a.target_tangent, kTargetTangent, 0, dy_buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = counts.keep(i, 2 * weight[i] * (x[i] - y[i]) * (dx[i] - dy[i]));
  };
  if (w != nullptr)
    fill(w);
  else
    fill(Uniform<A>{1});
  if (none) {
    store(a.out.dtype, out, a.out.data, o[kOut], stride, n);
    return;
  }
  const auto computed = [&](int64_t i) LOSSOPS_INLINE_LAMBDA { return out[i]; };
  if (w == nullptr)
    add_terms<false>(n, computed, w, counts, sums);
  else
    add_terms<true>(n, computed, w, counts, sums);
}

// grad_input = 2*g*w*(x - y), grad_target its negative.
template <class A, class Counts>
void backward_run(const MSEBackward& a, const int64_t* o, int64_t n, Counts counts) {
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
    const bool stream = is_streamed(a.elements.count, t.dtype), in_place = out != b.other;
    const A scale = sign * factor;
    const auto fill = [&](auto grad, auto weight) {
      for_each_result<A>(n, out, stream && in_place, [&](int64_t i, A& result) LOSSOPS_INLINE_LAMBDA {
        result = counts.keep(i, scale * grad[i] * weight[i] * (x[i] - y[i]));
      });
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
    store(t.dtype, out, t.data, o[k], stride, n, stream && !in_place);
  };
  write(a.grad_input, kOut, 1);
  write(a.grad_target, kOutTarget, -1);
}

// Whether the losses can be summed from the operands as they stand, without a buffer that they must fit into:
// bfloat16 too, since widening in passing is cheaper than a copy.
template <class A>
bool stand_alone(const MSEForward& a) {
  const auto stands = [&](const Elements& t, MSEOperand k, DType dtype) {
    return t.data == nullptr || (t.dtype == dtype && a.elements.inner_stride(k) == 1);
  };
  const DType dtype = std::is_same_v<A, float> && a.input.dtype == DType::bf16 ? DType::bf16 : dtype_of<A>;
  return a.reduction != Reduction::none && a.input_tangent.data == nullptr && a.mask == nullptr &&
         stands(a.input, kInput, dtype) && stands(a.target, kTargetElement, dtype) &&
         stands(a.weight, kWeight, dtype_of<A>);
}

template <class A>
void forward_range(const MSEForward& a, int64_t begin, int64_t end, double& sum, double& weight_sum) {
  LaneSums<A> sums;
  if (stand_alone<A>(a)) // in runs as long as they come, for each start costs
    for_each_run(a.elements, begin, end, end - begin, [&](const int64_t* o, int64_t n) {
      const A* w = a.weight.data == nullptr ? nullptr : static_cast<const A*>(a.weight.data) + o[kWeight];
      const auto add = [&](auto* type) {
        using X = std::remove_reference_t<decltype(*type)>;
        const X* x = static_cast<const X*>(a.input.data) + o[kInput];
        const X* y = static_cast<const X*>(a.target.data) + o[kTargetElement];
        if (is_streamed(a.elements.count, a.input.dtype))
          add_far_losses<A>(x, y, w, n, sums);
        else
          add_losses<A>(x, y, w, n, Everything(), sums);
      };
      if (std::is_same_v<A, float> && a.input.dtype == DType::bf16)
        add(static_cast<BFloat16*>(nullptr));
      else
        add(static_cast<A*>(nullptr));
    });
  else
    for_each_masked_run<A>(
        a, begin, end,
        [&](const int64_t* o, int64_t n, auto counts) { forward_run<A>(a, o, n, counts, sums); },
        [&](const int64_t* o, int64_t n) {
          if (a.reduction == Reduction::none) store_zeros<A>(a, a.out, kOut, o, n);
        });
  sums.add_to(sum, weight_sum);
}

template <class A>
void backward_range(const MSEBackward& a, int64_t begin, int64_t end) {
  for_each_masked_run<A>(
      a, begin, end, [&](const int64_t* o, int64_t n, auto counts) { backward_run<A>(a, o, n, counts); },
      [&](const int64_t* o, int64_t n) {
        store_zeros<A>(a, a.grad_input, kOut, o, n);
        store_zeros<A>(a, a.grad_target, kOutTarget, o, n);
      });
  end_of_stream();
}
