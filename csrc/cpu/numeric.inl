// Arithmetic shared by the CPU kernels, compiled once per instruction set (see foreach_isa.h).
// A is the accumulation type: float, or double where an operand is float64.

#define LOSSOPS_INLINE inline __attribute__((always_inline))
#define LOSSOPS_INLINE_LAMBDA __attribute__((always_inline))

template <class To, class From>
LOSSOPS_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(x));
  return y;
}

// A value that is the same for every index of a loop that otherwise reads an array.
template <class A>
struct Uniform {
  A value;
  LOSSOPS_INLINE A operator[](int64_t) const {
    return value;
  }
};

// Elements of A that a loop takes side by side: two vectors, so that neither waits for the other.
template <class A>
constexpr int64_t kLanes = 2 * LOSSOPS_VECTOR_BYTES / sizeof(A);

// Joins the lanes in halves: as a reduction the compiler would take them one after the other.
template <class T, size_t count, class F>
LOSSOPS_INLINE T fold(T (&lanes)[count], const F& f) {
#pragma GCC unroll 8
  for (int64_t half = count / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t k = 0; k < half; ++k) lanes[k] = f(lanes[k], lanes[k + half]);
  }
  return lanes[0];
}

// Calls f(i) for each i below n, in vectors. With `again` some i are met twice: the last of the vectors
// reaches back, for a remainder that went one by one would cost as much as many vectors.
template <class A, class F>
LOSSOPS_INLINE void for_each_lane(int64_t n, bool again, const F& f) {
  const int64_t rest = again && n >= kLanes<A> ? n % kLanes<A> : 0;
#pragma omp simd
  for (int64_t i = 0; i < n - rest; ++i) f(i);
  if (rest == 0) return;
#pragma omp simd
  for (int64_t i = n - kLanes<A>; i < n; ++i) f(i);
}

// exp for the arguments of a softmax (at most a rounding error above 0): 2^n * e^r with n = round(x/ln2),
// below the smallest normal result 0; NaN stays NaN. Adding the magic number leaves n in the low bits
// of the sum, with the exponent's bias, and no conversion to integer that NaN would make undefined. The
// polynomial is the minimax one of degree 5 on [-ln2/2, ln2/2] with constant 1: 1.5 ulp down to x = -10, 3.3
// ulp at the end.
LOSSOPS_INLINE float exp(float x) {
  constexpr float magic = 0x1.8p23f + 127;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
#if LOSSOPS_FMA
  const float r = x - n * 0.693147180559945309f; // fused: only the constant is rounded
#else
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  float p = 0x1.0fa822p-7f;
  p = p * r + 0x1.573a6cp-5f;
  p = p * r + 0x1.555a6cp-3f;
  p = p * r + 0x1.fffdc6p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 1.0f;
  // Times 2^n, not n added to p's exponent: a NaN's payload would turn it into a number.
  const float y = p * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
  return x < -87.33f ? 0.0f : y;
}

// The same in double: Taylor to degree 13, whose remainder on the reduced range is under 2^-57.
LOSSOPS_INLINE double exp(double x) {
  constexpr double magic = 0x1.8p52 + 1023;
  const double shifted = x * 1.4426950408889634074 + magic;
  const double n = shifted - magic;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.0;
  const double y = p * bits_as<double>(bits_as<uint64_t>(shifted) << 52);
  return x < -708.39 ? 0.0 : y;
}

// log for a sum of exponentials: 0, a normal number or NaN. Polynomial of Cephes on [sqrt(1/2), sqrt(2)).
LOSSOPS_INLINE float log(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t above = (bits - 0x3f3504f3u) >> 23; // exponent relative to sqrt(1/2), modulo 2^9
  const float e = static_cast<float>(static_cast<int32_t>(above << 23) >> 23);
  const float m = bits_as<float>(bits - (above << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float z = m * m;
  float y = p * m * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  const float r = (m + y) + e * 0.693359375f;
  return x > 0 ? r : (x == 0 ? -std::numeric_limits<float>::infinity() : x);
}

LOSSOPS_INLINE double log(double x) {
  return std::log(x);
}

// tanh by Cephes: an odd polynomial (a rational function in double) near 0, beyond it exp, of an argument
// that is never positive.
LOSSOPS_INLINE float tanh(float x) {
  const float e = exp(-2 * std::fabs(x));
  const float far = (1 - e) / (1 + e);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x;
  const float signed_far = bits_as<float>(bits_as<uint32_t>(far) | (bits_as<uint32_t>(x) & 0x80000000u));
  return std::fabs(x) < 0.625f ? near : signed_far;
}

LOSSOPS_INLINE double tanh(double x) {
  const double e = exp(-2 * std::fabs(x));
  const double far = (1 - e) / (1 + e);
  const double z = x * x;
  const double p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const double q =
      ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  const double near = x * z * (p / q) + x;
  const double signed_far =
      bits_as<double>(bits_as<uint64_t>(far) | (bits_as<uint64_t>(x) & 0x8000000000000000u));
  return std::fabs(x) < 0.625 ? near : signed_far;
}

LOSSOPS_INLINE float bfloat16_to_float(uint16_t h) {
  return bits_as<float>(static_cast<uint32_t>(h) << 16);
}

LOSSOPS_INLINE uint16_t float_to_bfloat16(float x) { // round to nearest, ties to even
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

LOSSOPS_INLINE float half_to_float(uint16_t h) {
  const uint32_t shifted = (h & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + 0x38000000u; // rebias 15 to 127
  const uint32_t inf_nan = normal + 0x38000000u;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(normal + 0x00800000u) - 0x1p-14f);
  const uint32_t magnitude = exponent == 0x0f800000u ? inf_nan : exponent == 0 ? subnormal : normal;
  return bits_as<float>(magnitude | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

LOSSOPS_INLINE uint16_t float_to_half(float x) { // round to nearest, ties to even
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding a power of two whose last place is the half's last place rounds a subnormal in hardware.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t inf_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude >= 0x47800000u ? inf_nan : magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000u));
}

// Storage types: one C++ type for each dtype, so that overloads can widen and round.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

LOSSOPS_INLINE float widen(Half x) {
  return half_to_float(x.bits);
}
LOSSOPS_INLINE float widen(BFloat16 x) {
  return bfloat16_to_float(x.bits);
}
template <class T>
LOSSOPS_INLINE T widen(T x) {
  return x;
}
// Through float, as torch does: a double is rounded twice on its way to 16 bits.
template <class A>
LOSSOPS_INLINE void narrow(A x, Half& out) {
  out.bits = float_to_half(static_cast<float>(x));
}
template <class A>
LOSSOPS_INLINE void narrow(A x, BFloat16& out) {
  out.bits = float_to_bfloat16(static_cast<float>(x));
}
template <class A, class T>
LOSSOPS_INLINE void narrow(A x, T& out) {
  out = static_cast<T>(x);
}

// Whether operands or results of a call are so many that they come from memory, and that results are written
// past the caches: a store that goes into them reads first what was there, and whoever reads the results next
// would not find them there anyway.
LOSSOPS_INLINE bool is_streamed(int64_t elements, DType dtype) {
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  return elements * size >= stream_bytes();
}

// Copies one vector to an aligned address past the caches, where there is an instruction for its size.
template <int64_t bytes>
LOSSOPS_INLINE void stream_vector(const void* from, void* to) {
#if LOSSOPS_X86_KERNELS
#define LOSSOPS_STREAM(BYTES, INSTRUCTION)                                    \
  if constexpr (bytes == BYTES) {                                             \
    typedef long long Vector __attribute__((vector_size(BYTES), may_alias));  \
    INSTRUCTION(static_cast<Vector*>(to), *static_cast<const Vector*>(from)); \
  }
  LOSSOPS_STREAM(16, __builtin_ia32_movntdq)
#if LOSSOPS_VECTOR_BYTES >= 32
  LOSSOPS_STREAM(32, __builtin_ia32_movntdq256)
#endif
#if LOSSOPS_VECTOR_BYTES >= 64
  LOSSOPS_STREAM(64, __builtin_ia32_movntdq512)
#endif
#undef LOSSOPS_STREAM
#else
  std::memcpy(to, from, bytes);
#endif
}

// After the last of them, before another thread may read.
LOSSOPS_INLINE void end_of_stream() {
#if LOSSOPS_X86_KERNELS
  __builtin_ia32_sfence();
#endif
}

// Calls f with a null pointer of the storage type of `dtype`.
template <class F>
LOSSOPS_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16: f(static_cast<Half*>(nullptr)); break;
    case DType::bf16: f(static_cast<BFloat16*>(nullptr)); break;
    case DType::f32: f(static_cast<float*>(nullptr)); break;
    case DType::f64: f(static_cast<double*>(nullptr)); break;
    case DType::u8: f(static_cast<uint8_t*>(nullptr)); break;
    case DType::i32: f(static_cast<int32_t*>(nullptr)); break;
    case DType::i64: f(static_cast<int64_t*>(nullptr)); break;
  }
}

template <class A>
constexpr DType dtype_of = std::is_same_v<A, double> ? DType::f64 : DType::f32;

template <class T, class A>
LOSSOPS_INLINE void load_as(const T* source, int64_t stride, int64_t n, A* __restrict buffer) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(widen(source[i]));
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<A>(widen(source[i * stride]));
  }
}

// The n elements at base[offset + i*stride], widened into `buffer`; where nothing has to be done,
// where they stand.
template <class A>
const A* load(DType dtype, const void* base, int64_t offset, int64_t stride, int64_t n, A* buffer) {
  if (dtype == dtype_of<A> && stride == 1) return static_cast<const A*>(base) + offset;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    load_as(static_cast<const T*>(base) + offset, stride, n, buffer);
  });
  return buffer;
}

// Where the n results for base[offset + i*stride] are to be computed: in place, or in `buffer`,
// from which store() rounds them once, or streams them.
template <class A>
A* destination(DType dtype, void* base, int64_t offset, int64_t stride, A* buffer, bool stream = false) {
  return dtype == dtype_of<A> && stride == 1 && !stream ? static_cast<A*>(base) + offset : buffer;
}

template <class T, class A>
LOSSOPS_INLINE void store_as(const A* __restrict buffer, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow(buffer[i], out[i]);
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) narrow(buffer[i], out[i * stride]);
  }
}

// Computes out[i] by f(i, out[i]) for each i below n. With `stream` results go past the caches, in whole
// vectors of as many elements as one vector of A gives, for what lies in two vectors' stores no load can take
// over from them.
template <class A, class T, class F>
LOSSOPS_INLINE void for_each_result(int64_t n, T* out, bool stream, const F& f) {
  constexpr int64_t lanes = kLanes<A>, bytes = std::min<int64_t>(lanes * sizeof(T) / 2, LOSSOPS_VECTOR_BYTES);
  int64_t i = 0;
  if constexpr (bytes >= 16) {
    const int64_t apart = (-reinterpret_cast<uintptr_t>(out) & (bytes - 1)) / sizeof(T);
    for (; i < (stream ? std::min(apart, n) : 0); ++i) f(i, out[i]);
    for (; i + lanes <= (stream ? n : 0); i += lanes) {
      alignas(64) T results[lanes];
#pragma omp simd
      for (int64_t k = 0; k < lanes; ++k) f(i + k, results[k]);
      for (int64_t k = 0; k < lanes; k += bytes / sizeof(T)) stream_vector<bytes>(results + k, out + i + k);
    }
  }
#pragma omp simd
  for (int64_t k = i; k < n; ++k) f(k, out[k]);
}

template <class A>
void store(DType dtype, const A* values, void* base, int64_t offset, int64_t stride, int64_t n,
           bool stream = false) {
  if (dtype == dtype_of<A> && stride == 1 && !stream) return; // computed in place
  with_type(dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    T* const out = static_cast<T*>(base) + offset;
    if (!stream || stride != 1) return store_as(values, stride, n, out);
    for_each_result<A>(n, out, true,
                       [&](int64_t i, T& result) LOSSOPS_INLINE_LAMBDA { narrow(values[i], result); });
  });
}

template <class A>
A load_one(DType dtype, const void* base, int64_t offset) {
  A value = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    value = static_cast<A>(widen(static_cast<const T*>(base)[offset]));
  });
  return value;
}

template <class A>
void store_one(DType dtype, A value, void* base, int64_t offset) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    narrow(value, static_cast<T*>(base)[offset]);
  });
}

LOSSOPS_INLINE int64_t load_index(DType dtype, const void* base, int64_t offset) {
  if (dtype == DType::i64) return static_cast<const int64_t*>(base)[offset];
  if (dtype == DType::i32) return static_cast<const int32_t*>(base)[offset];
  return static_cast<const uint8_t*>(base)[offset];
}
