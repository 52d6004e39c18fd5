// Threads for the CPU kernels: torch's own, so that torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../layout.h"

namespace lossops::cpu {

// Elements that one thread should have before a second is worth waking (a wake-up costs about 5 us).
constexpr int64_t kElementsPerThread = 32768;

// Units that one thread takes at least.
inline int64_t grain_of(const Units& units, int64_t elements_per_position) {
  const int64_t elements_per_unit =
      std::max<int64_t>(1, units.per_unit * std::max<int64_t>(1, elements_per_position));
  return std::max<int64_t>(1, kElementsPerThread / elements_per_unit);
}

// The order in which a thread takes its units. A backward pass begins with what the forward read last and
// the caches may still hold.
enum class Order { ascending, descending };

// Calls body(unit) for every unit of work.
template <Order order = Order::ascending, class F>
void parallel_for_units(const Units& units, int64_t elements_per_position, const F& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(order == Order::ascending ? i : begin + (end - 1 - i));
  };
  const int64_t grain = grain_of(units, elements_per_position);
  if (units.count <= grain) {
    run(0, units.count);
  } else {
    torch::stable::parallel_for(0, units.count, grain, run);
  }
}

} // namespace lossops::cpu
