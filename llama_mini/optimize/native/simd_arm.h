// What simd.h and the kernels need of NEON; as in simd_x86.h.
#pragma once

#include "simd.h"

namespace ISA {

inline u32 widened(u16 v) { return (u32)vmovl_u16((uint16x4_t)v); }
inline u16 narrowed(u32 v) { return (u16)vmovn_u32((uint32x4_t)v); }
inline f32 half_to_float(const uint16_t* x) { return (f32)vcvt_f32_f16(load_as<float16x4_t>(x)); }
inline u32 looked_up(const uint8_t* table, u32 v) { return (u32)vqtbl1q_u8(load_as<uint8x16_t>(table), (uint8x16_t)v); }
inline void store_bytes(int8_t* to, i32 v) {
  const int16x4_t half = vqmovn_s32((int32x4_t)v);
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(half, half));
  std::memcpy(to, &bytes, LANES);
}
inline i32 to_nearest(f32 v) { return (i32)vcvtnq_s32_f32((float32x4_t)v); }
inline f32 load_bytes(const int8_t* x) {
  const int8x8_t bytes = (int8x8_t)vdup_n_s32(load_as<int32_t>(x));
  return (f32)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
inline float half_to_float(uint16_t x) { return load_as<__fp16>(&x); }
inline uint16_t float_to_half(float x) {
  const __fp16 half = x;
  return load_as<uint16_t>(&half);
}

// The codes are signed too: lowered_by.
inline i32 dot(i32 sum, u32 codes, int32_t x) {
  return (i32)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)(i32{} + x));
}
// The same for four vectors of codes, `next` bytes apart, and as many quads x.
inline i32 dot_four(i32 sum, const uint8_t* codes, int64_t next, const int32_t* x) {
  const int8x16_t quads = load_as<int8x16_t>(x);
  int32x4_t all = (int32x4_t)sum;
  all = vdotq_laneq_s32(all, load_as<int8x16_t>(codes), quads, 0);
  all = vdotq_laneq_s32(all, load_as<int8x16_t>(codes + next), quads, 1);
  all = vdotq_laneq_s32(all, load_as<int8x16_t>(codes + 2 * next), quads, 2);
  return (i32)vdotq_laneq_s32(all, load_as<int8x16_t>(codes + 3 * next), quads, 3);
}
#ifdef BF16_DOTS
inline f32 dot(f32 sum, u32 a, u32 b) { return (f32)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
inline u16 rounded_at_once(f32 v) { return (u16)vcvt_bf16_f32((float32x4_t)v); }
#endif

// Transposes LANES rows of LANES dwords.
inline void transpose(u32* rows) {
  const uint32x4_t *r = (const uint32x4_t*)rows, a = vtrn1q_u32(r[0], r[1]), b = vtrn2q_u32(r[0], r[1]);
  const uint32x4_t c = vtrn1q_u32(r[2], r[3]), d = vtrn2q_u32(r[2], r[3]);
  rows[0] = (u32)vtrn1q_u64((uint64x2_t)a, (uint64x2_t)c);
  rows[1] = (u32)vtrn1q_u64((uint64x2_t)b, (uint64x2_t)d);
  rows[2] = (u32)vtrn2q_u64((uint64x2_t)a, (uint64x2_t)c);
  rows[3] = (u32)vtrn2q_u64((uint64x2_t)b, (uint64x2_t)d);
}

// Adds the lanes in one fixed order.
inline float sum(f32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline void store_sums(float* to, const f32* v) {
  u32 lanes[] = {(u32)v[0], (u32)v[1], (u32)v[2], (u32)v[3]};
  transpose(lanes);
  const f32 sums = ((f32)lanes[0] + (f32)lanes[2]) + ((f32)lanes[1] + (f32)lanes[3]);
  std::memcpy(to, &sums, sizeof sums);
}
inline float largest(f32 v) { return vmaxvq_f32((float32x4_t)v); }

}  // namespace ISA
