// gemm for a quantized matrix and quantized tokens: a panel of rows is unpacked once, then multiplied by tiles of
// tokens.
#pragma once

#include "quantize_activations.h"
#include "gemm_float.h"

namespace ISA {

constexpr int PANEL = 2 * LANES;

struct IntPanel {
  Array<uint8_t> q;           // (groups, QUADS, 2, LANES, 4)
  Array<float> scales, mins;  // (groups, 2, LANES); mins unless int8
  explicit IntPanel(int64_t groups) : q(groups * GROUP * PANEL), scales(groups * PANEL), mins(groups * PANEL) {}
};

// Rows beyond the end of the matrix are zeros.
inline void fill_strip(IntPanel& panel, int strip, Strip from, int64_t groups) {
  const Matrix& m = *from.of;
  const bool in_matrix = from.row < m.rows;
  const int64_t block = from.row / BLOCK_ROWS, lane = from.row % BLOCK_ROWS;
  for (int64_t s = 0; s < groups; s++) {
    uint8_t* q = panel.q + (s * QUADS * 2 + strip) * 4 * LANES;
    const uint8_t* source = (const uint8_t*)m.data + (block * groups + s) * group_bytes(m.kind) + 4 * lane;
    for (int quad = 0; quad < QUADS; quad++) {
      const u32 v = in_matrix ? load_quad<u32>(m.kind, source, quad) : u32{};
      std::memcpy(q + quad * 8 * LANES, &v, sizeof v);
    }
    const int64_t at = (block * groups + s) * BLOCK_ROWS + lane, to = (2 * s + strip) * LANES;
    store(panel.scales + to, in_matrix ? half_to_float(m.scales + at) : f32{});
    if (m.mins != nullptr) store(panel.mins + to, in_matrix ? half_to_float(m.mins + at) : f32{});
  }
}

#ifdef __AVX512VNNI__
// In assembler: with the intrinsic, GCC 12 copies every sum before it adds to it.
inline void add_quad(i32& sum, const i32& q, int32_t x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(i32{} + x));
}

// sums[b][strip] += one group of the panel times the same group of each token.
inline void add_group(i32 (*sums)[2], const uint8_t* q, const int32_t* x) {
#pragma GCC unroll 8
  for (int i = 0; i < QUADS; i++) {
    const i32 a = load_as<i32>(q + i * 128), c = load_as<i32>(q + i * 128 + 64);
    for (int b = 0; b < TILE_TOKENS; b++) {
      add_quad(sums[b][0], a, x[b * QUADS + i]);
      add_quad(sums[b][1], c, x[b * QUADS + i]);
    }
  }
}

inline void add_group(i32 (*sums)[2], const uint8_t* q, const int32_t* first, const int32_t* second, bool sixteen_bits,
                      const int32_t* start) {
  for (int b = 0; b < TILE_TOKENS; b++)
    sums[b][0] = sums[b][1] = i32{} + (sixteen_bits || start == nullptr ? 0 : start[b]);
  add_group(sums, q, first);
  if (!sixteen_bits) return;
  for (int b = 0; b < TILE_TOKENS; b++)
    for (int i = 0; i < 2; i++) sums[b][i] = (sums[b][i] << 8) + (start == nullptr ? 0 : start[b]);
  add_group(sums, q, second);
}
#else
inline void add_group(i32 (*sums)[2], const uint8_t* q, const int32_t* first, const int32_t* second, bool,
                      const int32_t* start) {
  for (int b = 0; b < TILE_TOKENS; b++) sums[b][0] = sums[b][1] = i32{} + (start == nullptr ? 0 : start[b]);
  for (int i = 0; i < QUADS; i++)
    for (int strip = 0; strip < 2; strip++) {
      const __m256i all = load_as<__m256i>(q + (2 * i + strip) * 32);
      const __m256i evens = _mm256_and_si256(all, _mm256_set1_epi16(255)), odds = _mm256_srli_epi16(all, 8);
      for (int b = 0; b < TILE_TOKENS; b++) {
        sums[b][strip] += (i32)_mm256_madd_epi16(evens, _mm256_set1_epi32(first[b * QUADS + i]));
        sums[b][strip] += (i32)_mm256_madd_epi16(odds, _mm256_set1_epi32(second[b * QUADS + i]));
      }
    }
}
#endif

// out (TILE_TOKENS, 2, LANES): a panel times a tile of tokens.
template <bool HAS_MIN>
void panel_times(const IntPanel& panel, const QuantizedTokens& in, int64_t tile, float* out) {
  f32 acc[TILE_TOKENS][2] = {};
  for (int64_t s = 0; s < in.groups; s++) {
    const int64_t at = (tile * in.groups + s) * TILE_TOKENS;
    i32 sums[TILE_TOKENS][2];
    add_group(sums, panel.q + s * GROUP * PANEL, in.first + at * QUADS, in.second + at * QUADS,
              in.sixteen_bits[tile * in.groups + s], HAS_MIN ? nullptr : in.start + at);
    for (int i = 0; i < 2; i++) {
      const f32 scale = load(panel.scales + (2 * s + i) * LANES);
      for (int b = 0; b < TILE_TOKENS; b++)
        acc[b][i] += scale * in.scales[at + b] * __builtin_convertvector(sums[b][i], f32);
      if (!HAS_MIN) continue;
      const f32 min = load(panel.mins + (2 * s + i) * LANES);
      for (int b = 0; b < TILE_TOKENS; b++) acc[b][i] += min * in.total[at + b];
    }
  }
  for (int b = 0; b < TILE_TOKENS; b++)
    for (int i = 0; i < 2; i++) store(out + (2 * b + i) * LANES, acc[b][i]);
}

// Multiplies panels by tokens. Calls done(panel, token, n, y) with y (n, 2, LANES), the products of n tokens;
// `strip(panel, 0 or 1)` names the strips of a panel.
template <typename S, typename F>
void times_tokens(int64_t panels, const S& strip, const QuantizedTokens& in, Pool pool, const F& done) {
  parallel(pool, panels, [&](int64_t first, int64_t last) {
    IntPanel panel(in.groups);
    Array<float> y(TILE_TOKENS * PANEL);
    for (int64_t p = first; p < last; p++) {
      for (int i = 0; i < 2; i++) fill_strip(panel, i, strip(p, i), in.groups);
      const bool has_min = strip(p, 0).of->mins != nullptr;
      for (int64_t tile = 0; tile < token_tiles(in.count); tile++) {
        (has_min ? panel_times<true> : panel_times<false>)(panel, in, tile, y);
        const int64_t remaining = in.count - tile * TILE_TOKENS;
        done(p, tile * TILE_TOKENS, min(remaining, TILE_TOKENS), (const float*)y);
      }
    }
  });
}

}  // namespace ISA
