#include "chunks.h"

#define LOSSOPS_KERNELS "cross_entropy_rows.inl"
#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

constexpr int64_t kStateBytes = 6 * sizeof(double);

const char* way_of(const CrossEntropyProblem& a) {
  return baseline::along_rows(a) ? "along each row" : "across tiles of neighbouring rows";
}

} // namespace

void launch(const CrossEntropyRowsForward& a) {
  const Isa isa = active_isa();
  const Chunks chunks(a);
  if (chunks.per_row > 1) {
    trace_chunks("cross_entropy_rows_forward", isa, a.rows.count, chunks);
    alignas(double) char states[kFewRows * kMaxChunks * kStateBytes];
    for_each_chunk(a.rows.count, chunks, [&](int64_t row, int64_t chunk) {
      LOSSOPS_CALL(rows_forward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk),
                   states + (row * chunks.per_row + chunk) * kStateBytes);
    });
    for (int64_t row = 0; row < a.rows.count; ++row) {
      const char* of_row = states + row * chunks.per_row * kStateBytes;
      LOSSOPS_CALL(rows_forward_join, a, row, of_row, kStateBytes, chunks.per_row);
    }
    return;
  }
  trace_rows("cross_entropy_rows_forward", isa, a, way_of(a));
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(rows_forward_range, a, units.begin(unit), units.end(unit));
  });
}

void launch(const CrossEntropyRowsBackward& a) {
  const Isa isa = active_isa();
  const Chunks chunks(a);
  if (chunks.per_row > 1) {
    trace_chunks("cross_entropy_rows_backward", isa, a.rows.count, chunks);
    double scale_sums[kFewRows * kMaxChunks]; // each set by the piece it belongs to
    for_each_chunk(a.rows.count, chunks, [&](int64_t row, int64_t chunk) {
      LOSSOPS_CALL(rows_backward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk),
                   scale_sums[row * chunks.per_row + chunk]);
    });
    for (int64_t row = 0; row < (a.grad_scale == nullptr ? 0 : a.rows.count); ++row) {
      double sum = 0;
      for (int64_t k = 0; k < chunks.per_row; ++k) sum += scale_sums[row * chunks.per_row + k];
      LOSSOPS_CALL(put_grad_scale, a, row, sum);
    }
    return;
  }
  trace_rows("cross_entropy_rows_backward", isa, a, way_of(a));
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units<Order::descending>(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(rows_backward_range, a, units.begin(unit), units.end(unit));
  });
}

void launch(const CrossEntropyRowsBackwardBackward& a) {
  const Isa isa = active_isa();
  trace_rows("cross_entropy_rows_backward_backward", isa, a, "along each row");
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(rows_backward_backward_range, a, units.begin(unit), units.end(unit));
  });
}

} // namespace lossops::cpu
