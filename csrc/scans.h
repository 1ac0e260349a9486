// The fused scans on tensors as users have them.
//
// Sequences are walked in chunks of time, and a chunk vector by vector of neighbouring blocks n (recurrence.h). The chunks of a
// sequence are dealt out to the threads in turn: a thread computes the weights of its chunk, which depend on no state, and
// waits for the carry of the chunk before only then. So one long sequence keeps several threads busy, and the arithmetic, and
// with it every bit of the result, is the same for any number of threads.
#pragma once
#include "memory.h"
#include "recurrence.h"
#include "threads.h"

#include <algorithm>

namespace statemix {
namespace {

// Copies `rows` x `lanes` numbers of each of `count` steps between a tensor and whole vectors in a buffer: where a part of a
// vector is used, or the tensor is bfloat16.
struct Outside {
  int64_t step, row;
  int lanes;
  int32_t storage;
};

inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline uint16_t narrowed(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
STATEMIX_NOINLINE void copy_in(const void* from, Outside o, T* to, int64_t count, int64_t rows) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < rows; ++i, to += width<T>) {
      const int64_t at = t * o.step + i * o.row;
      if (o.storage == kBfloat16) {
        const uint16_t* source = (const uint16_t*)from + at;
        if (o.lanes == width<T>)
          for (int l = 0; l < width<T>; ++l) to[l] = T(widened(source[l]));
        else
          for (int l = 0; l < width<T>; ++l) to[l] = l < o.lanes ? T(widened(source[l])) : T(0);
      } else {
        for (int l = 0; l < width<T>; ++l) to[l] = l < o.lanes ? ((const T*)from)[at + l] : T(0);
      }
    }
}

template <class T>
STATEMIX_NOINLINE void copy_out(const T* from, Outside o, void* to, int64_t count, int64_t rows) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < rows; ++i, from += width<T>) {
      const int64_t at = t * o.step + i * o.row;
      if (o.storage == kBfloat16) {
        uint16_t* target = (uint16_t*)to + at;
        if (o.lanes == width<T>)
          for (int l = 0; l < width<T>; ++l) target[l] = narrowed(float(from[l]));
        else
          for (int l = 0; l < o.lanes; ++l) target[l] = narrowed(float(from[l]));
      } else {
        for (int l = 0; l < o.lanes; ++l) ((T*)to)[at + l] = from[l];
      }
    }
}

constexpr int64_t kBufferBytes = 16384;  // of one array of weights: half of the smallest first-level cache
constexpr int64_t kMaxSteps = 128;
constexpr int64_t kChunkBytesRead = 65536;  // and written, of all blocks: a part of the second-level cache

inline int64_t steps_at_once(int64_t per_step) {
  return std::clamp<int64_t>(kBufferBytes / (per_step * STATEMIX_VECTOR_BYTES), 1, kMaxSteps);
}

// Numbers that the weights of `steps` steps take, and those weights in a buffer of that size.
template <class T>
int64_t weights_size(int64_t steps, int64_t per_step, bool is_backward) {
  return (is_backward ? 3 : 1) * steps * per_step * kSlot<T>;
}
template <class T>
Weights<T> weights_in(void* buffer, int64_t steps, int64_t per_step, bool is_backward) {
  const int64_t step = per_step * kSlot<T>, size = steps * step;
  T* const q = (T*)buffer;
  return {q, is_backward ? q + size : q, is_backward ? q + 2 * size : q, step};
}

// A scan: how it is cut up, the memory that takes, and how it runs. Of that memory all threads have the carries and the progress of
// all vectors, and each its weights, and raw gates, values, states and their gradients where they are copied.
template <class T, bool is_backward>
struct ScanPass {
  const ScanCall& p;
  bool companion;
  int64_t order, rows, shown, per_step, vectors, chunk, chunks, groups, units, threads, copied;
  size_t carry_bytes, progress_bytes, weight_bytes, thread_bytes;

  explicit ScanPass(const ScanCall& p) : p(p), companion(p.kind == kCompanion), order(p.order) {
    rows = p.kind == kBlock ? order : 1, shown = companion ? 1 : order, per_step = rows * (order + 1);
    vectors = (p.blocks + width<T> - 1) / width<T>;
    // a chunk is read vector by vector, so it must still be in the cache when the last vector is
    const int64_t step_bytes = (per_step + rows + shown) * p.blocks * int64_t(sizeof(T)) * (is_backward ? 2 : 1);
    chunk = std::min({steps_at_once(per_step), std::max<int64_t>(8, kChunkBytesRead / step_bytes), p.length});
    chunks = (p.length + chunk - 1) / chunk;
    groups = std::min(vectors, (p.threads + p.batch - 1) / p.batch), units = p.batch * groups;
    threads = std::min<int64_t>(p.threads, units * chunks);
    copied = chunk * (per_step + rows + shown) * width<T>;
    carry_bytes = whole_lines(p.batch * vectors * 2 * order * sizeof(V<T>));
    progress_bytes = whole_lines(p.batch * vectors * sizeof(std::atomic<int64_t>));
    weight_bytes = whole_lines(weights_size<T>(chunk, per_step, is_backward) * sizeof(T));
    thread_bytes = weight_bytes + whole_lines((is_backward ? 2 : 1) * copied * sizeof(T));
  }
  size_t bytes() const { return carry_bytes + progress_bytes + threads * thread_bytes; }
  void run(char* room) const;
};

template <class T, bool is_backward>
void ScanPass<T, is_backward>::run(char* room) const {
  const auto recur = recurrence<T>(p.kind, order, p.normalization);
  const size_t element = p.storage == kBfloat16 ? 2 : sizeof(T);

  V<T>* const carries = (V<T>*)room;
  auto* const progress = (std::atomic<int64_t>*)(room + carry_bytes);
  char* const rooms = room + carry_bytes + progress_bytes;
  for (int64_t i = 0; i < p.batch * vectors; ++i) new (&progress[i]) std::atomic<int64_t>(0);

  in_parallel(threads, [&](int64_t thread, int64_t threads) {
    const Weights<T> w = weights_in<T>(rooms + thread * thread_bytes, chunk, per_step, is_backward);
    T* const copies = (T*)(rooms + thread * thread_bytes + weight_bytes);
    V<T> before[kMaxOrder];

    for (int64_t item = thread; item < units * chunks; item += threads) {
      const int64_t unit = item % units, b = unit / groups, group = unit % groups, turn = item / units;
      const int64_t t0 = (is_backward ? chunks - 1 - turn : turn) * chunk, count = std::min(chunk, p.length - t0);
      for (int64_t n = share(vectors, group, groups); n < share(vectors, group + 1, groups); ++n) {
        const int64_t n0 = n * width<T>;
        const int lanes = int(std::min<int64_t>(p.blocks - n0, width<T>));
        const bool staged = lanes != width<T> || p.storage == kBfloat16;
        const auto at = [&](const void* base, int64_t offset) { return (char*)base + (offset + n0) * int64_t(element); };
        const auto made = [&](int64_t t, int64_t i) { return (T*)p.states + ((b * p.length + t) * shown + i) * p.blocks + n0; };
        const auto stored = [&](int64_t step) { return Outside{step, p.blocks, lanes, p.storage}; };
        constexpr int32_t wide = sizeof(T) == 8 ? kDouble : kFloat;
        const Outside state_like{shown * p.blocks, p.blocks, lanes, wide}, initial{0, p.blocks, lanes, wide};
        const Outside gate_like = stored(p.gate_time_stride), value_like = stored(p.value_time_stride);
        const Outside dense_gates = stored(per_step * p.blocks), dense_values = stored(rows * p.blocks);
        const int64_t in_initial = (b * order) * p.blocks + n0;

        void* const gate_at = at(p.raw_gates, b * p.gate_batch_stride + t0 * p.gate_time_stride);
        void* const value_at = at(p.values, b * p.value_batch_stride + t0 * p.value_time_stride);
        T* const state_at = made(t0, 0);
        T* grad_state_at = nullptr;
        void *grad_gate_at = nullptr, *grad_value_at = nullptr;
        if (is_backward) {
          grad_state_at = (T*)p.grad_states + (b * p.length + t0) * shown * p.blocks + n0;
          grad_gate_at = at(p.grad_raw_gates, (b * p.length + t0) * per_step * p.blocks);
          grad_value_at = at(p.grad_values, (b * p.length + t0) * rows * p.blocks);
        }

        Steps<T> steps{};
        steps.count = int(count), steps.order = int(order), steps.normalization = p.normalization;
        steps.reset = p.reset ? p.reset + b * p.length + t0 : nullptr;
        steps.before = before, steps.next = is_backward ? -chunk : chunk;
        if (staged) {
          steps.gates = {copies, per_step * width<T>, width<T>};
          steps.values = {copies + chunk * per_step * width<T>, rows * width<T>, width<T>};
          steps.states = {copies + chunk * (per_step + rows) * width<T>, shown * width<T>, width<T>};
          copy_in(gate_at, gate_like, steps.gates.at, count, per_step);
          copy_in(value_at, value_like, steps.values.at, count, rows);
          if (is_backward) {
            steps.grad_gates = steps.gates, steps.grad_values = steps.values, steps.grad_states = steps.states;
            steps.grad_gates.at += copied, steps.grad_values.at += copied, steps.grad_states.at += copied;
            copy_in(state_at, state_like, steps.states.at, count, shown);
            copy_in(grad_state_at, state_like, steps.grad_states.at, count, shown);
          }
        } else {
          steps.gates = {(T*)gate_at, p.gate_time_stride, p.blocks};
          steps.values = {(T*)value_at, p.value_time_stride, p.blocks};
          steps.states = {state_at, shown * p.blocks, p.blocks};
          steps.grad_states = {grad_state_at, shown * p.blocks, p.blocks};
          steps.grad_gates = {(T*)grad_gate_at, per_step * p.blocks, p.blocks};
          steps.grad_values = {(T*)grad_value_at, rows * p.blocks, p.blocks};
        }
        (is_backward ? recur.weigh_to_return : recur.weigh)(steps, int(rows), w);

        if (is_backward)
          for (int64_t i = 0; i < order; ++i) {
            const int64_t when = companion ? t0 - 1 - i : t0 - 1;  // at which this component was made
            bool cut = false;
            if (companion && p.reset)
              for (int64_t t = std::max<int64_t>(when + 1, 0); t < t0; ++t) cut = cut || p.reset[b * p.length + t];
            if (cut)
              before[i] = V<T>{};
            else if (when >= 0)
              copy_in(made(when, companion ? 0 : i), state_like, (T*)&before[i], 1, 1);
            else
              copy_in((const T*)p.initial_state + in_initial + (companion ? -1 - when : i) * p.blocks, initial, (T*)&before[i], 1,
                      1);
          }

        V<T>* const carry = carries + (b * vectors + n) * 2 * order;
        std::atomic<int64_t>& done = progress[b * vectors + n];
        wait_for(done, turn);
        if (turn == 0) {
          const void* const start = is_backward ? p.grad_final_state : p.initial_state;
          for (int64_t i = 0; i < 2 * order; ++i) carry[i] = V<T>{};
          if (start) copy_in((const T*)start + in_initial, initial, (T*)carry, 1, order);
        }
        if (is_backward)
          recur.backward(steps, w, carry);
        else
          recur.forward(steps, w, carry);
        if (turn == chunks - 1)
          copy_out((const T*)carry, initial, (T*)(is_backward ? p.grad_initial_state : p.final_state) + in_initial, 1, order);
        done.store(turn + 1, std::memory_order_release);

        if (staged && is_backward) {
          copy_out(steps.grad_gates.at, dense_gates, grad_gate_at, count, per_step);
          copy_out(steps.grad_values.at, dense_values, grad_value_at, count, rows);
        } else if (staged) {
          copy_out(steps.states.at, state_like, state_at, count, shown);
        }
      }
    }
  });
}

template <class T, bool is_backward>
void scan(const ScanCall& p) {
  const ScanPass<T, is_backward> pass(p);
  pass.run((char*)scratch(kScan, pass.bytes()));
}

size_t bytes(const ScanCall& p, int64_t per_step) {
  constexpr size_t sizes[] = {4, 8, 2};
  return size_t(p.batch * p.length * per_step * p.blocks) * sizes[p.storage];
}
int64_t rows(const ScanCall& p) { return p.kind == kBlock ? p.order : 1; }

void scan_forward(const ScanCall& p) {
  use_large_pages(p.states, bytes(p, p.kind == kCompanion ? 1 : p.order) * (p.storage == kBfloat16 ? 2 : 1));
  p.storage == kDouble ? scan<double, false>(p) : scan<float, false>(p);
}
void scan_backward(const ScanCall& p) {
  use_large_pages(p.grad_raw_gates, bytes(p, rows(p) * (p.order + 1)));
  use_large_pages(p.grad_values, bytes(p, rows(p)));
  p.storage == kDouble ? scan<double, true>(p) : scan<float, true>(p);
}

}  // namespace
}  // namespace statemix
