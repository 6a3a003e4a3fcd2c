// Threads that run the same function at once and share out the work of its stages. Whoever comes late, or never, holds nobody up:
// a thread only waits for pieces that another one has begun.
#pragma once
#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

struct Stage {
  std::atomic<int64_t> next{0}, done{0};
};

class Team {
 public:
  Team() = default;  // alone
  explicit Team(Stage* stages) : stages_(stages) {}

  bool alone() const { return !stages_; }

  // Calls piece(i) for all i below count, and returns when all are done. All threads make the same calls in the same order.
  template <class Piece>
  void each(int64_t count, Piece piece) {
    if (alone()) {
      for (int64_t i = 0; i < count; i++) piece(i);
      return;
    }
    Stage& stage = *stages_++;
    for (;;) {
      const int64_t i = stage.next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) break;
      piece(i);
      stage.done.fetch_add(1, std::memory_order_release);
    }
    for (int turns = 0; stage.done.load(std::memory_order_acquire) < count; turns++) {
      if (turns < 2000)
        rest();
      else
        sched_yield();  // the other one may need this very core
    }
  }

 private:
  static void rest() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  Stage* stages_ = nullptr;
};
