// What level amx does in its own way: products on the tile unit (tile_product.cpp).
#pragma once
#include "kernels.h"

namespace cg {
namespace CG_LEVEL {

Form form_of(int type);
void quantise(const Activations& a, int t0, int t1);
void tile_product(const Product& p, const Activations& a, int64_t r0, int64_t r1, Scratch& scratch);
int64_t tile_rows(const Weight& w, bool packed);
int64_t peak(int64_t rounds);

// n values from the start of `blocks` on, rounded to bfloat16: 32 of them to out, the next 32 to out + stride, and so on. If
// the last are fewer, zeros follow them.
using Bfloat16Decoder = void (*)(const uint8_t* blocks, int64_t n, uint16_t* out, int64_t stride);
Bfloat16Decoder bfloat16_decoder(int type);

}  // namespace CG_LEVEL
}  // namespace cg
