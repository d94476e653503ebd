// Layers in one operator, and a whole step of decoding: they check their arguments, and run the kernels one by one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check_args.h"
#include "thread_pool.h"
#include "variants.h"

inline Teamwork teamwork;

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

// Takes new tokens through consecutive layers. x (N, 1, dim) are tokens of any rows, which decode; x (1, T, dim) are
// consecutive ones of one row, which prefill if T > 1. The two round differently; in neither do the bits of a token
// depend on the others. `pages` says where the cache holds the row of each. A layer has four gains (attention, q, k,
// feed-forward; empty if there is no norm), four matrices (qkv, o, gate_up, down), each in a format of its own, and
// four biases (empty if there is none; the whole list is empty if no layer has any). `first` fills x, and `last` takes
// what the layers return; `then` is the matrix that it reads.
template <typename First, typename Last>
Tensor through_layers(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& pages,
                      const Tensor& positions, TensorList k_caches, TensorList v_caches, TensorList gains,
                      at::ArrayRef<double> eps, at::IntArrayRef late, TensorList tensors, TensorList biases,
                      at::IntArrayRef windows, int64_t heads, int64_t hidden, const First& first, const Matrix* then,
                      const Last& last) {
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
    first(pool);
    const void* now = x.const_data_ptr();
    for (size_t i = 0; i < n; i++) {
      const Matrix *m = &operands[4 * i], *next = i + 1 < n ? m + 4 : then;
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
    last(now, pool);
  });
  return out;
}

inline Tensor layers(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& pages,
                     const Tensor& positions, TensorList k_caches, TensorList v_caches, TensorList gains,
                     at::ArrayRef<double> eps, at::IntArrayRef late, TensorList tensors, TensorList biases,
                     at::IntArrayRef windows, int64_t heads, int64_t hidden) {
  return through_layers(
      x, cos, sin, pages, positions, k_caches, v_caches, gains, eps, late, tensors, biases, windows, heads, hidden,
      [](Pool) {}, nullptr, [](const void*, Pool) {});
}

// A whole step: tokens (N, 1) of any rows -> logits (N, vocab) float32, and the likeliest token of each (N,), the
// lowest of equals; -1 if its logits are not all finite. cos and sin (P, head_dim / 2) are those of each position.
// `gains`, `eps` and `late` have one entry more than for `layers`: that of the norm before the head.
inline std::tuple<Tensor, Tensor> step(const Tensor& tokens, TensorList embedding, const Tensor& cos, const Tensor& sin,
                                       const Tensor& pages, const Tensor& positions, TensorList k_caches,
                                       TensorList v_caches, TensorList gains, at::ArrayRef<double> eps,
                                       at::IntArrayRef late, TensorList tensors, TensorList biases,
                                       at::IntArrayRef windows, int64_t heads, int64_t hidden, TensorList head,
                                       const Tensor& head_bias, int64_t vocab) {
  TORCH_CHECK(tokens.dim() == 2 && tokens.size(1) == 1 && tokens.is_contiguous() && tokens.scalar_type() == at::kLong,
              "tokens (N, 1), int64, not ", tokens.sizes(), " ", tokens.scalar_type());
  const size_t n = k_caches.size();
  TORCH_CHECK(n > 0 && gains.size() == 4 * n + 1 && eps.size() == 4 * n + 1 && late.size() == 4 * n + 1,
              "the norms of ", n, " layers and the last one");
  const int64_t count = tokens.size(0), dim = gains[4 * n].numel(), *each = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; i++)
    TORCH_CHECK_INDEX(each[i] >= 0 && each[i] < vocab, "token ", each[i], " of ", vocab);
  for (const auto* t : {&cos, &sin}) TORCH_CHECK(t->dim() == 2, "cos and sin of positions, not ", t->sizes());
  Tensor x = at::empty({count, 1, dim}, k_caches[0].options());
  Tensor logits = at::empty({count, vocab}, x.options().dtype(at::kFloat)), best = at::empty({count}, tokens.options());
  const Matrix table = matrix(embedding, vocab, dim, at::empty({0}, x.options()), x);
  const Matrix to_logits = matrix(head, vocab, dim, head_bias, x);
  const Norm norm = norm_args(gains[4 * n], eps[4 * n], late[4 * n], x, dim);
  const Kernels& kernels = kernels_for(is_float32(x));
  const Tensor at = positions.flatten();
  through_layers(
      x, cos.index_select(0, at), sin.index_select(0, at), pages, positions, k_caches, v_caches, gains.slice(0, 4 * n),
      eps.slice(0, 4 * n), late.slice(0, 4 * n), tensors, biases, windows, heads, hidden,
      [&](Pool pool) { kernels.dequantize_rows(table, each, count, x.data_ptr(), pool); }, &to_logits,
      [&](const void* now, Pool pool) {
        kernels.gemv(now, norm, to_logits, count, logits.data_ptr(), pool);
        kernels.likeliest(logits.const_data_ptr<float>(), count, vocab, best.data_ptr<int64_t>(), pool);
      });
  return {logits, best};
}
