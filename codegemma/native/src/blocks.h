// GGUF quantisation blocks: how the bytes of one block become integers 0 .. MAXQ and their scales.
// Two families. 32 weights a block: w = d * (q - OFFSET), or d * q + m. 256 weights a super-block (K-quants and IQ4_XS):
// w = d * sc * (q - OFFSET), or d * sc * q - dmin * mn, with a scale of 4 to 8 bits per SUB weights. MAXQ = -1 stands for
// signed bytes, to which a level may add an OFFSET of 128. D_AT: the byte of a block where d stands.
#pragma once
#include "simd.h"

namespace cg {
namespace CG_LEVEL {

// Shifts, of 16-bit words except on NEON: callers mask off the bits that come from the neighbouring byte.
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

// Some types store an index into a table of sixteen values.
struct Table { alignas(16) uint8_t values[16]; };
constexpr Table with_offset(const int (&values)[16], int offset) {
  Table t{};
  for (int i = 0; i < 16; i++) t.values[i] = (uint8_t)(values[i] + offset);
  return t;
}
constexpr int IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr Table IQ4_TABLE = with_offset(IQ4_VALUES, Q8_OFFSET);
constexpr Table MXFP4_TABLE = with_offset({0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}, 12);

// What most types of 32 weights share: the block begins with its scale, a half, and its codes are the integers.
template <class Q> struct Block {
  static CG_INLINE float scale(const uint8_t* b) { return half(load<uint16_t>(b)); }
  static CG_INLINE f32x8 scales(const uint8_t* p) { return halves(p, Q::BYTES); }  // of eight blocks, by ORDER
  static CG_INLINE u8x32 integers(u8x32 codes) { return codes; }
};
struct Q4_0 : Block<Q4_0> {
  static constexpr int BYTES = 18, MAXQ = 15, OFFSET = 8;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 2); }
};
struct Q4_1 : Block<Q4_1> {
  static constexpr int BYTES = 20, MAXQ = 15, OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 4); }
};
struct Q5_0 : Block<Q5_0> {
  static constexpr int BYTES = 22, MAXQ = 31, OFFSET = 16;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 6) | spread_bits(b + 2); }
};
struct Q5_1 : Block<Q5_1> {
  static constexpr int BYTES = 24, MAXQ = 31, OFFSET = 0;
  static constexpr bool MIN = true;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return nibbles(b + 8) | spread_bits(b + 4); }
};
struct Q8_0 : Block<Q8_0> {
  static constexpr int BYTES = 34, MAXQ = -1, OFFSET = Q8_OFFSET;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return Q8_OFFSET ? bytes(b + 2) ^ (uint8_t)128 : bytes(b + 2); }
};
struct IQ4_NL : Block<IQ4_NL> {
  static constexpr int BYTES = 18, MAXQ = -1, OFFSET = Q8_OFFSET;
  static constexpr bool MIN = false;
  static CG_INLINE u8x32 integers(u8x32 codes) { return look_up(IQ4_TABLE.values, codes); }
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return integers(nibbles(b + 2)); }
};
struct MXFP4 : Block<MXFP4> {  // the scale is an exponent, halved since the table's values are doubled
  static constexpr int BYTES = 17, MAXQ = 24, OFFSET = 12;
  static constexpr bool MIN = false;
  static CG_INLINE f32x8 scales(const uint8_t* p) {
    const i32x8 e = eight_bytes(p, BYTES);
    const i32x8 small = e < 2;  // 2^-128 and 2^-127 are denormal
    return (f32x8)((small & (0x00200000 << (e & small))) | (~small & (e - 1) << 23));
  }
  static CG_INLINE float scale(const uint8_t* b) {
    uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : (b[0] - 1u) << 23;
    float f; memcpy(&f, &bits, 4); return f;
  }
  static CG_INLINE u8x32 integers(u8x32 codes) { return look_up(MXFP4_TABLE.values, codes); }
  static CG_INLINE u8x32 unpack(const uint8_t* b) { return integers(nibbles(b + 1)); }
};

// The scales of a super-block, one for each 16 weights. `mn`: its minima if the type has them, else sc * OFFSET.
struct KScales {
  float d, dmin;
  int16_t sc[16];
  int16_t mn[16];
};
// What a type's `sub_scales` returns: a signed byte for each of its 16 scales (SUB = 32: 8), and for its minima if it has any.
struct SubScales { uint64_t sc[2], mn[2]; };
// Signed bytes as 16-bit words, one for each 16 weights: by SUB 32, each byte twice.
typedef int16_t i16x16 __attribute__((vector_size(32)));
template <int SUB> CG_INLINE i16x16 words(const uint64_t bytes[2]) {
#if CG_X86
  const __m128i v = _mm_set_epi64x((long long)bytes[SUB == 16], (long long)bytes[0]);
  return (i16x16)_mm256_cvtepi8_epi16(SUB == 16 ? v : _mm_unpacklo_epi8(v, v));
#else
  i16x16 v;
  for (int i = 0; i < 16; i++) v[i] = (int8_t)(SUB == 16 ? bytes[i / 8] >> 8 * (i % 8) : bytes[0] >> 8 * (i / 2));
  return v;
#endif
}
template <class Q> struct SuperBlock {
  static CG_INLINE void scales(const uint8_t* b, KScales& s) {
    s.d = half(load<uint16_t>(b + Q::D_AT)), s.dmin = Q::MIN ? half(load<uint16_t>(b + Q::D_AT + 2)) : s.d;
    const SubScales sub = Q::sub_scales(b);
    const i16x16 sc = words<Q::SUB>(sub.sc), mn = Q::MIN ? words<Q::SUB>(sub.mn) : sc * (int16_t)Q::OFFSET;
    store(s.sc, sc), store(s.mn, mn);
  }
};
constexpr uint64_t each_byte(uint64_t value) { return value * 0x0101010101010101ull; }
CG_INLINE uint64_t minus_32(uint64_t bytes) { return ((bytes | each_byte(128)) - each_byte(32)) ^ each_byte(128); }  // of 0 .. 63

CG_INLINE SubScales k45_scales(const uint8_t* b) {
  const uint8_t* p = b + 4;  // eight 6-bit scales and minima in twelve bytes
  uint32_t w0 = load<uint32_t>(p), w1 = load<uint32_t>(p + 4), w2 = load<uint32_t>(p + 8);
  return {{(w0 & 0x3f3f3f3f) | (uint64_t)((w2 & 0x0f0f0f0f) | (w0 >> 2 & 0x30303030)) << 32},
          {(w1 & 0x3f3f3f3f) | (uint64_t)((w2 >> 4 & 0x0f0f0f0f) | (w1 >> 2 & 0x30303030)) << 32}};
}
struct Q4_K : SuperBlock<Q4_K> {
  static constexpr int BYTES = 144, MAXQ = 15, OFFSET = 0, SUB = 32, D_AT = 0;
  static constexpr bool MIN = true;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) { return k45_scales(b); }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    for (int j = 0; j < 4; j++) {
      u8x32 v = bytes(b + 16 + 32 * j);
      w[2 * j] = v & 15, w[2 * j + 1] = shift_right<4>(v) & 15;
    }
  }
};
struct Q5_K : SuperBlock<Q5_K> {
  static constexpr int BYTES = 176, MAXQ = 31, OFFSET = 0, SUB = 32, D_AT = 0;
  static constexpr bool MIN = true;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) { return k45_scales(b); }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    u8x32 high = bytes(b + 16), v[4];
    for (int j = 0; j < 4; j++) v[j] = bytes(b + 48 + 32 * j);
    w[0] = (v[0] & 15) | (shift_left<4>(high) & 16), w[1] = (shift_right<4>(v[0]) & 15) | (shift_left<3>(high) & 16);
    w[2] = (v[1] & 15) | (shift_left<2>(high) & 16), w[3] = (shift_right<4>(v[1]) & 15) | (shift_left<1>(high) & 16);
    w[4] = (v[2] & 15) | (high & 16), w[5] = (shift_right<4>(v[2]) & 15) | (shift_right<1>(high) & 16);
    w[6] = (v[3] & 15) | (shift_right<2>(high) & 16), w[7] = (shift_right<4>(v[3]) & 15) | (shift_right<3>(high) & 16);
  }
};
struct Q6_K : SuperBlock<Q6_K> {
  static constexpr int BYTES = 210, MAXQ = 63, OFFSET = 32, SUB = 16, D_AT = 208;
  static constexpr bool MIN = false;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) { return {{load<uint64_t>(b + 192), load<uint64_t>(b + 200)}, {}}; }
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
struct Q2_K : SuperBlock<Q2_K> {
  static constexpr int BYTES = 84, MAXQ = 3, OFFSET = 0, SUB = 16, D_AT = 80;
  static constexpr bool MIN = true;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) {
    const uint64_t v[2] = {load<uint64_t>(b), load<uint64_t>(b + 8)}, low = each_byte(15);
    return {{v[0] & low, v[1] & low}, {v[0] >> 4 & low, v[1] >> 4 & low}};
  }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    for (int h = 0; h < 2; h++) {
      u8x32 v = bytes(b + 16 + 32 * h);
      w[4 * h] = v & 3, w[4 * h + 1] = shift_right<2>(v) & 3;
      w[4 * h + 2] = shift_right<4>(v) & 3, w[4 * h + 3] = shift_right<6>(v) & 3;
    }
  }
};
struct Q3_K : SuperBlock<Q3_K> {
  static constexpr int BYTES = 110, MAXQ = 7, OFFSET = 4, SUB = 16, D_AT = 108;
  static constexpr bool MIN = false;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) {  // the low 4 bits of all scales, then the high 2
    const uint64_t v = load<uint64_t>(b + 96), low = each_byte(15);
    const uint32_t high = load<uint32_t>(b + 104), two = 0x03030303;
    const uint64_t first = (high & two) | (uint64_t)(high >> 2 & two) << 32;
    const uint64_t second = (high >> 4 & two) | (uint64_t)(high >> 6 & two) << 32;
    return {{minus_32((v & low) | first << 4), minus_32((v >> 4 & low) | second << 4)}, {}};
  }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    const u8x32 high = bytes(b), v[2] = {bytes(b + 32), bytes(b + 64)};
    w[0] = (v[0] & 3) | (shift_left<2>(high) & 4), w[1] = (shift_right<2>(v[0]) & 3) | (shift_left<1>(high) & 4);
    w[2] = (shift_right<4>(v[0]) & 3) | (high & 4), w[3] = (shift_right<6>(v[0]) & 3) | (shift_right<1>(high) & 4);
    w[4] = (v[1] & 3) | (shift_right<2>(high) & 4), w[5] = (shift_right<2>(v[1]) & 3) | (shift_right<3>(high) & 4);
    w[6] = (shift_right<4>(v[1]) & 3) | (shift_right<4>(high) & 4), w[7] = (shift_right<6>(v[1]) & 3) | (shift_right<5>(high) & 4);
  }
};
struct IQ4_XS : SuperBlock<IQ4_XS> {
  static constexpr int BYTES = 136, MAXQ = -1, OFFSET = Q8_OFFSET, SUB = 32, D_AT = 0;
  static constexpr bool MIN = false;
  static CG_INLINE SubScales sub_scales(const uint8_t* b) {
    uint64_t low = load<uint32_t>(b + 4), high = load<uint16_t>(b + 2);  // eight fields of 4 and of 2 bits: a byte for each
    low = (low | low << 16) & 0x0000ffff0000ffff, low = (low | low << 8) & 0x00ff00ff00ff00ff, low = (low | low << 4) & each_byte(15);
    high = (high | high << 24) & 0x000000ff000000ff, high = (high | high << 12) & 0x000f000f000f000f;
    return {{minus_32(low | ((high | high << 6) & each_byte(3)) << 4)}, {}};
  }
  static CG_INLINE void unpack(const uint8_t* b, u8x32 w[8]) {
    for (int j = 0; j < 8; j++) w[j] = look_up(IQ4_TABLE.values, nibbles(b + 8 + 16 * j));
  }
};

}  // namespace CG_LEVEL
}  // namespace cg
