// Products of training: many float32 rows times a frozen weight or its transpose, compiled once per SIMD level.
// C [T, J] = A [T, R] B [R, J], where B is W^T (x W^T: R columns of W, J rows) or W (dy W). Slabs of DEPTH rows of B are
// decoded once for all T into panels of PANEL columns; the inner loop keeps a tile of C in registers. Sums run in
// ascending r, DEPTH at a time, whatever the threads, the rows beside and the cut of T.
#include "kernels.h"
#include "simd.h"

#include <algorithm>

namespace cg {
namespace CG_LEVEL {
namespace {

#if defined(CG_AVX512) || defined(CG_NEON)  // 32 registers: 24 sums
constexpr int TILE = 12;
#else                                       // 16 registers: 12 sums
constexpr int TILE = 6;
#endif
constexpr int PANEL = 2 * FW, DEPTH = 256, STRIP = 256;

// Rows r0 .. r0 + depth of B, columns of one strip, into panels: out[j / PANEL][r - r0][j % PANEL], zero beyond J.
void decode_strip(const Matrix& m, int64_t r0, int64_t depth, int64_t j0, float* out) {
  const auto decode = kernels()->decode;
  const Weight& w = m.w;
  if (m.transposed) {
    const int64_t n = std::min<int64_t>(STRIP, m.width() - j0), padded = (n + PANEL - 1) / PANEL * PANEL;
    float line[STRIP];
    std::fill(line + n, line + padded, 0.f);
    for (int64_t r = 0; r < depth; r++) {
      decode(w, m.first + r0 + r, j0, n, line);
      for (int64_t j = 0; j < padded; j += PANEL) memcpy(out + j * depth + r * PANEL, line + j, 4 * PANEL);
    }
    return;
  }
  float lines[8][DEPTH];
  for (int64_t j = 0; j < PANEL; j += 8) {
    for (int64_t i = 0; i < 8; i++)
      if (j0 + j + i < m.width()) decode(w, m.first + j0 + j + i, r0, depth, lines[i]);
      else std::fill(lines[i], lines[i] + depth, 0.f);
    int64_t r = 0;
    for (; r + 8 <= depth; r += 8) transpose8(&lines[0][r], DEPTH, out + r * PANEL + j, PANEL);
    for (; r < depth; r++)
      for (int64_t i = 0; i < 8; i++) out[r * PANEL + j + i] = lines[i][r];
  }
}

// TILE rows of A (each `DEPTH` floats apart) times one panel; `rows` and `columns` of it exist in C.
CG_INLINE void tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, int rows, int64_t columns, bool add) {
  Fv sums[TILE][2] = {};
#pragma GCC unroll 12
  for (int i = 0; i < TILE; i++)
    if (add && i < rows) prefetch(c + i * stride), prefetch(c + i * stride + PANEL - 1);
  for (int64_t r = 0; r < depth; r++) {
    Fv b0 = load<Fv>(b + r * PANEL), b1 = load<Fv>(b + r * PANEL + FW);
#pragma GCC unroll 12
    for (int i = 0; i < TILE; i++) {
      Fv x = splat(a[i * DEPTH + r]);
      sums[i][0] = fma(x, b0, sums[i][0]), sums[i][1] = fma(x, b1, sums[i][1]);
    }
  }
  if (rows == TILE && columns >= PANEL) {
#pragma GCC unroll 12
    for (int i = 0; i < TILE; i++) {
      float* o = c + i * stride;
      if (add) sums[i][0] += load<Fv>(o), sums[i][1] += load<Fv>(o + FW);
      store(o, sums[i][0]), store(o + FW, sums[i][1]);
    }
    return;
  }
  float edge[TILE * PANEL];
  memcpy(edge, sums, sizeof edge);
  for (int i = 0; i < rows; i++)
    for (int64_t j = 0; j < std::min<int64_t>(columns, PANEL); j++) {
      float& o = c[i * stride + j];
      o = (add ? o : 0.f) + edge[i * PANEL + j];
    }
}

// Copies rows t0 .. t1 of A's slab for `multiply_rows`: [t / TILE][TILE][DEPTH], zero beyond t1.
void gather_rows(const Matrix& m, int64_t r0, int64_t depth, int64_t t0, int64_t t1, float* out) {
  for (int64_t t = t0; t < t1; t++) memcpy(out + (t - t0) * DEPTH, m.a + t * m.depth() + r0, 4 * depth);
  for (int64_t t = t1 - t0; t % TILE; t++) memset(out + t * DEPTH, 0, 4 * depth);
}
void multiply_rows(const Matrix& m, int64_t r0, int64_t depth, const float* a, int64_t t0, int64_t t1, const float* panels,
                   int64_t j0, int64_t j1) {
  const int64_t J = m.width();
  for (int64_t j = j0; j < j1; j += PANEL)
    for (int64_t t = t0; t < t1; t += TILE)
      tile(a + (t - t0) * DEPTH, panels + (j - j0) * depth, depth, m.c + t * J + j, J, (int)std::min<int64_t>(TILE, t1 - t), J - j, m.add || r0 > 0);
}

// Multiply-adds of floats in registers only: what the multipliers can do.
int64_t peak(int64_t rounds) {
  constexpr int SUMS = 12;          // enough to hide the latency
  Fv x = splat(0.5f), sums[SUMS] = {};
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      CG_OPAQUE(sums[j]);
      sums[j] = fma(x, x, sums[j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 1; j < SUMS; j++) sums[0] += sums[j];
  volatile float keep = sums[0][0];
  (void)keep;
  return rounds * SUMS * FW * 2;
}
int64_t strip(const Matrix& m) { return m.transposed ? STRIP : PANEL; }

}  // namespace

extern const MatrixKernels matrix_kernels = {TILE, PANEL, DEPTH, strip, decode_strip, gather_rows, multiply_rows, peak};
}  // namespace CG_LEVEL
}  // namespace cg
