// Raw gates to weights in registers: what src/statemix/gates.py defines, and what its derivative needs.
//
// For a row of raw gates z_0..z_M with weights p_j = f(z_j) / S, S = sum |f(z_j)|, and h = sum_j p_j u_j, where u_j is the
// old state component of a transition weight and the value of the input gate, and with the adjoint s = dL/dh:
//   dL/dz_j = s f'(z_j) / S (u_j - sign(f(z_j)) h),   dL/du_j = s p_j.
// softmax is f = exp of z less the row's largest; relu adds a floor to S; none has p = z, S = 1, and 0 for every sign.
//
// A row lies on K neighbouring lanes, E transition gates each, and the input gate on all of them. The gates from the true order
// on, which fill a row up to K E, have weights and gradients of exactly zero whatever lies in memory.
#pragma once
#include "device.cuh"

namespace statemix {

enum class Normalization { softmax, sigmoid, relu, tanh, silu, linear, none };

constexpr float kReluFloor = 1e-3f;              // RELU_FLOOR in gates.py
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kLog2E = 1.4426950408889634f;

constexpr bool is_signed(Normalization n) {
  return n == Normalization::tanh || n == Normalization::silu || n == Normalization::linear;
}
// Whether f' is kept beside f, because f does not tell it.
constexpr bool keeps_slopes(Normalization n) { return n == Normalization::sigmoid || n == Normalization::silu; }

// Combines x of the `lanes` neighbours that share a row or a block; all of them get the result.
template <int lanes>
STATEMIX_DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int m = 1; m < lanes; m *= 2) x += __shfl_xor_sync(kAll, x, m);
  return x;
}
template <int lanes>
STATEMIX_DEVICE float max_of_lanes(float x) {
#pragma unroll
  for (int m = 1; m < lanes; m *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, m));
  return x;
}

// 1 / (1 + e^-z), and its slope s (1 - s) without cancellation.
struct Sigmoid {
  float value, complement;
  STATEMIX_DEVICE explicit Sigmoid(float z) {
    const float e = exp2_fast(-kLog2E * z);
    value = inverse(1.0f + e);
    complement = z > 0 ? e * value : 1.0f - value;
  }
};

// By its series (Cephes) where 1 - e^-2|z| would cancel.
STATEMIX_DEVICE float tanh_of(float z) {
  const float square = z * z, e = exp2_fast(-2.0f * kLog2E * fabsf(z));
  float series = -5.70498872745e-3f * square + 2.06390887954e-2f;
  series = (series * square - 5.37397155531e-2f) * square + 1.33314422036e-1f;
  const float small = (series * square - 3.33332819422e-1f) * square * z + z;
  const float large = (1.0f - e) * inverse(1.0f + e);
  return fabsf(z) < 0.625f ? small : (z < 0 ? -large : large);
}

template <Normalization norm>
STATEMIX_DEVICE float f_of(float z, float& slope) {
  if constexpr (norm == Normalization::sigmoid) {
    const Sigmoid s(z);
    slope = s.value * s.complement;
    return s.value;
  } else if constexpr (norm == Normalization::silu) {
    const Sigmoid s(z);
    slope = s.value * (1.0f + z * s.complement);
    return z * s.value;
  } else if constexpr (norm == Normalization::relu) {
    return z < 0 ? 0.0f : z;
  } else if constexpr (norm == Normalization::tanh) {
    return tanh_of(z);
  } else {
    return z;
  }
}

// A lane's part of a row, as f(z) and 1 / S; a weight is f times inverse.
template <Normalization norm, int E, bool backward>
struct Row {
  float f[E], in;  // of the transition gates and of the input gate
  float inverse;
  float slopes[backward && keeps_slopes(norm) ? E : 1], slope_in;

  static STATEMIX_DEVICE float sign(float f) {
    if constexpr (is_signed(norm)) return f > 0 ? 1.0f : f < 0 ? -1.0f : 0.0f;
    return norm == Normalization::none ? 0.0f : 1.0f;
  }
  static STATEMIX_DEVICE float slope(float f, float kept) {
    if constexpr (keeps_slopes(norm)) return kept;
    if constexpr (norm == Normalization::softmax) return f;
    if constexpr (norm == Normalization::relu) return f > 0 ? 1.0f : 0.0f;
    if constexpr (norm == Normalization::tanh) return 1.0f - f * f;
    return 1.0f;
  }
  // dL/dz, from s / S, u and h as above.
  STATEMIX_DEVICE float gradient(int j, float s, float u, float h) const {
    return s * slope(f[j], slopes[keeps_slopes(norm) ? j : 0]) * (u - sign(f[j]) * h);
  }
  STATEMIX_DEVICE float gradient_in(float s, float v, float h) const {
    return s * slope(in, slope_in) * (v - sign(in) * h);
  }
};

// Whether the lane's gate j, the (first + j)-th of its row, is one of `order` and not there to fill up.
template <int order, int capacity>
STATEMIX_DEVICE bool is_gate(int index) {
  return order == capacity || index < order;
}

// The row of order `order` that K lanes have; z: this lane's gates, from the row's `first` on; z_in: the input gate.
template <Normalization norm, int order, int K, bool backward, int E>
STATEMIX_DEVICE void weigh(Row<norm, E, backward>& row, const float (&raw)[E], float z_in, int first) {
  constexpr bool exponential = norm == Normalization::softmax || norm == Normalization::sigmoid;
  float z[E];
#pragma unroll
  for (int j = 0; j < E; ++j)
    z[j] = is_gate<order, K * E>(first + j) ? raw[j] : exponential ? __uint_as_float(0xff800000u) : 0.0f;

  float peak = z_in;
  if constexpr (exponential) {
#pragma unroll
    for (int j = 0; j < E; ++j) peak = fmaxf(peak, z[j]);
    peak = max_of_lanes<K>(peak);
  }
  float sum[2] = {};
  if constexpr (norm == Normalization::softmax) {
    const float shift = -peak * kLog2E;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      row.f[j] = exp2_fast(fmaf(z[j], kLog2E, shift));
      sum[j % 2] += row.f[j];
    }
    row.in = exp2_fast(fmaf(z_in, kLog2E, shift));
  } else {
    // below -80 the sigmoid is exp to the last bit, and a row of exp may be shifted to keep its largest away from underflow
    const float shift = norm == Normalization::sigmoid ? fmaxf(-80.0f - peak, 0.0f) : 0.0f;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      float slope = 0;
      row.f[j] = f_of<norm>(z[j] + shift, slope);
      if constexpr (backward && keeps_slopes(norm)) row.slopes[j] = slope;
      sum[j % 2] += is_signed(norm) ? fabsf(row.f[j]) : row.f[j];
    }
    row.in = f_of<norm>(z_in + shift, row.slope_in);
  }
  if constexpr (norm == Normalization::none) {
    row.inverse = 1.0f;
    return;
  }
  float total = sum_of_lanes<K>(sum[0] + sum[1]) + (is_signed(norm) ? fabsf(row.in) : row.in);
  if constexpr (norm == Normalization::softmax) {
    row.inverse = inverse_of_normal(total);  // of 1 to M + 1
  } else {
    if constexpr (norm == Normalization::relu) total += kReluFloor * (order + 1);
    row.inverse = inverse(total < kSmallestNormal ? 1.0f : total);  // a row of zeros has weights of 0
  }
}

}  // namespace statemix
