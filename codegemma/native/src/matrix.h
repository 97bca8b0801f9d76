// Products of training spread over a pool of threads.
#pragma once
#include "kernels.h"
#include "pool.h"

namespace cg {

// Sets m.c; the same floats for any number of threads. Not to be called from two threads at once.
void multiply(const Kernels* kernels, Pool& pool, const Matrix& m);

}  // namespace cg
