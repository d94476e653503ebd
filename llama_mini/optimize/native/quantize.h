// Makes quantized weights of floats, of codes, or of GGUF blocks. The bits are those of quantized_linear.py with
// PyTorch's own operators.
#pragma once

#include "gemv_int.h"

namespace ISA {

typedef uint8_t u8 __attribute__((vector_size(LANES)));

// Rounds to float16; `finite` becomes false if the result is infinite or NaN.
inline uint16_t to_half(float x, bool& finite) {
  const uint16_t half = float_to_half(x);
  finite &= (half & 0x7c00) != 0x7c00;
  return half;
}

// Quantizes one group of a row, of a kind with one scale, and a minimum or eight bits.
template <bool HAS_MIN>
inline void quantize_group(Kind kind, const f32* x, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
  const int most = HAS_MIN ? (1 << codes_of(kind).bits) - 1 : 127;  // the largest code; of int8, before 128 is added
  constexpr int COUNT = GROUP / LANES;
  auto size = [](f32 v) { return HAS_MIN ? v : (f32)((u32)v & 0x7fffffffu); };
  f32 high = size(x[0]), low = x[0], nonfinite = {};  // NaN where x is infinite or NaN
  for (int i = 0; i < COUNT; i++) {
    high = max(high, size(x[i]));
    low = -max(-low, -x[i]);
    nonfinite += x[i] - x[i];
  }
  finite &= sum(nonfinite) == 0;
  float minimum = 0;
  if (HAS_MIN) {
    *min = to_half(-largest(-low), finite);
    minimum = half_to_float(*min);
  }
  *scale = to_half((largest(high) - minimum) / most, finite);
  const float step = half_to_float(*scale);
  uint32_t quads[QUADS];
  for (int i = 0; i < COUNT; i++) {
    f32 v = step == 0 ? f32{} : (x[i] - minimum) / step;  // equal numbers become 0
    v = max(v, splat(HAS_MIN ? 0 : -most));
    v = -max(-v, splat(-most));
    const u32 code = (u32)(v + 12582912.f) + (HAS_MIN ? 0 : 128);  // 1.5 * 2^23: the integer is in the low bits
    const u8 narrow = __builtin_convertvector(code, u8);
    std::memcpy((uint8_t*)quads + i * LANES, &narrow, LANES);
  }
  store_quads(kind, quads, q);
}

// Calls f(row, group, q, scale, min, finite) for n rows of a matrix, and fills the last block up with zeros. `scale`
// and `min` are S: float16, or int8. A second one of a group is BLOCK_ROWS after the first; several groups may have
// one. Returns whether everything was finite.
template <typename S, typename F>
inline bool fill(const Matrix& m, int64_t n, Pool pool, const F& f) {
  const int64_t groups = groups_of(m.columns), bytes = codes_of(m.kind).group_bytes();
  const int64_t n_scales = codes_of(m.kind).scales * BLOCK_ROWS;
  int faults = 0;
  parallel(pool, (n + BLOCK_ROWS - 1) / BLOCK_ROWS, [&](int64_t first, int64_t last) {
    bool finite = true;
    for (int64_t block = first; block < last; block++) {
      const int64_t rows = min(n - block * BLOCK_ROWS, BLOCK_ROWS);
      for (int64_t s = 0; s < groups; s++) {
        const int64_t at = (block * m.row_scales + scale_at(m, m.kind, s, 0)) * BLOCK_ROWS;
        uint8_t* q = (uint8_t*)m.data + (block * groups + s) * bytes;
        S *scale = (S*)m.scales + at, *min = m.mins != nullptr ? (S*)m.mins + at : nullptr;
        if (rows < BLOCK_ROWS) {
          std::memset(q, 0, bytes);
          std::memset(scale, 0, n_scales * sizeof *scale);
          if (min != nullptr) std::memset(min, 0, n_scales * sizeof *min);
          if (m.super_scales != nullptr && s % SUPER_BLOCK == 0)
            std::memset((uint16_t*)m.super_scales + super_scale_at(m, m.kind, false, block, s), 0,
                        (min != nullptr ? 2 : 1) * BLOCK_ROWS * sizeof *m.super_scales);
        }
        for (int r = 0; r < rows; r++)
          f(block * BLOCK_ROWS + r, s, q + 4 * r, scale + r, min != nullptr ? min + r : nullptr, finite);
      }
    }
    if (!finite) __atomic_store_n(&faults, 1, __ATOMIC_RELAXED);
  });
  return faults == 0;
}

// Quantizes rows x (n, m.columns) into the blocks of m.
template <typename T, bool HAS_MIN>
inline bool quantize_rows(const T* x, int64_t n, const Matrix& m, Pool pool) {
  auto one = [&](int64_t row, int64_t s, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
    f32 v[GROUP / LANES];
    for (int i = 0; i < GROUP; i += LANES) {
      const int64_t left = m.columns - s * GROUP - i;
      v[i / LANES] = left > 0 ? load_first(x + row * m.columns + s * GROUP + i, left) : f32{};
    }
    quantize_group<HAS_MIN>(m.kind, v, q, scale, min, finite);
  };
  return fill<uint16_t>(m, n, pool, one);
}

inline bool is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }
inline bool is_finite(int8_t) { return true; }

// Stores n rows of codes, (n, m.columns), with the scales and minimums of their groups, and their factors where they
// are int8. The last 16 of 32 columns may be missing if they have a scale of their own.
template <typename S>
inline bool pack_codes(const uint8_t* codes, const S* scales, const S* mins, const uint16_t* super_scales, int64_t n,
                       const Matrix& m, Pool pool) {
  const int each = codes_of(m.kind).scales, group = GROUP / each, kinds = codes_of(m.kind).has_min ? 2 : 1;
  const int64_t row_scales = each == 1 ? m.row_scales : m.columns / group;
  auto one = [&](int64_t row, int64_t s, uint8_t* q, S* scale, S* least, bool& finite) {
    const int64_t columns = min(m.columns - s * GROUP, GROUP), at = row * row_scales + scale_at(m, m.kind, s, 0);
    uint32_t quads[QUADS] = {};
    std::memcpy(quads, codes + row * m.columns + s * GROUP, columns);
    store_quads(m.kind, quads, q);
    for (int i = 0; i < each; i++) {
      const bool stored = i * group < columns;
      finite &= is_finite(scale[i * BLOCK_ROWS] = stored ? scales[at + i] : 0);
      if (least != nullptr) finite &= is_finite(least[i * BLOCK_ROWS] = stored ? mins[at + i] : 0);
    }
    for (int i = 0; i < kinds && super_scales != nullptr && s % SUPER_BLOCK == 0; i++) {
      const uint16_t factor = super_scales[row * m.row_super_scales + s / SUPER_BLOCK * kinds + i];
      ((uint16_t*)m.super_scales)[super_scale_at(m, m.kind, i, row / BLOCK_ROWS, s) + row % BLOCK_ROWS] = factor;
      finite &= is_finite(factor);
    }
  };
  return fill<S>(m, n, pool, one);
}

inline bool pack(const uint8_t* codes, const void* scales, const void* mins, const uint16_t* super_scales, int64_t n,
                 const Matrix& m, Pool pool) {
  if (super_scales == nullptr)
    return pack_codes(codes, (const uint16_t*)scales, (const uint16_t*)mins, super_scales, n, m, pool);
  return pack_codes(codes, (const int8_t*)scales, (const int8_t*)mins, super_scales, n, m, pool);
}

// Repacks n rows of GGUF blocks: a scale, a minimum (in Q4_1 alone), weights; of 4 bits, columns 16 apart share a byte.
inline bool repack(const uint8_t* from, int64_t bytes, int64_t n, const Matrix& m, Pool pool) {
  const int64_t groups = m.columns / GROUP;
  auto one = [&](int64_t row, int64_t s, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
    const uint8_t* block = from + (row * groups + s) * bytes;
    std::memcpy(scale, block, 2);
    finite &= is_finite(*scale);
    uint32_t stored[QUADS], quads[QUADS];
    const int64_t n_bytes = m.kind == Kind::INT8 ? GROUP : GROUP / 2;
    std::memcpy(stored, block + bytes - n_bytes, n_bytes);
    for (int i = 0; i < QUADS; i++)  // of 4 bits, the low halves are the first 16 columns
      quads[i] = m.kind == Kind::INT8 ? stored[i] ^ 0x80808080u : stored[i % 4] >> i / 4 * 4;
    store_quads(m.kind, quads, q);
    if (min == nullptr) return;
    if (bytes > 18) {
      std::memcpy(min, block + 2, 2);
      finite &= is_finite(*min);
    } else {
      *min = to_half(-8 * half_to_float(*scale), finite);
    }
  };
  return fill<uint16_t>(m, n, pool, one);
}

}  // namespace ISA
