// Fences and atomics as TSan is to see them. What a thread did before its last fence is published by its
// later atomics; what it reads by an atomic is acquired by its next fence. Anything weaker than that stays a
// race.
#include "state.h"

#if defined(EMULATOR_TSAN)

#include <unordered_map>

namespace emulator {

struct AtomicObject {
  char published;
  void* helper; // a fibre that publishes without acquiring what the thread knows beyond its fence
};

namespace {

std::unordered_map<const void*, AtomicObject> atomics;

} // namespace

void fence() {
  const Quiet quiet;
  auto& fences = state.running->fences;
  release(&fences.published);
  fences.fenced = true;
  for (auto* object : fences.read) acquire(&object->published);
  fences.read.clear();
}

void atomic_access(const void* address) {
  const Quiet quiet;
  constexpr unsigned kOrdersNothing = 1;
  Thread& self = *state.running;
  AtomicObject& object = atomics[address];
  if (object.helper == nullptr) object.helper = __tsan_create_fiber(0);
  if (self.fences.fenced) {
    __tsan_switch_to_fiber(object.helper, kOrdersNothing);
    acquire(&self.fences.published);
    release(&object.published);
    __tsan_switch_to_fiber(self.fibre.tsan, kOrdersNothing);
  }
  self.fences.read.push_back(&object);
}

void reset_order() {
  for (auto& [address, object] : atomics) {
    if (object.helper != nullptr) __tsan_destroy_fiber(object.helper);
  }
  atomics.clear();
}

} // namespace emulator

#else

void emulator::reset_order() {}

#endif
