// The call from Python: one plain struct, filled by src/statemix/scan/cpu.py. Field order is the contract.
#pragma once
#include <cstdint>

namespace statemix {

constexpr int kMaxOrder = 64;  // largest block size or order served

enum Kind : int32_t { kBlock = 0, kCompanion = 1, kObserver = 2 };
enum Normalization : int32_t { kSoftmax = 0, kSigmoid, kRelu, kTanh, kSilu, kLinear, kNone };

// Raw gates are (B, T, rows, M+1, N) with M rows for a block scan and one row otherwise; values (B, T, rows, N).
// Everything below a time step is contiguous; strides are in elements and may be 0. All else is contiguous.
struct Problem {
  int64_t batch, length, order, blocks;
  int64_t gate_batch_stride, gate_time_stride, value_batch_stride, value_time_stride;
  int32_t kind, normalization, is_double, threads;
  const void* raw_gates;
  const void* values;
  const void* initial_state;  // (B, M, N)
  const uint8_t* reset;       // (B, T) or null
  void* states;               // forward: written; backward: read
  const void* grad_states;
  void* grad_raw_gates;
  void* grad_values;
  void* grad_initial_state;
};

using Scan = void (*)(const Problem&);

}  // namespace statemix
