// Attention for prefill: many new tokens of one row.
//
// Keys and values are first packed for the microkernel. Then FlashAttention (Dao 2022): scores are computed in blocks
// that stay in the processor's cache, with a running maximum and sum.
#pragma once

#include "decode_attention.h"
#include "microkernel.h"

namespace ISA {

constexpr int64_t KEY_BLOCK = 64;  // positions
template <typename T>
constexpr int64_t QUERY_TILE = AMX<T> ? 32 : 48;  // queries that a thread takes at a time
constexpr float SCORE_SLACK = 8;  // sums are rescaled once a score exceeds the maximum by more than this

// head_dim, padded for dot products over it; below, padded to whole vectors.
template <typename X>
int64_t padded_depth(int64_t dim) {
  return round_up(dim, AMX<X> ? 32 : PAIR<X>);
}
inline int64_t padded_width(int64_t dim) { return round_up(dim, LANES); }

template <typename X>
struct PackedHead {  // one KV head, laid out in lanes
  X* k;              // (positions / LANES, padded_depth / PAIR, LANES, PAIR)
  X* v;              // (positions / PAIR, padded_width / LANES, LANES, PAIR)
};

// One dword in each lane: an element of a in float32, or an element of a and one of b in bfloat16.
template <typename X, typename T>
inline u32 paired(const T* a, const T* b, int64_t n) {
  const u32 first = (u32)load_first(a, n);
  return sizeof(X) == 4 ? first : first >> 16 | (u32)load_first(b, n);
}

// Packs a block of KEY_BLOCK positions. Positions from n on become zeros.
template <typename T, typename X>
void pack_block(const T* k, const T* v, int64_t n, int64_t dim, PackedHead<X> to) {
  const int64_t wide = padded_width(dim), all = padded_depth<X>(dim) / PAIR<X>;
  for (int64_t s = 0; s < KEY_BLOCK; s += LANES)
    for (int64_t i = 0; i < all; i += LANES) {
      u32 rows[LANES];
      for (int r = 0; r < LANES; r++)
        rows[r] = s + r < n ? dwords<X>(k + (s + r) * dim + i * PAIR<X>, dim - i * PAIR<X>) : u32{};
      transpose(rows);
      for (int64_t r = 0; r < LANES && i + r < all; r++)
        std::memcpy(to.k + (s / LANES * all + i + r) * LANES * PAIR<X>, &rows[r], sizeof(u32));
    }
  Array<T> zero_row(wide);
  std::memset(zero_row.data, 0, wide * sizeof(T));
  auto row = [&](int64_t s) { return s < n ? v + s * dim : zero_row.data; };
  for (int64_t s = 0; s < KEY_BLOCK; s += PAIR<X>)
    for (int64_t i = 0; i < wide; i += LANES) {
      u32 both = paired<X>(row(s) + i, row(s + PAIR<X> - 1) + i, dim - i);
      std::memcpy(to.v + s * wide + i * PAIR<X>, &both, sizeof both);
    }
}

// Packs a block of the cache, n positions from element `at` on.
template <typename T, typename X>
void pack_block(const Attention& a, int64_t at, int64_t n, PackedHead<X> to) {
  const int64_t dim = a.head_dim;
  if (!a.codes) return pack_block((const T*)a.k_cache + at, (const T*)a.v_cache + at, n, dim, to);
  Array<X> floats(2 * KEY_BLOCK * dim);
  auto unpack = [&](const void* cache, X* out) {
    for (int64_t s = 0; s < min(n, KEY_BLOCK); s++) {
      const int8_t* codes = (const int8_t*)cache + at + s * a.cache_row;
      const float scale = load_scale(codes, dim);
      for (int64_t i = 0; i < dim; i += LANES)
        store_first(out + s * dim + i, load_first(codes + i, dim - i) * scale, dim - i);
    }
    return (const X*)out;
  };
  const X* k = unpack(a.k_cache, floats);
  pack_block(k, unpack(a.v_cache, floats + KEY_BLOCK * dim), n, dim, to);
}

// Attention of `count` queries (count, padded_depth) of one head, at positions from `position` on, into
// out[q * out_next ...].
template <typename T, typename X>
void attend_queries(const X* queries, int64_t count, int64_t position, const Attention& a, PackedHead<X> packed, T* out,
                    int64_t out_next) {
  const int64_t dim = a.head_dim, window = a.window;
  const int64_t wide = padded_width(dim), depth = padded_depth<X>(dim), vectors = wide / LANES;
  Array<float> scores(QUERY_TILE<T> * KEY_BLOCK), acc(QUERY_TILE<T> * wide);
  Array<X> weights(QUERY_TILE<T> * KEY_BLOCK);
  float most[QUERY_TILE<T>], total[QUERY_TILE<T>];
  for (int64_t i = 0; i < QUERY_TILE<T> * wide; i++) acc[i] = 0;
  for (int64_t q = 0; q < count; q++) most[q] = NO_SCORE, total[q] = 0;
  for (int64_t s = first_seen(a, position) / KEY_BLOCK * KEY_BLOCK; s < position + count; s += KEY_BLOCK) {
    for (int64_t l = 0; l < KEY_BLOCK; l += MOST_VECTORS * LANES)
      microkernel<MOST_VECTORS, false>(packed.k + (s + l) * depth, LANES * depth, LANES * PAIR<X>, queries, depth,
                                       count, depth, scores + l, KEY_BLOCK);
    for (int64_t q = 0; q < count; q++) {
      float* row = scores + q * KEY_BLOCK;
      const int64_t last = position + q - s, first = window > 0 ? last - window + 1 : 0;  // in this block
      f32 top = splat(NO_SCORE), v[KEY_BLOCK / LANES], all = {};
      for (int l = 0; l < KEY_BLOCK / LANES; l++) {
        v[l] = load(row + l * LANES) * a.scale;
        if (a.softcap > 0) v[l] = capped(v[l], a.softcap);
        if (last < (l + 1) * LANES - 1 || first > l * LANES) {
          const i32 lane = lane_numbers() + l * LANES;
          v[l] = (lane > (int32_t)last) | (lane < (int32_t)first) ? splat(MASKED) : v[l];
        }
        top = max(v[l], top);
      }
      const float now = largest(top);
      if (now > most[q] + SCORE_SLACK) {  // rare after the first block; e^SCORE_SLACK is still small
        const float before = exp(splat(most[q] - now))[0];
        total[q] *= before;
        for (int64_t i = 0; i < wide; i += LANES) store(acc + q * wide + i, load(acc + q * wide + i) * before);
        most[q] = now;
      }
      for (int l = 0; l < KEY_BLOCK / LANES; l++) {
        f32 p = exp(v[l] - most[q]);
        all += p;
        store(weights + q * KEY_BLOCK + l * LANES, p);
      }
      total[q] += sum(all);
    }
    int64_t at = 0;
    auto add_values = [&]<int L>() {
      for (; at + L <= vectors; at += L)
        microkernel<L, true>(packed.v + s * wide + at * LANES * PAIR<X>, LANES * PAIR<X>, wide * PAIR<X>,
                             (const X*)weights.data, KEY_BLOCK, count, KEY_BLOCK, acc + at * LANES, wide);
    };
    add_values.template operator()<MOST_VECTORS>();
    add_values.template operator()<1>();
  }
  for (int64_t q = 0; q < count; q++)
    for (int64_t i = 0; i < dim; i += LANES)
      store_first(out + q * out_next + i, load(acc + q * wide + i) / total[q], dim - i);
}

// out (length, heads, head_dim): attention of all queries; rows are `pitch` elements apart.
template <typename T>
void attend_prefill(const T* qkv, int64_t width, const Attention& a, T* out, int64_t pitch, Pool pool) {
  using X = Operand<T>;
  const int64_t dim = a.head_dim, depth = padded_depth<X>(dim), group = a.heads / a.kv_heads, wide = padded_width(dim);
  const int64_t start = a.positions[0], seen = start + a.length, blocks = (seen + KEY_BLOCK - 1) / KEY_BLOCK;
  Array<X> queries((a.heads * a.length + QUERY_TILE<T>)*depth), keys(a.kv_heads * blocks * KEY_BLOCK * depth);
  Array<X> values(a.kv_heads * blocks * KEY_BLOCK * wide);
  parallel(pool, a.length, [&](int64_t first, int64_t last) {
    Array<float> head(round_up(depth, LANES));
    for (int64_t i = 0; i < depth; i++) head[i] = 0;
    for (int64_t t = first; t < last; t++) {
      const T* row = qkv + t * width;
      const float *cos = angles(a.cos, a, t), *sin = angles(a.sin, a, t);
      for (int64_t h = 0; h < a.heads; h++) {
        prepare_head<T>(row + h * dim, a.q, cos, sin, a.pairs, dim, head);
        copy_row((const float*)head, depth, queries + (h * a.length + t) * depth);
      }
      append<T>(a, row, 0, start + t, cos, sin, head);
    }
  });
  auto packed = [&](int64_t h) {
    return PackedHead<X>{keys + h * blocks * KEY_BLOCK * depth, values + h * blocks * KEY_BLOCK * wide};
  };
  const int64_t begin = first_seen(a, start) / KEY_BLOCK, read = blocks - begin;  // the blocks that a query sees
  parallel(pool, a.kv_heads * read, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t h = i / read, from = (begin + i % read) * KEY_BLOCK, at = cache_at(a, 0, h, from);
      const PackedHead<X> to = packed(h);
      pack_block<T>(a, at, seen - from, PackedHead<X>{to.k + from * depth, to.v + from * wide});
    }
  });
  const int64_t turns = (a.length + QUERY_TILE<T> - 1) / QUERY_TILE<T>;
  int64_t next = 0;
  parallel(pool, a.heads * turns, [&](int64_t, int64_t) {
    [[maybe_unused]] const AmxRegisters tiles;
    for (;;) {  // the longest first; a thread that is free takes the next
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= a.heads * turns) return;
      const int64_t h = i % a.heads, t = (turns - 1 - i / a.heads) * QUERY_TILE<T>;
      const int64_t count = min(a.length - t, QUERY_TILE<T>);
      attend_queries<T>(queries + (h * a.length + t) * depth, count, start + t, a, packed(h / group),
                        out + t * pitch + h * dim, pitch);
    }
  });
}

}  // namespace ISA
