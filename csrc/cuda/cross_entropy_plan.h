// Which way through the logits a call takes.
#pragma once

#include <algorithm>
#include <string>

#include "../trace.h"
#include "cross_entropy.cuh"

namespace lossops::cuda {

// Every tensor with a class dimension that a call has; what it has not is absent.
struct ClassTensors {
  const CrossEntropyProblem& problem;
  struct Entry {
    ClassTensor tensor;
    CrossEntropyOperand operand;
  } entries[5];
  int count = 0;

  explicit ClassTensors(const CrossEntropyForward& a) : problem(a) {
    take(a.logits, kLogits);
    if (!a.index_target()) take(a.target, kTarget);
  }
  explicit ClassTensors(const CrossEntropyBackward& a) : problem(a) {
    take(a.logits, kLogits);
    if (!a.index_target()) take(a.target, kTarget);
    take(a.grad_logits, kGradLogits);
    take(a.grad_target, kGradTarget);
  }

  explicit ClassTensors(const CrossEntropyRowsForward& a) : problem(a) {
    take(a.logits, kLogits);
    if (!a.index_target()) take(a.target, kTarget);
  }
  explicit ClassTensors(const CrossEntropyRowsBackward& a) : problem(a) {
    take(a.logits, kLogits);
    if (!a.index_target()) take(a.target, kTarget);
    take(a.grad_logits, kGradLogits);
    take(a.grad_target, kGradTarget);
  }

  template <class Test>
  bool all(const Test& test) const {
    return std::all_of(entries, entries + count, test);
  }
  bool one_dtype() const {
    return all([&](const Entry& e) { return e.tensor.dtype == entries[0].tensor.dtype; }) &&
           problem.use_double == (entries[0].tensor.dtype == DType::f64);
  }
  bool along_classes() const {
    return all([](const Entry& e) { return e.tensor.class_stride == 1; });
  }
  // Whether packs of neighbouring rows can be moved: they lie side by side and every pack is aligned.
  bool rows_in_packs(int64_t pack) const {
    const auto& rows = problem.rows;
    if (rows.inner_size() % pack != 0) return false;
    return all([&](const Entry& e) {
      if (rows.inner_stride(e.operand) != 1 || e.tensor.class_stride % pack != 0) return false;
      for (int d = 0; d < rows.dims - 1; ++d)
        if (rows.stride[e.operand][d] % pack != 0) return false;
      return reinterpret_cast<uintptr_t>(e.tensor.data) % 16 == 0;
    });
  }
  // Whether all rows stand one behind the other without a gap.
  bool contiguous() const {
    return along_classes() && problem.rows.dims <= 1 && all([&](const Entry& e) {
             return problem.rows.count == 1 || problem.rows.inner_stride(e.operand) == problem.classes;
           });
  }

 private:
  void take(const ClassTensor& t, CrossEntropyOperand operand) {
    if (t.data != nullptr) entries[count++] = {t, operand};
  }
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The ways through the logits, chosen by shape and strides alone: results do not depend on the device.
struct Plan {
  enum Way { kByBlock, kByWarp, kByLanes, kShort, kTiles } way;
  bool typed; // the kernel knows the dtype; else it reads elements one by one
  // The row functions have fewer ways, for the compiler's time: not kByLanes, and kTiles of single rows.
  bool few_ways;
  bool gives_sums; // each block, for another kernel to add up
  Rows rows{1, 1, 1};
  Tiling tiling{1, 1, false};
  ShortRows short_rows{1, 1, 1};
  int64_t blocks = 0;

  // Rows longer than this are worth a block, shorter than kLanesBytes no more than eight lanes of a warp.
  static constexpr int64_t kBlockClasses = 1024, kLanesBytes = 512;
  // Of rows for each warp of a block whose sums nobody has to add up: more take longer to come to an end
  // together. 65536 x 1000 in float32 take 185 us on an H100; 200, were there kMaxWarpBlocks.
  static constexpr int64_t kWarpBytes = 6144;
  // A wave on the largest GPUs of today (148 multiprocessors) at eight blocks each; fewer rows are cut
  // into slices until there are as many, if each still has kMinSlice classes.
  static constexpr int64_t kWaveBlocks = 8 * 148, kMinSlice = 4096, kMaxSlice = int64_t{1} << 30;

  Plan(const ClassTensors& tensors, bool few_ways, bool gives_sums)
      : few_ways(few_ways), gives_sums(gives_sums) {
    const CrossEntropyProblem& a = tensors.problem;
    typed = tensors.one_dtype();
    constexpr int64_t kFewRows = 8; // side by side: less than a sector
    const int64_t row_bytes = a.classes * bytes_of(a.logits.dtype);
    if (typed && a.index_target() && a.classes > 0 && tensors.contiguous() && row_bytes <= kShortRowBytes) {
      plan_short_rows(a);
    } else if (a.logits.class_stride != 1 && a.rows.inner_stride(kLogits) == 1 &&
               a.rows.inner_size() >= kFewRows && a.classes <= kMaxSlice) { // tiles index classes in 32 bits
      plan_tiles(tensors);
    } else {
      typed = typed && tensors.along_classes();
      plan_rows(a);
    }
  }

  void plan_rows(const CrossEntropyProblem& a) {
    const bool few = typed && !few_ways && a.classes * bytes_of(a.logits.dtype) <= kLanesBytes;
    way = a.classes > kBlockClasses ? kByBlock : few ? kByLanes : kByWarp;
    rows.slices = std::min(a.classes / kMinSlice, kWaveBlocks / std::max<int64_t>(1, a.rows.count));
    rows.slices = std::max({rows.slices, int64_t{1}, (a.classes + kMaxSlice - 1) / kMaxSlice});
    // A multiple of every pack, so that slices of aligned rows are aligned.
    rows.slice_size = std::max<int64_t>(64, ((a.classes + rows.slices - 1) / rows.slices + 63) / 64 * 64);
    rows.slices = std::max<int64_t>(1, (a.classes + rows.slice_size - 1) / rows.slice_size);
    const int64_t together = way == kByBlock ? 1 : way == kByWarp ? kThreads / kWarp : kThreads / kFewLanes;
    const int64_t most = way == kByBlock ? kMaxBlocks : kMaxWarpBlocks;
    int64_t wanted = rows.slices > 1 ? together : (a.rows.count + most - 1) / most;
    if (way == kByWarp && !few_ways && !gives_sums) {
      const int64_t row_bytes = std::max<int64_t>(1, a.classes * bytes_of(a.logits.dtype));
      wanted = std::min(wanted, together * std::max<int64_t>(1, kWarpBytes / row_bytes));
    }
    rows.per_block = std::max<int64_t>(1, (wanted + together - 1) / together) * together;
    blocks = (a.rows.count + rows.per_block - 1) / rows.per_block * rows.slices;
  }

 private:
  // What classes are moved at once is read without a bank conflict where rows lie an odd number of times as
  // much apart; else they are pushed apart.
  void plan_short_rows(const CrossEntropyProblem& a) {
    way = kShort;
    const int classes = static_cast<int>(a.classes);
    const int64_t bytes = bytes_of(a.logits.dtype);
    int stride = classes;
    if (classes % (bytes == 8 ? 4 : 8) == 0) stride += bytes == 2 ? 2 : 1;
    short_rows = {(a.rows.count + kShortThreads - 1) / kShortThreads, classes, stride,
                  classes == 1 ? 0 : ~0u / static_cast<unsigned>(classes) + 1};
    tiling = {kShortThreads, short_rows.tiles, false};
    blocks = std::min(short_rows.tiles, kMaxShortBlocks);
  }

  void plan_tiles(const ClassTensors& tensors) {
    const CrossEntropyProblem& a = tensors.problem;
    way = kTiles;
    // Packs of rows leave a thread for each pack; where that is not enough for two waves of threads,
    // rows one by one and several threads for the classes of each.
    constexpr int64_t kThreadsWanted = kWaveBlocks * kThreads / 2;
    const int64_t pack = 16 / bytes_of(a.logits.dtype);
    tiling.packs =
        !few_ways && typed && tensors.rows_in_packs(pack) && a.rows.count / pack >= kThreadsWanted / 2;
    int64_t lanes = 1;
    while (!tiling.packs && lanes < kThreads / 4 && a.rows.count * lanes < kThreadsWanted &&
           8 * lanes < a.classes)
      lanes *= 2;
    tiling.across = static_cast<int>(kThreads / lanes);
    const int64_t width = tiling.across * (tiling.packs ? pack : 1);
    tiling.tiles = (a.rows.count + width - 1) / width;
    blocks = std::min(tiling.tiles, kMaxBlocks);
  }

 public:
  int64_t short_rows_bytes(const CrossEntropyProblem& a) const {
    return kShortThreads * short_rows.stride * bytes_of(a.logits.dtype);
  }
};

// For lossops.explain.
inline void trace(const char* kernel, const Plan& plan) {
  if (!tracing()) return;
  static const char* const ways[] = {
      "a block to each row", "a warp to each row", "a few lanes of a warp to each row",
      "a thread to each row, from shared memory", "tiles of neighbouring rows"};
  std::string way = ways[plan.way];
  if (plan.rows.slices > 1) way = "rows cut into " + std::to_string(plan.rows.slices) + " slices";
  if (!plan.typed) way += ", element by element";
  record({kernel, way, "cuda", plan.blocks});
}

// Whether there are packs of t to read or to make. Without class weights rows take smoothing's one value for
// all classes.
inline bool is_dense(const CrossEntropyProblem& a, const Plan& plan) {
  const bool smoothed_alone = a.index_target() && a.weight == nullptr && plan.way != Plan::kTiles;
  return a.has_target_sum() && !smoothed_alone;
}

// f(Type<element>, Type<accumulation>)
template <class F>
void with_element_type(const CrossEntropyProblem& a, const F& f) {
  switch (a.logits.dtype) {
    case DType::f16: return f(Type<__half>(), Type<float>());
    case DType::bf16: return f(Type<__nv_bfloat16>(), Type<float>());
    case DType::f32: return f(Type<float>(), Type<float>());
    default: return f(Type<double>(), Type<double>());
  }
}

template <class F>
void with_types(const CrossEntropyProblem& a, bool typed, const F& f) {
  if (typed) return with_element_type(a, f);
  if (a.use_double) return f(Type<AnyType>(), Type<double>());
  f(Type<AnyType>(), Type<float>());
}

inline unsigned grid(const char* op, int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string(op) + ": expected fewer than 2^31 blocks of rows");
  return static_cast<unsigned>(blocks);
}

template <class Call>
Plan plan_of(const Call& a) {
  constexpr bool row_functions = std::is_base_of_v<CrossEntropyRowsProblem, Call>;
  return Plan(ClassTensors(a), row_functions, std::is_same_v<Call, CrossEntropyForward>);
}

} // namespace lossops::cuda
