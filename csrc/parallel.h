// A small pool of threads that sleep between jobs. Nothing spins: on a machine with other work, spinning threads starve the ones
// they wait for.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace tinytrain {

class ThreadPool {
 public:
  // `threads` counts the caller, which works too.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls job(context, worker) once for each worker in [0, count) and returns when all are done. Allocates nothing; `job` must
  // not throw. With count 1 no other thread wakes.
  void run(int count, void (*job)(void* context, int worker), void* context);

 private:
  void work(int worker);

  std::mutex mutex_;
  std::condition_variable start_, done_;
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  long generation_ = 0;  // jobs handed out so far
  int count_ = 0, running_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// Lets threads that finish out of order pass one at a time in order 0, 1, 2 ...: sums get the same bits for any thread count.
class Turnstile {
 public:
  void reset() { next_ = 0; }
  template <class F>
  void pass(long turn, F&& body) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return next_ == turn; });
    body();
    ++next_;
    lock.unlock();
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  long next_ = 0;
};

}  // namespace tinytrain
