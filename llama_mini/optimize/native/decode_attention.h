// Attention for decoding: each token attends to its own row's positions of the cache, up to its own. Several tokens may
// be of one row: all keys and values are written first. Query heads that share a KV head read each key and value once.
//
// Positions are split into chunks, counted from position 0. Any thread may compute a chunk, but the results are added
// in the order of the chunks, so the bits of a token depend on its own position alone.
#pragma once

#include "norm.h"

namespace ISA {

constexpr int64_t CHUNK = PAGE_MULTIPLE;             // positions
constexpr float MASKED = -3e38f, NO_SCORE = -1e30f;  // the score of a masked position; the initial maximum
constexpr float LEAST_PEAK = 1e-30f;                 // below it all codes are zero

// Applies RoPE to the pairs (i, i + half) of a head.
inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t n = half - i;
    f32 a = load_first(head + i, n), b = load_first(head + half + i, n);
    f32 c = load_first(cos + i, n), s = load_first(sin + i, n);
    store_first(head + i, a * c - b * s, n);
    store_first(head + half + i, b * c + a * s, n);
  }
}

// Prepares a head of q or k: normalizes it if there is a norm, applies RoPE, rounds to T.
template <typename T, typename X>
inline void prepare_head(const X* from, const Norm& norm, const float* cos, const float* sin, int64_t pairs,
                         int64_t dim, float* to) {
  norm_row<T>(from, norm, dim, to);
  if (cos != nullptr) rotate(to, cos, sin, pairs);
  for (int64_t i = 0; i < dim; i += LANES) store_first(to + i, round_to<T>(load_first(to + i, dim - i)), dim - i);
}

// Where the cache holds a position of row b: an offset in elements, for the keys and for the values.
inline int64_t cache_at(const Attention& a, int64_t b, int64_t h, int64_t position) {
  return a.pages[b * a.row_pages + position / a.page_size] * a.cache_page + h * a.cache_head +
         position % a.page_size * a.cache_row;
}

// The first position that a token at `position` sees. The cache may hold none before it.
inline int64_t first_seen(const Attention& a, int64_t position) {
  return a.window > 0 && position + 1 > a.window ? position + 1 - a.window : 0;
}

// Where the scale of a position's codes is, a float32.
inline float load_scale(const int8_t* codes, int64_t dim) { return load_as<float>(codes + dim); }

// Stores a head's key or value in the cache, as codes or as T.
template <typename T>
inline void store_head(const Attention& a, const float* head, void* cache, int64_t at) {
  const int64_t dim = a.head_dim;
  if (!a.codes) return copy_row(head, dim, (T*)cache + at);
  int8_t* to = (int8_t*)cache + at;
  f32 top = {}, zeros = {};
  for (int64_t i = 0; i < dim; i += LANES) {
    const f32 x = load_first(head + i, dim - i);
    top = max(top, max(x, -x)), zeros += x * 0.f;
  }
  const float peak = largest(top) + sum(zeros);  // NaN if one is not finite
  const float scale = peak / 127, inverse = peak > LEAST_PEAK ? 1 / peak * 127 : 0;
  for (int64_t i = 0; i < dim; i += LANES) {
    int8_t codes[LANES];
    store_bytes(codes, to_nearest(load_first(head + i, dim - i) * inverse));
    std::memcpy(to + i, codes, min(dim - i, LANES));
  }
  std::memcpy(to + dim, &scale, sizeof scale);
}

// The cosines or sines of a token; nullptr if there are none.
inline const float* angles(const float* all, const Attention& a, int64_t token) {
  return all == nullptr ? nullptr : all + token * a.pairs;
}

// Normalizes the queries and keys of rows of q, k and v as far as that is over all heads. What is left: the heads'
// norms.
template <typename T, typename X, typename F>
Attention norm_whole(Attention a, X* rows, int64_t width, int64_t count, const F& each) {
  const int64_t q_dim = a.heads * a.head_dim, k_dim = a.kv_heads * a.head_dim;
  if (a.whole_q || a.whole_k)
    each(count, [&](int64_t first, int64_t last) {
      Array<float> row(q_dim);
      for (int64_t b = first; b < last; b++) {
        X *q = rows + b * width, *k = q + a.k_at;
        if (a.whole_q) rms_norm<T>((const X*)q, a.q, q_dim, row), copy_row((const float*)row, q_dim, q);
        if (a.whole_k) rms_norm<T>((const X*)k, a.k, k_dim, row), copy_row((const float*)row, k_dim, k);
      }
    });
  if (a.whole_q) a.q = Norm{};
  if (a.whole_k) a.k = Norm{};
  return a;
}

// Writes a token's keys, normalized and rotated, and values to the cache. `row` holds its q, k and v.
template <typename T, typename X>
inline void append(const Attention& a, const X* row, int64_t b, int64_t position, const float* cos, const float* sin,
                   float* head) {
  for (int64_t h = 0, dim = a.head_dim; h < a.kv_heads; h++) {
    const int64_t at = cache_at(a, b, h, position);
    prepare_head<T>(row + a.k_at + h * dim, a.k, cos, sin, a.pairs, dim, head);
    store_head<T>(a, head, a.k_cache, at);
    prepare_head<T>(row + a.v_at + h * dim, Norm{}, nullptr, nullptr, 0, dim, head);
    store_head<T>(a, head, a.v_cache, at);
  }
}

// scores[n] -> e^(score - maximum); returns their sum, and the maximum in `most`.
inline float softmax_chunk(float* scores, int64_t n, float scale, float softcap, float& most) {
  if (softcap > 0) {
    for (int64_t i = 0; i < n; i += LANES) store(scores + i, capped(load(scores + i) * scale, softcap));
    scale = 1;
  }
  for (int64_t i = n; i < (n + LANES - 1) / LANES * LANES; i++) scores[i] = MASKED;
  f32 top = splat(NO_SCORE), total = {};
  for (int64_t i = 0; i < n; i += LANES) {
    f32 v = load(scores + i) * scale;
    top = max(v, top);
    store(scores + i, v);
  }
  most = largest(top);
  for (int64_t i = 0; i < n; i += LANES) {
    f32 p = exp(load(scores + i) - most);
    total += p;
    store(scores + i, p);
  }
  return sum(total);
}

// weights[g * CHUNK + s] *= the scale of position s.
inline void times_scales(const int8_t* rows, int64_t n, const Attention& a, float* weights) {
  for (int64_t s = 0; s < n; s++) {
    const float scale = load_scale(rows + s * a.cache_row, a.head_dim);
    for (int64_t g = 0; g < a.heads / a.kv_heads; g++) weights[g * CHUNK + s] *= scale;
  }
}
template <typename T>
inline void times_scales(const T*, int64_t, const Attention&, float*) {}

// out[g * stride ...] = the sum over n positions s of weights[g * CHUNK + s] * v[s], for V vectors of columns from
// column `at` on; positions are `pitch` apart. WHOLE: all these columns lie within the head.
template <int G, int V, bool WHOLE, typename T>
inline void weighted_values(const float* weights, const T* v, int64_t n, int64_t dim, int64_t pitch, int64_t at,
                            float* out, int64_t stride) {
  f32 acc[G][V] = {};
  for (int64_t s = 0; s < n; s++)
    for (int i = 0; i < V; i++) {
      const T* from = v + s * pitch + at + i * LANES;
      const f32 x = WHOLE ? load(from) : load_first(from, dim - at);
      for (int g = 0; g < G; g++) acc[g][i] += weights[g * CHUNK + s] * x;
    }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) store(out + g * stride + at + i * LANES, acc[g][i]);
}

template <int G, typename T>
inline void weighted_values(const float* weights, const T* v, int64_t n, int64_t dim, int64_t pitch, float* out,
                            int64_t stride) {
  int64_t at = 0;
  constexpr int V = MANY_REGISTERS ? 4 : 2;  // so many that the G sums of each stay in registers
  for (; at + V * LANES <= dim; at += V * LANES)
    weighted_values<G, V, true>(weights, v, n, dim, pitch, at, out, stride);
  for (; at < dim; at += LANES) weighted_values<G, 1, false>(weights, v, n, dim, pitch, at, out, stride);
}

// Computes one chunk of one KV head of one token. `part` holds, for its query heads, the sums of the weights, the
// maxima, and the weighted values (group, stride). The cache holds C: T, or codes.
template <typename T, typename C>
void attend_chunk(const Attention& a, const float* qkv, int64_t width, int64_t b, int64_t h, int64_t chunk,
                  float* part) {
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, stride = (dim + LANES - 1) / LANES * LANES;
  const int64_t seen = a.positions[b] + 1;
  const int64_t from = max(chunk * CHUNK, first_seen(a, a.positions[b])), to = min((chunk + 1) * CHUNK, seen);
  const float *row = qkv + b * width, *cos = angles(a.cos, a, b), *sin = angles(a.sin, a, b);
  const int64_t at = cache_at(a, b, h, from);
  const C *k = (const C*)a.k_cache + at, *v = (const C*)a.v_cache + at;
  Array<float> heads(group * dim), scores(group * CHUNK);
  for (int64_t g = 0; g < group; g++)
    prepare_head<T>(row + (h * group + g) * dim, a.q, cos, sin, a.pairs, dim, heads + g * dim);
  Input in;
  pack<T>(in, sizeof(C) == 2 ? Kind::BFLOAT16 : Kind::FLOAT32, heads, group, dim);
  const int64_t n = to - from, pitch = a.cache_row;
  dots(k, n, dim, pitch, in, scores, CHUNK, (const char*)v - (const char*)k);
  times_scales(k, n, a, scores);
  float* out = part + 2 * group;
  for (int64_t g = 0; g < group; g++)
    part[g] = softmax_chunk(scores + g * CHUNK, n, a.scale, a.softcap, part[group + g]);
  times_scales(v, n, a, scores);
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) weighted_values<4>(scores + g * CHUNK, v, n, dim, pitch, out + g * stride, stride);
  for (; g + 3 <= group; g += 3) weighted_values<3>(scores + g * CHUNK, v, n, dim, pitch, out + g * stride, stride);
  for (; g < group; g++) weighted_values<1>(scores + g * CHUNK, v, n, dim, pitch, out + g * stride, stride);
}

// out (batch, heads * head_dim): attention of all tokens.
template <typename T>
void attend_decode(const Attention& a, const float* qkv, int64_t width, float* out, Pool pool) {
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, stride = (dim + LANES - 1) / LANES * LANES;
  const int64_t size = group * (stride + 2), pairs = a.batch * a.kv_heads;
  int64_t chunks = 1;
  for (int64_t b = 0; b < a.batch; b++) chunks = max(chunks, a.positions[b] / CHUNK + 1);
  Array<float> parts(pairs * chunks * size);
  each_row(&pool, a.batch, [&](int64_t first, int64_t last) {
    Array<float> head(dim);
    for (int64_t b = first; b < last; b++)
      append<T>(a, qkv + b * width, b, a.positions[b], angles(a.cos, a, b), angles(a.sin, a, b), head);
  });
  auto first_chunk = [&](int64_t b) { return first_seen(a, a.positions[b]) / CHUNK; };
  int64_t next = 0;
  parallel(pool, pairs * chunks, [&](int64_t, int64_t) {
    for (;;) {  // tokens differ in position, so a thread that is free takes the next chunk
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= pairs * chunks) return;
      const int64_t pair = i / chunks, chunk = i % chunks, b = pair / a.kv_heads;
      if (chunk < first_chunk(b) || chunk > a.positions[b] / CHUNK) continue;
      const auto attend = a.codes ? attend_chunk<T, int8_t> : attend_chunk<T, T>;
      attend(a, qkv, width, b, pair % a.kv_heads, chunk, parts + i * size);
    }
  });
  each_row(&pool, pairs, [&](int64_t first, int64_t last) {
    Array<float> acc(stride);
    for (int64_t pair = first; pair < last; pair++)
      for (int64_t g = 0; g < group; g++) {
        const int64_t b = pair / a.kv_heads, begin = first_chunk(b), end = a.positions[b] / CHUNK + 1;
        const float* part = parts + pair * chunks * size;
        float most = NO_SCORE, total = 0;
        for (int64_t c = begin; c < end; c++)
          most = part[c * size + group + g] > most ? part[c * size + group + g] : most;
        for (int64_t i = 0; i < stride; i++) acc[i] = 0;
        for (int64_t c = begin; c < end; c++) {
          const float share = exp(splat(part[c * size + group + g] - most))[0];
          total += share * part[c * size + g];
          for (int64_t i = 0; i < stride; i += LANES)
            store(acc + i, load(acc + i) + share * load(part + c * size + 2 * group + g * stride + i));
        }
        float* to = out + (b * a.heads + pair % a.kv_heads * group + g) * dim;
        for (int64_t i = 0; i < dim; i += LANES) store_first(to + i, load(acc + i) / total, dim - i);
      }
  });
}

}  // namespace ISA
