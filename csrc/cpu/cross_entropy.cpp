#include "../cross_entropy.h"

#include "isa.h"
#include "parallel.h"

#define LOSSOPS_KERNELS "cross_entropy.inl"
#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

// Rows of a unit of work: enough elements to make its start-up nothing, few enough to share out.
constexpr int64_t kElementsPerUnit = 16384;

// Fewer rows than kFewRows are cut across their classes too, into pieces of at least kChunk.
constexpr int64_t kFewRows = 16, kChunk = 32768, kMaxChunks = 64;

struct Chunks {
  int64_t classes, size, per_row;

  explicit Chunks(const CrossEntropyProblem& a)
      : classes(a.classes), size(std::max(kChunk, (a.classes + kMaxChunks - 1) / kMaxChunks)), per_row(1) {
    const bool along_rows = a.logits.class_stride == 1;
    if (along_rows && a.rows.count < kFewRows) per_row = std::max<int64_t>(1, (classes + size - 1) / size);
  }
  int64_t begin(int64_t chunk) const {
    return chunk * size;
  }
  int64_t end(int64_t chunk) const {
    return std::min(classes, begin(chunk) + size);
  }
};

constexpr int64_t kStateBytes = 4 * sizeof(double);

} // namespace

void launch(const CrossEntropyForward& a) {
  const Isa isa = active_isa();
  double loss[kMaxUnits], weight[kMaxUnits]; // set by the unit they belong to
  const Chunks chunks(a);
  int64_t sums = 0;
  if (chunks.per_row > 1) {
    alignas(double) char states[kFewRows * kMaxChunks * kStateBytes];
    const Units pieces(a.rows.count * chunks.per_row, chunks.size, chunks.size);
    parallel_for_units(pieces, chunks.size, [&](int64_t piece) {
      const int64_t row = piece / chunks.per_row, chunk = piece % chunks.per_row;
      LOSSOPS_CALL(forward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk),
                   states + piece * kStateBytes);
    });
    for (int64_t row = 0; row < a.rows.count; ++row) {
      const char* of_row = states + row * chunks.per_row * kStateBytes;
      loss[row] = weight[row] = 0;
      LOSSOPS_CALL(forward_join, a, row, of_row, kStateBytes, chunks.per_row, loss[row], weight[row]);
    }
    sums = a.rows.count;
  } else {
    const Units units(a.rows.count, a.classes, kElementsPerUnit);
    parallel_for_units(units, a.classes, [&](int64_t unit) {
      loss[unit] = weight[unit] = 0;
      LOSSOPS_CALL(forward_range, a, units.begin(unit), units.end(unit), loss[unit], weight[unit]);
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
    const Units pieces(a.rows.count * chunks.per_row, chunks.size, chunks.size);
    parallel_for_units(pieces, chunks.size, [&](int64_t piece) {
      const int64_t row = piece / chunks.per_row, chunk = piece % chunks.per_row;
      LOSSOPS_CALL(backward_chunk, a, row, chunks.begin(chunk), chunks.end(chunk));
    });
    return;
  }
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(backward_range, a, units.begin(unit), units.end(unit));
  });
}

void launch(const CrossEntropyBackwardBackward& a) {
  const Isa isa = active_isa();
  const Units units(a.rows.count, a.classes, kElementsPerUnit);
  parallel_for_units(units, a.classes, [&](int64_t unit) {
    LOSSOPS_CALL(backward_backward_range, a, units.begin(unit), units.end(unit));
  });
}

} // namespace lossops::cpu
