#include "../mse.h"

#include "trace.h"

#define LOSSOPS_KERNELS "mse.inl"
#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

constexpr int64_t kElementsPerUnit = 16384;

void trace_elements(const char* kernel, Isa isa, const Units& units, const MSEProblem& a) {
  trace(kernel, isa, units, 1, [&]() -> std::string {
    return a.elements.dims <= 1 ? "one run of elements" : "runs of elements that lie apart";
  });
}

} // namespace

void launch(const MSEForward& a, const MSEBackward* gradient) {
  const Isa isa = active_isa();
  double sums[kMaxUnits], weights[kMaxUnits]; // set by the unit they belong to
  const Units units(a.elements.count, 1, kElementsPerUnit);
  const char* const kernel = a.input_tangent.data != nullptr ? "mse_jvp"
                             : gradient != nullptr           ? "mse_forward_backward"
                                                             : "mse_forward";
  trace_elements(kernel, isa, units, a);
  parallel_for_units(units, 1, [&](int64_t unit) {
    sums[unit] = weights[unit] = 0;
    LOSSOPS_CALL(forward_range, a, units.begin(unit), units.end(unit), sums[unit], weights[unit]);
    if (gradient != nullptr) {
      LOSSOPS_CALL(backward_range, *gradient, units.begin(unit), units.end(unit));
    }
  });
  double sum = 0, weight = 0;
  for (int64_t i = 0; i < units.count; ++i) {
    sum += sums[i];
    weight += weights[i];
  }
  *a.normalizer = weight;
  if (a.reduction == Reduction::mean) sum /= weight;
  if (a.reduction != Reduction::none) baseline::store_one(a.out.dtype, sum, a.out.data, 0);
}

void launch(const MSEBackward& a) {
  const Isa isa = active_isa();
  const Units units(a.elements.count, 1, kElementsPerUnit);
  trace_elements("mse_backward", isa, units, a);
  parallel_for_units(
      units, 1, [&](int64_t unit) { LOSSOPS_CALL(backward_range, a, units.begin(unit), units.end(unit)); });
}

} // namespace lossops::cpu
