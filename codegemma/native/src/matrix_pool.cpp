#include "matrix.h"

#include <algorithm>
#include <cstdlib>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cg {
namespace {

constexpr int64_t WIDTH = 4096;          // columns of B that a slab holds: 4 MB; narrower slabs are decoded together
constexpr int64_t MAX_BLOCK_ROWS = 144;  // of A, that a thread takes at a time: with a slab's depth, 150 KB of its L2 cache

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// How a thread treats denormals. XLA's threads flush them and a pool's do not; in a job, all follow the calling thread.
struct FloatMode {
#if defined(__x86_64__)
  unsigned value = _mm_getcsr();
  void set() const { _mm_setcsr(value); }
#elif defined(__aarch64__)
  uint64_t value = read();
  static uint64_t read() { uint64_t v; asm volatile("mrs %0, fpcr" : "=r"(v)); return v; }
  void set() const { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  void set() const {}
#endif
};

}  // namespace

float* FloatArray::at_least(int64_t n) {
  constexpr int64_t PAGE_BYTES = 2 << 20;
  if (n <= size_) return data_.get();
  size_t bytes = round_up(4 * n, PAGE_BYTES);
  data_.reset((float*)std::aligned_alloc(PAGE_BYTES, bytes)), size_ = n;
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
  return data_.get();
}

void run_on_all(Pool& pool, const std::function<void(int)>& body) {
  const FloatMode mode;
  pool.run([&](int thread) {
    const FloatMode before;
    mode.set();
    body(thread);
    before.set();
  });
}

void multiply(const Workers& workers, const MatrixProduct& product) {
  const MatrixKernels& k = *workers.kernels->matrix;
  Pool& pool = workers.pool;
  std::vector<FloatArray>& gathered = workers.arrays.gathered;
  MatrixProduct m = product;
  m.bfloat16 &= k.has_bfloat16();
  const int64_t slab_rows = m.bfloat16 ? 2 * k.slots : k.slots;  // rows of B in a slab
  const int64_t R = m.depth(), J = m.width(), strip = k.strip(m), threads = pool.threads();
  const int64_t block_rows = round_up(ceil_div(m.T, threads * ceil_div(m.T, threads * MAX_BLOCK_ROWS)), k.row_multiple);
  const int64_t row_blocks = ceil_div(m.T, block_rows), widest = round_up(std::min(J, WIDTH), strip);
  const int64_t slabs = std::clamp<int64_t>(WIDTH / widest, 1, ceil_div(R, slab_rows));  // decoded together
  if ((int64_t)gathered.size() < threads) gathered.resize(threads);
  float* panels = workers.arrays.panels.at_least(slabs * k.slots * widest);
  for (FloatArray& b : gathered) b.at_least(block_rows * k.slots);
  for (int64_t j0 = 0; j0 < J; j0 += WIDTH) {
    const int64_t width = std::min(WIDTH, J - j0), strips = ceil_div(width, strip);
    // Few rows make few blocks: then the threads divide the columns too.
    const int64_t column_blocks = std::clamp<int64_t>(ceil_div(8 * threads, row_blocks), 1, ceil_div(width, 8 * k.panel));
    const int64_t block_columns = round_up(ceil_div(width, column_blocks), k.panel), span = slabs * slab_rows;
    std::vector<std::atomic<int64_t>> next(2 * ceil_div(R, span));
    run_on_all(pool, [&](int thread) {
      float* rows = gathered[thread].at_least(0);
      for (int64_t first = 0, step = 0; first < R; first += span) {
        const int64_t last = std::min(first + span, R);
        std::atomic<int64_t> &strip_next = next[step++], &tile_next = next[step++];
        auto slab = [&](int64_t r0) { return panels + m.slots(r0 - first) * widest; };
        for (int64_t i; (i = strip_next.fetch_add(1)) < strips * ceil_div(last - first, slab_rows);) {
          const int64_t r0 = first + i / strips * slab_rows, depth = std::min(slab_rows, last - r0), j = i % strips * strip;
          k.decode_strip(m, r0, depth, j0 + j, slab(r0) + j * m.slots(depth));
        }
        pool.barrier();
        for (int64_t i; (i = tile_next.fetch_add(1)) < row_blocks * column_blocks;) {
          const int64_t t0 = i / column_blocks * block_rows, t1 = std::min(t0 + block_rows, m.T);
          const int64_t c0 = i % column_blocks * block_columns, c1 = std::min(c0 + block_columns, width);
          for (int64_t r0 = first; r0 < last && c0 < c1; r0 += slab_rows) {
            const int64_t depth = std::min(slab_rows, last - r0);
            k.gather_rows(m, r0, depth, t0, t1, rows);
            k.multiply_rows(m, r0, depth, rows, t0, t1, slab(r0) + c0 * m.slots(depth), j0 + c0, j0 + c1);
          }
        }
        pool.barrier();
      }
    });
  }
}

}  // namespace cg
