// gemm for tokens in float32 or bfloat16: a panel of rows of the matrix is packed for the microkernel once, then
// multiplied by a few tokens at a time.
#pragma once

#include "microkernel.h"

namespace ISA {

struct Strip {  // LANES rows of a matrix; a panel is several strips, which may be of two matrices (gate and up)
  const Matrix* of;
  int64_t row;  // the first row; a multiple of LANES
};

// Rows padded with zeros to whole groups. Memory is allocated for a multiple of ROW_MULTIPLE rows, since the
// microkernel reads that many at once.
template <typename T>
struct PaddedRows {
  int64_t pitch;
  Array<T> at;
  PaddedRows(int64_t count, int64_t columns) { resize(count, columns); }
  PaddedRows() = default;
  void resize(int64_t count, int64_t columns) {
    pitch = round_up(columns, GROUP);
    at.resize(round_up(count, ROW_MULTIPLE<T>) * pitch);
    for (int64_t i = 0; columns < pitch && i < count; i++)
      std::memset((*this)[i] + columns, 0, (pitch - columns) * sizeof(T));
  }
  T* operator[](int64_t row) const { return at.data + row * pitch; }
};

template <typename T>
struct FloatTokens {
  using X = Operand<T>;
  static constexpr int STRIPS = AMX<T> ? 2 : MOST_VECTORS;  // in a panel
  static constexpr int64_t TOKEN_TILE = AMX<T> ? 32 : ROWS_AT_ONCE;
  int64_t count, columns, pitch;
  const X* rows;
  PaddedRows<X> storage;
};

// Packs `count` tokens; `row(i, out)` writes the i-th.
template <typename T, typename F>
void pack(FloatTokens<T>& in, int64_t columns, int64_t count, const F& row, Pool pool) {
  in.storage.resize(count, columns);
  in.count = count, in.columns = columns, in.pitch = in.storage.pitch, in.rows = in.storage.at;
  parallel(pool, count, [&](int64_t first, int64_t last) {
    Array<float> x(round_up(columns, LANES));
    for (int64_t i = first; i < last; i++) {
      row(i, x);
      copy_row((const float*)x, columns, in.storage[i]);
    }
  });
}

// The same for tokens that are stored as padded rows already: they are copied only if they must be widened.
template <typename T>
void pack_stored(FloatTokens<T>& in, const PaddedRows<T>& lines, int64_t columns, int64_t from, int64_t count,
                 Pool pool) {
  if constexpr (sizeof(Operand<T>) == sizeof(T))
    in.count = count, in.columns = columns, in.pitch = lines.pitch, in.rows = lines[from];
  else
    pack(in, columns, count, [&](int64_t i, float* out) { copy_row(lines[from + i], columns, out); }, pool);
}

#ifdef __AMX_BF16__
// Dequantizes one group of columns of a block of 16 rows into pairs of columns, a vector each, `next` apart.
template <Kind KIND>
inline void widen_group(const Matrix& m, int64_t block, int64_t group, int64_t groups, bf16* out, int64_t next) {
  constexpr Codes CODES = codes_of(KIND);
  const uint8_t* q = (const uint8_t*)m.data + (block * groups + group) * CODES.group_bytes();
  u16 order[2];  // interleaves sixteen first columns and sixteen second ones
  for (int i = 0; i < 2 * LANES; i++) order[i / LANES][i % LANES] = i % 2 * LANES + i / 2;
  const __m512i pairs = load_as<__m512i>(order);
#pragma GCC unroll 8
  for (int quad = 0; quad < QUADS; quad++) {
    const int half = quad * 2 / QUADS;
    const f32 scale = scales_of(m, KIND, false, block, group, half, 0);
    const f32 min = CODES.has_min ? scales_of(m, KIND, true, block, group, half, 0) : scale * (float)-CODES.zero();
    const u32 v = load_quad<u32>(m, KIND, q, quad);
    f32 x[4];
    for (int i = 0; i < 4; i++) x[i] = __builtin_convertvector((i32)((v >> 8 * i) & 255), f32) * scale + min;
    for (int i = 0; i < 4; i += 2) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]);
      _mm512_storeu_si512(out + (2 * quad + i / 2) * next, _mm512_permutexvar_epi16(pairs, both));
    }
  }
}
#endif

// Fills one strip of a panel: out (columns / PAIR, STRIPS, LANES, PAIR), with zeros beyond the ends of its matrix.
template <typename T, typename X = Operand<T>>
void fill_strip(X* out, Strip from, int64_t width) {
  constexpr int64_t NEXT = FloatTokens<T>::STRIPS * LANES * PAIR<X>;
  const Matrix& m = *from.of;
#ifdef __AMX_BF16__
  if (AMX<T> && quantized(m.kind) && from.row < m.rows)
    return with_kind(m.kind, [&]<Kind KIND>() {
      for (int64_t s = 0; s < width / GROUP; s++)
        widen_group<KIND>(m, from.row / BLOCK_ROWS, s, width / GROUP, (bf16*)out + s * GROUP / 2 * NEXT, NEXT);
    });
#endif
  for (int64_t column = 0; column < width; column += LANES * PAIR<X>) {
    u32 rows[LANES];
    for (int i = 0; i < LANES; i++) {
      const T* at = (const T*)m.data + (from.row + i) * m.columns + column;
      rows[i] = from.row + i < m.rows && column < m.columns ? dwords<X>(at, m.columns - column) : u32{};
    }
    transpose(rows);
    for (int i = 0; i < LANES; i++) std::memcpy(out + (column / PAIR<X> + i) * NEXT, &rows[i], sizeof rows[i]);
  }
}

// Prefetches a strip, some cache lines at a time, before it is packed.
struct Prefetcher {
  const char *at = nullptr, *end = nullptr;
  Prefetcher() = default;
  explicit Prefetcher(Strip from) {
    const Matrix& m = *from.of;
    const int64_t rows = min(m.rows - from.row, LANES), bytes = row_bytes(m);
    if (rows > 0) at = (const char*)m.data + from.row * bytes, end = at + rows * bytes;
  }
  void advance(int64_t lines) {
    for (; lines > 0 && at < end; lines--, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Multiplies panels by tokens. Calls done(panel, token, n, y) with y (n, STRIPS, LANES), the products of n tokens;
// `strip(panel, i)` names the strips of a panel.
template <typename T, typename S, typename F>
void times_tokens(int64_t panels, const S& strip, const FloatTokens<T>& in, Pool pool, const F& done) {
  using X = Operand<T>;
  constexpr int STRIPS = FloatTokens<T>::STRIPS;
  constexpr int64_t TOKEN_TILE = FloatTokens<T>::TOKEN_TILE, VECTOR = LANES * PAIR<X>, WIDTH = STRIPS * LANES;
  const int64_t width = round_up(in.columns, GROUP), each = (TOKEN_TILE * GROUP + width - 1) / width;
  const int64_t lines = LANES * GROUP * 4 / 64 * TOKEN_TILE / (in.count + TOKEN_TILE) + 1;
  parallel(pool, panels, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const AmxRegisters tiles;
    Array<X> panel(width / PAIR<X> * STRIPS * VECTOR);
    Array<float> sums(2 * TOKEN_TILE * WIDTH);
    // With AMX, the results of one tile of tokens are finished between the instructions of the next.
    int64_t panel_before = first, token_before = 0, n_before = 0, finished = 0;
    float *now = sums, *before = now + TOKEN_TILE * WIDTH;
    auto finish = [&](int64_t at_most) {
      const int64_t count = min(n_before - finished, at_most);
      if (count <= 0) return;
      done(panel_before, token_before + finished, count, (const float*)before + finished * WIDTH);
      finished += count;
    };
    for (int64_t p = first; p < last; p++) {
      Prefetcher prefetchers[STRIPS];
      for (int i = 0; i < STRIPS; i++) {
        fill_strip<T>((X*)panel + i * VECTOR, strip(p, i), width);
        if (p + 1 < last) prefetchers[i] = Prefetcher(strip(p + 1, i));
      }
      for (int64_t token = 0; token < in.count; token += TOKEN_TILE) {
        const int64_t count = min(in.count - token, TOKEN_TILE);
        microkernel<STRIPS, false>((const X*)panel, VECTOR, STRIPS * VECTOR, in.rows + token * in.pitch, in.pitch,
                                   count, width, now, WIDTH, [&] {
                                     finish(each);
                                     for (auto& strip : prefetchers) strip.advance(lines);
                                   });
        finish(TOKEN_TILE);
        panel_before = p, token_before = token, n_before = count, finished = 0;
        float* const unused = before;
        before = now, now = unused;
      }
    }
    finish(TOKEN_TILE);
  });
}

}  // namespace ISA
