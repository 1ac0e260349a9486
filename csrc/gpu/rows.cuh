// Block scans of order 5 to 16: a lane has 8 transition gates of one row, so a block of order 8 has 8 lanes, one of 16 has 32.
//
// A warp walks its blocks through time by itself. Forward, a lane sums its part of a row and the lanes of a row add up; the new
// state goes to all lanes of the block through shared memory. Backward, with the adjoint s_t = dL/dh_t + r_t, the lane of row i
// makes s_t[i] p_t[i,j] for its j, and r_{t-1}[j] = sum_i s_t[i] p_t[i,j] is added up over the lanes by halves: in each
// exchange a lane keeps half of its columns and sends the others, until every lane has one.
#pragma once
#include "scan.cuh"
#include "staged.cuh"

namespace statemix {

constexpr int E = 8;  // gates of a lane

// How a warp shares out a time step, and where the step lies in shared memory: the gates and `arrays` arrays of a number a row.
template <class S, int order, int arrays>
struct Rows {
  static constexpr int M = order <= 8 ? 8 : 16;
  static constexpr int K = M / E;                        // lanes of a row
  static constexpr int kLanes = M * K;                   // of a block
  static constexpr int kBlocks = 32 / kLanes;            // of a warp
  static constexpr int kRows = kBlocks * M;              // of a warp
  static constexpr int kSmall = kRows * sizeof(S) / 16;  // of 16 bytes, of each array
  static_assert(arrays * kSmall <= 32, "a lane copies one piece of the arrays");

  struct __align__(16) Step {
    Staged<S, E> gates;
    S of[arrays][kRows];
  };

  int lane, k, i, q;    // of the warp; part of a row; row of a block; block of the warp
  int first, n, last;   // the warp's first block; the lane's own, or the last there is
  bool inside, writes;  // whether there is such a block; and whether it falls to this lane to write what a row has one of
  bool is_row;          // or there to fill up the order
  int row, column;      // of the warp's rows: the lane's own, and the first whose state its gates take in

  STATEMIX_DEVICE Rows(int warp, int blocks) {
    lane = threadIdx.x % 32;
    k = lane % K, i = lane / K % M, q = lane / kLanes;
    first = warp * kBlocks;
    inside = first + q < blocks;
    n = inside ? first + q : blocks - 1;
    is_row = is_gate<order, M>(i);
    writes = inside && k == 0;
    row = q * M + i, column = q * M + k * E;
  }

  // Whether the lane's j-th gate is there, or fills up.
  STATEMIX_DEVICE bool is_here(int j) const { return is_row && is_gate<order, M>(k * E + j); }

  // The lane's row of weights, from its raw gates; one that fills up is zero.
  template <Normalization norm, bool backward>
  STATEMIX_DEVICE void weigh_row(Row<norm, E, backward>& weights, const float (&z)[E], float z_in) const {
    weigh<norm, order, K>(weights, z, z_in, k * E);
    if (is_row) return;
#pragma unroll
    for (int j = 0; j < E; ++j) weights.p[j] = 0.0f;
    weights.in = weights.inverse = 0.0f;
  }

  // An array's number of the lane's row, zero where the row fills up.
  STATEMIX_DEVICE float number(const Step& step, int array) const { return is_row ? widen(step.of[array][row]) : 0.0f; }

  // sum_i x_i[j], where x_i are the E columns of the lane of row i, for the column j = i of this lane.
  STATEMIX_DEVICE float sum_of_rows(float (&x)[E]) const {
#pragma unroll
    for (int half = E / 2; half >= 1; half /= 2) {
      const bool upper = i & half;
#pragma unroll
      for (int j = 0; j < half; ++j) {
        const float sent = upper ? x[j] : x[j + half], kept = upper ? x[j + half] : x[j];
        x[j] = kept + __shfl_xor_sync(kAll, sent, half * K);
      }
    }
    float total = x[0];  // of column k E + i % E, over the rows of this half of the block
    if constexpr (K > 1) {
      total += __shfl_xor_sync(kAll, total, E * K);
      total = __shfl_sync(kAll, total, i % E * K + i / E);
    }
    return total;
  }

  // Writes E gates of every lane so that neighbours write side by side; `at` is where the lane's own belong.
  STATEMIX_DEVICE void store_gates(S* at, const float (&x)[E]) const {
    if constexpr (E * sizeof(S) == 16) {
      if (inside) store_numbers<E>(at, x);
    } else {
      const bool odd = lane % 2;  // two lanes share out their four pieces: the even lane writes the first of either
      float low[4], high[4];      // of the half that this lane writes for the even lane, and for the odd one
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float own = odd ? x[4 + j] : x[j], other = __shfl_xor_sync(kAll, odd ? x[j] : x[4 + j], 1);
        low[j] = odd ? other : own;
        high[j] = odd ? own : other;
      }
      S* half = at - (odd ? E : 0) + (odd ? 4 : 0);
      if (inside) {
        store_numbers<4>(half, low);
        store_numbers<4>(half + E, high);
      }
    }
  }
};

// Which steps of a group start new sequences, as bits. The bytes are asked for a group ahead: `next` gives those of the group
// that begins at step `at` of the walk, and asks for the group after it.
template <bool has_reset, int group>
struct RowResets {
  const uint8* from;  // of this lane's step in the first group
  int direction, steps, lane;
  uint8 ahead = 0;

  STATEMIX_DEVICE RowResets(const uint8* sequence, int first, int direction, int steps)
      : from(sequence), direction(direction), steps(steps), lane(threadIdx.x % 32) {
    if constexpr (has_reset) {
      from = sequence + first + direction * lane;
      ask(0);
    }
  }
  STATEMIX_DEVICE void ask(int at) {
    ahead = 0;
    if (lane < group && at + lane < steps) ahead = from[direction * at];
  }
  STATEMIX_DEVICE uint32 next(int at) {
    if constexpr (!has_reset) return 0;
    const uint32 bits = __ballot_sync(kAll, ahead != 0);
    ask(at + group);
    return bits;
  }
};

struct Plain {
  static constexpr bool kChecked = false;
};
struct Checked {
  static constexpr bool kChecked = true;
};

// Walks `steps` steps of a warp in groups, with the inputs of the next groups on their way to a ring of `slots` groups in shared
// memory, and the next group's weights made between the steps of the present one, so that both hide behind the walk:
//   bring(slot, at)          begins to copy the group that begins at step `at`, nothing from `steps` on
//   fetch(slot)              takes from a slot what is wanted before the first step of the group before
//   prepare(l, slot, at, c)  makes ready step `at`, the l-th of its group
//   begin(at)                before the first step of a group
//   step(l)                  walks the l-th step of the group
// A branch within a group would keep the compiler from interleaving its steps; so the last groups, where steps may be missing
// and c is Checked, are a second copy of the loop. What is prepared for the last `special` steps is always Checked.
template <int group, int slots, int special = 0, class Bring, class Fetch, class Prepare, class Begin, class Step>
STATEMIX_DEVICE void walk_rows(int steps, Bring bring, Fetch fetch, Prepare prepare, Begin begin, Step step) {
#pragma unroll
  for (int s = 0; s < slots; ++s) {
    bring(s, s * group);
    commit();
  }
  wait<slots - 1>();
  __syncwarp();
  fetch(0);
#pragma unroll
  for (int l = 0; l < group; ++l) prepare(l, 0, l, Checked{});

  int c = 0;
  const auto walk_group = [&](auto checked) {
    wait<slots - 2>();
    __syncwarp();
    bring(c % slots, (c + slots) * group);
    commit();
    begin(c * group);
    fetch((c + 1) % slots);
#pragma unroll
    for (int l = 0; l < group; ++l) {
      const int at = c * group + l;
      if (!checked.kChecked || at < steps) step(l);
      prepare(l, (c + 1) % slots, at + group, checked);
    }
  };
  const int plain = special ? (steps - special) / group - 1 : steps / group;
  for (; c < plain; ++c) walk_group(Plain{});
  for (; c * group < steps; ++c) walk_group(Checked{});
}

// The copies of a warp's steps to shared memory: the gates, and one piece of the arrays a lane.
template <class S, int order, int arrays>
struct RowCopies {
  using Layout = Rows<S, order, arrays>;
  static constexpr int kSmall = Layout::kSmall, M = Layout::M;
  const S *gates, *small;
  int64 gates_step, small_step;   // from one step of the walk to the next
  int steps, lanes, small_steps;  // steps that are there; lanes that have gates

  // Of `steps` steps from t on, or back. The last array is read up to `last_steps`.
  STATEMIX_DEVICE RowCopies(const Layout& rows, const Array<const S>& all_gates, const Array<const S> (&of)[arrays], int blocks,
                            int b, int t, int direction, int steps, int last_steps)
      : gates(all_gates(b, t) + (int64)rows.first * M * M), small(nullptr), gates_step(direction * all_gates.time), small_step(0),
        steps(steps), lanes((blocks - rows.first) * Layout::kLanes), small_steps(0) {
    const int array = rows.lane / kSmall, from = rows.first * M + rows.lane % kSmall * (16 / (int)sizeof(S));
#pragma unroll
    for (int a = 0; a < arrays; ++a)
      if (a == array) {
        small = of[a](b, t) + from;
        small_step = direction * of[a].time;
        small_steps = from >= blocks * M ? 0 : a == arrays - 1 ? last_steps : steps;
      }
  }
  template <int group>
  STATEMIX_DEVICE void bring(typename Layout::Step (&to)[group], int at, int lane) {
#pragma unroll
    for (int l = 0; l < group; ++l) {
      to[l].gates.bring(gates + l * gates_step, lane, at + l < steps ? lanes : 0);
      if (lane < arrays * kSmall) copy<16>((char*)to[l].of + 16 * lane, small + l * small_step, at + l < small_steps);
    }
    gates += group * gates_step;
    small += group * small_step;
  }
};

// States, with columns = 1; or, with order + 1, the columns of a chunk's map: those of the identity, and then zero.
template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps, int columns>
struct RowsWalk {
  static constexpr int kArrays = 2;
  using Layout = Rows<S, order, kArrays>;
  using Arguments = Scan<S>;
  static constexpr int M = Layout::M, K = Layout::K, kThreads = 32 * warps, kBlocks = warps * Layout::kBlocks, kResident = 1;
  static constexpr bool is_map = columns > 1;
  static_assert(group % 2 == 0, "a state goes from one of two places to the other, and back by the end of a group");

  struct Shared {
    typename Layout::Step ring[warps][slots][group];
    __align__(16) float states[warps][2][columns][Layout::kRows];
  };

  static STATEMIX_DEVICE void run(const Scan<S>& scan, Shared& shared) {
    const Place place(scan);
    const int warp = threadIdx.x / 32;
    const Layout lanes(place.program * warps + warp, scan.blocks);
    auto& ring = shared.ring[warp];
    auto& states = shared.states[warp];
    const Array<const S> arrays[] = {scan.input_gates, scan.values};
    RowCopies<S, order, kArrays> copies(lanes, scan.gates, arrays, scan.blocks, place.batch, place.first, 1, place.steps,
                                        place.steps);
    RowResets<has_reset, group> resets(scan.reset + (int64)place.batch * scan.length, place.first, 1, place.steps);

    float state[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      if constexpr (is_map)
        state[c] = lanes.i == c && c < order ? 1.0f : 0.0f;
      else
        state[c] = lanes.is_row ? place.entering(scan, lanes.n, M, lanes.i) : 0.0f;
      if (lanes.k == 0) states[1][c][lanes.row] = state[c];
    }
    S* written = is_map ? nullptr : scan.new_states(place.batch, place.first) + (int64)lanes.n * M + lanes.i;
    Row<norm, E, false> weights[group];
    float entering[group], gates[group][E], input_gates[group], values[group];
    uint32 cuts = 0, any_cut = 0;

    walk_rows<group, slots>(
        place.steps, [&](int slot, int at) { copies.bring(ring[slot], at, lanes.lane); },
        [&](int slot) {  // now, because nothing is read ahead of the __syncwarp of a step
#pragma unroll
          for (int l = 0; l < group; ++l) {
            const auto& step = ring[slot][l];
            step.gates.take(lanes.lane, gates[l]);
            input_gates[l] = lanes.number(step, 0);
            values[l] = lanes.number(step, 1);
          }
        },
        [&](int l, int, int, auto) {
          lanes.weigh_row(weights[l], gates[l], input_gates[l]);
          entering[l] = weights[l].in * values[l] * weights[l].scale();
        },
        [&](int at) { any_cut |= cuts = resets.next(at); },
        [&](int l) {
#pragma unroll
          for (int c = 0; c < columns; ++c) {
            const float* from = &states[(l + 1) % 2][c][lanes.column];
            float h[E], sum[2] = {};
            load_numbers<E>(from, h);
#pragma unroll
            for (int j = 0; j < E; ++j) {
              if (has_reset && cuts >> l & 1) h[j] = 0.0f;
              sum[j % 2] = fmaf(weights[l].p[j], h[j], sum[j % 2]);
            }
            const float all = sum_of_lanes<K>(sum[0] + sum[1]);
            state[c] = c == columns - 1 ? fmaf(all, weights[l].scale(), entering[l]) : all * weights[l].scale();
            if (lanes.k == 0) states[l % 2][c][lanes.row] = state[c];
          }
          __syncwarp();
          if constexpr (!is_map) {
            if (lanes.writes) narrow(state[0], *written);
            written += scan.new_states.time;
          }
        });

    if constexpr (is_map) {
      if (lanes.writes) {
        float* map = scan.maps + ((place.state + lanes.n) * M + lanes.i) * M;
#pragma unroll
        for (int c = 0; c < M; ++c) map[c] = c < order ? state[c < order ? c : 0] : 0.0f;
        scan.offsets[(place.state + lanes.n) * M + lanes.i] = state[columns - 1];
      }
      if (has_reset && place.program == 0 && threadIdx.x == 0)
        scan.cuts[(int64)place.batch * scan.chunks + place.chunk] = any_cut != 0;
    } else if (lanes.writes && place.chunk == scan.chunks - 1) {
      scan.end[((int64)place.batch * scan.blocks + lanes.n) * M + lanes.i] = state[0];
    }
  }
};

template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps>
using RowsForward = RowsWalk<S, order, norm, has_reset, group, slots, warps, 1>;
template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps>
using RowsMap = RowsWalk<S, order, norm, has_reset, group, slots, warps, order + 1>;

// The way back, with all gradients; or, without, what a chunk alone hands back to the state that enters it.
template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps, bool gradients>
struct RowsReturn {
  static constexpr int kArrays = gradients ? 4 : 2;
  using Layout = Rows<S, order, kArrays>;
  using Arguments = Scan<S>;
  static constexpr int M = Layout::M, K = Layout::K, kThreads = 32 * warps, kBlocks = warps * Layout::kBlocks, kResident = 1;

  struct Shared {
    typename Layout::Step ring[warps][slots][group];
  };
  struct Step {
    Row<norm, E, gradients> weights;
    float grad_state;
    float value, h, entering[gradients ? E : 1];  // the state after the step, of the lane's row; and before, of its columns
  };

  static STATEMIX_DEVICE void run(const Scan<S>& scan, Shared& shared) {
    const Place place(scan);
    const int warp = threadIdx.x / 32, b = place.batch, newest = place.first + place.steps - 1;
    const Layout lanes(place.program * warps + warp, scan.blocks);
    auto& ring = shared.ring[warp];
    RowCopies<S, order, kArrays> copies = [&] {
      const auto copies_of = [&](const auto&... array) {
        const Array<const S> arrays[] = {array...};
        return RowCopies<S, order, kArrays>(lanes, scan.gates, arrays, scan.blocks, b, newest, -1, place.steps,
                                            gradients && place.first == 0 ? place.steps - 1 : place.steps);
      };
      if constexpr (gradients) {
        const Array<const S> before = {scan.states.at - scan.states.time, scan.states.batch, scan.states.time};
        return copies_of(scan.input_gates, scan.grad_states, scan.values, before);
      } else {
        return copies_of(scan.input_gates, scan.grad_states);
      }
    }();
    RowResets<has_reset, group> resets(scan.reset + (int64)b * scan.length, newest, -1, place.steps);
    const int64 own = ((int64)b * scan.blocks + lanes.n) * M;

    float handed = gradients && lanes.is_row ? place.entering(scan, lanes.n, M, lanes.i) : 0.0f;
    S *grad_gates, *grad_input_gate, *grad_value;
    if constexpr (gradients) {
      const int64 number = (int64)lanes.n * M + lanes.i;
      grad_gates = scan.grad_gates(b, newest) + number * M + lanes.k * E;
      grad_input_gate = scan.grad_input_gates(b, newest) + number;
      grad_value = scan.grad_values(b, newest) + number;
    }
    Step steps[group];
    uint32 cuts = 0, next_cuts = resets.next(0);

    walk_rows<group, slots, gradients>(
        place.steps, [&](int slot, int at) { copies.bring(ring[slot], at, lanes.lane); }, [&](int) {},
        [&](int l, int slot, int at, auto checked) {
          const auto& from = ring[slot][l];
          Step& step = steps[l];
          float gates[E];
          from.gates.take(lanes.lane, gates);
          lanes.weigh_row(step.weights, gates, lanes.number(from, 0));
          step.grad_state = lanes.number(from, 1);
          if constexpr (gradients) {
            step.value = lanes.number(from, 2);
            load_numbers<E>(&from.of[3][lanes.column], step.entering);
            if (checked.kChecked && place.first == 0 && at == place.steps - 1)
              load_numbers<E>(scan.initial + own + lanes.k * E, step.entering);
            // Not the state in memory: u - h would be what rounding left where a weight is near 1 and u near h.
            float sum = 0;
#pragma unroll
            for (int j = 0; j < E; ++j) {
              if (!is_gate<order, M>(lanes.k * E + j) || (has_reset && next_cuts >> l & 1)) step.entering[j] = 0.0f;
              sum = fmaf(step.weights.p[j], step.entering[j], sum);
            }
            step.h = fmaf(step.weights.in, step.value, sum_of_lanes<K>(sum)) * step.weights.scale();
          }
        },
        [&](int at) { cuts = next_cuts, next_cuts = resets.next(at + group); },
        [&](int l) {
          const Step& step = steps[l];
          const bool cut = has_reset && cuts >> l & 1;
          const float s = (step.grad_state + handed) * step.weights.scale();
          float back[E];
#pragma unroll
          for (int j = 0; j < E; ++j) back[j] = step.weights.p[j] * s;
          if constexpr (gradients) {
            float grads[E], grad_in = step.weights.gradient_in(s, step.value, step.h), grad_v = step.weights.in * s;
#pragma unroll
            for (int j = 0; j < E; ++j) {
              grads[j] = step.weights.gradient(j, s, step.entering[j], step.h);
              if (!lanes.is_here(j)) grads[j] = 0.0f;
            }
            if (!lanes.is_row) grad_in = grad_v = 0.0f;
            lanes.store_gates(grad_gates, grads);
            if (lanes.writes) {
              narrow(grad_in, *grad_input_gate);
              narrow(grad_v, *grad_value);
            }
            grad_gates -= scan.grad_gates.time;
            grad_input_gate -= scan.grad_input_gates.time;
            grad_value -= scan.grad_values.time;
          }
          handed = lanes.sum_of_rows(back);
          if (cut || !lanes.is_row) handed = 0.0f;
        });

    if (!lanes.writes) return;
    if constexpr (!gradients)
      scan.offsets[(place.state + lanes.n) * M + lanes.i] = handed;
    else if (place.chunk == 0)
      scan.end[own + lanes.i] = handed;
  }
};

template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps>
using RowsBackward = RowsReturn<S, order, norm, has_reset, group, slots, warps, true>;
template <class S, int order, Normalization norm, bool has_reset, int group, int slots, int warps>
using RowsAdjoint = RowsReturn<S, order, norm, has_reset, group, slots, warps, false>;

}  // namespace statemix
