// Vectors of the instruction set this file is compiled for, and the functions of the gates on them.
// GCC's and Clang's vector extensions: the same source is SSE2, AVX2, AVX-512 or NEON.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define STATEMIX_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define STATEMIX_VECTOR_BYTES 32
#elif defined(__SSE2__)
#include <emmintrin.h>
#define STATEMIX_VECTOR_BYTES 16
#else
#define STATEMIX_VECTOR_BYTES 16
#endif
#define STATEMIX_INLINE inline __attribute__((always_inline))
#define STATEMIX_NOINLINE __attribute__((noinline))  // or every caller would compile its own copy

namespace statemix {
namespace {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(STATEMIX_VECTOR_BYTES)));
  typedef int32_t Int;
  typedef Int I __attribute__((vector_size(STATEMIX_VECTOR_BYTES)));
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int32_t all_but_sign = INT32_MAX;
  static constexpr float round = 12582912.f;                                  // 1.5 * 2^23: x + round - round is rint(x)
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // Cody and Waite; high has 9 bits
  static constexpr float lowest = -104.f;                                     // exp is 0 below
  // e^r = 1 + r + r^2 (c_0 + c_1 r + ...) for |r| <= ln(2) / 2: minimax, relative error 3e-9
  static constexpr float series[] = {0.499999934321f, 0.16666520399f, 0.0416683907835f, 0.00836874510894f, 0.00138145401768f};
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(STATEMIX_VECTOR_BYTES)));
  typedef int64_t Int;
  typedef Int I __attribute__((vector_size(STATEMIX_VECTOR_BYTES)));
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int64_t all_but_sign = INT64_MAX;
  static constexpr double round = 6755399441055744.;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -746.;
  // Taylor: relative error 5e-18
  static constexpr double series[] = {1. / 2,     1. / 6,      1. / 24,      1. / 120,      1. / 720,       1. / 5040,
                                      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
};

template <class T>
using V = typename Lanes<T>::V;
template <class T>
constexpr int width = STATEMIX_VECTOR_BYTES / sizeof(T);

template <class T>
STATEMIX_INLINE V<T> splat(T x) {
  return x - V<T>{};  // unlike x + 0, which turns -0 into 0, no work but the broadcast
}

template <class T>
STATEMIX_INLINE V<T> load(const T* p) {
  V<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
STATEMIX_INLINE void store(T* p, V<T> x) {
  std::memcpy(p, &x, sizeof x);
}

// The first `lanes` of a vector, zeros behind them.
template <class T>
STATEMIX_INLINE V<T> load_lanes(const T* p, int lanes) {
  if (lanes == width<T>) return load(p);
  V<T> x{};
  std::memcpy(&x, p, lanes * sizeof(T));
  return x;
}
template <class T>
STATEMIX_INLINE void store_lanes(T* p, V<T> x, int lanes) {
  if (lanes == width<T>) return store(p, x);
  std::memcpy(p, &x, lanes * sizeof(T));
}

// Four numbers: what is left of vectors of any size when their lanes are added up.
template <class T>
struct Quad {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  typedef typename Lanes<T>::Int I __attribute__((vector_size(4 * sizeof(T))));
};
#if defined(__clang__)
#define STATEMIX_SHUFFLE(T, a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define STATEMIX_SHUFFLE(T, a, b, i, j, k, l) __builtin_shuffle(a, b, typename Quad<T>::I{i, j, k, l})
#endif

// The sum of the lanes of each of four vectors. One by one they would take longer than the products that made them.
template <class T>
STATEMIX_INLINE typename Quad<T>::V totals(const V<T>* x) {
  using Q = typename Quad<T>::V;
  Q part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    constexpr int quads = width<T> < 4 ? 1 : width<T> / 4;
    T lanes[4 * quads] = {};
    store(lanes, x[i]);
    Q sum[quads];
    std::memcpy(sum, lanes, sizeof sum);
#pragma GCC unroll 3
    for (int half = quads / 2; half > 0; half /= 2)
#pragma GCC unroll 2
      for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    part[i] = sum[0];
  }
  const Q low = STATEMIX_SHUFFLE(T, part[0], part[1], 0, 4, 2, 6) + STATEMIX_SHUFFLE(T, part[0], part[1], 1, 5, 3, 7);
  const Q high = STATEMIX_SHUFFLE(T, part[2], part[3], 0, 4, 2, 6) + STATEMIX_SHUFFLE(T, part[2], part[3], 1, 5, 3, 7);
  return STATEMIX_SHUFFLE(T, low, high, 0, 1, 4, 5) + STATEMIX_SHUFFLE(T, low, high, 2, 3, 6, 7);
}

// A comparison with NaN is false: the order of the operands below is what lets NaN through, `larger` that in b.
template <class T>
STATEMIX_INLINE V<T> absolute(V<T> x) {
  using I = typename Lanes<T>::I;
  return (V<T>)((I)x & (I{} + Lanes<T>::all_but_sign));
}

// Lanes for which something holds. AVX-512 has a register and operations for that, which the compiler finds in part only.
#if defined(__AVX512F__)
template <class T>
struct Mask;
template <>
struct Mask<float> {
  __mmask16 lanes;
  static STATEMIX_INLINE Mask not_above(V<float> a, V<float> b) { return {_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGT_UQ)}; }
  static STATEMIX_INLINE Mask bits_below(V<float> a, Lanes<float>::I limit) {
    return {_mm512_cmplt_epi32_mask((__m512i)a, (__m512i)limit)};
  }
  STATEMIX_INLINE V<float> choose(V<float> a, V<float> b) const {
    return (V<float>)_mm512_mask_mov_ps((__m512)b, lanes, (__m512)a);
  }
  STATEMIX_INLINE V<float> add(V<float> a, V<float> x) const {
    return (V<float>)_mm512_mask_add_ps((__m512)a, lanes, (__m512)a, (__m512)x);
  }
  STATEMIX_INLINE V<float> multiply(V<float> x, V<float> y, V<float> other) const {
    return (V<float>)_mm512_mask_mul_ps((__m512)other, lanes, (__m512)x, (__m512)y);
  }
  static STATEMIX_INLINE bool any_above(V<float> x, float limit) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(limit), _CMP_GT_OQ);
  }
};
template <>
struct Mask<double> {
  __mmask8 lanes;
  static STATEMIX_INLINE Mask not_above(V<double> a, V<double> b) {
    return {_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NGT_UQ)};
  }
  static STATEMIX_INLINE Mask bits_below(V<double> a, Lanes<double>::I limit) {
    return {_mm512_cmplt_epi64_mask((__m512i)a, (__m512i)limit)};
  }
  STATEMIX_INLINE V<double> choose(V<double> a, V<double> b) const {
    return (V<double>)_mm512_mask_mov_pd((__m512d)b, lanes, (__m512d)a);
  }
  STATEMIX_INLINE V<double> add(V<double> a, V<double> x) const {
    return (V<double>)_mm512_mask_add_pd((__m512d)a, lanes, (__m512d)a, (__m512d)x);
  }
  STATEMIX_INLINE V<double> multiply(V<double> x, V<double> y, V<double> other) const {
    return (V<double>)_mm512_mask_mul_pd((__m512d)other, lanes, (__m512d)x, (__m512d)y);
  }
  static STATEMIX_INLINE bool any_above(V<double> x, double limit) {
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)splat(limit), _CMP_GT_OQ);
  }
};
#else
template <class T>
struct Mask {
  using I = typename Lanes<T>::I;
  I lanes;
  static STATEMIX_INLINE Mask not_above(V<T> a, V<T> b) { return {~(a > b)}; }
  static STATEMIX_INLINE Mask bits_below(V<T> a, I limit) { return {(I)a < limit}; }
  STATEMIX_INLINE V<T> choose(V<T> a, V<T> b) const { return lanes ? a : b; }
  STATEMIX_INLINE V<T> add(V<T> a, V<T> x) const { return a + (V<T>)((I)x & lanes); }
  STATEMIX_INLINE V<T> multiply(V<T> x, V<T> y, V<T> other) const { return lanes ? x * y : other; }
  static STATEMIX_INLINE bool any_above(V<T> x, T limit) {
#if defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(x > splat(limit)));
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)(x > splat(limit)));
#else
    const I above = x > splat(limit);
    int64_t words[2];
    std::memcpy(words, &above, sizeof words);
    return words[0] | words[1];
#endif
  }
};
#endif

template <class T>
STATEMIX_INLINE V<T> larger(V<T> a, V<T> b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)  // one instruction, where the compiler takes two if a is a constant
template <>
STATEMIX_INLINE V<float> larger<float>(V<float> a, V<float> b) {
  return (V<float>)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
}
#endif
// the larger absolute value
template <class T>
STATEMIX_INLINE V<T> farther(V<T> a, V<T> b) {
  return larger<T>(absolute<T>(a), absolute<T>(b));
}
#if defined(__AVX512F__)
template <>
STATEMIX_INLINE V<float> farther<float>(V<float> a, V<float> b) {
  return (V<float>)_mm512_range_ps((__m512)a, (__m512)b, 11);
}
#endif
template <class T>
STATEMIX_INLINE V<T> clamp(V<T> x, V<T> low, V<T> high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class T>
constexpr T kReach = 40;  // 65 exponentials of numbers no farther from 0, and what they add up to, are in (2^-64, 2^64)

// exp(x) = 2^k (1 + q): q = expm1(r) by a polynomial for |r| <= ln(2) / 2, k = rint(x / ln 2), the low bits of `shifted`.
template <class T>
struct Exponential {
  using L = Lanes<T>;
  V<T> q, k, shifted;

  STATEMIX_INLINE explicit Exponential(V<T> x) {
    shifted = x * T(1.4426950408889634) + L::round;
    k = shifted - L::round;
    const V<T> r = (x - k * L::ln2_high) - k * L::ln2_low;
    constexpr int terms = sizeof L::series / sizeof(T);
    q = splat<T>(L::series[terms - 1]);
#pragma GCC unroll 16
    for (int i = terms - 2; i >= 0; --i) q = q * r + L::series[i];
    q = (q * r + T(1)) * r;
  }
  // x 2^k in two factors, so that subnormal results and overflow come out right
  STATEMIX_INLINE V<T> scaled(V<T> x) const {
    using I = typename L::I;
    const I exponent = (I)shifted - (I)splat<T>(L::round), half = exponent >> 1;
    return x * (V<T>)((half + L::bias) << L::mantissa) * (V<T>)((exponent - half + L::bias) << L::mantissa);
  }
  STATEMIX_INLINE V<T> value() const { return scaled(q + T(1)); }
  STATEMIX_INLINE V<T> value_within_reach() const {  // where |x| <= kReach
#if defined(__AVX512F__)
    return value();
#else
    using I = typename L::I;  // no subnormal results: the exponent can be added to that of a float
    return (V<T>)((I)(q + T(1)) + ((I)shifted << L::mantissa));
#endif
  }
  STATEMIX_INLINE V<T> minus_one() const {  // exact near x = 0, where value() - 1 would cancel
    const V<T> scale = scaled(splat<T>(T(1)));
    return q * scale + (scale - T(1));
  }
};
#if defined(__AVX512F__)  // one instruction
template <>
STATEMIX_INLINE V<float> Exponential<float>::scaled(V<float> x) const {
  return (V<float>)_mm512_maskz_scalef_ps(-1, (__m512)x, (__m512)k);
}
template <>
STATEMIX_INLINE V<double> Exponential<double>::scaled(V<double> x) const {
  return (V<double>)_mm512_maskz_scalef_pd(-1, (__m512d)x, (__m512d)k);
}
#endif

template <class T>
STATEMIX_INLINE V<T> exp_of_negative(V<T> x) {  // x <= 0
  return Exponential<T>(larger<T>(splat<T>(Lanes<T>::lowest), x)).value();
}

// 1 / x for x in (2^-64, 2^64), within one unit in the last place
template <class T>
STATEMIX_INLINE V<T> reciprocal(V<T> x) {
  return T(1) / x;
}
#if defined(__AVX512F__)  // a division takes as long as ten other instructions
template <>
STATEMIX_INLINE V<float> reciprocal<float>(V<float> x) {
  const V<float> y = (V<float>)_mm512_maskz_rcp14_ps(-1, (__m512)x);
  return y + y * (1.f - x * y);
}
#endif

template <class T>
STATEMIX_INLINE V<T> tanh(V<T> x) {
  // 1 to the last bit beyond 20; the clamp keeps exp finite
  const V<T> e = Exponential<T>(clamp<T>(x + x, splat<T>(-40), splat<T>(40))).minus_one();
  return e / (e + T(2));
}

template <class T>
struct Sigmoid {
  V<T> value, complement;  // s(x) and 1 - s(x) = s(-x), each to full relative accuracy

  STATEMIX_INLINE explicit Sigmoid(V<T> x) {
    const V<T> e = exp_of_negative<T>(-absolute<T>(x));
    const V<T> near_one = T(1) / (T(1) + e), near_zero = e * near_one;
    value = x < 0 ? near_zero : near_one;
    complement = x < 0 ? near_one : near_zero;
  }
};

}  // namespace
}  // namespace statemix
