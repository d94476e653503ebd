// Vectors of 16 numbers with AVX-512, of 8 with AVX2, of 4 with NEON: GCC 12 keeps no larger ones in NEON's registers.
// GCC's vector extensions let one source serve all; what needs intrinsics is in simd_x86.h and simd_arm.h.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

// Whether one instruction adds four products of bytes to each lane, and two of bfloat16.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define BYTE_DOTS
#endif
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define BF16_DOTS
#endif

namespace ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__x86_64__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr bool MANY_REGISTERS = LANES != 8;  // 32 vectors, not 16
typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

template <typename V, typename T>
inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

inline i32 lane_numbers() {
  i32 v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}
inline f32 splat(float x) { return x - f32{}; }
inline f32 max(f32 a, f32 b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace ISA

#ifdef __x86_64__
#include "simd_x86.h"
#else
#include "simd_arm.h"
#endif

namespace ISA {

// For each byte, which is below 16, the byte of the table.
inline uint32_t looked_up(const uint8_t* table, uint32_t v) {
  return table[v & 15] | table[v >> 8 & 15] << 8 | table[v >> 16 & 15] << 16 | (uint32_t)table[v >> 24 & 15] << 24;
}

inline f32 load(const float* x) { return load_as<f32>(x); }
inline f32 load(const bf16* x) { return (f32)(widened(load_as<u16>(x)) << 16); }
inline f32 load(const int8_t* x) { return load_bytes(x); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline u16 rounded(f32 v) {
#ifdef BF16_DOTS
  return rounded_at_once(v);
#endif
  u32 bits = (u32)v, up = bits + 0x7fff + ((bits >> 16) & 1);
  return narrowed((v == v ? up : bits | 0x400000) >> 16);
}
inline void store(float* to, f32 v) { std::memcpy(to, &v, sizeof v); }
inline void store(bf16* to, f32 v) {
  u16 bits = rounded(v);
  std::memcpy(to, &bits, sizeof bits);
}

// The first n elements; the others are zero.
template <typename T>
inline f32 load_first(const T* x, int64_t n) {
  if (n >= LANES) return load(x);
  T buffer[LANES] = {};
  std::memcpy(buffer, x, n * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store_first(T* to, f32 v, int64_t n) {
  if (n >= LANES) return store(to, v);
  T buffer[LANES];
  store(buffer, v);
  std::memcpy(to, buffer, n * sizeof(T));
}

inline f32 round_to(f32 v, const float*) { return v; }
inline f32 round_to(f32 v, const bf16*) { return (f32)(widened(rounded(v)) << 16); }

// e^x within 2 ULP up to x = 88; 0 below -87.3, where it would be subnormal, which costs Intel processors 150 cycles.
// Cody and Waite's reduction, then a polynomial (Cephes).
inline f32 exp(f32 x) {
#ifdef __AVX512F__
  const __mmask16 over = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);        // or NaN
  x = (f32)_mm512_min_ps(_mm512_set1_ps(88.3f), _mm512_max_ps(_mm512_set1_ps(-87.3f), (__m512)x));  // NaN passes
  const f32 n = (f32)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const i32 under = x < -87.3f, number = x == x;
  const f32 original = x;
  x = x > 88.3f ? splat(88.3f) : x;
  const f32 shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the integer is in the low bits
  const f32 n = shifted - 12582912.f;
#endif
  const f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
#ifdef __AVX512F__
  return (f32)_mm512_maskz_scalef_ps(over, (__m512)p, (__m512)n);
#else
  const u32 result = (u32)p + (((u32)shifted - 0x4b400000u) << 23);
  return number ? (f32)(result & ~(u32)under) : original;
#endif
}
// 1 / x within an ULP, for positive x up to 2^127: an estimate and one Newton step.
inline f32 reciprocal(f32 x) {
#ifdef __AVX512F__
  const f32 r = (f32)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.f - x * r);
#else
  return 1.f / x;
#endif
}
inline f32 silu(f32 x) { return x * reciprocal(1.f + exp(-x)); }
// x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), as x times a sigmoid.
inline f32 gelu_tanh(f32 x) { return x * reciprocal(1.f + exp(-x * (1.59576912f + 0.0713548163f * x * x))); }
// c tanh(x / c), from tanh(y) = 1 - 2 / (e^2y + 1).
inline f32 capped(f32 x, float c) { return c - 2 * c / (exp(x * (2 / c)) + 1.f); }

}  // namespace ISA
