// PTX instructions as C++: what translated kernels are written in. Names are PTX's own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulator.h"

#define PTX_INLINE static inline __attribute__((always_inline))

// Before as many instructions that are executed all or none of them.
#ifdef EMULATOR_STATISTICS
#define EXECUTED(instructions) (emulator::executed += (instructions))
#else
#define EXECUTED(instructions) ((void)0)
#endif

namespace ptx {

using emulator::Access;
using emulator::Site;

using pred = bool;
using b8 = uint8_t;
using u8 = uint8_t;
using s8 = int8_t;
using b16 = uint16_t;
using u16 = uint16_t;
using s16 = int16_t;
using b32 = uint32_t;
using u32 = uint32_t;
using s32 = int32_t;
using b64 = uint64_t;
using u64 = uint64_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

template <class To, class From>
PTX_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a register is read by its own width");
  return __builtin_bit_cast(To, value); // memcpy would give every use a guarded place on ASan's stack
}

struct bf16 {
  uint16_t pattern;

  bf16() = default;
  explicit bf16(float value) {
    const auto wide = bits<uint32_t>(value);
    const auto nearest_even = wide + 0x7fff + (wide >> 16 & 1);
    pattern = value != value ? 0x7fff : nearest_even >> 16;
  }
  operator float() const {
    return bits<float>(uint32_t(pattern) << 16);
  }
};

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_float = is_half<T> || std::is_floating_point_v<T>;

template <size_t Bytes>
struct UnsignedOf;
template <>
struct UnsignedOf<1> {
  using type = uint8_t;
};
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};
template <class T>
using Unsigned = typename UnsignedOf<sizeof(T)>::type;

// Halves compute in float: its digits are more than twice theirs, so that rounding twice is harmless.
template <class T>
using Wide = std::conditional_t<is_half<T>, float, T>;

// Registers: unsigned integers that instructions read and write as other types

constexpr uint64_t kJunk = 0xdeadbeefdeadbeef; // in registers that were never written

template <class T, class Register>
PTX_INLINE T get(Register value) {
  if constexpr (is_float<T>) {
    return bits<T>(static_cast<Unsigned<T>>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Signed values narrower than the register are extended by their sign.
template <class T, class Register>
PTX_INLINE void set(Register& target, T value) {
  if constexpr (is_float<T>) {
    target = bits<Unsigned<T>>(value);
  } else {
    target = static_cast<Register>(value);
  }
}

template <class T>
PTX_INLINE uint64_t address(T* object) {
  return reinterpret_cast<uint64_t>(object);
}

// Memory

template <class T>
PTX_INLINE T load(const char* from) {
  return *reinterpret_cast<const T*>(from);
}

template <class T>
PTX_INLINE void store(char* to, T value) {
  *reinterpret_cast<T*>(to) = value;
}

template <unsigned Bytes>
PTX_INLINE char* global_address(Site& site, uint64_t address, Access access) {
  const bool null_page = address < 4096;
  if (__builtin_expect((address & (Bytes - 1)) != 0 || null_page, 0)) {
    emulator::fail_address(site, address, Bytes);
  }
#ifdef EMULATOR_STATISTICS
  emulator::count_global(site, address, Bytes, access);
#else
  (void)access;
#endif
  return reinterpret_cast<char*>(address);
}

template <class T>
PTX_INLINE T load_atomic(const char* from) {
  emulator::atomic_access(from);
  return bits<T>(__atomic_load_n(reinterpret_cast<const Unsigned<T>*>(from), __ATOMIC_RELAXED));
}

template <class T>
PTX_INLINE void store_atomic(char* to, T value) {
  emulator::atomic_access(to);
  __atomic_store_n(reinterpret_cast<Unsigned<T>*>(to), bits<Unsigned<T>>(value), __ATOMIC_RELAXED);
}

// Replaces the value at `to` by operation(value), and returns what was there.
template <class T, class Operation>
PTX_INLINE T atomic_update(char* to, Operation operation) {
  using Word = Unsigned<T>;
  emulator::atomic_access(to);
  auto* word = reinterpret_cast<Word*>(to);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  Word fresh;
  do {
    fresh = bits<Word>(static_cast<T>(operation(bits<T>(old))));
  } while (!__atomic_compare_exchange_n(word, &old, fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return bits<T>(old);
}

// Conversion and rounding

template <class To, class From>
PTX_INLINE To convert(From value) {
  if constexpr (std::is_same_v<To, bf16>) {
    return bf16(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<Wide<From>>(value));
  }
}

// Out of range saturates, NaN becomes 0.
template <class To>
PTX_INLINE To to_integer(double value) {
  using Limits = std::numeric_limits<To>;
  if (value != value) return 0;
  if (value <= static_cast<double>(Limits::min())) return Limits::min();
  if (value >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<To>(value);
}

template <class To, class From>
PTX_INLINE To saturate_to(From value) {
  using Limits = std::numeric_limits<To>;
  const auto wide = static_cast<__int128>(value);
  if (wide < static_cast<__int128>(Limits::min())) return Limits::min();
  if (wide > static_cast<__int128>(Limits::max())) return Limits::max();
  return static_cast<To>(value);
}

// The next float towards -infinity.
PTX_INLINE f32 next_down(f32 value) {
  if (value == 0) return -std::numeric_limits<f32>::denorm_min();
  return bits<f32>(bits<uint32_t>(value) + (value > 0 ? -1 : 1));
}

enum class Rounding { down, up, zero };

// `sum` + `error` as a float, rounded in a direction.
template <Rounding Direction>
PTX_INLINE f32 round_directed(double sum, double error) {
  const auto nearest = static_cast<f32>(sum);
  const double excess = (nearest - sum) - error;
  const bool down = Direction == Rounding::down || (Direction == Rounding::zero && nearest > 0);
  if (down && excess > 0) return next_down(nearest);
  const bool up = Direction == Rounding::up || (Direction == Rounding::zero && nearest < 0);
  if (up && excess < 0) return -next_down(-nearest);
  return nearest;
}

// a * b + c: the product is exact in double, and what the sum loses is found as in Knuth's TwoSum.
template <Rounding Direction>
PTX_INLINE f32 fma_directed(f32 a, f32 b, f32 c) {
  const double product = static_cast<double>(a) * b;
  const double sum = product + c;
  const double added = sum - product;
  const double error = (product - (sum - added)) + (c - added);
  return round_directed<Direction>(sum, error);
}

// Subnormal numbers become zero (.ftz).
PTX_INLINE f32 flush(f32 value) {
  return std::fabs(value) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, value) : value;
}

// To 0..1, NaN to 0 (.sat).
template <class T>
PTX_INLINE T saturate(T value) {
  if (value > T(1.0f)) return T(1.0f);
  return value >= T(0.0f) ? value : T(0.0f);
}

// Arithmetic: integers wrap

template <class T, class Operation>
PTX_INLINE T calculate(T a, T b, Operation operation) {
  if constexpr (is_float<T>) {
    return static_cast<T>(operation(static_cast<Wide<T>>(a), static_cast<Wide<T>>(b)));
  } else {
    return static_cast<T>(operation(static_cast<uint64_t>(a), static_cast<uint64_t>(b)));
  }
}

template <class T>
PTX_INLINE T add(T a, T b) {
  return calculate(a, b, [](auto x, auto y) { return x + y; });
}

template <class T>
PTX_INLINE T sub(T a, T b) {
  return calculate(a, b, [](auto x, auto y) { return x - y; });
}

template <class T>
PTX_INLINE T mul(T a, T b) {
  return calculate(a, b, [](auto x, auto y) { return x * y; });
}

template <class T>
PTX_INLINE T mul_hi(T a, T b) {
  using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Product>(a) * static_cast<Product>(b)) >> (8 * sizeof(T)));
}

// Division by zero gives all ones on a GPU: in a kernel it is a mistake.
template <class T>
PTX_INLINE T div(Site& site, T a, T b) {
  if (b == 0) emulator::fail(&site, "integer division by zero");
  if (std::is_signed_v<T> && b == T(-1)) return static_cast<T>(0 - static_cast<uint64_t>(a)); // no overflow
  return static_cast<T>(a / b);
}

template <class T>
PTX_INLINE T rem(Site& site, T a, T b) {
  if (b == 0) emulator::fail(&site, "integer division by zero");
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return static_cast<T>(a % b);
}

template <class T>
PTX_INLINE T divide(T a, T b) {
  return static_cast<T>(static_cast<Wide<T>>(a) / static_cast<Wide<T>>(b));
}

template <class T>
PTX_INLINE T fma(T a, T b, T c) {
  if constexpr (std::is_same_v<T, f32>) {
    return __builtin_fmaf(a, b, c);
  } else {
    const double result =
        __builtin_fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
    return static_cast<T>(static_cast<Wide<T>>(result));
  }
}

template <class T>
PTX_INLINE bool is_nan(T value) {
  if constexpr (is_float<T>) {
    return value != value;
  } else {
    return false;
  }
}

template <class T>
PTX_INLINE bool is_negative(T value) {
  return (bits<Unsigned<T>>(value) >> (8 * sizeof(T) - 1)) != 0;
}

// -0 is less than +0, and a number wins over NaN.
template <class T>
PTX_INLINE T min(T a, T b) {
  if (is_nan(a)) return b;
  if (is_nan(b)) return a;
  if constexpr (is_float<T>) {
    if (a == b) return is_negative(a) ? a : b;
  }
  return b < a ? b : a;
}

template <class T>
PTX_INLINE T max(T a, T b) {
  if (is_nan(a)) return b;
  if (is_nan(b)) return a;
  if constexpr (is_float<T>) {
    if (a == b) return is_negative(a) ? b : a;
  }
  return a < b ? b : a;
}

// .NaN: NaN wins.
template <class T>
PTX_INLINE T min_nan(T a, T b) {
  if (is_nan(a) || is_nan(b)) return T(std::numeric_limits<float>::quiet_NaN());
  return min(a, b);
}

template <class T>
PTX_INLINE T max_nan(T a, T b) {
  if (is_nan(a) || is_nan(b)) return T(std::numeric_limits<float>::quiet_NaN());
  return max(a, b);
}

template <class T>
PTX_INLINE T neg(T value) {
  if constexpr (is_float<T>) {
    const auto sign = Unsigned<T>(Unsigned<T>(1) << (8 * sizeof(T) - 1));
    return bits<T>(static_cast<Unsigned<T>>(bits<Unsigned<T>>(value) ^ sign));
  } else {
    return static_cast<T>(0 - static_cast<uint64_t>(value));
  }
}

template <class T>
PTX_INLINE T abs(T value) {
  return is_negative(value) ? neg(value) : value;
}

template <class T>
PTX_INLINE T copysign(T sign, T magnitude) {
  return is_negative(sign) == is_negative(magnitude) ? magnitude : neg(magnitude);
}

// The .approx forms are computed exactly, or nearly.
template <class T, class Function>
PTX_INLINE T apply(T value, Function function) {
  return static_cast<T>(function(static_cast<Wide<T>>(value)));
}

template <class T>
PTX_INLINE T ex2(T value) {
  return apply(value, [](auto x) { return std::exp2(x); });
}

template <class T>
PTX_INLINE T lg2(T value) {
  return apply(value, [](auto x) { return std::log2(x); });
}

template <class T>
PTX_INLINE T sqrt(T value) {
  return apply(value, [](auto x) { return std::sqrt(x); });
}

template <class T>
PTX_INLINE T rsqrt(T value) {
  return apply(value, [](auto x) { return 1 / std::sqrt(x); });
}

template <class T>
PTX_INLINE T rcp(T value) {
  return apply(value, [](auto x) { return 1 / x; });
}

template <class T>
PTX_INLINE T tanh(T value) {
  return apply(value, [](auto x) { return std::tanh(x); });
}

template <class T>
PTX_INLINE T sin(T value) {
  return apply(value, [](auto x) { return std::sin(x); });
}

template <class T>
PTX_INLINE T cos(T value) {
  return apply(value, [](auto x) { return std::cos(x); });
}

// Two halves in a 32-bit register

template <class T>
PTX_INLINE T half_of(uint32_t pair, int index) {
  return bits<T>(static_cast<uint16_t>(pair >> (16 * index)));
}

template <class T>
PTX_INLINE uint32_t pair(T low, T high) {
  return bits<uint16_t>(low) | static_cast<uint32_t>(bits<uint16_t>(high)) << 16;
}

template <class T, class Operation, class... Pairs>
PTX_INLINE uint32_t for_both(Operation operation, Pairs... pairs) {
  return pair<T>(operation(half_of<T>(pairs, 0)...), operation(half_of<T>(pairs, 1)...));
}

// Comparison. u: true where an operand is NaN

template <class T>
PTX_INLINE bool eq(T a, T b) {
  return a == b;
}

template <class T>
PTX_INLINE bool ne(T a, T b) {
  return a != b && !is_nan(a) && !is_nan(b);
}

template <class T>
PTX_INLINE bool lt(T a, T b) {
  return a < b;
}

template <class T>
PTX_INLINE bool le(T a, T b) {
  return a <= b;
}

template <class T>
PTX_INLINE bool gt(T a, T b) {
  return a > b;
}

template <class T>
PTX_INLINE bool ge(T a, T b) {
  return a >= b;
}

template <class T>
PTX_INLINE bool equ(T a, T b) {
  return !ne(a, b);
}

template <class T>
PTX_INLINE bool neu(T a, T b) {
  return a != b;
}

template <class T>
PTX_INLINE bool ltu(T a, T b) {
  return !(a >= b);
}

template <class T>
PTX_INLINE bool leu(T a, T b) {
  return !(a > b);
}

template <class T>
PTX_INLINE bool gtu(T a, T b) {
  return !(a <= b);
}

template <class T>
PTX_INLINE bool geu(T a, T b) {
  return !(a < b);
}

template <class T>
PTX_INLINE bool num(T a, T b) {
  return !is_nan(a) && !is_nan(b);
}

template <class T>
PTX_INLINE bool nan(T a, T b) {
  return is_nan(a) || is_nan(b);
}

// Bits. A shift by the width or more shifts everything out

template <class T>
PTX_INLINE T shl(T value, uint32_t count) {
  return count >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<uint64_t>(value) << count);
}

template <class T>
PTX_INLINE T shr(T value, uint32_t count) {
  const uint32_t width = 8 * sizeof(T);
  return static_cast<T>(value >> std::min(count, width - 1) >> (count >= width ? 1 : 0));
}

PTX_INLINE uint32_t shf_l(uint32_t low, uint32_t high, uint32_t count) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>((both << count) >> 32);
}

PTX_INLINE uint32_t shf_r(uint32_t low, uint32_t high, uint32_t count) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>(both >> count);
}

template <class T>
PTX_INLINE uint32_t clz(T value) {
  return value == 0 ? 8 * sizeof(T) : __builtin_clzll(value) - (64 - 8 * sizeof(T));
}

template <class T>
PTX_INLINE T brev(T value) {
  T reversed = 0;
  for (unsigned bit = 0; bit < 8 * sizeof(T); ++bit)
    reversed |= (value >> bit & 1) << (8 * sizeof(T) - 1 - bit);
  return reversed;
}

// The highest bit that differs from the sign, or ~0.
template <class T>
PTX_INLINE uint32_t bfind(T value) {
  const auto pattern = static_cast<Unsigned<T>>(is_negative(value) && std::is_signed_v<T> ? ~value : value);
  return pattern == 0 ? ~0u : 8 * sizeof(T) - 1 - clz(pattern);
}

template <class T>
PTX_INLINE uint32_t bfind_shift(T value) {
  const uint32_t bit = bfind(value);
  return bit == ~0u ? bit : 8 * sizeof(T) - 1 - bit;
}

template <class T>
PTX_INLINE T bfe(T value, uint32_t position, uint32_t length) {
  const uint32_t width = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t last = std::min(position + length, width) - 1;
  const bool fill = std::is_signed_v<T> && (static_cast<uint64_t>(value) >> last & 1) != 0;
  const auto field = static_cast<uint64_t>(shr(static_cast<Unsigned<T>>(value), position));
  const uint64_t kept =
      length >= 64 ? ~0ull : (1ull << std::min(length, last + 1 - std::min(position, last + 1))) - 1;
  return static_cast<T>(fill ? field | ~kept : field & kept);
}

template <class T>
PTX_INLINE T bfi(T field, T into, uint32_t position, uint32_t length) {
  const T ones = shl(static_cast<T>(~T(0)), length & 0xff);
  const T mask = shl(static_cast<T>(~ones), position & 0xff);
  return static_cast<T>((shl(field, position & 0xff) & mask) | (into & ~mask));
}

// Bytes chosen by the nibbles of `selector`; bit 3 of a nibble repeats the byte's sign.
PTX_INLINE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t source = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t choice = selector >> (4 * byte) & 15;
    uint32_t value = source >> (8 * (choice & 7)) & 0xff;
    if (choice & 8) value = value & 0x80 ? 0xff : 0;
    result |= value << (8 * byte);
  }
  return result;
}

// Any function of three bits, as a table.
template <unsigned Table>
PTX_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  if (Table & 0x01) result |= ~a & ~b & ~c;
  if (Table & 0x02) result |= ~a & ~b & c;
  if (Table & 0x04) result |= ~a & b & ~c;
  if (Table & 0x08) result |= ~a & b & c;
  if (Table & 0x10) result |= a & ~b & ~c;
  if (Table & 0x20) result |= a & ~b & c;
  if (Table & 0x40) result |= a & b & ~c;
  if (Table & 0x80) result |= a & b & c;
  return result;
}

// cp.async

PTX_INLINE void cp_async(Site& site, uint64_t to, uint64_t from, unsigned bytes, unsigned source_bytes) {
  if (((to | from) & (bytes - 1)) != 0)
    emulator::fail_address(site, (to & (bytes - 1)) != 0 ? to : from, bytes);
#ifdef EMULATOR_STATISTICS
  emulator::count_global(site, from, bytes, Access::load);
#endif
  emulator::async_copy({&site, to, reinterpret_cast<const char*>(from), bytes, source_bytes});
}

// Here and not in the run time, for the sanitizers to see the copies.
PTX_INLINE void cp_async_wait(unsigned allowed) {
  emulator::AsyncCopy copy;
  while (emulator::async_complete(allowed, copy)) {
    char* to = emulator::shared_address(*copy.site, copy.to, copy.bytes, Access::store);
    for (unsigned i = 0; i < copy.bytes; ++i) to[i] = i < copy.source_bytes ? copy.from[i] : 0;
  }
}

} // namespace ptx
