// Quantizes the tokens of a prompt for gemm_int.h, in tiles of a few tokens, 32 columns (a group) at a time.
//
// A group has eight bits and a scale. A group that holds an outlier has sixteen bits, because its rounding errors would
// be large (LLM.int8, Dettmers 2022, also treats outliers apart). In a float32 model, and without VNNI, every group has
// sixteen. How a token is quantized depends on that token alone.
#pragma once

#include "norm.h"

namespace ISA {

#ifdef __AVX512VNNI__
constexpr int TILE_TOKENS = 5;  // in a tile: as many sums as fit in the registers, beside two vectors of a panel
#else
constexpr int TILE_TOKENS = 3;
#endif
constexpr float OUTLIER = 3;  // a group holds an outlier if its squared maximum exceeds so many means over the groups

#ifdef __AVX512VNNI__
template <typename T>
constexpr bool ALWAYS_16_BITS = sizeof(T) == 4;
#else
template <typename T>
constexpr bool ALWAYS_16_BITS = true;
#endif

struct QuantizedTokens {
  static constexpr int STRIPS = 2;  // in a panel
  const Codes codes;                // of the matrix that they are multiplied by
  int64_t count, groups;
  Array<int32_t> first, second;  // (tiles, groups, TILE_TOKENS, QUADS), as in Input
  Array<uint8_t> sixteen_bits;   // (tiles, groups): whether any token of the tile has sixteen bits there
  Array<float> scales;           // (tiles, groups, TILE_TOKENS)
  Array<float> total;            // (tiles, groups * codes.scales, TILE_TOKENS): sums of the columns of a scale, scaled
  Array<int32_t> start;          // the same shape: cancels the code that means 0
};

inline int64_t token_tiles(int64_t tokens) { return (tokens + TILE_TOKENS - 1) / TILE_TOKENS; }

// Quantizes one group; `sums` as in sums_of.
inline void quantize_activation_group(const float* x, float peak, bool outlier, bool sixteen_bits, int32_t* first,
                                      int32_t* second, int scales_each, int32_t* sums) {
  const float to_int = peak > 1e-30f ? (outlier ? 32512.f : 127.f) / peak : 0.f;
  i32 q[GROUP / LANES];
  for (int i = 0; i < GROUP / LANES; i++) {
    const f32 v = to_int != 0 ? load(x + i * LANES) * to_int : f32{};
    q[i] = (i32)(v + 12582912.f) - 0x4b400000;  // rounds to nearest, as in quantize_input_group
    if (sixteen_bits && !outlier) q[i] <<= 8;
  }
  store_activations(q, sixteen_bits, first, second);
  sums_of(q, scales_each, sums);
}

// Quantizes tiles first..last of the rows that `row` writes, (count, columns).
template <typename T, typename F>
void quantize_tiles(QuantizedTokens& in, int64_t columns, int64_t first, int64_t last, const F& row) {
  const int64_t groups = in.groups, width = groups * GROUP;
  Array<float> rows(TILE_TOKENS * width), peaks(TILE_TOKENS * groups);
  Array<uint8_t> outlier(TILE_TOKENS * groups);
  std::memset(rows.data, 0, TILE_TOKENS * width * sizeof(float));
  float nonfinite[TILE_TOKENS];  // NaN if anything is not finite: no integer holds that, so the scale becomes NaN
  for (int64_t tile = first; tile < last; tile++) {
    std::memset(in.sixteen_bits + tile * groups, 0, groups);
    for (int b = 0; b < TILE_TOKENS; b++) {
      float *x = rows + b * width, *peak = peaks + b * groups, squares = 0;
      if (tile * TILE_TOKENS + b < in.count)
        row(tile * TILE_TOKENS + b, x);  // rows past the last token keep old data, which nobody reads
      f32 zeros = {};
      for (int64_t s = 0; s < groups; s++) {
        f32 most = {};
        for (int i = 0; i < GROUP; i += LANES) {
          const f32 v = load(x + s * GROUP + i);
          most = max(most, max(v, -v));
          zeros += v * 0.f;
        }
        peak[s] = largest(most);
        squares += peak[s] * peak[s];
      }
      nonfinite[b] = sum(zeros);
      for (int64_t s = 0; s < groups; s++) {
        if (nonfinite[b] != 0) peak[s] = 0;
        outlier[b * groups + s] = ALWAYS_16_BITS<T> || peak[s] * peak[s] * groups > OUTLIER * squares;
        in.sixteen_bits[tile * groups + s] |= outlier[b * groups + s];
      }
    }
    for (int64_t s = 0; s < groups; s++)
      for (int b = 0; b < TILE_TOKENS; b++) {
        const int64_t at = (tile * groups + s) * TILE_TOKENS + b;
        const bool sixteen_bits = in.sixteen_bits[tile * groups + s];
        const float peak = peaks[b * groups + s];
        int32_t sums[2];
        quantize_activation_group(rows + b * width + s * GROUP, peak, outlier[b * groups + s], sixteen_bits,
                                  in.first + at * QUADS, in.second + at * QUADS, in.codes.scales, sums);
        in.scales[at] = peak * (1 / 127.f) * (sixteen_bits ? 1 / 256.f : 1.f) + nonfinite[b];
        for (int i = 0; i < in.codes.scales; i++) {
          const int64_t to = ((tile * groups + s) * in.codes.scales + i) * TILE_TOKENS + b;
          in.total[to] = in.scales[at] * sums[i];
          in.start[to] = -in.codes.zero() * sums[i];
        }
      }
  }
}

}  // namespace ISA
