// What only a GPU has; tests/emulate.h has the same names for a CPU. The kernels include one of the two, by this file's first
// lines.
#pragma once
#ifdef STATEMIX_EMULATE
#include "emulate.h"
#else

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

#define STATEMIX_DEVICE __device__ __forceinline__

// The kernel of a program: a struct with Arguments, Shared (what its threads share), kThreads, kBlocks (how many blocks n it
// serves), kResident (how many programs a multiprocessor should have registers for) and run(Arguments, Shared&). Whoever
// launches it reads three numbers in the mangled name of `numbers`.
#define STATEMIX_KERNEL(...)                                                          \
  using Program = __VA_ARGS__;                                                        \
  extern "C" __global__ void __launch_bounds__(Program::kThreads, Program::kResident) \
      kernel(const __grid_constant__ Program::Arguments arguments) {                  \
    extern __shared__ __align__(16) char shared[];                                    \
    Program::run(arguments, *reinterpret_cast<Program::Shared*>(shared));             \
  }                                                                                   \
  template <int threads, int blocks, int shared_bytes>                                \
  __global__ void numbers() {}

namespace statemix {

constexpr uint32 kAll = ~0u;  // the lanes of a warp that take part

// 2^x and 1 / x, to about 2 units in the last place. The first two give 0 for what is below the normal numbers.
STATEMIX_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
STATEMIX_DEVICE float inverse_of_normal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
STATEMIX_DEVICE float inverse(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The half types in registers, rounded to nearest even. A word holds two, the first in its low half.
STATEMIX_DEVICE float bfloat16_to_float(uint16 x) { return __uint_as_float(uint32(x) << 16); }
STATEMIX_DEVICE uint16 float_to_bfloat16(float x) {
  uint16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
STATEMIX_DEVICE uint32 floats_to_bfloat16(float low, float high) {
  uint32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
STATEMIX_DEVICE float float16_to_float(uint16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
STATEMIX_DEVICE uint16 float_to_float16(float x) {
  uint16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
STATEMIX_DEVICE uint32 floats_to_float16(float low, float high) {
  uint32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Begins to copy `bytes` bytes to shared memory, or zeros where there is nothing; then `from` is not read. They arrive when
// `wait` says so, for the lane that copied them; for others after the next __syncwarp or __syncthreads.
template <int bytes>
STATEMIX_DEVICE void copy(void* to, const void* from, bool there) {
  const uint32 at = (uint32)__cvta_generic_to_shared(to);
  const int size = there ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
  else if constexpr (bytes == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
}
// Closes a group of copies; and waits until all groups but the `open` newest have arrived.
STATEMIX_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int open>
STATEMIX_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

}  // namespace statemix
#endif
