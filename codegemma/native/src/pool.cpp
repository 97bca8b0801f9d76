#include "pool.h"

#include "kernels.h"

#include <climits>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cg {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<int> sleepers{0};  // a wake is a system call: made only when a thread may sleep

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  sleepers.fetch_add(1);
  syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  sleepers.fetch_sub(1);
#else
  if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  if (sleepers.load()) syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

void wait_until_not(std::atomic<uint32_t>& word, uint32_t value) {
  auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  for (;;) {
    for (int i = 0; i < 64; i++) {
      if (word.load(std::memory_order_acquire) != value) return;
      relax();
    }
    if (std::chrono::steady_clock::now() > end) break;
  }
  while (word.load(std::memory_order_acquire) == value) sleep_while(word, value);
}

}  // namespace

void wait_for_zero(const std::atomic<int>& pending) {
  for (int i = 0; pending.load(std::memory_order_acquire); i++) i < 1000 ? relax() : std::this_thread::yield();
}

Pool::Pool(int threads) : threads_(threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back(&Pool::worker, this, i);
}

Pool::~Pool() {
  stop_ = true;
  job_.fetch_add(1);
  wake(job_);
  for (auto& w : workers_) w.join();
}

void Pool::barrier() {
  if (threads_ == 1) return;
  uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1);
    wake(phase_);
  } else {
    wait_until_not(phase_, phase);
  }
}

void Pool::run(const std::function<void(int)>& body) {
  body_ = &body;
  if (threads_ > 1) {
    job_.fetch_add(1);
    wake(job_);
  }
  body(0);
  barrier();
}

void Pool::worker(int thread) {
  uint32_t last_job = 0;
  for (;;) {
    wait_until_not(job_, last_job);
    last_job++;
    if (stop_) return;
    (*body_)(thread);
    barrier();
  }
}

}  // namespace cg
