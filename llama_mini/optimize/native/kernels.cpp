// The kernels of one ISA variant. This file is compiled once for each; the macro ISA names its namespace.

#include "prefill.h"
#include "quantize.h"

namespace ISA {

// Packs the rows of x (batch, m.columns), normalized if there is a norm, for `gemv_block`.
template <typename T>
void pack_rows(Input& in, const Matrix& m, const void* x, const Norm& norm, int64_t batch, Pool pool) {
  const int64_t n = m.columns;
  Array<float> rows(batch * n);
  each_row(&pool, batch, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) norm_row<T>((const T*)x + b * n, norm, n, rows + b * n);
  });
  pack<T>(in, m, rows, batch, pool);
}

// out (batch, stride) = packed rows times the matrix.
template <typename T>
void gemv_packed(const Matrix& m, const Input& in, float* out, int64_t stride, Pool pool) {
  parallel(pool, n_blocks(m), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const AmxRegisters registers(in.columns);
    Array<float> y(in.batch * BLOCK_ROWS);
    for (int64_t t = first; t < last; t++) {
      gemv_block<T>(m, t, in, y);
      for (int64_t b = 0; b < in.batch; b++)
        copy_row(y + b * BLOCK_ROWS, block_rows(m, t), out + b * stride + t * BLOCK_ROWS);
    }
  });
}

// out (batch, rows) = the sum of x and y times the matrix.
template <typename T>
void gemv_add(const Matrix& m, const float* y, int64_t batch, const T* x, const Sum& sum, T* out, Pool pool) {
  Input in;
  pack<T>(in, m, y, batch, pool);
  if (!is_plain(sum)) {
    const int64_t n = m.rows;
    Array<float> all(batch * n);
    gemv_packed<T>(m, in, all, n, pool);
    return each_row(&pool, batch, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++) add_row(x + b * n, (const float*)all + b * n, sum, n, out + b * n);
    });
  }
  parallel(pool, n_blocks(m), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const AmxRegisters registers(in.columns);
    Array<float> part(batch * BLOCK_ROWS);
    for (int64_t t = first; t < last; t++) {
      gemv_block<T>(m, t, in, part);
      for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0, n = block_rows(m, t); i < n; i += LANES) {
          const int64_t at = b * m.rows + t * BLOCK_ROWS + i;
          store_first(out + at, load_first(x + at, n - i) + load(part + b * BLOCK_ROWS + i), n - i);
        }
    }
  });
}

// Lets waiting threads prefetch the next matrix, which has `parts` equal parts (gate and up).
template <typename T>
void prefetch_next(Pool pool, const Matrix& m, int parts = 1) {
  const Matrix part = slice_rows<T>(m, m.rows / parts / BLOCK_ROWS * BLOCK_ROWS, 0);
  pool.prefetch_next(pool.self, m.data, (const char*)part.data - (const char*)m.data, parts);
}

template <typename T>
void decode_attention(const void* x, const Norm& norm, const Matrix& qkv, const Attention& a, const Matrix& o,
                      const Sum& sum, const Matrix& next, void* out, Pool pool) {
  Array<float> projected(a.batch * a.width), y(a.batch * o.columns);
  int64_t at = 0;
  for (const Matrix* part = &qkv; part != nullptr; at += n_blocks(*part) * BLOCK_ROWS, part = part->rest) {
    Input in;
    pack_rows<T>(in, *part, x, norm, a.batch, pool);
    prefetch_next<T>(pool, part->rest != nullptr ? *part->rest : o);
    gemv_packed<T>(*part, in, projected + at, a.width, pool);
  }
  auto each = [&](int64_t rows, const auto& f) { each_row(&pool, rows, f); };
  attend_decode<T>(norm_whole<T>(a, projected.data, a.width, a.batch, each), projected, a.width, y, pool);
  prefetch_next<T>(pool, next, 2);
  gemv_add<T>(o, y, a.batch, (const T*)x, sum, (T*)out, pool);
}

template <typename T>
void attend(const void* qkv, const Attention& a, void* out, Pool pool) {
  const int64_t q_dim = a.heads * a.head_dim;
  Array<float> rows(a.batch * a.width), y(a.batch * q_dim);
  copy_row((const T*)qkv, a.batch * a.width, (float*)rows);
  attend_decode<T>(a, rows, a.width, y, pool);
  copy_row((const float*)y, a.batch * q_dim, (T*)out);
}

template <typename T>
void decode_feed_forward(const void* x, const Norm& norm, const Matrix& gate_up, int64_t up_at, Activation act,
                         const Matrix& down, const Sum& sum, const Matrix* next, int64_t batch, void* out, Pool pool) {
  const int64_t hidden = down.columns;
  Array<float> y(batch * hidden);
  Input in;
  pack_rows<T>(in, gate_up, x, norm, batch, pool);
  const Matrix gate = slice_rows<T>(gate_up, 0, hidden), up = slice_rows<T>(gate_up, up_at, hidden);
  prefetch_next<T>(pool, down);
  parallel(pool, n_blocks(gate), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const AmxRegisters registers(in.columns);
    Array<float> g(batch * BLOCK_ROWS), u(batch * BLOCK_ROWS);
    for (int64_t t = first; t < last; t++) {
      gemv_block<T>(gate, t, in, g);
      gemv_block<T>(up, t, in, u);
      for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0, n = block_rows(gate, t); i < n; i += LANES) {
          f32 v = activated(act, load(g + b * BLOCK_ROWS + i)) * load(u + b * BLOCK_ROWS + i);
          store_first(y + b * hidden + t * BLOCK_ROWS + i, v, n - i);
        }
    }
  });
  if (next != nullptr) prefetch_next<T>(pool, *next);
  gemv_add<T>(down, y, batch, (const T*)x, sum, (T*)out, pool);
}

template <typename T>
void gemv(const void* x, const Norm& norm, const Matrix& m, int64_t batch, void* out, Pool pool) {
  Input in;
  pack_rows<T>(in, m, x, norm, batch, pool);
  gemv_packed<T>(m, in, (float*)out, m.rows, pool);
}

inline void likeliest(const float* logits, int64_t count, int64_t n, int64_t* out, Pool pool) {
  parallel(pool, count, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* x = logits + row * n;
      f32 most = splat(*x), zeros = {};
      for (int64_t i = 0; i + LANES <= n; i += LANES) {
        most = max(load(x + i), most);
        zeros += load(x + i) * 0.f;
      }
      float top = largest(most), zero = sum(zeros);  // NaN if one is not finite
      for (int64_t i = n / LANES * LANES; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        zero += x[i] * 0.f;
      }
      int64_t at = 0;
      while (zero == 0 && x[at] != top) at++;
      out[row] = zero == 0 ? at : -1;
    }
  });
}

template <typename T>
void rms_norm_rows(const void* x, const Norm& norm, int64_t count, int64_t n, void* out, Pool pool) {
  parallel(pool, count, [&](int64_t first, int64_t last) {
    Array<float> row(n);
    for (int64_t i = first; i < last; i++) {
      rms_norm<T>((const T*)x + i * n, norm, n, row);
      copy_row((const float*)row, n, (T*)out + i * n);
    }
  });
}

template <typename T>
void dequantize_rows(const Matrix& m, const int64_t* at, int64_t n, void* out, Pool pool) {
  const Codes codes = codes_of(m.kind);
  const int64_t groups = groups_of(m.columns);
  parallel(pool, n, [&](int64_t first, int64_t last) {
    Array<float> row(groups * GROUP);
    for (int64_t i = first; i < last; i++) {
      if (!quantized(m.kind)) {
        std::memcpy((T*)out + i * m.columns, (const T*)m.data + at[i] * m.columns, m.columns * sizeof(T));
        continue;
      }
      for (int64_t quad = 0; quad < groups * QUADS; quad++) {
        const int64_t block = at[i] / BLOCK_ROWS, lane = at[i] % BLOCK_ROWS, group = quad / QUADS;
        const uint8_t* q = (const uint8_t*)m.data + (block * groups + group) * codes.group_bytes() + 4 * lane;
        const uint32_t four = load_quad<uint32_t>(m, m.kind, q, quad % QUADS);
        const int half = quad % QUADS * 2 / QUADS;
        const float step = scale_of(m, m.kind, false, block, group, half, lane);
        const float min = codes.has_min ? scale_of(m, m.kind, true, block, group, half, lane) : -codes.zero() * step;
        for (int c = 0; c < 4; c++) row[4 * quad + c] = step * (four >> 8 * c & 255) + min;
      }
      copy_row((const float*)row, m.columns, (T*)out + i * m.columns);
    }
  });
}

template <typename T>
void gemm(const void* x, const Norm& norm, const Matrix& m, int64_t count, void* out, Pool pool) {
  gemm_tokens<T>(tokens_of((const T*)x, norm, m.columns, pool), m, count, nullptr, (T*)out, m.rows, pool);
}

template <typename T>
bool quantize(const void* x, int64_t n, const Matrix& m, Pool pool) {
  return (m.mins != nullptr ? quantize_rows<T, true> : quantize_rows<T, false>)((const T*)x, n, m, pool);
}

template <typename T>
constexpr Kernels kernels_of() {
  return {decode_attention<T>,
          attend<T>,
          decode_feed_forward<T>,
          prefill_attention<T>,
          prefill_feed_forward<T>,
          gemv<T>,
          likeliest,
          gemm<T>,
          rms_norm_rows<T>,
          dequantize_rows<T>,
          quantize<T>,
          pack,
          repack};
}

}  // namespace ISA

#define JOIN(a, b) a##b
#define NAME(isa) JOIN(kernels_, isa)
const Kernels NAME(ISA)[2] = {ISA::kernels_of<float>(), ISA::kernels_of<ISA::bf16>()};
