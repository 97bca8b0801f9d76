// The vector primitives of one SIMD level. kernels.cpp and matrix.cpp are compiled once per level, quantise.cpp for plain and
// AVX2, with CG_AVX512, CG_AVX2, CG_NEON or none of them defined; only this file and parts of those differ between levels. Products
// of bytes come in more forms: beside CG_AVX2, CG_AVXVNNI stands for those of AVX-512 (VNNI) in 256 bits; beside CG_NEON,
// CG_DOTPROD for dot products of four bytes (Armv8.2) and CG_I8MM also for those of 2 x 2 rows of eight (Armv8.6).
//
//   Fv       native vector of floats, FW lanes         (norms, attention, float weights)
//   Iv       native vector of int32, IW = FW lanes     (matrix products: lanes are tokens)
//   u8x32, i32x8, f32x8  fixed widths on every level   (matrix-vector products: lanes are blocks)
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(CG_AVX512) || defined(CG_AVX2)
#define CG_X86 1
#include <immintrin.h>
#elif defined(CG_NEON)
#include <arm_neon.h>
#endif

#ifndef CG_X86
#define CG_X86 0
#endif
#if defined(CG_AVX512) || defined(CG_AVXVNNI)
#define CG_VNNI 1
#endif
#define CG_INLINE inline __attribute__((always_inline))

namespace cg {
namespace CG_LEVEL {

#if defined(CG_NEON)
struct u8x32 { uint8x16_t low, high; };  // GCC would keep a vector of 32 bytes in memory
CG_INLINE u8x32 operator&(u8x32 a, u8x32 b) { return {a.low & b.low, a.high & b.high}; }
CG_INLINE u8x32 operator|(u8x32 a, u8x32 b) { return {a.low | b.low, a.high | b.high}; }
CG_INLINE u8x32 operator^(u8x32 a, u8x32 b) { return {a.low ^ b.low, a.high ^ b.high}; }
CG_INLINE u8x32 splat8(uint8_t b) { return {vdupq_n_u8(b), vdupq_n_u8(b)}; }
CG_INLINE u8x32 operator&(u8x32 a, uint8_t b) { return a & splat8(b); }
CG_INLINE u8x32 operator^(u8x32 a, uint8_t b) { return a ^ splat8(b); }
template <class V, class Half> CG_INLINE V join(Half low, Half high) {
  V v;
  memcpy(&v, &low, 16), memcpy((char*)&v + 16, &high, 16);
  return v;
}
#else
typedef uint8_t u8x32 __attribute__((vector_size(32)));
#endif
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
#if defined(CG_AVX512)
typedef float Fv __attribute__((vector_size(64)));
typedef int32_t Iv __attribute__((vector_size(64)));
#elif defined(CG_AVX2)
typedef float Fv __attribute__((vector_size(32)));
typedef int32_t Iv __attribute__((vector_size(32)));
#else
typedef float Fv __attribute__((vector_size(16)));
typedef int32_t Iv __attribute__((vector_size(16)));
#endif
constexpr int FW = sizeof(Fv) / 4;
constexpr int GROUP = 16;        // tokens that a packed activation group holds
constexpr int NV = GROUP / FW;   // native vectors in a group

template <class V> CG_INLINE V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> CG_INLINE void store(void* p, V v) { memcpy(p, &v, sizeof v); }
CG_INLINE Fv splat(float x) { return x - Fv{}; }
CG_INLINE Iv splat_i(int32_t x) { return x - Iv{}; }
CG_INLINE Fv to_float(Iv v) { return __builtin_convertvector(v, Fv); }
#if !defined(CG_AVX2)  // there Iv is i32x8
CG_INLINE f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }
#endif

// a * b + c, fused where the level has the instruction. Used where no equality across levels is promised.
CG_INLINE Fv fma(Fv a, Fv b, Fv c) {
#if defined(CG_AVX512)
  return (Fv)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(CG_AVX2)
  return (Fv)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(CG_NEON)
  return (Fv)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
CG_INLINE Fv select(Iv mask, Fv yes, Fv no) { return (Fv)((mask & (Iv)yes) | (~mask & (Iv)no)); }
CG_INLINE Fv max(Fv a, Fv b) {
#if defined(CG_AVX512)
  return (Fv)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(CG_AVX2)
  return (Fv)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// The sum of the lanes in one fixed order, halves onto each other; and their maximum.
CG_INLINE float sum(Fv v) {
  for (int n = FW / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
}
CG_INLINE float largest(Fv v) {
  float m = v[0];
  for (int i = 1; i < FW; i++) m = v[i] > m ? v[i] : m;
  return m;
}
// The eight chains of a quantised product, folded in the order that every level and every kernel keeps.
template <class T> CG_INLINE T fold8(T a, T b, T c, T d, T e, T f, T g, T h) {
  return ((a + b) + (c + d)) + ((e + f) + (g + h));
}
CG_INLINE float fold8(f32x8 v) { return fold8<float>(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]); }

// ------------------------------------------------------------------------------------------------ 16-bit floats
CG_INLINE float half(uint16_t h) {
#if CG_X86
  return _cvtsh_ss(h);
#elif defined(CG_NEON)
  __fp16 f; memcpy(&f, &h, 2); return f;
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = sign | ((rest << 13) + 0x38000000);
  else { float f = (float)rest * 0x1p-24f; memcpy(&bits, &f, 4); bits |= sign; }
  float f; memcpy(&f, &bits, 4); return f;
#endif
}
CG_INLINE uint16_t to_half(float f) {  // nearest even; overflow saturates, so that no infinity enters the cache
  f = f > 65504.f ? 65504.f : f < -65504.f ? -65504.f : f;
#if CG_X86
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(CG_NEON)
  __fp16 h = f; uint16_t b; memcpy(&b, &h, 2); return b;
#else
  uint32_t bits; memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest < 0x38800000) {
    float small = std::fabs(f) * 0x1p24f;
    return sign | (uint16_t)std::nearbyintf(small);
  }
  rest += 0xfff + (rest >> 13 & 1);
  return sign | (uint16_t)((rest - 0x38000000) >> 13);
#endif
}
CG_INLINE float bf16(uint16_t h) { uint32_t b = (uint32_t)h << 16; float f; memcpy(&f, &b, 4); return f; }

// FW floats from half precision, bfloat16 or float32 in memory.
struct F16 { static constexpr int BYTES = 2; static CG_INLINE Fv read(const uint8_t* p) {
#if defined(CG_AVX512)
  return (Fv)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(CG_AVX2)
  return (Fv)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(CG_NEON)
  return (Fv)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  Fv v; for (int i = 0; i < FW; i++) v[i] = half(load<uint16_t>(p + 2 * i)); return v;
#endif
}};
struct BF16 { static constexpr int BYTES = 2; static CG_INLINE Fv read(const uint8_t* p) {
#if defined(CG_AVX512)
  return (Fv)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(CG_AVX2)
  return (Fv)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Fv v; for (int i = 0; i < FW; i++) v[i] = bf16(load<uint16_t>(p + 2 * i)); return v;
#endif
}};
struct F32 { static constexpr int BYTES = 4; static CG_INLINE Fv read(const uint8_t* p) { return load<Fv>(p); } };

// ------------------------------------------------------------------------------------------------ exp
// e^x as 2^n * e^r, e^r by a polynomial of degree 7 (Cephes coefficients), about 1 ulp; exactly 0 below -87.3, so that
// a masked key contributes nothing. One definition for vector bodies and tails: tails are padded, never scalar.
CG_INLINE Fv exp(Fv x) {
  Iv zero = x < splat(-87.3f);
  x = select(x > splat(88.0f), splat(88.0f), x);
  Fv n = x * splat(1.44269504f);
  const Fv round = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  n = (n + round) - round;
  Fv r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Fv p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  Iv e = (__builtin_convertvector(n, Iv) + splat_i(127)) << 23;
  return select(zero, Fv{}, p * (Fv)e);
}
CG_INLINE Fv tanh(Fv x) {  // 1 - 2 / (e^2x + 1), which is 1 from x = 20 on
  Fv y = exp(select(x > splat(20.f), splat(20.f), x) * splat(2.f));
  return splat(1.f) - splat(2.f) / (y + splat(1.f));
}
// gelu(x) by the tanh form = x * sigmoid(u), u = 2 sqrt(2/pi) (x + 0.044715 x^3)
CG_INLINE Fv gelu(Fv x) {
  Fv u = splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x);
  return x / (splat(1.f) + exp(-u));
}

// ------------------------------------------------------------------------------------------------ byte products
#if defined(CG_VNNI)
// Each int32 lane of `sums` plus its four products of an unsigned byte of w and a signed one of x, or its two of int16.
#if defined(CG_AVX512)
CG_INLINE __m256i dot_bytes(__m256i sums, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sums, w, x); }
CG_INLINE __m256i dot_words(__m256i sums, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sums, a, b); }
#else
CG_INLINE __m256i dot_bytes(__m256i sums, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
CG_INLINE __m256i dot_words(__m256i sums, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(sums, a, b); }
#endif
#elif defined(CG_AVX2)
CG_INLINE __m256i dot_words(__m256i sums, __m256i a, __m256i b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
#endif
#if CG_X86
// Lane i of the result is the sum of the lanes of v[i].
CG_INLINE i32x8 reduce8(const i32x8 v[8]) {
  auto h = [](i32x8 a, i32x8 b) { return (i32x8)_mm256_hadd_epi32((__m256i)a, (__m256i)b); };
  __m256i a = (__m256i)h(h(v[0], v[1]), h(v[2], v[3])), b = (__m256i)h(h(v[4], v[5]), h(v[6], v[7]));
  return (i32x8)_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
CG_INLINE f32x8 reduce8(const f32x8 v[8]) {
  auto h = [](f32x8 a, f32x8 b) { return (f32x8)_mm256_hadd_ps((__m256)a, (__m256)b); };
  __m256 a = (__m256)h(h(v[0], v[1]), h(v[2], v[3])), b = (__m256)h(h(v[4], v[5]), h(v[6], v[7]));
  return (f32x8)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
#elif defined(CG_NEON)
// Four int32 that add up to the dot product of 32 signed bytes, or of 16: half 0 or 1 of them.
CG_INLINE int8x16_t half_of(u8x32 v, int half) { return vreinterpretq_s8_u8(half ? v.high : v.low); }
CG_INLINE Iv dot16(u8x32 w, int half, const int8_t* x) {
  const int8x16_t a = half_of(w, half), b = vld1q_s8(x + 16 * half);
#if defined(CG_DOTPROD)
  return (Iv)vdotq_s32(vdupq_n_s32(0), a, b);
#else  // two products in a lane of int16: at most 2 * 128 * 127
  return (Iv)vpaddlq_s16(vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
#endif
}
template <int MAXQ> CG_INLINE Iv dot32(u8x32 w, const int8_t* x) {
#if defined(CG_DOTPROD)
  return (Iv)vdotq_s32((int32x4_t)dot16(w, 0, x), half_of(w, 1), vld1q_s8(x + 16));
#else
  if constexpr (MAXQ < 0) return dot16(w, 0, x) + dot16(w, 1, x);
  int16x8_t sums = vdupq_n_s16(0);  // four products in a lane: at most 4 * 63 * 127
  for (int half = 0; half < 2; half++) {
    const int8x16_t a = half_of(w, half), b = vld1q_s8(x + 16 * half);
    sums = vmlal_high_s8(vmlal_s8(sums, vget_low_s8(a), vget_low_s8(b)), a, b);
  }
  return (Iv)vpaddlq_s16(sums);
#endif
}
CG_INLINE i32x8 reduce8(const Iv v[8]) {
  auto sums = [](const Iv* v) {
    return vpaddq_s32(vpaddq_s32((int32x4_t)v[0], (int32x4_t)v[1]), vpaddq_s32((int32x4_t)v[2], (int32x4_t)v[3]));
  };
  return join<i32x8>(sums(v), sums(v + 4));
}
#else
CG_INLINE Iv dot16(u8x32 w, int half, const int8_t* x) {
  Iv r{};
  for (int i = 0; i < 16; i++) r[i / 4] += (int8_t)w[16 * half + i] * x[16 * half + i];
  return r;
}
template <int MAXQ> CG_INLINE Iv dot32(u8x32 w, const int8_t* x) { return dot16(w, 0, x) + dot16(w, 1, x); }
CG_INLINE i32x8 reduce8(const Iv v[8]) {
  i32x8 r;
  for (int i = 0; i < 8; i++) r[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return r;
}
#endif
template <bool SIGNED> CG_INLINE f32x8 bytes_to_floats(const void* p) {
#if CG_X86
  __m128i v = _mm_loadl_epi64((const __m128i*)p);
  return (f32x8)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(v) : _mm256_cvtepu8_epi32(v));
#elif defined(CG_NEON)
  const uint8x8_t v = vld1_u8((const uint8_t*)p);
  const int16x8_t words = SIGNED ? vmovl_s8(vreinterpret_s8_u8(v)) : vreinterpretq_s16_u16(vmovl_u8(v));
  return join<f32x8>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words)));
#else
  f32x8 v;
  for (int i = 0; i < 8; i++) v[i] = SIGNED ? (float)((const int8_t*)p)[i] : (float)((const uint8_t*)p)[i];
  return v;
#endif
}
// out[j, i] = in[i, j] of 8 x 8 floats; strides in floats.
CG_INLINE void transpose8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if CG_X86
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 4; i++)
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 8; i += 4)  // a[i + k]: lane k of both halves, of rows i .. i + 3
    for (int k = 0; k < 2; k++) {
      a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0x44);
      a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0xee);
    }
  for (int k = 0; k < 4; k++) {
    _mm256_storeu_ps(out + k * out_stride, _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
    _mm256_storeu_ps(out + (k + 4) * out_stride, _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
  }
#else
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 8; i++) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}
CG_INLINE int32_t sum(i32x8 v) {
#if CG_X86
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
#else
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#endif
}
// Rounds sixteen floats times `scale` to integers that fit a byte, half to even; returns their sum.
CG_INLINE int32_t round16(const float* x, float scale, int8_t* q) {
#if CG_X86
  __m256i a = _mm256_cvtps_epi32(_mm256_loadu_ps(x) * _mm256_set1_ps(scale));
  __m256i b = _mm256_cvtps_epi32(_mm256_loadu_ps(x + 8) * _mm256_set1_ps(scale));
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  _mm_storeu_si128((__m128i*)q, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  return sum((i32x8)_mm256_add_epi32(a, b));
#elif defined(CG_NEON)
  int32x4_t v[4];
  for (int i = 0; i < 4; i++) v[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), scale));
  const int16x8_t low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1])), high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
  vst1q_s8(q, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  return vaddlvq_s16(vaddq_s16(low, high));
#else
  const Fv round = splat(12582912.0f);  // 1.5 * 2^23
  int32_t v[16], total = 0;
  for (int i = 0; i < 16; i += FW) store(v + i, __builtin_convertvector((load<Fv>(x + i) * splat(scale) + round) - round, Iv));
  for (int i = 0; i < 16; i++) q[i] = (int8_t)v[i], total += v[i];
  return total;
#endif
}
CG_INLINE u8x32 nibbles(const uint8_t* p) {  // 16 bytes: low nibbles, then high nibbles
#if CG_X86
  __m128i v = _mm_loadu_si128((const __m128i*)p);
  return (u8x32)_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
#elif defined(CG_NEON)
  const uint8x16_t v = vld1q_u8(p);
  return {vandq_u8(v, vdupq_n_u8(15)), vshrq_n_u8(v, 4)};
#else
  u8x32 v;
  for (int i = 0; i < 16; i++) v[i] = p[i] & 15, v[i + 16] = p[i] >> 4;
  return v;
#endif
}
CG_INLINE u8x32 look_up(const uint8_t* table, u8x32 codes) {  // table[code] for codes 0 .. 15
#if CG_X86
  return (u8x32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), (__m256i)codes);
#elif defined(CG_NEON)
  union { u8x32 v; uint8x16_t q[2]; } u = {codes};
  for (auto& q : u.q) q = vqtbl1q_u8(vld1q_u8(table), q);
  return u.v;
#else
  for (int i = 0; i < 32; i++) codes[i] = table[codes[i]];
  return codes;
#endif
}
CG_INLINE u8x32 spread_bits(const uint8_t* p) {  // 32 bits: byte i is 16 where bit i is set
#if CG_X86
  __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(p)),
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
  return (u8x32)_mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(v, bit), bit), _mm256_set1_epi8(16));
#elif defined(CG_NEON)
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull)), sixteen = vdupq_n_u8(16);
  auto bytes_of = [&](const uint8_t* two) {
    return vandq_u8(vtstq_u8(vcombine_u8(vld1_dup_u8(two), vld1_dup_u8(two + 1)), bit), sixteen);
  };
  return {bytes_of(p), bytes_of(p + 2)};
#else
  u8x32 v;
  for (int i = 0; i < 32; i++) v[i] = (p[i / 8] >> (i % 8) & 1) << 4;
  return v;
#endif
}
CG_INLINE f32x8 eight_halves(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, const uint8_t* e,
                             const uint8_t* f, const uint8_t* g, const uint8_t* h) {
#if CG_X86
  __m128i v = _mm_cvtsi32_si128(load<uint16_t>(a));
  v = _mm_insert_epi16(v, load<uint16_t>(b), 1), v = _mm_insert_epi16(v, load<uint16_t>(c), 2);
  v = _mm_insert_epi16(v, load<uint16_t>(d), 3), v = _mm_insert_epi16(v, load<uint16_t>(e), 4);
  v = _mm_insert_epi16(v, load<uint16_t>(f), 5), v = _mm_insert_epi16(v, load<uint16_t>(g), 6);
  return (f32x8)_mm256_cvtph_ps(_mm_insert_epi16(v, load<uint16_t>(h), 7));
#else
  return f32x8{half(load<uint16_t>(a)), half(load<uint16_t>(b)), half(load<uint16_t>(c)), half(load<uint16_t>(d)),
               half(load<uint16_t>(e)), half(load<uint16_t>(f)), half(load<uint16_t>(g)), half(load<uint16_t>(h))};
#endif
}
// ORDER: which of eight blocks of 32 a lane holds. `halves`: the float16 at the start of blocks `n` bytes apart, in that order.
#if CG_X86
constexpr int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};
CG_INLINE u8x32 two_halves(const uint8_t* low, const uint8_t* high) {
  return (u8x32)_mm256_set_m128i(_mm_loadu_si128((const __m128i*)high), _mm_loadu_si128((const __m128i*)low));
}
#else
constexpr int ORDER[8] = {0, 1, 2, 3, 4, 5, 6, 7};
#endif
CG_INLINE f32x8 halves(const uint8_t* p, int n) {
  return eight_halves(p + ORDER[0] * n, p + ORDER[1] * n, p + ORDER[2] * n, p + ORDER[3] * n, p + ORDER[4] * n, p + ORDER[5] * n,
                      p + ORDER[6] * n, p + ORDER[7] * n);
}
CG_INLINE i32x8 eight_bytes(const uint8_t* p, int n) {  // the bytes at the start of blocks, as `halves`
#if CG_X86
  __m128i v = _mm_cvtsi32_si128(p[ORDER[0] * n]);
  v = _mm_insert_epi8(v, p[ORDER[1] * n], 1), v = _mm_insert_epi8(v, p[ORDER[2] * n], 2);
  v = _mm_insert_epi8(v, p[ORDER[3] * n], 3), v = _mm_insert_epi8(v, p[ORDER[4] * n], 4);
  v = _mm_insert_epi8(v, p[ORDER[5] * n], 5), v = _mm_insert_epi8(v, p[ORDER[6] * n], 6);
  return (i32x8)_mm256_cvtepu8_epi32(_mm_insert_epi8(v, p[ORDER[7] * n], 7));
#else
  return i32x8{p[0], p[n], p[2 * n], p[3 * n], p[4 * n], p[5 * n], p[6 * n], p[7 * n]};  // ORDER ascends
#endif
}
CG_INLINE f32x8 halves_in_order(const uint8_t* b, int n, int offset) {
  const uint8_t* p = b + offset;
  return eight_halves(p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n, p + 6 * n, p + 7 * n);
}
CG_INLINE float fold_lanes8(f32x8 v) {  // the lanes hold chains by ORDER
  float c[8];
  for (int i = 0; i < 8; i++) c[ORDER[i]] = v[i];
  return fold8<float>(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]);
}
CG_INLINE i32x8 add_pairs(const int16_t* p) {  // lane l: p[2l] + p[2l + 1]
#if CG_X86
  return (i32x8)_mm256_madd_epi16(load<__m256i>(p), _mm256_set1_epi16(1));
#elif defined(CG_NEON)
  return join<i32x8>(vpaddlq_s16(vld1q_s16(p)), vpaddlq_s16(vld1q_s16(p + 8)));
#else
  i32x8 v = load<i32x8>(p);
  return (v << 16 >> 16) + (v >> 16);
#endif
}

// ------------------------------------------------------------------------------------------------ products of many tokens
// Lanes are tokens. A `step` of Dot<MAXQ> multiplies DEPTH bytes of a row, 0 .. MAXQ or signed for MAXQ = -1, by as many of
// each token. Sums hold up to STEPS of them, for ROWS rows at once; `widen` makes int32 of them, times a factor of the row.
#if defined(CG_I8MM)
// Tiles of two rows by two tokens: of rows r and r + 1, sums[r] holds tokens 0, 1 of each four, sums[r + 1] tokens 2, 3.
constexpr int DEPTH = 8;
CG_INLINE Iv row_bytes(const uint8_t* q, int64_t stride, int r) {
  return (Iv)vcombine_u8(vld1_u8(q + (r & ~1) * stride), vld1_u8(q + (r | 1) * stride));
}
CG_INLINE void untile(Iv& a, Iv& b) {
  const int64x2_t first = (int64x2_t)a, second = (int64x2_t)b;
  a = (Iv)vzip1q_s64(first, second), b = (Iv)vzip2q_s64(first, second);
}
#else
constexpr int DEPTH = 4;
CG_INLINE Iv row_bytes(const uint8_t* q, int64_t stride, int r) { return splat_i(load<int32_t>(q + r * stride)); }
CG_INLINE void untile(Iv&, Iv&) {}
#endif
struct DotInt32 {
  using Sums = Iv;
  static constexpr int STEPS = 8, ROWS = 4;
  static CG_INLINE Iv widen(Iv acc) { return acc; }
  static CG_INLINE Iv widen(Iv acc, int factor, int) { return acc * splat_i(factor); }
};
#if defined(CG_VNNI)
template <int MAXQ> struct Dot : DotInt32 {
#if defined(CG_AVX512)
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) { return (Iv)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
#else
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) { return (Iv)dot_bytes((__m256i)acc, (__m256i)w, (__m256i)x); }
#endif
};
#elif defined(CG_AVX2)  // sums pairs in int16, as many as cannot overflow: 2 * MAXQ * 127 * STEPS < 2^15
template <int MAXQ> struct Dot {
  using Sums = Iv;
  static constexpr int STEPS = MAXQ < 0 ? 8 : MAXQ <= 15 ? 8 : MAXQ <= 31 ? 4 : 2, ROWS = 4;
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) {
    if constexpr (MAXQ < 0) {
      __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
      return acc + (Iv)_mm256_madd_epi16(p, _mm256_set1_epi16(1));
    }
    return (Iv)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
  }
  static CG_INLINE Iv widen(Iv acc) {
    if constexpr (MAXQ < 0) return acc;
    return (Iv)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
  }
  static CG_INLINE Iv widen(Iv acc, int factor, int) {
    if constexpr (MAXQ < 0) return acc * splat_i(factor);
    return (Iv)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16((short)factor));
  }
};
#elif defined(CG_I8MM)  // two rows by two tokens
template <int MAXQ> struct Dot : DotInt32 {
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) { return (Iv)vmmlaq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x); }
  using DotInt32::widen;
  static CG_INLINE Iv widen(Iv acc, int first, int second) { return acc * Iv{first, first, second, second}; }
};
#elif defined(CG_DOTPROD)
template <int MAXQ> struct Dot : DotInt32 {
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) { return (Iv)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x); }
};
#elif defined(CG_NEON)  // sums in int16, as many as cannot overflow: MAXQ (of signed bytes 128) * 127 * STEPS < 2^15
template <int MAXQ> struct Dot {
  struct Sums { int16x8_t low, high; };  // four lanes a token
  static constexpr int STEPS = MAXQ < 0 || MAXQ > 63 ? 2 : MAXQ <= 31 ? 8 : 4, ROWS = 2;
  static CG_INLINE Sums step(Sums acc, Iv w, Iv x) {
    const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
    return {vmlal_s8(acc.low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(acc.high, a, b)};
  }
  static CG_INLINE Iv widen(Sums acc) { return (Iv)vpaddq_s32(vpaddlq_s16(acc.low), vpaddlq_s16(acc.high)); }
  static CG_INLINE Iv widen(Sums acc, int factor, int) { return widen(acc) * splat_i(factor); }
};
#else
template <int MAXQ> struct Dot : DotInt32 {
  static CG_INLINE Iv step(Iv acc, Iv w, Iv x) {
    const uint8_t* a = (const uint8_t*)&w; const int8_t* b = (const int8_t*)&x;
    for (int l = 0; l < FW; l++)
      for (int i = 4 * l; i < 4 * l + 4; i++) acc[l] += (MAXQ < 0 ? (int)(int8_t)a[i] : (int)a[i]) * b[i];
    return acc;
  }
};
#endif
// VNNI multiplies unsigned by signed: 128 is added to 8-bit weights, and subtracted again by way of the sum of the activations.
#if defined(CG_VNNI)
constexpr int Q8_OFFSET = 128;
#else
constexpr int Q8_OFFSET = 0;
#endif
// a.lo * b.lo + a.hi * b.hi for the two int16 halves of each lane.
CG_INLINE Iv madd16(Iv a, Iv b) {
#if defined(CG_AVX512)
  return (Iv)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(CG_AVX2)
  return (Iv)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(CG_NEON)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (Iv)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
// The dot product of 16 int16, `a`, with 16 in each lane, a pair in each of b.
CG_INLINE Iv dot_pairs(const int16_t* a, const Iv b[8]) {
#if defined(CG_NEON)
  int32x4_t low = vdupq_n_s32(0), high = low;
  for (int i = 0; i < 8; i++) {
    const int16x8_t x = (int16x8_t)splat_i(load<int32_t>(a + 2 * i)), y = (int16x8_t)b[i];
    low = vmlal_s16(low, vget_low_s16(x), vget_low_s16(y)), high = vmlal_high_s16(high, x, y);
  }
  return (Iv)vpaddq_s32(low, high);
#else
  Iv total{};
  for (int i = 0; i < 8; i++) total += madd16(splat_i(load<int32_t>(a + 2 * i)), b[i]);
  return total;
#endif
}
// The compiler must take v for changed.
#if defined(CG_NEON)
#define CG_OPAQUE(v) asm volatile("" : "+w"(v))
#elif defined(__x86_64__) && !defined(SIMDE_VERSION)  // an emulated vector fits no register
#define CG_OPAQUE(v) asm volatile("" : "+v"(v))
#else
#define CG_OPAQUE(v) (void)(v)
#endif
CG_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace CG_LEVEL
}  // namespace cg
