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

constexpr float kReluFloor = 1e-3f;  // RELU_FLOOR in gates.py
constexpr float kSmallestNormal = 1.17549435e-38f, kLargest = 3.40282347e+38f;
constexpr float kLog2E = 1.4426950408889634f;

constexpr bool is_unbounded(Normalization n) {
  return n == Normalization::relu || n == Normalization::silu || n == Normalization::linear;
}
// Whether f' is kept beside f, because f and S do not tell it.
constexpr bool keeps_slopes(Normalization n) {
  return n == Normalization::sigmoid || n == Normalization::tanh || n == Normalization::silu;
}

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
    const float f = tanh_of(z);
    slope = 1.0f - f * f;
    return f;
  } else {
    return z;
  }
}

// A lane's part of a row. A weight is p times scale(): softmax, whose S is between 1 and M + 1, leaves 1 / S to whoever has
// summed up; the others would leave the range of float32.
template <Normalization norm, int E, bool backward>
struct Row {
  static constexpr bool kSlopes = backward && keeps_slopes(norm);
  float p[E], in;                           // of the transition gates and of the input gate
  float inverse;                            // 1 / S
  float slopes[kSlopes ? E : 1], slope_in;  // f' / S

  STATEMIX_DEVICE float scale() const { return norm == Normalization::softmax ? inverse : 1.0f; }

  // dL/dz of gate j and of the input gate, from s scale(), u and h as above.
  STATEMIX_DEVICE float gradient(int j, float s, float u, float h) const {
    return gradient_of(p[j], slopes[kSlopes ? j : 0], s, u, h);
  }
  STATEMIX_DEVICE float gradient_in(float s, float v, float h) const { return gradient_of(in, slope_in, s, v, h); }

 private:
  STATEMIX_DEVICE float gradient_of(float weight, float slope, float s, float u, float h) const {
    if constexpr (norm == Normalization::softmax) return s * weight * (u - h);
    if constexpr (norm == Normalization::sigmoid) return s * slope * (u - h);
    if constexpr (norm == Normalization::relu) return weight > 0 ? s * inverse * (u - h) : 0.0f;
    if constexpr (norm == Normalization::none) return s * u;
    const float mean = weight > 0 ? h : weight < 0 ? -h : 0.0f;
    return s * (norm == Normalization::linear ? inverse : slope) * (u - mean);
  }
};

// Whether the lane's gate j, the (first + j)-th of its row, is one of `order` and not there to fill up.
template <int order, int capacity>
STATEMIX_DEVICE bool is_gate(int index) {
  return order == capacity || index < order;
}

// The row of `order` gates that K lanes have; raw: this lane's gates, from the row's `first` on; z_in: the input gate.
template <Normalization norm, int order, int K, bool backward, int E>
STATEMIX_DEVICE void weigh(Row<norm, E, backward>& row, const float (&raw)[E], float z_in, int first) {
  constexpr bool exponential = norm == Normalization::softmax || norm == Normalization::sigmoid;
  float z[E];
#pragma unroll
  for (int j = 0; j < E; ++j) z[j] = is_gate<order, K * E>(first + j) ? raw[j] : exponential ? __uint_as_float(0xff800000u) : 0.0f;

  if constexpr (norm == Normalization::softmax && K * E == 1) {
    // One exponential for two gates, kept finite, so that its inverse is normal. A gate of +inf makes NaN, as in any softmax.
    const float apart = fmaf(fmaxf(z[0], z_in), 0.0f, z_in - z[0]) * kLog2E;
    row.p[0] = 1.0f;
    row.in = exp2_fast(apart > 126.0f ? 126.0f : apart);
    row.inverse = inverse_of_normal(1.0f + row.in);
    return;
  }
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
      row.p[j] = exp2_fast(fmaf(z[j], kLog2E, shift));
      sum[j % 2] += row.p[j];
    }
    row.in = exp2_fast(fmaf(z_in, kLog2E, shift));
    row.inverse = inverse_of_normal(sum_of_lanes<K>(sum[0] + sum[1]) + row.in);
    return;
  }
  // below -80 the sigmoid is exp to the last bit, and a row of exp may be shifted to keep its largest away from underflow
  const float shift = norm == Normalization::sigmoid ? fmaxf(-80.0f - peak, 0.0f) : 0.0f;
  float shrunk = 0;  // the sum of f / 128, for rows whose own sum overflows
#pragma unroll
  for (int j = 0; j < E; ++j) {
    float slope = 0;
    row.p[j] = f_of<norm>(z[j] + shift, slope);
    if constexpr (Row<norm, E, backward>::kSlopes) row.slopes[j] = slope;
    sum[j % 2] += fabsf(row.p[j]);
    if constexpr (is_unbounded(norm)) shrunk = fmaf(fabsf(row.p[j]), 1.0f / 128, shrunk);
  }
  row.in = f_of<norm>(z_in + shift, row.slope_in);
  if constexpr (norm == Normalization::none) return;
  const float floor = norm == Normalization::relu ? kReluFloor * (order + 1) : 0.0f;
  const float total = sum_of_lanes<K>(sum[0] + sum[1]) + fabsf(row.in) + floor;
  row.inverse = inverse(total < kSmallestNormal ? 1.0f : total);  // a row of zeros has weights of 0
  if constexpr (is_unbounded(norm)) {
    shrunk = fmaf(fabsf(row.in) + floor, 1.0f / 128, sum_of_lanes<K>(shrunk));
    if (total > kLargest) row.inverse = inverse(shrunk) * (1.0f / 128);
  }
#pragma unroll
  for (int j = 0; j < E; ++j) {
    row.p[j] *= row.inverse;
    if constexpr (Row<norm, E, backward>::kSlopes) row.slopes[j] *= row.inverse;
  }
  row.in *= row.inverse;
  if constexpr (Row<norm, E, backward>::kSlopes) row.slope_in *= row.inverse;
}

}  // namespace statemix
