// What the CPU's launches tell lossops.explain().
#pragma once

#include "../trace.h"
#include "isa.h"
#include "parallel.h"

namespace lossops::cpu {

// `way` is only built where somebody asks.
template <class Way>
void trace(const char* kernel, Isa isa, const Units& units, int64_t elements_per_position, const Way& way) {
  if (!tracing()) return;
  const int64_t grain = grain_of(units, elements_per_position);
  record({kernel, way(), isa_name(isa), std::max<int64_t>(1, (units.count + grain - 1) / grain)});
}

} // namespace lossops::cpu
