// The operators of torch.ops.llama_mini: they check what they are given and hand it to the form of this processor.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

#include "crew.h"
#include "forms.h"

namespace {

using at::Tensor;
using at::TensorList;  // as a matrix: {floats}, {codes, scale} of int8, or {codes, scale, least} of int4

struct NamedForm {
  const char* name;
  const Form* form;
};

std::vector<NamedForm> forms() {
  std::vector<NamedForm> found;
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (wide && __builtin_cpu_supports("avx512bf16")) found.push_back({"avx512_bf16", &form_avx512_bf16});
  if (wide) found.push_back({"avx512", &form_avx512});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", &form_avx2});
  return found;
}

std::atomic<const Form*> chosen{nullptr};

const Form& form() {
  const Form* now = chosen.load();
  if (now == nullptr) {
    const auto found = forms();
    TORCH_CHECK(!found.empty(), "this processor has neither AVX-512 nor AVX2");
    chosen.store(now = found[0].form);
  }
  return *now;
}

std::vector<std::string> form_names() {
  std::vector<std::string> names;
  for (const auto& each : forms()) names.emplace_back(each.name);
  return names;
}

void use_form(std::string name) {
  for (const auto& each : forms())
    if (name == each.name) return chosen.store(each.form);
  TORCH_CHECK(false, "no form ", name, " on this processor");
}

// Calls f(form, team) with as many threads as PyTorch has been given.
template <typename F>
void with_team(const F& f) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  Crew crew(threads);
  const Form& ours = form();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) noexcept {  // a thread that left would be waited for
    if (first != 0) return crew.help(first);
    f(ours, Team{Crew::run, &crew});
    crew.finish();
  });
}

// --- from tensors to what the forms take ---

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool wide(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "float32 or bfloat16, not ", x.scalar_type());
  return x.scalar_type() == at::kFloat;
}

// The numbers of a tensor as the stream has them; nullptr of an empty one.
const void* like(const Tensor& t, const Tensor& x, int64_t n, const char* what) {
  if (t.numel() == 0) return nullptr;
  TORCH_CHECK(t.is_contiguous() && t.numel() == n && t.scalar_type() == x.scalar_type(), what, ": ", n,
              " numbers of ", x.scalar_type(), " in a row, not ", t.sizes(), " of ", t.scalar_type());
  return t.const_data_ptr();
}

Norm norm_of(const Tensor& gain, double eps, bool late, const Tensor& x, int64_t dim) {
  return {like(gain, x, dim, "gain"), (float)eps, late};
}

// Where a part begins after `rows` others: parts of codes begin with a block.
int64_t after(int64_t rows, bool codes) { return codes ? up(rows, 16) : rows; }

Matrix matrix(TensorList w, int64_t rows, int64_t columns, const Tensor& bias, const Tensor& x) {
  TORCH_CHECK(w.size() >= 1 && w.size() <= 3, "a matrix is one to three tensors");
  for (const auto& t : w) TORCH_CHECK(t.is_contiguous() && t.device().is_cpu(), "a matrix lies in one piece, on the CPU");
  Matrix m{};
  m.rows = rows, m.columns = columns, m.data = w[0].const_data_ptr(), m.bias = like(bias, x, rows, "bias");
  if (w.size() == 1) {
    m.kind = wide(w[0]) ? Kind::FLOAT32 : Kind::BFLOAT16;
    TORCH_CHECK(w[0].scalar_type() == x.scalar_type() && w[0].dim() == 2 && w[0].size(0) == rows && w[0].size(1) == columns,
                "a matrix of ", rows, " x ", columns, " ", x.scalar_type(), ", not ", w[0].sizes(), " ", w[0].scalar_type());
    return m;
  }
  const int64_t blocks = up(rows, 16) / 16, steps = up(columns, 32) / 32;
  m.kind = w.size() == 2 ? Kind::INT8 : Kind::INT4;
  m.scale = (const uint16_t*)w[1].const_data_ptr();
  TORCH_CHECK(w[0].scalar_type() == at::kByte && w[0].numel() == blocks * steps * (m.kind == Kind::INT8 ? 512 : 256),
              "codes of ", rows, " x ", columns, ", not ", w[0].sizes());
  TORCH_CHECK(w[1].scalar_type() == at::kHalf && w[1].numel() == blocks * 16 * steps, "scales of ",
              rows, " x ", columns, ", not ", w[1].sizes());
  if (m.kind == Kind::INT4) {
    TORCH_CHECK(w[2].scalar_type() == at::kHalf && w[2].numel() == w[1].numel(), "least values of ", rows, " x ", columns,
                ", not ", w[2].sizes());
    m.least = (const uint16_t*)w[2].const_data_ptr();
  }
  return m;
}

Attention attention(const Tensor& x, int64_t batch, int64_t length, bool codes, const Norm& q, const Norm& k,
                    const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& positions, int64_t heads, int64_t window) {
  Attention a{};
  a.wide = wide(x), a.batch = batch, a.length = length, a.heads = heads, a.window = window, a.q = q, a.k = k;
  TORCH_CHECK(k_cache.dim() == 4 && k_cache.size(0) == batch && k_cache.sizes() == v_cache.sizes() &&
                  k_cache.strides() == v_cache.strides() && k_cache.stride(3) == 1 && k_cache.stride(2) == k_cache.size(3) &&
                  k_cache.scalar_type() == x.scalar_type() && v_cache.scalar_type() == x.scalar_type(),
              "a cache of (", batch, ", KV heads, positions, head_dim) ", x.scalar_type(), ", not ", k_cache.sizes());
  a.kv_heads = k_cache.size(1), a.head_dim = k_cache.size(3);
  a.cache_row = k_cache.stride(0), a.cache_head = k_cache.stride(1);
  TORCH_CHECK(batch > 0 && length > 0 && heads > 0 && a.kv_heads > 0 && a.head_dim > 0 && a.head_dim % 2 == 0 &&
                  heads % a.kv_heads == 0,
              "a token at least, and heads of an even width, a multiple of the KV heads; not ", heads, " for a cache of ",
              k_cache.sizes());
  a.k_at = after(heads * a.head_dim, codes), a.v_at = a.k_at + after(a.kv_heads * a.head_dim, codes);
  const int64_t angles = batch * length * a.head_dim / 2;
  for (const auto* t : {&cos, &sin})
    TORCH_CHECK(t->is_contiguous() && t->scalar_type() == at::kFloat && t->numel() == angles, "cos and sin: ", angles,
                " float32, not ", t->sizes());
  TORCH_CHECK(positions.is_contiguous() && positions.scalar_type() == at::kLong && positions.numel() == batch * length,
              "positions of ", batch, " x ", length, " tokens, not ", positions.sizes());
  a.cos = cos.const_data_ptr<float>(), a.sin = sin.const_data_ptr<float>();
  a.positions = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * length; i++)
    TORCH_CHECK(a.positions[i] >= 0 && a.positions[i] < k_cache.size(2), "position ", a.positions[i], " in a cache of ",
                k_cache.size(2));
  a.k_cache = k_cache.data_ptr(), a.v_cache = v_cache.data_ptr();
  return a;
}

int64_t rows_of(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "rows of at least one number, not ", x.sizes());
  return x.numel() / x.size(-1);
}

// --- the operators ---

// One new token a row through some layers. A layer has four gains (attention, q, k, feed-forward; empty where there is no
// norm), four matrices of as many tensors each (qkv, o, gate and up, down), and four biases (empty where there is none).
Tensor layers_step(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, TensorList k_caches,
                   TensorList v_caches, TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef late,
                   TensorList matrices, TensorList biases, at::IntArrayRef windows, int64_t heads, int64_t hidden) {
  const size_t n = k_caches.size(), each = n > 0 ? matrices.size() / (4 * n) : 0;
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  TORCH_CHECK(each > 0 && hidden > 0 && v_caches.size() == n && gains.size() == 4 * n && eps.size() == 4 * n && late.size() == 4 * n &&
                  matrices.size() == 4 * n * each && biases.size() == 4 * n && windows.size() == n,
              "the lists of ", n, " layers differ in length");
  const int64_t dim = x.size(-1), batch = rows_of(x);
  const bool floats = wide(x);
  auto norm = [&](size_t i, int64_t width) { return norm_of(gains[i], eps[i], late[i], x, width); };
  auto operand = [&](size_t i, int64_t rows, int64_t columns) {
    return matrix(matrices.slice(i * each, each), rows, columns, biases[i], x);
  };
  std::vector<Attention> attentions;
  for (size_t i = 0; i < n; i++) {  // what is wrong is found before a cache is written
    TORCH_CHECK(k_caches[i].sizes() == k_caches[0].sizes(), "caches of one size, not ", k_caches[i].sizes());
    attentions.push_back(attention(x, batch, 1, each > 1, norm(4 * i + 1, k_caches[i].size(-1)),
                                   norm(4 * i + 2, k_caches[i].size(-1)), cos, sin, k_caches[i],
                                   v_caches[i], positions, heads, windows[i]));
  }
  const Attention& a = attentions[0];
  const int64_t q_dim = heads * a.head_dim, qkv_rows = a.v_at + after(a.kv_heads * a.head_dim, each > 1);
  const int64_t up_at = after(hidden, each > 1), gate_up_rows = up_at + after(hidden, each > 1);
  std::vector<Norm> norms;
  std::vector<Matrix> operands;
  for (size_t i = 0; i < n; i++) {
    norms.insert(norms.end(), {norm(4 * i, dim), norm(4 * i + 3, dim)});
    operands.insert(operands.end(), {operand(4 * i, qkv_rows, dim), operand(4 * i + 1, dim, q_dim),
                                     operand(4 * i + 2, gate_up_rows, dim), operand(4 * i + 3, dim, hidden)});
  }
  Tensor out = at::empty(x.sizes(), x.options()), between = at::empty(x.sizes(), x.options());
  with_team([&](const Form& form, Team team) {
    const void* now = x.const_data_ptr();
    for (size_t i = 0; i < n; i++) {
      form.attention_step(now, norms[2 * i], operands[4 * i], attentions[i], operands[4 * i + 1], between.data_ptr(), team);
      form.feed_forward_step(between.const_data_ptr(), norms[2 * i + 1], operands[4 * i + 2], up_at, operands[4 * i + 3],
                             floats, batch, out.data_ptr(), team);
      now = out.const_data_ptr();
    }
  });
  return out;
}

Tensor project(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  const int64_t n = rows_of(x);
  const bool floats = wide(x);
  const Tensor from = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  Tensor out = at::empty(sizes, x.options().dtype(at::kFloat));
  const Matrix m = matrix(w, rows, x.size(-1), bias, x);
  with_team([&](const Form& form, Team team) {
    form.project(from.const_data_ptr(), m, floats, n, out.data_ptr<float>(), team);
  });
  return out;
}

Tensor attend(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& k_cache,
              const Tensor& v_cache, TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef late, int64_t window,
              int64_t heads, bool codes) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.size(0) == 1 && qkv.is_contiguous(), "q, k and v of one row, not ", qkv.sizes());
  TORCH_CHECK(gains.size() == 2 && eps.size() == 2 && late.size() == 2, "two norms, of q and of k");
  const Attention a = attention(qkv, 1, qkv.size(1), codes, norm_of(gains[0], eps[0], late[0], qkv, k_cache.size(-1)),
                                norm_of(gains[1], eps[1], late[1], qkv, k_cache.size(-1)), cos, sin, k_cache, v_cache,
                                positions, heads, window);
  for (int64_t i = 1; i < a.length; i++)
    TORCH_CHECK(a.positions[i] == a.positions[0] + i, "the positions of a prompt follow one another");
  TORCH_CHECK(qkv.size(2) >= a.v_at + a.kv_heads * a.head_dim, "q, k and v are wider than ", qkv.size(2));
  Tensor out = at::empty({1, a.length, heads * a.head_dim}, qkv.options());
  with_team([&](const Form& form, Team team) {
    form.attend(qkv.const_data_ptr(), qkv.size(2), a, out.data_ptr(), team);
  });
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& gain, double eps, bool late) {
  const Tensor from = x.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  const int64_t n = rows_of(x);
  const bool floats = wide(x);
  const Norm norm = norm_of(gain, eps, late, x, x.size(-1));
  TORCH_CHECK(norm.gain != nullptr, "a norm has gains");
  with_team([&](const Form& form, Team team) {
    form.norm(from.const_data_ptr(), norm, floats, n, x.size(-1), out.data_ptr(), team);
  });
  return out;
}

Tensor swiglu(const Tensor& gate_up, int64_t hidden, int64_t up_at) {
  const int64_t n = rows_of(gate_up), width = gate_up.size(-1);
  const bool floats = wide(gate_up);
  TORCH_CHECK(gate_up.is_contiguous() && hidden > 0 && hidden <= up_at && up_at <= width - hidden, "gate and up of ", hidden,
              " in rows of ", width, ", up from ", up_at);
  auto sizes = gate_up.sizes().vec();
  sizes.back() = hidden;
  Tensor out = at::empty(sizes, gate_up.options());
  with_team([&](const Form& form, Team team) {
    form.swiglu(gate_up.const_data_ptr(), floats, n, width, hidden, up_at, out.data_ptr(), team);
  });
  return out;
}

void widen(TensorList w, int64_t first, const Tensor& out, int64_t rows) {
  TORCH_CHECK(w.size() > 1 && out.dim() == 2 && out.is_contiguous(), "codes, and room for some of their rows");
  TORCH_CHECK(first % 16 == 0 && first >= 0 && first <= up(rows, 16) - out.size(0), "rows ", first, " and on of ", rows);
  const bool floats = wide(out);
  const Matrix m = matrix(w, rows, out.size(1), at::empty({0}, out.options()), out);
  with_team([&](const Form& form, Team team) {
    form.widen(m, floats, first, first + out.size(0), out.data_ptr(), team);
  });
}

}  // namespace

TORCH_LIBRARY(llama_mini, m) {
  m.def("forms() -> str[]", form_names);
  m.def("use_form(str name) -> ()", use_form);
  m.def(
      "layers_step(Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
      "Tensor[] gains, float[] eps, int[] late, Tensor[] matrices, Tensor[] biases, int[] windows, int heads, "
      "int hidden) -> Tensor");
  m.def("project(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor");
  m.def(
      "attend(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor[] gains, float[] eps, int[] late, int window, int heads, bool codes) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor gain, float eps, bool late) -> Tensor");
  m.def("swiglu(Tensor gate_up, int hidden, int up_at) -> Tensor");
  m.def("widen(Tensor[] w, int first, Tensor(a!) out, int rows) -> ()");
}

TORCH_LIBRARY_IMPL(llama_mini, CPU, m) {
  m.impl("layers_step", layers_step);
  m.impl("project", project);
  m.impl("attend", attend);
  m.impl("rms_norm", rms_norm);
  m.impl("swiglu", swiglu);
  m.impl("widen", widen);
}
