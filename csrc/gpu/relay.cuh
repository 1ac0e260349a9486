// The state, or the adjoint, that enters each chunk: from chunk to chunk by the chunks' maps, one lane a number of a block.
#pragma once
#include "scan.cuh"

namespace statemix {

// backward: from the last chunk to the first, by the transposed maps. S and norm are those of every kernel, and not used.
template <class S, int order, Normalization norm, bool has_reset, bool backward>
struct Relay {
  using Arguments = Scan<S>;
  static constexpr int M = filled_order(order), kThreads = 128, kBlocks = kThreads / M, kResident = 1;
  struct Shared {};

  struct Map {
    float row[M], offset;
    bool cut;
  };

  static STATEMIX_DEVICE void run(const Scan<S>& scan, Shared&) {
    const int b = blockIdx.x / scan.programs, i = threadIdx.x % M;
    const int block = blockIdx.x % scan.programs * kBlocks + threadIdx.x / M;
    const bool inside = block < scan.blocks;
    const int n = inside ? block : scan.blocks - 1;
    const auto load = [&](Map& map, int c) {
      const int64 own = ((int64)b * scan.chunks + c) * scan.blocks + n;
      const float* from = scan.maps + own * M * M;
      if constexpr (backward) {
#pragma unroll
        for (int j = 0; j < M; ++j) map.row[j] = from[j * M + i];
      } else {
        load_numbers<M>(from + i * M, map.row);
      }
      map.offset = scan.offsets[own * M + i];
      map.cut = has_reset && scan.cuts[(int64)b * scan.chunks + c];
    };

    const int last = scan.chunks - 1, direction = backward ? -1 : 1;
    int c = backward ? last : 0;
    float x = scan.start == nullptr || !is_gate<order, M>(i) ? 0.0f : scan.start[((int64)b * scan.blocks + n) * M + i];
    Map map;
    load(map, c);
    for (int step = 0; step <= last; ++step, c += direction) {
      if (inside) scan.carry[(((int64)b * scan.chunks + c) * scan.blocks + n) * M + i] = x;
      Map next;
      if (step < last) load(next, c + direction);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < M; ++j) sum = fmaf(map.row[j], __shfl_sync(kAll, x, threadIdx.x % 32 / M * M + j), sum);
      x = map.cut ? map.offset : sum + map.offset;
      map = next;
    }
  }
};

}  // namespace statemix
