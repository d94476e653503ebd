// Threads that work through one job after another without being called anew for each.
//
// A job is 0..n, a stretch of it for each thread, in chunks. A thread takes its own from the front, so that it reads
// memory in one sequence; when it has none left it takes others' from the end. A thread that the system has put aside
// holds up one share at most, not every job: on a busy machine that is the difference between a slow answer and none.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <memory>

#include "isa.h"

class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : threads_(threads), open_(new Range[threads]) {}

  // As a Pool: `self` is the threads.
  static void run(void* self, int64_t n, Work work, void* context) { ((ThreadPool*)self)->run_job(n, work, context); }

  // As a Pool: matrices are short, and each begins with memory that answers late; whoever waits asks for the next one.
  static void prefetch_next(void* self, const void* data, int64_t bytes, int parts) {
    ThreadPool& threads = *(ThreadPool*)self;
    threads.part_bytes_.store(bytes, std::memory_order_relaxed);
    threads.parts_.store(parts, std::memory_order_relaxed);
    threads.next_.store((const char*)data, std::memory_order_relaxed);
  }

  // What every thread but the leader, who is 0, does until `finish`.
  void work(int64_t thread) {
    for (int idle = 0; !done_.load(std::memory_order_acquire);)
      idle = run_chunk(thread) || prefetch(thread) ? 0 : spin(idle);
  }

  void finish() { done_.store(true, std::memory_order_release); }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> open{0};     // the job, the first share that nobody took, and the end of those
    const char* prefetched = nullptr;  // the thread's alone: what it prefetched for last, and so many bytes of it
    int64_t prefetched_bytes = 0;
  };

  void run_job(int64_t n, Work work, void* context) {
    n_ = n, work_ = work, context_ = context;
    range_ = (n + threads_ - 1) / threads_;
    size_ = threads_ == 1 ? n : (range_ + CHUNKS - 1) / CHUNKS;
    uint64_t all = 0;
    for (int64_t i = 0; i < threads_; i++) all += chunks(i);
    unfinished_.store(all, std::memory_order_relaxed);
    job_++;
    for (int64_t i = 0; i < threads_; i++) open_[i].open.store(job_ << 32 | chunks(i), std::memory_order_release);
    while (run_chunk(0)) {
    }
    for (int idle = 0; unfinished_.load(std::memory_order_acquire) != 0;) idle = prefetch(0) ? 0 : spin(idle);
  }

  uint64_t chunks(int64_t i) const {
    const int64_t begin = i * range_, end = begin + range_ < n_ ? begin + range_ : n_;
    return begin < end ? (end - begin + size_ - 1) / size_ : 0;
  }

  // Takes a share and does it; false where none is left. Who takes one knows that it is of the job whose work he reads:
  // no job ends with a share undone.
  bool run_chunk(int64_t thread) {
    for (int64_t i = 0; i < threads_; i++) {
      const int64_t of = (thread + i) % threads_;
      uint64_t open = open_[of].open.load(std::memory_order_acquire);
      for (;;) {
        const uint64_t first = open >> 16 & 0xffff, end = open & 0xffff;
        if (first == end) break;
        const uint64_t less = i == 0 ? open + (1 << 16) : open - 1;
        if (!open_[of].open.compare_exchange_weak(open, less, std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        const int64_t begin = of * range_ + (i == 0 ? first : end - 1) * size_, stop = (of + 1) * range_;
        int64_t last = begin + size_ < stop ? begin + size_ : stop;
        work_(context_, begin, last < n_ ? last : n_);
        unfinished_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
      }
    }
    return false;
  }

  // Asks for some lines at the thread's place in what comes next; false where it has prefetched for enough.
  bool prefetch(int64_t thread) {
    Range& mine = open_[thread];
    const char* next = next_.load(std::memory_order_relaxed);
    const int64_t bytes = part_bytes_.load(std::memory_order_relaxed), parts = parts_.load(std::memory_order_relaxed);
    if (next != mine.prefetched) mine.prefetched = next, mine.prefetched_bytes = 0;
    if (next == nullptr || mine.prefetched_bytes >= PREFETCH_BYTES / parts || mine.prefetched_bytes >= bytes / threads_)
      return false;
    const char* at = next + bytes / threads_ * thread + mine.prefetched_bytes;
    for (int64_t part = 0; part < parts; part++)
      for (int64_t i = 0; i < PREFETCH_STEP; i += 64) __builtin_prefetch(at + part * bytes + i, 0, 2);
    mine.prefetched_bytes += PREFETCH_STEP;
    return true;
  }

  static int spin(int idle) {
    if (idle < SPIN_COUNT) {
      _mm_pause();
      return idle + 1;
    }
    sched_yield();  // somebody else may need the core
    return idle;
  }

  static constexpr int64_t CHUNKS = 2;  // of a stretch
  static constexpr int64_t PREFETCH_STEP = 1024,
                           PREFETCH_BYTES = 256 * 1024;  // bytes: between two looks for work, and in all
  static constexpr int SPIN_COUNT = 4096;  // pauses: some tens of microseconds, longer than a leader is ever alone

  std::atomic<const char*> next_{nullptr};
  std::atomic<int64_t> part_bytes_{0}, parts_{1};
  const int64_t threads_;
  std::unique_ptr<Range[]> open_;
  int64_t n_ = 0, range_ = 1, size_ = 1;
  Work work_ = nullptr;
  void* context_ = nullptr;
  uint64_t job_ = 0;
  alignas(64) std::atomic<uint64_t> unfinished_{0};
  alignas(64) std::atomic<bool> done_{false};
};
