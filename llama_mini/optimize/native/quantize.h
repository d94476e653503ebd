// Floats, and GGUF's blocks, into codes, with the bits that matrix.py gives them by PyTorch's own operators.
#pragma once

#include "codes.h"

namespace FORM {

typedef uint8_t u8 __attribute__((vector_size(LANES)));

// A float16 that is neither infinite nor NaN is sound.
inline uint16_t to_half(float x, bool& sound) {
  const uint16_t half = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
  sound &= (half & 0x7c00) != 0x7c00;
  return half;
}

// One row of a step: its codes stand 64 bytes apart, four or twice four of them at a place.
template <bool FOUR>
inline void quantize_step(const f32* x, uint8_t* codes, uint16_t* scale, uint16_t* least, bool& sound) {
  constexpr int VECTORS = STEP / LANES;
  f32 high = FOUR ? x[0] : (f32)((u32)x[0] & 0x7fffffffu), low = x[0], strange = {};  // the last: NaN where x is
  for (int i = 0; i < VECTORS; i++) {
    high = max(high, FOUR ? x[i] : (f32)((u32)x[i] & 0x7fffffffu));
    low = -max(-low, -x[i]);
    strange += x[i] - x[i];
  }
  sound &= sum(strange) == 0;
  float from = 0;
  if (FOUR) {
    *least = to_half(-largest(-low), sound);
    from = _cvtsh_ss(*least);
  }
  *scale = to_half((largest(high) - from) / (FOUR ? 15 : 127), sound);
  const float step = _cvtsh_ss(*scale);
  uint8_t bytes[STEP];
  for (int i = 0; i < VECTORS; i++) {
    f32 v = step == 0 ? f32{} : (x[i] - from) / step;  // equal numbers: code 0
    v = FOUR ? max(v, f32{}) : max(v, splat(-127));
    v = -max(-v, splat(FOUR ? -15 : -127));
    const u32 code = (u32)(v + 12582912.f) + (FOUR ? 0 : 128);  // 1.5 * 2^23: the integer stands in the low bits
    const u8 narrow = __builtin_convertvector(code, u8);
    std::memcpy(bytes + i * LANES, &narrow, LANES);
  }
  uint32_t quads[QUADS];
  std::memcpy(quads, bytes, STEP);
  for (int i = 0; i < QUADS; i += FOUR ? 2 : 1) {
    const uint32_t both = FOUR ? quads[i] | quads[i + 1] << 4 : quads[i];
    std::memcpy(codes + (FOUR ? i / 2 : i) * 64, &both, 4);
  }
}

// Calls f(row, step, codes, scale, least, sound) for n rows of a matrix, of which the last block may have fewer than TILE:
// zeros fill it. False where something was not sound.
template <typename F>
inline bool fill(const Matrix& m, int64_t n, Team team, const F& f) {
  const bool four = m.kind == Kind::INT4;
  const int64_t steps = (m.columns + STEP - 1) / STEP, bytes = four ? 256 : 512;
  int faults = 0;
  parallel(team, (n + TILE - 1) / TILE, [&](int64_t first, int64_t last) {
    bool sound = true;
    for (int64_t block = first; block < last; block++) {
      const int rows = (int)(n - block * TILE < TILE ? n - block * TILE : TILE);
      for (int64_t s = 0; s < steps; s++) {
        const int64_t at = block * steps + s;
        uint8_t* codes = (uint8_t*)m.data + at * bytes;
        uint16_t *scale = (uint16_t*)m.scale + at * TILE, *least = four ? (uint16_t*)m.least + at * TILE : nullptr;
        if (rows < TILE) {
          std::memset(codes, 0, bytes);
          std::memset(scale, 0, TILE * sizeof *scale);
          if (four) std::memset(least, 0, TILE * sizeof *least);
        }
        for (int r = 0; r < rows; r++)
          f(block * TILE + r, s, codes + 4 * r, scale + r, four ? least + r : nullptr, sound);
      }
    }
    if (!sound) __atomic_store_n(&faults, 1, __ATOMIC_RELAXED);
  });
  return faults == 0;
}

// Rows x (n, m.columns) into the blocks of m.
template <typename T, bool FOUR>
inline bool quantize_rows(const T* x, int64_t n, const Matrix& m, Team team) {
  return fill(m, n, team, [&](int64_t row, int64_t s, uint8_t* codes, uint16_t* scale, uint16_t* least, bool& sound) {
    f32 v[STEP / LANES];
    for (int i = 0; i < STEP; i += LANES) {
      const int64_t left = m.columns - s * STEP - i;
      v[i / LANES] = left > 0 ? load_first(x + row * m.columns + s * STEP + i, (int)left) : f32{};
    }
    quantize_step<FOUR>(v, codes, scale, least, sound);
  });
}

// Rows (n, steps, bytes) of GGUF's blocks: scale, least value in Q4_1 alone, codes, of 4 bits two in a byte 16 columns apart.
inline bool repack(const uint8_t* from, int64_t bytes, int64_t n, const Matrix& m, Team team) {
  const int64_t steps = m.columns / STEP;
  return fill(m, n, team, [&](int64_t row, int64_t s, uint8_t* codes, uint16_t* scale, uint16_t* least, bool& sound) {
    const uint8_t* block = from + (row * steps + s) * bytes;
    std::memcpy(scale, block, 2);
    float number = _cvtsh_ss(*scale);
    to_half(number, sound);
    uint32_t stored[QUADS];
    const int64_t n_codes = least != nullptr ? STEP / 2 : STEP;
    std::memcpy(stored, block + bytes - n_codes, n_codes);
    if (least == nullptr) {
      for (int i = 0; i < QUADS; i++) {
        const uint32_t quad = stored[i] ^ 0x80808080u;
        std::memcpy(codes + i * 64, &quad, 4);
      }
      return;
    }
    if (bytes > 18) {
      std::memcpy(least, block + 2, 2);
      to_half(_cvtsh_ss(*least), sound);
    } else {
      *least = to_half(-8 * number, sound);
    }
    for (int i = 0; i < QUADS; i += 2) {  // the low halves are the first sixteen columns
      const uint32_t first = stored[i % 4] >> (i < 4 ? 0 : 4), second = stored[i % 4 + 1] >> (i < 4 ? 0 : 4);
      const uint32_t both = (first & 0x0f0f0f0fu) | (second & 0x0f0f0f0fu) << 4;
      std::memcpy(codes + i / 2 * 64, &both, 4);
    }
  });
}

}  // namespace FORM
