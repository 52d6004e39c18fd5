#include "../product.h"

#include <limits>

#include "trace.h"

namespace lossops::cpu {

struct Blocking {
  int64_t tile_rows, tile_columns, rows, columns, depth;
};

} // namespace lossops::cpu

#define LOSSOPS_KERNELS "product.inl"
#include "foreach_isa.h"

namespace lossops::cpu {
namespace {

constexpr double kWorkPerThread = 1 << 20; // multiplications that a second thread is worth waking for

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// The result, cut into a grid of parts for the threads, each with memory for its packed blocks.
struct Grid {
  int64_t down = 1, across = 1;
  int64_t rows = 0, columns = 0; // of a part: whole tiles
  int64_t bytes_a = 0, bytes_b = 0;

  int64_t parts() const {
    return down * across;
  }
};

// Of all grids the one whose parts take least, packing included: that of an element takes as long as kPacking
// multiplications.
Grid grid_of(const Product& p, Isa isa) {
  constexpr int64_t kPacking = 24;
  Blocking block;
  LOSSOPS_CALL(blocking_of, p, block);
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), 1 + static_cast<int64_t>(work / kWorkPerThread));
  Grid best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t down = 1; down <= threads; ++down) {
    const int64_t across = threads / down;
    const int64_t rows = round_up((p.rows + down - 1) / down, block.tile_rows);
    const int64_t columns = round_up((p.columns + across - 1) / across, block.tile_columns);
    const int64_t cost = rows * columns + kPacking * (rows + columns);
    if (cost >= least) continue;
    least = cost;
    best.rows = rows;
    best.columns = columns;
  }
  best.down = (p.rows + best.rows - 1) / best.rows;
  best.across = (p.columns + best.columns - 1) / best.columns;
  const int64_t depth_bytes =
      std::min(block.depth, p.depth) * static_cast<int64_t>(p.use_double ? sizeof(double) : sizeof(float));
  best.bytes_a = round_up(std::min(block.rows, best.rows) * depth_bytes, 64);
  best.bytes_b = round_up(std::min(block.columns, best.columns) * depth_bytes, 64);
  return best;
}

} // namespace

bool multiplies_faster() {
#if LOSSOPS_X86_KERNELS
  __builtin_cpu_init();
  return active_isa() == Isa::avx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

void launch(const Product& p, const std::function<void*(int64_t)>& scratch) {
  const Isa isa = active_isa();
  const Grid grid = grid_of(p, isa);
  const int64_t bytes = grid.bytes_a + grid.bytes_b;
  char* const memory = static_cast<char*>(scratch(grid.parts() * bytes));
  if (tracing()) record({"multiply", "tiles of the product", isa_name(isa), grid.parts()});
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / grid.across * grid.rows, column = part % grid.across * grid.columns;
      char* const blocks = memory + part * bytes;
      LOSSOPS_CALL(multiply, p, row, std::min(grid.rows, p.rows - row), column,
                   std::min(grid.columns, p.columns - column), blocks, blocks + grid.bytes_a);
    }
  };
  if (grid.parts() == 1)
    run(0, 1);
  else
    torch::stable::parallel_for(0, grid.parts(), 1, run);
}

} // namespace lossops::cpu
