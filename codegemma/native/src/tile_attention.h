// Attention's products on the tile unit, for level amx, by numerics v2: queries (rotated and scaled), keys, values and weights
// are rounded to the nearest bfloat16, half to even, and multiplied in the order and rounding of TDPBF16PS (tiles.h). In each
// span of KEY_SPAN keys, aligned to absolute positions,
//   score[row, key] = sum over h of bf16(q[row, h]) * bf16(k[key, h]), from zero, 32 members at a time in ascending h;
//   weight[row, key] = exp(score - the row's largest of the span), in float32, and 0 where the query does not see the key;
//   value[row, h] = sum over keys of bf16(weight[row, key]) * bf16(v[key, h]), from zero, 32 members at a time in ascending
//   order of positions; each 32 begin at a multiple of 32.
// All else is float32, as on other levels (kernels.cpp). Weights of zero add nothing, so a task may pass over 32 keys that none
// of its queries sees, and a query's result does not depend on the rows that share its tiles. The sign of a zero is not kept.
// Keys and values are rounded when they enter the cache, which holds them as second factors: tiles are loaded from the pages.
#pragma once
#include "kernels.h"
#include "tiles.h"

namespace cg {
namespace CG_LEVEL {

// Where a member of a column lies in second factors [columns / 16, depth / 2, 16, 2].
CG_INLINE int64_t second_factor(int64_t member, int64_t column, int64_t depth) {
  return (column / SIDE * depth + member / 2 * 2) * SIDE + column % SIDE * 2 + member % 2;
}
// A head's key and value of one token, into the page's [PAGE / 16, P / 2, 16, 2] and [P / 16, PAGE / 2, 16, 2], where P is the
// width padded with zeros to a multiple of 32.
inline void store_key_and_value(const float* k, const float* v, int width, int slot, uint16_t* keys, uint16_t* values) {
  const int padded = (width + STEP - 1) / STEP * STEP;
  for (int i = 0; i < padded; i += STEP) {
    float floats[2][STEP] = {};
    const int n = width - i < STEP ? width - i : STEP;
    memcpy(floats[0], k + i, 4 * n), memcpy(floats[1], v + i, 4 * n);
    uint16_t key[STEP], value[STEP];
    store(key, to_bfloat16(load<Fv>(floats[0]), load<Fv>(floats[0] + FW)));
    store(value, to_bfloat16(load<Fv>(floats[1]), load<Fv>(floats[1] + FW)));
    for (int h = 0; h < STEP; h++) {
      keys[second_factor(i + h, slot, padded)] = key[h];
      values[second_factor(slot, i + h, PAGE)] = value[h];
    }
  }
}
// Rows of floats, `stride` apart, as first factors [rows / 16, steps, 16, 32].
inline void round_rows(const float* x, int64_t rows, int64_t stride, int64_t steps, uint16_t* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t s = 0; s < steps; s++) {
      const float* from = x + r * stride + s * STEP;
      store(out + (r / SIDE * steps + s) * FACTOR + r % SIDE * STEP, to_bfloat16(load<Fv>(from), load<Fv>(from + FW)));
    }
}
// out [rows, 32] = first factors [rows / 16, steps, 16, 32] times two tiles of columns; rows are 16 or 32. b(s) is where step s
// of the first tile lies; the second tile lies `next` behind it.
template <class B>
CG_INLINE void multiply_columns(const uint16_t* a, int rows, int64_t steps, B b, int64_t next, float* out, int64_t stride) {
  const bool both = rows > SIDE;
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t s = 0; s < steps; s++) {
    load_tile<4>(a + s * FACTOR, 64), load_tile<6>(b(s), 64), multiply_tiles<0, 4, 6>();
    load_tile<7>(b(s) + next, 64), multiply_tiles<1, 4, 7>();
    if (both) load_tile<5>(a + (steps + s) * FACTOR, 64), multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(out, 4 * stride), store_tile<1>(out + SIDE, 4 * stride);
  if (both) store_tile<2>(out + SIDE * stride, 4 * stride), store_tile<3>(out + SIDE * stride + SIDE, 4 * stride);
}

}  // namespace CG_LEVEL
}  // namespace cg
