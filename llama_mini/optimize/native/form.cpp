// The arithmetic in one form: compiled once for each instruction set, with FORM the name of its namespace.

#include "many.h"

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
  ready(in, m.kind, y, batch, m.columns);
  parallel(team, tiles(m), [&](int64_t first, int64_t last) {
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

template <typename T>
void attention_step_of(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o, void* out,
                       Team team) {
  Array<float> rows(a.batch * qkv.columns), projected(a.batch * qkv.rows), y(a.batch * o.columns);
  normed<T>(x, norm, a.batch, qkv.columns, rows);
  Input in;
  ready(in, qkv.kind, rows, a.batch, qkv.columns);
  multiply<T>(qkv, in, projected, qkv.rows, team);
  attend_rows<T>(a, projected, qkv.rows, y, team);
  multiply_add<T>(o, y, a.batch, (const T*)x, (T*)out, team);
}

template <typename T>
void feed_forward_step_of(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                          int64_t batch, void* out, Team team) {
  const int64_t dim = gate_up.columns, hidden = down.columns;
  Array<float> rows(batch * dim), y(batch * hidden);
  normed<T>(x, norm, batch, dim, rows);
  Input in;
  ready(in, gate_up.kind, rows, batch, dim);
  const Matrix gate = rows_of<T>(gate_up, 0, hidden), up = rows_of<T>(gate_up, up_at, hidden);
  parallel(team, tiles(gate), [&](int64_t first, int64_t last) {
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
  multiply_add<T>(down, y, batch, (const T*)x, (T*)out, team);
}

template <typename T>
void project_of(const void* x, const Matrix& m, int64_t batch, float* out, Team team) {
  Array<float> rows(batch * m.columns);
  normed<T>(x, Norm{}, batch, m.columns, rows);
  Input in;
  ready(in, m.kind, rows, batch, m.columns);
  multiply<T>(m, in, out, m.rows, team);
}

template <typename T>
void norm_of(const void* x, const Norm& norm, int64_t n, int64_t dim, void* out, Team team) {
  parallel(team, n, [&](int64_t first, int64_t last) {
    Array<float> row(dim);
    for (int64_t r = first; r < last; r++) {
      rms_norm<T>((const T*)x + r * dim, norm, dim, row.data);
      copy_row(row.data, dim, (T*)out + r * dim);
    }
  });
}

template <typename T>
void swiglu_of(const void* x, int64_t n, int64_t width, int64_t hidden, int64_t up_at, void* out, Team team) {
  parallel(team, n, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const T *gate = (const T*)x + r * width, *up = gate + up_at;
      for (int64_t i = 0; i < hidden; i += LANES) {
        const int count = (int)(hidden - i);
        store_first((T*)out + r * hidden + i, silu(load_first(gate + i, count)) * load_first(up + i, count), count);
      }
    }
  });
}

void attention_step(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o, void* out,
                    Team team) {
  (a.wide ? attention_step_of<float> : attention_step_of<bf16>)(x, norm, qkv, a, o, out, team);
}
void feed_forward_step(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                       bool wide, int64_t batch, void* out, Team team) {
  (wide ? feed_forward_step_of<float> : feed_forward_step_of<bf16>)(x, norm, gate_up, up_at, down, batch, out, team);
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
    product_of<float>((const float*)x, Norm{}, m, count, nullptr, (float*)out, team);
  else
    product_of<bf16>((const bf16*)x, Norm{}, m, count, nullptr, (bf16*)out, team);
}
void project(const void* x, const Matrix& m, bool wide, int64_t batch, float* out, Team team) {
  (wide ? project_of<float> : project_of<bf16>)(x, m, batch, out, team);
}
void attend(const void* qkv, int64_t width, const Attention& a, void* out, Team team) {
  (a.wide ? attend_of<float> : attend_of<bf16>)(qkv, width, a, out, team);
}
void norm(const void* x, const Norm& norm, bool wide, int64_t n, int64_t dim, void* out, Team team) {
  (wide ? norm_of<float> : norm_of<bf16>)(x, norm, n, dim, out, team);
}
void swiglu(const void* x, bool wide, int64_t n, int64_t width, int64_t hidden, int64_t up_at, void* out, Team team) {
  (wide ? swiglu_of<float> : swiglu_of<bf16>)(x, n, width, hidden, up_at, out, team);
}
void widen(const Matrix& m, bool wide, int64_t first, int64_t last, void* out, Team team) {
  (wide ? widen_of<float> : widen_of<bf16>)(m, first, last, out, team);
}

}  // namespace FORM

#define JOIN(a, b) a##b
#define NAME(form) JOIN(form_, form)
const Form NAME(FORM) = {FORM::attention_step, FORM::feed_forward_step, FORM::attention_many, FORM::feed_forward_many,
                         FORM::project,        FORM::product,           FORM::attend,         FORM::norm,
                         FORM::swiglu,         FORM::widen};
