// Converts the tensors of a call to the kernels' structs. Refuses any that would make a kernel read out of bounds.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <vector>

#include "isa.h"

using at::Tensor;
// A matrix: {floats}, or {codes, scales} with minimums or a table after them, and last the factors of int8 scales.
using at::TensorList;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline bool is_float32(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "float32 or bfloat16, not ",
              x.scalar_type());
  return x.scalar_type() == at::kFloat;
}

// The data of a contiguous tensor of n elements of x's dtype; nullptr for an empty tensor.
inline const void* data_like(const Tensor& t, const Tensor& x, int64_t n, const char* what) {
  if (t.numel() == 0) return nullptr;
  TORCH_CHECK(t.is_contiguous() && t.numel() == n && t.scalar_type() == x.scalar_type(), what, ": expected ", n,
              " contiguous elements of ", x.scalar_type(), ", not ", t.sizes(), " of ", t.scalar_type());
  return t.const_data_ptr();
}

// flags: 1 for a late cast, 2 for a gain 1+w.
inline Norm norm_args(const Tensor& gain, double eps, int64_t flags, const Tensor& x, int64_t dim) {
  return {data_like(gain, x, dim, "gain"), (float)eps, (flags & 1) != 0, (float)(flags >> 1 & 1)};
}

// The row where the next part of a matrix begins, after `rows` rows: a quantized part begins with a new block.
inline int64_t next_part(int64_t rows, bool quantized) { return quantized ? round_up(rows, 16) : rows; }

// Matrices in one list: a tensor that is neither float16 nor int8 begins a new one.
inline std::vector<TensorList> split_matrices(TensorList tensors) {
  std::vector<TensorList> matrices;
  for (size_t i = 0, end; i < tensors.size(); i = end) {
    for (end = i + 1;
         end < tensors.size() && (tensors[end].scalar_type() == at::kHalf || tensors[end].scalar_type() == at::kChar);)
      end++;
    matrices.push_back(tensors.slice(i, end - i));
  }
  return matrices;
}

inline Matrix matrix(TensorList w, int64_t rows, int64_t columns, const Tensor& bias, const Tensor& x) {
  TORCH_CHECK(w.size() >= 1 && w.size() <= 4, "a matrix is one to four tensors");
  for (const auto& t : w)
    TORCH_CHECK(t.is_contiguous() && t.device().is_cpu(), "a matrix must be contiguous and on the CPU");
  Matrix m{};
  m.rows = rows, m.columns = columns, m.data = w[0].const_data_ptr(), m.bias = data_like(bias, x, rows, "bias");
  if (w.size() == 1) {
    m.kind = is_float32(w[0]) ? Kind::FLOAT32 : Kind::BFLOAT16;
    TORCH_CHECK(
        w[0].scalar_type() == x.scalar_type() && w[0].dim() == 2 && w[0].size(0) == rows && w[0].size(1) == columns,
        "a matrix of ", rows, " x ", columns, " ", x.scalar_type(), ", not ", w[0].sizes(), " ", w[0].scalar_type());
    return m;
  }
  const int64_t lines = round_up(rows, 16), groups = round_up(columns, 32) / 32;
  const bool super_scales = w.size() > 2 && w.back().dim() == 4;  // with int8 scales
  const size_t size = w.size() - (super_scales ? 1 : 0);
  const bool has_table = size == 3 && w[2].dim() == 1;
  for (int i = (int)Kind::INT2; i <= (int)Kind::TABLE_G16; i++) {
    const Codes& c = CODES[i];
    // How many scales a row has tells how many groups share one: no two shifts have the same number, unless it is one.
    int64_t n = c.scales * groups;
    int shift = 0;
    while (!super_scales && c.scales == 1 && n > 1 && w[1].numel() < lines * n) n = ((groups - 1) >> ++shift) + 1;
    if (w[0].sizes() == at::IntArrayRef({lines / 16, groups, c.bits, 16, 4}) && w[1].numel() == lines * n &&
        c.has_table == has_table && c.has_min == (size == 3 && !has_table))
      m.kind = (Kind)i, m.row_scales = n, m.shift = shift;
  }
  const at::ScalarType of_scales = super_scales ? at::kChar : at::kHalf;
  TORCH_CHECK(size < 4 && w[0].scalar_type() == at::kByte && w[1].scalar_type() == of_scales && quantized(m.kind),
              "codes and scales of ", rows, " x ", columns, " in a known format, not ", w[0].sizes(), " ",
              w[0].scalar_type(), " and ", w[1].sizes(), " ", w[1].scalar_type());
  m.scales = w[1].const_data_ptr();
  if (super_scales) {
    m.row_super_scales = (groups + 7) / 8 * (CODES[(int)m.kind].has_min ? 2 : 1);
    TORCH_CHECK(w.back().scalar_type() == at::kHalf && w.back().numel() == lines * m.row_super_scales,
                "factors of the scales, float16, for 256 columns of ", lines, " rows, not ", w.back().sizes(), " ",
                w.back().scalar_type());
    m.super_scales = (const uint16_t*)w.back().const_data_ptr();
  }
  if (size < 3) return m;
  TORCH_CHECK(
      w[2].scalar_type() == (has_table ? at::kHalf : of_scales) && w[2].numel() == (has_table ? 16 : w[1].numel()),
      "minimums like the scales, or a table of 16, not ", w[2].sizes(), " ", w[2].scalar_type());
  if (!has_table) m.mins = w[2].const_data_ptr();
  for (int i = 0; has_table && i < 16; i++) {
    const float value = w[2].const_data_ptr<at::Half>()[i];
    TORCH_CHECK(value >= -128 && value <= 127 && value == std::floor(value), "whole numbers from -128 to 127, not ",
                value);
    m.table[i] = (uint8_t)(128 + (int)value);
  }
  return m;
}

inline Attention attention(const Tensor& x, int64_t batch, int64_t length, bool quantized, const Norm& q, const Norm& k,
                           const Tensor& k_cache, const Tensor& v_cache, const Tensor& pages, const Tensor& positions,
                           int64_t heads, int64_t window, double scale, double softcap) {
  Attention a{};
  a.batch = batch, a.length = length, a.heads = heads, a.window = window, a.q = q, a.k = k;
  a.codes = k_cache.scalar_type() == at::kChar;
  TORCH_CHECK(k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes() && k_cache.strides() == v_cache.strides() &&
                  k_cache.stride(3) == 1 && k_cache.stride(2) == k_cache.size(3) &&
                  (a.codes || k_cache.scalar_type() == x.scalar_type()) &&
                  v_cache.scalar_type() == k_cache.scalar_type(),
              "a cache of (pages, KV heads, positions, head_dim) ", x.scalar_type(),
              ", or (..., head_dim + 4) int8, not ", k_cache.sizes(), " ", k_cache.scalar_type());
  a.kv_heads = k_cache.size(1), a.cache_row = k_cache.size(3), a.head_dim = a.cache_row - (a.codes ? 4 : 0);
  a.cache_page = k_cache.stride(0), a.cache_head = k_cache.stride(1);
  TORCH_CHECK(batch > 0 && length > 0 && heads > 0 && a.kv_heads > 0 && a.head_dim > 0 && a.head_dim % 2 == 0 &&
                  heads % a.kv_heads == 0,
              "needs a token, an even head_dim, and heads that are a multiple of the KV heads; not ", heads,
              " heads for a cache of ", k_cache.sizes());
  const int64_t kv_rows = next_part(a.kv_heads * a.head_dim, quantized);
  a.k_at = next_part(heads * a.head_dim, quantized), a.v_at = a.k_at + kv_rows, a.width = a.v_at + kv_rows;
  a.scale = (float)scale, a.softcap = (float)softcap;
  TORCH_CHECK(positions.is_contiguous() && positions.scalar_type() == at::kLong && positions.numel() == batch * length,
              "positions of ", batch, " x ", length, " tokens, not ", positions.sizes());
  a.positions = positions.const_data_ptr<int64_t>();
  TORCH_CHECK(pages.dim() == 2 && pages.size(0) == batch && pages.size(1) > 0 && pages.is_contiguous() &&
                  pages.scalar_type() == at::kLong,
              "the pages of ", batch, " rows, int64, not ", pages.sizes(), " ", pages.scalar_type());
  a.pages = pages.const_data_ptr<int64_t>(), a.row_pages = pages.size(1), a.page_size = k_cache.size(2);
  TORCH_CHECK(a.row_pages == 1 || a.page_size % PAGE_MULTIPLE == 0, "several pages a row of a multiple of ",
              PAGE_MULTIPLE, " positions each, not ", a.page_size);
  for (int64_t i = 0; i < pages.numel(); i++)
    TORCH_CHECK(a.pages[i] >= 0 && a.pages[i] < k_cache.size(0), "page ", a.pages[i], " of ", k_cache.size(0));
  for (int64_t i = 0; i < batch * length; i++)
    TORCH_CHECK(a.positions[i] >= 0 && a.positions[i] < a.row_pages * a.page_size, "position ", a.positions[i],
                " in a cache of ", a.row_pages * a.page_size);
  a.k_cache = k_cache.data_ptr(), a.v_cache = v_cache.data_ptr();
  return a;
}

inline void set_rope(Attention& a, const Tensor& cos, const Tensor& sin) {
  a.pairs = cos.dim() > 0 ? cos.size(-1) : 0;
  const int64_t angles = a.batch * a.length * a.pairs;
  TORCH_CHECK(a.pairs > 0 && 2 * a.pairs <= a.head_dim, "cosines of 1 to ", a.head_dim / 2, " pairs, not ",
              cos.sizes());
  for (const auto* t : {&cos, &sin})
    TORCH_CHECK(t->is_contiguous() && t->scalar_type() == at::kFloat && t->numel() == angles && t->size(-1) == a.pairs,
                "cos and sin: ", angles, " float32, not ", t->sizes());
  a.cos = cos.const_data_ptr<float>(), a.sin = sin.const_data_ptr<float>();
}

inline void check_prompt(const Attention& a) {
  for (int64_t i = 0; i < a.batch * a.length; i++)
    TORCH_CHECK(a.positions[i] == a.positions[i / a.length * a.length] + i % a.length,
                "the positions of a prompt must be consecutive");
}

inline int64_t n_rows(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "rows of at least one number, not ", x.sizes());
  return x.numel() / x.size(-1);
}
