// AMX: multiplies tiles, registers of 16 rows of 64 bytes, in bfloat16.
//
// Tiles 0 to 3 hold sums, 4 and 5 the left factor, 6 and 7 the right factor, whose rows are pairs of columns.
#pragma once

#include "pack_activations.h"

namespace ISA {

#ifdef __AMX_BF16__
template <typename T>
constexpr bool AMX = sizeof(T) == 2;

// Configures the tile registers for its lifetime, then restores the configuration of PyTorch's own operators.
// `columns`: of the right factor.
class AmxRegisters {
 public:
  explicit AmxRegisters(int64_t columns = 16) {
    asm volatile("sttilecfg (%0)" : : "r"(before_) : "memory");
    Config ours;
    for (int i = 0; i < 8; i++) ours.bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * columns);
    asm volatile("ldtilecfg (%0)" : : "r"(&ours) : "memory");
  }
  ~AmxRegisters() { asm volatile("ldtilecfg (%0)" : : "r"(before_) : "memory"); }
  AmxRegisters(const AmxRegisters&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  alignas(64) uint8_t before_[64];
};

// As microkernel, for 16 * Q rows of x and L vectors of lanes. Calls `meanwhile` once for every 32 columns.
template <int Q, int L, bool ADD, typename F>
inline void amx_microkernel(const bf16* w, int64_t w_lanes, int64_t w_next, const bf16* x, int64_t x_next, int64_t n,
                            float* out, int64_t stride, const F& meanwhile) {
  const int64_t w_bytes = 2 * w_next, x_bytes = 2 * x_next, out_bytes = 4 * stride;
  float *right = out + LANES, *under = out + 16 * stride;
  asm volatile("" : : : "memory");  // GCC 12 does not know that loading a tile reads memory
  if (ADD) {
    _tile_loadd(0, out, out_bytes);
    if (L == 2) _tile_loadd(1, right, out_bytes);
    if (Q == 2) _tile_loadd(2, under, out_bytes);
    if (Q == 2 && L == 2) _tile_loadd(3, under + LANES, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < n; i += 32) {
    const bf16 *at = w + i / 2 * w_next, *row = x + i;
    _tile_loadd(6, at, w_bytes);
    _tile_loadd(4, row, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (Q == 2) {
      _tile_loadd(5, row + 16 * x_next, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (L == 2) {
      _tile_loadd(7, at + w_lanes, w_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if (Q == 2) _tile_dpbf16ps(3, 5, 7);
    }
    meanwhile();
  }
  _tile_stored(0, out, out_bytes);
  if (L == 2) _tile_stored(1, right, out_bytes);
  if (Q == 2) _tile_stored(2, under, out_bytes);
  if (Q == 2 && L == 2) _tile_stored(3, under + LANES, out_bytes);
}

// out (BLOCK_ROWS, columns) = 16 rows of w times pairs (n / 2, columns, 2); n is a multiple of GROUP. One column of
// pairs takes as long as sixteen.
inline void amx_dots(const bf16* w, int64_t n, const bf16* pairs, int64_t columns, float* out) {
  const int64_t w_bytes = 2 * n, right_bytes = 4 * columns;
  asm volatile("" : : : "memory");
  _tile_zero(0);
  for (int64_t i = 0; i < n; i += GROUP) {
    _tile_loadd(4, w + i, w_bytes);
    _tile_loadd(6, pairs + i * columns, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, out, right_bytes);
}
#else
template <typename T>
constexpr bool AMX = false;
struct AmxRegisters {
  explicit AmxRegisters(int64_t = 16) {}
};
#endif

}  // namespace ISA
