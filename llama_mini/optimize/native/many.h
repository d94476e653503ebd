// The branches of a layer for the many tokens of a prompt, with matrices of codes.
#pragma once

#include "panels.h"
#include "prefill.h"

namespace FORM {

constexpr int64_t MANY = 768;  // tokens taken together: what stands between two matrices stays in the cache

// Writes one token's row of x, normed where there is a norm.
template <typename T>
auto row_of(const T* x, const Norm& norm, int64_t dim) {
  return [=](int64_t token, float* to) {
    if (norm.gain != nullptr)
      rms_norm<T>(x + token * dim, norm, dim, to);
    else
      copy_row(x + token * dim, dim, to);
  };
}

// Makes ready the `count` tokens whose rows `row` writes.
template <typename T, typename F>
void ready(Tokens& in, int64_t columns, int64_t count, const F& row, Team team) {
  in.count = count, in.steps = (columns + STEP - 1) / STEP;
  const int64_t tiles = tiles_of(count), all = tiles * in.steps * TOKENS;
  in.first.resize(all * QUADS), in.second.resize(all * QUADS), in.fine.resize(tiles * in.steps);
  in.scale.resize(all), in.total.resize(all), in.start.resize(all);
  parallel(team, tiles, [&](int64_t first, int64_t last) { pack_tiles<T>(in, columns, first, last, row); });
}

// out (count, m.rows) = the tokens times the matrix, and x where there is one
template <typename T>
void multiply_tokens(const Matrix& m, const Tokens& in, const T* x, T* out, Team team) {
  auto strip = [&](int64_t panel, int i) { return Strip{&m, (2 * panel + i) * LANES}; };
  times_tokens((m.rows + PANEL - 1) / PANEL, strip, in, team, [&](int64_t p, int64_t token, int64_t n, const float* y) {
    for (int i = 0; i < 2; i++) {
      const int64_t row = (2 * p + i) * LANES;
      const int rows = (int)(m.rows - row);
      if (rows <= 0) continue;
      const f32 bias = m.bias != nullptr ? load_first((const T*)m.bias + row, rows) : f32{};
      for (int64_t b = 0; b < n; b++) {
        const int64_t at = (token + b) * m.rows + row;
        f32 v = load(y + (2 * b + i) * LANES) + bias;
        if (x != nullptr) v += load_first(x + at, rows);
        store_first(out + at, v, rows);
      }
    }
  });
}

// out (count, m.rows) = x (count, m.columns), normed where there is a norm, times the matrix, and `add` where there is one
template <typename T>
void product_of(const T* x, const Norm& norm, const Matrix& m, int64_t count, const T* add, T* out, Team team) {
  Tokens in;
  for (int64_t from = 0; from < count; from += MANY) {
    const int64_t n = count - from < MANY ? count - from : MANY;
    ready<T>(in, m.columns, n, row_of(x + from * m.columns, norm, m.columns), team);
    multiply_tokens(m, in, add == nullptr ? nullptr : add + from * m.rows, out + from * m.rows, team);
  }
}

template <typename T>
void attention_many_of(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o, void* out,
                       Team team) {
  Array<T> projected(a.length * qkv.rows), y(a.length * o.columns);
  product_of<T>((const T*)x, norm, qkv, a.length, nullptr, projected, team);
  attend_of<T>(projected, qkv.rows, a, y, team);
  product_of<T>(y, Norm{}, o, a.length, (const T*)x, (T*)out, team);
}

template <typename T>
void feed_forward_many_of(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                          int64_t count, void* out, Team team) {
  const int64_t dim = gate_up.columns, hidden = down.columns;
  const Matrix gate = rows_of<T>(gate_up, 0, hidden), up = rows_of<T>(gate_up, up_at, hidden);
  const int64_t panels = (hidden + LANES - 1) / LANES, most = count < MANY ? count : MANY;
  Tokens in;
  Array<T> y(tiles_of(most) * TOKENS * panels * LANES);  // by tile and panel, so that whole lines of the cache are written
  auto at = [&](int64_t token, int64_t p) {
    return y + ((token / TOKENS * panels + p) * TOKENS + token % TOKENS) * LANES;
  };
  for (int64_t from = 0; from < count; from += MANY) {
    const int64_t n = count - from < MANY ? count - from : MANY;
    const T* rows = (const T*)x + from * dim;
    ready<T>(in, dim, n, row_of(rows, norm, dim), team);
    auto strip = [&](int64_t panel, int i) { return Strip{i == 0 ? &gate : &up, panel * LANES}; };
    times_tokens(panels, strip, in, team, [&](int64_t p, int64_t token, int64_t k, const float* v) {
      auto bias = [&](const Matrix& m) {
        return m.bias == nullptr ? f32{} : load_first((const T*)m.bias + p * LANES, (int)(hidden - p * LANES));
      };
      const f32 of_gate = bias(gate), of_up = bias(up);
      for (int64_t b = 0; b < k; b++)
        store(at(token + b, p), silu(load(v + 2 * b * LANES) + of_gate) * (load(v + (2 * b + 1) * LANES) + of_up));
    });
    auto row = [&](int64_t token, float* to) {
      for (int64_t p = 0; p < panels; p++) store_first(to + p * LANES, load(at(token, p)), (int)(hidden - p * LANES));
    };
    ready<T>(in, hidden, n, row, team);
    multiply_tokens(down, in, rows, (T*)out + from * dim, team);
  }
}

}  // namespace FORM
