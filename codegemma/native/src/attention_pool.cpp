// Attention of training: blocks of queries against the keys they can see, by the products of matrix_pool.cpp. The backward
// pass computes the weights again (FlashAttention, Dao et al. 2022, section 3.1), so no [T, T] is kept. Also the loss's
// softmax over a vocabulary, which is attention to the rows of a table as keys and values.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "matrix.h"

namespace cg {
namespace {

constexpr int64_t MIN_ROWS = 512, MIN_QUERIES = 128;  // of a block: query rows (tokens x heads), tokens
constexpr int64_t LANES = 16;                         // of the widest vector: each row of scores is padded to whole ones
constexpr int64_t TARGETS = 1024, CHUNK = 4096;       // logits computed at once: 16 MB

void each_row(Pool& pool, int64_t rows, const std::function<void(int64_t)>& body) {
  run_on_all(pool, [&](int thread) {
    for (int64_t row = rows * thread / pool.threads(); row < rows * (thread + 1) / pool.threads(); row++) body(row);
  });
}

// Queries q0 .. q0 + queries of one sequence and one kv head, and the range of keys k0 .. k0 + keys that covers all they see.
struct QueryBlock {
  int64_t b, head, q0, queries, k0, keys;
};

bool sees(const AttentionInputs& s, int64_t query, int64_t key) {
  const int64_t below = (int64_t)s.positions[query] - s.positions[key];
  return s.segments[query] == s.segments[key] && below >= 0 && (!s.window || below < s.window);
}

struct BlockedAttention {
  const Workers& workers;
  const AttentionInputs& s;
  int64_t group = s.N / s.K;
  std::vector<int32_t> positions{}, segments{};       // of the block's keys
  QueryBlock p{};

  int64_t rows() const { return p.queries * group; }
  int64_t stride() const { return (p.keys + LANES - 1) / LANES * LANES; }  // of scores
  int64_t token(int64_t row) const { return p.b * s.T + p.q0 + row / group; }
  int64_t head_of(int64_t row) const { return token(row) * s.N + p.head * group + row % group; }  // of [B, T, N]

  void for_blocks(const std::function<void()>& body) {
    const int64_t size = std::max(MIN_QUERIES, (MIN_ROWS + group - 1) / group);
    for (int64_t b = 0; b < s.B; b++)
      for (int64_t q0 = 0; q0 < s.T; q0 += size) {
        const int64_t queries = std::min(size, s.T - q0);
        std::vector<int64_t> firsts;  // the first query of each segment: it sees the earliest keys of all in the segment
        for (int64_t i = b * s.T + q0; i < b * s.T + q0 + queries; i++)
          if (firsts.empty() || s.segments[i] != s.segments[i - 1]) firsts.push_back(i);
        int64_t k0 = 0;
        auto visible = [&](int64_t key) {
          return std::any_of(firsts.begin(), firsts.end(), [&](int64_t i) { return sees(s, i, b * s.T + key); });
        };
        while (k0 < q0 && !visible(k0)) k0++;
        p = {b, 0, q0, queries, k0, q0 + queries - k0};
        positions.assign(stride(), INT32_MAX), segments.assign(stride(), 0);
        std::copy_n(s.positions + b * s.T + k0, p.keys, positions.data());
        std::copy_n(s.segments + b * s.T + k0, p.keys, segments.data());
        for (p.head = 0; p.head < s.K; p.head++) body();
      }
  }
  void each_row(const std::function<void(int64_t)>& body) { cg::each_row(workers.pool, rows(), body); }
  Keys keys(int64_t row) const {
    return {positions.data(), segments.data(), p.keys, s.positions[token(row)], s.segments[token(row)], s.window, s.cap};
  }
  // The block's keys or values, or its query rows, as a matrix [keys or rows, H].
  Weight of_keys(const float* x) const {
    return {F32_T, (const uint8_t*)(x + first_key()), p.keys, s.H, 4 * s.K * s.H};
  }
  Weight of_rows(const float* x) const { return {F32_T, (const uint8_t*)x, rows(), s.H, 4 * s.H}; }
  int64_t first_key() const { return ((p.b * s.T + p.k0) * s.K + p.head) * s.H; }
  // score: out [rows, stride] = x [rows, H] times the transpose of keys; weigh: out [rows, H] = weights times values
  void score(const float* x, const Weight& keys, float* out) {
    multiply(workers, {.a = x, .c = out, .w = keys, .T = rows(), .first = 0, .count = p.keys, .by_rows = false,
                       .bfloat16 = s.bfloat16, .c_stride = stride()});
  }
  void weigh(const float* weights, const Weight& values, float* out) {
    multiply(workers, {.a = weights, .c = out, .w = values, .T = rows(), .first = 0, .count = p.keys, .by_rows = true,
                       .bfloat16 = s.bfloat16, .a_stride = stride()});
  }
  // out [B, T, K, H], rows of the block's keys += weights^T [keys, rows] times x [rows, H]
  void scatter(const float* weights, const float* x, float* out) {
    multiply(workers, {.a = weights, .c = out + first_key(), .w = of_rows(x), .T = p.keys, .first = 0, .count = rows(),
                       .by_rows = true, .add = true, .bfloat16 = s.bfloat16, .a_transposed = true, .a_stride = stride(),
                       .c_stride = s.K * s.H});
  }
};

}  // namespace

void attend(const Workers& workers, const AttentionInputs& s, float* out_BTNH, float* log_sums_BTN) {
  BlockedAttention run{workers, s};
  run.for_blocks([&] {
    const int64_t H = s.H, rows = run.rows(), stride = run.stride();
    WorkArrays& arrays = workers.arrays;
    float *q = arrays.queries.at_least(rows * H), *out = arrays.outputs.at_least(rows * H);
    float* scores = arrays.scores.at_least(rows * stride);
    std::vector<float> sums(rows);
    run.each_row([&](int64_t i) { memcpy(q + i * H, s.q + run.head_of(i) * H, 4 * H); });
    run.score(q, run.of_keys(s.k), scores);
    run.each_row([&](int64_t i) {
      float max_score;
      workers.kernels->matrix->softmax(run.keys(i), scores + i * stride, &max_score, &sums[i]);
      log_sums_BTN[run.head_of(i)] = max_score + std::log(sums[i]);
    });
    run.weigh(scores, run.of_keys(s.v), out);
    run.each_row([&](int64_t i) {
      const float *from = out + i * H, scale = 1 / sums[i];
      float* to = out_BTNH + run.head_of(i) * H;
      for (int64_t h = 0; h < H; h++) to[h] = scale * from[h];
    });
  });
}

void attend_back(const Workers& workers, const AttentionInputs& s, const float* log_sums_BTN, const float* d_out_BTNH,
                 float* dq_BTNH, float* dk_BTKH, float* dv_BTKH) {
  BlockedAttention run{workers, s};
  std::fill_n(dk_BTKH, s.B * s.T * s.K * s.H, 0.f), std::fill_n(dv_BTKH, s.B * s.T * s.K * s.H, 0.f);
  run.for_blocks([&] {
    const int64_t H = s.H, rows = run.rows(), stride = run.stride();
    WorkArrays& arrays = workers.arrays;
    float *q = arrays.queries.at_least(rows * H), *d_out = arrays.outputs.at_least(rows * H);
    float *weights = arrays.scores.at_least(rows * stride), *d_scores = arrays.d_scores.at_least(rows * stride);
    run.each_row([&](int64_t i) {
      memcpy(q + i * H, s.q + run.head_of(i) * H, 4 * H), memcpy(d_out + i * H, d_out_BTNH + run.head_of(i) * H, 4 * H);
    });
    run.score(q, run.of_keys(s.k), weights);
    run.score(d_out, run.of_keys(s.v), d_scores);
    run.each_row([&](int64_t i) {
      workers.kernels->matrix->softmax_backward(run.keys(i), weights + i * stride, d_scores + i * stride,
                                                log_sums_BTN[run.head_of(i)]);
    });
    run.scatter(weights, d_out, dv_BTKH);
    run.scatter(d_scores, q, dk_BTKH);
    run.weigh(d_scores, run.of_keys(s.k), q);
    run.each_row([&](int64_t i) { memcpy(dq_BTNH + run.head_of(i) * H, q + i * H, 4 * H); });
  });
}

void vocabulary_softmax(const Workers& workers, const Vocabulary& v, float* weighted_MD, SoftmaxSums* sums_M) {
  const int64_t D = v.table.cols, V = v.table.rows;
  std::fill_n(weighted_MD, v.targets * D, 0.f), std::fill_n(sums_M, v.targets, SoftmaxSums{});
  std::vector<float> counts(CHUNK);
  for (int64_t m = 0; m < v.targets; m += TARGETS)
    for (int64_t first = 0; first < V; first += CHUNK) {
      const int64_t M = std::min(TARGETS, v.targets - m), count = std::min(CHUNK, V - first);
      const int64_t padded = (count + LANES - 1) / LANES * LANES;
      float* logits = workers.arrays.scores.at_least(TARGETS * CHUNK);
      counts.assign(padded, 0.f), std::copy_n(v.counts + first, count, counts.data());
      multiply(workers, {.a = v.hidden + m * D, .c = logits, .w = v.table, .T = M, .first = first, .count = count,
                         .by_rows = false, .bfloat16 = v.bfloat16, .c_stride = padded});
      each_row(workers.pool, M, [&](int64_t i) {
        const float shrink = workers.kernels->matrix->online_softmax(logits + i * padded, counts.data(), padded, first, v.cap,
                                                                     sums_M[m + i]);
        float* weighted = weighted_MD + (m + i) * D;
        for (int64_t d = 0; shrink < 1 && d < D; d++) weighted[d] *= shrink;
      });
      multiply(workers, {.a = logits, .c = weighted_MD + m * D, .w = v.table, .T = M, .first = first, .count = count,
                         .by_rows = true, .add = true, .bfloat16 = v.bfloat16, .a_stride = padded});
    }
}

}  // namespace cg
