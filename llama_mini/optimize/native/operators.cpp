// The operators of torch.ops.llama_mini: they check their arguments and call the kernels of this processor's ISA
// variant.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "check_args.h"
#include "thread_pool.h"
#include "variants.h"

namespace {

Teamwork teamwork;

// Calls f(pool) with as many threads as PyTorch uses, but at most `most`; with one while several do not pay.
template <typename F>
void with_pool(const F& f, int64_t most = INT64_MAX) {
  const bool alone = at::in_parallel_region() || !teamwork.pays();
  const int64_t threads = alone ? 1 : std::min<int64_t>(most, at::get_num_threads()), begin = __rdtsc();
  ThreadPool pool(threads);
  int64_t leader = 0;
  // noexcept: PyTorch would wait forever for a thread that threw.
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) noexcept {
    if (first != 0) return pool.work(first);
    const int64_t start = __rdtsc();
    f(Pool{ThreadPool::run, ThreadPool::prefetch_next, &pool});
    leader = __rdtsc() - start;
    pool.finish();
  });
  if (threads > 1) teamwork.measured(__rdtsc() - begin, leader + pool.saved());
}

// Threads for an operator that touches each of n numbers once. Starting a second thread takes longer than two million
// numbers, and much longer on a busy machine.
int64_t threads_for(int64_t n) { return std::max<int64_t>(1, n >> 21); }

// --- the operators ---

// Takes new tokens through consecutive layers. x (N, 1, dim) are tokens of any rows, which decode; x (1, T, dim) are
// consecutive ones of one row, which prefill if T > 1. The two round differently; in neither do the bits of a token
// depend on the others. `pages` says where the cache holds the row of each. A layer has four gains (attention, q, k,
// feed-forward; empty if there is no norm), four matrices (qkv, o, gate_up, down), each in a format of its own, and
// four biases (empty if there is none; the whole list is empty if no layer has any).
Tensor layers(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& pages, const Tensor& positions,
              TensorList k_caches, TensorList v_caches, TensorList gains, at::ArrayRef<double> eps,
              at::IntArrayRef late, TensorList tensors, TensorList biases, at::IntArrayRef windows, int64_t heads,
              int64_t hidden) {
  const size_t n = k_caches.size();
  const std::vector<TensorList> matrices = split_matrices(tensors);
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  TORCH_CHECK(n > 0 && hidden > 0 && v_caches.size() == n && gains.size() == 4 * n && eps.size() == 4 * n &&
                  late.size() == 4 * n && matrices.size() == 4 * n && (biases.empty() || biases.size() == 4 * n) &&
                  windows.size() == n,
              "the lists of ", n, " layers differ in length");
  TORCH_CHECK(x.dim() == 3 && (x.size(0) == 1 || x.size(1) == 1),
              "x must hold one token of each row, or the tokens of one row, not ", x.sizes());
  const int64_t dim = x.size(-1), tokens = n_rows(x);
  const bool many = x.size(1) > 1;
  const Kernels& kernels = kernels_for(is_float32(x));
  auto norm = [&](size_t i, int64_t width) { return norm_args(gains[i], eps[i], late[i], x, width); };
  const Tensor no_bias = at::empty({0}, x.options());
  auto operand = [&](size_t i, int64_t rows, int64_t columns) {
    return matrix(matrices[i], rows, columns, biases.empty() ? no_bias : biases[i], x);
  };
  auto quantized = [&](size_t i) { return matrices[i].size() > 1; };
  std::vector<Attention> attentions;
  for (size_t i = 0; i < n; i++) {  // check everything before a cache is written
    TORCH_CHECK(k_caches[i].sizes() == k_caches[0].sizes(), "the caches differ in size: ", k_caches[i].sizes());
    attentions.push_back(attention(x, x.size(0), x.size(1), quantized(4 * i), norm(4 * i + 1, k_caches[i].size(-1)),
                                   norm(4 * i + 2, k_caches[i].size(-1)), k_caches[i], v_caches[i], pages, positions,
                                   heads, windows[i]));
    set_rope(attentions[i], cos, sin);
  }
  check_prompt(attentions[0]);
  std::vector<Norm> norms;
  std::vector<Matrix> operands;
  std::vector<int64_t> up_at;  // where up begins in a row of gate and up
  for (size_t i = 0; i < n; i++) {
    const Attention& a = attentions[i];
    up_at.push_back(next_part(hidden, quantized(4 * i + 2)));
    const int64_t qkv_rows = a.v_at + next_part(a.kv_heads * a.head_dim, quantized(4 * i));
    norms.insert(norms.end(), {norm(4 * i, dim), norm(4 * i + 3, dim)});
    operands.insert(operands.end(), {operand(4 * i, qkv_rows, dim), operand(4 * i + 1, dim, heads * a.head_dim),
                                     operand(4 * i + 2, 2 * up_at[i], dim), operand(4 * i + 3, dim, hidden)});
  }
  Tensor out = at::empty(x.sizes(), x.options()), between = at::empty(x.sizes(), x.options());
  with_pool([&](Pool pool) {
    const void* now = x.const_data_ptr();
    for (size_t i = 0; i < n; i++) {
      const Matrix *m = &operands[4 * i], *next = i + 1 < n ? m + 4 : nullptr;
      void* mid = between.data_ptr();
      if (many) {
        kernels.prefill_attention(now, norms[2 * i], m[0], attentions[i], m[1], mid, pool);
        kernels.prefill_feed_forward(mid, norms[2 * i + 1], m[2], up_at[i], m[3], tokens, out.data_ptr(), pool);
      } else {
        kernels.decode_attention(now, norms[2 * i], m[0], attentions[i], m[1], m[2], mid, pool);
        kernels.decode_feed_forward(mid, norms[2 * i + 1], m[2], up_at[i], m[3], next, tokens, out.data_ptr(), pool);
      }
      now = out.const_data_ptr();
    }
  });
  return out;
}

// Attention of tokens of any rows; qkv (batch, 1, heads + 2 KV heads, head_dim) is normed and rotated. Appends the new
// keys and values to the cache. softcap 0: none.
Tensor attend(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& pages,
              const Tensor& positions, int64_t window, double scale, double softcap) {
  TORCH_CHECK(
      qkv.dim() == 4 && qkv.size(1) == 1 && qkv.is_contiguous() && k_cache.dim() == 4 && qkv.size(3) == k_cache.size(3),
      "one token of each row, in one piece, with the cache's head_dim, not ", qkv.sizes());
  const int64_t batch = qkv.size(0), heads = qkv.size(2) - 2 * k_cache.size(1);
  const Kernels& kernels = kernels_for(is_float32(qkv));
  Attention a = attention(qkv, batch, 1, false, Norm{}, Norm{}, k_cache, v_cache, pages, positions, heads, window);
  a.scale = (float)scale, a.softcap = (float)softcap;
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
  with_pool([&](Pool pool) { (kernels.*kernel)(from.const_data_ptr(), m, n, out.data_ptr(), pool); });
  return out;
}

Tensor gemv(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, at::kFloat, &Kernels::gemv);
}

Tensor gemm(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, x.scalar_type(), &Kernels::gemm);
}

Tensor rms_norm(const Tensor& x, const Tensor& gain, double eps, bool late) {
  TORCH_CHECK(gain.numel() > 0, "the gain is empty");
  const int64_t count = n_rows(x), n = x.size(-1);
  const Kernels& kernels = kernels_for(is_float32(x));
  const Tensor from = x.contiguous();
  const Norm norm = norm_args(gain, eps, late, x, n);
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
  m.scales += block * m.row_scales * 16;
  if (m.mins != nullptr) m.mins += block * m.row_scales * 16;
  return m;
}

// quantize, pack and repack return false if x is not finite, or a scale or minimum exceeds float16.
bool quantize(const Tensor& x, TensorList w, int64_t block) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be two-dimensional and contiguous, not ", x.sizes());
  const Kernels& kernels = kernels_for(is_float32(x));
  const Matrix m = blocks_of(w, block, x.size(0), x.size(1), x);
  TORCH_CHECK((m.kind == Kind::INT8 || (m.mins != nullptr && codes_of(m.kind).scales == 1)) && m.shift == 0,
              "floats become int8, or groups of 32 with a minimum");
  bool finite = false;
  with_pool([&](Pool pool) { finite = kernels.quantize(x.const_data_ptr(), x.size(0), m, pool); },
            threads_for(x.numel()));
  return finite;
}

// from: codes, (n, columns), the scales of their groups, (n, groups), and the minimums if the matrix has them.
bool pack(TensorList from, TensorList w, int64_t block) {
  TORCH_CHECK(from.size() > 1, "needs codes and scales");
  const Tensor& codes = from[0];
  TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == at::kByte,
              "rows of codes in one piece, not ", codes.sizes(), " ", codes.scalar_type());
  const int64_t n = codes.size(0), columns = codes.size(1);
  const Matrix m = blocks_of(w, block, n, columns, at::empty({0}));
  const int64_t least = 32 / codes_of(m.kind).scales, groups = least == 32 ? m.row_scales : columns / least;
  TORCH_CHECK(columns % least == 0 && from.size() == (m.mins != nullptr ? 3 : 2), "whole groups of ", least,
              " columns, and minimums if the matrix has them; not ", columns, " columns and ", from.size(), " tensors");
  for (const Tensor& t : from.slice(1))
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kHalf && t.numel() == n * groups, "scales and minimums of ",
                n, " x ", groups, " groups, not ", t.sizes(), " ", t.scalar_type());
  const auto scales = (const uint16_t*)from[1].const_data_ptr();
  const auto mins = from.size() > 2 ? (const uint16_t*)from[2].const_data_ptr() : nullptr;
  bool finite = false;
  const Kernels& kernels = kernels_for(true);  // the same for both dtypes
  with_pool([&](Pool pool) { finite = kernels.pack(codes.const_data_ptr<uint8_t>(), scales, mins, n, m, pool); },
            threads_for(codes.numel()));
  return finite;
}

bool repack(const Tensor& blocks, TensorList w, int64_t columns, int64_t block) {
  TORCH_CHECK(blocks.dim() == 2 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte && columns % 32 == 0,
              "rows of blocks of 32 columns in one piece, not ", blocks.sizes(), " ", blocks.scalar_type());
  const Matrix m = blocks_of(w, block, blocks.size(0), columns, w[w.size() - 1]);
  const int64_t bytes = blocks.size(1) / (columns / 32);
  TORCH_CHECK(bytes * (columns / 32) == blocks.size(1) && m.shift == 0 &&
                  (m.kind == Kind::INT8 ? bytes == 34 : m.kind == Kind::INT4 && (bytes == 18 || bytes == 20)),
              "Q8_0 for 8 bits, Q4_0 or Q4_1 for 4, not ", blocks.size(1), " bytes for ", columns, " columns");
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
      "layers(Tensor x, Tensor cos, Tensor sin, Tensor pages, Tensor positions, Tensor(a!)[] k_caches, "
      "Tensor(b!)[] v_caches, Tensor[] gains, float[] eps, int[] late, Tensor[] matrices, Tensor[] biases, "
      "int[] windows, int heads, int hidden) -> Tensor",
      cpu(layers));
  m.def(
      "attend(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pages, Tensor positions, int window, "
      "float scale, float softcap) -> Tensor",
      cpu(attend));
  m.def("gemv(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor", cpu(gemv));
  m.def("gemm(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor", cpu(gemm));
  m.def("rms_norm(Tensor x, Tensor gain, float eps, bool late) -> Tensor", cpu(rms_norm));
  m.def("dequantize_rows(Tensor[] w, Tensor at, int columns, ScalarType dtype) -> Tensor", cpu(dequantize_rows));
  m.def("quantize(Tensor x, Tensor(a!)[] w, int block) -> bool", cpu(quantize));
  m.def("pack(Tensor[] rows, Tensor(a!)[] w, int block) -> bool", cpu(pack));
  m.def("repack(Tensor blocks, Tensor(a!)[] w, int columns, int block) -> bool", cpu(repack));
}
