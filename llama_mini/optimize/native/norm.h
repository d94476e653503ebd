// RMSNorm with the rounding of a model of dtype T: early rounds before the gain, late after it.
#pragma once

#include "gemv.h"

namespace ISA {

template <typename T>
inline f32 round_to(f32 v) {
  return round_to(v, (const T*)nullptr);
}

template <typename T, typename X>
inline void rms_norm(const X* x, const Norm& norm, int64_t n, float* out) {
  f32 squares = {};
  for (int64_t i = 0; i < n; i += LANES) {
    f32 v = load_first(x + i, n - i);
    squares += v * v;
  }
  const float root = 1.f / __builtin_sqrtf(sum(squares) / n + norm.eps);
  for (int64_t i = 0; i < n; i += LANES) {
    f32 v = load_first(x + i, n - i) * root, gain = load_first((const T*)norm.gain + i, n - i) + norm.offset;
    if (!norm.late) v = round_to<T>(v), gain = round_to<T>(gain);
    store_first(out + i, round_to<T>(v * gain), n - i);
  }
}

template <typename From, typename To>
inline void copy_row(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; i += LANES) store_first(to + i, load_first(from + i, n - i), n - i);
}

// The row as floats, normalized if there is a norm.
template <typename T, typename X>
inline void norm_row(const X* x, const Norm& norm, int64_t n, float* out) {
  norm.gain != nullptr ? rms_norm<T>(x, norm, n, out) : copy_row(x, n, out);
}

inline f32 activated(Activation act, f32 x) { return act == Activation::SILU ? silu(x) : gelu_tanh(x); }

inline bool is_plain(const Sum& sum) {
  return sum.out.gain == nullptr && sum.post.gain == nullptr && sum.x_scale == 1 && sum.y_scale == 1;
}

// A row of a residual sum.
template <typename T, typename Y>
inline void add_row(const T* x, const Y* y, const Sum& sum, int64_t n, T* out) {
  Array<float> row(n);
  norm_row<T>(y, sum.out, n, row);
  for (int64_t i = 0; i < n; i += LANES)
    store_first(row + i, sum.x_scale * load_first(x + i, n - i) + sum.y_scale * load_first(row + i, n - i), n - i);
  if (sum.post.gain != nullptr) rms_norm<T>((const float*)row, sum.post, n, row);
  copy_row((const float*)row, n, out);
}

}  // namespace ISA
