// gemv for quantized weights.
#pragma once

#include "gemv_float.h"

namespace ISA {

constexpr int VECTORS = BLOCK_ROWS / LANES;  // of the codes of a quad, or of the scales of a block

// For each of sixteen rows, the sum of weights times activations of eight bits, or WIDE: of sixteen, in exact integers.
#ifdef BYTE_DOTS
// Rows of the batch: as many as fit in the registers, with two or three sums each.
constexpr int INT_BATCH = VECTORS == 1 ? 8 : 4;
template <bool WIDE, Kind>
struct IntSums {
  i32 high[VECTORS], low[VECTORS];
  void start(int32_t from) {
    for (int v = 0; v < VECTORS; v++) high[v] = i32{}, low[v] = i32{} + from;
  }
  void add(const u32* q, int, const int32_t* first, const int32_t* second) {
    for (int v = 0; v < VECTORS; v++) {
      if (WIDE) low[v] = dot(low[v], q[v], *second);
      (WIDE ? high : low)[v] = dot((WIDE ? high : low)[v], q[v], *first);
    }
  }
  f32 total(int v, bool sixteen_bits) const {  // an activation of eight bits has no low byte
    const i32 all = WIDE ? (high[v] << (sixteen_bits ? 8 : 0)) + low[v] : low[v];
    return __builtin_convertvector(all, f32);
  }
};
#else
constexpr int INT_BATCH = 4;
template <bool WIDE, Kind KIND>
struct IntSums {
  static constexpr int MOST = quads_in_16_bits(codes_of(KIND));
  i32 high[VECTORS], low[VECTORS];
  __m256i high_16[VECTORS], low_16[VECTORS];
  void start(int32_t from) {
    for (int v = 0; v < VECTORS; v++) {
      high[v] = i32{}, low[v] = i32{} + from;
      high_16[v] = low_16[v] = __m256i{};
    }
  }
  void add(const u32* q, int quad, const int32_t* first, const int32_t* second) {
    for (int v = 0; v < VECTORS; v++) {
      if constexpr (MOST == 0) {
        add_pairs(low[v], (__m256i)q[v], *first, *second);
        asm("" : "+x"(low[v]));  // as there
      } else {
        add_bytes(high_16[v], (__m256i)q[v], *first);
        if (WIDE) add_bytes(low_16[v], (__m256i)q[v], *second);
        if ((quad + 1) % MOST == 0) widen(v);
      }
    }
  }
  void widen(int v) {
    high[v] += sums_of_pairs(high_16[v]), high_16[v] = __m256i{};
    if (WIDE) low[v] += sums_of_pairs(low_16[v]), low_16[v] = __m256i{};
  }
  f32 total(int v, bool sixteen_bits) {
    if (MOST > 0) widen(v);
    return __builtin_convertvector((WIDE && sixteen_bits ? high[v] << 8 : high[v]) + low[v], f32);
  }
};
#endif

// Several passes over a block, each for some rows of the batch, prefetch the next block into the first-level cache.
// They take turns, group by group, so that memory is read all the time. A single pass prefetches further ahead.
struct Turns {
  int64_t passes, left;  // left: groups until the next turn
  [[gnu::always_inline]] bool mine() {
    if (--left != 0) return false;
    left = passes;
    return true;
  }
  [[gnu::always_inline]] void prefetch_from(const uint8_t* q, int64_t block_bytes) const {
    if (passes == 1)
      prefetch(q);
    else
      __builtin_prefetch(q + block_bytes, 0, 3);
  }
};

// Adds group s of a block of a quantized matrix, whose codes are at q, times B rows of the batch from `row` on.
template <int B, Kind KIND, bool WIDE>
[[gnu::always_inline]] inline void add_group(const Matrix& m, int64_t block, int64_t s, const uint8_t* q,
                                             const Input& in, int64_t row, f32 (*acc)[VECTORS]) {
  constexpr Codes CODES = codes_of(KIND);
  constexpr int STEP = QUADS / CODES.scales;  // quads that share a scale
  const int64_t group = s * in.batch + row;
#pragma GCC unroll 2
  for (int part = 0; part < CODES.scales; part++) {
    const int64_t of = (s * CODES.scales + part) * in.batch + row;  // total and start
    IntSums<WIDE, KIND> sums[B];
    for (int b = 0; b < B; b++) sums[b].start(CODES.has_min ? 0 : in.start[of + b]);
#pragma GCC unroll 8
    for (int i = part * STEP; i < (part + 1) * STEP; i++) {
      if (B == 1 && i < CODES.bits) prefetch(q + i * 64);
      u32 codes[VECTORS];
      for (int v = 0; v < VECTORS; v++) codes[v] = lowered(load_quad<u32>(m, KIND, q + v * 4 * LANES, i), KIND);
      for (int b = 0; b < B; b++) {
        const int64_t at = (group + b) * QUADS + i;
        sums[b].add(codes, i, in.first + at, in.second + at);
      }
    }
    for (int v = 0; v < VECTORS; v++) {
      const f32 scale = scales_of(m, KIND, false, block, s, part, v * LANES);
      for (int b = 0; b < B; b++)
        acc[b][v] += scale * in.scales[group + b] * sums[b].total(v, in.sixteen_bits[group + b]);
      if (!CODES.has_min) continue;
      const f32 min = scales_of(m, KIND, true, block, s, part, v * LANES);
      for (int b = 0; b < B; b++) acc[b][v] += min * in.total[of + b];
    }
  }
}

// out[b * BLOCK_ROWS ...] = one block of a quantized matrix times B rows of the batch from `row` on.
template <int B, Kind KIND>
inline void gemv_block_int(const Matrix& m, int64_t block, const Input& in, int64_t row, float* out, Turns turns) {
  constexpr int64_t BYTES = codes_of(KIND).group_bytes();
  constexpr uint8_t NONE[B] = {};
  const int64_t groups = in.width / GROUP;
  const uint8_t* q = (const uint8_t*)m.data + block * groups * BYTES;
  f32 acc[B][VECTORS] = {};
  for (int64_t s = 0; s < groups; s++, q += BYTES) {
    if (B > 1 && turns.mine())
      for (int i = 0; i < BYTES; i += 64) turns.prefetch_from(q + i, groups * BYTES);
    // With AVX-512 memory limits the speed of one row, and a branch would make it slower.
    if ((B == 1 && LANES == 16) || !in_bytes(codes_of(KIND)) ||
        std::memcmp(in.sixteen_bits + s * in.batch + row, NONE, B) != 0)
      add_group<B, KIND, true>(m, block, s, q, in, row, acc);
    else
      add_group<B, KIND, false>(m, block, s, q, in, row, acc);
  }
  for (int v = 0; v < VECTORS; v++)
    for (int b = 0; b < B; b++) store(out + b * BLOCK_ROWS + v * LANES, acc[b][v]);
}

template <Kind KIND>
[[gnu::noinline]] void gemv_block_int(const Matrix& m, int64_t block, const Input& in, float* out) {
  const int64_t passes = in.batch / INT_BATCH + __builtin_popcountll(in.batch % INT_BATCH);  // of 8 or 4, ..., 2, 1
  int64_t b = 0, pass = 0;
  auto next = [&]<int B>() {
    gemv_block_int<B, KIND>(m, block, in, b, out + b * BLOCK_ROWS, Turns{passes, ++pass});
    b += B;
  };
  while (b + INT_BATCH <= in.batch) next.template operator()<INT_BATCH>();
  if (INT_BATCH > 4 && in.batch - b >= 4) next.template operator()<4>();
  if (in.batch - b >= 2) next.template operator()<2>();
  if (b < in.batch) next.template operator()<1>();
}

}  // namespace ISA
