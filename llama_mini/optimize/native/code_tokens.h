// Many tokens made ready for a matrix of codes: in tiles of a few, 32 columns (a step) of each at a time.
//
// They become codes themselves, of eight bits with a scale for each step. A step that is among the loudest of its token
// gets eight bits more, for that is where rounding would show (LLM.int8, Dettmers 2022, keeps outliers apart likewise).
// In a float32 stream, and without VNNI, every step gets sixteen. What a token becomes depends on itself alone.
#pragma once

#include "norm.h"

namespace FORM {

#ifdef __AVX512VNNI__
constexpr int TOKENS = 5;  // of a tile: as many sums as the registers hold, with two vectors of a panel
#else
constexpr int TOKENS = 3;
#endif
constexpr float LOUD = 3;  // how far the square of a loud step's peak lies over the mean of them

#ifdef __AVX512VNNI__
template <typename T>
constexpr bool ALL_FINE = sizeof(T) == 4;
#else
template <typename T>
constexpr bool ALL_FINE = true;
#endif

struct CodeTokens {
  static constexpr int STRIPS = 2;  // of a panel
  int64_t count, steps;
  Array<int32_t> first, second;  // (tiles, steps, TOKENS, QUADS), as Input has them
  Array<uint8_t> fine;           // (tiles, steps): whether any token of the tile has sixteen bits there
  Array<float> scale, total;     // (tiles, steps, TOKENS): of the codes; and their sum, scaled
  Array<int32_t> start;          // as many: what takes away the 128 by which codes of int8 are too large
};

inline int64_t tiles_of(int64_t tokens) { return (tokens + TOKENS - 1) / TOKENS; }

// The bytes of codes, two of each where they are `fine`; without VNNI pairs of columns.
inline void put_quads(const i32* codes, bool fine, int32_t* first, int32_t* second) {
#ifdef __AVX512VNNI__
  for (int i = 0; i < STEP / LANES; i++) {
    const i32 low = fine ? ((codes[i] + 128) & 255) - 128 : i32{};
    _mm_storeu_si128((__m128i*)first + i, _mm512_cvtepi32_epi8((__m512i)(fine ? (codes[i] - low) >> 8 : codes[i])));
    if (fine) _mm_storeu_si128((__m128i*)second + i, _mm512_cvtepi32_epi8((__m512i)low));
  }
#else
  int32_t x[STEP];
  std::memcpy(x, codes, sizeof x);
  for (int i = 0; i < QUADS; i++) {
    first[i] = (x[4 * i] & 0xffff) | (int32_t)((uint32_t)x[4 * i + 2] << 16);
    second[i] = (x[4 * i + 1] & 0xffff) | (int32_t)((uint32_t)x[4 * i + 3] << 16);
  }
#endif
}

// The codes of one step; returns their sum, which a float holds exactly.
inline float put_step(const float* x, float peak, bool loud, bool fine, int32_t* first, int32_t* second) {
  const float to_code = peak > 1e-30f ? (loud ? 32512.f : 127.f) / peak : 0.f;
  i32 codes[STEP / LANES], all = {};
  for (int i = 0; i < STEP / LANES; i++) {
    const f32 v = to_code != 0 ? load(x + i * LANES) * to_code : f32{};
    codes[i] = (i32)(v + 12582912.f) - 0x4b400000;  // rounds to nearest, as pack_step does
    if (fine && !loud) codes[i] <<= 8;
    all += codes[i];
  }
  put_quads(codes, fine, first, second);
  return sum(__builtin_convertvector(all, f32));
}

// Some of the rows that `row` writes, (count, columns), as the tiles first..last.
template <typename T, typename F>
void pack_tiles(CodeTokens& in, int64_t columns, int64_t first, int64_t last, const F& row) {
  const int64_t steps = in.steps, width = steps * STEP;
  Array<float> rows(TOKENS * width), peaks(TOKENS * steps);
  Array<uint8_t> loud(TOKENS * steps);
  std::memset(rows.data, 0, TOKENS * width * sizeof(float));
  float lost[TOKENS];  // NaN where something is not finite, which no integer can hold: then the token becomes NaN
  for (int64_t tile = first; tile < last; tile++) {
    std::memset(in.fine + tile * steps, 0, steps);
    for (int b = 0; b < TOKENS; b++) {
      float *x = rows + b * width, *peak = peaks + b * steps, squares = 0;
      if (tile * TOKENS + b < in.count) row(tile * TOKENS + b, x);  // others repeat what was there: nobody reads them
      f32 zeros = {};
      for (int64_t s = 0; s < steps; s++) {
        f32 most = {};
        for (int i = 0; i < STEP; i += LANES) {
          const f32 v = load(x + s * STEP + i);
          most = max(most, max(v, -v));
          zeros += v * 0.f;
        }
        peak[s] = largest(most);
        squares += peak[s] * peak[s];
      }
      lost[b] = sum(zeros);
      for (int64_t s = 0; s < steps; s++) {
        if (lost[b] != 0) peak[s] = 0;
        loud[b * steps + s] = ALL_FINE<T> || peak[s] * peak[s] * steps > LOUD * squares;
        in.fine[tile * steps + s] |= loud[b * steps + s];
      }
    }
    for (int64_t s = 0; s < steps; s++)
      for (int b = 0; b < TOKENS; b++) {
        const int64_t at = (tile * steps + s) * TOKENS + b;
        const bool fine = in.fine[tile * steps + s];
        const float peak = peaks[b * steps + s];
        const float sum = put_step(rows + b * width + s * STEP, peak, loud[b * steps + s], fine, in.first + at * QUADS,
                                   in.second + at * QUADS);
        in.scale[at] = peak * (1 / 127.f) * (fine ? 1 / 256.f : 1.f) + lost[b];
        in.total[at] = in.scale[at] * sum;
        in.start[at] = -128 * (int32_t)sum;
      }
  }
}

}  // namespace FORM
