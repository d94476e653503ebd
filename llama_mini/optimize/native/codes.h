// Matrices of codes times a few rows.
//
// Codes lie in blocks of sixteen rows, four columns of a row side by side: that is what one VNNI instruction multiplies,
// with one row in each lane. They stand for
//     int8: scale * (code - 128)
//     int4: scale * code + least       two codes a byte, the earlier quad low
// with one scale, and one least value, for 32 columns of a row.
#pragma once

#include "floats.h"

namespace FORM {

// Four columns of sixteen rows: a byte each.
struct Codes {
#ifdef __AVX512VNNI__
  __m512i all;
  explicit Codes(const uint8_t* from) : all(_mm512_loadu_si512(from)) {}
  explicit Codes(__m512i all) : all(all) {}
  Codes low() const { return Codes(_mm512_and_si512(all, _mm512_set1_epi8(15))); }
  Codes high() const { return Codes(_mm512_and_si512(_mm512_srli_epi16(all, 4), _mm512_set1_epi8(15))); }
#else
  __m256i half[2];
  explicit Codes(const uint8_t* from)
      : half{_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))} {}
  Codes(__m256i first, __m256i second) : half{first, second} {}
  Codes low() const {
    const __m256i mask = _mm256_set1_epi8(15);
    return Codes(_mm256_and_si256(half[0], mask), _mm256_and_si256(half[1], mask));
  }
  Codes high() const {
    const __m256i mask = _mm256_set1_epi8(15);
    return Codes(_mm256_and_si256(_mm256_srli_epi16(half[0], 4), mask),
                 _mm256_and_si256(_mm256_srli_epi16(half[1], 4), mask));
  }
#endif
};

// Sums of codes times activations, of sixteen rows, in exact integers.
struct Sums {
#ifdef __AVX512VNNI__
  __m512i high, low;
  void start(int32_t from) {
    high = _mm512_setzero_si512();
    low = _mm512_set1_epi32(from);
  }
  void add(const Codes& codes, int32_t first, int32_t second) {
    high = _mm512_dpbusd_epi32(high, codes.all, _mm512_set1_epi32(first));
    low = _mm512_dpbusd_epi32(low, codes.all, _mm512_set1_epi32(second));
  }
  f32 total(int) const { return __builtin_convertvector((i32)_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), f32); }
#else
  __m256i half[2];
  void start(int32_t from) { half[0] = half[1] = _mm256_set1_epi32(from); }
  void add(const Codes& codes, int32_t first, int32_t second) {
    for (int i = 0; i < 2; i++) {
      __m256i evens = _mm256_and_si256(codes.half[i], _mm256_set1_epi16(255));
      __m256i odds = _mm256_srli_epi16(codes.half[i], 8);
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(evens, _mm256_set1_epi32(first)));
      half[i] = _mm256_add_epi32(half[i], _mm256_madd_epi16(odds, _mm256_set1_epi32(second)));
    }
  }
  f32 total(int vector) const { return __builtin_convertvector((i32)half[vector], f32); }
#endif
};

template <int B>
inline void add_quad(Sums* sums, const Codes& codes, const Input& in, int64_t quad) {
  for (int b = 0; b < B; b++) {
    int64_t at = quad + b * (in.width / 4);
    sums[b].add(codes, in.first[at], in.second[at]);
  }
}

// out[b * TILE ...]: block `block` of a matrix of codes times B rows of the batch from `row` on.
template <int B, bool FOUR>
inline void block_products(const Matrix& m, int64_t block, const Input& in, int64_t row, float* out) {
  constexpr int VECTORS = TILE / LANES;
  const int64_t steps = in.width / STEP, bytes = FOUR ? 4 * 64 : 8 * 64;
  const uint8_t* codes = (const uint8_t*)m.data + block * steps * bytes;
  const uint16_t* scale = m.scale + block * TILE * steps;
  const uint16_t* least = m.least + (FOUR ? block * TILE * steps : 0);
  f32 acc[B][VECTORS] = {};
  for (int64_t s = 0; s < steps; s++) {
    const int32_t* total = in.sums + row * steps + s;
    Sums sums[B];
    for (int b = 0; b < B; b++) sums[b].start(FOUR ? 0 : -128 * total[b * steps]);
    const int64_t quad = row * (in.width / 4) + s * QUADS;
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i++) {
      if (FOUR && i % 2) continue;
      ask_for(codes);
      const Codes v(codes);
      codes += 64;
      if (!FOUR) add_quad<B>(sums, v, in, quad + i);
      if (FOUR) add_quad<B>(sums, v.low(), in, quad + i);
      if (FOUR) add_quad<B>(sums, v.high(), in, quad + i + 1);
    }
    for (int v = 0; v < VECTORS; v++) {
      const f32 by = half_to_float(scale + s * TILE + v * LANES);
      for (int b = 0; b < B; b++) acc[b][v] += by * sums[b].total(v);
      if (!FOUR) continue;
      const f32 plus = half_to_float(least + s * TILE + v * LANES);
      for (int b = 0; b < B; b++) acc[b][v] += plus * (float)total[b * steps];
    }
  }
  for (int v = 0; v < VECTORS; v++)
    for (int b = 0; b < B; b++) store(out + b * TILE + v * LANES, acc[b][v] * in.scale[row + b]);
}

template <bool FOUR>
inline void block_products(const Matrix& m, int64_t block, const Input& in, float* out) {
  int64_t b = 0;
  for (; b + BATCH <= in.batch; b += BATCH) block_products<BATCH, FOUR>(m, block, in, b, out + b * TILE);
  for (; b < in.batch; b++) block_products<1, FOUR>(m, block, in, b, out + b * TILE);
}

}  // namespace FORM
