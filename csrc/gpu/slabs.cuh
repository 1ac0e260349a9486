// The block scan of small blocks, M 1 to 4, in slabs of time.
//
// A lane has all of U neighbouring blocks, so no number ever goes from lane to lane. A team is G lanes, a warp or a part of
// one. A slab is so many steps in a row that each team of a program takes L of them, for the same G U blocks, and
//   1. makes the weights of its steps, and their map: what they make of any state that enters them;
//   2. leaves the map where the other teams see it, and sends what enters the slab through those before its own;
//   3. walks its steps from there, with the weights still in registers.
// So every input is read once, and one sequence of few blocks keeps W warps busy. Smaller teams make smaller programs, which
// are shared out more evenly among the multiprocessors of a card.
//
// The backward is the same in reversed time. With r_t, what later steps hand back to h_t, and s_t = dL/dh_t + r_t,
//   r_{t-1} = p_t^T s_t; the gradients are those of gates.cuh.
// Positions are counted in the order of the walk: the backward's position 0 is the last step of its chunk.
//
// A reset forgets by selection: a product with zero would let an infinity through.
#pragma once
#include "scan.cuh"
#include "staged.cuh"

namespace statemix {

// The kernels; map and adjoint are those that come before the others where time is cut into chunks, see scan.cuh.
enum class Pass { forward, map, backward, adjoint };

// What a team reads for its L steps of a slab; given: values, or in the backward dL/dh.
template <class Gates, class Rows, int L, bool walks_back>
struct SlabInputs {
  Gates gates[L];
  Rows input_gates[L], given[L];
};
template <class Gates, class Rows, int L>
struct SlabInputs<Gates, Rows, L, true> : SlabInputs<Gates, Rows, L, false> {
  Rows values[L], states[L];  // the states that entered
};

// M: order. G: lanes of a team, 32, 16 or 8. U: blocks of a lane, 1 unless M is 1. W: warps. L: steps of a team in a slab.
// D: slabs on their way from memory. ragged: N is no multiple of U.
template <Pass pass, class S, int M, Normalization norm, bool has_reset, int G, int U, int W, int L, int D, bool ragged>
struct Slabs {
  static constexpr bool kBack = pass == Pass::backward || pass == Pass::adjoint;
  static constexpr bool kWalks = pass == Pass::forward || pass == Pass::backward;
  static constexpr int P = filled_order(M);                // the place of a component in memory
  static constexpr int kRows = U * P, kGates = U * P * P;  // numbers of a lane in a step
  static constexpr int kMap = U * M * (M + 1) + (has_reset ? 1 : 0);
  static constexpr int kThreads = 32 * W, kTeams = kThreads / G, kBlocks = G * U;

  using Arguments = Scan<S>;
  using State = float[U][M];
  using Gates = Staged<S, kGates, G>;
  using Rows = Staged<S, kRows, G>;
  using Inputs = SlabInputs<Gates, Rows, L, pass == Pass::backward>;
  using StagedMap = float[kMap | 1][G];  // odd, so that the teams of a warp do not meet on the same banks

  struct Shared {
    Inputs ring[D][kTeams];
    StagedMap maps[2][kTeams];
    float carry[2][U][M][G];
  };

  // As many programs as a multiprocessor has room for, of 228 KB, where each keeps 1 KB more, and of 64 K registers.
  static constexpr int kRegisters = (M > 2 ? 160 : 80) + (kBack ? 32 : 0);  // enough for a lane: fewer are spilled
  static constexpr int kByMemory = 228 * 1024 / (sizeof(Shared) + 1024), kByRegisters = 65536 / (kThreads * kRegisters);
  static constexpr int kLess = kByMemory < kByRegisters ? kByMemory : kByRegisters, kResident = kLess < 1 ? 1 : kLess;

  // given: what a step adds to the state, or in the backward dL/dh, which it adds before it mixes.
  struct Step {
    float weight[U][M][M];
    State input_gate, given;
  };
  // What steps make of a state h that enters them: column[M] + sum_j h[j] column[j]; column[M] alone if they forget it.
  struct Map {
    float column[M + 1][U][M];
    bool forgets;
  };

  const Arguments& scan;
  Shared& shared;
  const Place place;
  const int lane, team, first_block, block, lanes, slabs;
  uint32 resets = 0, next_resets = 0;  // bit l of this slab's, at the team's position l; of the next, at the lane's

  static STATEMIX_DEVICE void run(const Arguments& scan, Shared& shared) { Slabs(scan, shared).run(); }

  // For component i of block u of the lane, all of them.
  template <class Function>
  static STATEMIX_DEVICE void each(Function function) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < M; ++i) function(u, i);
  }

  STATEMIX_DEVICE Slabs(const Arguments& scan, Shared& shared)
      : scan(scan), shared(shared), place(scan), lane(threadIdx.x % G), team(threadIdx.x / G), first_block(place.program * kBlocks),
        block(first_block + lane * U), lanes((scan.blocks - first_block + U - 1) / U),
        slabs((place.steps + kTeams * L - 1) / (kTeams * L)) {}

  STATEMIX_DEVICE void run() {
#pragma unroll 1
    for (int d = 0; d < D; ++d) bring(d);
    if constexpr (has_reset) next_resets = resets_of(0);
    if constexpr (kWalks) {
      if (team == 0) enter_chunk();
      for (int c = 0; c < slabs - 1; ++c) walk_slab<false>(c);
      walk_slab<true>(slabs - 1);
    } else {
      map_chunk();
    }
  }

  // The team's first position in slab c. To make a map, each team goes through a part of the chunk by itself.
  STATEMIX_DEVICE int position(int c) const { return L * (kWalks ? c * kTeams + team : team * slabs + c); }
  STATEMIX_DEVICE int time(int position) const { return place.first + (kBack ? place.steps - 1 - position : position); }
  // Where an array has the program's blocks at the team's positions of a slab.
  template <class Number>
  struct Steps {
    Number* first;
    int64 further;
    STATEMIX_DEVICE Number* operator[](int l) const { return first + l * further; }
  };
  template <class Number>
  STATEMIX_DEVICE Steps<Number> steps_of(const Array<Number>& array, int c, int numbers_of_block) const {
    Number* first = array(place.batch, time(position(c))) + (int64)first_block * numbers_of_block;
    return {first, kBack ? -array.time : array.time};
  }

  // Begins to bring the inputs of slab c; `careful` where steps may be missing, or no state precedes one.
  template <bool careful>
  STATEMIX_DEVICE void bring_steps(int c) {
    Inputs& in = shared.ring[c % D][team];
    const Steps<const S> gates = steps_of(scan.gates, c, P * P), input_gates = steps_of(scan.input_gates, c, P);
    const Steps<const S> given = steps_of(kBack ? scan.grad_states : scan.values, c, P);
    const Steps<const S> values = steps_of(scan.values, c, P), states = steps_of(scan.states, c, P);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (careful && position(c) + l >= place.steps) break;
      in.gates[l].bring(gates[l], lane, lanes);
      in.input_gates[l].bring(input_gates[l], lane, lanes);
      in.given[l].bring(given[l], lane, lanes);
      if constexpr (pass == Pass::backward) {
        in.values[l].bring(values[l], lane, lanes);
        if (!careful || time(position(c) + l) > 0) in.states[l].bring(states[l + 1], lane, lanes);
      }
    }
  }
  STATEMIX_DEVICE void bring(int c) {
    if (c < slabs) {
      if (position(c) + L < place.steps)
        bring_steps<false>(c);
      else
        bring_steps<true>(c);
    }
    commit();
  }
  STATEMIX_DEVICE void wait_for_slab() const {
    wait<D - 1>();
    __syncwarp();
  }

  // Which of the team's positions in slab c have a reset: read a slab ahead, and one step a lane.
  STATEMIX_DEVICE uint32 resets_of(int c) const {
    const int q = position(c) + lane;
    const bool mine = lane < L && q < place.steps;
    return mine && scan.reset[(int64)place.batch * scan.length + time(q)];
  }
  STATEMIX_DEVICE void turn_resets(int c) {
    if constexpr (has_reset) {
      resets = __ballot_sync(kAll, next_resets) >> (threadIdx.x % 32 - lane);
      next_resets = c + 1 < slabs ? resets_of(c + 1) : 0;
    }
  }
  STATEMIX_DEVICE bool resets_at(int l) const { return has_reset && (resets >> l & 1); }

  template <bool slopes>
  using Weights = Row<norm, M, slopes>[U][M];

  template <bool slopes>
  STATEMIX_DEVICE void weigh_step(const Inputs& in, int l, Weights<slopes>& rows) const {
    float gates[kGates], input_gates[kRows];
    in.gates[l].take(lane, gates);
    in.input_gates[l].take(lane, input_gates);
    each([&](int u, int i) {
      float row[M];
#pragma unroll
      for (int j = 0; j < M; ++j) row[j] = gates[(u * P + i) * P + j];
      weigh<norm, M, 1>(rows[u][i], row, input_gates[u * P + i], 0);
    });
  }

  STATEMIX_DEVICE void make_step(const Inputs& in, int l, Step& step) const {
    Weights<false> rows;
    weigh_step<false>(in, l, rows);
    float given[kRows];
    in.given[l].take(lane, given);
    each([&](int u, int i) {
      const Row<norm, M, false>& row = rows[u][i];
#pragma unroll
      for (int j = 0; j < M; ++j) step.weight[u][i][j] = row.p[j] * row.scale();
      step.input_gate[u][i] = row.in * row.scale();
      step.given[u][i] = kBack ? given[u * P + i] : given[u * P + i] * step.input_gate[u][i];
    });
  }

  // What a step carries from component j to component i of the state, or in the backward of what is handed back.
  static STATEMIX_DEVICE float carried(const Step& step, int u, int i, int j) {
    return kBack ? step.weight[u][j][i] : step.weight[u][i][j];
  }
  // h <- p h + given, or in the backward p^T (h + given); `linear`: as if nothing were given.
  template <bool linear>
  static STATEMIX_DEVICE void advance(const Step& step, State& h) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float from[M], to[M];
#pragma unroll
      for (int i = 0; i < M; ++i) {
        from[i] = kBack && !linear ? h[u][i] + step.given[u][i] : h[u][i];
        to[i] = kBack || linear ? 0.0f : step.given[u][i];
      }
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int j = 0; j < M; ++j) to[i] = fmaf(carried(step, u, i, j), from[j], to[i]);
        h[u][i] = to[i];
      }
    }
  }
  static STATEMIX_DEVICE void clear(State& h) {
    each([&](int u, int i) { h[u][i] = 0.0f; });
  }

  STATEMIX_DEVICE void begin_map(const Step& step, Map& map) const {
    map.forgets = resets_at(0);
    each([&](int u, int i) {
#pragma unroll
      for (int j = 0; j < M; ++j) map.column[j][u][i] = carried(step, u, i, j);
      map.column[M][u][i] = kBack ? 0.0f : step.given[u][i];
    });
    if constexpr (kBack) {
      advance<false>(step, map.column[M]);
      if (resets_at(0)) clear(map.column[M]);
    }
  }
  STATEMIX_DEVICE void extend_map(const Step& step, int l, Map& map) const {
    if (!kBack && resets_at(l)) clear(map.column[M]);
#pragma unroll
    for (int j = 0; j < M; ++j) advance<true>(step, map.column[j]);
    advance<false>(step, map.column[M]);
    if (kBack && resets_at(l)) clear(map.column[M]);
    map.forgets |= resets_at(l);
  }

  STATEMIX_DEVICE void leave(const Map& map, StagedMap& at) const {
#pragma unroll
    for (int j = 0; j <= M; ++j) each([&](int u, int i) { at[(j * U + u) * M + i][lane] = map.column[j][u][i]; });
    if constexpr (has_reset) at[kMap - 1][lane] = map.forgets ? 1.0f : 0.0f;
  }
  STATEMIX_DEVICE bool forgets(const StagedMap& map) const { return map[kMap - 1][lane] != 0; }
  // h <- what the map makes of it; `linear`: as if nothing had been given.
  template <bool linear>
  STATEMIX_DEVICE void send(const StagedMap& map, State& h) const {
    State to;
    each([&](int u, int i) {
      const float offset = linear ? 0.0f : map[(M * U + u) * M + i][lane];
      to[u][i] = offset;
#pragma unroll
      for (int j = 0; j < M; ++j) to[u][i] = fmaf(map[(j * U + u) * M + i][lane], h[u][j], to[u][i]);
      if (has_reset && forgets(map)) to[u][i] = offset;
    });
    each([&](int u, int i) { h[u][i] = to[u][i]; });
  }

  // The state that enters the chunk, where every team finds it: it comes before the first of them.
  STATEMIX_DEVICE void enter_chunk() {
    State h;
    clear(h);
    each([&](int u, int i) {
      if (block + u < scan.blocks) h[u][i] = place.entering(scan, block + u, P, i);
    });
    put_carry(0, h);
  }
  STATEMIX_DEVICE void put_carry(int c, const State& h) {
    each([&](int u, int i) { shared.carry[c % 2][u][i][lane] = h[u][i]; });
  }
  // Float states of the lane's blocks, (.., N, P) from block 0 on.
  STATEMIX_DEVICE void store_state(float* at, const State& h) const {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < P; ++i)
        if (block + u < scan.blocks) at[(int64)(block + u) * P + i] = i < M ? h[u][i] : 0.0f;
  }
  STATEMIX_DEVICE float* end() const { return scan.end + (int64)place.batch * scan.blocks * P; }

  // Numbers of a lane in a step, kRows or kGates, to where the first lane's are.
  template <int count>
  STATEMIX_DEVICE void store(S* to, const float (&x)[count]) const {
    constexpr int kOfBlock = count / U;
    S* mine = to + lane * count;
    if (ragged ? block + U <= scan.blocks : block < scan.blocks) {
      store_numbers<count>(mine, x);
    } else if constexpr (ragged) {
#pragma unroll
      for (int u = 0; u < U - 1; ++u)
        if (block + u < scan.blocks) store_numbers<kOfBlock>(mine + u * kOfBlock, x + u * kOfBlock);
    }
  }

  // last: the last slab of the chunk, which may end before its last position.
  template <bool last>
  STATEMIX_DEVICE void walk_slab(int c) {
    Inputs& in = shared.ring[c % D][team];
    turn_resets(c);
    wait_for_slab();
    Step step[L];
#pragma unroll
    for (int l = 0; l < L; ++l) make_step(in, l, step[l]);
    if constexpr (!kBack && !last) {
      __syncwarp();  // all lanes have taken what the next copies overwrite
      bring(c + D);
    }
    Map map;
    begin_map(step[0], map);
#pragma unroll
    for (int l = 1; l < L; ++l) extend_map(step[l], l, map);
    leave(map, shared.maps[c % 2][team]);
    __syncthreads();

    State h;
    each([&](int u, int i) { h[u][i] = shared.carry[c % 2][u][i][lane]; });
    for (int before = 0; before < team; ++before) send<false>(shared.maps[c % 2][before], h);

    if constexpr (kBack)
      walk_back<last>(c, in, step, h);
    else
      walk<last>(c, step, h);
    if constexpr (last) return;
    if constexpr (kBack) bring(c + D);  // over pieces that the same lane has written out or taken
    if (team == kTeams - 1) put_carry(c + 1, h);
  }

  template <bool last>
  STATEMIX_DEVICE void walk(int c, const Step (&step)[L], State& h) {
    const Steps<S> states = steps_of(scan.new_states, c, P);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const int q = position(c) + l;
      if (last && q >= place.steps) break;
      if (resets_at(l)) clear(h);
      advance<false>(step[l], h);
      float out[kRows] = {};
      each([&](int u, int i) { out[u * P + i] = h[u][i]; });
      store(states[l], out);
      if (last && time(q) == scan.length - 1) store_state(end(), h);
    }
  }

  // The rows of a step for its gradients. A weight of softmax is its own slope; others are weighed again, which takes
  // fewer registers than to keep what they need.
  STATEMIX_DEVICE void rows_of(const Inputs& in, int l, const Step& step, Weights<true>& rows) const {
    if constexpr (norm != Normalization::softmax) {
      weigh_step<true>(in, l, rows);
    } else {
      each([&](int u, int i) {
#pragma unroll
        for (int j = 0; j < M; ++j) rows[u][i].p[j] = step.weight[u][i][j];
        rows[u][i].in = step.input_gate[u][i];
        rows[u][i].inverse = 1.0f;
      });
    }
  }

  template <bool last>
  STATEMIX_DEVICE void walk_back(int c, Inputs& in, const Step (&step)[L], State& r) {
    const Steps<S> grad_gates_at = steps_of(scan.grad_gates, c, P * P);
    const Steps<S> grad_values_at = steps_of(scan.grad_values, c, P);
    const Steps<S> grad_input_gates_at = steps_of(scan.grad_input_gates, c, P);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const int q = position(c) + l;
      if (last && q >= place.steps) break;
      Weights<true> rows;
      rows_of(in, l, step[l], rows);
      float value[kRows], before[kRows];
      in.values[l].take(lane, value);
      in.states[l].take(lane, before);
      if (last && time(q) == 0) {
        const float* initial = scan.initial + ((int64)place.batch * scan.blocks + block) * P;
#pragma unroll
        for (int k = 0; k < kRows; ++k)
          if (block + k / P < scan.blocks) before[k] = initial[k];
      }
      float grad_gates[kGates] = {}, grad_input_gates[kRows] = {}, grad_values[kRows] = {};
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float entered[M], handed[M] = {};
#pragma unroll
        for (int j = 0; j < M; ++j) entered[j] = resets_at(l) ? 0.0f : before[u * P + j];
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const Row<norm, M, true>& row = rows[u][i];
          const int k = u * P + i;
          // the state that left, from the same rounded numbers: their rounding would drown u - h where a decay is slow
          float h = row.in * value[k];
#pragma unroll
          for (int j = 0; j < M; ++j) h = fmaf(row.p[j], entered[j], h);
          h *= row.scale();
          const float s = (step[l].given[u][i] + r[u][i]) * row.scale();
          grad_values[k] = s * row.in;
          grad_input_gates[k] = row.gradient_in(s, value[k], h);
#pragma unroll
          for (int j = 0; j < M; ++j) {
            grad_gates[k * P + j] = row.gradient(j, s, entered[j], h);
            handed[j] = fmaf(row.p[j], s, handed[j]);
          }
        }
#pragma unroll
        for (int j = 0; j < M; ++j) r[u][j] = handed[j];
      }
      if (resets_at(l)) clear(r);
      if constexpr (Gates::kPieces > 1)
        in.gates[l].put(lane, grad_gates);
      else
        store(grad_gates_at[l], grad_gates);
      store(grad_input_gates_at[l], grad_input_gates);
      store(grad_values_at[l], grad_values);
      if (last && time(q) == 0) store_state(end(), r);
    }
    if constexpr (Gates::kPieces > 1) {
      __syncwarp();
#pragma unroll
      for (int l = 0; l < L; ++l) {
        if (last && position(c) + l >= place.steps) break;
        in.gates[l].write_out(grad_gates_at[l], lane, lanes);
      }
    }
  }

  // Each team makes the map of its part of the chunk. Then columns of the chunk's map go through the parts.
  STATEMIX_DEVICE void map_chunk() {
    Map map;
    identity(map);
    for (int c = 0; c < slabs; ++c) {
      turn_resets(c);
      wait_for_slab();
      Step step[L];
#pragma unroll
      for (int l = 0; l < L; ++l) make_step(shared.ring[c % D][team], l, step[l]);
      __syncwarp();
      bring(c + D);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        if (position(c) + l >= place.steps) break;
        extend_map(step[l], l, map);
      }
    }
    leave(map, shared.maps[0][team]);
    __syncthreads();

    if (team == 0) {
      State offset;
      clear(offset);
      for (int part = 0; part < kTeams; ++part) send<false>(shared.maps[0][part], offset);
      store_state(scan.offsets + place.state * P, offset);
    }
    if constexpr (pass == Pass::map) {
      for (int j = team; j < P; j += kTeams) {
        State column;
        unit(j, column);
        for (int part = 0; part < kTeams; ++part) send<true>(shared.maps[0][part], column);
        store_column(scan.maps + place.state * P * P, j, column);
      }
      if constexpr (has_reset) {
        bool cut = false;
        for (int part = 0; part < kTeams; ++part) cut |= forgets(shared.maps[0][part]);
        if (place.program == 0 && threadIdx.x == 0) scan.cuts[place.batch * scan.chunks + place.chunk] = cut;
      }
    }
  }
  static STATEMIX_DEVICE void unit(int j, State& h) {
    each([&](int u, int i) { h[u][i] = i == j ? 1.0f : 0.0f; });
  }
  static STATEMIX_DEVICE void identity(Map& map) {
    map.forgets = false;
#pragma unroll
    for (int j = 0; j <= M; ++j) unit(j, map.column[j]);
  }
  // Column j of the matrices (.., N, P, P) of the lane's blocks.
  STATEMIX_DEVICE void store_column(float* at, int j, const State& h) const {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int i = 0; i < P; ++i)
        if (block + u < scan.blocks) at[((int64)(block + u) * P + i) * P + j] = i < M && j < M ? h[u][i] : 0.0f;
  }
};

template <class S, int M, Normalization norm, bool has_reset, int G, int U, int W, int L, int D, bool ragged>
using SlabsForward = Slabs<Pass::forward, S, M, norm, has_reset, G, U, W, L, D, ragged>;
template <class S, int M, Normalization norm, bool has_reset, int G, int U, int W, int L, int D, bool ragged>
using SlabsMap = Slabs<Pass::map, S, M, norm, has_reset, G, U, W, L, D, ragged>;
template <class S, int M, Normalization norm, bool has_reset, int G, int U, int W, int L, int D, bool ragged>
using SlabsBackward = Slabs<Pass::backward, S, M, norm, has_reset, G, U, W, L, D, ragged>;
template <class S, int M, Normalization norm, bool has_reset, int G, int U, int W, int L, int D, bool ragged>
using SlabsAdjoint = Slabs<Pass::adjoint, S, M, norm, has_reset, G, U, W, L, D, ragged>;

}  // namespace statemix
