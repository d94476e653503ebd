// Threads that work through one job after another without being called anew for each.
//
// A job is shares of 0..n. The leader, who brings the jobs, takes shares from the front, the others from the back, and
// who is free takes the next: a thread that the system has put aside holds up one share at most, not every job. On a
// busy machine that is the difference between a slow answer and none; on an idle one a job costs a tenth of OpenMP's.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>

#include "forms.h"

class Crew {
 public:
  explicit Crew(int64_t threads) : threads_(threads) {}

  // As a Team: `self` is the crew.
  static void run(void* self, int64_t n, Work work, void* context) { ((Crew*)self)->lead(n, work, context); }

  // What every thread but the leader does until `finish`.
  void help() {
    for (int idle = 0; !over_.load(std::memory_order_acquire);) idle = take(false) ? 0 : rest(idle);
  }

  void finish() { over_.store(true, std::memory_order_release); }

 private:
  void lead(int64_t n, Work work, void* context) {
    const int64_t most = threads_ == 1 ? 1 : threads_ * SHARES;
    size_ = n < most ? 1 : (n + most - 1) / most;
    n_ = n, work_ = work, context_ = context;
    const uint64_t shares = (n + size_ - 1) / size_;
    undone_.store(shares, std::memory_order_relaxed);
    job_++;
    open_.store(job_ << 32 | shares, std::memory_order_release);  // no first share taken yet
    while (take(true)) {
    }
    for (int idle = 0; undone_.load(std::memory_order_acquire) != 0;) idle = rest(idle);
  }

  // Takes a share and does it; false where none is left. `open_` holds job, first open share and the end of the open ones,
  // so that whoever takes one knows that it is of the job whose work he reads: no job ends with a share undone.
  bool take(bool front) {
    uint64_t open = open_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t first = open >> 16 & 0xffff, end = open & 0xffff;
      if (first == end) return false;
      const uint64_t less = front ? open + (1 << 16) : open - 1;
      if (!open_.compare_exchange_weak(open, less, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const int64_t share = front ? first : end - 1, begin = share * size_;
      work_(context_, begin, begin + size_ < n_ ? begin + size_ : n_);
      undone_.fetch_sub(1, std::memory_order_acq_rel);
      return true;
    }
  }

  static int rest(int idle) {
    if (idle < PATIENCE) {
      _mm_pause();
      return idle + 1;
    }
    sched_yield();  // somebody else may need the core
    return idle;
  }

  static constexpr int64_t SHARES = 8;   // of a job, for each thread
  static constexpr int PATIENCE = 4096;  // pauses: some tens of microseconds, longer than a leader is ever alone

  const int64_t threads_;
  int64_t n_ = 0, size_ = 1;
  Work work_ = nullptr;
  void* context_ = nullptr;
  uint64_t job_ = 0;
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<uint64_t> undone_{0};
  alignas(64) std::atomic<bool> over_{false};
};
