// Quantizes floats and repacks GGUF blocks. The bits are those of packed_linear.py with PyTorch's own operators.
#pragma once

#include "gemv_int.h"

namespace ISA {

typedef uint8_t u8 __attribute__((vector_size(LANES)));

// Rounds to float16; `finite` becomes false if the result is infinite or NaN.
inline uint16_t to_half(float x, bool& finite) {
  const uint16_t half = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
  finite &= (half & 0x7c00) != 0x7c00;
  return half;
}

// Quantizes one group of a row. Four columns (eight of int4) are stored together, the next four 64 bytes further on.
template <bool FOUR>
inline void quantize_group(const f32* x, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
  constexpr int VECTORS = GROUP / LANES;
  f32 high = FOUR ? x[0] : (f32)((u32)x[0] & 0x7fffffffu), low = x[0],
      nonfinite = {};  // NaN where x is infinite or NaN
  for (int i = 0; i < VECTORS; i++) {
    high = max(high, FOUR ? x[i] : (f32)((u32)x[i] & 0x7fffffffu));
    low = -max(-low, -x[i]);
    nonfinite += x[i] - x[i];
  }
  finite &= sum(nonfinite) == 0;
  float minimum = 0;
  if (FOUR) {
    *min = to_half(-largest(-low), finite);
    minimum = _cvtsh_ss(*min);
  }
  *scale = to_half((largest(high) - minimum) / (FOUR ? 15 : 127), finite);
  const float step = _cvtsh_ss(*scale);
  uint8_t bytes[GROUP];
  for (int i = 0; i < VECTORS; i++) {
    f32 v = step == 0 ? f32{} : (x[i] - minimum) / step;  // equal numbers become 0
    v = FOUR ? max(v, f32{}) : max(v, splat(-127));
    v = -max(-v, splat(FOUR ? -15 : -127));
    const u32 code = (u32)(v + 12582912.f) + (FOUR ? 0 : 128);  // 1.5 * 2^23: the integer is in the low bits
    const u8 narrow = __builtin_convertvector(code, u8);
    std::memcpy(bytes + i * LANES, &narrow, LANES);
  }
  uint32_t quads[QUADS];
  std::memcpy(quads, bytes, GROUP);
  for (int i = 0; i < QUADS; i += FOUR ? 2 : 1) {
    const uint32_t both = FOUR ? quads[i] | quads[i + 1] << 4 : quads[i];
    std::memcpy(q + (FOUR ? i / 2 : i) * 64, &both, 4);
  }
}

// Calls f(row, group, q, scale, min, finite) for n rows of a matrix, and fills the last block up with zeros. Returns
// whether everything was finite.
template <typename F>
inline bool fill(const Matrix& m, int64_t n, Pool pool, const F& f) {
  const bool four = m.kind == Kind::INT4;
  const int64_t groups = groups_of(m.columns), bytes = four ? 256 : 512;
  int faults = 0;
  parallel(pool, (n + BLOCK_ROWS - 1) / BLOCK_ROWS, [&](int64_t first, int64_t last) {
    bool finite = true;
    for (int64_t block = first; block < last; block++) {
      const int64_t rows = min(n - block * BLOCK_ROWS, BLOCK_ROWS);
      for (int64_t s = 0; s < groups; s++) {
        const int64_t at = block * groups + s;
        uint8_t* q = (uint8_t*)m.data + at * bytes;
        uint16_t *scale = (uint16_t*)m.scales + at * BLOCK_ROWS,
                 *min = four ? (uint16_t*)m.mins + at * BLOCK_ROWS : nullptr;
        if (rows < BLOCK_ROWS) {
          std::memset(q, 0, bytes);
          std::memset(scale, 0, BLOCK_ROWS * sizeof *scale);
          if (four) std::memset(min, 0, BLOCK_ROWS * sizeof *min);
        }
        for (int r = 0; r < rows; r++)
          f(block * BLOCK_ROWS + r, s, q + 4 * r, scale + r, four ? min + r : nullptr, finite);
      }
    }
    if (!finite) __atomic_store_n(&faults, 1, __ATOMIC_RELAXED);
  });
  return faults == 0;
}

// Quantizes rows x (n, m.columns) into the blocks of m.
template <typename T, bool FOUR>
inline bool quantize_rows(const T* x, int64_t n, const Matrix& m, Pool pool) {
  return fill(m, n, pool, [&](int64_t row, int64_t s, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
    f32 v[GROUP / LANES];
    for (int i = 0; i < GROUP; i += LANES) {
      const int64_t left = m.columns - s * GROUP - i;
      v[i / LANES] = left > 0 ? load_first(x + row * m.columns + s * GROUP + i, left) : f32{};
    }
    quantize_group<FOUR>(v, q, scale, min, finite);
  });
}

// Repacks n rows of GGUF blocks: a scale, a minimum (in Q4_1 alone), weights; of 4 bits, columns 16 apart share a byte.
inline bool repack(const uint8_t* from, int64_t bytes, int64_t n, const Matrix& m, Pool pool) {
  const int64_t groups = m.columns / GROUP;
  return fill(m, n, pool, [&](int64_t row, int64_t s, uint8_t* q, uint16_t* scale, uint16_t* min, bool& finite) {
    const uint8_t* block = from + (row * groups + s) * bytes;
    std::memcpy(scale, block, 2);
    float number = _cvtsh_ss(*scale);
    to_half(number, finite);
    uint32_t stored[QUADS];
    const int64_t n_bytes = min != nullptr ? GROUP / 2 : GROUP;
    std::memcpy(stored, block + bytes - n_bytes, n_bytes);
    if (min == nullptr) {
      for (int i = 0; i < QUADS; i++) {
        const uint32_t quad = stored[i] ^ 0x80808080u;
        std::memcpy(q + i * 64, &quad, 4);
      }
      return;
    }
    if (bytes > 18) {
      std::memcpy(min, block + 2, 2);
      to_half(_cvtsh_ss(*min), finite);
    } else {
      *min = to_half(-8 * number, finite);
    }
    for (int i = 0; i < QUADS; i += 2) {  // the low halves are the first sixteen columns
      const uint32_t first = stored[i % 4] >> (i < 4 ? 0 : 4), second = stored[i % 4 + 1] >> (i < 4 ? 0 : 4);
      const uint32_t both = (first & 0x0f0f0f0fu) | (second & 0x0f0f0f0fu) << 4;
      std::memcpy(q + i / 2 * 64, &both, 4);
    }
  });
}

}  // namespace ISA
