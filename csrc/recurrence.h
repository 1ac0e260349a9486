// The recurrences on one vector of neighbouring blocks n, for a few steps at a time: raw gates -> weights -> states, and back.
//
// `weigh` turns raw gates into weights, in a buffer that stays in the first-level cache; `forward` and `backward` mix the state
// with them. No tensor of weights ever exists; the backward computes the same weights again.
//
// For a row of raw gates z_0..z_M with weights p_j = f(z_j) / S, S = sum |f(z_j)|, and h = sum_j p_j u_j, where u_j is the
// old state component of a transition weight and the value of the input gate, and with the adjoint s = dL/dh:
//   dL/dz_j = s d_j (u_j - g_j h),  d_j = f'(z_j) / S,  g_j = sign(f(z_j));   dL/du_j = s p_j.
// softmax is f = exp, so f' = f. relu adds a floor to S. none has p = z, d = 1, g = 0.
//
// Two things keep a float32 state right over 10^4 steps of memory, tests/test_cpu.py:
// - Where the weights are not negative and a row sums to one (with the floor of relu), a weight p_b above 1/2 is kept as
//   q_b = p_b - 1 = -(all others), and h = u_b + sum_j q_j u_j. Rounded itself, a decay of 0.9999 would be off by up to 3e-8 at
//   every step; q_b is not, and a one-hot row copies a component exactly. The sign bit of q_j tells the two kinds apart.
// - The sum u_b + rest leaves a rounding error; it goes into the next step's rest (Kahan). So does the adjoint's.
#pragma once
#include "interface.h"
#include "simd.h"

#include <limits>

namespace statemix {
namespace {

constexpr double kReluFloor = 1e-3;  // RELU_FLOOR in gates.py

constexpr bool is_signed(int normalization) { return normalization >= kTanh && normalization != kNone; }
constexpr bool is_convex(int normalization) { return normalization <= kRelu; }

template <class T>
constexpr int kSlot = width<T>;  // numbers from one gate's weight to the next

// [step][row][gate], `step` apart and kSlot apart. Softmax needs q alone, and q may then lie where the raw gates were, and in
// the backward where their gradient will be. All gates share sign[0] unless the normalisation is_signed.
template <class T>
struct Weights {
  T *q, *d, *sign;
  int64_t step;
};

// Some steps of one vector of blocks. Pointers are to its first lane at the first step; strides are in elements.
// Passed as a value: what a reference points to may change with every store, for all the compiler knows, and is read again.
template <class T>
struct Steps {
  struct Array {
    T* at;
    int64_t step, row;
    STATEMIX_INLINE T* operator()(int64_t t, int64_t i) const { return at + t * step + i * row; }
  };
  int count, order, normalization;
  int64_t next;  // how many steps on the next call's inputs lie: a stride between steps is not foreseen by the hardware
  Array gates, values, states;  // gates: row is the stride of row-major (i, j)
  const uint8_t* reset;         // of these steps, or null
  const int64_t* places;        // which row of a table the weights and values of each step are; null: its own
  STATEMIX_INLINE int64_t row(int64_t t) const { return places ? places[t] : t; }
  // for the backward
  const V<T>* before;  // the state that enters the first step (companion: M lags, the newest first)
  Array grad_states, grad_gates, grad_values;
};

// The lanes where q stands for a weight above 1/2, for q + 1. `limit` is 0 where q is used as said above, and else the least
// integer: then no bit pattern is below it.
template <class T>
struct Flags {
  using I = typename Lanes<T>::I;
  I limit;
  explicit Flags(int normalization) : limit(is_convex(normalization) ? I{} : I{} + ~Lanes<T>::all_but_sign) {}
  STATEMIX_INLINE Mask<T> operator()(V<T> q) const { return Mask<T>::bits_below(q, limit); }
  STATEMIX_INLINE V<T> part(V<T> q, V<T> u) const { return (*this)(q).choose(u, V<T>{}); }
};

// base + rest, and what the rounding lost. An infinite sum has lost nothing.
template <class T>
STATEMIX_INLINE V<T> add(V<T> base, V<T> rest, V<T>& lost) {
  const V<T> sum = base + rest;
  lost = rest - (sum - base);
  lost = lost == lost ? lost : V<T>{};
  return sum;
}
// The same for two numbers of any sizes.
template <class T>
STATEMIX_INLINE V<T> add_any(V<T> a, V<T> b, V<T>& lost) {
  const V<T> sum = a + b, part = sum - a;
  lost = (a - (sum - part)) + (b - part);
  lost = lost == lost ? lost : V<T>{};
  return sum;
}

template <class T, Normalization norm, bool slopes>
STATEMIX_INLINE void weigh_gate(V<T> z, V<T>& f, V<T>& slope) {
  if constexpr (norm == kSigmoid) {
    const Sigmoid<T> s(z);
    f = s.value;
    slope = s.value * s.complement;
  } else if constexpr (norm == kRelu) {
    f = (z < 0 ? V<T>{} : z) + T(0);  // -0 would pass for a weight above 1/2
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

// x_0 + x_1 + ... as four sums: one alone would wait four cycles for each addition. The same for the largest.
template <class T, class Combine>
STATEMIX_INLINE V<T> fold(const V<T>* x, int count, Combine combine) {
  V<T> part[4] = {};
#pragma GCC unroll 17
  for (int j = 0; j < count; ++j) part[j % 4] = j < 4 ? x[j] : combine(part[j % 4], x[j]);
  if (count > 3) part[2] = combine(part[2], part[3]);
  if (count > 1) part[0] = combine(part[0], part[1]);
  return count > 2 ? combine(part[0], part[2]) : part[0];
}

// f of the gates of one row, into q, and its slope, into d. Returns S.
template <class T, Normalization norm, bool slopes, int Gates>
STATEMIX_INLINE V<T> measure_row(const T* gate, int64_t row, int64_t ahead, int gates, T* q, T* d) {
  constexpr int capacity = Gates ? Gates : kMaxOrder + 1;
  const auto max = [](V<T> a, V<T> b) { return larger<T>(a, b); };
  V<T> f[capacity];
#pragma GCC unroll 17
  for (int j = 0; j < gates; ++j) {
    f[j] = load(gate + j * row);
    __builtin_prefetch(gate + j * row + ahead, 0, 2);
  }
  if constexpr (norm == kSoftmax) {  // no slope is asked for: the weights say it
    const V<T> reach = fold<T>(f, gates, [](V<T> a, V<T> b) { return farther<T>(a, b); });
    if (__builtin_expect(Mask<T>::any_above(reach, kReach<T>), 0)) {
      const V<T> peak = fold<T>(f, gates, max);
      for (int j = 0; j < gates; ++j) store(q + j * kSlot<T>, f[j] = exp_of_negative<T>(f[j] - peak));
    } else {
#pragma GCC unroll 17
      for (int j = 0; j < gates; ++j) store(q + j * kSlot<T>, f[j] = Exponential<T>(f[j]).value_within_reach());
    }
  } else {
    // below -80 the sigmoid is exp to the last bit, and a row of exp may be shifted to keep its largest away from underflow
    const V<T> shift = norm == kSigmoid ? larger<T>(T(-80) - fold<T>(f, gates, max), V<T>{}) : V<T>{};
    for (int j = 0; j < gates; ++j) {
      V<T> slope;
      weigh_gate<T, norm, slopes>(norm == kSigmoid ? f[j] + shift : f[j], f[j], slope);
      store(q + j * kSlot<T>, f[j]);
      if (slopes) store(d + j * kSlot<T>, slope);
      if (is_signed(norm)) f[j] = absolute<T>(f[j]);
    }
  }
  return fold<T>(f, gates, [](V<T> a, V<T> b) { return a + b; });
}

// q and d of a row from what was measured.
template <class T, Normalization norm, bool slopes>
STATEMIX_INLINE void share_row(V<T> sum, int gates, T* q, T* d, T* sign) {
  constexpr bool unbounded = norm == kRelu || norm == kSilu || norm == kLinear;
  if (unbounded && __builtin_expect(Mask<T>::any_above(sum, std::numeric_limits<T>::max()), 0)) {
    // a sum that overflows is taken again of scaled f, or all weights were 0: tests/test_scan.py
    static_assert(kMaxOrder < 128, "a row of the largest order must fit");
    const V<T> scale = sum > std::numeric_limits<T>::max() ? splat(T(1) / 128) : splat(T(1));
    sum = V<T>{};
    for (int j = 0; j < gates; ++j) {
      const V<T> f = load(q + j * kSlot<T>) * scale;
      store(q + j * kSlot<T>, f);
      sum += absolute<T>(f);
      if (slopes) store(d + j * kSlot<T>, load(d + j * kSlot<T>) * scale);
    }
  }
  const V<T> floor = splat(norm == kRelu ? T(kReluFloor) * gates : T(0));
  sum += floor;
  // a row of zeros has weights of 0: tests/test_gates.py
  const V<T> inverse = norm == kSoftmax ? reciprocal<T>(sum) : T(1) / (sum < std::numeric_limits<T>::min() ? splat(T(1)) : sum);
  if constexpr (is_convex(norm)) {
    const V<T> half = T(0.5) * sum;
    V<T> others[2] = {floor, {}};
#pragma GCC unroll 17
    for (int j = 0; j < gates; ++j) {
      const V<T> f = load(q + j * kSlot<T>);
      others[j % 2] = Mask<T>::not_above(f, half).add(others[j % 2], f);
    }
    const V<T> below_one = -(others[0] + others[1]) * inverse;
#pragma GCC unroll 17
    for (int j = 0; j < gates; ++j) {
      const V<T> f = load(q + j * kSlot<T>);
      store(q + j * kSlot<T>, Mask<T>::not_above(f, half).multiply(f, inverse, below_one));
    }
  } else {
    for (int j = 0; j < gates; ++j) {
      const V<T> p = load(q + j * kSlot<T>) * inverse;
      store(q + j * kSlot<T>, p);
      if (slopes && is_signed(norm)) store(sign + j * kSlot<T>, p > 0 ? splat(T(1)) : (p < 0 ? splat(T(-1)) : V<T>{}));
    }
  }
  if (slopes)
    for (int j = 0; j < gates; ++j) store(d + j * kSlot<T>, load(d + j * kSlot<T>) * inverse);
}

// q of a row of two gates, whose softmax needs but one exponential: e = exp(-|z_0 - z_1|), and e / (1 + e) is the smaller weight.
template <class T>
STATEMIX_INLINE void weigh_pair(const T* gate, int64_t row, int64_t ahead, T* q) {
  using I = typename Lanes<T>::I;
  const V<T> a = load(gate), b = load(gate + row);
  __builtin_prefetch(gate + ahead, 0, 2);
  __builtin_prefetch(gate + row + ahead, 0, 2);
  const V<T> apart = (a - b) + larger<T>(a, b) * T(0);  // a gate of +inf makes NaN, as it does in any softmax
  const V<T> e = exp_of_negative<T>(-absolute<T>(apart)), smaller = e * reciprocal<T>(T(1) + e);
  const I sign_bit = I{} + ~Lanes<T>::all_but_sign, second = (I)smaller ^ ((I)apart & sign_bit);
  store(q, (V<T>)(second ^ sign_bit));
  store(q + kSlot<T>, (V<T>)second);
}

// Weights of every row of every step; with d and sign if `slopes`. Gates is M + 1, or 0: known at run time only.
// A row by itself would mostly wait, for its sum, its inverse, its largest weight; so some rows are measured, then shared.
template <class T, Normalization norm, bool slopes, int Gates>
STATEMIX_NOINLINE void weigh(const Steps<T> steps, int rows, Weights<T> w) {
  constexpr int kTogether = 16;
  const int gates = Gates ? Gates : steps.order + 1, together = rows < kTogether ? kTogether / rows : 1;
  const int64_t row = gates * kSlot<T>, ahead = steps.next * steps.gates.step;
  V<T> sums[kMaxOrder];
  if (slopes && !is_signed(norm)) store(w.sign, splat(T(norm == kNone ? 0 : 1)));
  if constexpr (norm == kSoftmax && Gates == 2) {
    const int64_t step = steps.gates.step, between = steps.gates.row;
    const T* gate = steps.gates.at;
    T* q = w.q;
    for (int t = 0; t < steps.count; ++t, gate += step, q += w.step) weigh_pair<T>(gate, between, ahead, q);
    return;
  }
  for (int first = 0; first < steps.count; first += together) {
    const int end = first + together < steps.count ? first + together : steps.count;
    V<T>* sum = sums;
    for (int t = first; t < end; ++t) {
      const T* gate = steps.gates(t, 0);
      T *q = w.q + t * w.step, *d = w.d + t * w.step;
      for (int i = 0; i < rows; ++i, gate += gates * steps.gates.row, q += row, d += row)
        *sum++ = measure_row<T, norm, slopes, Gates>(gate, steps.gates.row, ahead, gates, q, d);
    }
    if constexpr (norm == kNone) continue;
    sum = sums;
    for (int t = first; t < end; ++t) {
      T *q = w.q + t * w.step, *d = w.d + t * w.step, *sign = w.sign + t * w.step;
      for (int i = 0; i < rows; ++i, q += row, d += row, sign += row) share_row<T, norm, slopes>(*sum++, gates, q, d, sign);
    }
  }
}

template <int Order>
constexpr int kCapacity = Order ? Order : kMaxOrder;

// The states of these steps, from and to carry[0..M) (companion: lags, the newest first); carry[M..2M) is what rounding lost.
template <class T, int Order, Kind kind>
STATEMIX_NOINLINE void forward(const Steps<T> steps, Weights<T> w, V<T>* carry) {
  const int order = Order ? Order : steps.order, gates = order + 1;
  const int rows = kind == kBlock ? order : 1;
  constexpr int kAhead = 16;  // steps: what is written must be in the cache by then, or the stores wait
  const bool bounded = steps.normalization != kNone;
  const Flags<T> flags(steps.normalization);
  V<T> h[kCapacity<Order>], lost[kCapacity<Order>], next[kCapacity<Order>], next_lost[kCapacity<Order>];
  for (int i = 0; i < order; ++i) h[i] = carry[i], lost[i] = carry[order + i];

  for (int t = 0; t < steps.count; ++t) {
    const int64_t at = steps.row(t);
    const auto weight = [q = w.q + at * w.step](int j) { return load(q + j * kSlot<T>); };
    if (steps.reset && steps.reset[t])
      for (int i = 0; i < order; ++i) h[i] = lost[i] = V<T>{};
    if constexpr (kind == kObserver) {
      const V<T> top = h[0], top_lost = lost[0], v = load(steps.values(at, 0));
      const V<T> entering = weight(order) * v + flags.part(weight(order), v);
      for (int j = 0; j < order; ++j) {
        const V<T> q = weight(j);
        V<T> rest;
        const V<T> base = add_any<T>(j + 1 < order ? h[j + 1] : V<T>{}, flags.part(q, top), rest);
        rest += q * top + flags.part(q, top_lost);
        if (j + 1 < order) rest += lost[j + 1];
        if (j == 0) rest += entering;
        h[j] = add<T>(base, rest, lost[j]);
        store(steps.states(t, j), h[j]);
      }
    } else {
      V<T> peak = absolute<T>(h[0]);
      for (int i = 1; i < order; ++i) peak = larger<T>(peak, absolute<T>(h[i]));
      for (int i = 0; i < rows; ++i) {
        const V<T> v = load(steps.values(at, i)), entering = weight(i * gates + order);
        __builtin_prefetch(steps.values(at + steps.next, i), 0, 2);
        __builtin_prefetch(steps.states(t + kAhead, i), 1, 3);
        // rest in two sums, so that the new state waits for as little as can be
        V<T> rest[2] = {entering * v, {}}, base = flags.part(entering, v);
        for (int j = 0; j < order; ++j) {
          const V<T> q = weight(i * gates + j);
          const Mask<T> flagged = flags(q);
          rest[0] = flagged.add(rest[0], lost[j]);
          rest[1] += q * h[j];
          base = flagged.add(base, h[j]);
        }
        V<T> sum = add<T>(base, rest[0] + rest[1], next_lost[i]);
        if (bounded) {
          // rounding must not let |h| drift past the bound of Proposition 1 in 10^6 steps: tests/test_stability.py
          const V<T> bound = larger<T>(peak, absolute<T>(v));
          sum = clamp<T>(sum, -bound, bound);
        }
        store(steps.states(t, i), sum);
        next[i] = sum;
      }
      if constexpr (kind == kBlock) {
        for (int i = 0; i < order; ++i) h[i] = next[i], lost[i] = next_lost[i];
      } else {
        for (int i = order - 1; i > 0; --i) h[i] = h[i - 1], lost[i] = lost[i - 1];
        h[0] = next[0], lost[0] = next_lost[0];
      }
    }
  }
  for (int i = 0; i < order; ++i) carry[i] = h[i], carry[order + i] = lost[i];
}

// The state that entered step t, h_{t-1}: zero at a reset. Companion: M lags; `first` is the newest reset up to t, or -1.
template <class T, int Order, Kind kind>
STATEMIX_INLINE void entering_state(const Steps<T>& steps, int t, int order, int first, V<T>* u) {
  for (int i = 0; i < order; ++i) {
    if constexpr (kind == kCompanion) {
      const int made = t - 1 - i;
      u[i] = first >= 0 && made < first ? V<T>{} : made >= 0 ? load(steps.states(made, 0)) : steps.before[-1 - made];
    } else {
      u[i] = t == first ? V<T>{} : t > 0 ? load(steps.states(t - 1, i)) : steps.before[i];
    }
  }
}

// These steps from the last to the first. carry[i]: what later steps hand back to component i (companion: lag i) of the state
// that leaves the last step, then of the state that enters the first; carry[M..2M) is what rounding lost.
template <class T, int Order, Kind kind, bool softmax>
STATEMIX_NOINLINE void backward(const Steps<T> steps, Weights<T> w, V<T>* carry) {
  const int order = Order ? Order : steps.order, gates = order + 1;
  const int rows = kind == kBlock ? order : 1, shown = kind == kCompanion ? 1 : order;
  constexpr int kAhead = 4;  // steps, as above
  const Flags<T> flags(steps.normalization);
  const int64_t sign_step = is_signed(steps.normalization) ? 1 : 0;
  V<T> u[kCapacity<Order>], h[kCapacity<Order>], s[kCapacity<Order>], lost[kCapacity<Order>], base[kCapacity<Order>],
      rest[kCapacity<Order>];
  for (int i = 0; i < order; ++i) s[i] = carry[i], lost[i] = carry[order + i];

  int first = steps.count;  // the newest reset up to t, or -1
  for (int t = steps.count - 1; t >= 0; --t) {
    if (!steps.reset)
      first = -1;
    else if (t < first)
      for (first = t; first >= 0 && !steps.reset[first]; --first) {}
    entering_state<T, Order, kind>(steps, t, order, first, u);
    for (int i = 0; i < shown; ++i) {
      V<T> off;
      s[i] = add_any<T>(s[i], load(steps.grad_states(t, i)), off);
      __builtin_prefetch(steps.grad_states(t + steps.next, i), 0, 2);
      __builtin_prefetch(steps.states(t + steps.next, i), 0, 2);
      lost[i] += off;
      h[i] = load(steps.states(t, i));
    }

    const int64_t at = steps.row(t), sooner = t > 0 ? steps.row(t - 1) : -1;
    const auto weight = [q = w.q + at * w.step](int g) { return load(q + g * kSlot<T>); };
    // dL/dz of gate g from the adjoint times the weight, sp, the adjoint s, u and the mean of u (or of s u, then s = 1)
    const auto grad_gate = [&](int g, V<T> sp, V<T> si, V<T> ug, V<T> mean) {
      __builtin_prefetch(steps.grad_gates(t - kAhead, g), 1, 3);
      __builtin_prefetch(w.q + sooner * w.step + g * kSlot<T>, 0, 3);  // a layer's kept weights come from far
      if constexpr (softmax)
        store(steps.grad_gates(t, g), sp * (ug - mean));
      else
        store(steps.grad_gates(t, g),
              si * load(w.d + at * w.step + g * kSlot<T>) * (ug - load(w.sign + sign_step * (at * w.step + g * kSlot<T>)) * mean));
    };
    // every weight is read before its gradient is written: they may share their place
    if constexpr (kind == kObserver) {
      // weight j feeds component j: dL/dp_j = s_j h[0], and s_0 v for the input gate
      const V<T> v = load(steps.values(at, 0)), entering = weight(order), one = splat(T(1));
      const V<T> sv = s[0] * v;
      V<T> mean = entering * sv + flags.part(entering, sv);
      base[0] = rest[0] = V<T>{};
      for (int j = 0; j < order; ++j) {
        const V<T> q = weight(j), su = s[j] * u[0];
        V<T> off;
        mean += q * su + flags.part(q, su);
        base[0] = add_any<T>(base[0], flags.part(q, s[j]), off);
        rest[0] += q * s[j] + (flags.part(q, lost[j]) + off);
        if (j > 0) base[j] = s[j - 1], rest[j] = lost[j - 1];
      }
      for (int j = 0; j < order; ++j) grad_gate(j, weight(j) + flags.part(weight(j), one), one, s[j] * u[0], mean);
      grad_gate(order, entering + flags.part(entering, one), one, sv, mean);
      store(steps.grad_values(t, 0), entering * s[0] + flags.part(entering, s[0]));
    } else {
      for (int i = 0; i < rows; ++i) {
        __builtin_prefetch(steps.values(at + steps.next, i), 0, 2);
        __builtin_prefetch(steps.grad_values(t - kAhead, i), 1, 3);
        const V<T> v = load(steps.values(at, i)), q = weight(i * gates + order), sp = q * s[i] + flags.part(q, s[i]);
        grad_gate(i * gates + order, sp, s[i], v, h[i]);
        store(steps.grad_values(t, i), sp);
      }
      for (int j = 0; j < order; ++j) {  // column by column: the two sums of a component stay in registers
        V<T> bj = {}, rj = {};
        const V<T> uj = u[j];
        for (int i = 0; i < rows; ++i) {
          const V<T> q = weight(i * gates + j), si = s[i], qs = q * si;
          const Mask<T> flagged = flags(q);
          bj = flagged.add(bj, si);
          rj = flagged.add(rj + qs, lost[i]);
          grad_gate(i * gates + j, flagged.add(qs, si), si, uj, h[i]);
        }
        if (kind == kCompanion && j + 1 < order) {  // the older lags move up by one on their way back
          V<T> off;
          bj = add_any<T>(bj, s[j + 1], off);
          rj += lost[j + 1] + off;
        }
        base[j] = bj, rest[j] = rj;
      }
    }
    const bool cut = t == first;
    for (int i = 0; i < order; ++i) {
      s[i] = add<T>(base[i], rest[i], lost[i]);
      if (cut) s[i] = lost[i] = V<T>{};
    }
  }
  for (int i = 0; i < order; ++i) carry[i] = s[i], carry[order + i] = lost[i];
}

// What one kind, order and normalisation need, chosen once per call.
template <class T>
struct Recurrence {
  void (*weigh)(Steps<T>, int rows, Weights<T>);            // q alone
  void (*weigh_to_return)(Steps<T>, int rows, Weights<T>);  // what the backward needs: softmax q, else d and sign too
  void (*forward)(Steps<T>, Weights<T>, V<T>* carry);
  void (*backward)(Steps<T>, Weights<T>, V<T>* carry);
};

// The order that `forward` and `backward` are compiled for, or 0: one for any order. Each of its own saves up to a third of the
// scan's time at small orders and little at large ones, and takes a tenth of a second to compile; so the rare have few.
constexpr int own_order(int order, bool often) { return order <= 4 || (often && (order <= 8 || order == 16)) ? order : 0; }

template <class T, int Order>
Recurrence<T> recurrence_of_order(int kind, int normalization) {
#if defined(__SSE2__) && !defined(__AVX2__)
  constexpr bool often = false;  // a processor of before 2013
#else
  constexpr bool often = sizeof(T) == sizeof(float);
#endif
  constexpr int own = own_order(Order, often), other = own_order(Order, false);
  Recurrence<T> r{};
#define STATEMIX_CASE(norm, gates)                               \
  case norm:                                                     \
    r.weigh = weigh<T, norm, false, gates>;                      \
    r.weigh_to_return = weigh<T, norm, norm != kSoftmax, gates>; \
    break;
  switch (normalization) {
    STATEMIX_CASE(kSoftmax, Order ? Order + 1 : 0)  // the default: its rows are unrolled
    STATEMIX_CASE(kSigmoid, 0)
    STATEMIX_CASE(kRelu, 0)
    STATEMIX_CASE(kTanh, 0)
    STATEMIX_CASE(kSilu, 0)
    STATEMIX_CASE(kLinear, 0)
    STATEMIX_CASE(kNone, 0)
  }
#undef STATEMIX_CASE
#define STATEMIX_CASE(kind)                                                                                  \
  case kind:                                                                                                 \
    r.forward = forward<T, own, kind>;                                                                       \
    r.backward = normalization == kSoftmax ? backward<T, own, kind, true> : backward<T, other, kind, false>; \
    break;
  switch (kind) {
    STATEMIX_CASE(kBlock)
    STATEMIX_CASE(kCompanion)
    STATEMIX_CASE(kObserver)
  }
#undef STATEMIX_CASE
  return r;
}

template <class T>
Recurrence<T> recurrence(int kind, int64_t order, int normalization) {
#define STATEMIX_CASE(order) \
  case order: return recurrence_of_order<T, order>(kind, normalization);
  switch (order) {
    STATEMIX_CASE(1)
    STATEMIX_CASE(2)
    STATEMIX_CASE(3)
    STATEMIX_CASE(4)
    STATEMIX_CASE(5)
    STATEMIX_CASE(6)
    STATEMIX_CASE(7)
    STATEMIX_CASE(8)
    STATEMIX_CASE(9)
    STATEMIX_CASE(10)
    STATEMIX_CASE(11)
    STATEMIX_CASE(12)
    STATEMIX_CASE(13)
    STATEMIX_CASE(14)
    STATEMIX_CASE(15)
    STATEMIX_CASE(16)
    default: return recurrence_of_order<T, 0>(kind, normalization);
  }
#undef STATEMIX_CASE
}

}  // namespace
}  // namespace statemix
