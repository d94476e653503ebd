// What an operator asks of the arithmetic, which is compiled once for each instruction set ("form").
// Nothing here comes from a library: an inline function compiled for AVX-512 must not end up in another form's hands.
#pragma once

#include <cstdint>

enum class Kind { FLOAT32, BFLOAT16, INT8, INT4 };

// rows x columns. Floats lie as PyTorch has them; codes in blocks of 16 rows and 32 columns, padded: see rows.h.
struct Matrix {
  Kind kind;
  int64_t rows, columns;
  const void* data;
  const uint16_t* scales;  // float16
  const uint16_t* mins;    // float16, of INT4
  const void* bias;        // as the stream; nullptr where there is none
};

// RMSNorm with a gain as the stream; nullptr where there is no norm.
struct Norm {
  const void* gain;
  float eps;
  bool late;
};

struct Attention {
  int64_t batch, length;  // length: new tokens of each row
  int64_t heads, kv_heads, head_dim;
  int64_t k_at, v_at;  // where k and v begin in a row of q, k and v
  Norm q, k;
  const float *cos, *sin;  // (batch, length, head_dim / 2)
  void *k_cache, *v_cache;
  int64_t cache_row, cache_head;  // elements from one row, one head, of the cache to the next
  const int64_t* positions;       // (batch, length): where the new tokens stand
  int64_t window;                 // positions that a token sees, its own included; 0: all
};

// Runs work(context, first, last) on chunks of 0..n in several threads, and waits for all.
using Work = void (*)(void* context, int64_t first, int64_t last);
struct Pool {
  void (*run)(void* self, int64_t n, Work work, void* context);
  // Says what the next run reads: parts of so many bytes, of each a stretch for each thread
  void (*prefetch_next)(void* self, const void* data, int64_t bytes, int parts);
  void* self;
};

struct Kernels {
  // out (batch, dim) = x + o(attention(qkv(norm(x)))), for one new token a row; `next` is the gate_up that follows
  void (*decode_attention)(const void* x, const Norm&, const Matrix& qkv, const Attention&, const Matrix& o,
                           const Matrix& next, void* out, Pool);
  // out (batch, dim) = x + down(silu(gate(y)) * up(y)), y = norm(x); up begins at row up_at of gate_up; `next` follows
  void (*decode_feed_forward)(const void* x, const Norm&, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                              const Matrix* next, int64_t batch, void* out, Pool);
  // The same for the tokens of one row, (length, dim)
  void (*prefill_attention)(const void* x, const Norm&, const Matrix& qkv, const Attention&, const Matrix& o, void* out,
                            Pool);
  void (*prefill_feed_forward)(const void* x, const Norm&, const Matrix& gate_up, int64_t up_at, const Matrix& down,
                               int64_t count, void* out, Pool);
  // out (batch, rows) float32 = x (batch, columns) times the matrix
  void (*gemv)(const void* x, const Matrix&, int64_t batch, void* out, Pool);
  // out (count, rows), as the stream, = x (count, columns) times the matrix
  void (*gemm)(const void* x, const Matrix&, int64_t count, void* out, Pool);
  // out (count, n), as the stream, = the norm of each row of x
  void (*rms_norm)(const void* x, const Norm&, int64_t count, int64_t n, void* out, Pool);
  // out (n, columns), as the stream, = some rows of a matrix of codes
  void (*dequantize_rows)(const Matrix&, const int64_t* at, int64_t n, void* out, Pool);
  // Rows x (n, columns), as the stream, become the matrix's codes; false where one holds a number that no scale does
  bool (*quantize)(const void* x, int64_t n, const Matrix&, Pool);
  // The same of n rows of GGUF's blocks, of 32 columns and so many bytes
  bool (*repack)(const uint8_t* blocks, int64_t bytes, int64_t n, const Matrix&, Pool);
};

// Of a float32 model, and of a bfloat16 one.
extern const Kernels kernels_avx2[2], kernels_avx512[2], kernels_avx512_bf16[2], kernels_amx[2];
