// Any matrix, sixteen rows at a time: a tile.
//
// Each result is summed in an order that depends on the matrix alone, so that a row's bits do not depend on who shares
// its batch.
#pragma once

#include "codes.h"
#include "tiles.h"

namespace FORM {

// Some rows of a matrix as a matrix; of codes whole blocks.
template <typename T>
inline Matrix rows_of(Matrix m, int64_t from, int64_t rows) {
  const int64_t steps = (m.columns + STEP - 1) / STEP, scales = from * steps;
  const int64_t bytes = m.kind == Kind::FLOAT32 ? 4 * m.columns : m.kind == Kind::BFLOAT16 ? 2 * m.columns
                      : m.kind == Kind::INT8 ? STEP * steps : STEP / 2 * steps;
  m.data = (const char*)m.data + from * bytes;
  if (m.scale != nullptr) m.scale += scales;
  if (m.least != nullptr) m.least += scales;
  if (m.bias != nullptr) m.bias = (const T*)m.bias + from;
  m.rows = rows;
  return m;
}

inline int64_t tiles(const Matrix& m) { return (m.rows + TILE - 1) / TILE; }

inline int tile_rows(const Matrix& m, int64_t t) { return (int)(m.rows - t * TILE < TILE ? m.rows - t * TILE : TILE); }

// x (batch, m.columns), rounded already to what the model computes in, for `tile`.
inline void ready(Input& in, const Matrix& m, const float* x, int64_t batch) {
#ifdef __AMX_BF16__
  if (m.kind == Kind::BFLOAT16) {
    in.batch = batch, in.width = (m.columns + STEP - 1) / STEP * STEP;
    return pair(in, x, batch, m.columns);
  }
#endif
  ready(in, m.kind, x, batch, m.columns);
}

#ifdef __AMX_BF16__
// out (batch, TILE): up to sixteen rows of w times the batch, sixteen of it at once.
inline void tile_of_halves(const bf16* w, int rows, int64_t n, const Input& in, float* out) {
  Array<bf16> edge;  // where there are fewer rows, or no whole steps: with zeros around
  if (rows < TILE || n < in.width) {
    edge.resize(TILE * in.width);
    std::memset(edge.data, 0, TILE * in.width * sizeof(bf16));
    for (int r = 0; r < rows; r++) std::memcpy(edge + r * in.width, w + r * n, n * sizeof(bf16));
    w = edge;
  }
  alignas(64) float sums[TILE * TILE + LANES];
  for (int64_t b = 0; b < in.batch; b += in.columns) {
    const bf16* pairs = (const bf16*)(in.pairs + b * in.width);
    tile_dots(w, in.width, pairs, in.columns, in.columns == 1 ? out + b * TILE : sums);
    if (in.columns == 1) continue;
    u32 turned[TILE];
    for (int r = 0; r < TILE; r++) turned[r] = (u32)load(sums + r * in.columns);
    transpose(turned);
    for (int64_t i = 0; i < in.columns && b + i < in.batch; i++) store(out + (b + i) * TILE, (f32)turned[i]);
  }
}
#endif

// out (batch, TILE): the rows of a tile, with their bias, times the batch. Tiles(in.columns) live meanwhile.
template <typename T>
inline void tile(const Matrix& m, int64_t t, const Input& in, float* out) {
  const int64_t n = m.columns, at = t * TILE;
  const int rows = tile_rows(m, t);
  if (m.kind == Kind::FLOAT32) dots((const float*)m.data + at * n, rows, n, n, in, out, TILE);
#ifdef __AMX_BF16__
  if (m.kind == Kind::BFLOAT16) tile_of_halves((const bf16*)m.data + at * n, rows, n, in, out);
#else
  if (m.kind == Kind::BFLOAT16) dots((const bf16*)m.data + at * n, rows, n, n, in, out, TILE);
#endif
  if (m.kind == Kind::INT8) block_products<false>(m, t, in, out);
  if (m.kind == Kind::INT4) block_products<true>(m, t, in, out);
  if (m.bias == nullptr) return;
  for (int i = 0; i < rows; i += LANES) {
    const f32 bias = load_first((const T*)m.bias + at + i, rows - i);
    for (int64_t b = 0; b < in.batch; b++) store(out + b * TILE + i, load(out + b * TILE + i) + bias);
  }
}

}  // namespace FORM
