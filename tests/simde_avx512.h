// AVX-512 and AVX-VNNI by SIMDe: included first when their kernels are tested on a CPU without them. The definitions below replace
// functions that SIMDe 0.7 lacks or gets wrong.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstring>

template <class Wide, class Half> Wide from_halves(Half low, Half high) {
  Half parts[2] = {low, high};
  Wide v;
  std::memcpy(&v, parts, sizeof v);
  return v;
}
template <class Half, class Wide> Half half_of(Wide v, int which) {
  Half parts[2];
  std::memcpy(parts, &v, sizeof v);
  return parts[which];
}
#define LOW(v) _mm256_castsi256_si128(v)
#define HIGH(v) _mm256_extracti128_si256(v, 1)
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_cvtph_ps(v) from_halves<simde__m512>(_mm256_cvtph_ps(LOW(v)), _mm256_cvtph_ps(HIGH(v)))
#define _mm512_cvtepu16_epi32(v) from_halves<simde__m512i>(_mm256_cvtepu16_epi32(LOW(v)), _mm256_cvtepu16_epi32(HIGH(v)))
#define _mm512_cvtepu8_epi16(v) from_halves<simde__m512i>(_mm256_cvtepu8_epi16(LOW(v)), _mm256_cvtepu8_epi16(HIGH(v)))
#define _mm512_cvtepu8_epi32(v) \
  from_halves<simde__m512i>(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))
#define _mm512_extractf32x8_ps(v, which) half_of<__m256>(v, which)
