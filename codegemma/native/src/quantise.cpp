// Floats to GGUF blocks: the same bits as ggml's reference quantisers, with and without importance.
//
// ggml adds the terms of every sum in the order of the elements, so the lanes of a vector cannot share the sum of one
// sub-block. But sub-blocks are independent: here each lane computes one of them, in ggml's order.
// Compiled twice, plain and for AVX2, which serves the levels above it too (float terms never contracted). The plain one has
// the binding.
#ifndef CG_LEVEL
#define CG_LEVEL plain
#define CG_BINDING
#endif
#include <algorithm>

#include "blocks.h"
#include "kernels.h"

namespace cg {
namespace CG_LEVEL {

template <int W> struct Lanes {
  typedef float F __attribute__((vector_size(4 * W)));
  typedef int32_t I __attribute__((vector_size(4 * W)));
};
template <class I, class V> CG_INLINE V pick(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
template <class V> CG_INLINE V vmin(V a, V b) { return pick(a < b, a, b); }
template <class V> CG_INLINE V vmax(V a, V b) { return pick(a > b, a, b); }
template <class I> CG_INLINE I clamp(I v, int low, int high) { return vmin(vmax(v, I{} + low), I{} + high); }
// To the nearest integer, half to even, for |v| < 2^22: the sum leaves it in the mantissa.
template <class I, class F> CG_INLINE I nearest(F v) { return ((I)(v + 12582912.f) & 0x7fffff) - 0x400000; }
inline int nearest1(float v) {
  float sum = v + 12582912.f;
  int32_t bits;
  memcpy(&bits, &sum, 4);
  return (bits & 0x7fffff) - 0x400000;
}
template <class I> CG_INLINE bool any(I mask) {
  int32_t sum = 0;
  for (size_t j = 0; j < sizeof mask / 4; j++) sum |= mask[j];
  return sum != 0;
}

// x = scale * (q - half): of 19 scales around that of the largest value, the one with the best least-squares fit, in which
// `w` weighs the squares. Lanes are groups of n values; q becomes 0 .. 2 * half - 1.
template <int W>
typename Lanes<W>::F fit_symmetric(const typename Lanes<W>::F* x, const typename Lanes<W>::F* w, int n, int half,
                                   typename Lanes<W>::I* q) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  F largest = {}, size = {}, scale = {}, best = {};
  for (int i = 0; i < n; i++) {
    F a = pick(x[i] < 0, -x[i], x[i]);
    I more = a > size;
    largest = pick(more, x[i], largest), size = pick(more, a, size);
  }
  for (int step = -10; step <= 9; step++) {  // the unchanged scale comes first, and later ones must beat it
    if (step == 0) continue;
    F inverse = (step == -10 ? F{} - (float)half : F{} - (half + 0.1f * step)) / largest, xq = {}, qq = {};
    for (int i = 0; i < n; i++) {
      I l = clamp(nearest<I>(inverse * x[i]), -half, half - 1);
      F f = __builtin_convertvector(l, F);
      xq += w[i] * x[i] * f, qq += w[i] * f * f;
    }
    I better = step == -10 ? I{} - 1 : (qq > 0) & (xq * xq > best * qq);
    if (!any(better)) continue;
    F fit = pick(qq > 0, xq / qq, F{});
    scale = pick(better, fit, scale), best = pick(better, fit * xq, best);
    for (int i = 0; i < n; i++) q[i] = pick(better, clamp(nearest<I>(inverse * x[i]), -half, half - 1) + half, q[i]);
  }
  I zero = size < 1e-15f;
  for (int i = 0; i < n; i++) q[i] = pick(zero, I{}, q[i]);
  return pick(zero, F{}, scale);
}

struct Steps { float first, increment; int count; };

// x = scale * q - minimum, q = 0 .. top: least squares, weighed by `w`, for each of a series of trial scales; the least error
// wins. A better minimum is also where the later trials begin.
template <int W>
typename Lanes<W>::F fit_affine(const typename Lanes<W>::F* x, const typename Lanes<W>::F* w, int n, int top, Steps steps,
                                typename Lanes<W>::I* q, typename Lanes<W>::F& minimum) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
  for (int i = 1; i < n; i++) low = vmin(x[i], low), high = vmax(x[i], high), sum_w += w[i], sum_x += w[i] * x[i];
  low = vmin(low, F{});
  I flat = high <= low, trial[32];
  F inverse = (float)top / (high - low), scale = 1 / inverse, error = {};
  for (int i = 0; i < n; i++) {
    q[i] = clamp(nearest<I>(inverse * (x[i] - low)), 0, top);
    F diff = scale * __builtin_convertvector(q[i], F) + low - x[i];
    error += w[i] * (diff * diff);
  }
  for (int step = 0; step <= steps.count; step++) {
    inverse = (steps.first + steps.increment * step + top) / (high - low);
    F sum_q = {}, sum_qq = {}, sum_xq = {};
    for (int i = 0; i < n; i++) {
      trial[i] = clamp(nearest<I>(inverse * (x[i] - low)), 0, top);
      F f = __builtin_convertvector(trial[i], F);
      sum_q += w[i] * f, sum_qq += w[i] * f * f, sum_xq += w[i] * f * x[i];
    }
    F spread = sum_w * sum_qq - sum_q * sum_q;
    F fit = (sum_w * sum_xq - sum_x * sum_q) / spread, offset = (sum_qq * sum_x - sum_q * sum_xq) / spread;
    I above = offset > 0;
    fit = pick(above, sum_xq / sum_qq, fit), offset = pick(above, F{}, offset);
    F trial_error = {};
    for (int i = 0; i < n; i++) {
      F diff = fit * __builtin_convertvector(trial[i], F) + offset - x[i];
      trial_error += w[i] * (diff * diff);
    }
    I better = (spread > 0) & (trial_error < error) & ~flat;
    if (!any(better)) continue;
    for (int i = 0; i < n; i++) q[i] = pick(better, trial[i], q[i]);
    error = pick(better, trial_error, error), scale = pick(better, fit, scale), low = pick(better, offset, low);
  }
  for (int i = 0; i < n; i++) q[i] = pick(flat, I{}, q[i]);
  minimum = -low;
  return pick(flat, F{}, scale);
}

// Eight scales >= 0 as one factor times 0 .. 63; `w` is the weight of each sub-block's error.
inline float fit_scales(const float* x, const float* w, int* q) {
  const int n = 8, top = 63;
  float high = 0;
  for (int i = 0; i < n; i++) high = std::max(high, x[i]);
  for (int i = 0; i < n; i++) q[i] = 0;
  if (high < 1e-15f) return 0;
  float inverse = top / high, best = 0;
  for (int step = -5; step <= 4; step++) {  // -5: the scale as it is
    if (step == 0) continue;
    float trial = step == -5 ? top / high : (0.1f * step + top) / high, scale = 1 / trial, error = 0;
    for (int i = 0; i < n; i++) {
      int l = nearest1(trial * x[i]);
      float diff = x[i] - scale * (step == -5 ? l : std::min(top, l));
      error += w[i] * diff * diff;
    }
    if (step == -5 || error < best) best = error, inverse = trial;
  }
  float xq = 0, qq = 0;
  for (int i = 0; i < n; i++) {
    q[i] = std::min(top, nearest1(inverse * x[i]));
    xq += w[i] * x[i] * q[i], qq += w[i] * q[i] * q[i];
  }
  for (int round = 0, changed = 1; round < 5 && changed; round++) {
    changed = 0;
    for (int i = 0; i < n; i++) {
      float xq1 = xq - w[i] * x[i] * q[i], qq1 = qq - w[i] * q[i] * q[i];
      if (!(xq1 > 0 && qq1 > 0)) continue;
      int l = std::min(top, nearest1(x[i] * qq1 / xq1));
      if (l == q[i]) continue;
      xq1 += w[i] * x[i] * l, qq1 += w[i] * l * l;
      if (xq1 * xq1 * qq > xq * xq * qq1) q[i] = l, xq = xq1, qq = qq1, changed++;
    }
  }
  return qq > 0 ? xq / qq : 0;
}

// Groups of n values side by side into lanes; groups past `count` are zero.
template <int W> void to_lanes(const float* x, int n, int count, typename Lanes<W>::F* lanes) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < W; j++) lanes[i][j] = j < count ? x[j * n + i] : 0;
}
template <class F> CG_INLINE F roots(F v) {
  for (size_t j = 0; j < sizeof v / 4; j++) v[j] = std::sqrt(v[j]);
  return v;
}

// ------------------------------------------------------------------------------------------ 32 weights a block
template <int BITS, bool MIN> void put32(uint8_t* out, float d, float m, const int* q) {
  store(out, to_half(d));
  if (MIN) store(out + 2, to_half(m));
  out += MIN ? 4 : 2;
  if (BITS == 5) {
    uint32_t high = 0;
    for (int i = 0; i < 32; i++) high |= (uint32_t)(q[i] >> 4 & 1) << i;
    store(out, high), out += 4;
  }
  for (int i = 0; i < 16; i++) out[i] = (q[i] & 15) | (q[i + 16] & 15) << 4;
}

template <int BITS, bool MIN> void row32(const float* x, int64_t n, const float* importance, uint8_t* out) {
  constexpr int TOP = (1 << BITS) - 1, HALF = 1 << (BITS - 1), BYTES = 2 + 2 * MIN + 4 * (BITS == 5) + 16;
  using F = Lanes<8>::F;
  using I = Lanes<8>::I;
  int q[32];
  if (!importance) {
    for (; n > 0; n -= 32, x += 32, out += BYTES) {
      F low = load<F>(x), high = low, base = {}, add = F{} + 0.5f;
      for (int i = 8; i < 32; i += 8) low = vmin(load<F>(x + i), low), high = vmax(load<F>(x + i), high);
      float a = low[0], b = high[0];
      for (int j = 1; j < 8; j++) a = std::min(a, low[j]), b = std::max(b, high[j]);
      float d = (b - a) / TOP;
      if (MIN) {
        base += a;
      } else {
        float largest = b > -a ? b : a;
        if (b == -a) for (int i = 31; i >= 0; i--) largest = std::fabs(x[i]) == b ? x[i] : largest;  // first of equals decides
        d = largest / -HALF, add += (float)HALF;
      }
      float inverse = d ? 1 / d : 0;
      for (int i = 0; i < 32; i += 8) {
        I v = vmin(__builtin_convertvector((load<F>(x + i) - base) * inverse + add, I), I{} + TOP);
        store(q + i, v);
      }
      put32<BITS, MIN>(out, d, a, q);
    }
    return;
  }
  float square = 0;
  for (int64_t i = 0; i < n; i++) square += x[i] * x[i];
  square /= n;
  F v[32], w[32];
  I l[32];
  for (; n > 0; n -= 256, x += 256, importance += 256) {
    int count = (int)std::min<int64_t>(8, n / 32);
    to_lanes<8>(x, 32, count, v), to_lanes<8>(importance, 32, count, w);
    for (int i = 0; i < 32; i++) w[i] *= roots(square + v[i] * v[i]);
    F minimum = {}, d = MIN ? fit_affine<8>(v, w, 32, TOP, {-0.9f, 0.05f, 36}, l, minimum) : fit_symmetric<8>(v, w, 32, HALF, l);
    for (int j = 0; j < count; j++, out += BYTES) {
      for (int i = 0; i < 32; i++) q[i] = l[i][j];
      put32<BITS, MIN>(out, d[j], -minimum[j], q);
    }
  }
}

void row_q8_0(const float* x, int64_t n, const float*, uint8_t* out) {
  using F = Lanes<8>::F;
  using I = Lanes<8>::I;
  for (; n > 0; n -= 32, x += 32, out += 34) {
    F size = {};
    for (int i = 0; i < 32; i += 8) size = vmax((F)((I)load<F>(x + i) & 0x7fffffff), size);
    float largest = 0;
    for (int j = 0; j < 8; j++) largest = std::max(largest, size[j]);
    float d = largest / 127, inverse = d ? 1 / d : 0;
    store(out, to_half(d));
    for (int i = 0; i < 32; i += 8) {
      F v = load<F>(x + i) * inverse, a = (F)((I)v & 0x7fffffff);  // half away from zero, as roundf
      I rounded = __builtin_convertvector(a, I);
      rounded -= a - __builtin_convertvector(rounded, F) >= 0.5f;
      rounded = pick(v < 0, -rounded, rounded);
      for (int j = 0; j < 8; j++) out[2 + i + j] = (uint8_t)rounded[j];
    }
  }
}

// v = d * IQ4_VALUES[q]: of 16 scales, by which the largest value comes near an end of the table, the one with the best
// least-squares fit. The table ascends: the index of the nearest is the number of midpoints that are not above.
template <class F, class I> CG_INLINE I nearest_iq4(F v) {
  I index = {};
  for (int i = 0; i < 15; i++) index -= v >= (IQ4_VALUES[i] + IQ4_VALUES[i + 1]) * 0.5f;
  return index;
}
void row_iq4_nl(const float* x, int64_t n, const float* importance, uint8_t* out) {
  using F = Lanes<8>::F;
  using I = Lanes<8>::I;
  F v[32], w[32];
  for (; n > 0; n -= 256, x += 256) {
    const int count = (int)std::min<int64_t>(8, n / 32);
    to_lanes<8>(x, 32, count, v);
    F square = {}, largest = {}, size = {};
    for (int i = 0; i < 32; i++) {
      F a = pick(v[i] < 0, -v[i], v[i]);
      I more = a > size;
      largest = pick(more, v[i], largest), size = pick(more, a, size), square += v[i] * v[i];
    }
    square *= 2.f / 32;
    if (importance) to_lanes<8>(importance, 32, count, w), importance += 256;
    for (int i = 0; i < 32; i++) w[i] = importance ? w[i] * roots(square + v[i] * v[i]) : v[i] * v[i];
    F d = {}, best = {};
    for (int step = -8; step <= 7; step++) {  // -8: the largest value at the table's other end
      F inverse = step == -8 ? 1 / (-largest / (float)IQ4_VALUES[0]) : (float)(step + IQ4_VALUES[0]) / largest, xq = {}, qq = {};
      for (int i = 0; i < 32; i++) {
        const I index = nearest_iq4<F, I>(inverse * v[i]);
        F q;
        for (int j = 0; j < 8; j++) q[j] = (float)IQ4_VALUES[index[j] & 15];
        xq += w[i] * q * v[i], qq += w[i] * q * q;
      }
      I better = step == -8 ? qq > 0 : (qq > 0) & (xq * xq > best * qq);
      d = pick(better, xq / qq, d), best = pick(better, d * xq, best);
    }
    d = pick(size < 1e-15f, F{}, d);
    const F inverse = pick(d != 0, 1 / d, F{});
    I q[32];
    for (int i = 0; i < 32; i++) q[i] = nearest_iq4<F, I>(inverse * v[i]);
    for (int j = 0; j < count; j++, out += 18) {
      store(out, to_half(d[j]));
      for (int i = 0; i < 16; i++) out[2 + i] = (uint8_t)(q[i][j] | q[i + 16][j] << 4);
    }
  }
}

// ------------------------------------------------------------------------------------------ 256 weights a block
template <int BITS> void row_k45(const float* x, int64_t n, const float* importance, uint8_t* out) {
  constexpr int TOP = (1 << BITS) - 1, BYTES = BITS == 4 ? 144 : 176;
  using F = Lanes<8>::F;
  using I = Lanes<8>::I;
  F v[32], w[32];
  I l[32];
  for (; n > 0; n -= 256, x += 256, out += BYTES) {
    to_lanes<8>(x, 32, 8, v);
    F sum_w = {}, minimum;
    if (importance) {
      to_lanes<8>(importance, 32, 8, w), importance += 256;
      float square = 0;
      for (int i = 0; i < 256; i++) square += x[i] * x[i];
      square = 2 * square / 256;
      for (int i = 0; i < 32; i++) w[i] *= roots(square + v[i] * v[i]), sum_w += w[i];
    } else {
      F square = {};
      for (int i = 0; i < 32; i++) square += v[i] * v[i];
      square = roots(square / 32);
      for (int i = 0; i < 32; i++) w[i] = square + (F)((I)v[i] & 0x7fffffff);
    }
    Steps steps = importance ? Steps{-0.9f, 0.05f, 36} : BITS == 4 ? Steps{-1.f, 0.1f, 20} : Steps{-0.5f, 0.1f, 15};
    F scale = fit_affine<8>(v, w, 32, TOP, steps, l, minimum);
    float s[8], m[8], sw[8], d, dmin;
    store(s, scale), store(m, minimum), store(sw, sum_w);
    int sc[8], mn[8];
    if (importance) {
      d = fit_scales(s, sw, sc), dmin = fit_scales(m, sw, mn);
    } else {
      float high = 0, low = 0;
      for (int j = 0; j < 8; j++) high = std::max(high, s[j]), low = std::max(low, m[j]);
      float inverse = high > 0 ? 63 / high : 0, inverse_min = low > 0 ? 63 / low : 0;
      for (int j = 0; j < 8; j++)
        sc[j] = std::min(63, nearest1(inverse * s[j])), mn[j] = std::min(63, nearest1(inverse_min * m[j]));
      d = high / 63, dmin = low / 63;
    }
    store(out, to_half(d)), store(out + 2, to_half(dmin));
    for (int j = 0; j < 4; j++) {
      out[4 + j] = sc[j] | sc[j + 4] >> 4 << 6, out[8 + j] = mn[j] | mn[j + 4] >> 4 << 6;
      out[12 + j] = (sc[j + 4] & 15) | (mn[j + 4] & 15) << 4;
    }
    d = half(load<uint16_t>(out)), dmin = half(load<uint16_t>(out + 2));
    for (int j = 0; j < 8; j++) scale[j] = d * sc[j], minimum[j] = dmin * mn[j];
    uint8_t q[256], *low = out + BYTES - 128;
    for (int i = 0; i < 32; i++) {
      l[i] = pick(scale != 0, clamp(nearest<I>((v[i] + minimum) / scale), 0, TOP), l[i]);
      for (int j = 0; j < 8; j++) q[32 * j + i] = (uint8_t)l[i][j];
    }
    for (int i = 0; i < 128; i++) {
      const uint8_t* pair = q + 64 * (i / 32) + i % 32;
      low[i] = (pair[0] & 15) | pair[32] << 4;
    }
    if (BITS == 5)
      for (int i = 0; i < 32; i++) {
        out[16 + i] = 0;
        for (int j = 0; j < 8; j++) out[16 + i] |= q[32 * j + i] >> 4 << j;
      }
  }
}

void row_q6_k(const float* x, int64_t n, const float* importance, uint8_t* out) {
  using F = Lanes<8>::F;
  using I = Lanes<8>::I;
  F v[2][16], w[2][16], scale[2];
  I l[2][16];
  for (; n > 0; n -= 256, x += 256, out += 210) {
    float largest = 0;
    for (int h = 0; h < 2; h++) {  // eight of the sixteen sub-blocks at a time
      to_lanes<8>(x + 128 * h, 16, 8, v[h]);
      if (importance) to_lanes<8>(importance + 128 * h, 16, 8, w[h]);
      else for (int i = 0; i < 16; i++) w[h][i] = v[h][i] * v[h][i];
      scale[h] = fit_symmetric<8>(v[h], w[h], 16, 32, l[h]);
      for (int j = 0; j < 8; j++) largest = std::fabs(scale[h][j]) > std::fabs(largest) ? scale[h][j] : largest;
    }
    if (importance) importance += 256;
    memset(out, 0, 210);
    if (std::fabs(largest) < 1e-15f) continue;
    float inverse = -128.f / largest;
    store(out + 208, to_half(1 / inverse));
    float d = half(load<uint16_t>(out + 208));
    uint8_t q[256];
    for (int h = 0; h < 2; h++) {
      for (int j = 0; j < 8; j++) {
        int s = std::min(127, nearest1(inverse * scale[h][j]));
        out[192 + 8 * h + j] = (uint8_t)s;
        scale[h][j] = d * s;
      }
      for (int i = 0; i < 16; i++) {
        I rounded = pick(scale[h] != 0, clamp(nearest<I>(v[h][i] / scale[h]), -32, 31) + 32, l[h][i]);
        for (int j = 0; j < 8; j++) q[128 * h + 16 * j + i] = (uint8_t)rounded[j];
      }
    }
    for (int i = 0; i < 64; i++) {
      const uint8_t* a = q + 128 * (i / 32) + i % 32;
      uint8_t* low = out + 64 * (i / 32) + i % 32;
      low[0] = (a[0] & 15) | (a[64] & 15) << 4, low[32] = (a[32] & 15) | (a[96] & 15) << 4;
      out[128 + i] = a[0] >> 4 | a[32] >> 4 << 2 | a[64] >> 4 << 4 | a[96] >> 4 << 6;
    }
  }
}

using Row = void (*)(const float*, int64_t, const float*, uint8_t*);
constexpr int COUNT = 9;
extern const Row QUANTISERS[COUNT];  // in the order of TYPES_WRITTEN below
const Row QUANTISERS[COUNT] = {row32<4, false>, row32<4, true>, row32<5, false>, row32<5, true>, row_q8_0,
                           row_k45<4>,      row_k45<5>,     row_q6_k,        row_iq4_nl};

}  // namespace CG_LEVEL

#if defined(CG_BINDING) && defined(__x86_64__)
namespace avx2 { extern const plain::Row QUANTISERS[plain::COUNT]; }
#endif
}  // namespace cg

#ifdef CG_BINDING
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;

namespace {
template <class T, int N> using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
constexpr int TYPES_WRITTEN[cg::plain::COUNT] = {cg::Q4_0_T, cg::Q4_1_T, cg::Q5_0_T, cg::Q5_1_T, cg::Q8_0_T,
                                                 cg::Q4_K_T, cg::Q5_K_T, cg::Q6_K_T, cg::IQ4_NL_T};

void quantise(const std::string& level, const std::string& type, Array<const float, 2> x, Array<uint8_t, 2> out,
              std::optional<Array<const float, 1>> importance) {
  int t = 0;
  while (t < cg::plain::COUNT && type != cg::TYPE[TYPES_WRITTEN[t]].name) t++;
  if (t == cg::plain::COUNT) throw std::invalid_argument("no quantiser for type " + type + ": choose one of QUANTISERS");
  const auto& [name, block, bytes] = cg::TYPE[TYPES_WRITTEN[t]];
  int64_t rows = x.shape(0), n = x.shape(1);
  if (n % block || (int64_t)out.shape(0) != rows || (int64_t)out.shape(1) != n / block * bytes)
    throw std::invalid_argument(type + ": out must hold the blocks of " + std::to_string(rows) + " x " + std::to_string(n) +
                                " weights");
  if (importance && (int64_t)importance->shape(0) != n)
    throw std::invalid_argument("importance must be one number for each column");
  auto* table = cg::plain::QUANTISERS;
#ifdef __x86_64__
  if (level != "plain") table = cg::avx2::QUANTISERS;
#endif
  const float* w = importance ? importance->data() : nullptr;
  const float* v = x.data();
  uint8_t* to = out.data();
  bool finite = true;
  {
    nb::gil_scoped_release release;
    uint32_t bad = 0;
    for (int64_t i = 0; i < rows * n; i++) {
      uint32_t bits;
      memcpy(&bits, v + i, 4);
      bad |= (bits & 0x7f800000) == 0x7f800000;
    }
    finite = !bad;
    for (int64_t r = 0; finite && r < rows; r++) table[t](v + r * n, n, w, to + r * (n / block * bytes));
  }
  if (!finite) throw std::invalid_argument("holds NaN or infinite weights, which no block can hold: download the file again");
}
}  // namespace

void bind_quantise(nb::module_& m) {
  nb::list names;
  for (int type : TYPES_WRITTEN) names.append(cg::TYPE[type].name);
  m.attr("QUANTISERS") = nb::tuple(names);
  m.def("quantise", &quantise, "level"_a, "type"_a, "x"_a, "out"_a, "importance"_a = nb::none(),
        "Rows of float32 into rows of blocks, optionally weighed by the importance of each column.");
}
#endif
