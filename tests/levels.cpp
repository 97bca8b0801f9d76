// Compares the kernels of a SIMD level with the plain ones, for levels that this CPU lacks (tests/test_levels.py): level OTHER,
// compiled against SIMDe, or, without OTHER, the level that is chosen on a processor that an emulator runs. Prints each
// difference and exits with 1.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

using namespace cg;
#if defined(OTHER)
namespace cg::OTHER { const Kernels* kernels(); }
void cg::wait_for_zero(const std::atomic<int>&) {}  // there is one thread only
#endif

namespace {

#if defined(OTHER)
const Kernels* ours = cg::OTHER::kernels();
#else
const Kernels* ours = choose_kernels("auto");
#endif
const Kernels* twin = plain::kernels();
const float ROUNDOFF = 0x1p-24f;
std::mt19937 generator(1);
int failures = 0, checks = 0;

float draw() { return std::normal_distribution<float>()(generator); }
std::vector<float> draws(size_t n) {
  std::vector<float> v(n);
  for (auto& x : v) x = draw();
  return v;
}
void expect(bool holds, const std::string& what) {
  checks++;
  if (!holds && failures++ < 40) printf("%s: %s differs from plain\n", ours->name, what.c_str());
}
// Equal to `relative` roundoffs of the value plus an absolute bound; exactly equal where both are 0.
void close(const std::vector<float>& a, const std::vector<float>& b, float relative, float absolute, const std::string& what) {
  bool holds = true;
  for (size_t i = 0; i < a.size(); i++) holds &= std::fabs(a[i] - b[i]) <= relative * ROUNDOFF * std::fabs(b[i]) + absolute;
  expect(holds, what);
}

struct Layout { const char* name; int block, bytes; std::vector<int> scales; };
const Layout LAYOUTS[TYPES] = {
    {"F32", 1, 4, {}},          {"F16", 1, 2, {}},          {"BF16", 1, 2, {}},           {"Q4_0", 32, 18, {0}},
    {"Q4_1", 32, 20, {0, 2}},   {"Q5_0", 32, 22, {0}},      {"Q5_1", 32, 24, {0, 2}},     {"Q8_0", 32, 34, {0}},
    {"Q4_K", 256, 144, {0, 2}}, {"Q5_K", 256, 176, {0, 2}}, {"Q6_K", 256, 210, {208}},    {"IQ4_NL", 32, 18, {0}},
    {"MXFP4", 32, 17, {}},      {"Q2_K", 256, 84, {80, 82}}, {"Q3_K", 256, 110, {108}},   {"IQ4_XS", 256, 136, {0}}};

struct Matrix {
  std::vector<uint8_t> bytes;
  Weight weight;
  // Any bytes are quants, or all are `byte`; scales are halves near 2^-8 with both signs. Float weights lie near 1.
  Matrix(int type, int64_t rows, int64_t cols, int byte = -1) {
    const Layout& l = LAYOUTS[type];
    int64_t row_bytes = cols / l.block * l.bytes;
    bytes.resize(rows * row_bytes + 1024);
    for (auto& b : bytes) b = (uint8_t)(byte < 0 ? generator() : byte);
    for (int64_t block = 0; block < rows * row_bytes; block += l.bytes) {
      for (int s : l.scales) bytes[block + s + 1] = (bytes[block + s + 1] & 0x83) | 0x1c;
      if (type == MXFP4_T) bytes[block] = bytes[block] % 8 + 115;  // powers of two from 2^-13
      if (type == F32_T) { float x = draw(); memcpy(&bytes[block], &x, 4); }
      if (type == F16_T || type == BF16_T) bytes[block + 1] = (bytes[block + 1] & 0x83) | (type == F16_T ? 0x38 : 0x3c);
    }
    weight = {type, bytes.data(), rows, cols, row_bytes};
  }
};
// T tokens of `cols` columns as a product reads them, rows padded to a multiple of `pad`.
struct PaddedInput {
  std::vector<float> f, scales[2];
  std::vector<int8_t> q[2];
  std::vector<int16_t> sums[2];
  std::vector<uint16_t> pairs;
  Activations a;
  PaddedInput(const Kernels* k, const float* x, int64_t cols, int T, int form, int64_t pad) {
    int64_t P = (cols + pad - 1) / pad * pad, rows = (T + 15) / 16 * 16;
    f.resize(rows * P), pairs.resize(rows * P);
    for (int t = 0; t < T; t++) memcpy(&f[t * P], &x[t * cols], 4 * cols);
    for (int i = 0; i < 2; i++) q[i].resize(rows * P), scales[i].resize(rows * P / 32), sums[i].resize(rows * P / 16);
    a = {f.data(), cols, P, P, T, T >= PACKED_FROM, form, {32, q[0].data(), scales[0].data(), sums[0].data()},
         {256, q[1].data(), scales[1].data(), sums[1].data()}, pairs.data()};
    k->quantise(a, 0, a.packed ? (int)rows : T);
  }
};
// With an adapter's `b`, and `h` for the tokens from `first` on.
std::vector<float> multiply(const Kernels* k, const Weight& w, const Weight* gate, const std::vector<float>& x, int T,
                            const Weight* b = nullptr, const float* h = nullptr, int first = 0) {
  std::vector<float> out(T * w.rows, NAN);
  PaddedInput input(k, x.data(), w.cols, T, k->form_of(w.type), 256);
  const int start = input.a.packed ? first / 16 * 16 : first;
  PaddedInput low(k, b ? h + start * 32 : x.data(), 32, T - start, b ? k->form_of(b->type) : 0, 32);
  low.a.packed = input.a.packed;
  if (b && low.a.packed) k->quantise(low.a, 0, (T - start + 15) / 16 * 16);
  AdapterTerm side{b ? *b : w, low.a, start, first};
  std::atomic<int> none{0};
  Scratch scratch;
  int64_t tile = k->tile_rows(w, input.a.packed);
  for (int64_t r = 0; r < w.rows; r += tile)
    k->product({&w, gate, out.data(), w.rows, {&side, b ? 1u : 0u, &none}}, input.a, r, std::min(r + tile, w.rows), scratch);
  return out;
}

// Numerics v2 (tile_product.cpp), member by member. The tile unit takes denormals for zero.
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
float to_bfloat16(float x) {  // eight bits of mantissa, half to even
  int exponent;
  const double mantissa = std::frexp((double)flushed(x), &exponent);
  return (float)std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}
std::vector<float> to_bfloat16(std::vector<float> v) {
  for (float& x : v) x = to_bfloat16(x);
  return v;
}
float tile_sum(const float* w, const float* x, int64_t n, float total = 0) {
  for (int64_t k = 0; k < n; k += 32) {
    float parts[2] = {};
    for (int64_t i = k; i < std::min(k + 32, n); i++) parts[i % 2] = flushed(std::fma(w[i], x[i], parts[i % 2]));
    total = flushed(total + flushed(parts[0] + parts[1]));
  }
  return total;
}
// x W^T for bfloat16 rows x [T, columns].
std::vector<float> tile_sums(const Weight& w, const std::vector<float>& x) {
  const int64_t T = x.size() / w.cols;
  std::vector<float> out(T * w.rows), row(w.cols);
  for (int64_t r = 0; r < w.rows; r++) {
    twin->decode(w, r, 0, w.cols, row.data());
    row = to_bfloat16(row);
    for (int64_t t = 0; t < T; t++) out[t * w.rows + r] = tile_sum(row.data(), &x[t * w.cols], w.cols);
  }
  return out;
}
// Few tokens and many, one chunk of columns and several, whole tiles and parts of them.
void tile_products(int type) {
  const Layout& l = LAYOUTS[type];
  const int most = 70;
  for (int64_t blocks : {1, l.block == 256 ? 9 : l.block == 32 ? 37 : 1101}) {
    const int64_t rows = 45, cols = blocks * l.block;
    Matrix w(type, rows, cols), gate(type, rows, cols), low(Q8_0_T, rows, 32);
    auto x = draws(most * cols), h = draws(most * 32);
    for (int64_t i = 0; i < cols; i++) x[2 * cols + i] *= 0x1p-122f, x[3 * cols + i] *= 0x1p100f, x[4 * cols + i] = 0;
    const auto y = tile_sums(w.weight, to_bfloat16(x)), g = tile_sums(gate.weight, to_bfloat16(x));
    const auto term = tile_sums(low.weight, to_bfloat16(h));
    const auto gated = multiply(ours, w.weight, &gate.weight, x, most);
    for (size_t i = 0; i < y.size(); i++) {
      const double v = g[i], size = 0.7978845608 * (v + 0.044715 * v * v * v), exact = v / 2 * (1 + std::tanh(size)) * y[i];
      if (i / rows != 3)  // whose gates overflow
        expect(std::fabs(gated[i] - exact) <= 400 * ROUNDOFF * (std::fabs(exact) + std::fabs(y[i])) + 1e-30, "gate by tiles");
    }
    for (int T : {1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 32, 33, 48, 49, most}) {
      const std::string what = std::string(l.name) + " product of " + std::to_string(T) + " tokens by tiles";
      const auto a = multiply(ours, w.weight, nullptr, x, T), b = multiply(ours, w.weight, &gate.weight, x, T);
      expect(!memcmp(a.data(), y.data(), 4 * a.size()), what);
      expect(!memcmp(b.data(), gated.data(), 4 * b.size()), what + " with gate");
      for (int first : {0, T / 2, T - 1}) {
        auto sum = y;
        for (int64_t i = first * rows; i < T * rows; i++) sum[i] += term[i];
        const auto c = multiply(ours, w.weight, nullptr, x, T, &low.weight, h.data(), first);
        expect(!memcmp(c.data(), sum.data(), 4 * c.size()), what + " with an adapter");
      }
    }
  }
}
void products() {
  for (int type = 0; type < TYPES; type++) {
    const Layout& l = LAYOUTS[type];
    const int64_t rows = 19, cols = l.block == 256 ? 9 * 256 : l.block == 32 ? 13 * 32 : 77;
    Matrix w(type, rows, cols), gate(type, rows, cols);
    auto x = draws(40 * cols);
    float longest = 0;
    for (float v : x) longest = std::max(longest, std::fabs(v));
    if (ours->form_of(type) == PAIRS) tile_products(type);
    for (int T = 1; T <= 40 && ours->form_of(type) != PAIRS; T++) {
      auto a = multiply(ours, w.weight, nullptr, x, T), b = multiply(twin, w.weight, nullptr, x, T);
      std::string what = std::string(l.name) + " product of " + std::to_string(T) + " tokens";
      if (l.block == 1) close(a, b, 0, 2 * cols * ROUNDOFF * cols * longest * 5, what);
      else expect(!memcmp(a.data(), b.data(), 4 * a.size()), what);
      if (l.block > 1 && T % 5 == 1)  // the products are equal; exp errs by its argument's roundoffs
        close(multiply(ours, w.weight, &gate.weight, x, T), multiply(twin, w.weight, &gate.weight, x, T), 400, 1e-30f,
              what + " with gate");
    }
    Matrix low(Q8_0_T, rows, 32);
    auto h = draws(40 * 32);
    for (int T : {1, 2, 5, 6, 17, 40})
      for (int first : {0, T / 2, T - 1}) {  // neighbours keep what they have, and few tokens equal many
        auto plain = multiply(twin, w.weight, nullptr, x, T);
        auto many = multiply(twin, w.weight, nullptr, x, 40, &low.weight, h.data(), first);
        auto a = multiply(ours, w.weight, nullptr, x, T, &low.weight, h.data(), first);
        auto b = multiply(twin, w.weight, nullptr, x, T, &low.weight, h.data(), first);
        if (l.block > 1 && ours->form_of(type) != PAIRS)
          expect(!memcmp(a.data(), b.data(), 4 * a.size()), std::string(l.name) + " product with an adapter");
        expect(!memcmp(b.data(), plain.data(), 4 * first * rows) && !memcmp(b.data(), many.data(), 4 * T * rows) &&
               memcmp(b.data() + first * rows, plain.data() + first * rows, 4 * rows), "plain: an adapter of some tokens");
      }
    std::vector<float> a(cols), b(cols);
    for (int64_t r = 0; r < rows; r++) {
      ours->decode(w.weight, r, 0, cols, a.data()), twin->decode(w.weight, r, 0, cols, b.data());
      expect(!memcmp(a.data(), b.data(), 4 * cols), std::string(l.name) + " row");
    }
  }
}
// All quants and activations are extreme at once, so that a sum in 16 bits would overflow.
void extremes() {
  for (int type = Q4_0_T; type < TYPES; type++)
    for (int byte : {0x00, 0x0f, 0x7f, 0x80, 0xff}) {
      Matrix w(type, 5, 512, byte);
      std::vector<float> x(24 * 512);
      for (size_t i = 0; i < x.size(); i++) x[i] = i / 512 % 3 && i % 2 ? -1 : 1;
      for (int T : {1, 2, 5, 24}) {
        auto a = multiply(ours, w.weight, nullptr, x, T), b = multiply(twin, w.weight, nullptr, x, T);
        expect(!memcmp(a.data(), b.data(), 4 * a.size()), std::string(LAYOUTS[type].name) + " product of extremes");
      }
    }
}
void rows() {
  for (int n : {1, 3, 16, 77, 640}) {
    auto x = draws(n), w = draws(n);
    std::vector<float> a(n), b(n);
    ours->norm(x.data(), w.data(), a.data(), n, 1e-6f), twin->norm(x.data(), w.data(), b.data(), n, 1e-6f);
    close(a, b, n + 8, 0, "norm");
    for (auto& v : x) v *= 20;
    a = b = x;
    ours->softcap(a.data(), n, 30), twin->softcap(b.data(), n, 30);
    close(a, b, 0, 30 * 16 * ROUNDOFF, "softcap");
    float top[2], total[2];
    int64_t index[2];
    ours->log_sum(x.data(), n, top, total, index), twin->log_sum(x.data(), n, top + 1, total + 1, index + 1);
    expect(top[0] == top[1] && index[0] == index[1], "largest");
    close({total[0]}, {total[1]}, n + 400, 0, "sum of exp");
  }
}
// Prompts of 300 tokens through heads and attention, in one go, with windows, caps, halves and floats.
void attention(int H, int window, float cap, bool half) {
  const int N = 4, K = 2, T = 300;
  const int64_t kv = kv_bytes(half ? F16_T : F32_T, K, H), columns = (N + 2 * K) * H;
  auto start = draws(T * columns), norms = draws(H), angles = draws(H / 2);
  std::vector<float> cosines, sines, out[2];
  for (float a : angles) cosines.push_back(std::cos(a)), sines.push_back(std::sin(a));
  for (int level = 0; level < 2; level++) {
    const Kernels* k = level ? twin : ours;
    std::vector<std::vector<uint8_t>> memory;
    std::vector<uint64_t> pages;
    for (int p = 0; p <= T / PAGE; p++) memory.emplace_back(2 * kv), pages.push_back((uint64_t)memory[p].data());
    auto qkv = start;
    for (int t = 0; t < T; t++) {
      uint8_t* page = (uint8_t*)pages[t / PAGE];
      k->split_heads({&qkv[t * columns], N, K, H, norms.data(), nullptr, 1e-6f, 0.3f, {cosines.data(), sines.data()}, page,
                      page + kv, t % PAGE, half ? F16_T : F32_T});
    }
    out[level].assign(T * N * H, NAN);
    Attention a{qkv.data(), columns, out[level].data(), N * H, N, K, H, window, cap, half ? F16_T : F32_T, 0, kv};
    Scratch scratch;
    for (int t = 0; t < T; t += 16)
      for (int head = 0; head < K; head++)
        k->attend(a, {t, std::min(16, T - t), t, pages.data(), head, 0, N / K, -1, nullptr}, scratch);
  }
  // Scores err by H roundoffs of |q||k| < 30 H, and by a rounding of k and v to halves that falls the other way.
  float bound = (half ? 0x1p-10f * 8 : 60.f * H * ROUNDOFF * 8) + T * ROUNDOFF;
  close(out[0], out[1], 0, bound * 4, "attention of heads of " + std::to_string(H) + (half ? " halves" : " floats"));
}

// Attention of one query by numerics v2 (tile_attention.h), with exp, tanh and sums as a level of 16 lanes computes them.
float exponential(float x) {
  if (x < -87.3f) return 0;
  x = std::min(x, 88.f);
  const float n = std::nearbyint(x * 1.44269504f), r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = std::fma(p, r, c);
  return std::ldexp(std::fma(p, r * r, r + 1), (int)n);
}
std::vector<float> attend_by_tiles(const float* q, const std::vector<float>& keys, const std::vector<float>& values, int H,
                                   int position, int window, float cap) {
  std::vector<float> merged(H), partial(H), query = to_bfloat16(std::vector<float>(q, q + H)), column(KEY_SPAN);
  float merged_top = 0, merged_total = 0;
  for (int base = 0; base <= position; base += KEY_SPAN) {
    const int begin = std::max(base, window ? position - window + 1 : 0), end = std::min(base + KEY_SPAN, position + 1);
    std::vector<float> weights(KEY_SPAN), lanes(16);
    float top = -INFINITY;
    for (int key = begin; key < end; key++) {
      float& x = weights[key - base] = tile_sum(query.data(), &keys[key * H], H);
      if (cap) x = cap * (1 - 2 / (exponential(std::min(x * (1 / cap), 20.f) * 2) + 1));
      top = std::max(top, x);
    }
    for (int key = begin; key < end; key++) {
      float& x = weights[key - base] = exponential(weights[key - base] - top);
      lanes[(key - base) % 16] += x, x = to_bfloat16(x);
    }
    if (begin >= end) continue;
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    for (int h = 0; h < H; h++) {
      for (int i = 0; i < KEY_SPAN; i++) column[i] = base + i <= position ? values[(base + i) * H + h] : 0;
      partial[h] = tile_sum(weights.data(), column.data(), KEY_SPAN);
    }
    if (!merged_total) {
      merged = partial, merged_top = top, merged_total = lanes[0];
      continue;
    }
    const float m = std::max(merged_top, top), a = exponential(merged_top - m), b = exponential(top - m);
    for (int h = 0; h < H; h++) merged[h] = merged[h] * a + partial[h] * b;
    merged_top = m, merged_total = merged_total * a + lanes[0] * b;
  }
  for (float& x : merged) x /= merged_total;
  return merged;
}
// Any number of tokens and heads at once, all spans together or one by one, on pages with numbers where no token is yet.
void attention_by_tiles(int H, int window, float cap) {
  const int N = 6, K = 2, G = N / K, T = 530;
  const int64_t kv = kv_bytes(BF16_T, K, H), columns = (N + 2 * K) * H;
  const auto norms = draws(H), angles = draws(H / 2);
  auto qkv = draws(T * columns);
  std::vector<float> cosines, sines, expected(T * N * H);
  for (float a : angles) cosines.push_back(std::cos(a)), sines.push_back(std::sin(a));
  std::vector<std::vector<uint16_t>> memory;
  std::vector<uint64_t> pages;
  for (int p = 0; p <= T / PAGE; p++) {
    memory.emplace_back(kv);
    for (auto& x : memory[p]) x = generator() & 0xbfff;  // all below 2
    pages.push_back((uint64_t)memory[p].data());
  }
  for (int t = 0; t < T; t++) {
    uint8_t* page = (uint8_t*)pages[t / PAGE];
    ours->split_heads({&qkv[t * columns], N, K, H, norms.data(), nullptr, 1e-6f, 0.3f, {cosines.data(), sines.data()}, page,
                       page + kv, t % PAGE, BF16_T});
  }
  for (int head = 0; head < K; head++) {
    std::vector<float> keys, values;
    for (int t = 0; t < T; t++) {
      const float *k = &qkv[t * columns + (N + head) * H], *v = k + K * H;
      keys.insert(keys.end(), k, k + H), values.insert(values.end(), v, v + H);
    }
    keys = to_bfloat16(keys), values = to_bfloat16(values);
    for (int t = 0; t < T; t++)
      for (int n = head * G; n < (head + 1) * G; n++) {
        const auto row = attend_by_tiles(&qkv[t * columns + n * H], keys, values, H, t, window, cap);
        memcpy(&expected[(t * N + n) * H], row.data(), 4 * H);
      }
  }
  for (bool by_span : {false, true})
    for (int heads : {1, G})
      for (int step : {1, 5, 7, ROWS / G}) {
        std::vector<float> out(T * N * H, NAN), partials;
        Attention a{qkv.data(), columns, out.data(), N * H, N, K, H, window, cap, BF16_T, 0, kv};
        Scratch scratch;
        for (int t = 0; t < T; t += step)
          for (int n = 0; n < N; n += heads) {
            AttentionTask task{t, std::min(step, T - t), t, pages.data(), n / G, n % G, heads, -1, nullptr};
            if (!by_span) {
              ours->attend(a, task, scratch);
              continue;
            }
            const int first = (window ? std::max(0, t - window + 1) : 0) / KEY_SPAN;
            const int spans = (t + task.tokens - 1) / KEY_SPAN - first + 1, rows = task.tokens * heads;
            partials.assign(spans * rows * (H + 2), NAN);
            for (task.span = first; task.span < first + spans; task.span++) {
              task.partial = &partials[(task.span - first) * rows * (H + 2)];
              ours->attend(a, task, scratch);
            }
            task.partial = partials.data();
            ours->merge(a, task, spans);
          }
        expect(!memcmp(out.data(), expected.data(), 4 * out.size()),
               "attention by tiles, heads of " + std::to_string(H) + ", " + std::to_string(step) + " tokens");
      }
}
// What matrix_pool.cpp does, by one thread. c += ... where `start` is given.
std::vector<float> train(const Kernels* kernels, cg::MatrixProduct m, const std::vector<float>& start = {}) {
  const MatrixKernels& k = *kernels->matrix;
  const int64_t strip = k.strip(m), strips = (m.width() + strip - 1) / strip, slab = m.bfloat16 ? 2 * k.slots : k.slots;
  std::vector<float> out = start, panels(strips * strip * k.slots), a((m.T + k.row_multiple) * k.slots);
  out.resize(m.T * m.width(), NAN);
  m.c = out.data(), m.add = !start.empty();
  for (int64_t r0 = 0; r0 < m.depth(); r0 += slab) {
    const int64_t depth = std::min<int64_t>(slab, m.depth() - r0);
    for (int64_t s = 0; s < strips; s++) k.decode_strip(m, r0, depth, s * strip, &panels[s * strip * m.slots(depth)]);
    k.gather_rows(m, r0, depth, 0, m.T, a.data());
    k.multiply_rows(m, r0, depth, a.data(), 0, m.T, panels.data(), 0, m.width());
  }
  return out;
}
// Products of bfloat16 factors: those of tiles are equal to their definition, others close to the exact sum of n products.
void bfloat16_training() {
  if (!ours->matrix->has_bfloat16()) return;
  for (int type = 0; type < TYPES; type++)
    for (bool transposed : {false, true})
      for (int64_t T : {1, 33}) {
        const int64_t rows = 600, cols = TYPE[type].block == 1 ? 545 : TYPE[type].block == 32 ? 544 : 768;
        Matrix w(type, rows, cols);
        cg::MatrixProduct m{nullptr, nullptr, w.weight, T, 3, rows - 5, transposed};
        m.bfloat16 = true;
        const int64_t depth = m.depth(), width = m.width();
        std::vector<float> values(rows * cols);
        for (int64_t r = 0; r < rows; r++) twin->decode(w.weight, r, 0, cols, &values[r * cols]);
        values = to_bfloat16(values);
        const auto x = draws(T * depth), start = draws(T * width), rounded = to_bfloat16(x);
        std::vector<float> turned(depth * T);  // x as it would be stored with its axes exchanged
        for (int64_t i = 0; i < T * depth; i++) turned[i % depth * T + i / depth] = x[i];
        for (bool add : {false, true}) {  // added to C, from turned rows
          m.a = add ? turned.data() : x.data(), m.a_transposed = add;
          const auto y = train(ours, m, add ? start : std::vector<float>());
          bool holds = true;
          std::vector<float> column(depth);
          for (int64_t j = 0; j < width; j++) {
            for (int64_t k = 0; k < depth; k++) column[k] = transposed ? values[(3 + k) * cols + j] : values[(3 + j) * cols + k];
            for (int64_t t = 0; t < T; t++) {
              const float first = add ? start[t * width + j] : 0, *a = &rounded[t * depth];
              double exact = first, size = std::fabs(first);
              for (int64_t k = 0; k < depth; k++) exact += (double)a[k] * column[k], size += std::fabs((double)a[k] * column[k]);
              holds &= std::fabs(y[t * width + j] - exact) <= (depth + 2) * ROUNDOFF * size;
              if (ours->form_of(Q8_0_T) == PAIRS) holds &= y[t * width + j] == tile_sum(a, column.data(), depth, first);
            }
          }
          expect(holds, std::string(TYPE[type].name) + " product of training in bfloat16, depth " + std::to_string(depth));
        }
      }
}
void training() {
  const int64_t T = 29, rows = 75, cols = 512;
  for (int type = 0; type < TYPES; type++)
    for (bool transposed : {false, true}) {
      Matrix w(type, rows, cols);
      cg::MatrixProduct m{nullptr, nullptr, w.weight, T, 3, rows - 5, transposed};
      auto x = draws(T * m.depth());
      m.a = x.data();
      float largest = 0, longest = 0;  // n roundoffs of n products
      std::vector<float> line(cols);
      for (int64_t r = 0; r < rows; r++) {
        twin->decode(w.weight, r, 0, cols, line.data());
        for (float v : line) largest = std::max(largest, std::fabs(v));
      }
      for (float v : x) longest = std::max(longest, std::fabs(v));
      close(train(ours, m), train(twin, m), 0, 2 * m.depth() * ROUNDOFF * m.depth() * largest * longest,
            std::string(TYPE[type].name) + (transposed ? " transposed" : "") + " product of training");
    }
  Matrix w(F32_T, 75, 40);
  auto x = draws(75 * T);
  cg::MatrixProduct a_transposed{x.data(), nullptr, w.weight, T, 0, 75, true};
  a_transposed.a_transposed = true;
  close(train(ours, a_transposed), train(twin, a_transposed), 0, 75 * 75 * ROUNDOFF * 16,
        "product of training with a transposed factor");
}
// The softmaxes of training: one row of scores, some of them masked.
void softmaxes() {
  const int n = 75, padded = 80;
  std::vector<int32_t> positions(padded, 1 << 30), segments(padded);
  for (int i = 0; i < n; i++) positions[i] = i % 50, segments[i] = i / 50;
  for (float cap : {0.f, 3.f})
    for (int window : {0, 9}) {
      const Keys keys{positions.data(), segments.data(), n, 20, 1, window, cap};
      const auto start = draws(padded), slopes = draws(padded), counts = draws(padded);
      std::vector<float> outputs[2], gradients[2];
      for (int level = 0; level < 2; level++) {
        const MatrixKernels& k = *(level ? twin : ours)->matrix;
        float max_score, sum;
        std::vector<float> weights = start, scores = start, d = slopes;
        k.softmax(keys, weights.data(), &max_score, &sum);
        k.softmax_backward(keys, scores.data(), d.data(), max_score + std::log(sum));
        weights.resize(n), scores.resize(n), d.resize(n);
        outputs[level] = weights, gradients[level] = scores;
        outputs[level].push_back(max_score), outputs[level].push_back(sum);
        gradients[level].insert(gradients[level].end(), d.begin(), d.end());
      }
      close(outputs[0], outputs[1], 0, 1e-4f, "weights of attention");
      close(gradients[0], gradients[1], 0, 1e-4f, "gradients of attention's weights");
      for (int level = 0; level < 2; level++) {
        std::vector<float> logits = start;
        SoftmaxSums sums{0.5f, 2, 3};
        const float shrink = (level ? twin : ours)->matrix->online_softmax(logits.data(), counts.data(), padded, 100, cap, sums);
        outputs[level] = logits;
        outputs[level].insert(outputs[level].end(), {shrink, sums.max_logit, sums.sum, (float)sums.best});
      }
      close(outputs[0], outputs[1], 0, 1e-4f, "sums over a vocabulary");
    }
}

}  // namespace

int main() {
  products(), rows(), training(), bfloat16_training(), softmaxes();
  if (!strstr(ours->name, "amx")) extremes();  // of numerics v1
  for (bool half : {false, true})
    for (int H : {6, 24, 64}) attention(H, 0, 0, half), attention(H, 100, 5, half);
  if (ours->form_of(Q8_0_T) == PAIRS)
    for (int H : {6, 24, 64}) attention_by_tiles(H, 0, 0), attention_by_tiles(H, 100, 5);
  printf("%s: %d checks, %d failures\n", ours->name, checks, failures);
  return failures > 0;
}
