// Quantizes the tokens of a prompt for gemm_int.h, as pack_activations.h does, in tiles of a few tokens.
#pragma once

#include "norm.h"

namespace ISA {

#ifdef BYTE_DOTS
constexpr int TILE_TOKENS = 5;  // in a tile: as many sums as fit in the registers, beside two vectors of a panel
#else
constexpr int TILE_TOKENS = 3;
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

// Quantizes tiles first..last of the rows that `row` writes, (count, columns).
template <typename T, typename F>
void quantize_tiles(QuantizedTokens& in, int64_t columns, int64_t first, int64_t last, const F& row) {
  const int64_t groups = in.groups, width = groups * GROUP;
  Array<float> rows(TILE_TOKENS * width), peaks(TILE_TOKENS * groups);
  Array<uint8_t> outlier(TILE_TOKENS * groups);
  std::memset(rows.data, 0, TILE_TOKENS * width * sizeof(float));
  float nonfinite[TILE_TOKENS];
  for (int64_t tile = first; tile < last; tile++) {
    std::memset(in.sixteen_bits + tile * groups, 0, groups);
    for (int b = 0; b < TILE_TOKENS; b++) {
      if (tile * TILE_TOKENS + b < in.count)
        row(tile * TILE_TOKENS + b, rows + b * width);  // rows past the last token keep old data, which nobody reads
      nonfinite[b] = find_outliers(rows + b * width, groups, sizeof(T) == 4 || !in_bytes(in.codes), peaks + b * groups,
                                   outlier + b * groups);
      for (int64_t s = 0; s < groups; s++) in.sixteen_bits[tile * groups + s] |= outlier[b * groups + s];
    }
    for (int64_t s = 0; s < groups; s++)
      for (int b = 0; b < TILE_TOKENS; b++) {
        const int64_t at = (tile * groups + s) * TILE_TOKENS + b;
        const bool sixteen_bits = in.sixteen_bits[tile * groups + s];
        const float peak = peaks[b * groups + s];
        int32_t sums[2];
        quantize_activation_group(rows + b * width + s * GROUP, peak, outlier[b * groups + s], sixteen_bits, in.codes,
                                  in.first + at * QUADS, in.second + at * QUADS, sums);
        in.scales[at] = peak * (1 / 127.f) * (sixteen_bits ? 1 / 256.f : 1.f) + nonfinite[b];
        for (int i = 0; i < in.codes.scales; i++) {
          const int64_t to = ((tile * groups + s) * in.codes.scales + i) * TILE_TOKENS + b;
          in.total[to] = in.scales[at] * sums[i];
          in.start[to] = (lowered_by(in.codes) - in.codes.zero()) * sums[i];
        }
      }
  }
}

}  // namespace ISA
