// How quantized weights are stored, and how their codes are read and written.
//
// A code q of some bits stands for
//     scale * q + min              of a kind with minimums
//     scale * (q - 2^(bits - 1))   of one without
//     scale * table[q]             of one with a table of 16 whole numbers from -128 to 127
// with one scale, and one minimum, for each group of 32 columns of a row, for each 16 of them, or for 2, 4, 8, ... such
// groups. They are float16; or int8, as in GGUF's K-quants, times a float16 for 256 columns. Rows lie in blocks of 16.
// Four columns of a row, a quad, are adjacent, because one VNNI instruction multiplies four columns of sixteen rows, a
// row in each lane.
//
// The bits of a code are split into planes of 8, 4, 2 or 1 bits, the binary digits of their number: 6 bits are the low
// four, then the high two. In a plane of w bits a group of a block has w vectors of 64 bytes, each of 8 / w quads: in
// every byte the earlier quads lie in the lower bits.
#pragma once

#include "isa.h"
#include "simd.h"

namespace ISA {

constexpr int BLOCK_ROWS = 16;  // rows of a matrix that are multiplied together
constexpr int GROUP = 32;       // columns that have a scale or two, or share one with others; read at once in bfloat16
constexpr int QUADS = GROUP / 4;
constexpr int SUPER_BLOCK = 8;  // groups whose scales have a common factor, if they are int8

inline int64_t groups_of(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

// Which of a row's scales a group has, or its first or second half.
[[gnu::always_inline]] inline int64_t scale_at(const Matrix& m, Kind kind, int64_t group, int half) {
  return codes_of(kind).scales == 1 ? group >> m.shift : 2 * group + half;
}

// Where the factor of a group's scales, or of its minimums, is for the first row of a block.
[[gnu::always_inline]] inline int64_t super_scale_at(const Matrix& m, Kind kind, bool mins, int64_t block,
                                                     int64_t group) {
  return (block * m.row_super_scales + group / SUPER_BLOCK * (codes_of(kind).has_min ? 2 : 1) + mins) * BLOCK_ROWS;
}

// The scales, or minimums, of LANES rows of a block from row `lane` on, for a group or a half of it.
[[gnu::always_inline]] inline f32 scales_of(const Matrix& m, Kind kind, bool mins, int64_t block, int64_t group,
                                            int half, int64_t lane) {
  const void* all = mins ? m.mins : m.scales;
  const int64_t at = (block * m.row_scales + scale_at(m, kind, group, half)) * BLOCK_ROWS + lane;
  if (m.super_scales == nullptr) return half_to_float((const uint16_t*)all + at);
  return load((const int8_t*)all + at) *
         half_to_float(m.super_scales + super_scale_at(m, kind, mins, block, group) + lane);
}

// The same of one row.
inline float scale_of(const Matrix& m, Kind kind, bool mins, int64_t block, int64_t group, int half, int64_t lane) {
  const void* all = mins ? m.mins : m.scales;
  const int64_t at = (block * m.row_scales + scale_at(m, kind, group, half)) * BLOCK_ROWS + lane;
  if (m.super_scales == nullptr) return half_to_float(((const uint16_t*)all)[at]);
  return ((const int8_t*)all)[at] * half_to_float(m.super_scales[super_scale_at(m, kind, mins, block, group) + lane]);
}

// Calls f<KIND>() for a quantized kind.
template <Kind KIND = Kind::INT2, typename F>
[[gnu::always_inline]] inline void with_kind(Kind kind, const F& f) {
  if (kind == KIND)
    f.template operator()<KIND>();
  else if constexpr (KIND < Kind::TABLE_G16)
    with_kind<(Kind)((int)KIND + 1)>(kind, f);
}

// The lowest `width` bits of each byte.
constexpr uint32_t low_bits(int width) { return (255u >> (8 - width)) * 0x01010101u; }

// Quad i of a group, whose codes for the first row are at q: V = uint32_t reads one row, u32 reads LANES rows. Codes
// of a table come as what they mean, plus 128.
template <typename V>
[[gnu::always_inline]] inline V load_quad(const Matrix& m, Kind kind, const uint8_t* q, int i) {
  V code{};
#pragma GCC unroll 4
  for (int width = 8, at = 0; width > 0; width /= 2) {
    if (!(codes_of(kind).bits & width)) continue;
    V v = load_as<V>(q + i * width / 8 * 64);
    const int from = i * width % 8;
    v = from > at ? v >> (from - at) : v << (at - from);
    code |= width == 8 ? v : v & (low_bits(width) << at);
    q += width * 64, at += width;
  }
  return codes_of(kind).has_table ? looked_up(m.table, code) : code;
}

// By how much codes are lowered for products of bytes: ARM's are of signed ones.
constexpr int lowered_by([[maybe_unused]] Codes codes) {
#ifdef __aarch64__
  return codes.bits == 8 || codes.has_table ? 128 : 0;
#else
  return 0;
#endif
}
[[gnu::always_inline]] inline u32 lowered(u32 codes, Kind kind) {
  return codes ^ (u32{} + lowered_by(codes_of(kind)) * 0x01010101u);
}

// Stores the quads of one row of a group.
inline void store_quads(Kind kind, const uint32_t* quads, uint8_t* q) {
  for (int width = 8, at = 0; width > 0; width /= 2) {
    if (!(codes_of(kind).bits & width)) continue;
    for (int v = 0; v < width; v++, q += 64) {
      uint32_t all = 0;
      for (int i = 0; i < 8 / width; i++) all |= (*quads++ >> at & low_bits(width)) << i * width;
      std::memcpy(q, &all, 4);
    }
    quads -= QUADS, at += width;
  }
}

}  // namespace ISA
