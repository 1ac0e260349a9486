// Matrix products of a chunk that is in cache: C[r][c] = start[r][c] + sum_k A[r][k] B[k][c].
//
// B comes in panels of kTileVectors vectors of columns, a panel's row being neighbours; the registers hold kTileRows x
// kTileVectors vectors of C. Weights are packed into panels once per call; activations are used where they lie.
#pragma once
#include "simd.h"

#include <algorithm>

namespace statemix {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;  // of 16
#else
constexpr int kTileRows = 4, kTileVectors = 2;  // and without fused multiply-add
#endif
constexpr int kMiddleRows = kTileRows / 2;
constexpr int64_t kDepthAtOnce = 256;

template <class T>
constexpr int64_t kPanel = kTileVectors * width<T>;

// A[r][k] is at a[r * lda + k], or at a[k * lda + r] if `transposed`.
template <class T, int Rows, int Vectors, bool transposed>
STATEMIX_INLINE void tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, const T* start, int64_t start_stride,
                          T* c, int64_t ldc) {
  V<T> sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[r][v] = start ? load(start + r * start_stride + v * width<T>) : V<T>{};
  // a row each third: x86 addresses base, base + lda and base + 2 lda without further registers
  const T* base[(Rows + 2) / 3];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r += 3) base[r / 3] = a + (transposed ? r : r * lda);
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    V<T> row[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * width<T>);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const V<T> x = splat<T>(transposed ? a[r] : base[r / 3][(r % 3) * lda]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * row[v];
    }
    if (transposed)
      a += lda;
    else
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r += 3) ++base[r / 3];
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * width<T>, sum[r][v]);
}

template <class T>
struct Product {
  int64_t rows, columns, depth;  // columns: a multiple of a vector
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb, panel_stride;  // between rows of a panel, and between panels
  const T* start;             // null: zero
  int64_t start_stride;       // 0: the same row for all
  T* c;
  int64_t ldc;
};

template <class T, int Rows, bool transposed>
STATEMIX_NOINLINE void tile_of_rows(const Product<T>& p, int64_t r, int64_t column, int64_t k, int64_t depth) {
  const T* a = p.a + (transposed ? r + k * p.lda : r * p.lda + k);
  const T* b = p.b + column / kPanel<T> * p.panel_stride + k * p.ldb;
  T* c = p.c + r * p.ldc + column;
  const T* start = k ? c : p.start ? p.start + r * p.start_stride + column : nullptr;
  const int64_t start_stride = k ? p.ldc : p.start_stride;
  const int64_t vectors = (p.columns - column) / width<T>;
  if (transposed)  // sums over all of time, too large for the near caches: the next rows meet this panel soon
    for (int i = 0; i < Rows; ++i) __builtin_prefetch(c + (Rows + i) * p.ldc, 1, 3);
  if (vectors >= kTileVectors)
    tile<T, Rows, kTileVectors, transposed>(a, p.lda, b, p.ldb, depth, start, start_stride, c, p.ldc);
  else if (kTileVectors > 2 && vectors == 2)
    tile<T, Rows, 2, transposed>(a, p.lda, b, p.ldb, depth, start, start_stride, c, p.ldc);
  else
    tile<T, Rows, 1, transposed>(a, p.lda, b, p.ldb, depth, start, start_stride, c, p.ldc);
}

// rows_outer: each few rows of A meet all panels of B in turn, else each panel all rows: what is met again should be small.
template <class T, bool transposed>
void product(const Product<T>& p, bool rows_outer) {
  const int64_t panels = (p.columns + kPanel<T> - 1) / kPanel<T>;
  const auto rows_from = [&](int64_t r) {
    const int64_t left = p.rows - r;
    return left >= kTileRows ? kTileRows : left >= kMiddleRows ? kMiddleRows : 1;
  };
  const auto compute = [&](int64_t r, int64_t n, int64_t panel, int64_t k, int64_t depth) {
    const int64_t column = panel * kPanel<T>;
    if (n == kTileRows)
      tile_of_rows<T, kTileRows, transposed>(p, r, column, k, depth);
    else if (n == kMiddleRows)
      tile_of_rows<T, kMiddleRows, transposed>(p, r, column, k, depth);
    else
      tile_of_rows<T, 1, transposed>(p, r, column, k, depth);
  };
  for (int64_t k = 0; k < p.depth; k += kDepthAtOnce) {
    const int64_t depth = std::min(kDepthAtOnce, p.depth - k);
    if (rows_outer)
      for (int64_t r = 0, n; r < p.rows; r += n) {
        n = rows_from(r);
        for (int64_t panel = 0; panel < panels; ++panel) compute(r, n, panel, k, depth);
      }
    else
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t r = 0, n; r < p.rows; r += n) compute(r, n = rows_from(r), panel, k, depth);
  }
}

}  // namespace
}  // namespace statemix
