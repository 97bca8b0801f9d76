// Products of training, and attention made of them, spread over a pool of threads. Not to be called from two threads at once.
#pragma once
#include <cstdlib>
#include <functional>

#include "kernels.h"
#include "pool.h"

namespace cg {

// Sets m.c; the same floats for any number of threads.
void multiply(const Kernels* kernels, Pool& pool, const Matrix& m);

// Floats in huge pages where there are any, grown as needed and kept.
class Buffer {
 public:
  float* at_least(int64_t n);

 private:
  struct Free { void operator()(float* p) const { std::free(p); } };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

// Runs body(thread) on every thread, which all do with denormals as the caller does.
void share(Pool& pool, const std::function<void(int)>& body);

// Causal attention within segments. Positions rise with the index within a segment. All N heads of q, out and their gradients
// [B, T, N, H], N / K for each head of k, v and theirs [B, T, K, H].
struct Attended {
  const float *q, *k, *v;
  const int32_t *positions, *segments;  // [B, T]
  int64_t B, T, N, K, H;
  int32_t window;                       // see Keys
  float cap;
  bool paired;
};
void attend(const Kernels* kernels, Pool& pool, const Attended& s, float* out, float* log_sums_BTN);
void attend_back(const Kernels* kernels, Pool& pool, const Attended& s, const float* log_sums_BTN, const float* d_out,
                 float* dq, float* dk, float* dv);

// Of `targets` hidden states [M, D], against all rows of a table: their sums, and counts * exp(logit - most) * slope * row [M, D].
// Rows whose count is 0 are out.
struct Vocabulary {
  const float* hidden;
  int64_t targets;
  Weight table;
  const float* counts;
  float cap;  // of the logits; 0: none
  bool paired;
};
void fold(const Kernels* kernels, Pool& pool, const Vocabulary& v, float* mean_MD, Sums* sums_M);

}  // namespace cg
