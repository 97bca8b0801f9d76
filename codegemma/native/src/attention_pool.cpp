// Attention of training: parts of the queries against the keys that they can see, by the products of matrix_pool.cpp. Weights are
// computed again on the way back (FlashAttention, Dao et al. 2022, section 3.1): no [T, T] is kept. And the loss's pass over a
// vocabulary, which is attention to the rows of a table, as keys and as values.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "matrix.h"

namespace cg {
namespace {

constexpr int64_t ROWS_OF_PART = 512, QUERIES = 128;  // query rows (tokens x heads) and tokens that a part has at least
constexpr int64_t LANES = 16;                         // of the widest vector: keys of a row are written in so many
constexpr int64_t TARGETS = 1024, CHUNK = 4096;       // logits that stand at once: 16 MB

void each(Pool& pool, int64_t rows, const std::function<void(int64_t)>& body) {
  share(pool, [&](int thread) {
    for (int64_t row = rows * thread / pool.threads(); row < rows * (thread + 1) / pool.threads(); row++) body(row);
  });
}

// Tokens q0 .. q0 + queries, of one sequence and one head of keys, and the keys k0 .. k0 + keys that one of them sees.
struct Part {
  int64_t b, head, q0, queries, k0, keys;
};

bool sees(const Attended& s, int64_t query, int64_t key) {
  const int64_t below = (int64_t)s.positions[query] - s.positions[key];
  return s.segments[query] == s.segments[key] && below >= 0 && (!s.window || below < s.window);
}

struct Run {
  const Kernels* kernels;
  Pool& pool;
  const Attended& s;
  int64_t group = s.N / s.K;
  std::vector<int32_t> positions{}, segments{};       // of a part's keys
  Part p{};

  int64_t rows() const { return p.queries * group; }
  int64_t stride() const { return (p.keys + LANES - 1) / LANES * LANES; }  // of scores
  int64_t token(int64_t row) const { return p.b * s.T + p.q0 + row / group; }
  int64_t at(int64_t row) const { return token(row) * s.N + p.head * group + row % group; }  // of [B, T, N]

  void for_parts(const std::function<void()>& body) {
    const int64_t size = std::max(QUERIES, (ROWS_OF_PART + group - 1) / group);
    for (int64_t b = 0; b < s.B; b++)
      for (int64_t q0 = 0; q0 < s.T; q0 += size) {
        const int64_t queries = std::min(size, s.T - q0);
        std::vector<int64_t> firsts;                  // of the part's segments: no other query sees a key that these do not
        for (int64_t i = b * s.T + q0; i < b * s.T + q0 + queries; i++)
          if (firsts.empty() || s.segments[i] != s.segments[i - 1]) firsts.push_back(i);
        int64_t k0 = 0;
        auto seen = [&](int64_t key) { return std::any_of(firsts.begin(), firsts.end(), [&](int64_t i) { return sees(s, i, b * s.T + key); }); };
        while (k0 < q0 && !seen(k0)) k0++;
        p = {b, 0, q0, queries, k0, q0 + queries - k0};
        positions.assign(stride(), INT32_MAX), segments.assign(stride(), 0);
        std::copy_n(s.positions + b * s.T + k0, p.keys, positions.data());
        std::copy_n(s.segments + b * s.T + k0, p.keys, segments.data());
        for (p.head = 0; p.head < s.K; p.head++) body();
      }
  }
  void each_row(const std::function<void(int64_t)>& body) { each(pool, rows(), body); }
  Keys keys(int64_t row) const {
    return {positions.data(), segments.data(), p.keys, s.positions[token(row)], s.segments[token(row)], s.window, s.cap};
  }
  // The part's keys or values as a matrix [keys, H]; and rows of our own.
  Weight of_keys(const float* x) const {
    return {F32_T, (const uint8_t*)(x + first_key()), p.keys, s.H, 4 * s.K * s.H};
  }
  Weight of_rows(const float* x) const { return {F32_T, (const uint8_t*)x, rows(), s.H, 4 * s.H}; }
  int64_t first_key() const { return ((p.b * s.T + p.k0) * s.K + p.head) * s.H; }
  // out [rows, stride] = x [rows, H] times keys; out [rows, H] = weights times values
  void score(const float* x, const Weight& keys, float* out) {
    multiply(kernels, pool, {.a = x, .c = out, .w = keys, .T = rows(), .first = 0, .count = p.keys, .transposed = false,
                             .paired = s.paired, .c_stride = stride()});
  }
  void mix(const float* weights, const Weight& values, float* out) {
    multiply(kernels, pool, {.a = weights, .c = out, .w = values, .T = rows(), .first = 0, .count = p.keys, .transposed = true,
                             .paired = s.paired, .a_stride = stride()});
  }
  // to the part's rows of out [B, T, K, H] += weights^T [keys, rows] times x [rows, H]
  void spread(const float* weights, const float* x, float* out) {
    multiply(kernels, pool, {.a = weights, .c = out + first_key(), .w = of_rows(x), .T = p.keys, .first = 0, .count = rows(), .transposed = true,
                             .add = true, .paired = s.paired, .turned = true, .a_stride = stride(), .c_stride = s.K * s.H});
  }
};
enum { Q, OUT, SCORES, SLOPES, BUFFERS };
float* scratch(int which, int64_t n) {
  static Buffer buffers[BUFFERS];
  return buffers[which].at_least(n);
}

}  // namespace

void attend(const Kernels* kernels, Pool& pool, const Attended& s, float* out_BTNH, float* log_sums_BTN) {
  Run run{kernels, pool, s};
  run.for_parts([&] {
    const int64_t H = s.H, rows = run.rows(), stride = run.stride();
    float *q = scratch(Q, rows * H), *out = scratch(OUT, rows * H), *scores = scratch(SCORES, rows * stride);
    std::vector<float> sums(rows);
    run.each_row([&](int64_t i) { memcpy(q + i * H, s.q + run.at(i) * H, 4 * H); });
    run.score(q, run.of_keys(s.k), scores);
    run.each_row([&](int64_t i) {
      float most;
      kernels->matrix->soften(run.keys(i), scores + i * stride, &most, &sums[i]);
      log_sums_BTN[run.at(i)] = most + std::log(sums[i]);
    });
    run.mix(scores, run.of_keys(s.v), out);
    run.each_row([&](int64_t i) {
      const float *from = out + i * H, by = 1 / sums[i];
      float* to = out_BTNH + run.at(i) * H;
      for (int64_t h = 0; h < H; h++) to[h] = by * from[h];
    });
  });
}

void attend_back(const Kernels* kernels, Pool& pool, const Attended& s, const float* log_sums_BTN, const float* d_out_BTNH,
                 float* dq_BTNH, float* dk_BTKH, float* dv_BTKH) {
  Run run{kernels, pool, s};
  std::fill_n(dk_BTKH, s.B * s.T * s.K * s.H, 0.f), std::fill_n(dv_BTKH, s.B * s.T * s.K * s.H, 0.f);
  run.for_parts([&] {
    const int64_t H = s.H, rows = run.rows(), stride = run.stride();
    float *q = scratch(Q, rows * H), *d_out = scratch(OUT, rows * H);
    float *weights = scratch(SCORES, rows * stride), *slopes = scratch(SLOPES, rows * stride);
    run.each_row([&](int64_t i) {
      memcpy(q + i * H, s.q + run.at(i) * H, 4 * H), memcpy(d_out + i * H, d_out_BTNH + run.at(i) * H, 4 * H);
    });
    run.score(q, run.of_keys(s.k), weights);
    run.score(d_out, run.of_keys(s.v), slopes);
    run.each_row([&](int64_t i) {
      kernels->matrix->soften_back(run.keys(i), weights + i * stride, slopes + i * stride, log_sums_BTN[run.at(i)]);
    });
    run.spread(weights, d_out, dv_BTKH);
    run.spread(slopes, q, dk_BTKH);
    run.mix(slopes, run.of_keys(s.k), q);
    run.each_row([&](int64_t i) { memcpy(dq_BTNH + run.at(i) * H, q + i * H, 4 * H); });
  });
}

void fold(const Kernels* kernels, Pool& pool, const Vocabulary& v, float* mean_MD, Sums* sums_M) {
  const int64_t D = v.table.cols, V = v.table.rows;
  std::fill_n(mean_MD, v.targets * D, 0.f), std::fill_n(sums_M, v.targets, Sums{});
  std::vector<float> counts(CHUNK);
  for (int64_t m = 0; m < v.targets; m += TARGETS)
    for (int64_t first = 0; first < V; first += CHUNK) {
      const int64_t M = std::min(TARGETS, v.targets - m), count = std::min(CHUNK, V - first), padded = (count + LANES - 1) / LANES * LANES;
      float* logits = scratch(SCORES, TARGETS * CHUNK);
      counts.assign(padded, 0.f), std::copy_n(v.counts + first, count, counts.data());
      multiply(kernels, pool, {.a = v.hidden + m * D, .c = logits, .w = v.table, .T = M, .first = first, .count = count, .transposed = false,
                               .paired = v.paired, .c_stride = padded});
      each(pool, M, [&](int64_t i) {
        const float shrink = kernels->matrix->fold(logits + i * padded, counts.data(), padded, first, v.cap, sums_M[m + i]);
        float* mean = mean_MD + (m + i) * D;
        for (int64_t d = 0; shrink < 1 && d < D; d++) mean[d] *= shrink;
      });
      multiply(kernels, pool, {.a = logits, .c = mean_MD + m * D, .w = v.table, .T = M, .first = first, .count = count, .transposed = true,
                               .add = true, .paired = v.paired, .a_stride = padded});
    }
}

}  // namespace cg
