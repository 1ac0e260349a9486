// Numbers in memory, float32, bfloat16 or float16, and in registers, float32 always.
#pragma once
#include "device.cuh"

namespace statemix {

struct Bfloat16 {
  uint16 bits;
};
struct Float16 {
  uint16 bits;
};

template <class S>
constexpr int kPerWord = 4 / sizeof(S);  // numbers in 32 bits

STATEMIX_DEVICE float widen(float x) { return x; }
STATEMIX_DEVICE float widen(Bfloat16 x) { return bfloat16_to_float(x.bits); }
STATEMIX_DEVICE float widen(Float16 x) { return float16_to_float(x.bits); }

STATEMIX_DEVICE void narrow(float x, float& y) { y = x; }
STATEMIX_DEVICE void narrow(float x, Bfloat16& y) { y.bits = float_to_bfloat16(x); }
STATEMIX_DEVICE void narrow(float x, Float16& y) { y.bits = float_to_float16(x); }

// A word's one or two numbers.
template <class S>
STATEMIX_DEVICE void unpack(uint32 word, float* x);
template <>
STATEMIX_DEVICE void unpack<float>(uint32 word, float* x) {
  x[0] = __uint_as_float(word);
}
template <>
STATEMIX_DEVICE void unpack<Bfloat16>(uint32 word, float* x) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
template <>
STATEMIX_DEVICE void unpack<Float16>(uint32 word, float* x) {
  x[0] = float16_to_float(uint16(word & 0xffffu));
  x[1] = float16_to_float(uint16(word >> 16));
}

template <class S>
STATEMIX_DEVICE uint32 pack(const float* x);
template <>
STATEMIX_DEVICE uint32 pack<float>(const float* x) {
  return __float_as_uint(x[0]);
}
template <>
STATEMIX_DEVICE uint32 pack<Bfloat16>(const float* x) {
  return floats_to_bfloat16(x[0], x[1]);
}
template <>
STATEMIX_DEVICE uint32 pack<Float16>(const float* x) {
  return floats_to_float16(x[0], x[1]);
}

// The words of neighbours in memory, as few and as wide loads and stores as there can be. `at` is aligned to them.
template <int words>
STATEMIX_DEVICE void load_words(const void* at, uint32* w) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int k = 0; k < words / 4; ++k) {
      const uint4 q = ((const uint4*)at)[k];
      w[4 * k] = q.x, w[4 * k + 1] = q.y, w[4 * k + 2] = q.z, w[4 * k + 3] = q.w;
    }
  } else if constexpr (words == 2) {
    const uint2 q = *(const uint2*)at;
    w[0] = q.x, w[1] = q.y;
  } else {
#pragma unroll
    for (int k = 0; k < words; ++k) w[k] = ((const uint32*)at)[k];
  }
}
template <int words>
STATEMIX_DEVICE void store_words(void* at, const uint32* w) {
  if constexpr (words % 4 == 0) {
#pragma unroll
    for (int k = 0; k < words / 4; ++k) ((uint4*)at)[k] = make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
  } else if constexpr (words == 2) {
    *(uint2*)at = make_uint2(w[0], w[1]);
  } else {
#pragma unroll
    for (int k = 0; k < words; ++k) ((uint32*)at)[k] = w[k];
  }
}

// `count` neighbours, as float32. Fewer than a word go one by one.
template <int count, class S>
STATEMIX_DEVICE void load_numbers(const S* at, float* x) {
  if constexpr (count % kPerWord<S> == 0) {
    constexpr int words = count / kPerWord<S>;
    uint32 w[words];
    load_words<words>(at, w);
#pragma unroll
    for (int k = 0; k < words; ++k) unpack<S>(w[k], x + k * kPerWord<S>);
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = widen(at[k]);
  }
}
template <int count, class S>
STATEMIX_DEVICE void store_numbers(S* at, const float* x) {
  if constexpr (count % kPerWord<S> == 0) {
    constexpr int words = count / kPerWord<S>;
    uint32 w[words];
#pragma unroll
    for (int k = 0; k < words; ++k) w[k] = pack<S>(x + k * kPerWord<S>);
    store_words<words>(at, w);
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) narrow(x[k], at[k]);
  }
}

}  // namespace statemix
