// gemv for quantized weights.
#pragma once

#include "gemv_float.h"

namespace ISA {

constexpr int VECTORS = BLOCK_ROWS / LANES;  // of the codes of a quad, or of the scales of a block

// For each of sixteen rows, the sum of weights times activations, in exact integers.
struct IntSums {
#ifdef __AVX512VNNI__
  __m512i high, low;
  void start(int32_t from) {
    high = _mm512_setzero_si512();
    low = _mm512_set1_epi32(from);
  }
  void add(const u32* q, int32_t first, int32_t second) {
    high = _mm512_dpbusd_epi32(high, (__m512i)q[0], _mm512_set1_epi32(first));
    low = _mm512_dpbusd_epi32(low, (__m512i)q[0], _mm512_set1_epi32(second));
  }
  f32 total(int) const { return __builtin_convertvector((i32)_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), f32); }
#else
  __m256i half[2];
  void start(int32_t from) { half[0] = half[1] = _mm256_set1_epi32(from); }
  void add(const u32* q, int32_t first, int32_t second) {
    for (int i = 0; i < 2; i++) {
      __m256i evens = _mm256_and_si256((__m256i)q[i], _mm256_set1_epi16(255));
      __m256i odds = _mm256_srli_epi16((__m256i)q[i], 8);
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(evens, _mm256_set1_epi32(first)));
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(odds, _mm256_set1_epi32(second)));
    }
  }
  f32 total(int vector) const { return __builtin_convertvector((i32)half[vector], f32); }
#endif
};

// out[b * BLOCK_ROWS ...] = one block of a quantized matrix times B rows of the batch from `row` on.
template <int B, Kind KIND>
inline void gemv_block_int(const Matrix& m, int64_t block, const Input& in, int64_t row, float* out) {
  constexpr Codes CODES = codes_of(KIND);
  constexpr int STEP = QUADS / CODES.scales;  // quads that share a scale
  const int64_t groups = in.width / GROUP, n_sums = groups * CODES.scales;
  const uint8_t* q = (const uint8_t*)m.data + block * groups * CODES.group_bytes();
  const uint16_t* scales = m.scales + block * BLOCK_ROWS * m.row_scales;
  const uint16_t* mins = m.mins + (CODES.has_min ? block * BLOCK_ROWS * m.row_scales : 0);
  f32 acc[B][VECTORS] = {};
  for (int64_t s = 0; s < groups; s++) {
    const int64_t quad = row * (in.width / 4) + s * QUADS;
#pragma GCC unroll 2
    for (int part = 0; part < CODES.scales; part++) {
      const int32_t* total = in.sums + row * n_sums + s * CODES.scales + part;
      IntSums sums[B];
      for (int b = 0; b < B; b++) sums[b].start(-CODES.zero() * total[b * n_sums]);
#pragma GCC unroll 8
      for (int i = part * STEP; i < (part + 1) * STEP; i++) {
        if (i < CODES.bits) prefetch(q + i * 64);
        u32 codes[VECTORS];
        for (int v = 0; v < VECTORS; v++) codes[v] = load_quad<u32>(m, KIND, q + v * 4 * LANES, i);
        for (int b = 0; b < B; b++) {
          const int64_t at = quad + b * (in.width / 4) + i;
          sums[b].add(codes, in.first[at], in.second[at]);
        }
      }
      for (int v = 0; v < VECTORS; v++) {
        const int64_t at = scale_at(m, KIND, s, part) * BLOCK_ROWS + v * LANES;
        const f32 scale = half_to_float(scales + at);
        for (int b = 0; b < B; b++) acc[b][v] += scale * sums[b].total(v);
        if (!CODES.has_min) continue;
        const f32 min = half_to_float(mins + at);
        for (int b = 0; b < B; b++) acc[b][v] += min * (float)total[b * n_sums];
      }
    }
    q += CODES.group_bytes();
  }
  for (int v = 0; v < VECTORS; v++)
    for (int b = 0; b < B; b++) store(out + b * BLOCK_ROWS + v * LANES, acc[b][v] * in.scales[row + b]);
}

template <Kind KIND>
[[gnu::noinline]] void gemv_block_int(const Matrix& m, int64_t block, const Input& in, float* out) {
  int64_t b = 0;
  for (; b + BATCH <= in.batch; b += BATCH) gemv_block_int<BATCH, KIND>(m, block, in, b, out + b * BLOCK_ROWS);
  for (; b < in.batch; b++) gemv_block_int<1, KIND>(m, block, in, b, out + b * BLOCK_ROWS);
}

}  // namespace ISA
