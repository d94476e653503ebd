// gemm for a quantized matrix and quantized tokens: a panel of rows is unpacked once, then multiplied by tiles of
// tokens.
#pragma once

#include "quantize_activations.h"
#include "gemm_float.h"

namespace ISA {

constexpr int PANEL = 2 * LANES;

struct IntPanel {
  Array<uint8_t> q;           // (groups, QUADS, 2, LANES, 4)
  Array<float> scales, mins;  // (groups * codes.scales, 2, LANES); mins if its kind has them
  IntPanel(int64_t groups, Codes codes)
      : q(groups * GROUP * PANEL), scales(groups * codes.scales * PANEL), mins(groups * codes.scales * PANEL) {}
};

// Rows beyond the end of the matrix are zeros.
template <Kind KIND>
[[gnu::noinline]] void fill_strip(IntPanel& panel, int strip, Strip from, int64_t groups) {
  constexpr Codes CODES = codes_of(KIND);
  const Matrix& m = *from.of;
  const bool in_matrix = from.row < m.rows;
  const int64_t block = from.row / BLOCK_ROWS, lane = from.row % BLOCK_ROWS;
  for (int64_t s = 0; s < groups; s++) {
    uint8_t* q = panel.q + (s * QUADS * 2 + strip) * 4 * LANES;
    const uint8_t* source = (const uint8_t*)m.data + (block * groups + s) * CODES.group_bytes() + 4 * lane;
#pragma GCC unroll 8
    for (int quad = 0; quad < QUADS; quad++) {
      const u32 v = in_matrix ? lowered(load_quad<u32>(m, KIND, source, quad), KIND) : u32{};
      std::memcpy(q + quad * 8 * LANES, &v, sizeof v);
    }
    for (int half = 0; half < CODES.scales; half++) {
      const int64_t to = (2 * (s * CODES.scales + half) + strip) * LANES;
      auto values = [&](bool mins) { return in_matrix ? scales_of(m, KIND, mins, block, s, half, lane) : f32{}; };
      store(panel.scales + to, values(false));
      if (CODES.has_min) store(panel.mins + to, values(true));
    }
  }
}

#ifdef BYTE_DOTS
// sums[b][strip] += some quads of the panel times the same quads of each token.
#ifdef __AVX512VNNI__
// In assembler: with the intrinsic, GCC 12 copies every sum before it adds to it.
inline void add_quad(i32& sum, const i32& q, int32_t x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(i32{} + x));
}

template <int N>
inline void add_quads(i32 (*sums)[2], const uint8_t* q, const int32_t* x) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
    const i32 a = load_as<i32>(q + i * 128), c = load_as<i32>(q + i * 128 + 64);
    for (int b = 0; b < TILE_TOKENS; b++) {
      add_quad(sums[b][0], a, x[b * QUADS + i]);
      add_quad(sums[b][1], c, x[b * QUADS + i]);
    }
  }
}
#else
template <int N>
inline void add_quads(i32 (*sums)[2], const uint8_t* q, const int32_t* x) {
  for (int i = 0; i < N; i += 4)
    for (int b = 0; b < TILE_TOKENS; b++)
      for (int strip = 0; strip < 2; strip++)
        sums[b][strip] = dot_four(sums[b][strip], q + (2 * i + strip) * 4 * LANES, 8 * LANES, x + b * QUADS + i);
}
#endif

template <int N, int>
inline void add_quads(i32 (*sums)[2], const uint8_t* q, const int32_t* first, const int32_t* second, bool sixteen_bits,
                      const int32_t* start) {
  for (int b = 0; b < TILE_TOKENS; b++)
    sums[b][0] = sums[b][1] = i32{} + (sixteen_bits || start == nullptr ? 0 : start[b]);
  add_quads<N>(sums, q, first);
  if (!sixteen_bits) return;
  for (int b = 0; b < TILE_TOKENS; b++)
    for (int i = 0; i < 2; i++) sums[b][i] = (sums[b][i] << 8) + (start == nullptr ? 0 : start[b]);
  add_quads<N>(sums, q, second);
}
#else
// sums[b][strip] += some quads of the panel times bytes of each token.
template <int N, int MOST>
inline void add_quads(i32 (*sums)[2], const uint8_t* q, const int32_t* x) {
  for (int from = 0; from < N; from += MOST) {
    __m256i sums_16[TILE_TOKENS][2] = {};
    for (int i = from; i < (from + MOST < N ? from + MOST : N); i++)
#pragma GCC unroll 2  // all, here and below, or the sums would live in memory
      for (int strip = 0; strip < 2; strip++)
#pragma GCC unroll 8
        for (int b = 0; b < TILE_TOKENS; b++)
          add_bytes(sums_16[b][strip], load_as<__m256i>(q + (2 * i + strip) * 32), x[b * QUADS + i]);
#pragma GCC unroll 8
    for (int b = 0; b < TILE_TOKENS; b++)
#pragma GCC unroll 2
      for (int strip = 0; strip < 2; strip++) sums[b][strip] += sums_of_pairs(sums_16[b][strip]);
  }
}

template <int N, int MOST>
inline void add_quads(i32 (*sums)[2], const uint8_t* q, const int32_t* first, const int32_t* second, bool sixteen_bits,
                      const int32_t* start) {
  for (int b = 0; b < TILE_TOKENS; b++) sums[b][0] = sums[b][1] = i32{};
  if constexpr (MOST == 0) {
    for (int i = 0; i < N; i++)
#pragma GCC unroll 2
      for (int strip = 0; strip < 2; strip++)
#pragma GCC unroll 8
        for (int b = 0; b < TILE_TOKENS; b++)
          add_pairs(sums[b][strip], load_as<__m256i>(q + (2 * i + strip) * 32), first[b * QUADS + i],
                    second[b * QUADS + i]);
  } else {
    add_quads<N, MOST>(sums, q, first);
    if (sixteen_bits) {
      asm("" ::: "memory");  // else GCC keeps the panel for this rare case, on the stack
      for (int b = 0; b < TILE_TOKENS; b++) sums[b][0] <<= 8, sums[b][1] <<= 8;
      add_quads<N, MOST>(sums, q, second);
    }
  }
  for (int b = 0; b < TILE_TOKENS && start != nullptr; b++) sums[b][0] += start[b], sums[b][1] += start[b];
}
#endif

// out (TILE_TOKENS, 2, LANES): a panel times a tile of tokens. SCALES: of 32 columns. MOST: quads_in_16_bits.
template <bool HAS_MIN, int SCALES, int MOST>
void panel_times(const IntPanel& panel, const QuantizedTokens& in, int64_t tile, float* out) {
  constexpr int STEP = QUADS / SCALES;  // quads that share a scale
  f32 acc[TILE_TOKENS][2] = {};
  for (int64_t s = 0; s < in.groups * SCALES; s++) {
    const int64_t group = tile * in.groups + s / SCALES, at = group * TILE_TOKENS,
                  quad = at * QUADS + s % SCALES * STEP;
    const int64_t of = (tile * in.groups * SCALES + s) * TILE_TOKENS;  // total and start
    i32 sums[TILE_TOKENS][2];
    add_quads<STEP, MOST>(sums, panel.q + s * STEP * 4 * PANEL, in.first + quad, in.second + quad,
                          in.sixteen_bits[group], HAS_MIN ? nullptr : in.start + of);
    for (int i = 0; i < 2; i++) {
      const f32 scale = load(panel.scales + (2 * s + i) * LANES);
      for (int b = 0; b < TILE_TOKENS; b++)
        acc[b][i] += scale * in.scales[at + b] * __builtin_convertvector(sums[b][i], f32);
      if (!HAS_MIN) continue;
      const f32 min = load(panel.mins + (2 * s + i) * LANES);
      for (int b = 0; b < TILE_TOKENS; b++) acc[b][i] += min * in.total[of + b];
    }
  }
  for (int b = 0; b < TILE_TOKENS; b++)
    for (int i = 0; i < 2; i++) store(out + (2 * b + i) * LANES, acc[b][i]);
}

// Multiplies panels by tokens. Calls done(panel, token, n, y) with y (n, 2, LANES), the products of n tokens;
// `strip(panel, 0 or 1)` names the strips of a panel.
template <typename S, typename F>
void times_tokens(int64_t panels, const S& strip, const QuantizedTokens& in, Pool pool, const F& done) {
  decltype(&panel_times<true, 1, 0>) times = nullptr;
  with_kind(strip(0, 0).of->kind, [&]<Kind KIND>() {
    constexpr Codes CODES = codes_of(KIND);
    times = panel_times<CODES.has_min, CODES.scales, quads_in_16_bits(CODES)>;
  });
  parallel(pool, panels, [&](int64_t first, int64_t last) {
    IntPanel panel(in.groups, in.codes);
    Array<float> y(TILE_TOKENS * PANEL);
    for (int64_t p = first; p < last; p++) {
      with_kind(strip(p, 0).of->kind, [&]<Kind KIND>() {
        for (int i = 0; i < 2; i++) fill_strip<KIND>(panel, i, strip(p, i), in.groups);
      });
      for (int64_t tile = 0; tile < token_tiles(in.count); tile++) {
        times(panel, in, tile, y);
        const int64_t remaining = in.count - tile * TILE_TOKENS;
        done(p, tile * TILE_TOKENS, min(remaining, TILE_TOKENS), (const float*)y);
      }
    }
  });
}

}  // namespace ISA
