// Threads that run one job together: every thread calls the same function, which may wait for the others at barriers.
// Waiting threads spin for at most 100 us, then sleep.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace cg {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }
  // Runs body(thread) on every thread, the caller's being thread 0, and returns when all are done.
  void run(const std::function<void(int)>& body);
  void barrier();

 private:
  void worker(int thread);
  int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace cg
