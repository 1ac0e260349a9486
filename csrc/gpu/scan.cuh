// The arguments of a scan, and the walk through time that its kernels share.
//
// Layout: blocks first, a block's own numbers together. For a block scan gates are (B, T, N, M, M), where [i][j] carries old
// component j to new component i, input gates, values and states (B, T, N, M). For the lagged scans gates are (B, T, N, M),
// input gates and values (B, T, N), states (B, T, N) for the companion and (B, T, N, M) for the observer. M is the order
// filled up to a power of two: what lies in the rest is never read into a result, and is written as zero.
// Everything below a time step is dense; batch and time have strides of their own, in elements, so that a tensor may be some
// columns of a larger one. Every array and every stride is a multiple of 16 bytes, and a time step may be read, but is not
// written, up to the next multiple of 16 bytes.
//
// Chunks of time: where blocks are few, a first kernel makes the map of each chunk (h -> P h + q, the same walk with M + 1
// states at once: the columns of the identity, and zero), `relay` hands the state from chunk to chunk, and the scan then
// walks all chunks at once. The backward hands adjoints from the last chunk to the first with the transposed P that the
// forward kept and a q of its own.
#pragma once
#include "gates.cuh"
#include "storage.cuh"

namespace statemix {

// The order filled up.
constexpr int filled_order(int order) {
  int filled = 1;
  while (filled < order) filled *= 2;
  return filled;
}

template <class S>
struct Array {
  S* at;
  int64 batch, time;  // strides, in elements
  STATEMIX_DEVICE S* operator()(int b, int t) const { return at + b * batch + t * time; }
};

// Filled field by field by `_run` of src/statemix/scan/gpu/__init__.py.
template <class S>
struct Scan {
  Array<const S> gates, input_gates, values, states, grad_states;  // read
  Array<S> new_states, grad_gates, grad_input_gates, grad_values;  // written
  const uint8* reset;                                              // (B, T), or null: the state is zero before that step
  const float* initial;  // (B, N, M): the state before step 0; companion: the last M values, the newest first
  const float* start;    // (B, N, M): what enters the walk: the initial state, or the gradient of the final one; null: zeros
  float* carry;          // (B, chunks, N, M): what enters each chunk, in the direction of the walk: `relay`. Not without chunks
  float* end;            // (B, N, M): what leaves the walk: the final state, or the gradient of the initial one
  float* maps;           // (B, chunks, N, M, M): P of each chunk
  float* offsets;        // (B, chunks, N, M): q of each chunk
  uint8* cuts;           // (B, chunks): whether there is a reset in the chunk; then P is zero
  int batch, length, blocks, chunks, chunk_size;  // chunk_size: steps of every chunk but the last; a multiple of 16
  int programs;                                   // of a chunk: the grid is batch x chunks x programs, in one dimension
};

// Where a program of the grid is.
struct Place {
  int batch, chunk, program;
  int first, steps;  // of the chunk
  int64 state;       // of block 0 in what is kept once for a chunk, in blocks: carry, offsets and maps
  template <class S>
  STATEMIX_DEVICE explicit Place(const Scan<S>& scan) {
    const int index = blockIdx.x / scan.programs;
    program = blockIdx.x % scan.programs;
    chunk = index % scan.chunks;
    batch = index / scan.chunks;
    first = chunk * scan.chunk_size;
    steps = min(scan.length - first, scan.chunk_size);
    state = (int64)index * scan.blocks;
  }
  // Number i of M of block n in what enters this chunk.
  template <class S>
  STATEMIX_DEVICE float entering(const Scan<S>& scan, int n, int M, int i) const {
    if (scan.chunks > 1) return scan.carry[(state + n) * M + i];
    return scan.start == nullptr ? 0.0f : scan.start[(state + n) * M + i];
  }
};

}  // namespace statemix
