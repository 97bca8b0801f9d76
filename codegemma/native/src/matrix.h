// Products of training, and attention made of them, spread over a pool of threads. One job at a time.
#pragma once
#include <cstdlib>
#include <functional>

#include "kernels.h"
#include "pool.h"

namespace cg {

// Floats, in huge pages if the system has them. The memory grows as needed and never shrinks.
class FloatArray {
 public:
  float* at_least(int64_t n);

 private:
  struct Free { void operator()(float* p) const { std::free(p); } };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

// Memory of products and attention that is kept from job to job.
struct WorkArrays {
  FloatArray panels;                 // decoded slabs of B
  std::vector<FloatArray> gathered;  // rows of A, by thread
  FloatArray queries, outputs, scores, d_scores;
};
// The kernels, threads and memory that a job runs on.
struct Workers {
  const Kernels* kernels;
  Pool& pool;
  WorkArrays& arrays;
};

// Runs body(thread) on every thread, each with the caller's treatment of denormals.
void run_on_all(Pool& pool, const std::function<void(int)>& body);

// Sets m.c, or adds to it (m.add); the same floats for any number of threads.
void multiply(const Workers& workers, const MatrixProduct& m);

// Causal attention within segments. Within a segment, positions rise with the index. q, out and their gradients are
// [B, T, N, H]; k, v and their gradients [B, T, K, H], each head of which serves N / K query heads.
struct AttentionInputs {
  const float *q, *k, *v;
  const int32_t *positions, *segments;  // [B, T]
  int64_t B, T, N, K, H;
  int32_t window;                       // see Keys
  float cap;
  bool bfloat16;
};
void attend(const Workers& workers, const AttentionInputs& s, float* out, float* log_sums_BTN);
void attend_back(const Workers& workers, const AttentionInputs& s, const float* log_sums_BTN, const float* d_out,
                 float* dq, float* dk, float* dv);

// The softmax of `targets` hidden states [M, D] over all rows of a table. Rows whose count is 0 are left out.
struct Vocabulary {
  const float* hidden;
  int64_t targets;
  Weight table;
  const float* counts;
  float cap;  // of the logits; 0: none
  bool bfloat16;
};
// Sets sums_M, and for each target the sum over rows of counts * exp(logit - max) * slope of the soft cap * row.
void vocabulary_softmax(const Workers& workers, const Vocabulary& v, float* weighted_MD, SoftmaxSums* sums_M);

}  // namespace cg
