// Threads over sequences, groups of blocks and chunks of time.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace statemix {

// Set in a child of fork (dispatch.cpp): the other threads of the pool do not exist there, and waiting for them never ends.
extern std::atomic<bool> forked;

// How many threads of `wanted` this process can have now (dispatch.cpp). OpenMP would end it at the first that cannot be started.
int64_t startable(int64_t wanted);

namespace {

// Runs body(thread, threads) on at most that many threads.
template <class Body>
void in_parallel([[maybe_unused]] int64_t threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && !forked && (threads = startable(threads)) > 1) {
#pragma omp parallel num_threads(int(threads))
    body(int64_t(omp_get_thread_num()), int64_t(omp_get_num_threads()));
    return;
  }
#endif
  body(int64_t(0), int64_t(1));
}

inline void barrier([[maybe_unused]] int64_t threads) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp barrier
  }
#endif
}

// Waits until another thread has brought `progress` to `wanted`.
inline void wait_for(const std::atomic<int64_t>& progress, int64_t wanted) {
  for (int spins = 0; progress.load(std::memory_order_acquire) < wanted; ++spins)
    if (spins > 1000) {
#if defined(__unix__) || defined(__APPLE__)
      sched_yield();
#endif
    }
}

// Equal shares of `count` things: those of thread `i` are [share(count, i, n), share(count, i + 1, n)).
inline int64_t share(int64_t count, int64_t i, int64_t threads) { return count * i / threads; }

}  // namespace
}  // namespace statemix
