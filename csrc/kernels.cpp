// The fused scans, compiled once per instruction set.
//
// A sequence is walked in chunks of time, and a chunk in tiles of as many neighbouring blocks n as a vector has lanes. For a
// tile, `weigh` turns the raw gates of the chunk into weights, in a buffer that stays in the first-level cache, and `forward` or
// `backward` mixes the state with them. No tensor of weights ever exists; the backward computes the same weights again.
//
// For a row of raw gates z_0..z_M with weights p_j = f(z_j) / S, S = sum |f(z_j)|, and h = sum_j p_j u_j, where u_j is the
// old state component of a transition weight and the value of the input gate, and with the adjoint s = dL/dh:
//   dL/dz_j = s d_j (u_j - g_j h),  d_j = f'(z_j) / S,  g_j = sign(f(z_j));   dL/du_j = s p_j.
// softmax is f = exp, so f' = f. relu adds a floor to S. none has p = z, d = 1, g = 0.
//
// Where the weights of a row sum to one (softmax, sigmoid), a weight p_b above 1/2 is kept as q_b = p_b - 1 = -sum_{j != b} p_j, and
// h = u_b + sum_j q_j u_j. Rounded to float32 itself, a decay of 0.9999 would be off by up to 3e-8 at every one of the 10^4 steps
// that it remembers; q_b is not, and a one-hot row copies a component exactly. The sign bit of q_j tells the two kinds apart.
// tests/test_cpu.py and tests/test_scan.py hold this.
#include "scan.h"
#include "simd.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

namespace statemix {
namespace {

constexpr double kReluFloor = 1e-3;    // RELU_FLOOR in gates.py
constexpr int64_t kBufferBytes = 16384;  // of one array of weights: half of the smallest first-level cache
constexpr int64_t kMaxSteps = 64;

template <class T>
struct Weights {
  V<T>*q, *d, *sign;  // [step][row][gate]; all gates share sign[0] unless the normalisation is_signed
};

// q (+ 1 if it stands for a weight above 1/2) times u; `limit` is 0 where q is used as said above, and else the least
// integer: then no bit pattern is below it.
template <class T>
struct Kept {
  using I = typename Lanes<T>::I;
  I limit;
  explicit Kept(bool convex) : limit(convex ? I{} : I{} + ~Lanes<T>::all_but_sign) {}
  STATEMIX_INLINE V<T> part(V<T> q, V<T> u) const { return (I)q < limit ? u : V<T>{}; }
};

constexpr bool is_signed(int normalization) { return normalization >= kTanh && normalization != kNone; }
constexpr bool sums_to_one(int normalization) { return normalization <= kSigmoid; }

template <class T, Normalization norm, bool slopes>
STATEMIX_INLINE void weigh_gate(V<T> z, V<T>& f, V<T>& slope) {
  if constexpr (norm == kSoftmax) {
    f = slope = exp_of_negative<T>(z);
  } else if constexpr (norm == kSigmoid) {
    const Sigmoid<T> s(z);
    f = s.value;
    slope = s.value * s.complement;
  } else if constexpr (norm == kRelu) {
    f = z < 0 ? V<T>{} : z;
    slope = z > 0 ? splat(T(1)) : V<T>{};
  } else if constexpr (norm == kTanh) {
    f = tanh<T>(z);
    slope = T(1) - f * f;
  } else if constexpr (norm == kSilu) {
    const Sigmoid<T> s(z);
    f = z * s.value;
    slope = s.value * (T(1) + z * s.complement);
  } else {
    f = z;
    slope = splat(T(1));
  }
}

// Weights of `rows` rows of `gates` raw gates, `gate_stride` apart, of each of `steps` steps; with d and sign if `slopes`.
template <class T, Normalization norm, bool slopes>
void weigh(const T* z, int64_t time_stride, int64_t gate_stride, int steps, int rows, int gates, int lanes, Weights<T> w) {
  const V<T> floor = splat(norm == kRelu ? T(kReluFloor) * gates : T(0));
  V<T>*p = w.q, *d = w.d, *sign = w.sign;
  if (slopes && !is_signed(norm)) sign[0] = splat(T(norm == kNone ? 0 : 1));
  for (int t = 0; t < steps; ++t) {
    const T* gate = z + t * time_stride;
    for (int i = 0; i < rows; ++i, p += gates, d += gates, sign += gates) {
      V<T> sum = floor;
      V<T> shift = {};  // of the whole row, to keep its largest entry away from underflow
      if constexpr (sums_to_one(norm)) {
        V<T> peak = load(gate, lanes);
        for (int j = 1; j < gates; ++j) peak = larger<T>(peak, load(gate + j * gate_stride, lanes));
        // below -80 the sigmoid is exp to the last bit, and a row of exp may be shifted
        shift = norm == kSoftmax ? -peak : larger<T>(T(-80) - peak, V<T>{});
      }
      for (int j = 0; j < gates; ++j) {
        const V<T> z = load(gate + j * gate_stride, lanes) + shift;
        V<T> f, slope;
        weigh_gate<T, norm, slopes>(z, f, slope);
        p[j] = f;
        if (slopes) d[j] = slope;
        sum += absolute<T>(f);
      }
      gate += gates * gate_stride;
      if constexpr (norm != kNone) {
        // a row of zeros has weights of 0: tests/test_gates.py
        const V<T> inverse = T(1) / (sum < std::numeric_limits<T>::min() ? splat(T(1)) : sum);
        V<T> others = {};
        for (int j = 0; j < gates; ++j) {
          p[j] *= inverse;
          if (sums_to_one(norm)) others += p[j] > T(0.5) ? V<T>{} : p[j];
        }
        if (sums_to_one(norm))
          for (int j = 0; j < gates; ++j) p[j] = p[j] > T(0.5) ? -others : p[j];
        if (slopes)
          for (int j = 0; j < gates; ++j) {
            d[j] *= inverse;
            if (is_signed(norm)) sign[j] = p[j] > 0 ? splat(T(1)) : (p[j] < 0 ? splat(T(-1)) : V<T>{});
          }
      }
    }
  }
}

template <class T, bool slopes>
void weigh(int normalization, const T* z, int64_t time_stride, int64_t gate_stride, int steps, int rows, int gates,
           int lanes, Weights<T> w) {
#define STATEMIX_CASE(norm) \
  case norm: return weigh<T, norm, slopes>(z, time_stride, gate_stride, steps, rows, gates, lanes, w);
  switch (normalization) {
    STATEMIX_CASE(kSoftmax)
    STATEMIX_CASE(kSigmoid)
    STATEMIX_CASE(kRelu)
    STATEMIX_CASE(kTanh)
    STATEMIX_CASE(kSilu)
    STATEMIX_CASE(kLinear)
    STATEMIX_CASE(kNone)
  }
#undef STATEMIX_CASE
}

// Sequence b, blocks n0 .. n0 + lanes - 1. Offsets are of element [b, t, row, n0] in a contiguous (B, T, rows, N) tensor.
template <class T>
struct Tile {
  const Problem& p;
  int64_t b, n0;
  int lanes;

  const T* gates(int64_t t) const {
    return (const T*)p.raw_gates + b * p.gate_batch_stride + t * p.gate_time_stride + n0;
  }
  const T* values(int64_t t) const {
    return (const T*)p.values + b * p.value_batch_stride + t * p.value_time_stride + n0;
  }
  bool reset(int64_t t) const { return p.reset && p.reset[b * p.length + t]; }
  int64_t at(int64_t t, int64_t rows, int64_t row = 0) const {
    return ((b * p.length + t) * rows + row) * p.blocks + n0;
  }
  int64_t initial(int64_t i) const { return (b * p.order + i) * p.blocks + n0; }
  STATEMIX_INLINE V<T> read(const void* base, int64_t offset) const { return load((const T*)base + offset, lanes); }
  STATEMIX_INLINE void write(void* base, int64_t offset, V<T> x) const { store((T*)base + offset, x, lanes); }
};

template <class T, int Order>
constexpr int kCapacity = Order ? Order : kMaxOrder;

// Steps t0 .. t0 + steps - 1: the states, from and to `state` (M vectors; companion: lags, the newest first).
template <class T, int Order, Kind kind>
void forward(const Tile<T>& tile, int64_t t0, int steps, const V<T>* weights, V<T>* state) {
  const Problem& p = tile.p;
  const int order = Order ? Order : int(p.order), gates = order + 1;
  const int rows = kind == kBlock ? order : 1;
  const bool bounded = p.normalization != kNone;
  const Kept<T> kept(sums_to_one(p.normalization));
  const int64_t stride = p.blocks;
  const int lanes = tile.lanes;
  V<T> h[kCapacity<T, Order>], next[kCapacity<T, Order>];
  for (int i = 0; i < order; ++i) h[i] = state[i];

  for (int64_t t = t0; t < t0 + steps; ++t) {
    if (tile.reset(t))
      for (int i = 0; i < order; ++i) h[i] = V<T>{};
    const T* values = tile.values(t);
    T* out = (T*)p.states + tile.at(t, kind == kCompanion ? 1 : order);
    if constexpr (kind == kObserver) {
      const V<T> top = h[0], v = load(values, lanes);
      const V<T> entering = weights[order] * v + kept.part(weights[order], v);
      for (int j = 0; j < order; ++j)
        h[j] = weights[j] * top + (kept.part(weights[j], top) + (j + 1 < order ? h[j + 1] : V<T>{}));
      h[0] += entering;
      for (int i = 0; i < order; ++i) store(out + i * stride, h[i], lanes);
    } else {
      V<T> peak = absolute<T>(h[0]);
      for (int i = 1; i < order; ++i) peak = larger<T>(peak, absolute<T>(h[i]));
      for (int i = 0; i < rows; ++i) {
        const V<T>* row = weights + i * gates;
        const V<T> v = load(values + i * stride, lanes);
        V<T> sum = row[order] * v, base = kept.part(row[order], v);
        for (int j = 0; j < order; ++j) {
          sum += row[j] * h[j];
          base += kept.part(row[j], h[j]);
        }
        sum += base;
        if (bounded) {
          // rounding must not let |h| drift past the bound of Proposition 1 in 10^6 steps: tests/test_stability.py
          const V<T> bound = larger<T>(peak, absolute<T>(v));
          sum = clamp<T>(sum, -bound, bound);
        }
        store(out + i * stride, sum, lanes);
        next[i] = sum;
      }
      if constexpr (kind == kBlock) {
        for (int i = 0; i < order; ++i) h[i] = next[i];
      } else {
        for (int i = order - 1; i > 0; --i) h[i] = h[i - 1];
        h[0] = next[0];
      }
    }
    weights += rows * gates;
  }
  for (int i = 0; i < order; ++i) state[i] = h[i];
}

// The state that entered step t, h_{t-1}: zero at a reset. For the companion form, M lags, the newest first; `first` is the
// oldest step since the newest reset at or before t, and negative if there was none: then initial_state is reached.
template <class T, int Order, Kind kind>
STATEMIX_INLINE void entering_state(const Tile<T>& tile, int64_t t, int order, int64_t first, V<T>* u) {
  const Problem& p = tile.p;
  if (kind != kCompanion) {
    if (tile.reset(t))
      for (int i = 0; i < order; ++i) u[i] = V<T>{};
    else
      for (int i = 0; i < order; ++i)
        u[i] = t ? tile.read(p.states, tile.at(t - 1, order, i)) : tile.read(p.initial_state, tile.initial(i));
    return;
  }
  for (int i = 0; i < order; ++i) {
    const int64_t made = t - 1 - i;
    if (made >= std::max<int64_t>(first, 0))
      u[i] = tile.read(p.states, tile.at(made, 1));
    else if (first >= 0)
      u[i] = V<T>{};
    else  // initial_state holds h_0, h_{-1}, ...: step 0 makes h_1
      u[i] = tile.read(p.initial_state, tile.initial(-made - 1));
  }
}

// Steps t0 + steps - 1 down to t0. carry[i]: what later steps hand back to component i (companion: lag i) of the state.
template <class T, int Order, Kind kind>
void backward(const Tile<T>& tile, int64_t t0, int steps, Weights<T> w, V<T>* carried, int64_t& first) {
  const Problem& p = tile.p;
  const int order = Order ? Order : int(p.order), gates = order + 1;
  const int rows = kind == kBlock ? order : 1, kept = kind == kCompanion ? 1 : order;
  const Kept<T> whole(sums_to_one(p.normalization));
  const int sign_step = is_signed(p.normalization) ? 1 : 0;
  const int64_t stride = p.blocks;
  const int lanes = tile.lanes;
  V<T> u[kCapacity<T, Order>], carry[kCapacity<T, Order>], before[kCapacity<T, Order>];
  for (int i = 0; i < order; ++i) carry[i] = carried[i];

  for (int64_t t = t0 + steps - 1; t >= t0; --t) {
    if (kind == kCompanion && t < first)  // find the reset that governs this step
      for (first = t; first >= 0 && !tile.reset(first); --first) {}
    entering_state<T, Order, kind>(tile, t, order, first, u);
    const int64_t at = tile.at(t, kept);
    for (int i = 0; i < kept; ++i) carry[i] += load((const T*)p.grad_states + at + i * stride, lanes);
    for (int i = 0; i < order; ++i) before[i] = V<T>{};

    const int64_t offset = (t - t0) * rows * gates;
    const V<T>*weight = w.q + offset, *d = w.d + offset, *sign = w.sign + sign_step * offset;
    const T* values = tile.values(t);
    T* grad_gates = (T*)p.grad_raw_gates + tile.at(t, int64_t(rows) * gates);
    T* grad_values = (T*)p.grad_values + tile.at(t, rows);
    for (int i = 0; i < rows; ++i) {
      const V<T> v = load(values + i * stride, lanes), s = carry[i];
      if constexpr (kind == kObserver) {
        // weight j feeds component j: dL/dp_j = s_j h[0], and s_0 v for the input gate
        const V<T> sv = s * v;
        V<T> mean = weight[order] * sv + whole.part(weight[order], sv);
        for (int j = 0; j < order; ++j) {
          const V<T> su = carry[j] * u[0];
          mean += weight[j] * su + whole.part(weight[j], su);
        }
        for (int j = 0; j < gates; ++j) {
          const V<T> direct = j < order ? carry[j] * u[0] : s * v;
          store(grad_gates + j * stride, d[j] * (direct - sign[sign_step * j] * mean), lanes);
        }
        for (int j = 0; j < order; ++j) {
          before[0] += weight[j] * carry[j] + whole.part(weight[j], carry[j]);
          if (j > 0) before[j] += carry[j - 1];
        }
      } else {
        const V<T> h = load((const T*)p.states + at + i * stride, lanes);
        for (int j = 0; j < order; ++j) {
          store(grad_gates + j * stride, s * d[j] * (u[j] - sign[sign_step * j] * h), lanes);
          before[j] += weight[j] * s + whole.part(weight[j], s);
        }
        store(grad_gates + order * stride, s * d[order] * (v - sign[sign_step * order] * h), lanes);
        if constexpr (kind == kCompanion)  // the older lags move up by one on their way back
          for (int j = 0; j + 1 < order; ++j) before[j] += carry[j + 1];
      }
      store(grad_values + i * stride, weight[order] * s + whole.part(weight[order], s), lanes);
      weight += gates, d += gates, sign += sign_step * gates;
      grad_gates += gates * stride;
    }
    const bool cut = tile.reset(t);
    for (int i = 0; i < order; ++i) carry[i] = cut ? V<T>{} : before[i];
  }
  for (int i = 0; i < order; ++i) carried[i] = carry[i];
}

// Room for vectors, aligned as they need.
template <class T>
struct Buffer {
  V<T>* data;
  explicit Buffer(int64_t count)
      : data((V<T>*)::operator new(size_t(count) * sizeof(V<T>), std::align_val_t(STATEMIX_VECTOR_BYTES))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(STATEMIX_VECTOR_BYTES)); }
  Buffer(const Buffer&) = delete;
};

// One sequence, tiles begin .. end - 1: chunk by chunk of time, so that memory is read in order.
template <class T, int Order, Kind kind, bool is_backward>
void sequence(const Problem& p, int64_t b, int64_t begin, int64_t end) {
  const int order = int(p.order), gates = order + 1, rows = kind == kBlock ? order : 1;
  const int64_t per_step = int64_t(rows) * gates;
  const int64_t chunk = std::clamp<int64_t>(kBufferBytes / (per_step * STATEMIX_VECTOR_BYTES), 1, kMaxSteps);
  const int64_t size = chunk * per_step;
  const Buffer<T> weights(size * (is_backward ? 3 : 1)), states((end - begin) * order);
  const int64_t next = is_backward ? size : 0;  // the forward uses q alone
  const Weights<T> w{weights.data, weights.data + next, weights.data + 2 * next};
  const auto tile_at = [&](int64_t i) {
    return Tile<T>{p, b, i * width<T>, int(std::min<int64_t>(p.blocks - i * width<T>, width<T>))};
  };
  for (int64_t i = begin; i < end; ++i)
    for (int64_t m = 0; m < order; ++m)
      states.data[(i - begin) * order + m] =
          is_backward ? V<T>{} : tile_at(i).read(p.initial_state, tile_at(i).initial(m));

  const int64_t chunks = (p.length + chunk - 1) / chunk;
  int64_t first = p.length;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t t0 = (is_backward ? chunks - 1 - c : c) * chunk;
    const int steps = int(std::min(chunk, p.length - t0));
    const int64_t first_before = first;
    for (int64_t i = begin; i < end; ++i) {
      const Tile<T> tile = tile_at(i);
      V<T>* state = states.data + (i - begin) * order;
      weigh<T, is_backward>(p.normalization, tile.gates(t0), p.gate_time_stride, p.blocks, steps, rows, gates, tile.lanes, w);
      first = first_before;
      if constexpr (is_backward)
        backward<T, Order, kind>(tile, t0, steps, w, state, first);
      else
        forward<T, Order, kind>(tile, t0, steps, w.q, state);
    }
  }
  if (is_backward)
    for (int64_t i = begin; i < end; ++i)
      for (int64_t m = 0; m < order; ++m)
        tile_at(i).write(p.grad_initial_state, tile_at(i).initial(m), states.data[(i - begin) * order + m]);
}

// Threads share the sequences, and where these are fewer, the tiles of each.
template <class T, int Order, Kind kind, bool is_backward>
void all(const Problem& p) {
  const int64_t tiles = (p.blocks + width<T> - 1) / width<T>;
  const int64_t groups = std::min(tiles, (p.threads + p.batch - 1) / p.batch);
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < groups; ++g)
      sequence<T, Order, kind, is_backward>(p, b, g * tiles / groups, (g + 1) * tiles / groups);
}

template <class T, Kind kind, bool is_backward>
void by_order(const Problem& p) {
#define STATEMIX_CASE(order) \
  case order: return all<T, order, kind, is_backward>(p);
  switch (p.order) {
    STATEMIX_CASE(1)
    STATEMIX_CASE(2)
    STATEMIX_CASE(3)
    STATEMIX_CASE(4)
    STATEMIX_CASE(5)
    STATEMIX_CASE(6)
    STATEMIX_CASE(7)
    STATEMIX_CASE(8)
    STATEMIX_CASE(12)
    STATEMIX_CASE(16)
    default: return all<T, 0, kind, is_backward>(p);
  }
#undef STATEMIX_CASE
}

template <bool is_backward>
void run(const Problem& p) {
  switch (p.kind) {
    case kBlock:
      return p.is_double ? by_order<double, kBlock, is_backward>(p) : by_order<float, kBlock, is_backward>(p);
    case kCompanion:
      return p.is_double ? by_order<double, kCompanion, is_backward>(p) : by_order<float, kCompanion, is_backward>(p);
    case kObserver:
      return p.is_double ? by_order<double, kObserver, is_backward>(p) : by_order<float, kObserver, is_backward>(p);
  }
}

}  // namespace

extern const Scan STATEMIX_FORWARD = run<false>;
extern const Scan STATEMIX_BACKWARD = run<true>;

}  // namespace statemix
