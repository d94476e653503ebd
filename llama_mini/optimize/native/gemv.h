// gemv for any format, 16 rows of the matrix at a time.
//
// The order of each sum depends on the matrix alone, so the bits of a row do not depend on the other rows of its batch.
#pragma once

#include "gemv_int.h"
#include "amx.h"

namespace ISA {

// Some rows of a matrix as a matrix. A quantized matrix is cut at whole blocks.
template <typename T>
inline Matrix slice_rows(Matrix m, int64_t from, int64_t rows) {
  m.data = (const char*)m.data + from * row_bytes(m);
  skip_scales(m, from);
  if (m.bias != nullptr) m.bias = (const T*)m.bias + from;
  m.rows = rows;
  return m;
}

inline int64_t n_blocks(const Matrix& m) { return (m.rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

inline int64_t block_rows(const Matrix& m, int64_t t) { return min(m.rows - t * BLOCK_ROWS, BLOCK_ROWS); }

// Packs x (batch, m.columns) for `gemv_block`. Only bfloat16 dot products, with AMX or without, round it to bfloat16.
template <typename T>
inline void pack(Input& in, const Matrix& m, const float* x, int64_t batch, const Pool& pool) {
#ifdef __AMX_BF16__
  if (m.kind == Kind::BFLOAT16) {
    in.batch = batch, in.width = groups_of(m.columns) * GROUP;
    return pair(in, x, batch, m.columns);
  }
#endif
  pack<T>(in, m.kind, x, batch, m.columns, &pool);
}

#ifdef __AMX_BF16__
// out (batch, BLOCK_ROWS) = up to 16 rows of w times the batch, of which in.columns rows are multiplied at once.
inline void gemv_block_amx(const bf16* w, int64_t rows, int64_t n, const Input& in, float* out) {
  Array<bf16> edge;  // a copy padded with zeros, for fewer than 16 rows or an incomplete group
  if (rows < BLOCK_ROWS || n < in.width) {
    edge.resize(BLOCK_ROWS * in.width);
    std::memset(edge.data, 0, BLOCK_ROWS * in.width * sizeof(bf16));
    for (int r = 0; r < rows; r++) std::memcpy(edge + r * in.width, w + r * n, n * sizeof(bf16));
    w = edge;
  }
  alignas(64) float sums[BLOCK_ROWS * BLOCK_ROWS + LANES];
  for (int64_t b = 0; b < in.batch; b += in.columns) {
    const bf16* pairs = (const bf16*)(in.pairs + b * in.width);
    amx_dots(w, in.width, pairs, in.columns, in.columns == 1 ? out + b * BLOCK_ROWS : sums);
    if (in.columns == 1) continue;
    u32 turned[BLOCK_ROWS];
    for (int r = 0; r < BLOCK_ROWS; r++) turned[r] = (u32)load(sums + r * in.columns);
    transpose(turned);
    for (int64_t i = 0; i < in.columns && b + i < in.batch; i++) store(out + (b + i) * BLOCK_ROWS, (f32)turned[i]);
  }
}
#endif

// out (batch, BLOCK_ROWS) = one block of rows times the batch, plus their bias. Needs AmxRegisters(in.columns).
template <typename T>
inline void gemv_block(const Matrix& m, int64_t t, const Input& in, float* out) {
  const int64_t n = m.columns, at = t * BLOCK_ROWS;
  const int64_t rows = block_rows(m, t);
  if (m.kind == Kind::FLOAT32) dots((const float*)m.data + at * n, rows, n, n, in, out, BLOCK_ROWS);
#ifdef __AMX_BF16__
  if (m.kind == Kind::BFLOAT16) gemv_block_amx((const bf16*)m.data + at * n, rows, n, in, out);
#else
  if (m.kind == Kind::BFLOAT16) dots((const bf16*)m.data + at * n, rows, n, n, in, out, BLOCK_ROWS);
#endif
  with_kind(m.kind, [&]<Kind KIND>() { gemv_block_int<KIND>(m, t, in, out); });
  if (m.bias == nullptr) return;
  for (int i = 0; i < rows; i += LANES) {
    const f32 bias = load_first((const T*)m.bias + at + i, rows - i);
    for (int64_t b = 0; b < in.batch; b++) store(out + b * BLOCK_ROWS + i, load(out + b * BLOCK_ROWS + i) + bias);
  }
}

}  // namespace ISA
