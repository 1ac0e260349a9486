// One token: through a mixer alone, a residual pair of mixer and SwiGLU, or a whole model.
//
// Nearly all of the time goes into reading the weights, once each. So nothing is packed, and threads share out the rows of a
// weight; each waits for the others before it needs what they made.
#pragma once
#include "scans.h"

#include <algorithm>
#include <cmath>

namespace statemix {
namespace {

constexpr int64_t kBytesPerThread = 1 << 18;  // of weights: below, waiting for another thread takes longer than it saves

constexpr int64_t kRowsAhead = 8;  // of a weight: read once, it comes as fast as it is asked for

// A team of threads, as one of them sees it.
struct Team {
  int64_t thread, threads;
  void wait() const { barrier(threads); }
  bool first() const { return thread == 0; }
};

// use(r, weight[r] . x + bias[r]) for this thread's share of the rows of weight (count x width).
template <class T, class Use>
void times_vector(Team team, const T* weight, const T* bias, const T* x, int64_t count, int64_t width, const Use& use) {
  constexpr int lanes = statemix::width<T>;
  const int64_t end = share(count, team.thread + 1, team.threads);
  for (int64_t r = share(count, team.thread, team.threads); r < end; r += 4) {
    const T* row[4];
    for (int i = 0; i < 4; ++i) row[i] = weight + std::min(r + i, end - 1) * width;  // past the end the last row again
    V<T> sum[4] = {};
    int64_t d = 0;
    for (; d + lanes <= width; d += lanes) {
      const V<T> at = load(x + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sum[i] += load(row[i] + d) * at;
        __builtin_prefetch(row[i] + kRowsAhead * width + d, 0, 3);
      }
    }
    const auto total = totals<T>(sum);
    for (int i = 0; i < 4 && r + i < end; ++i) {
      T rest = bias ? bias[r + i] : T(0);
      for (int64_t left = d; left < width; ++left) rest += row[i][left] * x[left];
      use(r + i, total[i] + rest);
    }
  }
}

// Numbers that pass from one thread to another for one token of a mixer: raw gates, values, states.
inline int64_t mixer_room(const Layer& p) {
  const int64_t rows = p.kind == kBlock ? p.order : 1;
  return (rows * (p.order + 2) + p.order) * p.blocks;
}
inline int64_t mixer_weights(const Layer& p) { return p.width * mixer_room(p); }

// y[d] = read-out[d] + (residual ? residual[d] : 0) for token b, whose mixer input is x; also its final state.
template <class T>
void mix(Team team, const Layer& p, int64_t b, const T* x, const T* residual, T* room, T* y) {
  const int64_t rows = p.kind == kBlock ? p.order : 1, gates = rows * (p.order + 1) * p.blocks, values = rows * p.blocks;
  const int64_t state = p.order * p.blocks;
  times_vector(team, (const T*)p.gate_weight, (const T*)p.gate_bias, x, gates, p.width, [&](int64_t r, T z) { room[r] = z; });
  times_vector(team, (const T*)p.value_weight, (const T*)nullptr, x, values, p.width, [&](int64_t r, T v) { room[gates + r] = v; });
  team.wait();
  if (team.first()) {
    Scan scan{};
    scan.batch = scan.length = 1, scan.order = p.order, scan.blocks = p.blocks;
    scan.kind = p.kind, scan.normalization = p.normalization, scan.storage = p.storage, scan.threads = 1;
    scan.raw_gates = room, scan.values = room + gates, scan.states = room + gates + values;
    scan.initial_state = (const T*)p.initial_state + b * state;
    scan.final_state = (T*)p.final_state + b * state;
    statemix::scan<T, false>(scan);
  }
  team.wait();
  times_vector(team, (const T*)p.output_weight, (const T*)nullptr, (const T*)p.final_state + b * state, p.width, state,
               [&](int64_t d, T value) { y[d] = residual ? residual[d] + value : value; });
}

// x weight / sqrt(mean(x^2) + epsilon), in this thread's own memory: all threads need all of it.
template <class T>
const T* normed(const T* x, const T* weight, double epsilon, int64_t width) {
  T* const y = (T*)scratch(kNormed, width * sizeof(T));
  T sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += x[d] * x[d];
  const T inverse = T(1) / std::sqrt(sum / T(width) + T(epsilon));
  for (int64_t d = 0; d < width; ++d) y[d] = x[d] * inverse * weight[d];
  return y;
}

inline int64_t team_size(int64_t threads, int64_t weights, size_t size) {
  return std::clamp<int64_t>(weights * int64_t(size) / kBytesPerThread, 1, threads);
}

template <class T>
void step(const Layer& p) {
  T* const room = (T*)scratch(kStep, mixer_room(p) * sizeof(T));
  in_parallel(team_size(p.threads, mixer_weights(p), sizeof(T)), [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads};
    for (int64_t b = 0; b < p.batch; ++b) {
      mix<T>(team, p, b, (const T*)p.x + b * p.width, nullptr, room, (T*)p.y + b * p.width);
      team.wait();  // before the next token overwrites the room
    }
  });
}

template <class T>
void step(const Pair& p) {
  const int64_t width = p.mixer.width, weights = mixer_weights(p.mixer) + 3 * width * p.mlp_size;
  T* const room = (T*)scratch(kStep, (mixer_room(p.mixer) + p.mlp_size + width) * sizeof(T));
  T *const inner = room + mixer_room(p.mixer), *const mixed = inner + p.mlp_size;
  const T* const input = (const T*)p.gate_and_input + p.mlp_size * width;
  in_parallel(team_size(p.mixer.threads, weights, sizeof(T)), [&](int64_t thread, int64_t threads) {
    const Team team{thread, threads};
    for (int64_t b = 0; b < p.mixer.batch; ++b) {
      const T* const x = (const T*)p.mixer.x + b * width;
      T* const y = (T*)p.mixer.y + b * width;
      mix<T>(team, p.mixer, b, normed(x, (const T*)p.mixer_norm, p.mixer_epsilon, width), x, room, mixed);
      team.wait();
      const T* const z = normed((const T*)mixed, (const T*)p.mlp_norm, p.mlp_epsilon, width);
      // the same share of both halves: what a thread wrote as a gate it multiplies itself
      times_vector(team, (const T*)p.gate_and_input, (const T*)nullptr, z, p.mlp_size, width,
                   [&](int64_t r, T gate) { inner[r] = gate / (T(1) + std::exp(-gate)); });
      times_vector(team, input, (const T*)nullptr, z, p.mlp_size, width, [&](int64_t r, T value) { inner[r] *= value; });
      team.wait();
      times_vector(team, (const T*)p.mlp_output, (const T*)nullptr, (const T*)inner, width, p.mlp_size,
                   [&](int64_t d, T value) { y[d] = mixed[d] + value; });
      team.wait();
    }
  });
}

template <class T>
void step(const Readout& p) {
  in_parallel(team_size(p.threads, p.width * p.count, sizeof(T)), [&](int64_t thread, int64_t threads) {
    for (int64_t b = 0; b < p.batch; ++b) {
      T* const y = (T*)p.y + b * p.count;
      const T* const z = normed((const T*)p.x + b * p.width, (const T*)p.norm, p.epsilon, p.width);
      times_vector(Team{thread, threads}, (const T*)p.weight, (const T*)nullptr, z, p.count, p.width,
                   [&](int64_t r, T logit) { y[r] = logit; });
    }
  });
}

template <class T>
void step(const Model& p) {
  const int64_t width = p.readout.width;
  for (int64_t b = 0; b < p.readout.batch; ++b)
    std::copy_n((const T*)p.embedding + p.tokens[b] * width, width, (T*)p.stream + b * width);
  for (int64_t i = 0; i < p.layers; ++i) step<T>(p.pairs[i]);
  step<T>(p.readout);
}

void layer_step(const Layer& p) { p.storage == kDouble ? step<double>(p) : step<float>(p); }
void pair_step(const Pair& p) { p.mixer.storage == kDouble ? step<double>(p) : step<float>(p); }
void model_step(const Model& p) { p.readout.storage == kDouble ? step<double>(p) : step<float>(p); }

}  // namespace
}  // namespace statemix
