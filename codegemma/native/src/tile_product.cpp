// Products on the tile unit, for level amx. Numerics v2: y[t, r] = sum over k of bf16(w[r, k]) * bf16(x[t, k]), where bf16
// rounds the float32 value (of a weight: what `decode` gives) to the nearest bfloat16, half to even. The sum starts at zero
// and takes 32 members at a time in ascending k, in the order and rounding of TDPBF16PS (tiles.h). One token and many, 16-bit
// floats and blocks: all the same. The sign of a zero weight is not kept; no sum depends on it. Products with float32 weights
// are those of the other levels, since they are there to be compared with other float32 implementations.
#include "tile_product.h"

#include <algorithm>

#include "blocks.h"
#include "tiles.h"

namespace cg {
namespace CG_LEVEL {
namespace {

// ------------------------------------------------------------------------------------------------ blocks as bfloat16
CG_INLINE Fv to_floats(__m128i bytes) { return to_float((Iv)_mm512_cvtepu8_epi32(bytes)); }
// The 32 quants as bfloat16. value(q, half) makes floats of 16 of them: the first (half 0) or the others (half 1). Where a
// type has few different quants and both halves have one scale, the value of each is rounded once, and looked up.
template <bool TABLE, int MAXQ, class Value> CG_INLINE u16x32 rounded_values(u8x32 q, Value value) {
  if constexpr (TABLE) {
    const Fv numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Fv low = value(numbers, 0), high = MAXQ < 16 ? low : value(numbers + splat(16.f), 0);
    return (u16x32)_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16((__m256i)q), (__m512i)to_bfloat16(low, high));
  }
  return to_bfloat16(value(to_floats(_mm256_castsi256_si128((__m256i)q)), 0),
                     value(to_floats(_mm256_extracti128_si256((__m256i)q, 1)), 1));
}
template <class Q> void blocks32(const uint8_t* p, int64_t n, uint16_t* out, int64_t stride) {
  static_assert(Q::MAXQ >= 0 || Q::OFFSET, "quants are unsigned at this level");
  for (; n > 0; n -= 32, p += Q::BYTES, out += stride) {
    const Fv d = splat(Q::scale(p)), m = Q::MIN ? splat(half(load<uint16_t>(p + 2))) : Fv{};
    auto value = [&](Fv q, int) {
      const Fv y = d * (q - splat((float)Q::OFFSET));
      return Q::MIN ? y + m : y;
    };
    store(out, rounded_values<(Q::MAXQ >= 0 && Q::MAXQ < 32), Q::MAXQ>(Q::unpack(p), value));
  }
}
template <class Q> void blocks256(const uint8_t* p, int64_t n, uint16_t* out, int64_t stride) {
  KScales s;
  u8x32 w[8];
  for (; n > 0; n -= 256, p += Q::BYTES) {
    Q::scales(p, s), Q::unpack(p, w);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++, out += stride) {
      auto value = [&](Fv q, int half) {
        const float sc = s.sc[2 * j + half], mn = s.mn[2 * j + half];
        return Q::MIN ? splat(s.d * sc) * q - splat(s.dmin * mn) : splat(s.d) * (splat(sc) * q - splat(mn));
      };
      store(out, rounded_values<(Q::SUB == 32 && Q::MAXQ >= 0 && Q::MAXQ < 32), Q::MAXQ>(w[j], value));
    }
  }
}
template <class L> void floats(const uint8_t* p, int64_t n, uint16_t* out, int64_t stride) {
  for (; n > 0; n -= 32, p += 32 * L::BYTES, out += stride) {
    const uint8_t* from = p;
    uint8_t rest[32 * L::BYTES];
    if (n < 32) memset(rest, 0, sizeof rest), memcpy(rest, p, n * L::BYTES), from = rest;
    store(out, to_bfloat16(L::read(from), L::read(from + 16 * L::BYTES)));
  }
}

}  // namespace

Bfloat16Decoder bfloat16_decoder(int type) {
  switch (type) {
    case F32_T: return floats<F32>;
    case F16_T: return floats<F16>;
    case BF16_T: return floats<BF16>;
    case Q4_0_T: return blocks32<Q4_0>;
    case Q4_1_T: return blocks32<Q4_1>;
    case Q5_0_T: return blocks32<Q5_0>;
    case Q5_1_T: return blocks32<Q5_1>;
    case Q8_0_T: return blocks32<Q8_0>;
    case Q4_K_T: return blocks256<Q4_K>;
    case Q5_K_T: return blocks256<Q5_K>;
    case Q6_K_T: return blocks256<Q6_K>;
    case IQ4_NL_T: return blocks32<IQ4_NL>;
    case MXFP4_T: return blocks32<MXFP4>;
    case Q2_K_T: return blocks256<Q2_K>;
    case Q3_K_T: return blocks256<Q3_K>;
    case IQ4_XS_T: return blocks256<IQ4_XS>;
  }
  return nullptr;
}

// ------------------------------------------------------------------------------------------------ activations
Form form_of(int type) { return type == F32_T ? FLOATS : PAIRS; }
void quantise(const Activations& a, int t0, int t1) {
  if (!(a.forms & PAIRS)) return;
  const int64_t P = a.padded;
  auto rounded = [&](int t, int64_t i) {
    const float* x = a.f + t * a.stride + i;
    return t < a.T ? to_bfloat16(load<Fv>(x), load<Fv>(x + FW)) : u16x32{};
  };
  if (!a.packed) {
    for (int t = t0; t < t1; t++)
      for (int64_t i = 0; i < P; i += STEP) store(a.pairs + t * P + i, rounded(t, i));
    return;
  }
  for (int t = t0; t < t1; t += GROUP)
    for (int64_t i = 0; i < P; i += STEP) {
      float rows[GROUP][SIDE], *out = (float*)(a.pairs + t * P + i * GROUP);  // a pair in each
      for (int j = 0; j < GROUP; j++) store(rows[j], rounded(t + j, i));
      for (int j = 0; j < GROUP; j += 8)
        for (int k = 0; k < SIDE; k += 8) transpose8(&rows[j][k], SIDE, out + k * GROUP + j, GROUP);
    }
}

// ------------------------------------------------------------------------------------------------ products
namespace {

constexpr int SLAB_ROWS = 2 * SIDE;  // rows of weights that are decoded and multiplied together

// A tile of sums [rows, tokens] to out, or added to it.
void write(const float* sums, const Product& p, int64_t r, int64_t rows, int t0, int tokens) {
  float columns[SIDE][SIDE];
  for (int t = 0; t < tokens; t += 8)
    for (int i = 0; i < SIDE; i += 8) transpose8(sums + i * SIDE + t, SIDE, &columns[t][i], SIDE);
  for (int t = 0; t < tokens; t++) {
    float* out = p.out + (t0 + t) * p.stride + r;
    if (p.add_from < 0) memcpy(out, columns[t], 4 * rows);
    else if (t0 + t >= p.add_from)
      for (int i = 0; i < rows; i++) out[i] += columns[t][i];
  }
}
void write(const float (*sums)[SIDE * SIDE], const Product& p, int64_t r, int64_t r1, int g, int T) {
  for (int i = 0; i < 2 && r + i * SIDE < r1; i++)
    write(sums[i], p, r + i * SIDE, std::min<int64_t>(SIDE, r1 - r - i * SIDE), g * GROUP, std::min(GROUP, T - g * GROUP));
}
// Where row i of SLAB_ROWS begins in a slab of decoded weights [2, steps, SIDE, STEP].
CG_INLINE uint16_t* slab_row(uint16_t* slab, int i, int64_t steps) {
  return slab + (i / SIDE * steps * SIDE + i % SIDE) * STEP;
}

// Up to 16 tokens: one tile of second factors at a time. While 256 columns of 32 rows are decoded, the tile unit multiplies
// those before them: one step after every four rows. Meanwhile the next 32 rows, which lie behind these, come to the L2 cache
// as one stream.
void few(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  constexpr int CHUNK = 256, STEPS = CHUNK / STEP, AT_ONCE = SLAB_ROWS / STEPS;
  const Weight& w = *p.w;
  const auto decode = bfloat16_decoder(w.type);
  const int64_t chunks = (w.cols + CHUNK - 1) / CHUNK, chunk_bytes = CHUNK / TYPE[w.type].block * TYPE[w.type].bytes;
  const int columns = a.packed ? GROUP : a.T;
  const uint16_t* x = a.pairs;  // [padded / 2, columns, 2]
  if (!a.packed && a.T > 1) {
    scratch.tile.resize(std::max<size_t>(scratch.tile.size(), 2 * a.padded * a.T));
    int32_t* pairs = (int32_t*)scratch.tile.data();
    for (int64_t i = 0; i < a.padded / 2; i++)
      for (int t = 0; t < a.T; t++) *pairs++ = load<int32_t>(a.pairs + t * a.padded + 2 * i);
    x = (const uint16_t*)scratch.tile.data();
  }
  alignas(64) uint16_t slabs[2][SLAB_ROWS * CHUNK];
  alignas(64) float sums[2][SIDE * SIDE] = {};
  configure_tiles(columns);
  for (int64_t r = r0; r < r1; r += SLAB_ROWS) {
    zero_tile<0>(), zero_tile<1>();
    for (int64_t c = 0; c <= chunks; c++) {
      const int64_t n = std::min<int64_t>(CHUNK, w.cols - c * CHUNK);
      const int64_t steps = std::min<int64_t>(STEPS, (w.cols - (c - 1) * CHUNK + STEP - 1) / STEP);  // of the chunk before
      for (int s = 0; s < STEPS; s++) {
        for (int i = s * AT_ONCE; i < (s + 1) * AT_ONCE && c < chunks && r + i < r1; i++) {
          const uint8_t* blocks = w.data + (r + i) * w.row_bytes + c * chunk_bytes;
          const uint8_t* next = w.data + (r + SLAB_ROWS) * w.row_bytes + (c * SLAB_ROWS + i) * chunk_bytes;
          for (int64_t b = 0; b < chunk_bytes; b += 64) __builtin_prefetch(next + b, 0, 2);
          decode(blocks, n, slab_row(slabs[c % 2], i, STEPS), FACTOR);
        }
        if (c == 0 || s >= steps) continue;
        const uint16_t* slab = slabs[(c - 1) % 2] + s * FACTOR;
        load_tile<6>(x + ((c - 1) * STEPS + s) * SIDE * 2 * columns, 4 * columns);
        load_tile<4>(slab, 64), multiply_tiles<0, 4, 6>();
        load_tile<5>(slab + STEPS * FACTOR, 64), multiply_tiles<1, 5, 6>();
      }
    }
    store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64);
    write(sums, p, r, r1, 0, a.T);
  }
  release_tiles();
}

// One or two groups of tokens times SLAB_ROWS rows, added to tiles 0 .. 3.
template <int GROUPS> CG_INLINE void multiply_groups(const uint16_t* slab, const uint16_t* x, int64_t group, int64_t steps) {
  for (int64_t s = 0; s < steps; s++) {
    load_tile<4>(slab + s * FACTOR, 64), load_tile<6>(x + s * FACTOR, 64), multiply_tiles<0, 4, 6>();
    load_tile<5>(slab + (steps + s) * FACTOR, 64), multiply_tiles<1, 5, 6>();
    if (GROUPS == 1) continue;
    load_tile<7>(x + group + s * FACTOR, 64), multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
  }
}
CG_INLINE void load_sums(const float (*sums)[SIDE * SIDE]) {
  load_tile<0>(sums[0], 64), load_tile<1>(sums[1], 64), load_tile<2>(sums[2], 64), load_tile<3>(sums[3], 64);
}
CG_INLINE void store_sums(float (*sums)[SIDE * SIDE]) {
  store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64), store_tile<2>(sums[2], 64), store_tile<3>(sums[3], 64);
}
// More than 16 tokens. Up to 512 columns of 32 rows are decoded, which fills most of the L1 cache, and multiplied by all
// tokens, 32 at a time, while the blocks that are decoded next come to the L2 cache. The sums of a row wait in memory for the
// next columns.
void many(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  constexpr int LONGEST = 512 / STEP;
  const Weight& w = *p.w;
  const auto decode = bfloat16_decoder(w.type);
  const int64_t all = (w.cols + STEP - 1) / STEP, chunks = (all + LONGEST - 1) / LONGEST;
  const int64_t blocks = std::max(TYPE[w.type].block / STEP, 1);  // a chunk ends where a block does
  const int64_t longest = ((all + chunks - 1) / chunks + blocks - 1) / blocks * blocks;
  const int64_t bytes = longest * STEP / TYPE[w.type].block * TYPE[w.type].bytes;  // of a chunk
  const int groups = (a.T + GROUP - 1) / GROUP, pairs = (groups + 1) / 2;
  using Sums = float[4][SIDE * SIDE];
  alignas(64) uint16_t slab[LONGEST * 2 * FACTOR];
  scratch.tile.resize(std::max(scratch.tile.size(), (r1 - r0 + SLAB_ROWS - 1) / SLAB_ROWS * pairs * sizeof(Sums)));
  Sums* waiting = (Sums*)scratch.tile.data();
  configure_tiles(GROUP);
  for (int64_t s = 0; s < all; s += longest) {
    const int64_t steps = std::min(longest, all - s), n = std::min(steps * STEP, w.cols - s * STEP);
    const bool last = s + steps == all;
    const uint8_t* chunk = w.data + s / longest * bytes;
    for (int64_t r = r0; r < r1; r += SLAB_ROWS) {
      for (int i = 0; i < SLAB_ROWS && r + i < r1; i++)
        decode(chunk + (r + i) * w.row_bytes, n, slab_row(slab, i, steps), FACTOR);
      const uint8_t* next = r + SLAB_ROWS < r1 ? chunk + (r + SLAB_ROWS) * w.row_bytes
                            : last             ? w.data + r1 * w.row_bytes
                                               : chunk + bytes + r0 * w.row_bytes;
      for (int g = 0; g < groups; g += 2) {
        for (int i = g / 2 * SLAB_ROWS / pairs; i < (g / 2 + 1) * SLAB_ROWS / pairs; i++)
          for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + i * w.row_bytes + b, 0, 2);
        float(*sums)[SIDE * SIDE] = waiting[(r - r0) / SLAB_ROWS * pairs + g / 2];
        if (s) load_sums(sums);
        else zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        const uint16_t* x = a.pairs + (g * a.padded + s * STEP) * GROUP;
        if (g + 1 < groups) multiply_groups<2>(slab, x, a.padded * GROUP, steps);
        else multiply_groups<1>(slab, x, 0, steps);
        store_sums(sums);
        if (!last) continue;
        write(sums, p, r, r1, g, a.T);
        if (g + 1 < groups) write(sums + 2, p, r, r1, g + 1, a.T);
      }
    }
  }
  release_tiles();
}

}  // namespace

void tile_product(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch) {
  (a.T > GROUP ? many : few)(p, a, r0, r1, scratch);
}
// Enough rows to make reading the activations again cheap, in enough tiles to divide a matrix among threads.
int64_t tile_rows(const Weight& w, bool packed) {
  if (packed) return w.rows < 2048 ? 64 : 128;
  return std::clamp<int64_t>(std::min(65536 / w.row_bytes, w.rows / 16) / SLAB_ROWS * SLAB_ROWS, SLAB_ROWS, 256);
}
int64_t peak(int64_t rounds) {
  configure_tiles(GROUP);
  for (int64_t i = 0; i < rounds; i++)
    multiply_tiles<0, 4, 6>(), multiply_tiles<1, 5, 6>(), multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
  release_tiles();
  return rounds * 4 * 2 * SIDE * FACTOR;
}

}  // namespace CG_LEVEL
}  // namespace cg
