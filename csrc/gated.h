// The product within a SwiGLU, silu(gate) * inner, and its gradient. Every row has the gates first and then the inner numbers.
//
// In torch these are eight passes over rows of that size, with a result in memory after each; here it is one forward and one
// backward, which computes the sigmoid again.
#pragma once
#include "interface.h"
#include "simd.h"
#include "threads.h"

#include <algorithm>

namespace statemix {
namespace {

constexpr int64_t kGatedPerThread = 1 << 14;  // numbers of y: below, waking another thread takes longer than it saves

template <class T>
void gated(const GatedCall& p) {
  const int64_t size = p.size, threads = std::clamp<int64_t>(p.rows * size / kGatedPerThread, 1, p.threads);
  in_parallel(threads, [&](int64_t thread, int64_t count) {
    const int64_t end = share(p.rows, thread + 1, count);
    for (int64_t r = share(p.rows, thread, count); r < end; ++r) {
      const T *const gates = (const T*)p.x + r * 2 * size, *const inner = gates + size;
      for (int64_t i = 0; i < size; i += width<T>) {
        const int lanes = int(std::min<int64_t>(size - i, width<T>));
        const V<T> gate = load_lanes(gates + i, lanes), value = load_lanes(inner + i, lanes);
        const Sigmoid<T> sigmoid(gate);
        if (!p.grad_x) {
          store_lanes<T>((T*)p.y + r * size + i, gate * sigmoid.value * value, lanes);
          continue;
        }
        const V<T> grad = load_lanes((const T*)p.grad_y + r * size + i, lanes);
        const V<T> slope = sigmoid.value * (T(1) + gate * sigmoid.complement);  // of silu
        T* const grad_gates = (T*)p.grad_x + r * 2 * size + i;
        store_lanes<T>(grad_gates, grad * value * slope, lanes);
        store_lanes<T>(grad_gates + size, grad * gate * sigmoid.value, lanes);
      }
    }
  });
}

void gated(const GatedCall& p) { p.storage == kDouble ? gated<double>(p) : gated<float>(p); }

}  // namespace
}  // namespace statemix
