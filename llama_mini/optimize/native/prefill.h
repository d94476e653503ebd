// The branches of a layer for prefill: many tokens of one row.
#pragma once

#include "gemm_int.h"
#include "flash_attention.h"

namespace ISA {

constexpr int64_t TOKENS_AT_ONCE = 768;  // few enough that the activations between two matrices stay in the cache

// A function that writes one token's row of x, normalized if there is a norm.
template <typename T>
auto row_of(const T* x, int64_t pitch, const Norm& norm, int64_t dim) {
  return [=](int64_t token, float* to) { norm_row<T>(x + token * pitch, norm, dim, to); };
}

template <typename T, typename F>
void pack(QuantizedTokens& in, int64_t columns, int64_t count, const F& row, Pool pool) {
  in.count = count, in.groups = groups_of(columns);
  const int64_t tiles = token_tiles(count), all = tiles * in.groups * TILE_TOKENS;
  in.first.resize(all * QUADS), in.second.resize(all * QUADS), in.sixteen_bits.resize(tiles * in.groups);
  in.scales.resize(all), in.total.resize(all * in.codes.scales), in.start.resize(all * in.codes.scales);
  parallel(pool, tiles, [&](int64_t first, int64_t last) { quantize_tiles<T>(in, columns, first, last, row); });
}

template <typename T>
void pack_stored(QuantizedTokens& in, const PaddedRows<T>& lines, int64_t columns, int64_t from, int64_t count,
                 Pool pool) {
  pack<T>(in, columns, count, row_of((const T*)lines[from], lines.pitch, Norm{}, columns), pool);
}

// Calls f with empty storage for tokens: QuantizedTokens for a quantized matrix, unless AMX multiplies bfloat16 faster.
template <typename T, typename F>
void with_tokens(const Matrix& m, const F& f) {
  if (!quantized(m.kind) || AMX<T>) {
    FloatTokens<T> in;
    f(in);
  } else {
    QuantizedTokens in{codes_of(m.kind)};
    f(in);
  }
}

// out (count, stride) = tokens times the matrix, plus x unless it is nullptr.
template <typename In, typename T>
void multiply_tokens(const Matrix& m, const In& in, const T* x, T* out, int64_t stride, Pool pool) {
  constexpr int STRIPS = In::STRIPS;
  auto strip = [&](int64_t panel, int i) { return Strip{&m, (STRIPS * panel + i) * LANES}; };
  auto done = [&](int64_t panel, int64_t token, int64_t n, const float* y) {
    for (int i = 0; i < STRIPS; i++) {
      const int64_t row = (STRIPS * panel + i) * LANES;
      const int64_t rows = m.rows - row;
      if (rows <= 0) continue;
      const f32 bias = m.bias != nullptr ? load_first((const T*)m.bias + row, rows) : f32{};
      for (int64_t b = 0; b < n; b++) {
        const int64_t at = (token + b) * stride + row;
        f32 v = load(y + (STRIPS * b + i) * LANES) + bias;
        if (x != nullptr) v += load_first(x + at, rows);
        store_first(out + at, v, rows);
      }
    }
  };
  times_tokens((m.rows + STRIPS * LANES - 1) / (STRIPS * LANES), strip, in, pool, done);
}

// out (count, stride) = tokens times the matrix, plus `add` unless it is nullptr; `tokens(in, first, n)` packs them.
template <typename T, typename F>
void gemm_tokens(const F& tokens, const Matrix& m, int64_t count, const T* add, T* out, int64_t stride, Pool pool) {
  with_tokens<T>(m, [&](auto& in) {
    for (int64_t from = 0; from < count; from += TOKENS_AT_ONCE) {
      tokens(in, from, min(count - from, TOKENS_AT_ONCE));
      multiply_tokens(m, in, add == nullptr ? nullptr : add + from * stride, out + from * stride, stride, pool);
    }
  });
}

// Packs the rows of x (count, dim), normalized if there is a norm.
template <typename T>
auto tokens_of(const T* x, const Norm& norm, int64_t dim, Pool pool) {
  return [=](auto& in, int64_t from, int64_t n) { pack<T>(in, dim, n, row_of(x + from * dim, dim, norm, dim), pool); };
}

template <typename T>
auto tokens_of(const PaddedRows<T>& lines, int64_t columns, Pool pool) {
  return [&lines, columns, pool](auto& in, int64_t from, int64_t n) { pack_stored(in, lines, columns, from, n, pool); };
}

// The same plus x (count, m.rows), as `sum` says.
template <typename T, typename F>
void gemm_add(const F& tokens, const Matrix& m, int64_t count, const T* x, const Sum& sum, T* out, Pool pool) {
  if (is_plain(sum)) return gemm_tokens<T>(tokens, m, count, x, out, m.rows, pool);
  const int64_t n = m.rows;
  Array<T> y(count * n);
  gemm_tokens<T>(tokens, m, count, nullptr, (T*)y, n, pool);
  parallel(pool, count, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) add_row(x + t * n, (const T*)y + t * n, sum, n, out + t * n);
  });
}

template <typename T>
void prefill_attention(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o,
                       const Sum& sum, void* out, Pool pool) {
  Array<T> projected(a.length * a.width);
  PaddedRows<T> y(a.length, o.columns);
  T* at = projected;
  for (const Matrix* part = &qkv; part != nullptr; at += round_up(part->rows, BLOCK_ROWS), part = part->rest)
    gemm_tokens<T>(tokens_of((const T*)x, norm, qkv.columns, pool), *part, a.length, nullptr, at, a.width, pool);
  auto each = [&](int64_t rows, const auto& f) { parallel(pool, rows, f); };
  const Attention heads = norm_whole<T>(a, projected.data, a.width, a.length, each);
  attend_prefill<T>(projected, a.width, heads, y.at, y.pitch, pool);
  gemm_add<T>(tokens_of(y, o.columns, pool), o, a.length, (const T*)x, sum, (T*)out, pool);
}

template <typename T>
void prefill_feed_forward(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, Activation act,
                          const Matrix& down, const Sum& sum, int64_t count, void* out, Pool pool) {
  const int64_t dim = gate_up.columns, hidden = down.columns;
  const Matrix gate = slice_rows<T>(gate_up, 0, hidden), up = slice_rows<T>(gate_up, up_at, hidden);
  PaddedRows<T> y(min(count, TOKENS_AT_ONCE), hidden);
  with_tokens<T>(gate, [&]<typename In>(In& in) {
    constexpr int STRIPS = In::STRIPS, PAIRS = STRIPS / 2;
    auto strip = [&](int64_t panel, int i) { return Strip{i % 2 == 0 ? &gate : &up, (panel * PAIRS + i / 2) * LANES}; };
    for (int64_t from = 0; from < count; from += TOKENS_AT_ONCE) {
      const int64_t n = min(count - from, TOKENS_AT_ONCE);
      const T* rows = (const T*)x + from * dim;
      tokens_of(rows, norm, dim, pool)(in, 0, n);
      times_tokens((hidden + PAIRS * LANES - 1) / (PAIRS * LANES), strip, in, pool,
                   [&](int64_t panel, int64_t token, int64_t k, const float* v) {
                     for (int i = 0; i < PAIRS; i++) {
                       const int64_t column = (panel * PAIRS + i) * LANES;
                       const int64_t remaining = hidden - column;
                       if (remaining <= 0) continue;
                       auto bias = [&](const Matrix& m) {
                         return m.bias == nullptr ? f32{} : load_first((const T*)m.bias + column, remaining);
                       };
                       const f32 of_gate = bias(gate), of_up = bias(up);
                       for (int64_t b = 0; b < k; b++) {
                         const float* sums = v + (STRIPS * b + 2 * i) * LANES;
                         const f32 gated = activated(act, load(sums) + of_gate);
                         store_first(y[token + b] + column, gated * (load(sums + LANES) + of_up), remaining);
                       }
                     }
                   });
      gemm_add<T>(tokens_of(y, hidden, pool), down, n, rows, sum, (T*)out + from * dim, pool);
    }
  });
}

}  // namespace ISA
