// gemv for float weights, as PyTorch stores them. Each weight is read once, so memory bandwidth limits the speed.
#pragma once

#include "pack_activations.h"

namespace ISA {

constexpr int PREFETCH_AHEAD = 14 * 1024;  // bytes: how far ahead weights are prefetched, into the second-level cache
constexpr int ROWS = 4;                    // of the matrix, multiplied at once
template <typename T>
#if defined(__AMX_BF16__)
constexpr bool IN_SEQUENCE = false;  // Intel processors with AMX read four rows side by side 5 % faster than one
#elif defined(__aarch64__)
constexpr bool IN_SEQUENCE = false;  // one sum of four lanes would wait for itself more often than for memory
#elif defined(__AVX512F__)
constexpr bool IN_SEQUENCE = true;  // AMD's read one row after another a fifth faster than four side by side
#else
constexpr bool IN_SEQUENCE = sizeof(T) == 2;  // with AVX2 this is 6 % faster in bfloat16, and 6 % slower in float32
#endif
constexpr int BATCH = MANY_REGISTERS ? 4 : 3;  // rows of the batch: as many as fit in the registers

// Always inline: GCC 12 takes a call of it for one without effect, and may drop it.
[[gnu::always_inline]] inline void prefetch(const void* p, int64_t ahead = PREFETCH_AHEAD) {
  __builtin_prefetch((const char*)p + ahead, 0, 2);
}

template <typename T>
inline f32 times(f32 acc, const T* w, const Input& in, int64_t at) {
  for (int i = 0; i < GROUP; i += LANES) acc += load(w + i) * load(in.floats + at + i);
  return acc;
}

inline f32 times(f32 acc, const bf16* w, const Input& in, int64_t at) {
#ifdef BF16_DOTS
  for (int i = 0; i < GROUP; i += 2 * LANES) acc = dot(acc, load_as<u32>(w + i), load_as<u32>(in.halves + at + i));
#else
  for (int i = 0; i < GROUP / 2; i += LANES) {
    u32 pairs = load_as<u32>(w + 2 * i);
    acc += (f32)(pairs << 16) * load(in.floats + at + i);
    acc += (f32)(pairs & 0xffff0000u) * load(in.floats + at + GROUP / 2 + i);
  }
#endif
  return acc;
}

// out[b * stride + r] = R rows of w, `pitch` apart, times B rows of the batch from `row` on.
template <int R, int B, typename T>
inline void products(const T* w, int64_t n, int64_t pitch, const Input& in, int64_t row, float* out, int64_t stride,
                     int64_t ahead) {
  f32 acc[B][R] = {};
  const int64_t whole = n / GROUP * GROUP, base = row * in.width;
  for (int64_t i = 0; i < whole; i += GROUP)
    for (int r = 0; r < R; r++) {
      const T* at = w + r * pitch + i;
      prefetch(at, ahead);
      if (sizeof(T) == 4) prefetch(at + GROUP / 2, ahead);
      for (int b = 0; b < B; b++) acc[b][r] = times(acc[b][r], at, in, base + b * in.width + i);
    }
  if (whole < n)
#pragma GCC unroll 4  // all of it, or the sums would live in memory
    for (int r = 0; r < R; r++) {
      T tail[GROUP] = {};  // never read beyond the end of a row: NaN may follow, or memory that is not ours
      std::memcpy(tail, w + r * pitch + whole, (n - whole) * sizeof(T));
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) acc[b][r] = times(acc[b][r], tail, in, base + b * in.width + whole);
    }
#pragma GCC unroll 4
  for (int b = 0; b < B; b++) {
    if (R == 4)
      store_sums(out + b * stride, acc[b]);
    else
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) out[b * stride + r] = sum(acc[b][r]);
  }
}

template <int R, typename T>
inline void products(const T* w, int64_t n, int64_t pitch, const Input& in, float* out, int64_t stride, int64_t ahead) {
  int64_t b = 0;
  for (; b + BATCH <= in.batch; b += BATCH) products<R, BATCH>(w, n, pitch, in, b, out + b * stride, stride, ahead);
  for (; b + 3 <= in.batch; b += 3) products<R, 3>(w, n, pitch, in, b, out + b * stride, stride, ahead);
  for (; b < in.batch; b++) products<R, 1>(w, n, pitch, in, b, out + b * stride, stride, ahead);
}

// `rows` rows of w times every row of the batch; meanwhile what is `ahead` bytes from them is prefetched.
template <typename T>
inline void dots(const T* w, int64_t rows, int64_t n, int64_t pitch, const Input& in, float* out, int64_t stride,
                 int64_t ahead = PREFETCH_AHEAD) {
  int64_t r = 0;
  if (in.batch > 1 || !IN_SEQUENCE<T>)
    for (; r + ROWS <= rows; r += ROWS) products<ROWS>(w + r * pitch, n, pitch, in, out + r, stride, ahead);
  for (; r < rows; r++) products<1>(w + r * pitch, n, pitch, in, out + r, stride, ahead);
}

}  // namespace ISA
