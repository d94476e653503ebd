// The operators of torch.ops.llama_mini: they check their arguments and call the kernels of this processor's ISA
// variant.

#include <torch/library.h>

#include "layers.h"

namespace {

// Threads for an operator that touches each of n numbers once. Starting a second thread takes longer than two million
// numbers, and much longer on a busy machine.
int64_t threads_for(int64_t n) { return std::max<int64_t>(1, n >> 21); }

// --- the operators ---

// Attention of tokens of any rows; qkv (batch, 1, heads + 2 KV heads, head_dim) is normed and rotated. Appends the new
// keys and values to the cache. softcap 0: none.
Tensor attend(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& pages,
              const Tensor& positions, int64_t window, double scale, double softcap) {
  TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 1 && qkv.is_contiguous() && k_cache.dim() == 4,
              "one token of each row, in one piece, not ", qkv.sizes());
  const int64_t batch = qkv.size(0), heads = qkv.size(2) - 2 * k_cache.size(1);
  const Kernels& kernels = kernels_for(is_float32(qkv));
  const Attention a = attention(qkv, batch, 1, false, Norm{}, Norm{}, k_cache, v_cache, pages, positions, heads, window,
                                scale, softcap);
  TORCH_CHECK(qkv.size(3) == a.head_dim, "the cache's head_dim, ", a.head_dim, ", not ", qkv.size(3));
  Tensor out = at::empty({batch, 1, heads * a.head_dim}, qkv.options());
  with_pool([&](Pool pool) { kernels.attend(qkv.const_data_ptr(), a, out.data_ptr(), pool); });
  return out;
}

// x times a matrix by gemv or gemm, whose output has this dtype.
Tensor times(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows, at::ScalarType dtype,
             decltype(&Kernels::gemv) kernel) {
  const int64_t n = n_rows(x);
  const Kernels& kernels = kernels_for(is_float32(x));
  const Tensor from = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  Tensor out = at::empty(sizes, x.options().dtype(dtype));
  const Matrix m = matrix(w, rows, x.size(-1), bias, x);
  with_pool([&](Pool pool) { (kernels.*kernel)(from.const_data_ptr(), Norm{}, m, n, out.data_ptr(), pool); });
  return out;
}

Tensor gemv(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, at::kFloat, &Kernels::gemv);
}

Tensor gemm(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, x.scalar_type(), &Kernels::gemm);
}

Tensor rms_norm(const Tensor& x, const Tensor& gain, double eps, int64_t flags) {
  TORCH_CHECK(gain.numel() > 0, "the gain is empty");
  const int64_t count = n_rows(x), n = x.size(-1);
  const Kernels& kernels = kernels_for(is_float32(x));
  const Tensor from = x.contiguous();
  const Norm norm = norm_args(gain, eps, flags, x, n);
  Tensor out = at::empty(x.sizes(), x.options());
  with_pool([&](Pool pool) { kernels.rms_norm(from.const_data_ptr(), norm, count, n, out.data_ptr(), pool); },
            threads_for(x.numel()));
  return out;
}

Tensor dequantize_rows(TensorList w, const Tensor& at, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK(w.size() > 1 && w[0].dim() > 0 && columns > 0, "quantized weights of at least one column");
  TORCH_CHECK(at.scalar_type() == at::kLong, "row numbers must be int64, not ", at.scalar_type());
  const Tensor numbers = at.contiguous();
  const int64_t n = at.numel(), *first = numbers.const_data_ptr<int64_t>();
  auto sizes = at.sizes().vec();
  sizes.push_back(columns);
  Tensor out = at::empty(sizes, w[0].options().dtype(dtype));
  const Kernels& kernels = kernels_for(is_float32(out));
  const Matrix m = matrix(w, w[0].size(0) * 16, columns, at::empty({0}, out.options()), out);
  for (int64_t i = 0; i < n; i++)
    TORCH_CHECK_INDEX(first[i] >= 0 && first[i] < m.rows, "row ", first[i], " of ", m.rows);
  with_pool([&](Pool pool) { kernels.dequantize_rows(m, first, n, out.data_ptr(), pool); }, threads_for(n * columns));
  return out;
}

// The blocks of a quantized matrix that hold n rows, from block `block` on.
Matrix blocks_of(TensorList w, int64_t block, int64_t n, int64_t columns, const Tensor& like) {
  TORCH_CHECK(w.size() > 1 && w[0].dim() > 0 && n > 0 && columns > 0 && block >= 0 &&
                  block + round_up(n, 16) / 16 <= w[0].size(0),
              "quantized weights with memory for ", n, " rows of ", columns, " from block ", block, " on");
  Matrix m = matrix(w, w[0].size(0) * 16, columns, at::empty({0}, like.options()), like);
  const int64_t groups = round_up(columns, 32) / 32;
  m.data = (const char*)m.data + block * groups * codes_of(m.kind).group_bytes();
  skip_scales(m, block * 16);
  return m;
}

// quantize, pack and repack return false if x is not finite, or a scale or minimum exceeds float16.
bool quantize(const Tensor& x, TensorList w, int64_t block) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be two-dimensional and contiguous, not ", x.sizes());
  const Kernels& kernels = kernels_for(is_float32(x));
  const Matrix m = blocks_of(w, block, x.size(0), x.size(1), x);
  TORCH_CHECK((m.kind == Kind::INT8 || (m.mins != nullptr && codes_of(m.kind).scales == 1)) && m.shift == 0 &&
                  m.super_scales == nullptr,
              "floats become int8, or groups of 32 with a minimum");
  bool finite = false;
  with_pool([&](Pool pool) { finite = kernels.quantize(x.const_data_ptr(), x.size(0), m, pool); },
            threads_for(x.numel()));
  return finite;
}

// from: codes, (n, columns), the scales of their groups, (n, groups), and the minimums and factors if the matrix has
// them.
bool pack(TensorList from, TensorList w, int64_t block) {
  TORCH_CHECK(from.size() > 1, "needs codes and scales");
  const Tensor& codes = from[0];
  TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == at::kByte,
              "rows of codes in one piece, not ", codes.sizes(), " ", codes.scalar_type());
  const int64_t n = codes.size(0), columns = codes.size(1);
  const Matrix m = blocks_of(w, block, n, columns, at::empty({0}));
  const int64_t least = 32 / codes_of(m.kind).scales, groups = least == 32 ? m.row_scales : columns / least;
  const size_t size = m.mins != nullptr ? 3 : 2, factors = m.super_scales != nullptr ? 1 : 0;
  TORCH_CHECK(columns % least == 0 && from.size() == size + factors, "whole groups of ", least,
              " columns, minimums and factors of the scales if the matrix has them; not ", columns, " columns and ",
              from.size(), " tensors");
  for (size_t i = 1; i < from.size(); i++) {
    const Tensor& t = from[i];
    const at::ScalarType dtype = i < size && factors == 1 ? at::kChar : at::kHalf;
    const int64_t each = i < size ? groups : m.row_super_scales;
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == dtype && t.numel() == n * each, "scales, minimums or factors, ",
                n, " x ", each, " ", dtype, ", not ", t.sizes(), " ", t.scalar_type());
  }
  const void *scales = from[1].const_data_ptr(), *mins = size > 2 ? from[2].const_data_ptr() : nullptr;
  const auto super_scales = factors == 1 ? (const uint16_t*)from[size].const_data_ptr() : nullptr;
  bool finite = false;
  const Kernels& kernels = kernels_for(true);  // the same for both dtypes
  with_pool(
      [&](Pool pool) {
        finite = kernels.pack(codes.const_data_ptr<uint8_t>(), scales, mins, super_scales, n, m, pool);
      },
      threads_for(codes.numel()));
  return finite;
}

bool repack(const Tensor& blocks, TensorList w, int64_t columns, int64_t block) {
  TORCH_CHECK(blocks.dim() == 2 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte && columns % 32 == 0,
              "rows of blocks of 32 columns in one piece, not ", blocks.sizes(), " ", blocks.scalar_type());
  const Matrix m = blocks_of(w, block, blocks.size(0), columns, w[w.size() - 1]);
  const int64_t bytes = blocks.size(1) / (columns / 32);
  TORCH_CHECK(bytes * (columns / 32) == blocks.size(1) && m.shift == 0 && m.super_scales == nullptr &&
                  ((m.kind == Kind::INT8 && bytes == 34) || (m.kind == Kind::INT4SYM && bytes == 18) ||
                   (m.kind == Kind::INT4 && (bytes == 18 || bytes == 20))),
              "Q8_0 for 8 bits, Q4_0 or Q4_1 for 4, Q4_0 for 4 without minimums, not ", blocks.size(1), " bytes for ",
              columns, " columns");
  bool finite = false;
  const Kernels& kernels = kernels_for(true);  // the same for both dtypes: blocks are bytes
  with_pool(
      [&](Pool pool) { finite = kernels.repack(blocks.const_data_ptr<uint8_t>(), bytes, blocks.size(0), m, pool); },
      threads_for(blocks.size(0) * columns));
  return finite;
}

}  // namespace

TORCH_LIBRARY(llama_mini, m) {
  auto cpu = [](auto* f) { return torch::dispatch(at::kCPU, f); };
  m.def("isa_variants() -> str[]", isa_variants);
  m.def("use_isa(str name) -> ()", use_isa);
  m.def(
      "layers(Tensor x, Tensor[] ropes, Tensor[] pages, Tensor positions, Tensor(a!)[] k_caches, "
      "Tensor(b!)[] v_caches, Tensor[] gains, float[] eps, int[] flags, Tensor[] matrices, Tensor[] biases, "
      "int[] settings, float[] scales, int heads, int hidden) -> Tensor",
      cpu(layers));
  m.def(
      "step(Tensor tokens, Tensor[] embedding, Tensor[] ropes, Tensor[] pages, Tensor positions, "
      "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor[] gains, float[] eps, int[] flags, Tensor[] matrices, "
      "Tensor[] biases, int[] settings, float[] scales, int heads, int hidden, Tensor[] head, Tensor head_bias, "
      "int vocab, float embedding_scale, float logit_scale, float softcap) -> (Tensor, Tensor)",
      cpu(step));
  m.def(
      "attend(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pages, Tensor positions, int window, "
      "float scale, float softcap) -> Tensor",
      cpu(attend));
  m.def("gemv(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor", cpu(gemv));
  m.def("gemm(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor", cpu(gemm));
  m.def("rms_norm(Tensor x, Tensor gain, float eps, int flags) -> Tensor", cpu(rms_norm));
  m.def("dequantize_rows(Tensor[] w, Tensor at, int columns, ScalarType dtype) -> Tensor", cpu(dequantize_rows));
  m.def("quantize(Tensor x, Tensor(a!)[] w, int block) -> bool", cpu(quantize));
  m.def("pack(Tensor[] rows, Tensor(a!)[] w, int block) -> bool", cpu(pack));
  m.def("repack(Tensor blocks, Tensor(a!)[] w, int columns, int block) -> bool", cpu(repack));
}
