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
  const int64_t threads = alone ? 1 : std::min<int64_t>(most, at::get_num_threads()), begin = ticks();
  ThreadPool pool(threads);
  int64_t leader = 0;
  // noexcept: PyTorch would wait forever for a thread that threw.
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) noexcept {
    if (first != 0) return pool.work(first);
    const int64_t start = ticks();
    f(Pool{ThreadPool::run, ThreadPool::prefetch_next, &pool});
    leader = ticks() - start;
    pool.finish();
  });
  if (threads > 1) teamwork.measured(ticks() - begin, leader + pool.saved());
}

// The lists of a call hold so many entries for each layer.
constexpr size_t NORMS = 8;     // attention: before, q, k, out, post; feed-forward: before, out, post; empty: no norm
constexpr size_t SETTINGS = 4;  // window; 0 for SiLU, 1 for GELU (tanh); which of the rotations, -1 for none; `apart`
constexpr size_t SCALES = 6;    // attention: of x, of y, of q·k, its cap (0: none); feed-forward: of x, of y

// The numbers of the layers' first matrices, and how many there are in all. A layer has qkv, o, gate_up and down, each
// in a format of its own; `apart` is 1 if k begins a matrix after that of q, 2 if v begins one after that of k, or 3.
inline std::vector<size_t> first_matrices(at::IntArrayRef settings, size_t layers) {
  std::vector<size_t> first{0};
  for (size_t i = 0; i < layers; i++) {
    const int64_t apart = SETTINGS * i + 3 < settings.size() ? settings[SETTINGS * i + 3] : 0;
    TORCH_CHECK(apart >= 0 && apart < 4, "matrices apart: ", apart);
    first.push_back(first.back() + 4 + (apart & 1) + (apart >> 1));
  }
  return first;
}

// Takes new tokens through consecutive layers. x (N, 1, dim) are tokens of any rows, which decode; x (1, T, dim) are
// consecutive ones of one row, which prefill if T > 1. The two round differently; in neither do the bits of a token
// depend on the others. `ropes` are cosines and sines by turns, `pages` says where the cache holds the row of each
// token; of two, the second is for the layers with a window. `biases` is empty if no layer has any. `first` fills x,
// and `last` takes what the layers return; `then` is the matrix that it reads.
template <typename First, typename Last>
Tensor through_layers(const Tensor& x, TensorList ropes, TensorList pages, const Tensor& positions, TensorList k_caches,
                      TensorList v_caches, TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef flags,
                      TensorList tensors, TensorList biases, at::IntArrayRef settings, at::ArrayRef<double> scales,
                      int64_t heads, int64_t hidden, const First& first, const Matrix* then, const Last& last) {
  const size_t n = k_caches.size();
  const std::vector<TensorList> matrices = split_matrices(tensors);
  const std::vector<size_t> first_of = first_matrices(settings, n);
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  TORCH_CHECK(n > 0 && hidden > 0 && v_caches.size() == n && gains.size() == NORMS * n && eps.size() == NORMS * n &&
                  flags.size() == NORMS * n && settings.size() == SETTINGS * n && matrices.size() == first_of[n] &&
                  (biases.empty() || biases.size() == matrices.size()) && scales.size() == SCALES * n &&
                  ropes.size() % 2 == 0 && (pages.size() == 1 || pages.size() == 2),
              "the lists of ", n, " layers differ in length");
  TORCH_CHECK(x.dim() == 3 && (x.size(0) == 1 || x.size(1) == 1),
              "x must hold one token of each row, or the tokens of one row, not ", x.sizes());
  const int64_t dim = x.size(-1), tokens = n_rows(x);
  const bool many = x.size(1) > 1;
  const Kernels& kernels = kernels_for(is_float32(x));
  auto norm = [&](size_t i, int64_t width) { return norm_args(gains[i], eps[i], flags[i], x, width); };
  const Tensor no_bias = at::empty({0}, x.options());
  auto operand = [&](size_t i, int64_t rows, int64_t columns) {
    return matrix(matrices[i], rows, columns, biases.empty() ? no_bias : biases[i], x);
  };
  auto quantized = [&](size_t i) { return matrices[i].size() > 1; };
  std::vector<Attention> attentions;
  for (size_t i = 0; i < n; i++) {  // check everything before a cache is written
    const at::IntArrayRef s = settings.slice(SETTINGS * i, SETTINGS);
    const Tensor &k = k_caches[i], &q_gain = gains[NORMS * i + 1], &k_gain = gains[NORMS * i + 2];
    TORCH_CHECK(k.dim() == 4 && k_caches[0].dim() == 4 && k.sizes().slice(1) == k_caches[0].sizes().slice(1),
                "the caches differ in the size of a page: ", k.sizes());
    TORCH_CHECK(s[1] == 0 || s[1] == 1, "activation ", s[1]);
    TORCH_CHECK(s[2] >= -1 && 2 * s[2] < (int64_t)ropes.size(), "rotation ", s[2], " of ", ropes.size() / 2);
    Attention a = attention(x, x.size(0), x.size(1), quantized(first_of[i]), Norm{}, Norm{}, k, v_caches[i],
                            s[0] > 0 ? pages.back() : pages.front(), positions, heads, s[0], scales[SCALES * i + 2],
                            scales[SCALES * i + 3]);
    a.whole_q = q_gain.numel() > a.head_dim, a.whole_k = k_gain.numel() > a.head_dim;
    a.q = norm(NORMS * i + 1, a.whole_q ? heads * a.head_dim : a.head_dim);
    a.k = norm(NORMS * i + 2, a.whole_k ? a.kv_heads * a.head_dim : a.head_dim);
    if (s[2] >= 0) set_rope(a, ropes[2 * s[2]], ropes[2 * s[2] + 1]);
    attentions.push_back(a);
  }
  check_prompt(attentions[0]);
  std::vector<Norm> norms;
  std::vector<Sum> sums;
  std::vector<Matrix> operands;
  std::vector<int64_t> up_at;         // where up begins in a row of gate and up
  operands.reserve(matrices.size());  // they point to one another
  for (size_t i = 0; i < n; i++) {
    const Attention& a = attentions[i];
    const size_t at = NORMS * i, m = first_of[i + 1] - 3;
    const at::ArrayRef<double> scale = scales.slice(SCALES * i, SCALES);
    up_at.push_back(next_part(hidden, quantized(m + 1)));
    int64_t begin = 0;
    for (size_t part = first_of[i]; part < m; part++) {
      TORCH_CHECK(quantized(part) == quantized(first_of[i]), "q, k and v are floats, or all of them codes");
      const int64_t apart = settings[SETTINGS * i + 3];
      const int64_t end = (apart & 1) && begin == 0 ? a.k_at : (apart & 2) && begin < a.v_at ? a.v_at : a.width;
      const int64_t rows = a.head_dim * (begin == 0 ? heads : a.kv_heads);
      const bool alone = apart != 0 && end - begin == next_part(rows, true);  // and then it is not padded
      operands.push_back(operand(part, alone ? rows : end - begin, dim));
      if (begin > 0) operands[part - 1].rest = &operands[part];
      begin = end;
    }
    norms.insert(norms.end(), {norm(at, dim), norm(at + 5, dim)});
    sums.insert(sums.end(), {{norm(at + 3, dim), norm(at + 4, dim), (float)scale[0], (float)scale[1]},
                             {norm(at + 6, dim), norm(at + 7, dim), (float)scale[4], (float)scale[5]}});
    operands.insert(operands.end(), {operand(m, dim, heads * a.head_dim), operand(m + 1, 2 * up_at[i], dim),
                                     operand(m + 2, dim, hidden)});
  }
  Tensor out = at::empty(x.sizes(), x.options()), between = at::empty(x.sizes(), x.options());
  with_pool([&](Pool pool) {
    first(pool);
    const void* now = x.const_data_ptr();
    for (size_t i = 0; i < n; i++) {
      const Matrix *qkv = &operands[first_of[i]], *m = &operands[first_of[i + 1] - 3], *next = i + 1 < n ? m + 3 : then;
      const Norm* norm = &norms[2 * i];
      const Sum* sum = &sums[2 * i];
      const auto act = (Activation)settings[SETTINGS * i + 1];
      void *mid = between.data_ptr(), *to = out.data_ptr();
      if (many) {
        kernels.prefill_attention(now, norm[0], *qkv, attentions[i], m[0], sum[0], mid, pool);
        kernels.prefill_feed_forward(mid, norm[1], m[1], up_at[i], act, m[2], sum[1], tokens, to, pool);
      } else {
        kernels.decode_attention(now, norm[0], *qkv, attentions[i], m[0], sum[0], m[1], mid, pool);
        kernels.decode_feed_forward(mid, norm[1], m[1], up_at[i], act, m[2], sum[1], next, tokens, to, pool);
      }
      now = to;
    }
    last(now, pool);
  });
  return out;
}

inline Tensor layers(const Tensor& x, TensorList ropes, TensorList pages, const Tensor& positions, TensorList k_caches,
                     TensorList v_caches, TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef flags,
                     TensorList tensors, TensorList biases, at::IntArrayRef settings, at::ArrayRef<double> scales,
                     int64_t heads, int64_t hidden) {
  return through_layers(
      x, ropes, pages, positions, k_caches, v_caches, gains, eps, flags, tensors, biases, settings, scales, heads,
      hidden, [](Pool) {}, nullptr, [](const void*, Pool) {});
}

// A whole step: tokens (N, 1) of any rows -> logits (N, vocab) float32, and the likeliest token of each (N,), the
// lowest of equals; -1 if its logits are not all finite. `ropes` (P, pairs) are those of each position. `gains`, `eps`
// and `flags` have one entry more than for `layers`: that of the norm before the head. A softcap of 0 is none.
inline std::tuple<Tensor, Tensor> step(const Tensor& tokens, TensorList embedding, TensorList ropes, TensorList pages,
                                       const Tensor& positions, TensorList k_caches, TensorList v_caches,
                                       TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef flags,
                                       TensorList tensors, TensorList biases, at::IntArrayRef settings,
                                       at::ArrayRef<double> scales, int64_t heads, int64_t hidden, TensorList head,
                                       const Tensor& head_bias, int64_t vocab, double embedding_scale,
                                       double logit_scale, double softcap) {
  TORCH_CHECK(tokens.dim() == 2 && tokens.size(1) == 1 && tokens.is_contiguous() && tokens.scalar_type() == at::kLong,
              "tokens (N, 1), int64, not ", tokens.sizes(), " ", tokens.scalar_type());
  const size_t last = NORMS * k_caches.size();
  TORCH_CHECK(last > 0 && gains.size() == last + 1 && eps.size() == last + 1 && flags.size() == last + 1,
              "the norms of ", k_caches.size(), " layers and the last one");
  const int64_t count = tokens.size(0), dim = gains[last].numel(), *each = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; i++)
    TORCH_CHECK_INDEX(each[i] >= 0 && each[i] < vocab, "token ", each[i], " of ", vocab);
  const Tensor rows = positions.flatten();
  std::vector<Tensor> angles;
  for (const Tensor& t : ropes) {
    TORCH_CHECK(t.dim() == 2, "cosines and sines of positions, not ", t.sizes());
    angles.push_back(t.index_select(0, rows));
  }
  Tensor x = at::empty({count, 1, dim}, gains[last].options());
  Tensor logits = at::empty({count, vocab}, x.options().dtype(at::kFloat)), best = at::empty({count}, tokens.options());
  const Matrix table = matrix(embedding, vocab, dim, at::empty({0}, x.options()), x);
  const Matrix to_logits = matrix(head, vocab, dim, head_bias, x);
  const Norm norm = norm_args(gains[last], eps[last], flags[last], x, dim);
  const Kernels& kernels = kernels_for(is_float32(x));
  through_layers(
      x, angles, pages, positions, k_caches, v_caches, gains.slice(0, last), eps.slice(0, last), flags.slice(0, last),
      tensors, biases, settings, scales, heads, hidden,
      [&](Pool pool) {
        kernels.dequantize_rows(table, each, count, x.data_ptr(), pool);
        if (embedding_scale != 1) x.mul_(at::empty({}, x.options()).fill_(embedding_scale));
      },
      &to_logits,
      [&](const void* now, Pool pool) {
        kernels.gemv(now, norm, to_logits, count, logits.data_ptr(), pool);
        if (logit_scale != 1) logits.mul_(logit_scale);
        if (softcap > 0) logits.div_(softcap).tanh_().mul_(softcap);
        kernels.likeliest(logits.const_data_ptr<float>(), count, vocab, best.data_ptr<int64_t>(), pool);
      });
  return {logits, best};
}
