// One token of each row: through a mixer alone, a residual pair of mixer and SwiGLU, or a whole model.
//
// Most of the time goes into reading the weights: once for all rows, so nothing is packed. Threads share out the rows of a weight,
// and each waits for the others before it needs what they made. Every number is added up in the same order for any number of rows
// and threads, so a row is, bit for bit, what it is alone.
#pragma once
#include "scans.h"

#include <algorithm>
#include <cmath>

namespace statemix {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStepRows = 6;  // that meet four rows of a weight at a time: with their sums what 32 registers hold
#else
constexpr int kStepRows = 3;  // and 16
#endif

constexpr int64_t kBytesPerThread = 1 << 18;  // of weights: below, waiting for another thread takes longer than it saves

constexpr int64_t kRowsTogether = 32;  // of a weight, that all rows of the batch meet while they are in the cache

constexpr int64_t kRowsAhead = 8;  // of a weight: read once, it comes as fast as it is asked for

// A team of threads, as one of them sees it.
struct Team {
  int64_t thread, threads;
  void wait() const { barrier(threads); }
  int64_t begin(int64_t count) const { return share(count, thread, threads); }
  int64_t end(int64_t count) const { return share(count, thread + 1, threads); }
};

// Numbers of each row of the batch, `stride` apart.
template <class T>
struct Batch {
  T* at;
  int64_t stride;
  T* operator[](int64_t b) const { return at + b * stride; }
};

// y[b][r] = start[b][r] + weight[r] . x[b]
template <class T>
struct Affine {
  int64_t count, width;  // of the weight
  const T* weight;
  Batch<const T> start;  // null: zero
  Batch<const T> x;
  Batch<T> y;
};

// For four rows of a weight, past `end` the last again, and `Rows` rows from b on.
template <class T, int Rows>
STATEMIX_INLINE void four_by(const Affine<T>& p, int64_t r, int64_t end, int64_t b) {
  constexpr int lanes = statemix::width<T>;
  const T *weight[4], *x[Rows];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) weight[i] = p.weight + std::min(r + i, end - 1) * p.width;
#pragma GCC unroll 6
  for (int k = 0; k < Rows; ++k) x[k] = p.x[b + k];
  V<T> sum[Rows][4] = {};
  const auto add = [&](int64_t d, const auto& load) {
    V<T> at[Rows];
#pragma GCC unroll 6
    for (int k = 0; k < Rows; ++k) at[k] = load(x[k] + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V<T> w = load(weight[i] + d);
#pragma GCC unroll 6
      for (int k = 0; k < Rows; ++k) sum[k][i] += w * at[k];
    }
  };
  int64_t d = 0;
  for (; d + lanes <= p.width; d += lanes) {
    add(d, [](const T* from) { return load(from); });
    for (int i = 0; i < 4; ++i) __builtin_prefetch(weight[i] + kRowsAhead * p.width + d, 0, 3);
  }
  if (const int left = int(p.width - d)) add(d, [&](const T* from) { return load_lanes(from, left); });
#pragma GCC unroll 6
  for (int k = 0; k < Rows; ++k) {
    const auto total = totals<T>(sum[k]);
    T* const y = p.y[b + k] + r;
    const T* const start = p.start.at ? p.start[b + k] + r : nullptr;
    for (int i = 0; i < 4 && r + i < end; ++i) y[i] = start ? start[i] + total[i] : total[i];
  }
}

// For the rows of a weight from `begin` on. A function of its own for each `Rows`: together they would not fit the registers.
template <class T, int Rows>
STATEMIX_NOINLINE void some_by(const Affine<T>& p, int64_t begin, int64_t end, int64_t b) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) four_by<T, Rows>(p, r, r + 4, b);
  if (r < end) four_by<T, Rows>(p, r, end, b);
}

// This thread's share of the rows of the weight, for all rows of the batch.
template <class T>
STATEMIX_NOINLINE void multiply(Team team, int64_t batch, const Affine<T>& p) {
  const int64_t last = team.end(p.count);
  for (int64_t r = team.begin(p.count); r < last; r += kRowsTogether) {
    const int64_t end = std::min(r + kRowsTogether, last);
    for (int64_t b = 0; b < batch; b += kStepRows) switch (std::min<int64_t>(batch - b, kStepRows)) {
        case 1: some_by<T, 1>(p, r, end, b); break;
        case 2: some_by<T, 2>(p, r, end, b); break;
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3: some_by<T, 3>(p, r, end, b); break;
        case 4: some_by<T, 4>(p, r, end, b); break;
        case 5: some_by<T, 5>(p, r, end, b); break;
#endif
        default: some_by<T, kStepRows>(p, r, end, b);
      }
  }
}

inline int64_t rows_of(const LayerCall& p) { return p.kind == kBlock ? p.order : 1; }
inline int64_t gates_of(const LayerCall& p) { return rows_of(p) * (p.order + 1) * p.blocks; }
inline int64_t values_of(const LayerCall& p) { return rows_of(p) * p.blocks; }
inline int64_t mixer_weights(const LayerCall& p) { return p.width * (gates_of(p) + values_of(p) + p.order * p.blocks); }

// The scan of one step of `count` rows from b on; where its inputs and states are, mix says.
inline ScanCall step_scan(const LayerCall& p, int64_t b, int64_t count) {
  ScanCall scan{};
  scan.batch = count, scan.length = 1, scan.order = p.order, scan.blocks = p.blocks;
  scan.kind = p.kind, scan.normalization = p.normalization, scan.storage = p.storage, scan.threads = 1;
  const int64_t at = b * p.order * p.blocks * (p.storage == kDouble ? 8 : 4);
  scan.initial_state = (const char*)p.initial_state + at, scan.final_state = (char*)p.final_state + at;
  return scan;
}

// Where the numbers of a step are between its products, for a whole team and batch.
template <class T>
struct StepRoom {
  int64_t inputs, states, mixed, halves;  // of a row: raw gates and values; states; the mixer's part; gates and input of the SwiGLU
  size_t scan_bytes;                      // of a row: what the scans of several take is no more
  int64_t batch;

  explicit StepRoom(const LayerCall& p, int64_t mlp_size = 0)
      : inputs(gates_of(p) + values_of(p)), states(p.order * p.blocks), mixed(mlp_size ? p.width : 0), halves(2 * mlp_size),
        scan_bytes(ScanPass<T, false>(step_scan(p, 0, 1)).bytes()), batch(p.batch) {}
  size_t numbers_bytes() const { return whole_lines(batch * (inputs + states + mixed + halves) * sizeof(T)); }
  size_t bytes() const { return numbers_bytes() + batch * scan_bytes; }

  Batch<T> inputs_in(char* room) const { return {(T*)room, inputs}; }
  Batch<T> states_in(char* room) const { return {inputs_in(room)[batch], states}; }
  Batch<T> mixed_in(char* room) const { return {states_in(room)[batch], mixed}; }
  Batch<T> halves_in(char* room) const { return {mixed_in(room)[batch], halves}; }
  char* scan_in(char* room, int64_t b) const { return room + numbers_bytes() + b * scan_bytes; }
};

template <class T>
Batch<const T> read(Batch<T> x) {
  return {x.at, x.stride};
}

// y[b] = start[b] + read-out for the mixer's inputs x, and the final states.
template <class T>
void mix(Team team, const LayerCall& p, Batch<const T> x, Batch<const T> start, const StepRoom<T>& room, char* at, Batch<T> y) {
  const int64_t gates = gates_of(p), state = p.order * p.blocks;
  const Batch<T> inputs = room.inputs_in(at), values = {inputs.at + gates, inputs.stride};
  multiply<T>(team, p.batch, {gates, p.width, (const T*)p.gate_weight, {(const T*)p.gate_bias, 0}, x, inputs});
  multiply<T>(team, p.batch, {values_of(p), p.width, (const T*)p.value_weight, {}, x, values});
  team.wait();
  const int64_t b = team.begin(p.batch), count = team.end(p.batch) - b;
  if (count > 0) {
    ScanCall scan = step_scan(p, b, count);
    scan.gate_batch_stride = scan.value_batch_stride = inputs.stride;
    scan.raw_gates = inputs[b], scan.values = values[b], scan.states = room.states_in(at)[b];
    ScanPass<T, false>(scan).run(room.scan_in(at, b));
  }
  team.wait();
  multiply<T>(team, p.batch, {p.width, state, (const T*)p.output_weight, start, {(const T*)p.final_state, state}, y});
}

// y[b] = x[b] weight / sqrt(mean(x[b]^2) + epsilon), in this thread's own memory: all threads need all of it.
template <class T>
Batch<const T> normed(int64_t batch, int64_t width, Batch<const T> x, const T* weight, double epsilon, char* room) {
  constexpr int lanes = statemix::width<T>;
  const Batch<T> y{(T*)room, width};
  for (int64_t b = 0; b < batch; ++b) {
    V<T> squares{};
    for (int64_t d = 0; d < width; d += lanes) {
      const V<T> at = load_lanes(x[b] + d, int(std::min<int64_t>(width - d, lanes)));
      squares += at * at;
    }
    T sum = 0;
    for (int l = 0; l < lanes; ++l) sum += squares[l];
    const T inverse = T(1) / std::sqrt(sum / T(width) + T(epsilon));
    for (int64_t d = 0; d < width; ++d) y[b][d] = x[b][d] * inverse * weight[d];
  }
  return read(y);
}

// silu(gate) * input of this thread's share of the SwiGLU, in the place of the gates.
template <class T>
void gate(Team team, int64_t batch, int64_t size, Batch<T> halves) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = team.begin(size), end = team.end(size); i < end; i += width<T>) {
      const int lanes = int(std::min<int64_t>(end - i, width<T>));
      T* const at = halves[b] + i;
      const V<T> gates = load_lanes(at, lanes);
      store_lanes<T>(at, gates * Sigmoid<T>(gates).value * load_lanes(at + size, lanes), lanes);
    }
}

template <class T>
void through(Team team, const PairCall& p, const StepRoom<T>& room, char* at, char* own) {
  const LayerCall& mixer = p.mixer;
  const int64_t batch = mixer.batch, width = mixer.width, size = p.mlp_size;
  const Batch<const T> x{(const T*)mixer.x, width};
  const Batch<T> mixed = room.mixed_in(at), halves = room.halves_in(at);
  mix<T>(team, mixer, normed(batch, width, x, (const T*)p.mixer_norm, p.mixer_epsilon, own), x, room, at, mixed);
  team.wait();
  const Batch<const T> z = normed(batch, width, read(mixed), (const T*)p.mlp_norm, p.mlp_epsilon, own);
  const T* const gates = (const T*)p.gate_and_input;
  // the same share of both halves: what a thread wrote it multiplies itself
  multiply<T>(team, batch, {size, width, gates, {}, z, halves});
  multiply<T>(team, batch, {size, width, gates + size * width, {}, z, {halves.at + size, halves.stride}});
  gate(team, batch, size, halves);
  team.wait();
  multiply<T>(team, batch, {width, size, (const T*)p.mlp_output, read(mixed), read(halves), {(T*)mixer.y, width}});
}

template <class T>
void through(Team team, const ReadoutCall& p, char* own) {
  const Batch<const T> z = normed(p.batch, p.width, {(const T*)p.x, p.width}, (const T*)p.norm, p.epsilon, own);
  multiply<T>(team, p.batch, {p.count, p.width, (const T*)p.weight, {}, z, {(T*)p.y, p.count}});
}

inline int64_t pair_weights(const PairCall& p) { return mixer_weights(p.mixer) + 3 * p.mixer.width * p.mlp_size; }

// Threads for a part that reads so many weights: arithmetic on one row takes about a quarter of the time of reading them.
template <class T>
int64_t team_size(int64_t threads, int64_t weights, int64_t batch) {
  return std::clamp<int64_t>(weights * int64_t(sizeof(T)) * (batch + 3) / 4 / kBytesPerThread, 1, threads);
}

template <class Body>
void in_team(int64_t threads, const Body& body) {
  in_parallel(threads, [&](int64_t thread, int64_t together) { body(Team{thread, together}); });
}

template <class T>
void step(const LayerCall& p) {
  const StepRoom<T> room(p);
  char* const at = (char*)scratch(kStep, room.bytes());
  in_team(team_size<T>(p.threads, mixer_weights(p), p.batch),
          [&](Team team) { mix<T>(team, p, {(const T*)p.x, p.width}, {}, room, at, {(T*)p.y, p.width}); });
}

template <class T>
void step(const PairCall& p) {
  const StepRoom<T> room(p.mixer, p.mlp_size);
  const int64_t threads = team_size<T>(p.mixer.threads, pair_weights(p), p.mixer.batch);
  char* const at = (char*)scratch(kStep, room.bytes());
  const Rooms own(kNormed, threads, p.mixer.batch * p.mixer.width * sizeof(T));
  in_team(threads, [&](Team team) { through<T>(team, p, room, at, own.of(team.thread)); });
}

// The team stays together from the first layer to the logits.
template <class T>
void step(const ModelCall& p) {
  const int64_t batch = p.readout.batch, width = p.readout.width;
  int64_t weights = width * p.readout.count;
  size_t bytes = 0;
  for (int64_t i = 0; i < p.layers; ++i) {
    weights = std::max(weights, pair_weights(p.pairs[i]));
    bytes = std::max(bytes, StepRoom<T>(p.pairs[i].mixer, p.pairs[i].mlp_size).bytes());
  }
  const int64_t threads = team_size<T>(p.readout.threads, weights, batch);
  char* const at = (char*)scratch(kStep, bytes);
  const Rooms own(kNormed, threads, batch * width * sizeof(T));
  for (int64_t b = 0; b < batch; ++b) std::copy_n((const T*)p.embedding + p.tokens[b] * width, width, (T*)p.stream + b * width);
  in_team(threads, [&](Team team) {
    for (int64_t i = 0; i < p.layers; ++i) {
      through<T>(team, p.pairs[i], StepRoom<T>(p.pairs[i].mixer, p.pairs[i].mlp_size), at, own.of(team.thread));
      team.wait();
    }
    through<T>(team, p.readout, own.of(team.thread));
  });
}

void layer_step(const LayerCall& p) { p.storage == kDouble ? step<double>(p) : step<float>(p); }
void pair_step(const PairCall& p) { p.mixer.storage == kDouble ? step<double>(p) : step<float>(p); }
void model_step(const ModelCall& p) { p.readout.storage == kDouble ? step<double>(p) : step<float>(p); }

}  // namespace
}  // namespace statemix
