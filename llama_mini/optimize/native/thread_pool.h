// A pool of threads that are started once for many jobs.
//
// A job is the numbers 0..n. Each thread has a range of them, split into chunks. It takes the chunks of its own range
// from the front, so that it reads memory in sequence, and then those of other threads from the end. So a thread that
// the system has suspended delays one chunk, not the whole job, which matters on a busy machine.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "isa.h"

#ifdef __x86_64__
inline int64_t ticks() { return __rdtsc(); }
inline void pause_briefly() { _mm_pause(); }
#else
inline int64_t ticks() {
  int64_t now;
  asm volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
}
inline void pause_briefly() { asm volatile("isb"); }  // most processors take `yield` for nothing
#endif

class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : threads_(threads), ranges_(new Range[threads]) {}

  // The Pool interface: `self` is a ThreadPool.
  static void run(void* self, int64_t n, Work work, void* context) { ((ThreadPool*)self)->run_job(n, work, context); }

  // The Pool interface. A matrix is soon read, and its first reads are slow, so waiting threads prefetch the next one.
  static void prefetch_next(void* self, const void* data, int64_t bytes, int parts) {
    ThreadPool& pool = *(ThreadPool*)self;
    pool.part_bytes_.store(bytes, std::memory_order_relaxed);
    pool.parts_.store(parts, std::memory_order_relaxed);
    pool.next_.store((const char*)data, std::memory_order_relaxed);
  }

  // The loop of every thread but the leader, thread 0, until `finish`.
  void work(int64_t thread) {
    for (int idle = 0; !done_.load(std::memory_order_acquire);)
      idle = run_chunk(thread) || prefetch(thread) ? 0 : spin(idle);
  }

  void finish() { done_.store(true, std::memory_order_release); }

  // How many ticks longer the leader would have worked on the jobs alone. Its own chunks show how fast it is.
  int64_t saved() const { return saved_; }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> unclaimed{0};  // job number, first unclaimed chunk, end of the unclaimed chunks
    const char* prefetched = nullptr;    // used by this thread alone: what it prefetches, and the bytes so far
    int64_t prefetched_bytes = 0;
  };

  void run_job(int64_t n, Work work, void* context) {
    n_ = n, work_ = work, context_ = context;
    range_size_ = (n + threads_ - 1) / threads_;
    chunk_size_ = threads_ == 1 ? n : (range_size_ + CHUNKS - 1) / CHUNKS;
    uint64_t all = 0;
    for (int64_t i = 0; i < threads_; i++) all += chunks(i);
    unfinished_.store(all, std::memory_order_relaxed);
    job_++;
    for (int64_t i = 0; i < threads_; i++)
      ranges_[i].unclaimed.store(job_ << 32 | chunks(i), std::memory_order_release);
    const int64_t begin = ticks();
    int64_t mine = 0;
    while (run_chunk(0)) mine++;
    const int64_t end = ticks();
    for (int idle = 0; unfinished_.load(std::memory_order_acquire) != 0;) idle = prefetch(0) ? 0 : spin(idle);
    if (mine > 0) saved_ += (end - begin) * (int64_t)all / mine - (ticks() - begin);
  }

  uint64_t chunks(int64_t i) const {
    const int64_t begin = i * range_size_, end = begin + range_size_ < n_ ? begin + range_size_ : n_;
    return begin < end ? (end - begin + chunk_size_ - 1) / chunk_size_ : 0;
  }

  // Claims a chunk and computes it; false if none is unclaimed. A claimed chunk belongs to the current job, because no
  // job ends before all its chunks are done.
  bool run_chunk(int64_t thread) {
    for (int64_t i = 0; i < threads_; i++) {
      const int64_t of = (thread + i) % threads_;
      uint64_t unclaimed = ranges_[of].unclaimed.load(std::memory_order_acquire);
      for (;;) {
        const uint64_t first = unclaimed >> 16 & 0xffff, end = unclaimed & 0xffff;
        if (first == end) break;
        const uint64_t claimed = i == 0 ? unclaimed + (1 << 16) : unclaimed - 1;
        if (!ranges_[of].unclaimed.compare_exchange_weak(unclaimed, claimed, std::memory_order_acq_rel,
                                                         std::memory_order_acquire))
          continue;
        const int64_t begin = of * range_size_ + (i == 0 ? first : end - 1) * chunk_size_,
                      stop = (of + 1) * range_size_;
        int64_t last = begin + chunk_size_ < stop ? begin + chunk_size_ : stop;
        work_(context_, begin, last < n_ ? last : n_);
        unfinished_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
      }
    }
    return false;
  }

  // Prefetches some lines of this thread's range of the next matrix; false if enough of it is prefetched.
  bool prefetch(int64_t thread) {
    Range& mine = ranges_[thread];
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
      pause_briefly();
      return idle + 1;
    }
    sched_yield();  // let another process have the core
    return idle;
  }

  static constexpr int64_t CHUNKS = 2;                                         // in a range
  static constexpr int64_t PREFETCH_STEP = 1024, PREFETCH_BYTES = 256 * 1024;  // at a time, and in all
  static constexpr int SPIN_COUNT =
      4096;  // pauses: some tens of microseconds, longer than the leader ever computes alone

  std::atomic<const char*> next_{nullptr};
  std::atomic<int64_t> part_bytes_{0}, parts_{1};
  const int64_t threads_;
  std::unique_ptr<Range[]> ranges_;
  int64_t n_ = 0, range_size_ = 1, chunk_size_ = 1;
  Work work_ = nullptr;
  void* context_ = nullptr;
  uint64_t job_ = 0;
  int64_t saved_ = 0;
  alignas(64) std::atomic<uint64_t> unfinished_{0};
  alignas(64) std::atomic<bool> done_{false};
};

// Decides whether several threads pay. Where other processes use the cores, the leader may wait longer for suspended
// threads, some milliseconds each time, than they save. Then it works alone for a while before the next trial, and
// twice as long after each trial that failed.
class Teamwork {
 public:
  bool pays() const { return now() >= alone_until_.load(std::memory_order_relaxed); }

  // The ticks that an operator took with all threads, and those that the leader alone would have taken.
  void measured(int64_t together, int64_t alone) {
    const int64_t pause = pause_.load(std::memory_order_relaxed);
    const bool pays = alone > together + together / 5;
    if (!pays) alone_until_.store(now() + pause, std::memory_order_relaxed);
    pause_.store(pays ? std::max(pause / 2, FIRST_PAUSE) : std::min(pause * 2, LAST_PAUSE), std::memory_order_relaxed);
  }

 private:
  static int64_t now() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

  static constexpr int64_t FIRST_PAUSE = 4'000'000, LAST_PAUSE = 1'000'000'000;  // nanoseconds
  std::atomic<int64_t> alone_until_{0}, pause_{FIRST_PAUSE};
};
