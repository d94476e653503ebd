// gemv for quantized weights.
//
// Weights lie in blocks of 16 rows. Four columns of a row are adjacent, because one VNNI instruction multiplies four
// columns of sixteen rows, a row in each lane. A quantized weight q stands for
//     int8: scale * (q - 128)
//     int4: scale * q + min      two weights a byte, the earlier four columns in the low nibbles
// with one scale, and one minimum, for each group of 32 columns.
#pragma once

#include "gemv_float.h"

namespace ISA {

// Four columns of sixteen rows, a byte each.
struct QuadVector {
#ifdef __AVX512VNNI__
  __m512i all;
  explicit QuadVector(const uint8_t* from) : all(_mm512_loadu_si512(from)) {}
  explicit QuadVector(__m512i all) : all(all) {}
  QuadVector low() const { return QuadVector(_mm512_and_si512(all, _mm512_set1_epi8(15))); }
  QuadVector high() const { return QuadVector(_mm512_and_si512(_mm512_srli_epi16(all, 4), _mm512_set1_epi8(15))); }
#else
  __m256i half[2];
  explicit QuadVector(const uint8_t* from)
      : half{_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))} {}
  QuadVector(__m256i first, __m256i second) : half{first, second} {}
  QuadVector low() const {
    const __m256i mask = _mm256_set1_epi8(15);
    return QuadVector(_mm256_and_si256(half[0], mask), _mm256_and_si256(half[1], mask));
  }
  QuadVector high() const {
    const __m256i mask = _mm256_set1_epi8(15);
    return QuadVector(_mm256_and_si256(_mm256_srli_epi16(half[0], 4), mask),
                      _mm256_and_si256(_mm256_srli_epi16(half[1], 4), mask));
  }
#endif
};

// For each of sixteen rows, the sum of weights times activations, in exact integers.
struct IntSums {
#ifdef __AVX512VNNI__
  __m512i high, low;
  void start(int32_t from) {
    high = _mm512_setzero_si512();
    low = _mm512_set1_epi32(from);
  }
  void add(const QuadVector& q, int32_t first, int32_t second) {
    high = _mm512_dpbusd_epi32(high, q.all, _mm512_set1_epi32(first));
    low = _mm512_dpbusd_epi32(low, q.all, _mm512_set1_epi32(second));
  }
  f32 total(int) const { return __builtin_convertvector((i32)_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), f32); }
#else
  __m256i half[2];
  void start(int32_t from) { half[0] = half[1] = _mm256_set1_epi32(from); }
  void add(const QuadVector& q, int32_t first, int32_t second) {
    for (int i = 0; i < 2; i++) {
      __m256i evens = _mm256_and_si256(q.half[i], _mm256_set1_epi16(255));
      __m256i odds = _mm256_srli_epi16(q.half[i], 8);
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(evens, _mm256_set1_epi32(first)));
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(odds, _mm256_set1_epi32(second)));
    }
  }
  f32 total(int vector) const { return __builtin_convertvector((i32)half[vector], f32); }
#endif
};

template <int B>
inline void add_quad(IntSums* sums, const QuadVector& q, const Input& in, int64_t quad) {
  for (int b = 0; b < B; b++) {
    int64_t at = quad + b * (in.width / 4);
    sums[b].add(q, in.first[at], in.second[at]);
  }
}

// out[b * BLOCK_ROWS ...] = one block of a quantized matrix times B rows of the batch from `row` on.
template <int B, bool FOUR>
inline void gemv_block_int(const Matrix& m, int64_t block, const Input& in, int64_t row, float* out) {
  constexpr int VECTORS = BLOCK_ROWS / LANES;
  const int64_t groups = in.width / GROUP, bytes = FOUR ? 4 * 64 : 8 * 64;
  const uint8_t* q = (const uint8_t*)m.data + block * groups * bytes;
  const uint16_t* scales = m.scales + block * BLOCK_ROWS * groups;
  const uint16_t* mins = m.mins + (FOUR ? block * BLOCK_ROWS * groups : 0);
  f32 acc[B][VECTORS] = {};
  for (int64_t s = 0; s < groups; s++) {
    const int32_t* total = in.sums + row * groups + s;
    IntSums sums[B];
    for (int b = 0; b < B; b++) sums[b].start(FOUR ? 0 : -128 * total[b * groups]);
    const int64_t quad = row * (in.width / 4) + s * QUADS;
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i++) {
      if (FOUR && i % 2) continue;
      prefetch(q);
      const QuadVector v(q);
      q += 64;
      if (!FOUR) add_quad<B>(sums, v, in, quad + i);
      if (FOUR) add_quad<B>(sums, v.low(), in, quad + i);
      if (FOUR) add_quad<B>(sums, v.high(), in, quad + i + 1);
    }
    for (int v = 0; v < VECTORS; v++) {
      const f32 scale = half_to_float(scales + s * BLOCK_ROWS + v * LANES);
      for (int b = 0; b < B; b++) acc[b][v] += scale * sums[b].total(v);
      if (!FOUR) continue;
      const f32 min = half_to_float(mins + s * BLOCK_ROWS + v * LANES);
      for (int b = 0; b < B; b++) acc[b][v] += min * (float)total[b * groups];
    }
  }
  for (int v = 0; v < VECTORS; v++)
    for (int b = 0; b < B; b++) store(out + b * BLOCK_ROWS + v * LANES, acc[b][v] * in.scales[row + b]);
}

template <bool FOUR>
inline void gemv_block_int(const Matrix& m, int64_t block, const Input& in, float* out) {
  int64_t b = 0;
  for (; b + BATCH <= in.batch; b += BATCH) gemv_block_int<BATCH, FOUR>(m, block, in, b, out + b * BLOCK_ROWS);
  for (; b < in.batch; b++) gemv_block_int<1, FOUR>(m, block, in, b, out + b * BLOCK_ROWS);
}

}  // namespace ISA
