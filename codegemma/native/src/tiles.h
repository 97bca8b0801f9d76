// The tile unit of AMX behind a handful of functions, and the rounding to bfloat16 that goes with it. Tiles 0 .. 3 hold sums
// (16 rows by up to 16 columns of floats), 4 and 5 are first factors (16 rows of 32 bfloat16), 6 and 7 second ones (for each
// pair of members of the sums, a pair of bfloat16 in each column).
//
// What TDPBF16PS does is stated in Intel's Software Developer's Manual. For each element of C += A B, the even members of the
// 16 pairs make one sum and the odd ones another, from zero by fused multiply-adds in ascending order; these two are added,
// and the result is added to the element of C. All of it rounds to nearest even and takes denormals for zero, in and out. The
// conversion to bfloat16 (VCVTNE2PS2BF16) does the same. Under CG_IMITATE_TILES both are done by other instructions, for CPUs
// without them.
#pragma once
#include "simd.h"
#if defined(CG_IMITATE_TILES)
#include <cstdlib>
#endif

namespace cg {
namespace CG_LEVEL {

constexpr int SIDE = 16;              // rows and columns of a tile
constexpr int STEP = 32;              // members of a sum that one multiplication of tiles takes
constexpr int FACTOR = SIDE * STEP;   // bfloat16 in a factor
typedef uint16_t u16x32 __attribute__((vector_size(64)));

#if !defined(CG_IMITATE_TILES)
// Inline assembly: the number of a tile is a template's argument, and the level needs no compiler flag of its own.
// After `configure_tiles`, all tiles are zero; they stay configured on this thread until `release_tiles`.
CG_INLINE void configure_tiles(int columns) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.rows[i] = SIDE, config.row_bytes[i] = i == 4 || i == 5 ? 64 : 4 * columns;
  asm volatile("ldtilecfg %0" : : "m"(config));
}
CG_INLINE void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int N> CG_INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(N)); }
// `stride`: bytes between rows in memory
template <int N> CG_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(N) : "memory");
}
template <int N> CG_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(N) : "memory");
}
template <int C, int A, int B> CG_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
CG_INLINE u16x32 to_bfloat16(Fv first, Fv second) {
  u16x32 y;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(y) : "v"(first), "v"(second));
  return y;
}
#else
struct Tiles {
  alignas(64) uint8_t bytes[8][SIDE][64];
  int columns = 0;  // 0: not configured
  uint8_t* tile(int n) {
    if (!columns) abort();
    return bytes[n][0];
  }
  int row_bytes(int n) const { return n == 4 || n == 5 ? 64 : 4 * columns; }
};
inline thread_local Tiles tiles;

inline void configure_tiles(int columns) { tiles.columns = columns, memset(tiles.bytes, 0, sizeof tiles.bytes); }
inline void release_tiles() { tiles.columns = 0; }
template <int N> void zero_tile() { memset(tiles.tile(N), 0, SIDE * 64); }
template <int N> void load_tile(const void* p, int64_t stride) {
  uint8_t* tile = tiles.tile(N);
  for (int i = 0; i < SIDE; i++) memcpy(tile + i * 64, (const uint8_t*)p + i * stride, tiles.row_bytes(N));
}
template <int N> void store_tile(void* p, int64_t stride) {
  const uint8_t* tile = tiles.tile(N);
  for (int i = 0; i < SIDE; i++) memcpy((uint8_t*)p + i * stride, tile + i * 64, tiles.row_bytes(N));
}
inline void set_float_mode(unsigned mode) { asm volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
// Columns are lanes; each lane sums as stated above.
__attribute__((noinline)) inline void multiply_tiles(float* c, const uint8_t* a, const uint8_t* b) {
  const Iv high = splat_i((int32_t)0xffff0000);
  const unsigned mode = _mm_getcsr();
  set_float_mode(0x1f80 | 0x8040);  // to nearest even, denormals are zero; no exceptions
  for (int m = 0; m < SIDE; m += 4) {
    Fv even[4] = {}, odd[4] = {};
    for (int k = 0; k < SIDE; k++) {
      const Iv pairs = load<Iv>(b + 64 * k);
      for (int i = 0; i < 4; i++) {
        const Iv pair = splat_i(load<int32_t>(a + 64 * (m + i) + 4 * k));
        even[i] = fma((Fv)(pair << 16), (Fv)(pairs << 16), even[i]);
        odd[i] = fma((Fv)(pair & high), (Fv)(pairs & high), odd[i]);
      }
    }
    for (int i = 0; i < 4; i++) store(c + SIDE * (m + i), load<Fv>(c + SIDE * (m + i)) + (even[i] + odd[i]));
  }
  set_float_mode(mode);
}
template <int C, int A, int B> void multiply_tiles() { multiply_tiles((float*)tiles.tile(C), tiles.tile(A), tiles.tile(B)); }
inline u16x32 to_bfloat16(Fv first, Fv second) {
  typedef uint32_t u32x16 __attribute__((vector_size(64)));
  typedef uint16_t u16x16 __attribute__((vector_size(32)));
  auto round = [](Fv v) {
    const u32x16 x = (u32x16)v, size = x & 0x7fffffff;
    const u32x16 nearest = (x + 0x7fff + (x >> 16 & 1)) >> 16, quiet = x >> 16 | 0x40, zero = x >> 31 << 15;
    const u32x16 nan = (u32x16)(size > 0x7f800000), denormal = (u32x16)(size < 0x00800000);
    return __builtin_convertvector((nan & quiet) | (denormal & zero) | (~(nan | denormal) & nearest), u16x16);
  };
  u16x16 halves[2] = {round(first), round(second)};
  return load<u16x32>(halves);
}
#endif

}  // namespace CG_LEVEL
}  // namespace cg
