// How quantized weights are stored, and how their codes are read and written.
//
// A code q stands for
//     int8:        scale * (q - 128)
//     int4, int5:  scale * q + min
// with one scale, and one minimum, for each group of 32 columns of a row. Rows lie in blocks of 16. Four columns of a
// row, a quad, are adjacent, because one VNNI instruction multiplies four columns of sixteen rows, a row in each lane.
// A group of a block has one vector of 64 bytes for each bit of a code:
//     int8: a quad in each
//     int4: two quads in each, the earlier in the low four bits
//     int5: the low four bits of all codes as int4 has them; in a last vector the fifth bits, of quad i in bit i
#pragma once

#include "isa.h"
#include "simd.h"

namespace ISA {

constexpr int BLOCK_ROWS = 16;  // rows of a matrix that are multiplied together
constexpr int GROUP = 32;       // columns that share a scale, or that a bfloat16 kernel reads at once
constexpr int QUADS = GROUP / 4;

inline int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

// Quad i of a group, whose codes for the first row are at q: V = uint32_t reads one row, u32 reads LANES rows.
template <typename V>
[[gnu::always_inline]] inline V load_quad(Kind kind, const uint8_t* q, int i) {
  if (kind == Kind::INT8) return load_as<V>(q + i * 64);
  V v = load_as<V>(q + i / 2 * 64);
  v = (i % 2 ? v >> 4 : v) & 0x0f0f0f0f;
  if (kind == Kind::INT4) return v;
  const V fifth = load_as<V>(q + 4 * 64);
  return v | ((i < 4 ? fifth << (4 - i) : fifth >> (i - 4)) & 0x10101010);
}

// Stores the quads of one row of a group. Of int4, the low four bits of each code.
[[gnu::always_inline]] inline void store_quads(Kind kind, const uint32_t* quads, uint8_t* q) {
  if (kind == Kind::INT8) {
    for (int i = 0; i < QUADS; i++) std::memcpy(q + i * 64, quads + i, 4);
    return;
  }
  for (int i = 0; i < QUADS; i += 2) {
    const uint32_t both = (quads[i] & 0x0f0f0f0f) | (quads[i + 1] & 0x0f0f0f0f) << 4;
    std::memcpy(q + i / 2 * 64, &both, 4);
  }
  if (kind == Kind::INT4) return;
  uint32_t fifth = 0;
  for (int i = 0; i < QUADS; i++) fifth |= (quads[i] >> 4 & 0x01010101) << i;
  std::memcpy(q + 4 * 64, &fifth, 4);
}

}  // namespace ISA
