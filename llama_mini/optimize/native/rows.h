// Any matrix, sixteen rows at a time: a tile.
//
// Each result is summed in an order that depends on the matrix alone, so that a row's bits do not depend on who shares
// its batch.
#pragma once

#include "codes.h"

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

// out (batch, TILE): the rows of a tile, with their bias, times the batch.
template <typename T>
inline void tile(const Matrix& m, int64_t t, const Input& in, float* out) {
  const int64_t n = m.columns, at = t * TILE;
  const int rows = tile_rows(m, t);
  if (m.kind == Kind::FLOAT32) dots((const float*)m.data + at * n, rows, n, n, in, out, TILE);
  if (m.kind == Kind::BFLOAT16) dots((const bf16*)m.data + at * n, rows, n, n, in, out, TILE);
  if (m.kind == Kind::INT8) block_products<false>(m, t, in, out);
  if (m.kind == Kind::INT4) block_products<true>(m, t, in, out);
  if (m.bias == nullptr) return;
  for (int i = 0; i < rows; i += LANES) {
    const f32 bias = load_first((const T*)m.bias + at + i, rows - i);
    for (int64_t b = 0; b < in.batch; b++) store(out + b * TILE + i, load(out + b * TILE + i) + bias);
  }
}

}  // namespace FORM
