// The block scan of small blocks, M 1 to 4, in slabs of time.
//
// A lane has all of U neighbouring blocks, so no number ever goes from lane to lane. A slab is W L steps in a row: each of
// the W warps of a program takes L of them, for the same 32 U blocks, and
//   1. makes the weights of its steps and their map, what they make of any state that enters them;
//   2. leaves the map where the other warps see it, and sends the state that enters the slab through the maps before its own;
//   3. walks through its steps from there, with the weights still in registers.
// So every input is read once, and one sequence of few blocks keeps W warps busy.
//
// The backward is the same in reversed time. With r_t, what the steps after t hand back to the state h_t, and s_t = dL/dh_t + r_t,
//   r_{t-1} = p_t^T s_t, and the gradients of scan/reference.py. A step is counted in the order of the walk: 0 is the last in time.
//
// Where programs are few, time is cut into chunks of whole slabs. A first kernel makes the map of every chunk but the last of
// the walk, as in 1; then each chunk is a program of its own that sends the initial state through the maps before it.
//
// A reset forgets by selection: a product with zero would let an infinity through.
#pragma once
#include "device.cuh"
#include "gates.cuh"

namespace statemix {

enum Pass { kForward, kBackward };

// Pointers and strides of one scan, in elements. Of one step all blocks are contiguous, transitions (n, i, j), the others (n, i),
// i and j up to the power of two at M or above. A step starts at a multiple of 16 bytes. The float states (B, N, M) are contiguous.
template <class T>
struct SlabArrays {
  template <class Number>
  struct Array {
    Number* at;
    int64_t batch;
    int step;
    __device__ Number* operator()(int64_t b, int64_t t) const { return at + b * batch + t * step; }
  };
  int length, blocks, groups;    // T; N; how many programs have one sequence's blocks
  int slabs_of_chunk, chunks;    // chunks: 1 where time is not cut
  Array<const T> gates, input_gates, given;  // given: values, or in the backward dL/dh
  Array<const uint8_t> reset;
  const float* entering;         // initial state, or in the backward the gradient of the final state
  float* leaving;                // final state, or in the backward the gradient of the initial state
  float* maps;                   // (B, chunks, groups, kNumbers, 32)
  Array<T> states;               // the forward writes, the backward reads it
  // for the backward
  Array<const T> values;
  const float* initial_state;
  Array<T> grad_gates, grad_input_gates, grad_values;
};

// M: order. U: blocks of a lane, 1 unless M is 1. W: warps. L: steps of a warp in a slab. D: slabs that are on their way from memory.
template <class T, int M, int U, int W, int L, int D, Normalization norm, bool kReset, Pass pass, bool kMapOnly>
struct Slabs {
  static constexpr int P = M == 3 ? 4 : M;        // the place of a block in memory
  static constexpr int kRows = U * P;             // numbers of a lane in one step,
  static constexpr int kGates = U * P * P;        // and transition gates
  static constexpr bool kBack = pass == kBackward;
  static constexpr bool kKeepsSlopes = norm != kSoftmax;  // softmax's slope is its weight
  static constexpr int kNumbers = U * M * (M + 1) + (kReset ? 1 : 0);  // of a map, one for whether it forgets
  static constexpr int kThreads = 32 * W;

  using Rows = Staged<T, kRows>;
  using Gates = Staged<T, kGates>;
  using State = float[U][M];

  // What a warp reads for its steps of a slab.
  struct Inputs {
    Gates gates[L];
    Rows input_gates[L], given[L];
  };
  struct InputsOfBackward : Inputs {
    Rows values[L], states[L + 1];  // states[l + 1] entered step l, states[l] left it
  };
  struct Shared {
    std::conditional_t<kBack && !kMapOnly, InputsOfBackward, Inputs> ring[D][W];
    float maps[2][W][kNumbers][32], carry[2][U][M][32];
  };

};
}  // namespace statemix
