// Stacks that run in turn on one CPU thread, and what the sanitizers have to be told about them.
#pragma once

#include <cstddef>

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fibre);
void __tsan_switch_to_fiber(void* fibre, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

#if defined(EMULATOR_TSAN)

// The run time is not instrumented, but libc is: its memcpy and malloc are no accesses of the program.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};

inline void acquire(void* object) {
  __tsan_acquire(object);
}
inline void release(void* object) {
  __tsan_release(object);
}

constexpr bool kTsan = true;

#else

struct Quiet {
  ~Quiet() {} // not trivial, or every use is a warning
};
inline void acquire(void*) {}
inline void release(void*) {}

constexpr bool kTsan = false;

#endif

struct Fibre {
  void* stack_pointer = nullptr;
  const void* stack = nullptr; // lowest address
  size_t stack_bytes = 0;
  void* asan_frames = nullptr;
  void* tsan = nullptr;
};

// From its top, `entry` runs when the fibre is first switched to; it must not return.
void prepare_fibre(Fibre& fibre, char* stack, size_t bytes, void (*entry)());

// `ends`: nothing will switch back to `from` before it is prepared again.
void switch_fibre(Fibre& from, Fibre& to, bool ends);

// To be called first in an entry. Tells where the stack lies that the switch came from.
void enter_fibre(Fibre& from);

} // namespace emulator
