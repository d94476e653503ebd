// The operators of torch.ops.llama_mini: they check what they are given and hand it to the form of this processor.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "arguments.h"
#include "crew.h"

namespace {

struct NamedForm {
  const char* name;
  const Form* form;
};

// Whether the processor has tiles of bfloat16 and the system lets this process use them, which must be asked.
bool tiles_allowed() {
#ifdef __linux__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // of asm/prctl.h and of the processor's manual
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

std::vector<NamedForm> forms() {
  std::vector<NamedForm> found;
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  const bool dots = wide && __builtin_cpu_supports("avx512bf16");
  if (dots && tiles_allowed()) found.push_back({"amx", &form_amx});
  if (dots) found.push_back({"avx512_bf16", &form_avx512_bf16});
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

// Calls f(form, team) with as many threads as PyTorch has been given, `most` at most.
template <typename F>
void with_team(const F& f, int64_t most = INT64_MAX) {
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(most, at::get_num_threads());
  Crew crew(threads);
  const Form& ours = form();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) noexcept {  // a thread that left would be waited for
    if (first != 0) return crew.help(first);
    f(ours, Team{Crew::run, Crew::expect, &crew});
    crew.finish();
  });
}

// Threads for so many numbers of which each is touched once: waiting for a second one takes longer than two million, and
// much longer on a busy machine.
int64_t threads_for(int64_t n) { return std::max<int64_t>(1, n >> 21); }

// --- the operators ---

// New tokens through some layers: one a row, or those of one row. A layer has four gains (attention, q, k, feed-forward;
// empty where there is no norm), four matrices of as many tensors each (qkv, o, gate and up, down), and four biases
// (empty where there is none; no list where no layer has any).
Tensor layers(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, TensorList k_caches,
                   TensorList v_caches, TensorList gains, at::ArrayRef<double> eps, at::IntArrayRef late,
                   TensorList matrices, TensorList biases, at::IntArrayRef windows, int64_t heads, int64_t hidden) {
  const size_t n = k_caches.size(), each = n > 0 ? matrices.size() / (4 * n) : 0;
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  TORCH_CHECK(each > 0 && hidden > 0 && v_caches.size() == n && gains.size() == 4 * n && eps.size() == 4 * n && late.size() == 4 * n &&
                  matrices.size() == 4 * n * each && (biases.empty() || biases.size() == 4 * n) && windows.size() == n,
              "the lists of ", n, " layers differ in length");
  TORCH_CHECK(x.dim() == 3 && (x.size(0) == 1 || x.size(1) == 1), "a token of each row, or those of one row, not ", x.sizes());
  const int64_t dim = x.size(-1), tokens = rows_of(x);
  const bool floats = wide(x), many = x.size(1) > 1;
  auto norm = [&](size_t i, int64_t width) { return norm_of(gains[i], eps[i], late[i], x, width); };
  const Tensor no_bias = at::empty({0}, x.options());
  auto operand = [&](size_t i, int64_t rows, int64_t columns) {
    return matrix(matrices.slice(i * each, each), rows, columns, biases.empty() ? no_bias : biases[i], x);
  };
  std::vector<Attention> attentions;
  for (size_t i = 0; i < n; i++) {  // what is wrong is found before a cache is written
    TORCH_CHECK(k_caches[i].sizes() == k_caches[0].sizes(), "caches of one size, not ", k_caches[i].sizes());
    attentions.push_back(attention(x, x.size(0), x.size(1), each > 1, norm(4 * i + 1, k_caches[i].size(-1)),
                                   norm(4 * i + 2, k_caches[i].size(-1)), cos, sin, k_caches[i],
                                   v_caches[i], positions, heads, windows[i]));
  }
  const Attention& a = attentions[0];
  check_prompt(a);
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
      const Matrix *m = &operands[4 * i], *next = i + 1 < n ? m + 4 : nullptr;
      void* mid = between.data_ptr();
      if (many) {
        form.attention_many(now, norms[2 * i], m[0], attentions[i], m[1], mid, team);
        form.feed_forward_many(mid, norms[2 * i + 1], m[2], up_at, m[3], floats, tokens, out.data_ptr(), team);
      } else {
        form.attention_step(now, norms[2 * i], m[0], attentions[i], m[1], m[2], mid, team);
        form.feed_forward_step(mid, norms[2 * i + 1], m[2], up_at, m[3], next, floats, tokens, out.data_ptr(), team);
      }
      now = out.const_data_ptr();
    }
  });
  return out;
}

// x times a matrix: `what` of a form, which writes numbers of `dtype`.
template <typename F>
Tensor times(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows, at::ScalarType dtype, const F& what) {
  const int64_t n = rows_of(x);
  const bool floats = wide(x);
  const Tensor from = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  Tensor out = at::empty(sizes, x.options().dtype(dtype));
  const Matrix m = matrix(w, rows, x.size(-1), bias, x);
  with_team([&](const Form& form, Team team) { what(form)(from.const_data_ptr(), m, floats, n, out.data_ptr(), team); });
  return out;
}

Tensor project(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, at::kFloat, [](const Form& form) { return form.project; });
}

Tensor product(const Tensor& x, TensorList w, const Tensor& bias, int64_t rows) {
  return times(x, w, bias, rows, x.scalar_type(), [](const Form& form) { return form.product; });
}

Tensor rms_norm(const Tensor& x, const Tensor& gain, double eps, bool late) {
  TORCH_CHECK(gain.numel() > 0, "a gain for each number of a row");
  const int64_t count = rows_of(x), n = x.size(-1);
  const bool floats = wide(x);
  const Tensor from = x.contiguous();
  const Norm norm = norm_of(gain, eps, late, x, n);
  Tensor out = at::empty(x.sizes(), x.options());
  with_team([&](const Form& form, Team team) {
    form.rms_norm(from.const_data_ptr(), norm, floats, count, n, out.data_ptr(), team);
  }, threads_for(x.numel()));
  return out;
}

Tensor rows(TensorList w, const Tensor& at, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK(w.size() > 1 && w[0].dim() > 0 && columns > 0, "codes of at least one column");
  TORCH_CHECK(at.scalar_type() == at::kLong, "rows by number, not ", at.scalar_type());
  const Tensor numbers = at.contiguous();
  const int64_t n = at.numel(), *first = numbers.const_data_ptr<int64_t>();
  auto sizes = at.sizes().vec();
  sizes.push_back(columns);
  Tensor out = at::empty(sizes, w[0].options().dtype(dtype));
  const bool floats = wide(out);
  const Matrix m = matrix(w, w[0].size(0) * 16, columns, at::empty({0}, out.options()), out);
  for (int64_t i = 0; i < n; i++) TORCH_CHECK_INDEX(first[i] >= 0 && first[i] < m.rows, "row ", first[i], " of ", m.rows);
  with_team([&](const Form& form, Team team) { form.rows(m, first, floats, n, out.data_ptr(), team); },
            threads_for(n * columns));
  return out;
}

// The blocks of a matrix of codes from `block` on, as many as n rows take.
Matrix blocks_of(TensorList w, int64_t block, int64_t n, int64_t columns, const Tensor& like) {
  TORCH_CHECK(w.size() > 1 && w[0].dim() > 0 && n > 0 && columns > 0 && block >= 0 && block + up(n, 16) / 16 <= w[0].size(0),
              "codes with room for ", n, " rows of ", columns, " from block ", block, " on");
  Matrix m = matrix(w, w[0].size(0) * 16, columns, at::empty({0}, like.options()), like);
  const int64_t steps = up(columns, 32) / 32;
  m.data = (const char*)m.data + block * steps * (m.kind == Kind::INT8 ? 512 : 256);
  m.scale += block * steps * 16;
  if (m.least != nullptr) m.least += block * steps * 16;
  return m;
}

// Both give false where a number is none that a scale holds.
bool quantize(const Tensor& x, TensorList w, int64_t block) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "rows in one piece, not ", x.sizes());
  const bool floats = wide(x);
  const Matrix m = blocks_of(w, block, x.size(0), x.size(1), x);
  bool sound = false;
  with_team([&](const Form& form, Team team) { sound = form.quantize(x.const_data_ptr(), floats, x.size(0), m, team); },
            threads_for(x.numel()));
  return sound;
}

bool repack(const Tensor& blocks, TensorList w, int64_t columns, int64_t block) {
  TORCH_CHECK(blocks.dim() == 2 && blocks.is_contiguous() && blocks.scalar_type() == at::kByte && columns % 32 == 0,
              "rows of blocks of 32 columns in one piece, not ", blocks.sizes(), " ", blocks.scalar_type());
  const Matrix m = blocks_of(w, block, blocks.size(0), columns, w[w.size() - 1]);
  const int64_t bytes = blocks.size(1) / (columns / 32);
  TORCH_CHECK(bytes * (columns / 32) == blocks.size(1) && (m.kind == Kind::INT8 ? bytes == 34 : bytes == 18 || bytes == 20),
              "Q8_0 for 8 bits, Q4_0 or Q4_1 for 4, not ", blocks.size(1), " bytes for ", columns, " columns");
  bool sound = false;
  with_team([&](const Form& form, Team team) {
    sound = form.repack(blocks.const_data_ptr<uint8_t>(), bytes, blocks.size(0), m, team);
  }, threads_for(blocks.size(0) * columns));
  return sound;
}

}  // namespace

TORCH_LIBRARY(llama_mini, m) {
  m.def("forms() -> str[]", form_names);
  m.def("use_form(str name) -> ()", use_form);
  m.def(
      "layers(Tensor x, Tensor cos, Tensor sin, Tensor positions, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
      "Tensor[] gains, float[] eps, int[] late, Tensor[] matrices, Tensor[] biases, int[] windows, int heads, "
      "int hidden) -> Tensor");
  m.def("project(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor");
  m.def("product(Tensor x, Tensor[] w, Tensor bias, int rows) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor gain, float eps, bool late) -> Tensor");
  m.def("rows(Tensor[] w, Tensor at, int columns, ScalarType dtype) -> Tensor");
  m.def("quantize(Tensor x, Tensor(a!)[] w, int block) -> bool");
  m.def("repack(Tensor blocks, Tensor(a!)[] w, int columns, int block) -> bool");
}

TORCH_LIBRARY_IMPL(llama_mini, CPU, m) {
  m.impl("layers", layers);
  m.impl("project", project);
  m.impl("product", product);
  m.impl("rms_norm", rms_norm);
  m.impl("rows", rows);
  m.impl("quantize", quantize);
  m.impl("repack", repack);
}
