// The pool of threads behind parallel.h. One job at a time; its pieces are handed out by a counter.
//
// A worker enters a job by raising `inside` and then looking whether the job is still open; the caller closes
// the job and then waits until `inside` is 0. Both are sequentially consistent, so either the worker sees the
// job closed and leaves, or the caller sees the worker and waits for it.
#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace elastic_decode {
namespace {

thread_local bool taking_part = false;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks before a worker sleeps, some 50 microseconds: longer than the gap between two ops of a decode step.
constexpr int kLooks = 2000;

class Pool {
 public:
  void run(std::int64_t count, std::int64_t piece, int threads, RangeFunction function, const void* body) {
    if (taking_part || !busy_.try_lock()) {
      function(body, 0, count);
      return;
    }
    grow(threads - 1);
    function_ = function, body_ = body, count_ = count, piece_ = piece;
    next_.store(0, std::memory_order_relaxed);
    places_.store(threads - 1, std::memory_order_relaxed);
    const std::uint64_t job = ++jobs_;
    open_.store(job);
    if (asleep_.load() > 0) {
      {
        std::lock_guard<std::mutex> hold(mutex_);
      }  // no worker is between its last look and its sleep
      wake_.notify_all();
    }
    taking_part = true;
    take_pieces();
    taking_part = false;
    open_.store(0);
    while (inside_.load() != 0) pause();
    busy_.unlock();
  }

 private:
  void take_pieces() {
    for (;;) {
      const std::int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (begin >= count_) return;
      function_(body_, begin, std::min(count_, begin + piece_));
    }
  }

  void grow(int workers) {
    for (; workers_ < workers; ++workers_) std::thread(&Pool::work, this).detach();
  }

  void work() {
    taking_part = true;
    std::uint64_t seen = 0;
    for (;;) {
      std::uint64_t job = open_.load();
      for (int look = 0; (job == 0 || job == seen) && look < kLooks; ++look) {
        pause();
        job = open_.load();
      }
      if (job == 0 || job == seen) {
        std::unique_lock<std::mutex> hold(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(hold, [&] { return (job = open_.load()) != 0 && job != seen; });
        asleep_.fetch_sub(1);
      }
      seen = job;
      inside_.fetch_add(1);
      if (open_.load() == job && places_.fetch_sub(1) > 0) take_pieces();
      inside_.fetch_sub(1);
    }
  }

  std::mutex busy_;
  RangeFunction function_ = nullptr;
  const void* body_ = nullptr;
  std::int64_t count_ = 0, piece_ = 1;
  std::uint64_t jobs_ = 0;
  int workers_ = 0;
  alignas(64) std::atomic<std::uint64_t> open_{0};  // the job's number while it is open, else 0
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> places_{0};  // workers that may still take part
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads live as long as the process.
Pool* pool() {
  static Pool* the_pool = [] {
    static Pool* made = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads, and perhaps a lock that one of them held: it starts anew.
    pthread_atfork(nullptr, nullptr, [] { new (made) Pool; });
#endif
    return made;
  }();
  return the_pool;
}

}  // namespace

bool in_pieces() {
  return taking_part;
}

void run_pieces(std::int64_t count, std::int64_t piece, int threads, RangeFunction function,
                const void* body) {
  pool()->run(count, piece, threads, function, body);
}

}  // namespace elastic_decode
