// What simd.h and the kernels need of AVX-512 and AVX2.
#pragma once

#include "simd.h"

namespace ISA {

#ifdef __AVX512F__
inline u32 widened(u16 v) { return (u32)_mm512_cvtepu16_epi32((__m256i)v); }
inline u16 narrowed(u32 v) { return (u16)_mm512_cvtepi32_epi16((__m512i)v); }
inline f32 half_to_float(const uint16_t* x) { return (f32)_mm512_cvtph_ps(load_as<__m256i>(x)); }
inline u32 looked_up(const uint8_t* table, u32 v) {
  return (u32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_as<__m128i>(table)), (__m512i)v);
}
inline void store_bytes(int8_t* to, i32 v) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v)); }
inline i32 to_nearest(f32 v) { return (i32)_mm512_cvtps_epi32((__m512)v); }
inline f32 load_bytes(const int8_t* x) { return (f32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(x))); }
#else
inline u32 widened(u16 v) { return (u32)_mm256_cvtepu16_epi32((__m128i)v); }
inline u16 narrowed(u32 v) {
  return (u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08));
}
inline f32 half_to_float(const uint16_t* x) { return (f32)_mm256_cvtph_ps(load_as<__m128i>(x)); }
inline u32 looked_up(const uint8_t* table, u32 v) {
  return (u32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(table)), (__m256i)v);
}
inline void store_bytes(int8_t* to, i32 v) {
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(half, half));
}
inline i32 to_nearest(f32 v) { return (i32)_mm256_cvtps_epi32((__m256)v); }
inline f32 load_bytes(const int8_t* x) {
  return (f32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
}
#endif
inline float half_to_float(uint16_t x) { return _cvtsh_ss(x); }
inline uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

#ifdef __AVX512VNNI__
// sum + four products of a code and a signed byte in each lane. Of each, x holds four that all lanes share.
inline i32 dot(i32 sum, u32 codes, int32_t x) {
  return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
}
#endif
#ifdef __AVX512BF16__
// sum + two products of bfloat16 in each lane.
inline f32 dot(f32 sum, u32 a, u32 b) { return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
inline u16 rounded_at_once(f32 v) { return (u16)_mm512_cvtneps_pbh((__m512)v); }
#endif

// Combines halves until four lanes are left.
template <typename F>
inline __m128 quarter(f32 v, F both) {
#ifdef __AVX512F__
  const __m256 half = (__m256)both(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 half = (__m256)v;
#endif
  return both(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds the lanes in one fixed order.
inline float sum(f32 v) {
  __m128 d = quarter(v, [](auto a, auto b) { return a + b; });
  d = d + _mm_movehl_ps(d, d);
  return _mm_cvtss_f32(d + _mm_movehdup_ps(d));
}
// Stores four sums at once, each in that order.
inline void store_sums(float* to, const f32* v) {
  __m128 d[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) d[i] = quarter(v[i], [](auto a, auto b) { return a + b; });
  const __m128 a = _mm_unpacklo_ps(d[0], d[1]) + _mm_unpackhi_ps(d[0], d[1]);
  const __m128 b = _mm_unpacklo_ps(d[2], d[3]) + _mm_unpackhi_ps(d[2], d[3]);
  _mm_storeu_ps(to, _mm_movelh_ps(a, b) + _mm_movehl_ps(b, a));
}
inline float largest(f32 v) {
  auto both = [](auto a, auto b) { return a > b ? a : b; };
  __m128 d = quarter(v, both);
  d = both(d, _mm_movehl_ps(d, d));
  return _mm_cvtss_f32(both(d, _mm_movehdup_ps(d)));
}

// Transposes LANES rows of LANES dwords.
inline void transpose(u32* rows) {
#pragma GCC unroll 4
  for (int by = 1; by < LANES; by *= 2) {
    u32 upper, lower;  // lanes for rows[i] and rows[i + by]; from LANES on they are those of the second
    for (int i = 0; i < LANES; i++) {
      upper[i] = i & by ? LANES + i - by : i;
      lower[i] = i & by ? LANES + i : i + by;
    }
    for (int i = 0; i < LANES; i++) {
      if (i & by) continue;
      const u32 a = rows[i], b = rows[i + by];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + by] = __builtin_shuffle(a, b, lower);
    }
  }
}

}  // namespace ISA
