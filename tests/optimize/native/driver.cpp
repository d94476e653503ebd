// Calls every kernel of an ISA variant with odd shapes, in memory of the exact size, from several threads, under the
// sanitizers. Other tests check the results; `driver write FILE` writes them, so that those of another processor can be
// compared.

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "exact_memory.h"
#include "thread_pool.h"

namespace {

constexpr int THREADS = 3;

template <typename T>
using Vector = std::vector<T, Exact<T>>;

// As in operators.cpp, with plain threads in place of PyTorch's.
template <typename F>
void with_pool(const F& f) {
  ThreadPool pool(THREADS);
  std::vector<std::thread> helpers;
  for (int i = 1; i < THREADS; i++) helpers.emplace_back([&, i] { pool.work(i); });
  f(Pool{ThreadPool::run, ThreadPool::prefetch_next, &pool});
  pool.finish();
  for (auto& helper : helpers) helper.join();
}

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }
int64_t below(int64_t n) { return draw() / 65536 % n; }

struct Numbers {  // of the model's dtype
  bool wide;
  Vector<float> floats;
  Vector<uint16_t> halves;
  Numbers(bool wide, int64_t n) : wide(wide), floats(wide ? n : 0), halves(wide ? 0 : n) {
    for (int64_t i = 0; i < n; i++) set(i, (float)(int32_t)draw() / 2147483648.f);
  }
  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (wide)
      floats[i] = x;
    else
      halves[i] = bits >> 16;
  }
  int64_t size() const { return floats.size() + halves.size(); }
  size_t bytes() const { return floats.size() * sizeof(float) + halves.size() * sizeof(uint16_t); }
  void* data() { return wide ? (void*)floats.data() : (void*)halves.data(); }
};

FILE* file = nullptr;
// Writes a line with the name, what the bytes are (f: float32, h: bfloat16, b: bytes) and their number; then them.
void write(const char* name, char type, const void* data, size_t bytes) {
  if (file == nullptr) return;
  std::fprintf(file, "%s %c %zu\n", name, type, bytes);
  std::fwrite(data, 1, bytes, file);
}
void write(const char* name, Numbers& x) { write(name, x.wide ? 'f' : 'h', x.data(), x.bytes()); }
void write(const char* name, const Vector<float>& x) { write(name, 'f', x.data(), x.size() * sizeof(float)); }

struct Weights {
  Matrix m{};
  Numbers numbers, bias;
  Vector<uint8_t> codes;
  Vector<uint16_t> scales, mins, super_scales;
  // shift: log2 of how many groups of 32 columns share a scale, where they have no two.
  Weights(Kind kind, int64_t rows, int64_t columns, bool wide, int shift = 0)
      : numbers(wide, quantized(kind) ? 0 : rows * columns), bias(wide, rows) {
    m.kind = kind, m.rows = rows, m.columns = columns, m.bias = bias.data(), m.data = numbers.data();
    if (!quantized(kind)) return;
    const Codes c = codes_of(kind);
    const int64_t blocks = (rows + 15) / 16, groups = (columns + 31) / 32;
    codes.resize(blocks * groups * c.group_bytes());
    for (auto& code : codes) code = (uint8_t)(draw() >> 24);
    m.shift = c.scales == 1 ? shift : 0, m.row_scales = ((groups * c.scales - 1) >> m.shift) + 1;
    const int width = c.has_table ? 8 : c.bits;
    const uint16_t step = (uint16_t)((14 - width) << 10);  // float16: weights are below 1
    scales.assign(blocks * 16 * m.row_scales, step);
    m.row_super_scales = (groups + 7) / 8 * (c.has_min ? 2 : 1);
    if (m.shift == 0 && below(2) == 0) {
      scales.assign(scales.size() / 2, 0x2410);  // each is two numbers of int8, 16 and 36
      super_scales.assign(blocks * 16 * m.row_super_scales, (uint16_t)(step - (4 << 10)));
      m.super_scales = super_scales.data();
    }
    for (auto& value : m.table) value = (uint8_t)(draw() >> 24);
    m.data = codes.data(), m.scales = scales.data();
    if (!c.has_min) return;
    mins.assign(scales.size(), 0xb4d0);  // -0.3, or -48 and -76
    m.mins = mins.data();
  }
};

void write_matrix(const char* name, const Weights& w) {
  write(name, 'b', w.codes.data(), w.codes.size());
  for (const auto* each : {&w.scales, &w.mins, &w.super_scales}) write(name, 'b', each->data(), 2 * each->size());
}

struct Case {
  bool wide, norms;
  Kind kind;
  int64_t batch, kv_heads, group, dim, width, hidden, longest, window, fill;
};

struct Heads {
  Attention a{};
  const int64_t page_size, row_pages;     // one page that ends with the last position, or pages in any order
  const int64_t pairs, q_norms, k_norms;  // q_norms, k_norms: heads that have a norm together
  const bool codes;                       // whether the cache holds them
  Numbers q_gain, k_gain, k, v;
  Vector<int8_t> k_codes, v_codes;
  Vector<float> cos, sin;
  Vector<int64_t> pages, positions;
  Heads(const Case& c, int64_t batch, int64_t length)
      : page_size(below(2) ? c.longest : PAGE_MULTIPLE),
        row_pages((c.longest + page_size - 1) / page_size),
        pairs(1 + below(c.dim / 2)),
        q_norms(below(2) ? c.kv_heads * c.group : 1),
        k_norms(below(2) ? c.kv_heads : 1),
        codes(below(3) == 0),
        q_gain(c.wide, q_norms * c.dim),
        k_gain(c.wide, k_norms * c.dim),
        k(c.wide, codes ? 0 : batch * row_pages * c.kv_heads * page_size * c.dim),
        v(c.wide, k.size()),
        k_codes(codes ? batch * row_pages * c.kv_heads * page_size * (c.dim + 4) : 0),
        v_codes(k_codes.size()),
        cos(batch * length * pairs, .6f),
        sin(batch * length * pairs, .8f),
        pages(batch * row_pages),
        positions(batch * length) {
    for (int64_t i = 0, n = pages.size(); i < n; i++) pages[i] = n - 1 - i;
    const int64_t start = below(c.longest - length + 1);
    for (int64_t i = 0; i < batch * length; i++)
      positions[i] = length > 1 ? start + i : i == 0 ? c.longest - 1 : below(c.longest);
    a.scale = .5f, a.softcap = (float)below(2);
    a.batch = batch, a.length = length, a.kv_heads = c.kv_heads, a.heads = c.kv_heads * c.group;
    a.head_dim = c.dim, a.window = c.window, a.cos = cos.data(), a.sin = sin.data(), a.positions = positions.data();
    const int64_t block = quantized(c.kind) ? 16 : 1;
    a.k_at = (a.heads * c.dim + block - 1) / block * block;
    a.v_at = a.k_at + (a.kv_heads * c.dim + block - 1) / block * block;
    a.width = 2 * a.v_at - a.k_at;
    a.pairs = pairs, a.whole_q = c.norms && q_norms > 1, a.whole_k = c.norms && k_norms > 1;
    if (c.norms) a.q = {q_gain.data(), 1e-5f, true, 1}, a.k = {k_gain.data(), 1e-5f, false, 0};
    for (size_t i = 0; i < k_codes.size(); i++)
      k_codes[i] = (int8_t)(draw() >> 24), v_codes[i] = (int8_t)(draw() >> 24);
    const float step = 1 / 64.f;
    for (size_t i = c.dim; i < k_codes.size(); i += c.dim + 4)
      std::memcpy(&k_codes[i], &step, sizeof step), std::memcpy(&v_codes[i], &step, sizeof step);
    a.codes = codes, a.cache_row = codes ? c.dim + 4 : c.dim;
    a.k_cache = codes ? k_codes.data() : k.data(), a.v_cache = codes ? v_codes.data() : v.data();
    a.cache_head = page_size * a.cache_row, a.cache_page = c.kv_heads * a.cache_head;
    a.page_size = page_size, a.row_pages = row_pages, a.pages = pages.data();
  }
};

void spoil(Numbers& x, int64_t fill) {  // NaN and infinity must not become integers
  if (fill == 1) x.set(0, __builtin_nanf(""));
  if (fill == 2) x.set(0, -__builtin_inff());
  if (fill == 3) x.set(0, file != nullptr ? 1e30f : 3e38f);  // compared sums must not overflow in one order alone
}

void run(const Kernels& kernels, const Case& c) {
  const uint8_t model[] = {c.wide, (uint8_t)c.kind};
  write("case", 'b', model, sizeof model);
  const int64_t block = quantized(c.kind) ? 16 : 1, q_dim = c.kv_heads * c.group * c.dim;
  const int64_t up_at = (c.hidden + block - 1) / block * block;
  Heads heads(c, c.batch, 1);
  const int shift = below(2) ? below(4) : 0;
  const bool apart = quantized(c.kind) && below(2);  // whether v is a matrix of another kind
  Weights qkv(c.kind, apart ? heads.a.v_at : heads.a.width, c.width, c.wide, shift),
      o(c.kind, c.width, q_dim, c.wide, shift);
  Weights gate_up(c.kind, 2 * up_at, c.width, c.wide, shift), down(c.kind, c.width, c.hidden, c.wide);
  const Weights v(apart ? Kind::INT6G16 : c.kind, heads.a.width - heads.a.v_at, c.width, c.wide, 0);
  if (apart) qkv.m.rest = &v.m;
  Numbers gain(c.wide, c.width), x(c.wide, c.batch * c.width), y(c.wide, c.batch * c.width),
      z(c.wide, c.batch * c.width);
  spoil(x, c.fill);
  const Norm norm{c.norms ? gain.data() : nullptr, 1e-5f, c.batch % 2 == 0, (float)below(2)};
  const Sum sum{below(2) ? norm : Norm{}, below(2) ? norm : Norm{}, below(2) ? 1 : .5f, 1};
  const auto act = (Activation)below(2);
  Vector<int64_t> likeliest(c.batch);
  Vector<float> projected(c.batch * c.width), gate_and_up(2 * up_at);
  Numbers activated(c.wide, c.batch * c.hidden);
  const int64_t length = 1 + below(c.longest);
  Heads prompt(c, 1, length);
  Numbers stream(c.wide, length * c.width), between(c.wide, length * c.width), after(c.wide, length * c.width);
  Numbers tokens(c.wide, length * qkv.m.rows);
  Vector<int64_t> rows(below(20));
  for (auto& row : rows) row = below(c.width);
  Numbers floats(c.wide, rows.size() * q_dim);
  const int64_t n = 1 + below(o.m.rows), block_bytes = c.kind == Kind::INT8      ? 34
                                                       : c.kind == Kind::INT4SYM ? 18
                                                                                 : 18 + 2 * below(2);
  Numbers new_rows(c.wide, n * q_dim);
  spoil(new_rows, c.fill);
  Vector<uint8_t> blocks(n * (q_dim / 32) * block_bytes);
  for (auto& byte : blocks) byte = (uint8_t)(draw() >> 24);
  const int64_t columns = q_dim / 32 * 32 + (codes_of(c.kind).scales == 2 && q_dim % 32 >= 16 ? 16 : 0);
  Vector<uint8_t> codes(n * columns);
  for (auto& code : codes) code = (uint8_t)(draw() >> 24);
  const Vector<uint16_t> new_scales = o.scales, new_mins = o.mins, new_super_scales = o.super_scales;
  spoil(stream, c.fill);
  Numbers bare_qkv(c.wide, c.batch * (q_dim + 2 * c.kv_heads * c.dim)), attended(c.wide, c.batch * q_dim);
  with_pool([&](Pool pool) {
    kernels.decode_attention(x.data(), norm, qkv.m, heads.a, o.m, sum, gate_up.m, y.data(), pool);
    write("decode_attention", y);
    Attention bare = heads.a;
    bare.q = bare.k = Norm{}, bare.cos = bare.sin = nullptr, bare.whole_q = bare.whole_k = false;
    bare.k_at = q_dim, bare.v_at = q_dim + c.kv_heads * c.dim;  // its parts are not padded
    bare.width = 2 * bare.v_at - bare.k_at;
    kernels.attend(bare_qkv.data(), bare, attended.data(), pool);
    write("attend", attended);
    kernels.decode_feed_forward(y.data(), norm, gate_up.m, up_at, act, down.m, sum, &qkv.m, c.batch, z.data(), pool);
    write("decode_feed_forward", z);
    kernels.gemv(x.data(), norm, gate_up.m, 1, gate_and_up.data(), pool);
    write("gemv", gate_and_up);
    kernels.gemv(activated.data(), Norm{}, down.m, c.batch, projected.data(), pool);
    write("gemv", projected);
    kernels.likeliest(projected.data(), c.batch, c.width, likeliest.data(), pool);
    write("likeliest", 'b', likeliest.data(), likeliest.size() * sizeof(int64_t));
    kernels.prefill_attention(stream.data(), norm, qkv.m, prompt.a, o.m, sum, between.data(), pool);
    write("prefill_attention", between);
    kernels.prefill_feed_forward(between.data(), norm, gate_up.m, up_at, act, down.m, sum, length, after.data(), pool);
    write("prefill_feed_forward", after);
    kernels.gemm(stream.data(), norm, qkv.m, length, tokens.data(), pool);
    write("gemm", tokens);
    kernels.rms_norm(stream.data(), Norm{gain.data(), 1e-5f, c.norms, 1}, length, c.width, after.data(), pool);
    write("rms_norm", after);
    kernels.dequantize_rows(o.m, rows.data(), (int64_t)rows.size(), floats.data(), pool);
    write("dequantize_rows", floats);
    if (!quantized(c.kind)) return;
    const Codes kind = codes_of(c.kind);
    Matrix whole = o.m;
    const bool plain = shift == 0 && whole.super_scales == nullptr;
    if (plain && (c.kind == Kind::INT8 || (kind.has_min && kind.scales == 1)))
      kernels.quantize(new_rows.data(), n, whole, pool), write_matrix("quantize", o);
    whole.columns = columns;
    kernels.pack(codes.data(), new_scales.data(), kind.has_min ? new_mins.data() : nullptr,
                 whole.super_scales != nullptr ? new_super_scales.data() : nullptr, n, whole, pool);
    write_matrix("pack", o);
    whole.columns = q_dim / 32 * 32;
    if (plain && (c.kind == Kind::INT8 || c.kind == Kind::INT4 || c.kind == Kind::INT4SYM))
      kernels.repack(blocks.data(), block_bytes, n, whole, pool), write_matrix("repack", o);
  });
}

// Shows that a report would be seen: reads out of bounds, or counts in two threads.
void plant(const char* what) {
  Vector<float> numbers(4);
  volatile int64_t at = 4, count = 0;
  if (!std::strcmp(what, "read")) std::printf("%f\n", numbers[at]);
  if (!std::strcmp(what, "race")) {
    std::thread one([&] { count = count + 1; }), other([&] { count = count + 1; });
    one.join(), other.join();
  }
}

}  // namespace

#define JOIN(a, b) a##b
#define NAME(isa) JOIN(kernels_, isa)

int main(int argc, char** argv) {
  if (argc == 2) plant(argv[1]);
  if (argc == 3 && (file = std::fopen(argv[2], "wb")) == nullptr) return std::perror(argv[2]), 1;
#ifdef __AMX_BF16__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // as operators.cpp asks
  if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA) != 0) return std::puts("no tiles"), 1;
#endif
  int64_t cases = 0;
  for (int wide = 0; wide < 2; wide++)
    for (int format = 1; format <= (int)Kind::TABLE_G16; format++)
      for (int i = 0; i < (file != nullptr ? 4 : 16); i++, cases++) {  // fewer where it is emulated
        const Kind kind = format > 1 ? (Kind)format : wide ? Kind::FLOAT32 : Kind::BFLOAT16;
        run(NAME(ISA)[wide ? 0 : 1],
            {wide == 1, below(4) != 0, kind, 1 + below(17), 1 + below(3), 1 + below(5), 2 + 2 * below(35),
             1 + below(90), 1 + below(90), 1 + below(i % 8 ? 70 : 1000), below(3) * below(40), below(6)});
      }
  std::printf("%ld cases\n", (long)cases);
  return file != nullptr && std::fclose(file) != 0;
}
