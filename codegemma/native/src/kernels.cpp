// The kernels of one SIMD level. Numerics v1, for quantised weights: integer sums inside a block are exact; float terms are
// multiplied and added, never contracted, in eight chains by block index (chain = block % 8), which are added in one fixed
// order. So one token and many, one thread and two, AVX-512 and plain C++ give the same product. The build sets
// -ffp-contract=off. Float weights, norms and attention use fma: equal for any batch and threads, but not across levels.
// Level amx has numerics v2 for its products and attention instead: tile_product.cpp, tile_attention.h.
#include "kernels.h"
#include "blocks.h"
#if defined(CG_AMX)
#include "tile_attention.h"
#include "tile_product.h"
#endif

#include <algorithm>

namespace cg {
namespace CG_LEVEL {
namespace {

// The next `count` elements of a buffer, for which `reserve` has made room.
template <class T> T* carve(Lines<uint8_t>& buffer, size_t& used, size_t count) {
  T* p = (T*)(buffer.data() + used);
  used += (count * sizeof(T) + 63) / 64 * 64;
  return p;
}
void reserve(Lines<uint8_t>& buffer, size_t bytes) {
  if (buffer.size() < bytes + 512) buffer.resize(bytes + 512);
}
int64_t pad(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
CG_INLINE Fv load_part(const float* p, int64_t n) {  // n < FW floats, the rest zero
  Fv v{};
  memcpy(&v, p, 4 * n);
  return v;
}

// ------------------------------------------------------------------------------------------------ rows of weights
template <class L> void floats_row(const uint8_t* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + FW <= n; i += FW) store(out + i, L::read(p + i * L::BYTES));
  if (i < n) {
    uint8_t rest[64] = {};
    memcpy(rest, p + i * L::BYTES, (n - i) * L::BYTES);
    Fv v = L::read(rest);
    memcpy(out + i, &v, 4 * (n - i));
  }
}
template <class Q> void blocks32_row(const uint8_t* p, int64_t n, float* out) {
  for (int64_t b = 0; b < n / 32; b++, p += Q::BYTES) {
    u8x32 q = Q::unpack(p);
    float d = Q::scale(p), m = Q::MIN ? half(load<uint16_t>(p + 2)) : 0;
    for (int i = 0; i < 32; i += 8) {
      f32x8 scaled = d * (bytes_to_floats<(Q::MAXQ < 0 && !Q::OFFSET)>((const uint8_t*)&q + i) - (float)Q::OFFSET);
      store(out + b * 32 + i, Q::MIN ? scaled + m : scaled);
    }
  }
}
template <class Q> void blocks256_row(const uint8_t* p, int64_t n, float* out) {
  KScales s;
  u8x32 w[8];
  for (int64_t b = 0; b < n / 256; b++, p += Q::BYTES) {
    Q::scales(p, s), Q::unpack(p, w);
    for (int i = 0; i < 256; i += 8) {
      f32x8 q = bytes_to_floats<(Q::MAXQ < 0 && !Q::OFFSET)>((const uint8_t*)w + i);
      float sc = s.d * s.sc[i / 16];
      store(out + b * 256 + i, Q::MIN ? sc * q - s.dmin * s.mn[i / 16] : sc * (q - (float)Q::OFFSET));
    }
  }
}
void decode(const Weight& w, int64_t row, int64_t first, int64_t n, float* out) {
  const uint8_t* p = w.data + row * w.row_bytes + first / TYPE[w.type].block * TYPE[w.type].bytes;
  switch (w.type) {
    case F32_T: return floats_row<F32>(p, n, out);
    case F16_T: return floats_row<F16>(p, n, out);
    case BF16_T: return floats_row<BF16>(p, n, out);
    case Q4_0_T: return blocks32_row<Q4_0>(p, n, out);
    case Q4_1_T: return blocks32_row<Q4_1>(p, n, out);
    case Q5_0_T: return blocks32_row<Q5_0>(p, n, out);
    case Q5_1_T: return blocks32_row<Q5_1>(p, n, out);
    case Q8_0_T: return blocks32_row<Q8_0>(p, n, out);
    case Q4_K_T: return blocks256_row<Q4_K>(p, n, out);
    case Q5_K_T: return blocks256_row<Q5_K>(p, n, out);
    case Q6_K_T: return blocks256_row<Q6_K>(p, n, out);
    case IQ4_NL_T: return blocks32_row<IQ4_NL>(p, n, out);
    case MXFP4_T: return blocks32_row<MXFP4>(p, n, out);
    case Q2_K_T: return blocks256_row<Q2_K>(p, n, out);
    case Q3_K_T: return blocks256_row<Q3_K>(p, n, out);
    case IQ4_XS_T: return blocks256_row<IQ4_XS>(p, n, out);
  }
}
void embed(const Weight& w, int64_t row, float scale, float* out) {
  decode(w, row, 0, w.cols, out);
  for (int64_t i = 0; i < w.cols; i++) out[i] *= scale;
}

// ------------------------------------------------------------------------------------------------ norm and quantise
// out = x / rms(x) * weight, rms over n in float32 (weight holds the 1 + w of the checkpoint). out may be x.
void norm(const float* x, const float* weight, float* out, int64_t n, float eps) {
  Fv squares{};
  int64_t i = 0;
  for (; i + FW <= n; i += FW) { Fv v = load<Fv>(x + i); squares = fma(v, v, squares); }
  if (i < n) { Fv v = load_part(x + i, n - i); squares = fma(v, v, squares); }
  float scale = 1.0f / std::sqrt(sum(squares) / (float)n + eps);
  for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

#if !defined(CG_AMX)
// One row, in blocks of `block`: q = round(x * 127 / max|x|), half to even; scales max|x| / 127; sums of each 16 q.
void quantise_row(const float* x, int64_t padded, int block, int8_t* q, float* scales, int16_t* sums) {
  for (int64_t b = 0; b < padded / block; b++, x += block, q += block, sums += block / 16) {
    Fv maxima{};
    for (int i = 0; i < block; i += FW) {
      Fv v = load<Fv>(x + i);
      maxima = max(maxima, max(v, -v));
    }
    float top = largest(maxima), inverse = top > 0 ? 127.0f / top : 0;
    scales[b] = top / 127.0f;
    for (int i = 0; i < block; i += 16) sums[i / 16] = (int16_t)round16(x + i, inverse, q + i);
  }
}
// Reorders a row for unpack8: of each two blocks the first halves, then the second; scales and sums by ORDER.
void to_chain_order(int8_t* q, float* scales, int16_t* sums, int64_t padded) {
  for (int64_t g = 0; g < padded / 256; g++, q += 256, scales += 8, sums += 16) {
    for (int i = 0; i < 256; i += 64) std::swap_ranges(q + i + 16, q + i + 32, q + i + 32);
    float d[8];
    int16_t s[16];
    memcpy(d, scales, sizeof d), memcpy(s, sums, sizeof s);
    for (int lane = 0; lane < 8; lane++) scales[lane] = d[ORDER[lane]], memcpy(sums + 2 * lane, s + 2 * ORDER[lane], 4);
  }
}
void quantise_form(const Activations& a, const Quantised& z, int t0, int t1) {
  int64_t P = a.padded, B = P / z.block;
  if (!a.packed) {
    for (int t = t0; t < t1; t++) {
      quantise_row(a.f + t * a.stride, P, z.block, z.q + t * P, z.scales + t * B, z.sums + t * (P / 16));
      if (CG_X86 && z.block == 32) to_chain_order(z.q + t * P, z.scales + t * B, z.sums + t * (P / 16), P);
    }
    return;
  }
  std::vector<int8_t> q(P);
  std::vector<float> scales(B);
  std::vector<int16_t> sums(P / 16);
  for (int t = t0; t < t1; t++) {
    if (t < a.T) quantise_row(a.f + t * a.stride, P, z.block, q.data(), scales.data(), sums.data());
    else std::fill(q.begin(), q.end(), 0), std::fill(scales.begin(), scales.end(), 0.f), std::fill(sums.begin(), sums.end(), 0);
    int64_t group = t / GROUP, lane = t % GROUP;
    int8_t* qo = z.q + group * P * GROUP + lane * DEPTH;
    for (int64_t k = 0; k < P; k += DEPTH) memcpy(qo + k * GROUP, &q[k], DEPTH);
    float* so = z.scales + group * B * GROUP + lane;
    for (int64_t b = 0; b < B; b++) so[b * GROUP] = scales[b];
    int16_t* mo = z.sums + group * (P / 16) * GROUP + lane * 2;
    for (int64_t s = 0; s < P / 32; s++) memcpy(mo + s * GROUP * 2, &sums[2 * s], 4);
  }
}
void quantise(const Activations& a, int t0, int t1) {
  if (a.forms & BLOCKS_32) quantise_form(a, a.q32, t0, t1);
  if (a.forms & BLOCKS_256) quantise_form(a, a.q256, t0, t1);
}

// ------------------------------------------------------------------------------------------------ few tokens
// A row of weights is read once for all tokens. Eight consecutive blocks, one of each chain, share a vector.
// ORDER gives the block of each lane; scales and sums of activations have the same order.
constexpr int AHEAD = 8192;  // bytes from what is read to what is prefetched
#if CG_X86
// Two blocks share a vector, one in each half: low nibbles first, then high ones; activations are in the same order.
template <class Q> CG_INLINE void unpack8(const uint8_t* p, u8x32 w[8]) {
  for (int i = 0; i < 4; i++, p += 2 * Q::BYTES) {
    if constexpr (std::is_same_v<Q, Q8_0>) {
      for (int h = 0; h < 2; h++) {
        w[2 * i + h] = two_halves(p + 2 + 16 * h, p + Q::BYTES + 2 + 16 * h);
        if (Q::OFFSET) w[2 * i + h] ^= (uint8_t)128;
      }
    } else {
      constexpr int QUANTS = Q::BYTES - 16;  // where a block's quants begin
      __m256i v = (__m256i)two_halves(p + QUANTS, p + Q::BYTES + QUANTS);
      w[2 * i] = (u8x32)_mm256_and_si256(v, _mm256_set1_epi8(15));
      w[2 * i + 1] = (u8x32)_mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
      if constexpr (Q::MAXQ == 31) {
        __m256i bits = _mm256_set_m128i(_mm_set1_epi32(load<int32_t>(p + Q::BYTES + QUANTS - 4)),
                                        _mm_set1_epi32(load<int32_t>(p + QUANTS - 4)));
        const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull), sixteen = _mm256_set1_epi8(16);
        for (int h = 0; h < 2; h++) {
          const __m256i from = _mm256_set_epi64x(0x0101010101010101ll * (2 * h + 1), 0x0101010101010101ll * (2 * h),
                                                 0x0101010101010101ll * (2 * h + 1), 0x0101010101010101ll * (2 * h));
          __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(bits, from), bit);
          w[2 * i + h] |= (u8x32)_mm256_and_si256(_mm256_cmpeq_epi8(b, bit), sixteen);
        }
      }
      for (int h = 0; h < 2; h++) w[2 * i + h] = Q::integers(w[2 * i + h]);
    }
  }
}
template <class Q> CG_INLINE i32x8 dots8(const u8x32 w[8], const int8_t* x) {
  __m256i s[4];
  const __m256i ones = _mm256_set1_epi16(1);
  for (int i = 0; i < 4; i++) {
    __m256i x0 = load<__m256i>(x + 64 * i), x1 = load<__m256i>(x + 64 * i + 32), a = (__m256i)w[2 * i], b = (__m256i)w[2 * i + 1];
#if defined(CG_VNNI)
    s[i] = dot_bytes(dot_bytes(_mm256_setzero_si256(), a, x0), b, x1);
#else
    if constexpr (Q::MAXQ < 0) {
      a = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(x0, a));
      b = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(x1, b));
      s[i] = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
    } else {
      s[i] = _mm256_add_epi16(_mm256_maddubs_epi16(a, x0), _mm256_maddubs_epi16(b, x1));
    }
#endif
  }
#if defined(CG_VNNI)
  constexpr bool WIDE_SUMS = true;
#else
  constexpr bool WIDE_SUMS = Q::MAXQ < 0;
#endif
  // Sums of 16-bit pairs stay below 4 * 2 * 31 * 127, less than 2^15.
  __m256i a = WIDE_SUMS ? _mm256_hadd_epi32(s[0], s[1]) : _mm256_madd_epi16(_mm256_hadd_epi16(s[0], s[1]), ones);
  __m256i b = WIDE_SUMS ? _mm256_hadd_epi32(s[2], s[3]) : _mm256_madd_epi16(_mm256_hadd_epi16(s[2], s[3]), ones);
  return (i32x8)_mm256_hadd_epi32(a, b);
}
#else
template <class Q> CG_INLINE void unpack8(const uint8_t* p, u8x32 w[8]) {
  for (int i = 0; i < 8; i++) w[i] = Q::unpack(p + i * Q::BYTES);
}
template <class Q> CG_INLINE i32x8 dots8(const u8x32 w[8], const int8_t* x) {
  Iv s[8];
  for (int i = 0; i < 8; i++) s[i] = dot32<Q::MAXQ>(w[i], x + 32 * i);
  return reduce8(s);
}
#endif
template <class Q, int T> CG_INLINE void eight_blocks(const uint8_t* p, const Activations& a, int64_t g, f32x8* acc) {
  u8x32 w[8];
  unpack8<Q>(p, w);
  f32x8 d = Q::scales(p), m = Q::MIN ? halves(p + 2, Q::BYTES) : f32x8{};
#pragma GCC unroll 5
  for (int t = 0; t < T; t++) {
    i32x8 total = dots8<Q>(w, a.q32.q + t * a.padded + g * 256);
    f32x8 dx = load<f32x8>(a.q32.scales + t * (a.padded / 32) + g * 8), sums_f{};
    if (Q::OFFSET || Q::MIN) {
      i32x8 sums = add_pairs(a.q32.sums + t * (a.padded / 16) + g * 16);
      total -= Q::OFFSET * sums;
      sums_f = to_float(sums);
    }
    f32x8 term = to_float(total) * (d * dx);
    if (Q::MIN) term = term + sums_f * (m * dx);
    acc[t] += term;
  }
}
template <class Q, int T> void few32(const Product& p, const Activations& a, int64_t r0, int64_t r1) {
  const int64_t blocks = p.w->cols / 32, full_groups = blocks / 8;
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t* row = p.w->data + r * p.w->row_bytes;
    f32x8 acc[T] = {};
    for (int64_t g = 0; g < full_groups; g++) {
      const uint8_t* group = row + g * 8 * Q::BYTES;
      for (int i = 0; i < 8 * Q::BYTES; i += 64) prefetch(group + AHEAD + i);
      eight_blocks<Q, T>(group, a, g, acc);
    }
    if (blocks % 8) {
      // A short group reads on into the next row: there the activations and their scales are zero. Behind the last row there
      // is nothing to read, so its blocks are copied.
      const uint8_t* group = row + full_groups * 8 * Q::BYTES;
      uint8_t rest[8 * Q::BYTES];
      if ((r + 1) * p.w->row_bytes + 8 * Q::BYTES > p.w->rows * p.w->row_bytes) {
        memset(rest, 0, sizeof rest), memcpy(rest, group, (blocks % 8) * Q::BYTES);
        group = rest;
      }
      eight_blocks<Q, T>(group, a, full_groups, acc);
    }
    for (int t = 0; t < T; t++) p.out[t * p.stride + r] = fold_lanes8(acc[t]);
  }
}
// few32 where a row is one block: the eight lanes are eight rows instead of eight blocks, and nothing is folded.
void add_narrow(const Product& p, const Activations& h, int64_t r0, int64_t r1) {
  using Q = Q8_0;
  int8_t x[PACKED_FROM][256];
  for (int t = 0; t < h.T; t++)
    for (int i = 0; i < 256; i += 32) {
      const int8_t* q = h.q32.q + t * h.padded;
#if CG_X86
      memcpy(x[t] + i, q + i % 64 / 2, 16), memcpy(x[t] + i + 16, q + i % 64 / 2, 16);
#else
      memcpy(x[t] + i, q, 32);
#endif
    }
  for (int64_t r = r0; r < r1; r += 8) {
    const uint8_t* block = p.w->data + r * Q::BYTES;
    const int n = (int)std::min<int64_t>(8, r1 - r);
    uint8_t rest[8 * Q::BYTES];
    if (r + 8 > p.w->rows) memset(rest, 0, sizeof rest), memcpy(rest, block, n * Q::BYTES), block = rest;
    u8x32 w[8];
    unpack8<Q>(block, w);
    f32x8 d = halves(block, Q::BYTES);
    for (int t = 0; t < h.T; t++) {
      i32x8 total = dots8<Q>(w, x[t]) - Q::OFFSET * (h.q32.sums[2 * t] + h.q32.sums[2 * t + 1]);
      f32x8 term = f32x8{} + to_float(total) * (d * h.q32.scales[t]);
      float y[8], *out = p.out + t * p.stride + r;
      for (int i = 0; i < 8; i++) y[ORDER[i]] = term[i];
      for (int i = 0; i < n; i++) out[i] += y[i];
    }
  }
}
// One super-block against one token: lanes that add up to the scaled products, and to the mins.
#if CG_X86
using Partial = i32x8;
#else
using Partial = Iv;
#endif
struct Lanes { Partial products, mins; };
#if CG_X86
// `sc`: in each 128-bit lane, eight scales: of that half of each of the eight vectors (dot256; by SUB 32, both halves have the
// same). `mn`: one for each sum of 16.
struct Scales { __m256i sc, mn; };
template <class Q> CG_INLINE void read_scales(const uint8_t* b, Scales& scales) {
  auto& [sc, mn] = scales;
  const SubScales sub = Q::sub_scales(b);
  __m128i s = _mm_set_epi64x((long long)sub.sc[Q::SUB == 16], (long long)sub.sc[0]);
  if (Q::SUB == 16) s = _mm_shuffle_epi8(s, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  sc = _mm256_cvtepi8_epi16(s);
  mn = (__m256i)(Q::MIN ? words<Q::SUB>(sub.mn) : words<Q::SUB>(sub.sc) * (int16_t)Q::OFFSET);
}
// 16-bit pairs times their scale, exact as |pair| <= 2 * 127 * 127. The scale of vector j is word j of each 128-bit lane.
template <class Q> CG_INLINE Lanes dot256(const u8x32 w[8], const Scales& scales, const int8_t* x, const int16_t* sums) {
  const auto [sc, mn] = scales;
  __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    __m256i a = (__m256i)w[j], b = load<__m256i>(x + 32 * j);
    __m256i scale = _mm256_shuffle_epi8(sc, _mm256_set1_epi16((short)(2 * j | (2 * j + 1) << 8)));
    if (Q::MAXQ < 0) {  // signed bytes: pairs of offset ones would need more than 16 bits
      if (Q::OFFSET) a = _mm256_xor_si256(a, _mm256_set1_epi8((char)128));
      b = _mm256_sign_epi8(b, a), a = _mm256_abs_epi8(a);
    }
    total = dot_words(total, _mm256_maddubs_epi16(a, b), scale);
  }
  return {(i32x8)total, Q::MAXQ < 0 ? i32x8{} : (i32x8)_mm256_madd_epi16(mn, load<__m256i>(sums))};
}
#else
using Scales = KScales;
template <class Q> CG_INLINE void read_scales(const uint8_t* b, Scales& s) { Q::scales(b, s); }
template <class Q> CG_INLINE Lanes dot256(const u8x32 w[8], const Scales& s, const int8_t* x, const int16_t* sums) {
  Lanes r{};
  for (int j = 0; j < 8; j++, x += 32)
    if (Q::SUB == 32) r.products += dot32<Q::MAXQ>(w[j], x) * splat_i(s.sc[2 * j]);
    else r.products += dot16(w[j], 0, x) * splat_i(s.sc[2 * j]) + dot16(w[j], 1, x) * splat_i(s.sc[2 * j + 1]);
  for (int i = 0; i < 16; i += 2 * FW) r.mins += madd16(load<Iv>(s.mn + i), load<Iv>(sums + i));
  return r;
}
#endif
template <class Q, int T> void few256(const Product& p, const Activations& a, int64_t r0, int64_t r1) {
  const int64_t blocks = p.w->cols / 256;
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t* row = p.w->data + r * p.w->row_bytes;
    f32x8 acc[T] = {};
    for (int64_t b0 = 0; b0 < blocks; b0 += 8) {
      const uint8_t* group = row + b0 * Q::BYTES;
      uint8_t rest[8 * Q::BYTES];
      const int n = (int)std::min<int64_t>(8, blocks - b0);
      if (n < 8 && (r + 1) * p.w->row_bytes + 8 * Q::BYTES > p.w->rows * p.w->row_bytes) {  // as in few32
        memset(rest, 0, sizeof rest), memcpy(rest, group, n * Q::BYTES);
        group = rest;
      }
      Partial products[T][8], mins[T][8];
      for (int i = n; i < 8; i++)
        for (int t = 0; t < T; t++) products[t][i] = mins[t][i] = Partial{};
      for (int i = 0; i < n; i++) {
        const uint8_t* block = group + i * Q::BYTES;
        for (int k = 0; k < Q::BYTES; k += 64) prefetch(block + AHEAD + k);
        u8x32 w[8];
        Q::unpack(block, w);
        Scales scales;
        read_scales<Q>(block, scales);
        for (int t = 0; t < T; t++) {
          Lanes lanes = dot256<Q>(w, scales, a.q256.q + t * a.padded + (b0 + i) * 256,
                                  a.q256.sums + t * (a.padded / 16) + (b0 + i) * 16);
          products[t][i] = lanes.products, mins[t][i] = lanes.mins;
        }
      }
      f32x8 d = halves_in_order(group, Q::BYTES, Q::D_AT);
      f32x8 dmin = Q::MIN ? halves_in_order(group, Q::BYTES, Q::D_AT + 2) : d;
      for (int t = 0; t < T; t++) {
        const float* scales = a.q256.scales + t * (a.padded / 256) + b0;
        f32x8 dx;
        if (n == 8) dx = load<f32x8>(scales);
        else for (int i = 0; i < 8; i++) dx[i] = i < n ? scales[i] : 0.f;
        i32x8 total = reduce8(products[t]), minus = reduce8(mins[t]);
        acc[t] += Q::MIN ? to_float(total) * (d * dx) - to_float(minus) * (dmin * dx) : to_float(total - minus) * (d * dx);
      }
    }
    for (int t = 0; t < T; t++) p.out[t * p.stride + r] = fold8(acc[t]);
  }
}

// ------------------------------------------------------------------------------------------------ many tokens
// Lanes are tokens. A tile of rows is decoded once to bytes; then four rows at a time are multiplied by each group of tokens.
template <int G> CG_INLINE void store_rows(const Fv (*res)[G * NV], const Product& p, int64_t r, int rows, int t0, int T) {
  float tile[4][G * GROUP];
  memcpy(tile, res, sizeof tile);
  int count = std::min(G * GROUP, T - t0);
  float* out = p.out + t0 * p.stride + r;
  if (p.add_from >= 0)
    for (int t = 0; t < count; t++, out += p.stride)
      for (int i = 0; i < rows * (t0 + t >= p.add_from); i++) out[i] += tile[i][t];
  else if (rows == 4) for (int t = 0; t < count; t++, out += p.stride)
    for (int i = 0; i < 4; i++) out[i] = tile[i][t];
  else for (int t = 0; t < count; t++, out += p.stride)
    for (int i = 0; i < rows; i++) out[i] = tile[i][t];
}
template <int G> CG_INLINE void fold_chains(Fv (*acc)[4][G * NV], Fv (*res)[G * NV]) {
  for (int r = 0; r < 4; r++)
    for (int v = 0; v < G * NV; v++)
      res[r][v] = fold8<Fv>(acc[0][r][v], acc[1][r][v], acc[2][r][v], acc[3][r][v], acc[4][r][v], acc[5][r][v],
                            acc[6][r][v], acc[7][r][v]);
}
// Pointer to native vector v of the groups from g0 on, in an array of `per_group` bytes a group.
template <class T> CG_INLINE const T* lane(const void* base, int64_t g0, int v, int64_t per_group, int64_t offset) {
  return (const T*)((const char*)base + (g0 + v / NV) * per_group + offset + (v % NV) * sizeof(Fv));
}

// Adds to total[r][v] the products of N bytes of row r, from byte k on, with those of the tokens of vector v. `widen` gets sums
// and the two rows that they belong to: twice the same row, but with I8MM a pair of rows, since `total` then holds tiles of
// two rows (`untile` in simd.h).
template <class D, int G, int N, class Widen>
CG_INLINE void add_dots(const uint8_t* q, const int8_t* x, int64_t P, int64_t g0, int64_t k, Iv (*total)[G * NV], Widen widen) {
  constexpr int VT = G * NV, HALVES = DEPTH / 4, STEPS = std::min(D::STEPS, N / DEPTH);
  for (int64_t end = k + N; k < end; k += STEPS * DEPTH)
    for (int r0 = 0; r0 < 4; r0 += D::ROWS) {
      typename D::Sums sums[D::ROWS][VT] = {};
#pragma GCC unroll 4  // all eight steps at once would spill sums
      for (int s = 0; s < STEPS; s++) {
        const int64_t byte = k + s * DEPTH;
        Iv tokens[HALVES][VT];
        for (int h = 0; h < HALVES; h++)
          for (int v = 0; v < VT; v++)
            tokens[h][v] = load<Iv>(x + (g0 + v / NV) * P * GROUP + byte * GROUP + (v % NV * HALVES + h) * sizeof(Iv));
        for (int r = 0; r < D::ROWS; r++) {
          Iv w = row_bytes(q + byte, P, r0 + r);
          for (int v = 0; v < VT; v++) sums[r][v] = D::step(sums[r][v], w, tokens[r % HALVES][v]);
        }
      }
      for (int r = 0; r < D::ROWS; r++)
        for (int v = 0; v < VT; v++) {
          const int first = (r0 + r) / HALVES * HALVES;
          total[r0 + r][v] += widen(sums[r][v], first, first + HALVES - 1);
        }
    }
}
template <int VT> CG_INLINE void to_rows(Iv (*total)[VT]) {
  for (int r = 0; r < 4; r += 2)
    for (int v = 0; v < VT; v++) untile(total[r][v], total[r + 1][v]);
}

// CHAINS is 8, or 1 if a row is a single block.
template <class Q, int G, int CHAINS>
__attribute__((noinline)) void micro32(const uint8_t* q, const float* d, const float* m, const Activations& a, int64_t g0,
                                       int64_t blocks, Fv (*res)[G * NV]) {
  constexpr int VT = G * NV;
  using D = Dot<(Q::MAXQ < 0 && Q::OFFSET ? 127 : Q::MAXQ)>;
  const int64_t P = a.padded, nb = P / 32;
  Fv acc[CHAINS][4][VT] = {};
  for (int64_t b = 0; b < blocks; b++) {
    Iv total[4][VT] = {}, sums[VT] = {};
    if (Q::OFFSET || Q::MIN)
      for (int v = 0; v < VT; v++)
        sums[v] = madd16(splat_i(0x00010001), load<Iv>(lane<char>(a.q32.sums, g0, v, P / 16 * GROUP * 2, b * 64)));
    add_dots<D, G, 32>(q, a.q32.q, P, g0, b * 32, total, [](auto sums, int, int) { return D::widen(sums); });
    to_rows<VT>(total);
    for (int v = 0; v < VT; v++) {
      Fv dx = load<Fv>(lane<char>(a.q32.scales, g0, v, nb * GROUP * 4, b * 64));
      for (int r = 0; r < 4; r++) {
        Fv term = to_float(total[r][v] - Q::OFFSET * sums[v]) * (splat(d[r * nb + b]) * dx);
        if (Q::MIN) term = term + to_float(sums[v]) * (splat(m[r * nb + b]) * dx);
        acc[b % CHAINS][r][v] += term;
      }
    }
  }
  if constexpr (CHAINS == 1) memcpy(res, acc, sizeof acc);
  else fold_chains<G>(acc, res);
}
template <class Q, int G>
__attribute__((noinline)) void micro256(const uint8_t* q, const KScales* scales, const Activations& a, int64_t g0,
                                        int64_t blocks, Fv (*res)[G * NV]) {
  constexpr int VT = G * NV;
  using D = Dot<(Q::MAXQ < 0 && Q::OFFSET ? 127 : Q::MAXQ)>;
  const int64_t P = a.padded, nb = P / 256;
  Fv acc[8][4][VT] = {};
  for (int64_t b = 0; b < blocks; b++) {
    const KScales* ks[4] = {scales + b, scales + nb + b, scales + 2 * nb + b, scales + 3 * nb + b};
    Iv total[4][VT] = {}, mins[4][VT];
    for (int i = 0; i < 256; i += Q::SUB)
      add_dots<D, G, Q::SUB>(q, a.q256.q, P, g0, b * 256 + i, total, [&](auto sums, int first, int second) {
        return D::widen(sums, ks[first]->sc[i / 16], ks[second]->sc[i / 16]);
      });
    to_rows<VT>(total);
    for (int v = 0; v < VT; v++) {
      Iv sums[8];
      for (int j = 0; j < 8; j++) sums[j] = load<Iv>(lane<char>(a.q256.sums, g0, v, P / 16 * GROUP * 2, (b * 8 + j) * 64));
      for (int r = 0; r < 4; r++) mins[r][v] = dot_pairs(ks[r]->mn, sums);
    }
    for (int v = 0; v < VT; v++) {
      Fv dx = load<Fv>(lane<char>(a.q256.scales, g0, v, nb * GROUP * 4, b * 64));
      for (int r = 0; r < 4; r++) {
        Fv term = Q::MIN ? to_float(total[r][v]) * (splat(ks[r]->d) * dx) - to_float(mins[r][v]) * (splat(ks[r]->dmin) * dx)
                         : to_float(total[r][v] - mins[r][v]) * (splat(ks[r]->d) * dx);
        acc[b % 8][r][v] += term;
      }
    }
  }
  fold_chains<G>(acc, res);
}
// Runs `micro` for every four rows of the decoded tile and every group of tokens, WIDE groups at once.
constexpr int WIDE = NV == 1 ? 2 : 1;
template <class Micro> CG_INLINE void sweep(const Product& p, const Activations& a, int64_t r0, int64_t r1, Micro micro) {
  int64_t groups = (a.T + GROUP - 1) / GROUP, g = 0;
  auto rows = [&](auto wide) {
    constexpr int G = decltype(wide)::value;
    for (int64_t r = r0; r < r1; r += 4) {
      Fv res[4][G * NV];
      micro(wide, r - r0, g, res);
      store_rows<G>(res, p, r, (int)std::min<int64_t>(4, r1 - r), (int)g * GROUP, a.T);
    }
  };
  for (; g + WIDE <= groups; g += WIDE) rows(std::integral_constant<int, WIDE>{});
  for (; g < groups; g++) rows(std::integral_constant<int, 1>{});
}
template <class Q> void many32(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  const int64_t P = a.padded, nb = P / 32, blocks = p.w->cols / 32, n = pad(r1 - r0, 4);
  size_t used = 0;
  reserve(scratch.tile, n * (P + 8 * nb));
  uint8_t* q = carve<uint8_t>(scratch.tile, used, n * P);
  float* d = carve<float>(scratch.tile, used, n * nb);
  float* m = carve<float>(scratch.tile, used, n * nb);
  for (int64_t r = 0; r < n; r++) {
    const uint8_t* block = p.w->data + (std::min(r0 + r, r1 - 1)) * p.w->row_bytes;  // a short tile repeats its last row
    for (int64_t b = 0; b < blocks; b++, block += Q::BYTES) {
      store(q + r * P + b * 32, Q::unpack(block));
      d[r * nb + b] = Q::scale(block);
      if (Q::MIN) m[r * nb + b] = half(load<uint16_t>(block + 2));
    }
  }
  sweep(p, a, r0, r1, [&](auto wide, int64_t r, int64_t g, auto* res) {
    constexpr int G = decltype(wide)::value;
    if (blocks == 1) micro32<Q, G, 1>(q + r * P, d + r * nb, m + r * nb, a, g, blocks, res);
    else micro32<Q, G, 8>(q + r * P, d + r * nb, m + r * nb, a, g, blocks, res);
  });
}
template <class Q> void many256(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  const int64_t P = a.padded, nb = P / 256, n = pad(r1 - r0, 4);
  size_t used = 0;
  reserve(scratch.tile, n * (P + sizeof(KScales) * nb));
  uint8_t* q = carve<uint8_t>(scratch.tile, used, n * P);
  KScales* s = carve<KScales>(scratch.tile, used, n * nb);
  for (int64_t r = 0; r < n; r++) {
    const uint8_t* block = p.w->data + (std::min(r0 + r, r1 - 1)) * p.w->row_bytes;
    for (int64_t b = 0; b < nb; b++, block += Q::BYTES) {
      u8x32 w[8];
      Q::unpack(block, w), Q::scales(block, s[r * nb + b]);
      memcpy(q + r * P + b * 256, w, 256);
    }
  }
  sweep(p, a, r0, r1, [&](auto wide, int64_t r, int64_t g, auto* res) {
    micro256<Q, decltype(wide)::value>(q + r * P, s + r * nb, a, g, nb, res);
  });
}
template <class Q> void product32(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& s) {
  if (a.packed) return many32<Q>(p, a, r0, r1, s);
  switch (a.T) {
    case 1: return few32<Q, 1>(p, a, r0, r1);
    case 2: return few32<Q, 2>(p, a, r0, r1);
    case 3: return few32<Q, 3>(p, a, r0, r1);
    case 4: return few32<Q, 4>(p, a, r0, r1);
    default: return few32<Q, 5>(p, a, r0, r1);
  }
}
template <class Q> void product256(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& s) {
  if (a.packed) return many256<Q>(p, a, r0, r1, s);
  switch (a.T) {
    case 1: return few256<Q, 1>(p, a, r0, r1);
    case 2: return few256<Q, 2>(p, a, r0, r1);
    case 3: return few256<Q, 3>(p, a, r0, r1);
    case 4: return few256<Q, 4>(p, a, r0, r1);
    default: return few256<Q, 5>(p, a, r0, r1);
  }
}
static_assert(PACKED_FROM == 6, "one case for each smaller number of tokens");
#endif

// ------------------------------------------------------------------------------------------------ float weights
// Eight sums at once: lane i of the result folds the lanes of v[i], always in the same order.
CG_INLINE f32x8 fold_lanes(const Fv v[8]) {
#if defined(CG_AVX512)
  f32x8 h[8];
  for (int i = 0; i < 8; i++)
    h[i] = (f32x8)_mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
  return reduce8(h);
#elif defined(CG_AVX2)
  return reduce8((const f32x8*)v);
#elif defined(CG_NEON)
  float32x2_t h[8];
  for (int i = 0; i < 8; i++) h[i] = vadd_f32(vget_low_f32((float32x4_t)v[i]), vget_high_f32((float32x4_t)v[i]));
  return join<f32x8>(vcombine_f32(vpadd_f32(h[0], h[1]), vpadd_f32(h[2], h[3])),
                     vcombine_f32(vpadd_f32(h[4], h[5]), vpadd_f32(h[6], h[7])));
#else
  f32x8 r;
  for (int i = 0; i < 8; i++) r[i] = sum(v[i]);
  return r;
#endif
}
// Four rows by two tokens at a time; weights widened to float32 in a padded tile, chains are the lanes of one vector.
template <class L> void floats(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  const int64_t K = p.w->cols, P = pad(K, FW);
  size_t used = 0;
  reserve(scratch.tile, 4 * P * 4);
  float* tile = carve<float>(scratch.tile, used, 4 * P);
  for (int64_t r = r0; r < r1; r += 4) {
    int rows = (int)std::min<int64_t>(4, r1 - r);
    for (int i = 0; i < 4; i++) {
      memset(tile + i * P + K, 0, 4 * (P - K));
      floats_row<L>(p.w->data + (r + std::min(i, rows - 1)) * p.w->row_bytes, K, tile + i * P);
    }
    for (int t = 0; t < a.T; t += 2) {
      const float* x[2] = {a.f + t * a.stride, a.f + std::min(t + 1, a.T - 1) * a.stride};
      Fv acc[8] = {};
      for (int64_t k = 0; k < P; k += FW) {
        Fv x0 = load<Fv>(x[0] + k), x1 = load<Fv>(x[1] + k);
        for (int i = 0; i < 4; i++) {
          Fv w = load<Fv>(tile + i * P + k);
          acc[i] = fma(w, x0, acc[i]), acc[4 + i] = fma(w, x1, acc[4 + i]);
        }
      }
      f32x8 y = fold_lanes(acc);
      for (int j = 0; j < 2 && t + j < a.T; j++)
        for (int i = 0; i < rows; i++) {
          float& out = p.out[(t + j) * p.stride + r + i];
          if (p.add_from < 0) out = y[4 * j + i];
          else if (t + j >= p.add_from) out += y[4 * j + i];
        }
    }
  }
}
#if defined(CG_AMX)
void weight_product(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& s) {
  p.w->type == F32_T ? floats<F32>(p, a, r0, r1, s) : tile_product(p, a, r0, r1, s);
}
#else
void weight_product(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& s) {
  if (p.add_from >= 0 && p.w->type == Q8_0_T && !a.packed) return add_narrow(p, a, r0, r1);
  switch (p.w->type) {
    case F32_T: return floats<F32>(p, a, r0, r1, s);
    case F16_T: return floats<F16>(p, a, r0, r1, s);
    case BF16_T: return floats<BF16>(p, a, r0, r1, s);
    case Q4_0_T: return product32<Q4_0>(p, a, r0, r1, s);
    case Q4_1_T: return product32<Q4_1>(p, a, r0, r1, s);
    case Q5_0_T: return product32<Q5_0>(p, a, r0, r1, s);
    case Q5_1_T: return product32<Q5_1>(p, a, r0, r1, s);
    case Q8_0_T: return product32<Q8_0>(p, a, r0, r1, s);
    case Q4_K_T: return product256<Q4_K>(p, a, r0, r1, s);
    case Q5_K_T: return product256<Q5_K>(p, a, r0, r1, s);
    case Q6_K_T: return product256<Q6_K>(p, a, r0, r1, s);
    case IQ4_NL_T: return product32<IQ4_NL>(p, a, r0, r1, s);
    case MXFP4_T: return product32<MXFP4>(p, a, r0, r1, s);
    case Q2_K_T: return product256<Q2_K>(p, a, r0, r1, s);
    case Q3_K_T: return product256<Q3_K>(p, a, r0, r1, s);
    case IQ4_XS_T: return product256<IQ4_XS>(p, a, r0, r1, s);
  }
}
#endif
void add_adapter_terms(const AdapterTerms& terms, float* out, int64_t stride, int64_t r0, int64_t r1, Scratch& scratch) {
  if (terms.count) wait_for_zero(*terms.pending);
  for (const AdapterTerm* s = terms.data; s < terms.data + terms.count; s++) {
    Product p{&s->b, nullptr, out + s->start * stride, stride};
    p.add_from = s->first - s->start;
    weight_product(p, s->h, r0, r1, scratch);
  }
}
void product(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  if (!p.gate) {
    weight_product(p, a, r0, r1, scratch);
    return add_adapter_terms(p.terms, p.out, p.stride, r0, r1, scratch);
  }
  const int64_t n = r1 - r0, stride = pad(n, FW);
  reserve(scratch.gate, 2 * a.T * stride * 4);
  size_t used = 0;
  float* g = carve<float>(scratch.gate, used, a.T * stride);
  float* u = carve<float>(scratch.gate, used, a.T * stride);
  weight_product({p.gate, nullptr, g - r0, stride}, a, r0, r1, scratch);
  weight_product({p.w, nullptr, u - r0, stride}, a, r0, r1, scratch);
  add_adapter_terms(p.gate_terms, g - r0, stride, r0, r1, scratch);
  add_adapter_terms(p.terms, u - r0, stride, r0, r1, scratch);
  for (int t = 0; t < a.T; t++, g += stride, u += stride) {
    for (int64_t i = 0; i < n; i += FW) store(u + i, gelu(load<Fv>(g + i)) * load<Fv>(u + i));
    memcpy(p.out + t * p.stride + r0, u, 4 * n);
  }
}
#if !defined(CG_AMX)
int64_t tile_rows(const Weight& w, bool packed) {
  int64_t rows = packed ? 65536 / std::max<int64_t>(w.cols, 1) : 16384 / std::max<int64_t>(w.row_bytes, 1);
  return std::clamp<int64_t>(rows / 4 * 4, packed ? 8 : 4, packed ? 64 : 256);
}
#endif

// ------------------------------------------------------------------------------------------------ attention
void rotate(float* x, int width, const Rope& rope, float scale) {
  int h = width / 2;
  for (int i = 0; i < h; i++) {
    float a = x[i], b = x[i + h];
    x[i] = (a * rope.cos[i] - b * rope.sin[i]) * scale;
    x[i + h] = (b * rope.cos[i] + a * rope.sin[i]) * scale;
  }
}
void split_heads(const HeadSplit& s) {
  const int H = s.width;
  for (int n = 0; n < s.heads + s.kv_heads; n++) {
    float* x = s.row + n * H;
    const float* w = n < s.heads ? s.q_norm : s.k_norm;
    if (w) norm(x, w, x, H, s.eps);
    rotate(x, H, s.rope, n < s.heads ? s.query_scale : 1.0f);
  }
  const float *k = s.row + s.heads * H, *v = k + s.kv_heads * H;
  const int64_t head = kv_bytes(s.kv_type, 1, H);  // of a page
  for (int n = 0; n < s.kv_heads; n++, k += H, v += H) {
    uint8_t *keys = s.keys + n * head, *values = s.values + n * head;
#if defined(CG_AMX)
    if (s.kv_type == BF16_T) {
      store_key_and_value(k, v, H, s.slot, (uint16_t*)keys, (uint16_t*)values);
      continue;
    }
#endif
    const int64_t offset = (int64_t)s.slot * H;
    if (s.kv_type == F16_T)
      for (int i = 0; i < H; i++)
        ((uint16_t*)keys)[offset + i] = to_half(k[i]), ((uint16_t*)values)[offset + i] = to_half(v[i]);
    else
      memcpy((float*)keys + offset, k, 4 * H), memcpy((float*)values + offset, v, 4 * H);
  }
}

constexpr int CHUNK = 32;  // keys widened to float32 at a time: 32 KB at head width 256
constexpr float MASKED = -INFINITY;

struct Rows {              // the query rows of one task, in scratch, padded to fours or whole tiles
  int n, padded, P;        // rows; the same padded; head width padded to 2 FW
  float *q, *scores, *values, *merged, *wide;
  uint16_t *queries, *weights;  // in bfloat16, as first factors (tiles.h)
  float top[ROWS], total[ROWS], merged_top[ROWS], merged_total[ROWS];
  int position[ROWS];
};
// A chunk's keys or values widened to float32, once for many rows.
template <class L> CG_INLINE void widen_chunk(const uint8_t* p, int H, Rows& s) {
  for (int j = 0; j < CHUNK; j++) {
    floats_row<L>(p + (int64_t)j * H * L::BYTES, H, s.wide + j * s.P);
    if (s.P > H) memset(s.wide + j * s.P + H, 0, 4 * (s.P - H));
  }
}
// Scores of all rows against one chunk: four rows by two keys at a time.
template <class L> CG_INLINE void chunk_scores(Rows& s, const uint8_t* keys, int column) {
  const int64_t row_bytes = (int64_t)s.P * L::BYTES;
  for (int r = 0; r < s.padded; r += 4) {
    const float* q = s.q + r * s.P;
    float* out = s.scores + r * KEY_SPAN + column;
    for (int j = 0; j < CHUNK; j += 2) {
      const uint8_t* k = keys + j * row_bytes;
      Fv acc[8] = {};
      for (int h = 0; h < s.P; h += FW) {
        Fv k0 = L::read(k + h * L::BYTES), k1 = L::read(k + row_bytes + h * L::BYTES);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          Fv a = load<Fv>(q + i * s.P + h);
          acc[2 * i] = fma(a, k0, acc[2 * i]), acc[2 * i + 1] = fma(a, k1, acc[2 * i + 1]);
        }
      }
      f32x8 y = fold_lanes(acc);
      for (int i = 0; i < 4; i++) out[i * KEY_SPAN + j] = y[2 * i], out[i * KEY_SPAN + j + 1] = y[2 * i + 1];
    }
  }
}
// values += weights * V over one chunk, keys in ascending order: four rows by two vectors at a time.
template <class L> CG_INLINE void chunk_values(Rows& s, const uint8_t* values, int column) {
  const int64_t row_bytes = (int64_t)s.P * L::BYTES;
  for (int r = 0; r < s.padded; r += 4) {
    const float* p = s.scores + r * KEY_SPAN + column;
    for (int h = 0; h < s.P; h += 2 * FW) {
      float* o = s.values + r * s.P + h;
      Fv acc[8];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) acc[2 * i] = load<Fv>(o + i * s.P), acc[2 * i + 1] = load<Fv>(o + i * s.P + FW);
      const uint8_t* v = values + h * L::BYTES;
      for (int j = 0; j < CHUNK; j++, v += row_bytes) {
        Fv v0 = L::read(v), v1 = L::read(v + FW * L::BYTES);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          Fv w = splat(p[i * KEY_SPAN + j]);
          acc[2 * i] = fma(w, v0, acc[2 * i]), acc[2 * i + 1] = fma(w, v1, acc[2 * i + 1]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) store(o + i * s.P, acc[2 * i]), store(o + i * s.P + FW, acc[2 * i + 1]);
    }
  }
}
// Scores of a span to weights: cap, mask, exp(score - maximum). A row without visible keys has total 0.
CG_INLINE void segment_softmax(const Attention& a, Rows& s, int first) {
  for (int r = 0; r < s.n; r++) {
    float* x = s.scores + r * KEY_SPAN;
    int hi = std::min(s.position[r] + 1 - first, KEY_SPAN);
    int lo = a.window ? std::max(s.position[r] - a.window + 1 - first, 0) : 0;
    s.top[r] = MASKED, s.total[r] = 0;
    if (lo >= hi) { memset(x, 0, 4 * KEY_SPAN); continue; }
    if (a.softcap)
      for (int i = lo / FW * FW; i < hi; i += FW)
        store(x + i, splat(a.softcap) * tanh(load<Fv>(x + i) * splat(1.0f / a.softcap)));
    for (int i = 0; i < lo; i++) x[i] = MASKED;
    for (int i = hi; i < KEY_SPAN; i++) x[i] = MASKED;
    Fv m = splat(MASKED), t{};
    for (int i = lo / FW * FW; i < hi; i += FW) m = max(m, load<Fv>(x + i));
    s.top[r] = largest(m);
    for (int i = 0; i < KEY_SPAN; i += FW) {
      Fv e = i + FW <= lo || i >= hi ? Fv{} : exp(load<Fv>(x + i) - splat(s.top[r]));
      store(x + i, e), t += e;
    }
    s.total[r] = sum(t);
  }
}
// Merges a partial into the running one; both are scaled to their common maximum.
CG_INLINE void merge_row(float* into, float& top, float& total, const float* from, float top2, float total2, int n) {
  if (total2 == 0) return;
  if (total == 0) {
    memcpy(into, from, 4 * n);
    top = top2, total = total2;
    return;
  }
  float m = std::max(top, top2), a = exp(splat(top - m))[0], b = exp(splat(top2 - m))[0];
  for (int i = 0; i < n; i++) into[i] = into[i] * a + from[i] * b;
  total = total * a + total2 * b, top = m;
}
// The keys of a task's kv head from position `key` on, as far as its page goes.
template <class L> CG_INLINE const uint8_t* keys_from(const Attention& a, const AttentionTask& t, int key) {
  return (const uint8_t*)t.pages[key / PAGE] + a.layer_offset + ((int64_t)t.kv_head * PAGE + key % PAGE) * a.width * L::BYTES;
}
// span_scores: the scores against keys begin .. end of the span that starts at `base`. span_values: weights * V over the same.
template <class L> CG_INLINE void span_scores(const Attention& a, const AttentionTask& t, Rows& s, int base, int begin, int end) {
  const bool direct = s.padded == 4 && s.P == a.width;  // for only four rows, widening costs more than it saves
  for (int key = begin; key < end; key += CHUNK) {
    const uint8_t* keys = keys_from<L>(a, t, key);
    if (direct) chunk_scores<L>(s, keys, key - base);
    else widen_chunk<L>(keys, a.width, s), chunk_scores<F32>(s, (const uint8_t*)s.wide, key - base);
  }
}
template <class L> CG_INLINE void span_values(const Attention& a, const AttentionTask& t, Rows& s, int base, int begin, int end) {
  const bool direct = s.padded == 4 && s.P == a.width;
  memset(s.values, 0, 4 * s.padded * s.P);
  for (int key = begin; key < end; key += CHUNK) {
    const uint8_t* values = keys_from<L>(a, t, key) + a.kv_offset;
    if (direct) chunk_values<L>(s, values, key - base);
    else widen_chunk<L>(values, a.width, s), chunk_values<F32>(s, (const uint8_t*)s.wide, key - base);
  }
}
#if defined(CG_AMX)  // a cache of bfloat16 lies in tiles
static_assert(CHUNK == STEP && ROWS == 2 * SIDE);
CG_INLINE const uint16_t* head_page(const Attention& a, const AttentionTask& t, int key) {
  return (const uint16_t*)((const uint8_t*)t.pages[key / PAGE] + a.layer_offset + t.kv_head * kv_bytes(BF16_T, 1, a.width));
}
template <> void span_scores<BF16>(const Attention& a, const AttentionTask& t, Rows& s, int base, int begin, int end) {
  for (int key = begin; key < end; key += STEP) {
    const uint16_t* keys = head_page(a, t, key) + key % PAGE * s.P;
    multiply_columns(s.queries, s.padded, s.P / STEP, [=](int64_t step) { return keys + step * FACTOR; }, s.P * SIDE,
                     s.scores + key - base, KEY_SPAN);
  }
}
template <> void span_values<BF16>(const Attention& a, const AttentionTask& t, Rows& s, int base, int begin, int end) {
  const int64_t steps = (end - begin + STEP - 1) / STEP;
  round_rows(s.scores + begin - base, s.padded, KEY_SPAN, steps, s.weights);
  for (int h = 0; h < s.P; h += 2 * SIDE) {
    auto values = [&](int64_t step) {
      const int key = begin + (int)step * STEP;
      return head_page(a, t, key) + a.kv_offset / 2 + h * PAGE + key % PAGE / STEP * FACTOR;
    };
    multiply_columns(s.weights, s.padded, steps, values, PAGE * SIDE, s.values + h, s.P);
  }
}
#endif
template <class L> void attend_as(const Attention& a, const AttentionTask& t, Scratch& scratch) {
  constexpr bool TILES = std::is_same_v<L, BF16>;
  const int H = a.width, G = a.heads / a.kv_heads;
  static thread_local Rows s;
  s.n = t.tokens * t.heads, s.padded = (int)pad(s.n, TILES ? 16 : 4), s.P = (int)pad(H, 2 * FW);
  size_t used = 0, row = (size_t)s.padded * s.P, scores = (size_t)s.padded * KEY_SPAN;
  size_t wide = TILES ? 0 : (size_t)CHUNK * s.P, factors = TILES ? row + scores : 0;
  reserve(scratch.tile, (row * 3 + scores + wide) * 4 + factors * 2 + 512);
  s.q = carve<float>(scratch.tile, used, row), s.values = carve<float>(scratch.tile, used, row);
  s.merged = carve<float>(scratch.tile, used, row), s.scores = carve<float>(scratch.tile, used, scores);
  s.wide = carve<float>(scratch.tile, used, wide);
  s.queries = carve<uint16_t>(scratch.tile, used, TILES ? row : 0);
  s.weights = carve<uint16_t>(scratch.tile, used, TILES ? scores : 0);
  memset(s.q, 0, 4 * row), memset(s.scores + s.n * KEY_SPAN, 0, 4 * (scores - s.n * KEY_SPAN));
  for (int r = 0; r < s.n; r++) {
    const float* from = a.q + (t.token + r / t.heads) * a.q_stride + (t.kv_head * G + t.first_head + r % t.heads) * H;
    memcpy(s.q + r * s.P, from, 4 * H);
    s.position[r] = t.position + r / t.heads, s.merged_total[r] = 0;
  }
#if defined(CG_AMX)
  if constexpr (TILES) round_rows(s.q, s.padded, s.P, s.P / STEP, s.queries);
#endif
  const int last = t.position + t.tokens - 1, first = a.window ? std::max(0, t.position - a.window + 1) : 0;
  int span0 = first / KEY_SPAN, span1 = last / KEY_SPAN;
  if (t.span >= 0) span0 = span1 = t.span;
  for (int span = span0; span <= span1; span++) {
    const int base = span * KEY_SPAN, end = std::min(base + KEY_SPAN, last + 1);
    const int begin = std::max(base, first) / CHUNK * CHUNK;
    span_scores<L>(a, t, s, base, begin, end);
    segment_softmax(a, s, base);
    span_values<L>(a, t, s, base, begin, end);
    if (t.span >= 0) {
      for (int r = 0; r < s.n; r++) {
        float* o = t.partial + (int64_t)r * (H + 2);
        memcpy(o, s.values + r * s.P, 4 * H);
        o[H] = s.top[r], o[H + 1] = s.total[r];
      }
      return;
    }
    for (int r = 0; r < s.n; r++)
      merge_row(s.merged + r * s.P, s.merged_top[r], s.merged_total[r], s.values + r * s.P, s.top[r], s.total[r], H);
  }
  for (int r = 0; r < s.n; r++) {
    float* o = a.out + (t.token + r / t.heads) * a.out_stride + (t.kv_head * G + t.first_head + r % t.heads) * H;
    for (int i = 0; i < H; i++) o[i] = s.merged[r * s.P + i] / s.merged_total[r];
  }
}
void attend(const Attention& a, const AttentionTask& t, Scratch& s) {
#if defined(CG_AMX)
  if (a.kv_type == BF16_T) {
    configure_tiles(SIDE);
    attend_as<BF16>(a, t, s);
    return release_tiles();
  }
#endif
  a.kv_type == F16_T ? attend_as<F16>(a, t, s) : attend_as<F32>(a, t, s);
}

// t.partial: [spans, rows, H + 2] of the task's rows, in ascending order of spans.
void merge(const Attention& a, const AttentionTask& t, int spans) {
  const int H = a.width, G = a.heads / a.kv_heads, n = t.tokens * t.heads;
  for (int r = 0; r < n; r++) {
    float top = MASKED, total = 0;
    float* o = a.out + (t.token + r / t.heads) * a.out_stride + (t.kv_head * G + t.first_head + r % t.heads) * H;
    for (int span = 0; span < spans; span++) {
      const float* p = t.partial + ((int64_t)span * n + r) * (H + 2);
      merge_row(o, top, total, p, p[H], p[H + 1], H);
    }
    for (int i = 0; i < H; i++) o[i] /= total;
  }
}

// ------------------------------------------------------------------------------------------------ logits
void softcap(float* x, int64_t n, float cap) {
  int64_t i = 0;
  for (; i + FW <= n; i += FW) store(x + i, splat(cap) * tanh(load<Fv>(x + i) * splat(1.0f / cap)));
  if (i < n) {
    Fv v = splat(cap) * tanh(load_part(x + i, n - i) * splat(1.0f / cap));
    memcpy(x + i, &v, 4 * (n - i));
  }
}
// Largest value, its lowest index, and the sum of exp(x - largest).
void log_sum(const float* x, int64_t n, float* largest_out, float* total, int64_t* index) {
  Fv m = splat(MASKED), t{};
  int64_t i = 0, body = n / FW * FW;
  for (; i < body; i += FW) m = max(m, load<Fv>(x + i));
  float maximum = largest(m);
  for (; i < n; i++) maximum = x[i] > maximum ? x[i] : maximum;
  for (i = 0; i < body; i += FW) t += exp(load<Fv>(x + i) - splat(maximum));
  if (body < n) {
    Fv rest = splat(MASKED);
    memcpy(&rest, x + body, 4 * (n - body));
    t += exp(rest - splat(maximum));
  }
  *largest_out = maximum, *total = sum(t), *index = 0;
  for (i = 0; i < n; i++) if (x[i] == maximum) { *index = i; break; }
}

#if !defined(CG_AMX)
// Multiply-adds of bytes into exact sums, in registers only: the peak rate of the multipliers.
int64_t peak(int64_t rounds) {
  using D = Dot<127>;
  constexpr int SUMS = 12;  // enough to hide the latency
  Iv w = splat_i(0x01020304), x = splat_i(0x04030201);
  D::Sums sums[SUMS] = {};
  for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      CG_OPAQUE(w);  // or the compiler would see equal sums
      sums[j] = D::step(sums[j], w, x);
    }
  }
#pragma GCC unroll 12  // else the sums would lie in memory
  for (int j = 0; j < SUMS; j++) x += D::widen(sums[j]);
  volatile int keep = x[0];
  (void)keep;
  return rounds * SUMS * FW * DEPTH * 2;
}
#endif

const Kernels table = {CG_LEVEL_NAME, embed,  norm,  form_of, quantise, product, tile_rows,
                       split_heads,   attend, merge, softcap, log_sum,  decode,  peak,      &matrix_kernels};

}  // namespace

const Kernels* kernels() { return &table; }
}  // namespace CG_LEVEL
}  // namespace cg
