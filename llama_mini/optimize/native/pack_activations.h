// Packs the rows of a batch once; gemv then multiplies all blocks of a matrix by them.
//
// For a quantized matrix, activations are quantized too, 32 columns (a group) at a time. A group has eight bits and a
// scale. A group that holds an outlier has sixteen bits, because its rounding errors would be large (LLM.int8, Dettmers
// 2022, also treats outliers apart). In a float32 model every group has sixteen; so it has for codes of eight bits
// with AVX2 alone, where sixteen are as fast. How a row is quantized depends on that row alone, and is the same in
// decoding and in a prompt.
#pragma once

#include <cstdlib>
#include <new>

#include "codes.h"

namespace ISA {

// The bytes of a row; of a quantized matrix, the average over a block.
inline int64_t row_bytes(const Matrix& m) {
  if (m.scales == nullptr) return (m.kind == Kind::FLOAT32 ? 4 : 2) * m.columns;
  return groups_of(m.columns) * codes_of(m.kind).group_bytes() / BLOCK_ROWS;
}

template <typename T>
struct Array {
  T* data = nullptr;
  Array() = default;
  explicit Array(int64_t n) { resize(n); }
  Array(const Array&) = delete;
  ~Array() { free(data); }
  void resize(int64_t n) {  // not initialized
    free(data);
    data = (T*)aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64);
    if (data == nullptr) throw std::bad_alloc();
  }
  operator T*() { return data; }
  operator const T*() const { return data; }
};

#ifndef BYTE_DOTS
// Products of two neighbours, a code and a byte each, are added in 16 bits.
inline void add_bytes(__m256i& sums, __m256i codes, int32_t x) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x)));
  asm("" : "+x"(sums));  // else GCC adds all products at the end, and spills them until then
}

inline i32 sums_of_pairs(__m256i sums) { return (i32)_mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// The same for activations of 16 bits, of columns (0, 2) and (1, 3) of the quad.
inline void add_pairs(i32& sums, __m256i codes, int32_t first, int32_t second) {
  const __m256i evens = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odds = _mm256_srli_epi16(codes, 8);
  sums += (i32)_mm256_madd_epi16(evens, _mm256_set1_epi32(first));
  sums += (i32)_mm256_madd_epi16(odds, _mm256_set1_epi32(second));
}
#endif

template <typename F>
void parallel(Pool pool, int64_t n, const F& f) {
  pool.run(pool.self, n, [](void* f, int64_t first, int64_t last) { (*(const F*)f)(first, last); }, (void*)&f);
}

struct Input {
  int64_t batch, width;          // width: columns, padded with zeros to whole groups
  Array<float> floats;           // float32; for bfloat16 without dot products: evens, then odds, of each group
  Array<uint16_t> halves;        // bfloat16
  int64_t columns = 1;           // with AMX: rows of the batch that are multiplied at once
  Array<uint16_t> pairs;         // bfloat16 with AMX: (batch / columns, width / 2, columns, 2)
  Codes codes;                   // of a quantized matrix; what follows is for one, (groups, batch)
  Array<int32_t> first, second;  // in quads: high and low bytes; if not `in_bytes`: columns (0, 2) and (1, 3)
  Array<uint8_t> sixteen_bits;
  Array<float> scales;
  Array<float> total;    // (groups, codes.scales, batch): sums of the columns of a scale, scaled
  Array<int32_t> start;  // the same shape: cancels the code that means 0
};

constexpr float OUTLIER = 3;  // a group holds an outlier if its squared maximum exceeds so many means over the groups

#ifdef BYTE_DOTS
constexpr int quads_in_16_bits(Codes) { return 0; }  // they are added in 32 bits
constexpr bool in_bytes(Codes) { return true; }
#else
// The quads whose products with bytes can be added in 16 bits; none for codes of eight bits.
constexpr int quads_in_16_bits(Codes codes) {
  return codes.bits == 8 || codes.has_table ? 0 : codes.bits <= 4 ? 8 : codes.bits == 5 ? 4 : 2;
}
// Whether activations are multiplied as bytes, those of sixteen bits as two. Else they are pairs of 16-bit numbers.
constexpr bool in_bytes(Codes codes) { return quads_in_16_bits(codes) > 0; }
#endif

// Finds the largest magnitude in each group of a row of whole groups, and which groups hold an outlier: all if
// `always`. Returns NaN if anything is not finite: no integer holds that, so the scales become NaN.
inline float find_outliers(const float* x, int64_t groups, bool always, float* peaks, uint8_t* outliers) {
  f32 zeros = {};
  float squares = 0;
  for (int64_t s = 0; s < groups; s++) {
    f32 most = {};
    for (int i = 0; i < GROUP; i += LANES) {
      const f32 v = load(x + s * GROUP + i);
      most = max(most, max(v, -v));
      zeros += v * 0.f;
    }
    peaks[s] = largest(most);
    squares += peaks[s] * peaks[s];
  }
  const float nonfinite = sum(zeros);
  for (int64_t s = 0; s < groups; s++) {
    if (nonfinite != 0) peaks[s] = 0;
    outliers[s] = always || peaks[s] * peaks[s] * groups > OUTLIER * squares;
  }
  return nonfinite;
}

// Stores 32 quantized columns: 16 bits as high bytes (`first`) and low bytes (`second`), and 8 bits in `first` alone;
// or all of them as pairs of columns.
inline void store_activations(const i32* q, bool sixteen_bits, bool bytes, int32_t* first, int32_t* second) {
  if (bytes) {
    for (int i = 0; i < GROUP / LANES; i++) {
      const i32 low = sixteen_bits ? ((q[i] + 128) & 255) - 128 : i32{};
      store_bytes((int8_t*)first + i * LANES, sixteen_bits ? (q[i] - low) >> 8 : q[i]);
      if (sixteen_bits) store_bytes((int8_t*)second + i * LANES, low);
    }
    return;
  }
  int32_t x[GROUP];
  std::memcpy(x, q, sizeof x);
  for (int i = 0; i < QUADS; i++) {
    first[i] = (x[4 * i] & 0xffff) | (int32_t)((uint32_t)x[4 * i + 2] << 16);
    second[i] = (x[4 * i + 1] & 0xffff) | (int32_t)((uint32_t)x[4 * i + 3] << 16);
  }
}

// The sums of 32 quantized columns, or of 16 and 16.
inline void sums_of(const i32* q, int scales_each, int32_t* sums) {
  constexpr int HALF = GROUP / LANES / 2;
  i32 half[2] = {};
  for (int i = 0; i < 2 * HALF; i++) half[i / HALF] += q[i];
  if (scales_each == 1) half[0] += half[1];
  for (int i = 0; i < scales_each; i++)
    sums[i] = (int32_t)sum(__builtin_convertvector(half[i], f32));  // below 2^24, so exact
}

// Quantizes one group for a matrix of some codes; `sums` as in sums_of.
inline void quantize_activation_group(const float* x, float peak, bool outlier, bool sixteen_bits, Codes codes,
                                      int32_t* first, int32_t* second, int32_t* sums) {
  const float to_int = peak > 1e-30f ? (outlier ? 32512.f : 127.f) / peak : 0.f;
  i32 q[GROUP / LANES];
  for (int i = 0; i < GROUP / LANES; i++) {
    const f32 v = to_int != 0 ? load(x + i * LANES) * to_int : f32{};
    q[i] = (i32)(v + 12582912.f) - 0x4b400000;  // rounds to nearest: 1.5 * 2^23 leaves no fraction
    if (sixteen_bits && !outlier) q[i] <<= 8;
  }
  store_activations(q, sixteen_bits, in_bytes(codes), first, second);
  sums_of(q, codes.scales, sums);
}

template <typename T>
inline void quantize_input_row(Input& in, const float* x, int64_t b) {
  const int64_t groups = in.width / GROUP;
  Array<float> peaks(groups);
  Array<uint8_t> outliers(groups);
  const float nonfinite = find_outliers(x, groups, sizeof(T) == 4 || !in_bytes(in.codes), peaks, outliers);
  for (int64_t s = 0; s < groups; s++) {
    const int64_t at = s * in.batch + b, quad = at * QUADS;
    const bool outlier = in.sixteen_bits[at] = outliers[s];
    if (!outlier) std::memset(in.second + quad, 0, QUADS * sizeof(int32_t));  // read where another row has an outlier
    int32_t sums[2];
    quantize_activation_group(x + s * GROUP, peaks[s], outlier, outlier, in.codes, in.first + quad, in.second + quad,
                              sums);
    in.scales[at] = peaks[s] * (1 / 127.f) * (outlier ? 1 / 256.f : 1.f) + nonfinite;
    for (int i = 0; i < in.codes.scales; i++) {
      const int64_t to = (s * in.codes.scales + i) * in.batch + b;
      in.total[to] = in.scales[at] * sums[i];
      in.start[to] = (lowered_by(in.codes) - in.codes.zero()) * sums[i];
    }
  }
}

#ifdef __AMX_BF16__
inline void pair(Input& in, const float* x, int64_t batch, int64_t n) {
  const int64_t columns = in.columns = min(batch, BLOCK_ROWS), groups = (batch + columns - 1) / columns;
  in.pairs.resize(groups * columns * in.width);
  std::memset(in.pairs.data, 0, groups * columns * in.width * sizeof(uint16_t));
  for (int64_t b = 0; b < batch; b++) {
    uint32_t* to = (uint32_t*)(in.pairs + b / columns * columns * in.width) + b % columns;
    for (int64_t i = 0; i < n; i += LANES) {
      const u16 v = rounded(load_first(x + b * n + i, n - i));
      uint32_t both[LANES / 2];
      std::memcpy(both, &v, sizeof v);
      for (int64_t k = 0; k < LANES / 2 && i + 2 * k < n; k++) to[(i / 2 + k) * columns] = both[k];
    }
  }
}
#endif

// Calls f(first, last) for ranges of a few rows: in several threads where there are enough of them.
template <typename F>
void each_row(const Pool* pool, int64_t rows, const F& f) {
  constexpr int64_t FEW = 4;  // rows that take no longer than the start of a job
  pool != nullptr&& rows > FEW ? parallel(*pool, rows, f) : f(0, rows);
}

// Packs x (batch, n) for dot products with rows of `kind`. Only bfloat16 dot products round it to bfloat16.
template <typename T>
inline void pack(Input& in, Kind kind, const float* x, int64_t batch, int64_t n, const Pool* pool = nullptr) {
  in.batch = batch;
  int64_t w = in.width = groups_of(n) * GROUP;
  if (quantized(kind)) {
    const int64_t all = batch * w / GROUP;
    in.codes = codes_of(kind);
    in.first.resize(all * QUADS), in.second.resize(all * QUADS), in.sixteen_bits.resize(all), in.scales.resize(all);
    in.total.resize(all * in.codes.scales), in.start.resize(all * in.codes.scales);
    each_row(pool, batch, [&](int64_t first, int64_t last) {
      Array<float> row(w);
      std::memset(row + n, 0, (w - n) * sizeof(float));
      for (int64_t b = first; b < last; b++) {
        std::memcpy(row, x + b * n, n * sizeof(float));
        quantize_input_row<T>(in, row, b);
      }
    });
    return;
  }
#ifdef BF16_DOTS
  if (kind == Kind::BFLOAT16) {
    in.halves.resize(batch * w);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = 0; i < w; i += LANES)
        store((bf16*)(in.halves + b * w + i), i < n ? load_first(x + b * n + i, n - i) : f32{});
    return;
  }
#endif
  in.floats.resize(batch * w);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t i = 0; i < w; i++) {
      int64_t at = kind == Kind::FLOAT32 ? i : i / GROUP * GROUP + i % 2 * (GROUP / 2) + i % GROUP / 2;
      in.floats[b * w + at] = i < n ? x[b * n + i] : 0;
    }
}

}  // namespace ISA
