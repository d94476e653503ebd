// The kernels, compiled once for each ISA variant (avx2, neon, ...), and their arguments.
//
// No inline function of a library may be used: the linker keeps one copy for all variants, maybe compiled for AVX-512.
#pragma once

#include <cstdint>

enum class Kind {
  FLOAT32,
  BFLOAT16,
  INT2,
  INT3,
  INT4,
  INT5,
  INT6,
  INT4SYM,
  INT8,
  INT2G16,
  INT3G16,
  INT6G16,
  TABLE,
  TABLE_G16
};

// The codes of a kind (codes.h): `scales` of 32 columns of a row, with a minimum each, or what codes mean in a table.
// If it is one, several times 32 columns may share it: Matrix::shift.
struct Codes {
  int bits, scales;
  bool has_min, has_table;
  constexpr int zero() const { return has_min ? 0 : has_table ? 128 : 1 << (bits - 1); }  // the code that means 0
  constexpr int64_t group_bytes() const { return 64 * bits; }  // of a block of 16 rows and 32 columns
};
// Static, so that each ISA variant has its own.
static constexpr Codes CODES[] = {
    {},
    {},
    {2, 1, true, false},
    {3, 1, true, false},
    {4, 1, true, false},
    {5, 1, true, false},
    {6, 1, true, false},
    {4, 1, false, false},
    {8, 1, false, false},
    {2, 2, true, false},
    {3, 2, false, false},
    {6, 2, false, false},
    {4, 1, false, true},
    {4, 2, false, true},
};
static constexpr Codes codes_of(Kind kind) { return CODES[(int)kind]; }
static constexpr bool quantized(Kind kind) { return kind >= Kind::INT2; }

// rows x columns. Floats as PyTorch stores them; quantized weights in padded blocks of 16 rows and 32 columns
// (codes.h).
struct Matrix {
  Kind kind;
  int64_t rows, columns;
  const void* data;
  const void* scales;            // of quantized weights, float16; with `super_scales` int8
  const void* mins;              // the same; nullptr if its kind has none
  const uint16_t* super_scales;  // float16, the factors of 256 columns' scales and of their minimums; nullptr if none
  int64_t row_scales;            // scales of a row, also in its last, incomplete group
  int64_t row_super_scales;      // of a row
  int shift;                     // log2 of how many times 32 columns share a scale
  uint8_t table[16];             // of a kind with a table: what each code means, plus 128
  const void* bias;              // of the model's dtype; nullptr if there is none
  const Matrix* rest;            // of q, k and v: the rows that follow, in another format; nullptr if there are none
};

// Moves the scales, minimums and their factors on by some rows, a multiple of 16.
static inline void skip_scales(Matrix& m, int64_t rows) {
  const int64_t bytes = rows * m.row_scales * (m.super_scales != nullptr ? 1 : 2);
  if (m.scales != nullptr) m.scales = (const char*)m.scales + bytes;
  if (m.mins != nullptr) m.mins = (const char*)m.mins + bytes;
  if (m.super_scales != nullptr) m.super_scales += rows * m.row_super_scales;
}

// RMSNorm, with a gain of the model's dtype, to which `offset`, 0 or 1, is added; nullptr if there is no norm.
struct Norm {
  const void* gain;
  float eps;
  bool late;
  float offset;
};

// A residual sum: post(x_scale * x + y_scale * out(y)).
struct Sum {
  Norm out, post;
  float x_scale, y_scale;
};

enum class Activation { SILU, GELU_TANH };

static constexpr int64_t PAGE_MULTIPLE = 256;  // positions that attention reads from one page

struct Attention {
  int64_t batch, length;  // decoding: the tokens, of any rows, and 1; prefill: 1, and the tokens of one row
  int64_t heads, kv_heads, head_dim;
  int64_t k_at, v_at, width;  // where k and v begin in a row of q, k and v, and its length
  Norm q, k;
  bool whole_q, whole_k;   // whether their norms are over all heads at once
  const float *cos, *sin;  // (batch, length, pairs); nullptr if q and k are not rotated here
  int64_t pairs;           // the elements i and i + pairs of a head are rotated together, from i = 0 on
  void *k_cache, *v_cache;
  bool codes;  // whether the cache holds codes of 8 bits, each position's before its scale, a float32; else the dtype
  int64_t cache_page, cache_head, cache_row;  // elements between pages, heads and positions of the cache
  int64_t page_size, row_pages;               // positions of a page, and pages of a row
  const int64_t* pages;                       // (batch, row_pages): where the cache holds the positions of each row
  const int64_t* positions;                   // (batch, length): of the new tokens
  int64_t window;                             // positions that a token sees, its own included; 0: all
  float scale, softcap;                       // the factor of q·k; c replaces a score x by c·tanh(x / c); 0: x stays
};

// Runs work(context, first, last) on chunks of 0..n in several threads, and waits for all of them.
using Work = void (*)(void* context, int64_t first, int64_t last);
struct Pool {
  void (*run)(void* self, int64_t n, Work work, void* context);
  // Announces what the next run reads: `parts` parts of `bytes` bytes each. A thread reads its own range of each part.
  void (*prefetch_next)(void* self, const void* data, int64_t bytes, int parts);
  void* self;
};

struct Kernels {
  // out (batch, dim) = x + o(attention(qkv(norm(x)))), for tokens of any rows; `next` is the gate_up that follows.
  void (*decode_attention)(const void* x, const Norm&, const Matrix& qkv, const Attention&, const Matrix& o, const Sum&,
                           const Matrix& next, void* out, Pool);
  // out (batch, heads * head_dim) = attention(qkv), for tokens of any rows, without norms or a rotation.
  void (*attend)(const void* qkv, const Attention&, void* out, Pool);
  // out (batch, dim) = x + down(act(gate(y)) * up(y)), y = norm(x); up begins at row up_at of gate_up; `next` follows.
  void (*decode_feed_forward)(const void* x, const Norm&, const Matrix& gate_up, int64_t up_at, Activation,
                              const Matrix& down, const Sum&, const Matrix* next, int64_t batch, void* out, Pool);
  // The same for the tokens of one row, (length, dim).
  void (*prefill_attention)(const void* x, const Norm&, const Matrix& qkv, const Attention&, const Matrix& o,
                            const Sum&, void* out, Pool);
  void (*prefill_feed_forward)(const void* x, const Norm&, const Matrix& gate_up, int64_t up_at, Activation,
                               const Matrix& down, const Sum&, int64_t count, void* out, Pool);
  // out (batch, rows) float32 = norm(x) (batch, columns) times the matrix. The other kernels' out has the model's
  // dtype.
  void (*gemv)(const void* x, const Norm&, const Matrix&, int64_t batch, void* out, Pool);
  // out (count) = the first largest of each n logits; -1 if one of them is not finite.
  void (*likeliest)(const float* logits, int64_t count, int64_t n, int64_t* out, Pool);
  // out (count, rows) = norm(x) (count, columns) times the matrix.
  void (*gemm)(const void* x, const Norm&, const Matrix&, int64_t count, void* out, Pool);
  // out (count, n) = the norm of each row of x.
  void (*rms_norm)(const void* x, const Norm&, int64_t count, int64_t n, void* out, Pool);
  // out (n, columns) = rows of a matrix as floats.
  void (*dequantize_rows)(const Matrix&, const int64_t* at, int64_t n, void* out, Pool);
  // Quantizes rows x (n, columns) into the matrix. False if x is not finite, or a scale or minimum exceeds float16.
  bool (*quantize)(const void* x, int64_t n, const Matrix&, Pool);
  // Stores n rows of codes, a byte each, with the scales and minimums of their groups, without requantizing them.
  bool (*pack)(const uint8_t* codes, const void* scales, const void* mins, const uint16_t* super_scales, int64_t n,
               const Matrix&, Pool);
  // The same from n rows of GGUF blocks, each of 32 columns and `bytes` bytes.
  bool (*repack)(const uint8_t* blocks, int64_t bytes, int64_t n, const Matrix&, Pool);
};

// [0] for a float32 model, [1] for a bfloat16 one.
#ifdef __x86_64__
extern const Kernels kernels_avx2[2], kernels_avx512[2], kernels_avx512_bf16[2], kernels_amx[2];
#else
extern const Kernels kernels_neon[2], kernels_neon_bf16[2];
#endif
