// Products of training: many float32 rows times a weight (in blocks or floats) or its transpose, compiled once per SIMD level.
// C [T, J] = A [T, R] B [R, J], where B is W^T (x W^T: R columns of W, J rows) or W (dy W). Slabs of SLOTS rows of B are
// decoded once for all T into panels of PANEL columns; the inner loop keeps a tile of C in registers. Sums run in
// ascending r, a slab at a time, for any number of threads, of rows, and any split of T. With bfloat16 factors, a pair of
// them stands in the slot of a float, and a slab has twice the rows; level amx multiplies those in tiles. The softmax of
// attention and of the loss is here too.
#include "kernels.h"
#include "simd.h"
#if defined(CG_AMX)
#include "tile_product.h"
#include "tiles.h"
#endif

#include <algorithm>

namespace cg {
namespace CG_LEVEL {
namespace {

#if defined(CG_AMX)
constexpr int ROW_MULTIPLE = 2 * SIDE, TILE = 8;  // rows of A: in two tiles; in registers (a divisor), for float32
#elif defined(CG_AVX512) || defined(CG_NEON)  // 32 registers: 24 sums
constexpr int TILE = 12, ROW_MULTIPLE = TILE;
#else                                       // 16 registers: 12 sums
constexpr int TILE = 6, ROW_MULTIPLE = TILE;
#endif
constexpr int PANEL = 2 * FW, SLOTS = 256, STRIP = 256;

#if defined(CG_BFLOAT16) || defined(CG_AMX)  // not where a test translates AVX-512 to AVX2, which has no such registers
#if defined(CG_AMX)
CG_INLINE __m512i rounded(__m512 first, __m512 second) { return (__m512i)to_bfloat16((Fv)first, (Fv)second); }
CG_INLINE Fv fma_pairs(Fv sum, Fv, Fv) { return sum; }  // never called: tiles multiply pairs
#else
// Inline assembly, since these instructions then need no compiler flag: the level also runs on CPUs without them.
CG_INLINE __m512i rounded(__m512 first, __m512 second) {  // 32 bfloat16
  __m512i y;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(y) : "v"(second), "v"(first));
  return y;
}
CG_INLINE Fv fma_pairs(Fv sum, Fv x, Fv y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
}
#endif
#if defined(CG_IMITATE_TILES)
bool has_bfloat16() { return true; }
#else
bool has_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
#endif
// n floats as pairs of bfloat16, padded with zeros to whole vectors, which go to out, out + step, ...
CG_INLINE void pair_up(const float* x, int64_t n, float* out, int64_t step) {
  for (int64_t i = 0; i < n; i += 32, out += step) {
    const float* from = x + i;
    float rest[32];
    if (n - i < 32) memset(rest, 0, sizeof rest), memcpy(rest, from, 4 * (n - i)), from = rest;
    store(out, rounded(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
  }
}
// The halves of `both`, 16 bfloat16 each, interleaved: a slot gets one of each half.
CG_INLINE void interleave(__m512i both, float* out) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  const __m512i top = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
  store(out, _mm512_or_si512(low, _mm512_slli_epi32(top, 16)));
}
// decode_pairs: n columns of row r, from `first` on, two to a slot. decode_two: those of rows r and r + 1, each slot with the
// same column of both rows. Zeros stand in place of a row that is missing, and behind the n columns.
#if defined(CG_AMX)
CG_INLINE void decode_row(const Weight& w, int64_t r, int64_t first, int64_t n, uint16_t* out) {
  bfloat16_decoder(w.type)(w.data + r * w.row_bytes + first / TYPE[w.type].block * TYPE[w.type].bytes, n, out, STEP);
}
void decode_pairs(const Weight& w, int64_t r, int64_t first, int64_t n, float* out) {
  decode_row(w, r, first, n, (uint16_t*)out);
}
void decode_two(const Weight& w, int64_t r, bool second, int64_t first, int64_t n, float* out) {
  uint16_t lines[2][STRIP];
  decode_row(w, r, first, n, lines[0]);
  if (second) decode_row(w, r + 1, first, n, lines[1]);
  else memset(lines[1], 0, sizeof lines[1]);
  for (int64_t i = 0; i < n; i += 16)
    interleave(_mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(lines[0] + i)), load<__m256i>(lines[1] + i), 1), out + i);
}
#else
void decode_pairs(const Weight& w, int64_t r, int64_t first, int64_t n, float* out) {
  float line[2 * SLOTS];
  kernels()->decode(w, r, first, n, line);
  pair_up(line, n, out, 16);
}
void decode_two(const Weight& w, int64_t r, bool second, int64_t first, int64_t n, float* out) {
  float lines[2][STRIP] = {};
  kernels()->decode(w, r, first, n, lines[0]);
  if (second) kernels()->decode(w, r + 1, first, n, lines[1]);
  for (int64_t i = 0; i < n; i += 16) interleave(rounded(_mm512_loadu_ps(lines[0] + i), _mm512_loadu_ps(lines[1] + i)), out + i);
}
#endif
#else
CG_INLINE Fv fma_pairs(Fv sum, Fv, Fv) { return sum; }  // never called: there are no pairs
CG_INLINE void pair_up(const float*, int64_t, float*, int64_t) {}
CG_INLINE void decode_pairs(const Weight&, int64_t, int64_t, int64_t, float*) {}
CG_INLINE void decode_two(const Weight&, int64_t, bool, int64_t, int64_t, float*) {}
bool has_bfloat16() { return false; }
#endif

// Rows r0 .. r0 + depth of B, columns of one strip, into panels: out[j / PANEL][slot][j % PANEL], zero beyond J.
void decode_strip(const MatrixProduct& m, int64_t r0, int64_t depth, int64_t j0, float* out) {
  const auto decode = kernels()->decode;
  const Weight& w = m.w;
  const int64_t slots = m.slots(depth);
  if (m.by_rows) {
    const int64_t n = std::min<int64_t>(STRIP, m.width() - j0), padded = (n + PANEL - 1) / PANEL * PANEL;
    float line[STRIP];
    std::fill(line + n, line + padded, 0.f);
    for (int64_t s = 0; s < slots; s++) {
      if (m.bfloat16) decode_two(w, m.first + r0 + 2 * s, 2 * s + 1 < depth, j0, n, line);
      else decode(w, m.first + r0 + s, j0, n, line);
      for (int64_t j = 0; j < padded; j += PANEL) memcpy(out + j * slots + s * PANEL, line + j, 4 * PANEL);
    }
    return;
  }
  float lines[8][SLOTS];
  for (int64_t j = 0; j < PANEL; j += 8) {
    for (int64_t i = 0; i < 8; i++)
      if (j0 + j + i >= m.width()) std::fill(lines[i], lines[i] + slots, 0.f);
      else if (!m.bfloat16) decode(w, m.first + j0 + j + i, r0, depth, lines[i]);
      else decode_pairs(w, m.first + j0 + j + i, r0, depth, lines[i]);
    int64_t s = 0;
    for (; s + 8 <= slots; s += 8) transpose8(&lines[0][s], SLOTS, out + s * PANEL + j, PANEL);
    for (; s < slots; s++)
      for (int64_t i = 0; i < 8; i++) memcpy(out + s * PANEL + j + i, &lines[i][s], 4);
  }
}

// TILE rows of A (SLOTS apart) times one panel. Only `rows` rows and `columns` columns of the product are in C.
template <bool BFLOAT16>
CG_INLINE void tile(const float* a, const float* b, int64_t slots, float* c, int64_t stride, int rows, int64_t columns,
                    bool add) {
  Fv sums[TILE][2] = {};
#pragma GCC unroll 12
  for (int i = 0; i < TILE; i++)
    if (add && i < rows) prefetch(c + i * stride), prefetch(c + i * stride + PANEL - 1);
  for (int64_t r = 0; r < slots; r++) {
    Fv b0 = load<Fv>(b + r * PANEL), b1 = load<Fv>(b + r * PANEL + FW);
#pragma GCC unroll 12
    for (int i = 0; i < TILE; i++) {
      if (BFLOAT16) {
        Fv x = (Fv)splat_i(load<int32_t>(a + i * SLOTS + r));
        sums[i][0] = fma_pairs(sums[i][0], x, b0), sums[i][1] = fma_pairs(sums[i][1], x, b1);
      } else {
        Fv x = splat(a[i * SLOTS + r]);
        sums[i][0] = fma(x, b0, sums[i][0]), sums[i][1] = fma(x, b1, sums[i][1]);
      }
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

// Where row t of A's slab begins, and how far apart its vectors of 16 slots are: [T, SLOTS], or, for the tile unit, [T / 16,
// SLOTS / 16, 16, 16], so that a tile is in one place.
struct SlabRow { float* start; int64_t step; };
CG_INLINE SlabRow slab_row(float* slab, int64_t t, bool bfloat16) {
#if defined(CG_AMX)
  if (bfloat16) return {slab + t / SIDE * SIDE * SLOTS + t % SIDE * SIDE, SIDE * SIDE};
#endif
  return {slab + t * SLOTS, 16};
}
// Rows t0 .. t1 of A's slab for `multiply_rows`, and rows of zeros to a multiple of ROW_MULTIPLE.
void gather_rows(const MatrixProduct& m, int64_t r0, int64_t depth, int64_t t0, int64_t t1, float* out) {
  const int64_t stride = m.a_row();
  auto store_row = [&](const float* row, int64_t t) {
    const SlabRow to = slab_row(out, t - t0, m.bfloat16);
    if (m.bfloat16) pair_up(row, depth, to.start, to.step);
    else memcpy(to.start, row, 4 * depth);
  };
  float lines[8][2 * SLOTS];
  for (int64_t t = t0; t < t1; t += 8) {
    const int64_t n = std::min<int64_t>(8, t1 - t);
    const float* a_transposed = m.a + r0 * stride + t;
    int64_t r = 0;
    if (m.a_transposed && n == 8)
      for (; r + 8 <= depth; r += 8) transpose8(a_transposed + r * stride, stride, &lines[0][r], 2 * SLOTS);
    if (m.a_transposed)
      for (; r < depth; r++)
        for (int64_t i = 0; i < n; i++) lines[i][r] = a_transposed[r * stride + i];
    for (int64_t i = 0; i < n; i++) store_row(m.a_transposed ? lines[i] : m.a + (t + i) * stride + r0, t + i);
  }
  for (int64_t t = t1 - t0; t % ROW_MULTIPLE; t++) {
    const SlabRow to = slab_row(out, t, m.bfloat16);
    for (int64_t i = 0; i < m.slots(depth); i += 16) memset(to.start + i / 16 * to.step, 0, 64);
  }
}
template <bool BFLOAT16>
void multiply_blocks(const MatrixProduct& m, bool add, int64_t slots, const float* a, int64_t t0, int64_t t1, const float* panels,
                    int64_t j0, int64_t j1) {
  const int64_t J = m.width(), stride = m.c_row();
  for (int64_t j = j0; j < j1; j += PANEL)
    for (int64_t t = t0; t < t1; t += TILE)
      tile<BFLOAT16>(a + (t - t0) * SLOTS, panels + (j - j0) * slots, slots, m.c + t * stride + j, stride,
                     (int)std::min<int64_t>(TILE, t1 - t), J - j, add);
}
#if defined(CG_AMX)
// Two tiles of rows times two of columns. Sums begin with C (`add`) or zero, and take 32 members at a time.
template <>
void multiply_blocks<true>(const MatrixProduct& m, bool add, int64_t slots, const float* a, int64_t t0, int64_t t1,
                           const float* panels, int64_t j0, int64_t j1) {
  const int64_t J = m.width(), steps = (slots + SIDE - 1) / SIDE;
  configure_tiles(SIDE);
  for (int64_t j = j0; j < j1; j += PANEL) {
    const float* panel = panels + (j - j0) * slots;
    alignas(64) float last[SIDE][PANEL] = {};  // of the last step: zeros follow the panel's last slot
    memcpy(last, panel + (steps - 1) * SIDE * PANEL, 4 * (slots - (steps - 1) * SIDE) * PANEL);
    for (int64_t t = t0; t < t1; t += ROW_MULTIPLE) {
      const int64_t rows = std::min<int64_t>(ROW_MULTIPLE, t1 - t), columns = std::min<int64_t>(PANEL, J - j);
      const bool whole = rows == ROW_MULTIPLE && columns == PANEL;
      alignas(64) float edge[ROW_MULTIPLE * PANEL];
      float *to = m.c + t * m.c_row() + j, *c = whole ? to : edge;
      const int64_t stride = whole ? m.c_row() : PANEL;
      if (add) {
        if (!whole) memset(edge, 0, sizeof edge);
        for (int64_t i = 0; i < rows && !whole; i++) memcpy(edge + i * PANEL, to + i * m.c_row(), 4 * columns);
        load_tile<0>(c, 4 * stride), load_tile<1>(c + SIDE * stride, 4 * stride);
        load_tile<2>(c + SIDE, 4 * stride), load_tile<3>(c + SIDE * stride + SIDE, 4 * stride);
      } else {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      }
      const float* x = a + (t - t0) * SLOTS;
      for (int64_t s = 0; s < steps; s++, x += SIDE * SIDE) {
        const float* b = s + 1 < steps ? panel + s * SIDE * PANEL : last[0];
        load_tile<4>(x, 64), load_tile<6>(b, 4 * PANEL), multiply_tiles<0, 4, 6>();
        load_tile<5>(x + SIDE * SLOTS, 64), multiply_tiles<1, 5, 6>();
        load_tile<7>(b + SIDE, 4 * PANEL), multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
      }
      store_tile<0>(c, 4 * stride), store_tile<1>(c + SIDE * stride, 4 * stride);
      store_tile<2>(c + SIDE, 4 * stride), store_tile<3>(c + SIDE * stride + SIDE, 4 * stride);
      for (int64_t i = 0; i < rows && !whole; i++) memcpy(to + i * m.c_row(), edge + i * PANEL, 4 * columns);
    }
  }
  release_tiles();
}
#endif
void multiply_rows(const MatrixProduct& m, int64_t r0, int64_t depth, const float* a, int64_t t0, int64_t t1, const float* panels,
                   int64_t j0, int64_t j1) {
  (m.bfloat16 ? multiply_blocks<true> : multiply_blocks<false>)(m, m.add || r0 > 0, m.slots(depth), a, t0, t1, panels, j0, j1);
}

// Multiply-adds in registers only: the peak rate of the multipliers.
template <bool BFLOAT16> int64_t peak_of(int64_t rounds) {
  constexpr int SUMS = 12;          // enough to hide the latency
  Fv x = splat(0.5f), sums[SUMS] = {};
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      CG_OPAQUE(sums[j]);
      sums[j] = BFLOAT16 ? fma_pairs(sums[j], x, x) : fma(x, x, sums[j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 1; j < SUMS; j++) sums[0] += sums[j];
  volatile float keep = sums[0][0];
  (void)keep;
  return rounds * SUMS * FW * (BFLOAT16 ? 4 : 2);
}
#if defined(CG_AMX)
int64_t peak(int64_t rounds, bool bfloat16) { return bfloat16 ? CG_LEVEL::peak(rounds) : peak_of<false>(rounds); }
#else
int64_t peak(int64_t rounds, bool bfloat16) { return bfloat16 ? peak_of<true>(rounds) : peak_of<false>(rounds); }
#endif
int64_t strip(const MatrixProduct& m) { return m.by_rows ? STRIP : PANEL; }

CG_INLINE Iv visible(const Keys& k, int64_t i) {
  const Iv positions = load<Iv>(k.positions + i), below = splat_i(k.position) - positions;
  const Iv near = (below >= splat_i(0)) & (load<Iv>(k.segments + i) == splat_i(k.segment));
  return k.window ? near & (below < splat_i(k.window)) : near;
}
void softmax(const Keys& k, float* scores, float* max_score, float* sum) {
  Fv top = splat(-1e30f), total = {};
  for (int64_t i = 0; i < k.count; i += FW) {
    Fv x = load<Fv>(scores + i);
    if (k.cap) x = splat(k.cap) * tanh(x / splat(k.cap));
    x = select(visible(k, i), x, splat(-INFINITY));
    store(scores + i, x), top = max(top, x);
  }
  *max_score = largest(top);
  for (int64_t i = 0; i < k.count; i += FW) {
    Fv x = exp(load<Fv>(scores + i) - splat(*max_score));
    store(scores + i, x), total += x;
  }
  *sum = CG_LEVEL::sum(total);
}
float online_softmax(float* logits, const float* counts, int64_t n, int64_t first, float cap, SoftmaxSums& sums) {
  Fv top = splat(sums.max_logit);
  for (int64_t i = 0; i < n; i += FW) {
    Fv x = load<Fv>(logits + i);
    if (cap) x = splat(cap) * tanh(x / splat(cap));
    x = select(load<Fv>(counts + i) > Fv{}, x, splat(-INFINITY));
    store(logits + i, x), top = max(top, x);
  }
  const float max_logit = largest(top), shrink = exp(splat(sums.max_logit - max_logit))[0];
  if (max_logit > sums.max_logit) sums.best = (int32_t)(first + (std::find(logits, logits + n, max_logit) - logits));
  Fv total = {};
  for (int64_t i = 0; i < n; i += FW) {
    const Fv x = load<Fv>(logits + i), weight = load<Fv>(counts + i) * exp(x - splat(max_logit)), t = x / splat(cap);
    total += weight;
    store(logits + i, cap ? select(weight > Fv{}, weight * (splat(1.f) - t * t), Fv{}) : weight);
  }
  sums.max_logit = max_logit, sums.sum = sums.sum * shrink + sum(total);
  return shrink;
}
void softmax_backward(const Keys& k, float* scores, float* d_weights, float log_sum) {
  auto weight = [&](int64_t i, Fv& slope) {
    Fv x = load<Fv>(scores + i);
    slope = splat(1.f);
    if (k.cap) {
      const Fv t = tanh(x / splat(k.cap));
      x = splat(k.cap) * t, slope -= t * t;
    }
    return select(visible(k, i), exp(x - splat(log_sum)), Fv{});
  };
  // The gradient of a softmax subtracts a mean. It is computed from the weights, not as the dot product of output and its
  // gradient (equal without roundoff), so that the gradients of a row of scores sum to zero.
  Fv total = {}, weighted = {}, slope;
  for (int64_t i = 0; i < k.count; i += FW) {
    const Fv w = weight(i, slope);
    total += w, weighted += select(visible(k, i), w * load<Fv>(d_weights + i), Fv{});
  }
  const Fv mean = splat(sum(weighted) / sum(total));
  for (int64_t i = 0; i < k.count; i += FW) {
    const Fv w = weight(i, slope);
    store(d_weights + i, select(visible(k, i), w * (load<Fv>(d_weights + i) - mean) * slope, Fv{}));
    store(scores + i, w);
  }
}

}  // namespace

extern const MatrixKernels matrix_kernels = {ROW_MULTIPLE, PANEL,         SLOTS, has_bfloat16, strip,          decode_strip,
                                             gather_rows,  multiply_rows, peak,  softmax,      online_softmax, softmax_backward};
}  // namespace CG_LEVEL
}  // namespace cg
