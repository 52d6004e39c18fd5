// Matrix products on the CPU, compiled once per instruction set (see foreach_isa.h). After Goto and van de
// Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): blocks of both operands are packed into
// panels in the order in which a tile of the result, held in registers, takes them. An element of the result
// is summed in the order of the depth, whatever blocks and threads it falls to.

// Measured: with AVX-512 a panel of a takes 24 KiB and one of b 64, a block of a 0.4 MiB and one of b 1. The
// block of a comes from L2 once for each panel of b.
constexpr int64_t kLaneBytes = 2048, kBlockTiles = 16;

// Terms that are added one by one, before their sum is added to the element: a longer chain would lose
// digits, and this costs 3 %.
constexpr int64_t kChain = 128;

template <class A>
struct Tile {
  // Two vectors wide. Of 32 registers 24 are sums, of 16 (without AVX-512) 12.
  static constexpr int64_t rows = LOSSOPS_VECTOR_BYTES == 64 ? 12 : 6, columns = kLanes<A>;
  static constexpr int64_t depth = kLaneBytes / sizeof(A);
  static constexpr int64_t block_rows = kBlockTiles * rows, block_columns = kBlockTiles * columns;
};

// Packs `lanes` rows of a matrix (or columns of one) into panels (depth, width) for `width` of them, with
// zeros for those that the last panel lacks.
template <int64_t width, class A>
void pack(const A* from, int64_t lane_stride, int64_t depth_stride, int64_t lanes, int64_t depth, A* panel) {
  constexpr int64_t square = 4; // what a transposition in registers takes at a time
  for (int64_t first = 0; first < lanes; first += width, panel += width * depth) {
    const A* at = from + first * lane_stride;
    const int64_t n = std::min(width, lanes - first);
    if (n < width) std::fill(panel, panel + width * depth, A(0));
    int64_t done = 0; // lanes
    for (; depth_stride == 1 && lane_stride != 1 && done + square <= n; done += square) {
      const A* const lane = at + done * lane_stride;
      int64_t d = 0;
      for (; d + square <= depth; d += square) {
        A turned[square][square];
#pragma GCC unroll 4
        for (int64_t i = 0; i < square; ++i) {
#pragma GCC unroll 4
          for (int64_t k = 0; k < square; ++k) turned[k][i] = lane[i * lane_stride + d + k];
        }
#pragma GCC unroll 4
        for (int64_t k = 0; k < square; ++k)
          std::memcpy(panel + (d + k) * width + done, turned[k], sizeof(turned[k]));
      }
      for (; d < depth; ++d)
        for (int64_t i = 0; i < square; ++i) panel[d * width + done + i] = lane[i * lane_stride + d];
    }
    if (lane_stride == 1 && n == width) {
      for (int64_t d = 0; d < depth; ++d)
        std::memcpy(panel + d * width, at + d * depth_stride, width * sizeof(A));
    } else {
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = done; i < n; ++i) panel[d * width + i] = at[i * lane_stride + d * depth_stride];
    }
  }
}

// A chain of terms of one tile, of a panel of a and one of b.
template <class A>
LOSSOPS_INLINE void multiply_chain(int64_t terms, const A* a, const A* b, bool add, A* out, int64_t stride) {
  using T = Tile<A>;
  constexpr int64_t lanes = LOSSOPS_VECTOR_BYTES / sizeof(A), vectors = T::columns / lanes;
  typedef A Vector __attribute__((vector_size(LOSSOPS_VECTOR_BYTES), aligned(alignof(A)), may_alias));
  Vector sum[T::rows][vectors];
#pragma GCC unroll 16
  for (int64_t i = 0; i < T::rows; ++i) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Vector{};
  }
  for (int64_t d = 0; d < terms; ++d) {
    const Vector* const row = reinterpret_cast<const Vector*>(b + d * T::columns);
#pragma GCC unroll 16
    for (int64_t i = 0; i < T::rows; ++i) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] += a[d * T::rows + i] * row[v];
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < T::rows; ++i) {
    Vector* const row = reinterpret_cast<Vector*>(out + i * stride);
#pragma GCC unroll 2
    for (int64_t v = 0; v < vectors; ++v) row[v] = add ? row[v] + sum[i][v] : sum[i][v];
  }
}

template <class A>
void multiply_tile(int64_t depth, const A* a, const A* b, bool add, A* out, int64_t stride) {
  for (int64_t d = 0; d < depth; d += kChain)
    multiply_chain(std::min(kChain, depth - d), a + d * Tile<A>::rows, b + d * Tile<A>::columns, add || d > 0,
                   out, stride);
}

// The same where only some of its rows and columns are wanted.
template <class A>
void multiply_edge(int64_t depth, const A* a, const A* b, bool add, A* out, int64_t stride, int64_t rows,
                   int64_t columns) {
  using T = Tile<A>;
  alignas(64) A tile[T::rows * T::columns] = {};
  for (int64_t i = 0; i < (add ? rows : 0); ++i)
    std::copy(out + i * stride, out + i * stride + columns, tile + i * T::columns);
  multiply_tile(depth, a, b, add, tile, T::columns);
  for (int64_t i = 0; i < rows; ++i)
    std::copy(tile + i * T::columns, tile + i * T::columns + columns, out + i * stride);
}

// What a block takes at most, and the tiles that it consists of.
template <class A>
void blocking_of(const Product&, Blocking& out) {
  using T = Tile<A>;
  out = {T::rows, T::columns, T::block_rows, T::block_columns, T::depth};
}

// The part of the result that starts at (row, column), of `rows` and `columns`.
template <class A>
void multiply(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns, void* block_a,
              void* block_b) {
  using T = Tile<A>;
  A *const packed_a = static_cast<A*>(block_a), *const packed_b = static_cast<A*>(block_b);
  const A* const a = static_cast<const A*>(p.a.data) + row * p.a.row_stride;
  const A* const b = static_cast<const A*>(p.b.data) + column * p.b.column_stride;
  A* const out = static_cast<A*>(p.out) + row * p.out_stride + column;
  const int64_t slabs = (p.depth + T::depth - 1) / T::depth, slab = (p.depth + slabs - 1) / slabs;
  for (int64_t j = 0; j < columns; j += T::block_columns) {
    const int64_t n = std::min(T::block_columns, columns - j);
    for (int64_t d = 0; d < p.depth; d += slab) {
      const int64_t depth = std::min(slab, p.depth - d);
      const bool add = p.add || d > 0;
      pack<T::columns>(b + d * p.b.row_stride + j * p.b.column_stride, p.b.column_stride, p.b.row_stride, n,
                       depth, packed_b);
      for (int64_t i = 0; i < rows; i += T::block_rows) {
        const int64_t m = std::min(T::block_rows, rows - i);
        pack<T::rows>(a + i * p.a.row_stride + d * p.a.column_stride, p.a.row_stride, p.a.column_stride, m,
                      depth, packed_a);
        for (int64_t y = 0; y < n; y += T::columns) {
          for (int64_t x = 0; x < m; x += T::rows) {
            A* const tile = out + (i + x) * p.out_stride + j + y;
            const A *const panel_a = packed_a + x * depth, *const panel_b = packed_b + y * depth;
            if (x + T::rows <= m && y + T::columns <= n)
              multiply_tile(depth, panel_a, panel_b, add, tile, p.out_stride);
            else
              multiply_edge(depth, panel_a, panel_b, add, tile, p.out_stride, std::min(T::rows, m - x),
                            std::min(T::columns, n - y));
          }
        }
      }
    }
  }
}
