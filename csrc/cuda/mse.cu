// Mean squared error on the GPU. Formulas: csrc/mse.h. Contiguous tensors of one dtype are walked in packs;
// any others element by element.
#include "../mse.h"

#include <algorithm>
#include <optional>

#include "../trace.h"
#include "launch.h"
#include "shifted.cuh"

namespace lossops::cuda {
namespace {

constexpr int kThreads = 256, kResident = 4; // blocks to a multiprocessor: half of its threads
// A block's share: enough for its start and its sums to cost little. More than kMaxBlocks of them would
// cost the block that adds up their sums too much.
constexpr int64_t kElementsPerBlock = 8192, kMaxBlocks = 8192;

// ---------------------------------------------------------------------------------------------
// Operands

struct Offsets {
  int64_t of[kMSEOperands];
};

// An element at a time, of any dtype and strides; 1 where there is no tensor.
template <class A>
LOSSOPS_DEVICE A load_element(const Elements& t, MSEOperand operand, const Offsets& o) {
  return t.data == nullptr ? A(1) : load_any<A>(t.dtype, t.data, o.of[operand]);
}

// A contiguous tensor of T, or one value for all, or none, which is 1 for all.
template <class T, class A>
struct Flat {
  T* data;
  bool one;

  LOSSOPS_DEVICE Flat(const MSEProblem& a, const Elements& t, MSEOperand operand)
      : data(static_cast<T*>(t.data)), one(a.elements.inner_stride(operand) == 0) {}
  template <int N>
  using Raw = std::conditional_t<N == 1, T, Pack<T>>;
  LOSSOPS_DEVICE bool varies() const {
    return data != nullptr && !one;
  }
  template <int N, bool kShifted>
  LOSSOPS_DEVICE Raw<N> fetch(int64_t i) const {
    if constexpr (N == 1)
      return data[i];
    else if constexpr (kShifted)
      return load_shifted<kWarp>(data + i);
    else
      return load_pack(data + i);
  }
  template <int N>
  LOSSOPS_DEVICE void widen_raw(const Raw<N>& raw, A (&out)[N]) const {
    if (varies()) {
      if constexpr (N == 1)
        out[0] = widen<A>(raw);
      else
        unpack<T>(raw, out);
    } else {
      const A value = data == nullptr ? A(1) : widen<A>(*data);
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = value;
    }
  }
  template <int N>
  LOSSOPS_DEVICE void store(int64_t i, const A (&x)[N]) const {
    if constexpr (N == 1)
      data[i] = round_to<T>(x[0]);
    else
      store_pack(data + i, pack_rounded<T>(x));
  }
};

// Which elements count, a bit for each of N neighbours.
class Mask {
 public:
  LOSSOPS_DEVICE explicit Mask(const MSEProblem& a) : bytes_(a.mask), elements_(a.mask_elements) {
    contiguous_ = elements_.dims == 1 && elements_.inner_stride(kMask) == 1;
  }

  template <int N>
  LOSSOPS_DEVICE unsigned bits(int64_t first) const {
    unsigned bits = 0;
    if (contiguous_) {
      Bytes<N> bytes;
      if (is_aligned<N>(bytes_ + first)) {
        bytes = *reinterpret_cast<const Bytes<N>*>(bytes_ + first);
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) bytes.of[k] = bytes_[first + k];
      }
#pragma unroll
      for (int k = 0; k < N; ++k) bits |= (bytes.of[k] != 0 ? 1u : 0u) << k;
      return bits;
    }
    const int64_t inner = elements_.inner_size();
#pragma unroll 1
    for (int k = 0; k < N;) { // row by row: one division for each
      int64_t offsets[kMaskOperands];
      elements_.offsets(first + k, offsets);
      const int64_t left = inner - (first + k) % inner;
      const uint8_t* row = bytes_ + offsets[kMask];
#pragma unroll 1
      for (int64_t j = 0; j < left && k < N; ++j, ++k)
        bits |= (row[j * elements_.inner_stride(kMask)] != 0 ? 1u : 0u) << k;
    }
    return bits;
  }

 private:
  template <int N>
  struct alignas(N) Bytes {
    uint8_t of[N];
  };

  const uint8_t* bytes_;
  const Positions<kMaskOperands>& elements_;
  bool contiguous_;
};

struct Share {
  int64_t per_block; // elements: a multiple of a warp's packs
  int head;          // before the first pack
  bool shifted;      // some tensor's packs lie across 16-byte boundaries
};

// Packs of each operand in flight before the first is used. kPlain: input and target are all there is.
// kMasked: there is a mask too, and perhaps a weight.
template <bool kPlain>
constexpr int kUnroll = kPlain ? 2 : 1;

template <int N>
using Count = std::integral_constant<int, N>;

// Calls f(unroll, width, shifted, i, end) for the elements of this thread: `unroll` packs, at i and every
// kThreads packs on, of which those before `end` are there; single ones at either end of the tensor.
template <class T, bool kPlain, class F>
LOSSOPS_DEVICE void for_packs(int64_t count, const Share& share, const F& f) {
  constexpr int kWidth = kPackSize<T>;
  const int64_t begin = share.head + int64_t{blockIdx.x} * share.per_block;
  const int64_t left = count - begin; // may be negative
  const int n = static_cast<int>(min(left, share.per_block));
  constexpr int kTogether = kWarp * kWidth; // shifted packs: a warp's at a time, with one more behind them
  const int end = share.shifted ? static_cast<int>(min(left - kWidth, int64_t{n})) / kTogether * kTogether
                                : n / kWidth * kWidth;
  const int head = blockIdx.x == 0 ? share.head : 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < head + n - end; i += kThreads)
    f(Count<1>(), Count<1>(), std::false_type(), i < head ? i : begin + end + (i - head), count);
  if (share.shifted) {
#pragma unroll 1
    for (int i = threadIdx.x * kWidth; i < end; i += kThreads * kWidth)
      f(Count<1>(), Count<kWidth>(), std::true_type(), begin + i, begin + end);
  } else {
#pragma unroll 1
    for (int i = threadIdx.x * kWidth; i < end; i += kUnroll<kPlain> * kThreads * kWidth)
      f(Count<kUnroll<kPlain>>(), Count<kWidth>(), std::false_type(), begin + i, begin + end);
  }
}

// f(offsets, whether it counts) for the elements of this thread.
template <bool kMasked, class F>
LOSSOPS_DEVICE void for_each_element(const MSEProblem& a, const Share& share, const F& f) {
  const int64_t begin = int64_t{blockIdx.x} * share.per_block;
  const int64_t end = min(begin + share.per_block, a.elements.count);
  const Mask mask(a);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    Offsets o;
    a.elements.offsets(i, o.of);
    f(o, !kMasked || mask.bits<1>(i) != 0);
  }
}

// ---------------------------------------------------------------------------------------------
// Kernels

template <class T, class A, bool kPlain, bool kMasked>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_packs(const __grid_constant__ MSEForward a, const __grid_constant__ Share share,
                  const __grid_constant__ BlockSums block) {
  const Flat<T, A> input(a, a.input, kInput), target(a, a.target, kTargetElement),
      weight(a, a.weight, kWeight), out(a, a.out, kOut);
  const Mask mask(a);
  const bool none = a.reduction == Reduction::none;
  Sums sums;
  const auto add = [&](auto unroll, auto width, auto shifted, int64_t first, int64_t end) {
    constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
    constexpr bool kShifted = decltype(shifted)::value;
    typename Flat<T, A>::template Raw<kWidth> inputs[kCount] = {}, targets[kCount] = {}, weights[kCount] = {};
    unsigned counts[kCount] = {};
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kThreads * kWidth;
      if (i >= end) continue;
      if (kMasked) counts[u] = mask.bits<kWidth>(i);
      if (input.varies()) inputs[u] = input.template fetch<kWidth, kShifted>(i);
      if (target.varies()) targets[u] = target.template fetch<kWidth, kShifted>(i);
      if (!kPlain && weight.varies()) weights[u] = weight.template fetch<kWidth, kShifted>(i);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kThreads * kWidth;
      if (i >= end) continue;
      A x[kWidth], y[kWidth], w[kWidth], loss[kWidth];
      input.template widen_raw<kWidth>(inputs[u], x);
      target.template widen_raw<kWidth>(targets[u], y);
      if (kPlain) {
        for (int k = 0; k < kWidth; ++k) w[k] = 1;
      } else {
        weight.template widen_raw<kWidth>(weights[u], w);
      }
      A loss_part = 0, weight_part = 0; // of a pack, before they are added in double
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        loss[k] = w[k] * ((x[k] - y[k]) * (x[k] - y[k]));
        if (kMasked && !(counts[u] >> k & 1)) loss[k] = w[k] = 0;
        loss_part += loss[k];
        weight_part += w[k];
      }
      if (none)
        out.store(i, loss);
      else
        sums.add({static_cast<double>(loss_part), static_cast<double>(weight_part)});
    }
  };
  for_packs<T, kPlain>(a.elements.count, share, add);
  block.put(block_sums<kThreads>(sums));
}

// Also the loss's derivative along a tangent.
template <class A, bool kMasked>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_elements(const __grid_constant__ MSEForward a, const __grid_constant__ Share share,
                     const __grid_constant__ BlockSums block) {
  const bool jvp = a.input_tangent.data != nullptr;
  Sums sums;
  for_each_element<kMasked>(a, share, [&](const Offsets& o, bool counts) {
    const A difference = load_element<A>(a.input, kInput, o) - load_element<A>(a.target, kTargetElement, o);
    A w = load_element<A>(a.weight, kWeight, o);
    A loss = jvp ? 2 * w * difference *
                       (load_element<A>(a.input_tangent, kInputTangent, o) -
                        load_element<A>(a.target_tangent, kTargetTangent, o))
                 : w * (difference * difference);
    if (!counts) loss = w = 0;
    if (a.reduction == Reduction::none) return store_any(a.out.dtype, a.out.data, o.of[kOut], loss);
    sums.add({static_cast<double>(loss), static_cast<double>(w)});
  });
  block.put(block_sums<kThreads>(sums));
}

// What each element's gradient has in common where one upstream gradient serves all.
LOSSOPS_DEVICE double divided(const MSEBackward& a, double grad) {
  return a.normalizer == nullptr ? grad : grad / *a.normalizer;
}

// grad_input = 2*g*w*(x - y), grad_target its negative.
template <class T, class A, bool kPlain, bool kMasked>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_packs(const __grid_constant__ MSEBackward a, const __grid_constant__ Share share) {
  const Flat<T, A> input(a, a.input, kInput), target(a, a.target, kTargetElement),
      weight(a, a.weight, kWeight), grad_input(a, a.grad_input, kOut),
      grad_target(a, a.grad_target, kOutTarget), grad(a, a.grad, kGrad);
  const Mask mask(a);
  const A factor =
      static_cast<A>(2 * divided(a, grad.one ? load_any<double>(a.grad.dtype, a.grad.data, 0) : 1.0));
  const auto write = [&](auto unroll, auto width, auto shifted, int64_t first, int64_t end) {
    constexpr int kCount = decltype(unroll)::value, kWidth = decltype(width)::value;
    constexpr bool kShifted = decltype(shifted)::value;
    using Raw = typename Flat<T, A>::template Raw<kWidth>;
    Raw inputs[kCount] = {}, targets[kCount] = {}, weights[kCount] = {}, grads[kCount] = {};
    unsigned counts[kCount] = {};
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kThreads * kWidth;
      if (i >= end) continue;
      if (kMasked) counts[u] = mask.bits<kWidth>(i);
      if (input.varies()) inputs[u] = input.template fetch<kWidth, kShifted>(i);
      if (target.varies()) targets[u] = target.template fetch<kWidth, kShifted>(i);
      if (!kPlain && weight.varies()) weights[u] = weight.template fetch<kWidth, kShifted>(i);
      if (!kPlain && grad.varies()) grads[u] = grad.template fetch<kWidth, kShifted>(i);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kThreads * kWidth;
      if (i >= end) continue;
      A x[kWidth], y[kWidth], w[kWidth], g[kWidth];
      input.template widen_raw<kWidth>(inputs[u], x);
      target.template widen_raw<kWidth>(targets[u], y);
      if (kPlain) {
        for (int k = 0; k < kWidth; ++k) w[k] = 1;
      } else {
        weight.template widen_raw<kWidth>(weights[u], w);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) g[k] = 1;
      if (!kPlain && grad.varies()) grad.template widen_raw<kWidth>(grads[u], g); // else it is in the factor
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        g[k] = factor * g[k] * w[k] * (x[k] - y[k]);
        if (kMasked && !(counts[u] >> k & 1)) g[k] = 0;
      }
      if (grad_input.data != nullptr) grad_input.store(i, g);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) g[k] = -g[k];
      if (grad_target.data != nullptr) grad_target.store(i, g);
    }
  };
  for_packs<T, kPlain>(a.elements.count, share, write);
}

template <class A, bool kMasked>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_elements(const __grid_constant__ MSEBackward a, const __grid_constant__ Share share) {
  const double divisor = divided(a, 1.0);
  for_each_element<kMasked>(a, share, [&](const Offsets& o, bool counts) {
    const double grad = load_any<double>(a.grad.dtype, a.grad.data, o.of[kGrad]);
    A g = static_cast<A>(2 * (a.normalizer == nullptr ? grad : grad * divisor)) *
          load_element<A>(a.weight, kWeight, o) *
          (load_element<A>(a.input, kInput, o) - load_element<A>(a.target, kTargetElement, o));
    if (!counts) g = 0;
    if (a.grad_input.data != nullptr) store_any(a.grad_input.dtype, a.grad_input.data, o.of[kOut], g);
    if (a.grad_target.data != nullptr)
      store_any(a.grad_target.dtype, a.grad_target.data, o.of[kOutTarget], -g);
  });
}

// ---------------------------------------------------------------------------------------------
// Launching

// Element by element.
Share share_of(const MSEProblem& a) {
  constexpr int64_t kMultiple = kWarp * 8; // of a warp's packs, of any dtype
  const int64_t per_block = std::max(kElementsPerBlock, (a.elements.count + kMaxBlocks - 1) / kMaxBlocks);
  return {(per_block + kMultiple - 1) / kMultiple * kMultiple, 0, false};
}

int64_t blocks_of(const MSEProblem& a) {
  const int64_t per_block = share_of(a).per_block;
  return (a.elements.count + per_block - 1) / per_block;
}

// The operands of a call that there are; one value for all of them counts where it may.
struct Operands {
  const MSEProblem& problem;
  struct Entry {
    Elements tensor;
    MSEOperand operand;
  } entries[6];
  int count = 0;

  explicit Operands(const MSEForward& a) : problem(a) {
    take_problem();
    if (a.reduction == Reduction::none) take(a.out, kOut);
  }
  explicit Operands(const MSEBackward& a) : problem(a) {
    take_problem();
    take(a.grad_input, kOut);
    take(a.grad_target, kOutTarget);
    if (a.elements.dims > 0 && a.elements.inner_stride(kGrad) != 0) take(a.grad, kGrad);
  }

  // How packs are shared out, cut by the boundaries of what is written, if anything is. None where the dtypes
  // differ, or tensors are not contiguous, or two that are written do not lie alike.
  std::optional<Share> packs() const {
    const DType dtype = entries[0].tensor.dtype;
    const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    if (problem.elements.dims > 1) return std::nullopt;
    const auto written = [](const Entry& e) { return e.operand == kOut || e.operand == kOutTarget; };
    const auto address = [](const Entry& e) { return reinterpret_cast<uintptr_t>(e.tensor.data); };
    const Entry* const found = std::find_if(entries, entries + count, written);
    const Entry& cut = found == entries + count ? entries[0] : *found;
    Share share = share_of(problem);
    for (int i = 0; i < count; ++i) {
      const Entry& e = entries[i];
      const int64_t stride = problem.elements.inner_stride(e.operand);
      const bool one = stride == 0 && e.operand == kWeight;
      if (e.tensor.dtype != dtype || (problem.elements.count > 1 && stride != 1 && !one)) return std::nullopt;
      if (one || (address(e) - address(cut)) % 16 == 0) continue;
      if (written(e)) return std::nullopt;
      share.shifted = true;
    }
    // Shifted packs are read from up to a pack before them on; and warps write whole sectors.
    const uintptr_t head = share.shifted ? (0 - address(cut) - 16) % 32 + 16 : (0 - address(cut)) % 16;
    share.head = static_cast<int>(std::min(static_cast<int64_t>(head) / size, problem.elements.count));
    return share;
  }

 private:
  void take_problem() {
    take(problem.input, kInput);
    take(problem.target, kTargetElement);
    take(problem.weight, kWeight);
  }
  void take(const Elements& t, MSEOperand operand) {
    if (t.data != nullptr) entries[count++] = {t, operand};
  }
};

// f(Type<element>, Type<accumulation>), AnyType where packs will not do.
template <class F>
void with_types(const MSEProblem& a, bool packs, const F& f) {
  if (packs) {
    switch (a.input.dtype) {
      case DType::f16: return f(Type<__half>(), Type<float>());
      case DType::bf16: return f(Type<__nv_bfloat16>(), Type<float>());
      case DType::f32: return f(Type<float>(), Type<float>());
      default: return f(Type<double>(), Type<double>());
    }
  }
  if (a.use_double) return f(Type<AnyType>(), Type<double>());
  f(Type<AnyType>(), Type<float>());
}

// f(kPlain, kMasked), each a std::bool_constant.
template <class F>
void with_extras(const MSEProblem& a, bool plain, const F& f) {
  if (a.mask != nullptr) return f(std::false_type(), std::true_type());
  with_flag(plain, [&](auto is_plain) { f(is_plain, std::false_type()); });
}

// For lossops.explain.
void trace(const char* kernel, bool packs, int64_t blocks) {
  if (tracing()) record({kernel, packs ? "packs of 16 bytes" : "element by element", "cuda", blocks});
}

} // namespace

int64_t workspace_bytes(const MSEForward& a) {
  return blocks_of(a) * static_cast<int64_t>(sizeof(Sums));
}

int64_t workspace_bytes(const MSEBackward&) {
  return 0;
}

void launch(const MSEForward& a, void* workspace, void* stream_) {
  constexpr const char* op = "mse_loss";
  const auto stream = static_cast<cudaStream_t>(stream_);
  const auto blocks = static_cast<unsigned>(blocks_of(a));
  const BlockSums sums{static_cast<Sums*>(workspace), {a.reduction, a.out.dtype, a.out.data, a.normalizer}};
  if (blocks > 0) {
    const bool jvp = a.input_tangent.data != nullptr;
    const std::optional<Share> packs = jvp ? std::nullopt : Operands(a).packs();
    trace(jvp ? "mse_jvp" : "mse_forward", packs.has_value(), blocks);
    with_types(a, packs.has_value(), [&](auto element, auto accumulation) {
      using T = typename decltype(element)::type;
      using A = typename decltype(accumulation)::type;
      if constexpr (std::is_same_v<T, AnyType>)
        with_flag(a.mask != nullptr, [&](auto masked) {
          forward_elements<A, decltype(masked)::value><<<blocks, kThreads, 0, stream>>>(a, share_of(a), sums);
        });
      else
        with_extras(a, a.weight.data == nullptr, [&](auto plain, auto masked) {
          forward_packs<T, A, decltype(plain)::value, decltype(masked)::value>
              <<<blocks, kThreads, 0, stream>>>(a, *packs, sums);
        });
    });
    check_launch(op);
  }
  if (blocks == 1) return;
  reduce_blocks<<<1, kReduceThreads, 0, stream>>>(sums, static_cast<int>(blocks));
  check_launch(op);
}

void launch(const MSEBackward& a, void*, void* stream_) {
  constexpr const char* op = "mse_backward";
  const auto stream = static_cast<cudaStream_t>(stream_);
  const auto blocks = static_cast<unsigned>(blocks_of(a));
  if (blocks == 0 || (a.grad_input.data == nullptr && a.grad_target.data == nullptr)) return;
  const std::optional<Share> packs = Operands(a).packs();
  const bool one_grad = a.elements.inner_stride(kGrad) == 0;
  trace("mse_backward", packs.has_value(), blocks);
  with_types(a, packs.has_value(), [&](auto element, auto accumulation) {
    using T = typename decltype(element)::type;
    using A = typename decltype(accumulation)::type;
    if constexpr (std::is_same_v<T, AnyType>)
      with_flag(a.mask != nullptr, [&](auto masked) {
        backward_elements<A, decltype(masked)::value><<<blocks, kThreads, 0, stream>>>(a, share_of(a));
      });
    else
      with_extras(a, a.weight.data == nullptr && one_grad, [&](auto plain, auto masked) {
        backward_packs<T, A, decltype(plain)::value, decltype(masked)::value>
            <<<blocks, kThreads, 0, stream>>>(a, *packs);
      });
  });
  check_launch(op);
}

} // namespace lossops::cuda
