// What the matrix products of a prompt do not do: attention of many new tokens of one row, and codes made floats again.
//
// Keys and values are first laid out so that as many positions, or elements, as there are lanes stand in a vector and
// the elements that are summed stand in pairs of bfloat16 (float32: alone). Then it is FlashAttention (Dao 2022): blocks
// of scores that never leave the cache, a running largest score and sum.
#pragma once

#include "attention.h"

namespace FORM {

constexpr int64_t BLOCK = 64;  // positions
constexpr int64_t TURN = 48;   // queries a thread takes at a time
constexpr float ROOM = 8;      // how far a score may lie over the largest that is reckoned with
#ifdef __AVX512F__
constexpr int AT_ONCE = 6;  // queries in registers, with BLOCK sums each
#else
constexpr int AT_ONCE = 1;
#endif

template <typename T>
constexpr int64_t PAIR = 4 / sizeof(T);

// PAIR elements in each lane times PAIR elements that all lanes share.
inline f32 lanes_times(f32 acc, const float* w, const float* x) { return acc + load(w) * *x; }
inline f32 lanes_times(f32 acc, const bf16* w, const bf16* x) {
#ifdef __AVX512BF16__
  int32_t pair;
  std::memcpy(&pair, x, 4);
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(load_as<i32>(w)), "v"(i32{} + pair));
  return acc;
#else
  uint32_t pair;
  std::memcpy(&pair, x, 4);
  u32 pairs = load_as<u32>(w);
  acc += (f32)(pairs << 16) * (f32)((pair << 16) - u32{});
  return acc + (f32)(pairs & 0xffff0000u) * (f32)((pair & 0xffff0000u) - u32{});
#endif
}

// out[q * stride + lane] (+)= the sum over n of w[n][lane] * x[q][n], for Q queries and L vectors of lanes.
template <int Q, int L, bool ADD, typename T>
inline void lane_products(const T* w, int64_t w_lanes, int64_t w_next, const T* x, int64_t x_next, int64_t n, float* out,
                          int64_t stride) {
  f32 acc[Q][L];
  for (int q = 0; q < Q; q++)
    for (int l = 0; l < L; l++) acc[q][l] = ADD ? load(out + q * stride + l * LANES) : f32{};
  for (int64_t i = 0; i < n; i += PAIR<T>)
    for (int q = 0; q < Q; q++)
      for (int l = 0; l < L; l++)
        acc[q][l] = lanes_times(acc[q][l], w + i / PAIR<T> * w_next + l * w_lanes, x + q * x_next + i);
  for (int q = 0; q < Q; q++)
    for (int l = 0; l < L; l++) store(out + q * stride + l * LANES, acc[q][l]);
}

template <int L, bool ADD, typename T>
inline void lane_products(const T* w, int64_t w_lanes, int64_t w_next, const T* x, int64_t x_next, int64_t queries,
                          int64_t n, float* out, int64_t stride) {
  int64_t q = 0;
  for (; q + AT_ONCE <= queries; q += AT_ONCE)
    lane_products<AT_ONCE, L, ADD>(w, w_lanes, w_next, x + q * x_next, x_next, n, out + q * stride, stride);
  for (; q < queries; q++)
    lane_products<1, L, ADD>(w, w_lanes, w_next, x + q * x_next, x_next, n, out + q * stride, stride);
}

template <typename T>
struct Packed {  // one KV head
  T *k, *v;      // (positions / LANES, dim / PAIR, LANES, PAIR) and (positions / PAIR, dim / LANES, LANES, PAIR)
};

// Elements of two rows side by side, PAIR<T> in each lane.
inline u32 paired(const float* a, const float*, int n) { return (u32)load_first(a, n); }
inline u32 paired(const bf16* a, const bf16* b, int n) {
  return ((u32)load_first(a, n) >> 16) | (u32)load_first(b, n);
}

template <typename T>
void pack_block(const T* k, const T* v, int64_t n, int64_t dim, int64_t from, Packed<T> to) {
  const int64_t wide = (dim + LANES - 1) / LANES * LANES, dwords = dim / PAIR<T>;
  Array<T> nothing(wide);
  std::memset(nothing.data, 0, wide * sizeof(T));
  auto row = [&](const T* x, int64_t s) { return s < n ? x + s * dim : nothing.data; };
  for (int64_t s = from; s < from + BLOCK; s++) {
    const char* at = (const char*)row(k, s);
    uint32_t* lane = (uint32_t*)to.k + s / LANES * dwords * LANES + s % LANES;
    for (int64_t i = 0; i < dwords; i++) std::memcpy(lane + i * LANES, at + 4 * i, 4);
  }
  for (int64_t s = from; s < from + BLOCK; s += PAIR<T>)
    for (int64_t i = 0; i < wide; i += LANES) {
      u32 both = paired(row(v, s) + i, row(v, s + PAIR<T> - 1) + i, (int)(dim - i));
      std::memcpy(to.v + s * wide + i * PAIR<T>, &both, sizeof both);
    }
}

// Some queries of one head, which stand at `position` and after: out[q * out_next ...].
template <typename T>
void attend_turn(const T* queries, int64_t count, int64_t position, int64_t window, Packed<T> packed, int64_t dim,
                 T* out, int64_t out_next) {
  const int64_t wide = (dim + LANES - 1) / LANES * LANES, vectors = wide / LANES;
  const float scale = 1.f / __builtin_sqrtf((float)dim);
  Array<float> scores(TURN * BLOCK), acc(TURN * wide);
  Array<T> weights(TURN * BLOCK);
  float most[TURN], total[TURN];
  for (int64_t i = 0; i < count * wide; i++) acc[i] = 0;
  for (int64_t q = 0; q < count; q++) most[q] = START, total[q] = 0;
  const int64_t seen = position + count, oldest = window > 0 && position + 1 > window ? position + 1 - window : 0;
  for (int64_t s = oldest / BLOCK * BLOCK; s < seen; s += BLOCK) {
    lane_products<BLOCK / LANES, false>(packed.k + s * dim, LANES * dim, LANES * PAIR<T>, queries, dim, count, dim,
                                        (float*)scores, BLOCK);
    for (int64_t q = 0; q < count; q++) {
      float* row = scores + q * BLOCK;
      const int64_t last = position + q - s, first = window > 0 ? last - window + 1 : 0;  // of this block
      f32 top = splat(START), v[BLOCK / LANES], all = {};
      for (int l = 0; l < BLOCK / LANES; l++) {
        v[l] = load(row + l * LANES) * scale;
        if (last < (l + 1) * LANES - 1 || first > l * LANES) {
          const i32 lane = lane_numbers() + l * LANES;
          v[l] = (lane > (int32_t)last) | (lane < (int32_t)first) ? splat(LEAST) : v[l];
        }
        top = max(v[l], top);
      }
      const float now = largest(top);
      if (now > most[q] + ROOM) {  // rarely after the first block: e^ROOM is no large number
        const float before = exp(splat(most[q] - now))[0];
        total[q] *= before;
        for (int64_t i = 0; i < wide; i += LANES) store(acc + q * wide + i, load(acc + q * wide + i) * before);
        most[q] = now;
      }
      for (int l = 0; l < BLOCK / LANES; l++) {
        f32 p = exp(v[l] - most[q]);
        all += p;
        store(weights + q * BLOCK + l * LANES, p);
      }
      total[q] += sum(all);
    }
    int64_t at = 0;
    for (; at + 4 <= vectors; at += 4)
      lane_products<4, true>(packed.v + s * wide + at * LANES * PAIR<T>, LANES * PAIR<T>, wide * PAIR<T>,
                             (const T*)weights.data, BLOCK, count, BLOCK, acc + at * LANES, wide);
    for (; at < vectors; at++)
      lane_products<1, true>(packed.v + s * wide + at * LANES * PAIR<T>, LANES * PAIR<T>, wide * PAIR<T>,
                             (const T*)weights.data, BLOCK, count, BLOCK, acc + at * LANES, wide);
  }
  for (int64_t q = 0; q < count; q++)
    for (int64_t i = 0; i < dim; i += LANES)
      store_first(out + q * out_next + i, load(acc + q * wide + i) / total[q], (int)(dim - i));
}

template <typename T>
void attend_of(const void* qkv, int64_t width, const Attention& a, void* out, Team team) {
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, wide = (dim + LANES - 1) / LANES * LANES;
  const int64_t start = a.positions[0], seen = start + a.length, blocks = (seen + BLOCK - 1) / BLOCK;
  Array<T> queries(a.heads * a.length * dim), keys(a.kv_heads * blocks * BLOCK * dim);
  Array<T> values(a.kv_heads * blocks * BLOCK * wide);
  parallel(team, a.length, [&](int64_t first, int64_t last) {
    Array<float> head(dim);
    for (int64_t t = first; t < last; t++) {
      const T* row = (const T*)qkv + t * width;
      const float *cos = a.cos + t * dim / 2, *sin = a.sin + t * dim / 2;
      for (int64_t h = 0; h < a.heads; h++) {
        place<T>(row + h * dim, a.q, cos, sin, dim, head);
        copy_row((const float*)head, dim, (T*)queries + (h * a.length + t) * dim);
      }
      for (int64_t h = 0; h < a.kv_heads; h++) {
        const int64_t at = h * a.cache_head + (start + t) * dim;
        place<T>(row + a.k_at + h * dim, a.k, cos, sin, dim, head);
        copy_row((const float*)head, dim, (T*)a.k_cache + at);
        std::memcpy((T*)a.v_cache + at, row + a.v_at + h * dim, dim * sizeof(T));
      }
    }
  });
  auto packed = [&](int64_t h) {
    return Packed<T>{keys + h * blocks * BLOCK * dim, values + h * blocks * BLOCK * wide};
  };
  parallel(team, a.kv_heads * blocks, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t h = i / blocks, at = h * a.cache_head;
      pack_block((const T*)a.k_cache + at, (const T*)a.v_cache + at, seen, dim, i % blocks * BLOCK, packed(h));
    }
  });
  const int64_t turns = (a.length + TURN - 1) / TURN;
  int64_t next = 0;
  parallel(team, a.heads * turns, [&](int64_t, int64_t) {
    for (;;) {  // the longest first, by whoever is free
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= a.heads * turns) return;
      const int64_t h = i % a.heads, t = (turns - 1 - i / a.heads) * TURN;
      const int64_t count = a.length - t < TURN ? a.length - t : TURN;
      attend_turn(queries + (h * a.length + t) * dim, count, start + t, a.window, packed(h / group), dim,
                  (T*)out + (t * a.heads + h) * dim, a.heads * dim);
    }
  });
}

// Floats of a column, or of two, as dwords of their rows.
inline u32 column(f32 a, f32, const float*) { return (u32)a; }
inline u32 column(f32 a, f32 b, const bf16*) { return widened(rounded(a)) | (widened(rounded(b)) << 16); }

// Rows of one block and columns of one step, as dwords of PAIR<T> columns: out[pair of columns][row].
template <typename T>
inline void widen_step(const Matrix& m, int64_t block, int64_t step, int64_t steps, uint32_t (*out)[TILE]) {
  const bool four = m.kind == Kind::INT4;
  const uint8_t* codes = (const uint8_t*)m.data + (block * steps + step) * (four ? 256 : 512);
  const int64_t at = (block * steps + step) * TILE;
  for (int row = 0; row < TILE; row += LANES) {
    const f32 scale = half_to_float(m.scale + at + row);
    const f32 least = four ? half_to_float(m.least + at + row) : scale * -128.f;
    for (int quad = 0, to = 0; quad < QUADS; quad++) {
      u32 v = load_as<u32>(codes + (four ? quad / 2 : quad) * 64 + 4 * row);
      if (four) v = (quad % 2 ? v >> 4 : v) & 0x0f0f0f0f;
      f32 x[4];
      for (int i = 0; i < 4; i++) x[i] = __builtin_convertvector((i32)((v >> 8 * i) & 255), f32) * scale + least;
      for (int i = 0; i < 4; i += PAIR<T>, to++) {
        const u32 dwords = column(x[i], x[i + PAIR<T> - 1], (const T*)nullptr);
        std::memcpy(out[to] + row, &dwords, sizeof dwords);
      }
    }
  }
}

// Rows first..last of a matrix of codes.
template <typename T>
void widen_of(const Matrix& m, int64_t first, int64_t last, void* out, Team team) {
  const int64_t steps = (m.columns + STEP - 1) / STEP, n = m.columns;
  parallel(team, (last - first + TILE - 1) / TILE, [&](int64_t begin, int64_t end) {
    for (int64_t block = first / TILE + begin; block < first / TILE + end; block++)
      for (int64_t s = 0; s < steps; s++) {
        uint32_t columns[STEP / PAIR<T>][TILE];
        widen_step<T>(m, block, s, steps, columns);
        const int64_t left = n - s * STEP, count = left < STEP ? left : STEP;
        for (int r = 0; r < TILE && block * TILE + r < last; r++) {
          uint32_t row[STEP / PAIR<T>];
          for (int i = 0; i < STEP / PAIR<T>; i++) row[i] = columns[i][r];
          std::memcpy((T*)out + (block * TILE + r - first) * n + s * STEP, row, count * sizeof(T));
        }
      }
  });
}

}  // namespace FORM
