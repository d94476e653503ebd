// The arithmetic in one form: compiled once for each instruction set, with FORM the name of its namespace.

#include "many.h"
#include "quantize.h"

namespace FORM {

// The floats of x (batch, n), normed where there is a norm.
template <typename T>
void normed(const void* x, const Norm& norm, int64_t batch, int64_t n, float* out) {
  for (int64_t b = 0; b < batch; b++)
    if (norm.gain != nullptr)
      rms_norm<T>((const T*)x + b * n, norm, n, out + b * n);
    else
      copy_row((const T*)x + b * n, n, out + b * n);
}

// out (batch, stride) = x times the matrix
template <typename T>
void multiply(const Matrix& m, const Input& in, float* out, int64_t stride, Team team) {
  parallel(team, tiles(m), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const Tiles registers(in.columns);
    Array<float> y(in.batch * TILE);
    for (int64_t t = first; t < last; t++) {
      tile<T>(m, t, in, y);
      for (int64_t b = 0; b < in.batch; b++) copy_row(y + b * TILE, tile_rows(m, t), out + b * stride + t * TILE);
    }
  });
}

// out (batch, rows) = x + y times the matrix
template <typename T>
void multiply_add(const Matrix& m, const float* y, int64_t batch, const T* x, T* out, Team team) {
  Input in;
  ready(in, m, y, batch);
  parallel(team, tiles(m), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const Tiles registers(in.columns);
    Array<float> part(batch * TILE);
    for (int64_t t = first; t < last; t++) {
      tile<T>(m, t, in, part);
      for (int64_t b = 0; b < batch; b++)
        for (int i = 0, n = tile_rows(m, t); i < n; i += LANES) {
          const int64_t at = b * m.rows + t * TILE + i;
          store_first(out + at, load_first(x + at, n - i) + load(part + b * TILE + i), n - i);
        }
    }
  });
}

// Lets threads that have nothing to do ask for the matrix that comes next, in equal parts.
template <typename T>
void expect(Team team, const Matrix& m, int parts = 1) {
  const Matrix part = rows_of<T>(m, m.rows / parts / TILE * TILE, 0);
  team.expect(team.self, m.data, (const char*)part.data - (const char*)m.data, parts);
}

template <typename T>
void attention_step_of(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o,
                       const Matrix& next, void* out, Team team) {
  Array<float> rows(a.batch * qkv.columns), projected(a.batch * qkv.rows), y(a.batch * o.columns);
  normed<T>(x, norm, a.batch, qkv.columns, rows);
  Input in;
  ready(in, qkv, rows, a.batch);
  expect<T>(team, o);
  multiply<T>(qkv, in, projected, qkv.rows, team);
  attend_rows<T>(a, projected, qkv.rows, y, team);
  expect<T>(team, next, 2);
  multiply_add<T>(o, y, a.batch, (const T*)x, (T*)out, team);
}

template <typename T>
void feed_forward_step_of(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                          const Matrix* next, int64_t batch, void* out, Team team) {
  const int64_t dim = gate_up.columns, hidden = down.columns;
  Array<float> rows(batch * dim), y(batch * hidden);
  normed<T>(x, norm, batch, dim, rows);
  Input in;
  ready(in, gate_up, rows, batch);
  const Matrix gate = rows_of<T>(gate_up, 0, hidden), up = rows_of<T>(gate_up, up_at, hidden);
  expect<T>(team, down);
  parallel(team, tiles(gate), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const Tiles registers(in.columns);
    Array<float> g(batch * TILE), u(batch * TILE);
    for (int64_t t = first; t < last; t++) {
      tile<T>(gate, t, in, g);
      tile<T>(up, t, in, u);
      for (int64_t b = 0; b < batch; b++)
        for (int i = 0, n = tile_rows(gate, t); i < n; i += LANES) {
          f32 v = silu(load(g + b * TILE + i)) * load(u + b * TILE + i);
          store_first(y + b * hidden + t * TILE + i, v, n - i);
        }
    }
  });
  if (next != nullptr) expect<T>(team, *next);
  multiply_add<T>(down, y, batch, (const T*)x, (T*)out, team);
}

template <typename T>
void project_of(const void* x, const Matrix& m, int64_t batch, float* out, Team team) {
  Array<float> rows(batch * m.columns);
  normed<T>(x, Norm{}, batch, m.columns, rows);
  Input in;
  ready(in, m, rows, batch);
  multiply<T>(m, in, out, m.rows, team);
}

template <typename T>
void rms_norm_of(const void* x, const Norm& norm, int64_t count, int64_t n, void* out, Team team) {
  parallel(team, count, [&](int64_t first, int64_t last) {
    Array<float> row(n);
    for (int64_t i = first; i < last; i++) {
      rms_norm<T>((const T*)x + i * n, norm, n, row);
      copy_row((const float*)row, n, (T*)out + i * n);
    }
  });
}

template <typename T>
void rows_of_codes(const Matrix& m, const int64_t* at, int64_t n, void* out, Team team) {
  const bool four = m.kind == Kind::INT4;
  const int64_t steps = (m.columns + STEP - 1) / STEP, bytes = four ? 256 : 512;
  parallel(team, n, [&](int64_t first, int64_t last) {
    Array<float> row(steps * STEP);
    for (int64_t i = first; i < last; i++) {
      for (int64_t s = 0; s < steps; s++) {
        const int64_t step = at[i] / TILE * steps + s, lane = at[i] % TILE;
        const uint8_t* codes = (const uint8_t*)m.data + step * bytes + 4 * lane;
        const float scale = _cvtsh_ss(m.scale[step * TILE + lane]);
        const float least = four ? _cvtsh_ss(m.least[step * TILE + lane]) : -128 * scale;
        for (int c = 0; c < STEP; c++) {
          const uint8_t code = codes[(four ? c / 8 : c / 4) * 64 + c % 4];
          row[s * STEP + c] = scale * (four ? (c / 4 % 2 ? code >> 4 : code & 15) : code) + least;
        }
      }
      copy_row((const float*)row, m.columns, (T*)out + i * m.columns);
    }
  });
}

void attention_step(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o,
                    const Matrix& next, void* out, Team team) {
  (a.wide ? attention_step_of<float> : attention_step_of<bf16>)(x, norm, qkv, a, o, next, out, team);
}
void feed_forward_step(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                       const Matrix* next, bool wide, int64_t batch, void* out, Team team) {
  (wide ? feed_forward_step_of<float> : feed_forward_step_of<bf16>)(x, norm, gate_up, up_at, down, next, batch, out, team);
}
void attention_many(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o, void* out,
                    Team team) {
  (a.wide ? attention_many_of<float> : attention_many_of<bf16>)(x, norm, qkv, a, o, out, team);
}
void feed_forward_many(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                       bool wide, int64_t count, void* out, Team team) {
  (wide ? feed_forward_many_of<float> : feed_forward_many_of<bf16>)(x, norm, gate_up, up_at, down, count, out, team);
}
void product(const void* x, const Matrix& m, bool wide, int64_t count, void* out, Team team) {
  if (wide)
    product_of<float>(tokens_of((const float*)x, Norm{}, m.columns, team), m, count, nullptr, (float*)out, team);
  else
    product_of<bf16>(tokens_of((const bf16*)x, Norm{}, m.columns, team), m, count, nullptr, (bf16*)out, team);
}
void rows(const Matrix& m, const int64_t* at, bool wide, int64_t n, void* out, Team team) {
  (wide ? rows_of_codes<float> : rows_of_codes<bf16>)(m, at, n, out, team);
}
void rms_norm(const void* x, const Norm& norm, bool wide, int64_t count, int64_t n, void* out, Team team) {
  (wide ? rms_norm_of<float> : rms_norm_of<bf16>)(x, norm, count, n, out, team);
}
bool quantize(const void* x, bool wide, int64_t n, const Matrix& m, Team team) {
  const bool four = m.kind == Kind::INT4;
  if (wide) return (four ? quantize_rows<float, true> : quantize_rows<float, false>)((const float*)x, n, m, team);
  return (four ? quantize_rows<bf16, true> : quantize_rows<bf16, false>)((const bf16*)x, n, m, team);
}
void project(const void* x, const Matrix& m, bool wide, int64_t batch, void* out, Team team) {
  (wide ? project_of<float> : project_of<bf16>)(x, m, batch, (float*)out, team);
}

}  // namespace FORM

#define JOIN(a, b) a##b
#define NAME(form) JOIN(form_, form)
const Form NAME(FORM) = {FORM::attention_step, FORM::feed_forward_step, FORM::attention_many, FORM::feed_forward_many,
                         FORM::project,        FORM::product,           FORM::rms_norm,       FORM::rows,              FORM::quantize,
                         FORM::repack};
