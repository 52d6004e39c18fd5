#include "fibre.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the calling convention keeps, and takes the other stack's. The floating-point control words are
// the same for all.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

void prepare_fibre(Fibre& fibre, char* stack, size_t bytes, void (*entry)()) {
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(stack, bytes); // of frames that were left for good
#endif
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + bytes - 16); // entry sees the alignment that a call leaves
  *--top = nullptr;                                          // it has nowhere to return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
  fibre.stack = stack;
  fibre.stack_bytes = bytes;
  fibre.asan_frames = nullptr;
}

void switch_fibre(Fibre& from, Fibre& to, bool ends) {
  (void)ends;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_frames, to.stack, to.stack_bytes);
#endif
#if defined(EMULATOR_TSAN)
  constexpr unsigned kOrdersNothing = 1;
  __tsan_switch_to_fiber(to.tsan, kOrdersNothing);
#endif
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.asan_frames, nullptr, nullptr);
#endif
}

void enter_fibre(Fibre& from) {
  (void)from;
#if defined(EMULATOR_ASAN)
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (from.stack == nullptr) { // of the launching thread, which is the first to switch
    from.stack = stack;
    from.stack_bytes = bytes;
  }
#endif
}

} // namespace emulator
