#include <numeric>

#include "chunks.h"

#define LOSSOPS_KERNELS "cross_entropy.inl"
#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

constexpr int64_t kStateBytes = 4 * sizeof(double);

const char* way_of(const CrossEntropyProblem& a) {
  return baseline::along_rows(a) ? "along each row" : "across tiles of neighbouring rows";
}

const char* way_of(const CrossEntropyBackward& a) {
  if (!baseline::along_rows(a) && baseline::is_flat(a)) return "short rows as they lie";
  return way_of(static_cast<const CrossEntropyProblem&>(a));
}

} // namespace

double weigh_rows(const CrossEntropyForward& a) {
  const Isa isa = active_isa();
  double weight[kMaxUnits]; // set by the unit they belong to
  const Units units =
      Chunks(a).per_row > 1 ? Units(a.rows.count, 1, 1) : Units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units(units, 1, [&](int64_t unit) {
    weight[unit] = 0;
    LOSSOPS_CALL(weigh_range, a, units.begin(unit), units.end(unit), weight[unit]);
  });
  return std::accumulate(weight, weight + units.count, 0.0);
}

void launch(const CrossEntropyForward& a, const CrossEntropyBackward* gradient) {
  const Isa isa = active_isa();
  double loss[kMaxUnits], weight[kMaxUnits]; // set by the unit they belong to
  const Chunks chunks(a);
  int64_t sums = 0;
  if (chunks.per_row > 1) {
    alignas(double) char states[kFewRows * kMaxChunks * kStateBytes];
    trace_chunks("cross_entropy_forward", isa, a.rows.count, chunks);
    for_each_chunk(a.rows.count, chunks, [&](int64_t row, int64_t chunk) {
      LOSSOPS_CALL(forward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk),
                   states + (row * chunks.per_row + chunk) * kStateBytes);
    });
    for (int64_t row = 0; row < a.rows.count; ++row) {
      const char* of_row = states + row * chunks.per_row * kStateBytes;
      loss[row] = weight[row] = 0;
      LOSSOPS_CALL(forward_join, a, row, of_row, kStateBytes, chunks.per_row, loss[row], weight[row]);
    }
    sums = a.rows.count;
    if (gradient != nullptr) launch(*gradient);
  } else {
    trace_rows(gradient == nullptr ? "cross_entropy_forward" : "cross_entropy_forward_backward", isa, a,
               way_of(a));
    const Units units(a.rows.count, a.classes, kElementsPerUnit);
    parallel_for_units(units, a.classes, [&](int64_t unit) {
      loss[unit] = weight[unit] = 0;
      if (gradient == nullptr) {
        LOSSOPS_CALL(forward_range, a, units.begin(unit), units.end(unit), loss[unit], weight[unit]);
      } else {
        LOSSOPS_CALL(forward_backward_range, a, *gradient, units.begin(unit), units.end(unit), loss[unit],
                     weight[unit]);
      }
    });
    sums = units.count;
  }
  double loss_sum = 0, weight_sum = 0;
  for (int64_t i = 0; i < sums; ++i) {
    loss_sum += loss[i];
    weight_sum += weight[i];
  }
  *a.normalizer = weight_sum;
  if (a.reduction == Reduction::mean) loss_sum /= weight_sum;
  if (a.reduction != Reduction::none) baseline::store_one(a.loss_dtype, loss_sum, a.loss, 0);
}

void launch(const CrossEntropyBackward& a) {
  const Isa isa = active_isa();
  const Chunks chunks(a);
  if (chunks.per_row > 1) {
    trace_chunks("cross_entropy_backward", isa, a.rows.count, chunks);
    for_each_chunk(a.rows.count, chunks, [&](int64_t row, int64_t chunk) {
      LOSSOPS_CALL(backward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk));
    });
    return;
  }
  trace_rows("cross_entropy_backward", isa, a, way_of(a));
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units<Order::descending>(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(backward_range, a, units.begin(unit), units.end(unit));
  });
}

} // namespace lossops::cpu
