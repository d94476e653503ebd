// A matrix times many tokens that stay floats: a panel of its rows, laid out in lanes once, times some tokens at a time.
#pragma once

#include "dense.h"

namespace FORM {

struct Strip {  // as many rows of a matrix as there are lanes; a panel is some of them, maybe of two matrices
  const Matrix* of;
  int64_t row;  // the first; a multiple of LANES
};

// Rows of numbers, padded with zeros to whole steps, with room for as many more as are read at once.
template <typename T>
struct Lines {
  int64_t pitch;
  Array<T> at;
  Lines(int64_t count, int64_t columns) { resize(count, columns); }
  Lines() = default;
  void resize(int64_t count, int64_t columns) {
    pitch = whole(columns, STEP);
    at.resize(whole(count, WHOLE<T>) * pitch);
    for (int64_t i = 0; columns < pitch && i < count; i++) std::memset((*this)[i] + columns, 0, (pitch - columns) * sizeof(T));
  }
  T* operator[](int64_t row) const { return at.data + row * pitch; }
};

template <typename T>
struct FloatTokens {
  static constexpr int STRIPS = TILES<T> ? 2 : 4;  // of a panel
  static constexpr int64_t TURN = TILES<T> ? 32 : AT_ONCE<STRIPS>;
  int64_t count, columns, pitch;
  const T* rows;
  Lines<T> room;
};

// Makes ready the `count` tokens whose rows `row` writes.
template <typename T, typename F>
void ready(FloatTokens<T>& in, int64_t columns, int64_t count, const F& row, Team team) {
  in.room.resize(count, columns);
  in.count = count, in.columns = columns, in.pitch = in.room.pitch, in.rows = in.room.at;
  parallel(team, count, [&](int64_t first, int64_t last) {
    Array<float> x(whole(columns, LANES));
    for (int64_t i = first; i < last; i++) {
      row(i, x);
      copy_row((const float*)x, columns, in.room[i]);
    }
  });
}

// The same of tokens that are there.
template <typename T>
void take(FloatTokens<T>& in, const Lines<T>& lines, int64_t columns, int64_t from, int64_t count, Team) {
  in.count = count, in.columns = columns, in.pitch = lines.pitch, in.rows = lines[from];
}

#ifdef __AMX_BF16__
// Pairs of columns of sixteen rows of codes: a step of a block, a vector for each pair, `next` apart.
inline void widen_step(const Matrix& m, int64_t block, int64_t step, int64_t steps, bf16* out, int64_t next) {
  const bool four = m.kind == Kind::INT4;
  const uint8_t* codes = (const uint8_t*)m.data + (block * steps + step) * (four ? 256 : 512);
  const int64_t at = (block * steps + step) * TILE;
  const f32 scale = half_to_float(m.scale + at), least = four ? half_to_float(m.least + at) : scale * -128.f;
  u16 order[2];  // of sixteen first columns and sixteen second ones, in turn
  for (int i = 0; i < 2 * LANES; i++) order[i / LANES][i % LANES] = i % 2 * LANES + i / 2;
  const __m512i pairs = load_as<__m512i>(order);
  for (int quad = 0; quad < QUADS; quad++) {
    u32 v = load_as<u32>(codes + (four ? quad / 2 : quad) * 64);
    if (four) v = (quad % 2 ? v >> 4 : v) & 0x0f0f0f0f;
    f32 x[4];
    for (int i = 0; i < 4; i++) x[i] = __builtin_convertvector((i32)((v >> 8 * i) & 255), f32) * scale + least;
    for (int i = 0; i < 4; i += 2) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]);
      _mm512_storeu_si512(out + (2 * quad + i / 2) * next, _mm512_permutexvar_epi16(pairs, both));
    }
  }
}
#endif

// out (columns / PAIR, STRIPS, LANES, PAIR): one of the strips, with zeros beyond the ends of its matrix
template <typename T>
void fill_strip(T* out, Strip from, int64_t width) {
  constexpr int64_t NEXT = FloatTokens<T>::STRIPS * LANES * PAIR<T>;
  const Matrix& m = *from.of;
#ifdef __AMX_BF16__
  if (TILES<T> && m.kind >= Kind::INT8 && from.row < m.rows) {
    for (int64_t s = 0; s < width / STEP; s++)
      widen_step(m, from.row / TILE, s, width / STEP, (bf16*)out + s * STEP / 2 * NEXT, NEXT);
    return;
  }
#endif
  for (int64_t column = 0; column < width; column += LANES * PAIR<T>) {
    u32 rows[LANES];
    const int64_t n = m.columns - column < LANES * PAIR<T> ? m.columns - column : LANES * PAIR<T>;
    for (int i = 0; i < LANES; i++) {
      rows[i] = u32{};
      if (from.row + i >= m.rows || n <= 0) continue;
      const T* at = (const T*)m.data + (from.row + i) * m.columns + column;
      if (n == LANES * PAIR<T>)
        rows[i] = load_as<u32>(at);
      else
        std::memcpy(&rows[i], at, n * sizeof(T));
    }
    transpose(rows);
    for (int i = 0; i < LANES; i++) std::memcpy(out + (column / PAIR<T> + i) * NEXT, &rows[i], sizeof rows[i]);
  }
}

// What a strip is made of, asked for a line at a time before its turn comes.
struct Coming {
  const char *at = nullptr, *end = nullptr;
  Coming() = default;
  explicit Coming(Strip from) {
    const Matrix& m = *from.of;
    const int64_t rows = m.rows - from.row < LANES ? m.rows - from.row : LANES, steps = whole(m.columns, STEP) / STEP;
    if (rows <= 0) return;
    const int64_t row = m.kind == Kind::FLOAT32 ? 4 * m.columns : m.kind == Kind::BFLOAT16 ? 2 * m.columns
                      : m.kind == Kind::INT8 ? STEP * steps : STEP / 2 * steps;
    at = (const char*)m.data + from.row * row, end = at + rows * row;
  }
  void ask(int64_t lines) {
    for (; lines > 0 && at < end; lines--, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Calls done(panel, token, n, y) with y (n, STRIPS, LANES): a panel, whose strips `strip(panel, i)` says, times n tokens.
template <typename T, typename S, typename F>
void times_tokens(int64_t panels, const S& strip, const FloatTokens<T>& in, Team team, const F& done) {
  constexpr int STRIPS = FloatTokens<T>::STRIPS;
  constexpr int64_t TURN = FloatTokens<T>::TURN, VECTOR = LANES * PAIR<T>, WIDTH = STRIPS * LANES;
  const int64_t width = whole(in.columns, STEP), each = (TURN * STEP + width - 1) / width;
  const int64_t lines = LANES * STEP * 4 / 64 * TURN / (in.count + TURN) + 1;
  parallel(team, panels, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const Tiles tiles;
    Array<T> panel(width / PAIR<T> * STRIPS * VECTOR);
    Array<float> sums(2 * TURN * WIDTH);
    // With tiles, what one turn gave is finished between the instructions of the next one.
    int64_t of = first, from = 0, n = 0, at = 0;
    float *now = sums, *before = now + TURN * WIDTH;
    auto finish = [&](int64_t most) {
      const int64_t some = n - at < most ? n - at : most;
      if (some <= 0) return;
      done(of, from + at, some, (const float*)before + at * WIDTH);
      at += some;
    };
    for (int64_t p = first; p < last; p++) {
      Coming coming[STRIPS];
      for (int i = 0; i < STRIPS; i++) {
        fill_strip((T*)panel + i * VECTOR, strip(p, i), width);
        if (p + 1 < last) coming[i] = Coming(strip(p + 1, i));
      }
      for (int64_t token = 0; token < in.count; token += TURN) {
        const int64_t count = in.count - token < TURN ? in.count - token : TURN;
        lane_products<STRIPS, false>((const T*)panel, VECTOR, STRIPS * VECTOR, in.rows + token * in.pitch, in.pitch, count,
                                     width, now, WIDTH, [&] {
                                       finish(each);
                                       for (auto& strip : coming) strip.ask(lines);
                                     });
        finish(TURN);
        of = p, from = token, n = count, at = 0;
        float* const done_with = before;
        before = now, now = done_with;
      }
    }
    finish(TURN);
  });
}

}  // namespace FORM
