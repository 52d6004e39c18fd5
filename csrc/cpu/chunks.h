// How cross-entropy's rows are cut into work for the threads.
#pragma once

#include "../cross_entropy.h"
#include "trace.h"

namespace lossops::cpu {

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
  // The pieces of all rows, as work for threads.
  Units pieces(int64_t rows) const {
    return Units(rows * per_row, size, size);
  }
};

inline void trace_rows(const char* kernel, Isa isa, const CrossEntropyProblem& a, const char* way) {
  trace(kernel, isa, Units(a.rows.count, a.classes, kElementsPerUnit), a.classes,
        [&] { return std::string(way); });
}

inline void trace_chunks(const char* kernel, Isa isa, int64_t rows, const Chunks& chunks) {
  trace(kernel, isa, chunks.pieces(rows), chunks.size,
        [&] { return "rows cut into " + std::to_string(chunks.per_row) + " pieces"; });
}

// Calls f(row, chunk) for every piece.
template <class F>
void for_each_chunk(int64_t rows, const Chunks& chunks, const F& f) {
  parallel_for_units(chunks.pieces(rows), chunks.size,
                     [&](int64_t piece) { f(piece / chunks.per_row, piece % chunks.per_row); });
}

} // namespace lossops::cpu
