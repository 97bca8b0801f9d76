// GGUF quantisation blocks: how the bytes of one block become integers 0 .. MAXQ and their scales.
// Two families. 32 weights a block: w = d * (q - OFFSET), or d * q + m. 256 weights a super-block (K-quants):
// w = d * sc * q - dmin * mn with 6- or 8-bit scales per SUB weights. MAXQ = -1 stands for signed bytes.
#pragma once
#include "simd.h"

namespace cg {
namespace CG_LEVEL {

// Shifts, on x86 of 16-bit words. Callers mask off the bits that come from the neighbouring byte.
#if defined(CG_NEON)
CG_INLINE u8x32 bytes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
template <int N> CG_INLINE u8x32 shift_right(u8x32 v) { return {vshrq_n_u8(v.low, N), vshrq_n_u8(v.high, N)}; }
template <int N> CG_INLINE u8x32 shift_left(u8x32 v) { return {vshlq_n_u8(v.low, N), vshlq_n_u8(v.high, N)}; }
#else
CG_INLINE u8x32 bytes(const uint8_t* p) { return load<u8x32>(p); }
typedef uint16_t u16x16 __attribute__((vector_size(32)));
template <int N> CG_INLINE u8x32 shift_right(u8x32 v) { return (u8x32)((u16x16)v >> N); }
template <int N> CG_INLINE u8x32 shift_left(u8x32 v) { return (u8x32)((u16x16)v << N); }
#endif

struct Q4_0 {
  static constexpr int BYTES = 18, MAXQ = 15, OFFSET = 8;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 2); }
};
struct Q4_1 {
  static constexpr int BYTES = 20, MAXQ = 15, OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 4); }
};
struct Q5_0 {
  static constexpr int BYTES = 22, MAXQ = 31, OFFSET = 16;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 6) | spread_bits(b + 2); }
};
struct Q5_1 {
  static constexpr int BYTES = 24, MAXQ = 31, OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 8) | spread_bits(b + 4); }
};
struct Q8_0 {
  static constexpr int BYTES = 34, MAXQ = -1, OFFSET = Q8_OFFSET;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return Q8_OFFSET ? bytes(b + 2) ^ (uint8_t)128 : bytes(b + 2); }
};

// Scales of a super-block, one per 16 weights; `mn` already times OFFSET where the offset is fixed.
struct KScales {
  float d, dmin;
  int16_t sc[16];
  int16_t mn[16];
};
CG_INLINE void k45_scales(const uint8_t* b, KScales& s) {
  s.d = half(load<uint16_t>(b)), s.dmin = half(load<uint16_t>(b + 2));
  const uint8_t* p = b + 4;  // eight 6-bit scales and mins in twelve bytes
  uint32_t w0 = load<uint32_t>(p), w1 = load<uint32_t>(p + 4), w2 = load<uint32_t>(p + 8);
  uint32_t sc[2] = {w0 & 0x3f3f3f3f, (w2 & 0x0f0f0f0f) | (w0 >> 2 & 0x30303030)};
  uint32_t mn[2] = {w1 & 0x3f3f3f3f, (w2 >> 4 & 0x0f0f0f0f) | (w1 >> 2 & 0x30303030)};
  for (int j = 0; j < 8; j++) {
    s.sc[2 * j] = s.sc[2 * j + 1] = sc[j / 4] >> (8 * (j % 4)) & 63;
    s.mn[2 * j] = s.mn[2 * j + 1] = mn[j / 4] >> (8 * (j % 4)) & 63;
  }
}
struct Q4_K {
  static constexpr int BYTES = 144, MAXQ = 15, SUB = 32, D_OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE void scales(const uint8_t* b, KScales& s) { k45_scales(b, s); }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    for (int j = 0; j < 4; j++) {
      u8x32 v = bytes(b + 16 + 32 * j);
      w[2 * j] = v & 15, w[2 * j + 1] = shift_right<4>(v) & 15;
    }
  }
};
struct Q5_K {
  static constexpr int BYTES = 176, MAXQ = 31, SUB = 32, D_OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE void scales(const uint8_t* b, KScales& s) { k45_scales(b, s); }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    u8x32 high = bytes(b + 16), v[4];
    for (int j = 0; j < 4; j++) v[j] = bytes(b + 48 + 32 * j);
    w[0] = (v[0] & 15) | (shift_left<4>(high) & 16), w[1] = (shift_right<4>(v[0]) & 15) | (shift_left<3>(high) & 16);
    w[2] = (v[1] & 15) | (shift_left<2>(high) & 16), w[3] = (shift_right<4>(v[1]) & 15) | (shift_left<1>(high) & 16);
    w[4] = (v[2] & 15) | (high & 16), w[5] = (shift_right<4>(v[2]) & 15) | (shift_right<1>(high) & 16);
    w[6] = (v[3] & 15) | (shift_right<2>(high) & 16), w[7] = (shift_right<4>(v[3]) & 15) | (shift_right<3>(high) & 16);
  }
};
struct Q6_K {
  static constexpr int BYTES = 210, MAXQ = 63, SUB = 16, D_OFFSET = 208;
  static constexpr bool MIN = false;
  static CG_INLINE void scales(const uint8_t* b, KScales& s) {
    s.d = half(load<uint16_t>(b + 208)), s.dmin = s.d;
    for (int j = 0; j < 16; j++) s.sc[j] = (int8_t)b[192 + j], s.mn[j] = 32 * s.sc[j];
  }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    for (int h = 0; h < 2; h++) {
      u8x32 lo = bytes(b + 64 * h), hi = bytes(b + 64 * h + 32), top = bytes(b + 128 + 32 * h);
      w[4 * h] = (lo & 15) | (shift_left<4>(top) & 48);
      w[4 * h + 1] = (hi & 15) | (shift_left<2>(top) & 48);
      w[4 * h + 2] = (shift_right<4>(lo) & 15) | (top & 48);
      w[4 * h + 3] = (shift_right<4>(hi) & 15) | (shift_right<2>(top) & 48);
    }
  }
};

}  // namespace CG_LEVEL
}  // namespace cg
