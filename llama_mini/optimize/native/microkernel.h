// The inner loop of gemm and of flash attention: a packed matrix times many rows of floats.
//
// A packed vector holds one dword of each of LANES rows of the matrix: a column of float32, or a pair of columns of
// bfloat16. One instruction multiplies it by a dword that all lanes share; an AMX instruction multiplies 16 such
// vectors by 16 rows. Where the processor has no product of bfloat16, its numbers are packed as float32: to widen them
// in the inner loop would take half as long again.
#pragma once

#include "norm.h"

namespace ISA {

#ifdef BF16_DOTS
template <typename T>
using Operand = T;  // what is packed of a matrix of T
#else
template <typename T>
using Operand = float;
#endif
template <typename X>
constexpr int64_t PAIR = 4 / sizeof(X);  // columns in a lane
template <typename T>
constexpr int64_t ROW_MULTIPLE = AMX<T> ? 32 : 1;  // for rows read, columns read and rows written

inline int64_t round_up(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

struct NoOp {
  void operator()() const {}
};

// acc + PAIR elements in each lane times PAIR elements that all lanes share.
inline f32 multiply_lanes(f32 acc, const float* w, const float* x) { return acc + load(w) * *x; }
#ifdef __AVX512BF16__
inline f32 multiply_lanes(f32 acc, const bf16* w, const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(load_as<i32>(w)), "v"(i32{} + pair));
  return acc;
}
#elif defined(BF16_DOTS)
inline f32 multiply_lanes(f32 acc, const bf16* w, const bf16* x) {
  return dot(acc, load_as<u32>(w), u32{} + load_as<uint32_t>(x));
}
#endif

// LANES dwords of a row, of which n elements are left; what is beyond them is zero.
template <typename X, typename T>
inline u32 dwords(const T* row, int64_t n) {
  if constexpr (sizeof(X) == 4) return (u32)load_first(row, n);
  u32 v{};
  std::memcpy(&v, row, min(max(n, 0), LANES * PAIR<X>) * sizeof(X));
  return v;
}

constexpr int MOST_VECTORS = 4;                       // of lanes, that a row is multiplied by at once
constexpr int ROWS_AT_ONCE = MANY_REGISTERS ? 6 : 3;  // so many that all sums stay in registers

template <int Q, int L, bool ADD, typename T>
inline void microkernel(const T* w, int64_t w_lanes, int64_t w_next, const T* x, int64_t x_next, int64_t n, float* out,
                        int64_t stride) {
  f32 acc[Q][L];
  for (int q = 0; q < Q; q++)
    for (int l = 0; l < L; l++) acc[q][l] = ADD ? load(out + q * stride + l * LANES) : f32{};
  for (int64_t i = 0; i < n; i += PAIR<T>)
    for (int q = 0; q < Q; q++)
      for (int l = 0; l < L; l++)
        acc[q][l] = multiply_lanes(acc[q][l], w + i / PAIR<T> * w_next + l * w_lanes, x + q * x_next + i);
  for (int q = 0; q < Q; q++)
    for (int l = 0; l < L; l++) store(out + q * stride + l * LANES, acc[q][l]);
}

// out[q * stride + lane] (+)= the sum over n of w[n][lane] * x[q][n], for some rows x and L vectors of lanes.
template <int L, bool ADD, typename T, typename F = NoOp>
inline void microkernel(const T* w, int64_t w_lanes, int64_t w_next, const T* x, int64_t x_next, int64_t rows,
                        int64_t n, float* out, int64_t stride, [[maybe_unused]] const F& meanwhile = F()) {
#ifdef __AMX_BF16__
  if constexpr (AMX<T>) {
    for (int64_t q = 0; q < rows; q += 32)
      for (int l = 0; l < L; l += 2) {
        const T *w_at = w + l * w_lanes, *x_at = x + q * x_next;
        float* to = out + q * stride + l * LANES;
        constexpr int BOTH = L > 1 ? 2 : 1;
        if (rows - q > 16)
          amx_microkernel<2, BOTH, ADD>(w_at, w_lanes, w_next, x_at, x_next, n, to, stride, meanwhile);
        else
          amx_microkernel<1, BOTH, ADD>(w_at, w_lanes, w_next, x_at, x_next, n, to, stride, meanwhile);
      }
    return;
  }
#endif
  int64_t q = 0;
  for (; q + ROWS_AT_ONCE <= rows; q += ROWS_AT_ONCE)
    microkernel<ROWS_AT_ONCE, L, ADD>(w, w_lanes, w_next, x + q * x_next, x_next, n, out + q * stride, stride);
  for (; q < rows; q++) microkernel<1, L, ADD>(w, w_lanes, w_next, x + q * x_next, x_next, n, out + q * stride, stride);
}

}  // namespace ISA
