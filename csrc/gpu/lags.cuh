// The companion and the observer scan, a lane for each step: K steps in a row of a channel, a group, lie on K lanes.
//
// A lane has all raw gates of its step, so that no weight takes an exchange between lanes, and the input gate, the
// value and the state are one number a lane. Only the recurrence goes from lane to lane. Below, p_{t,j} is the weight
// of lag j = 1..M, p_{t,0} the input gate's, g_t = dL/dh_t as it came, and s_t the same with later steps' share.
//
// Companion: h_t = sum_j p_{t,j} h_{t-j} + p_{t,0} v_t. A lane keeps the M values before its step. What comes from
// earlier groups is summed up by all lanes at once; then new values go to the lanes after theirs, one after the other.
// Backward:
//   s_t = g_t + sum_j p_{t+j,j} s_{t+j}
//   dL/dz_{t,j} = s_t f'(z_{t,j}) / S_t (h_{t-j} - sign(f(z_{t,j})) h_t),   dL/dv_t = s_t p_{t,0}
// as gates.cuh has it. h_t is summed up anew from the h_{t-j}: these may be rounded, and where decay is slow the
// difference would else be nothing but rounding. Step t hands p_{t,j} s_t to step t - j: to steps of its own group one
// after the other, to earlier groups all at once. `pending` is what has been handed to them so far.
//
// Observer: h_t[i] = p_{t,i+1} h_{t-1}[0] + h_{t-1}[i+1], and p_{t,0} v_t more in h_t[0]. The block goes from lane to
// lane. Backward: h_{t-1}[0] is in every component of h_t, h_{t-1}[i] in h_t[i-1] alone, so that
//   s_t[0] = g_t[0] + d_{t+1},   s_t[i] = g_t[i] + s_{t+1}[i-1],   d_t = sum_j p_{t,j} s_t[j-1],
// and this block, d_t first, goes back from lane to lane. dL/dp_{t,j} = s_t[j-1] h_{t-1}[0], dL/dp_{t,0} = s_t[0] v_t,
//   dL/dz_{t,j} = f'(z_{t,j}) / S_t (dL/dp_{t,j} - sign(f(z_{t,j})) mean_t),   dL/dv_t = s_t[0] p_{t,0}
//   mean_t = sum_j p_{t,j} dL/dp_{t,j} = d_t h_{t-1}[0] + p_{t,0} s_t[0] v_t
//
// A lag from before a reset is zero, and nothing is handed to it; both by selection.
#pragma once
#include "scan.cuh"

namespace statemix {

// The groups of a chunk, and where a lane is: its step in every group, and its channel. Lanes are in the order of
// memory: all channels of a step are neighbours.
template <int K>
struct LagsLane {
  static constexpr int kChannels = 32 / K;
  int index, step;
  int first, channels, block;       // the warp's first channel; how many are from it on; the lane's own, or the last
  bool inside;                      // whether the lane's own is there
  int batch, begin, steps, groups;  // of the chunk; group c begins at step `begin` + K c
  int64 state;                      // where the channel is in the states (B, N, M), in channels

  template <class S>
  STATEMIX_DEVICE LagsLane(const Scan<S>& scan, const Place& place)
      : index(threadIdx.x % 32), step(index / kChannels), first(place.program * kChannels), channels(scan.blocks - first),
        batch(place.batch), begin(place.first), steps(place.steps), groups((place.steps + K - 1) / K) {
    inside = index % kChannels < channels;
    block = inside ? first + index % kChannels : scan.blocks - 1;
    state = (int64)batch * scan.blocks + block;
  }
  // How many groups have that step.
  STATEMIX_DEVICE int groups_with(int of) const { return (steps - of + K - 1) / K; }
  // x of the same channel, `by` steps further on; the first step comes after the last.
  STATEMIX_DEVICE float further(float x, int by) const { return __shfl_sync(kAll, x, (index + by * kChannels) % 32); }
  // x of the same channel at that step of the group.
  STATEMIX_DEVICE float at_step(float x, int of) const { return __shfl_sync(kAll, x, of * kChannels + index % kChannels); }
};

// Numbers of an array that a lane moves in each group from `first` up to `end`: those of one step.
template <class Number>
struct LagsPiece {
  Number* at;
  int64 advance;  // from one group of the walk to the next
  int first, end;

  template <int K>
  STATEMIX_DEVICE LagsPiece(const Array<Number>& array, const LagsLane<K>& lane, int start, int direction, int step, int64 number,
                            bool there)
      : at(array(lane.batch, lane.begin + start * K + step) + number), advance(direction * K * array.time), first(0),
        end(there ? lane.groups_with(step) : 0) {}
  LagsPiece() = default;
  STATEMIX_DEVICE bool there(int c) const { return first <= c && c < end; }
  template <int bytes>
  STATEMIX_DEVICE void bring(void* to, int c) {
    copy<bytes>(to, at, there(c));
    at += advance;
  }
};

// `count` numbers of each lane, in shared memory. They come and go in pieces of up to 16 bytes, neighbouring lanes
// moving neighbouring pieces, whosever they are, and lie so that lanes that read together read from different banks.
template <class S, int count, int K>
struct LagsTile {
  static constexpr int kBytes = count * sizeof(S), kRun = 32 / K * kBytes;  // of a lane; of all channels of a step
  static constexpr int kPiece = kRun < 16 ? kRun : 16, kPieces = 32 * kBytes / kPiece, kTurns = (kPieces + 31) / 32;
  static constexpr int kPerLane = kBytes <= 16 ? 1 : kBytes / 16;
  static constexpr bool kOnePiece = kBytes <= 16;  // then a lane may as well write its own
  __align__(16) char bytes[32 * kBytes];

  static STATEMIX_DEVICE int place(int piece) {
    if constexpr (kOnePiece) return piece * kPiece;
    const int lane = piece / kPerLane;
    return 16 * (lane * kPerLane + (piece % kPerLane ^ lane / (8 / kPerLane) % kPerLane));
  }
  STATEMIX_DEVICE void get(int lane, float (&x)[count]) const {
    constexpr int kNumbers = count / kPerLane;
#pragma unroll
    for (int p = 0; p < kPerLane; ++p) {
      const int at = kOnePiece ? lane * kBytes : place(lane * kPerLane + p);
      load_numbers<kNumbers>((const S*)(bytes + at), x + p * kNumbers);
    }
  }

  // What a lane moves of an array.
  template <class Number>
  struct Pieces {
    LagsPiece<Number> of[kTurns];
    STATEMIX_DEVICE Pieces(const Array<Number>& array, const LagsLane<K>& lane, int start, int direction) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int byte = (32 * turn + lane.index) * kPiece, number = byte % kRun / (int)sizeof(S);
        of[turn] = LagsPiece<Number>(array, lane, start, direction, byte / kRun, (int64)lane.first * count + number,
                                     number < lane.channels * count);
      }
    }
    STATEMIX_DEVICE void bring(LagsTile& to, int c, int lane) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int piece = 32 * turn + lane;
        if (kPieces >= 32 || piece < kPieces) of[turn].template bring<kPiece>(to.bytes + place(piece), c);
      }
    }
  };
  // What a lane writes: its own numbers, or, where these are several pieces, those that lie side by side.
  struct Written : Pieces<S> {
    STATEMIX_DEVICE Written(const Array<S>& array, const LagsLane<K>& lane, int start, int direction)
        : Pieces<S>(array, lane, start, direction) {
      if constexpr (kOnePiece)
        this->of[0] = LagsPiece<S>(array, lane, start, direction, lane.step, (int64)lane.block * count, lane.inside);
    }
    // x: of the lane; tile: where several pieces change hands.
    STATEMIX_DEVICE void write(int c, int lane, const float (&x)[count], LagsTile* tile = nullptr) {
      if constexpr (kOnePiece) {
        if (this->of[0].there(c)) store_numbers<count>(this->of[0].at, x);
        this->of[0].at += this->of[0].advance;
      } else {
        constexpr int kNumbers = 16 / sizeof(S);
#pragma unroll
        for (int p = 0; p < kPerLane; ++p)
          store_numbers<kNumbers>((S*)(tile->bytes + place(lane * kPerLane + p)), x + p * kNumbers);
        __syncwarp();
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
          uint32 words[4];
          load_words<4>(tile->bytes + place(32 * turn + lane), words);
          if (this->of[turn].there(c)) store_words<4>(this->of[turn].at, words);
          this->of[turn].at += this->of[turn].advance;
        }
        __syncwarp();
      }
    }
  };
};

// A number of each lane, of several arrays. One copy brings them: a lane has one piece of one array.
template <class S, int K, int arrays>
struct LagsNumbers {
  using Tile = LagsTile<S, 1, K>;
  static constexpr int kPiece = Tile::kPiece, kPieces = Tile::kPieces;
  static_assert(arrays * kPieces <= 32, "a lane copies one piece");
  __align__(16) S of[arrays][32];

  struct Pieces {
    LagsPiece<const S> mine;
    // Of the last array comes what was `back` steps before, unless that is before step 0.
    STATEMIX_DEVICE Pieces(const Array<const S>* array, const LagsLane<K>& lane, int start, int direction, int back) {
      const int byte = lane.index % kPieces * kPiece, number = byte % Tile::kRun / (int)sizeof(S);
      const int step = byte / Tile::kRun, of = lane.index / kPieces;
#pragma unroll
      for (int a = 0; a < arrays; ++a)
        if (of == a || a == 0) mine = {array[a], lane, start, direction, step, lane.first + number, number < lane.channels};
      if (back > 0 && of == arrays - 1) {
        mine.at -= back * array[arrays - 1].time;
        mine.first = max(0, (back - lane.begin - step + K - 1) / K);
        mine.end = number < lane.channels ? min(lane.groups, lane.groups_with(step - back)) : 0;
      }
    }
    STATEMIX_DEVICE void bring(LagsNumbers& to, int c, int lane) {
      if (arrays * kPieces < 32 && lane >= arrays * kPieces) return;
      mine.template bring<kPiece>((char*)to.of + lane * kPiece, c);
    }
  };
};

// Which lags reach back over a reset. Bit i of `flags`: the state is zero before step K - 1 - i of the group.
template <int K, bool has_reset>
struct LagsResets {
  uint32 flags = 0, next = 0;
  // Begins to read the flags of the group from `first` on, of a sequence of `length` steps.
  STATEMIX_DEVICE void ask(const uint8* reset, int first, int length) {
    if constexpr (has_reset) {
      const int t = first + K - 1 - int(threadIdx.x % 32);
      next = 0 <= t && t < length ? reset[t] : 0;
    }
  }
  STATEMIX_DEVICE void take() {
    if constexpr (has_reset) flags = __ballot_sync(kAll, next != 0);
  }
  STATEMIX_DEVICE bool any() const { return has_reset && flags & ((1u << K) - 1); }  // in the group
  STATEMIX_DEVICE bool at(int step) const { return has_reset && flags >> (K - 1 - step) & 1; }
  // Whether what was `lag` steps before a step of the group still counts there; step K is the one after the group.
  STATEMIX_DEVICE bool counts(int step, int lag) const { return !has_reset || (flags << 1 >> (K - step) & ((1u << lag) - 1)) == 0; }
};

// The values of a companion before the steps of a group: of[r][q] is that of K q + r steps before the lane's own.
template <int order, int K>
struct LagsHistory {
  static constexpr int kDeep = (order + K - 1) / K;      // groups that lags reach back
  static constexpr int kKept = (order + 2 * K - 2) / K;  // and those of the state after a step, from the group after it
  float of[K][kKept + 1];

  STATEMIX_DEVICE float lag(int j) const { return of[j % K][j / K]; }
  template <class Value>  // value(lag)
  STATEMIX_DEVICE void fill(Value value) {
#pragma unroll
    for (int r = 0; r < K; ++r)
#pragma unroll
      for (int q = 0; q <= (r ? kDeep - 1 : kKept); ++q) of[r][q] = value(K * q + r);
  }
  // To the next group, after `h` of this one. Lags that lie within that group are not known yet.
  STATEMIX_DEVICE void advance(float h, const LagsLane<K>& lane) {
#pragma unroll
    for (int r = 1; r < K; ++r) {
      if (r > order) continue;
      const float come = lane.further(h, K - r);
#pragma unroll
      for (int q = kDeep - 1; q > 1; --q) of[r][q] = of[r][q - 1];
      if (kDeep > 1) of[r][1] = lane.step >= r ? come : of[r][0];
      of[r][0] = come;
    }
#pragma unroll
    for (int q = kKept; q > 1; --q) of[0][q] = of[0][q - 1];
    of[0][1] = h;
  }
  // To the group before. oldest: the lane's value kDeep groups before that one.
  STATEMIX_DEVICE void retreat(float oldest, const LagsLane<K>& lane) {
#pragma unroll
    for (int q = 0; q < kDeep; ++q) of[0][q] = of[0][q + 1];
    of[0][kDeep] = oldest;
#pragma unroll
    for (int r = 1; r < K; ++r) {
      if (r > order) continue;
#pragma unroll
      for (int q = 0; q < kDeep - 1; ++q) of[r][q] = of[r][q + 1];
      of[r][kDeep - 1] = lane.further(lane.step + r < K ? of[0][kDeep - 1] : oldest, K - r);
    }
  }
};

// The two scans: what they do with a group of weights. Forward goes from group to group and has the state after the
// lane's step; Backward goes the other way and has s.
template <Normalization norm, int order, bool has_reset, int K>
struct Companion {
  static constexpr int P = filled_order(order);
  using Lane = LagsLane<K>;
  using Resets = LagsResets<K, has_reset>;
  using History = LagsHistory<order, K>;
  static constexpr int kWidth = 1;  // numbers of a state in memory

  struct Forward {
    History history;
    float h;

    template <class Initial>  // initial(i): of the state before the first group
    STATEMIX_DEVICE void begin(const Lane& lane, Initial initial) {
      history.fill([&](int lag) {
        const int i = lag - lane.step - 1;
        return 0 <= i && i < order ? initial(i) : 0.0f;
      });
    }
    STATEMIX_DEVICE void walk(const Row<norm, P, false>& row, float v, const Resets& resets, const Lane& lane) {
      float sum[2] = {};
#pragma unroll
      for (int j = order; j > 0; --j) {  // the newest last: it is waited for
        const bool counts = (j >= K || lane.step < j) && resets.counts(lane.step, j);
        if (counts) sum[j % 2] = fmaf(row.p[j - 1], history.lag(j), sum[j % 2]);
      }
      h = fmaf(sum[0] + sum[1], row.scale(), row.in * row.scale() * v);
#pragma unroll
      for (int from = 0; from < K - 1; ++from) {  // the states of the group, in order, to the steps after them
        float p = row.p[0];
#pragma unroll
        for (int j = 2; j < K - from; ++j)
          if (j <= order && lane.step == from + j) p = row.p[j - 1];
        const float earlier = lane.at_step(h, from);
        const int lag = lane.step - from;
        if (0 < lag && lag <= order && resets.counts(lane.step, lag)) h = fmaf(p * row.scale(), earlier, h);
      }
      history.advance(h, lane);
    }
    STATEMIX_DEVICE void states(float (&x)[kWidth]) const { x[0] = h; }
    // The state after the step `last` of the group: its last M values. store(i, value)
    template <class Store>
    STATEMIX_DEVICE void leave(int last, const Resets& resets, const Lane& lane, Store store) const {
#pragma unroll
      for (int q = 1; q <= History::kKept; ++q) {
        const int i = last - lane.step + K * (q - 1);
        if (0 <= i && i < order) store(i, resets.counts(last + 1, i + 1) ? history.of[0][q] : 0.0f);
      }
      for (int i = order + lane.step; i < P; i += K) store(i, 0.0f);
    }
  };

  struct Backward {
    History history;
    float pending[History::kDeep + 1];  // what later groups hand to the lane's step, and to those K, 2 K, ... before it
    float s;

    static constexpr int kBack = K * History::kDeep;  // `take` wants the value of so many steps before the lane's own
    // earlier(steps): the value so many steps before the lane's own of the first group that is walked, or zero.
    template <class Earlier>
    STATEMIX_DEVICE void begin_earlier(Earlier earlier) {
      history.fill([&](int lag) { return earlier(lag - K); });
    }
    STATEMIX_DEVICE void take(float earlier, const Lane& lane) { history.retreat(earlier, lane); }
    // carry(i): what enters the state after the step `last` of the first group that is walked.
    template <class Carry>
    STATEMIX_DEVICE void begin(int last, const Resets& resets, const Lane& lane, float (&)[1], Carry carry) {
#pragma unroll
      for (int q = 0; q <= History::kDeep; ++q) {
        const int i = last - lane.step + K * q;
        pending[q] = 0 <= i && i < order && resets.counts(last + 1, i + 1) ? carry(i) : 0.0f;
      }
    }
    template <bool gradients>
    STATEMIX_DEVICE void walk(const Row<norm, P, gradients>& row, const float (&g)[1], const Resets& resets, const Lane& lane) {
      float near[K];  // near[lag]: the weight with which the lane's step enters the one so much later
#pragma unroll
      for (int lag = 1; lag < K; ++lag)
        if (lag <= order) near[lag] = lane.further(row.p[lag - 1] * row.scale(), lag);
      s = g[0] + pending[0];
#pragma unroll
      for (int from = K - 1; from > 0; --from) {
        const float later = lane.at_step(s, from);
        const int lag = from - lane.step;
        float p = near[1];
#pragma unroll
        for (int j = 2; j <= from; ++j)
          if (j <= order && lag == j) p = near[j];
        if (0 < lag && lag <= order && resets.counts(from, lag)) s = fmaf(p, later, s);
      }
      const float share = s * row.scale();
#pragma unroll
      for (int r = 0; r < K; ++r) {
        float come[History::kDeep + 1] = {};  // of lag K q + r
#pragma unroll
        for (int q = r ? 0 : 1; K * q + r <= order; ++q) {
          come[q] = resets.counts(lane.step, K * q + r) ? row.p[K * q + r - 1] * share : 0.0f;
          if (r) come[q] = lane.further(come[q], r);
        }
        const bool later = lane.step + r >= K;  // the lane that sent is of an earlier step: K less, and one group more
#pragma unroll
        for (int q = 1; q <= History::kDeep; ++q)
          if (K * (q - 1) + r <= order) pending[q] += later ? come[q - 1] : come[q];
      }
#pragma unroll
      for (int q = 0; q < History::kDeep; ++q) pending[q] = pending[q + 1];
      pending[History::kDeep] = 0;
    }
    STATEMIX_DEVICE void gradients(const Row<norm, P, true>& row, float v, const Resets& resets, const Lane& lane, float (&dz)[P],
                                   float& dz_in, float& dv) const {
      const float share = s * row.scale();
      float mean[2] = {row.in * v, 0}, u[order];
#pragma unroll
      for (int j = 1; j <= order; ++j) {
        u[j - 1] = resets.counts(lane.step, j) ? history.lag(j) : 0.0f;
        mean[j % 2] = fmaf(row.p[j - 1], u[j - 1], mean[j % 2]);
      }
      mean[0] = (mean[0] + mean[1]) * row.scale();
#pragma unroll
      for (int j = 0; j < P; ++j) dz[j] = j < order ? row.gradient(j, share, u[j < order ? j : 0], mean[0]) : 0.0f;
      dz_in = row.gradient_in(share, v, mean[0]);
      dv = row.in * share;
    }
    // What enters the state before the group. store(i, value)
    template <class Store>
    STATEMIX_DEVICE void leave(const Resets&, const Lane& lane, Store store) const {
#pragma unroll
      for (int q = 0; q < History::kDeep; ++q) {
        const int i = K - 1 - lane.step + K * q;
        if (i < order) store(i, pending[q]);
      }
      for (int i = order + lane.step; i < P; i += K) store(i, 0.0f);
    }
  };
};

template <Normalization norm, int order, bool has_reset, int K>
struct Observer {
  static constexpr int P = filled_order(order);
  using Lane = LagsLane<K>;
  using Resets = LagsResets<K, has_reset>;
  static constexpr int kWidth = P;

  struct Forward {
    float h[P];  // after the lane's step, the last one that was walked

    template <class Initial>
    STATEMIX_DEVICE void begin(const Lane&, Initial initial) {
#pragma unroll
      for (int i = 0; i < P; ++i) h[i] = i < order ? initial(i) : 0.0f;
    }
    STATEMIX_DEVICE void walk(const Row<norm, P, false>& row, float v, const Resets& resets, const Lane& lane) {
      const float entering = row.in * row.scale() * v;
#pragma unroll
      for (int to = 0; to < K; ++to) {
        const bool cut = resets.at(to);
        float come[order + 1];
#pragma unroll
        for (int i = 0; i < order; ++i) {
          come[i] = lane.at_step(h[i], (to + K - 1) % K);
          if (cut) come[i] = 0;
        }
        come[order] = 0;
        const float top = come[0] * row.scale();
        if (lane.step == to) {
#pragma unroll
          for (int i = 0; i < order; ++i) h[i] = fmaf(row.p[i], top, i ? come[i + 1] : come[i + 1] + entering);
        }
      }
    }
    STATEMIX_DEVICE void states(float (&x)[kWidth]) const {
#pragma unroll
      for (int i = 0; i < P; ++i) x[i] = h[i];
    }
    template <class Store>
    STATEMIX_DEVICE void leave(int last, const Resets&, const Lane& lane, Store store) const {
      if (lane.step != last) return;
#pragma unroll
      for (int i = 0; i < P; ++i) store(i, h[i]);
    }
  };

  struct Backward {
    float s[order], d;  // of the lane's step, the last one that was walked
    float y;            // h[0] before it
    bool cut;           // whether there is a reset at the first step of the group that was walked

    static constexpr int kBack = 1;
    template <class Earlier>
    STATEMIX_DEVICE void begin_earlier(Earlier) {}
    STATEMIX_DEVICE void take(float earlier, const Lane&) { y = earlier; }
    template <class Carry>
    STATEMIX_DEVICE void begin(int last, const Resets&, const Lane& lane, float (&g)[P], Carry carry) {
#pragma unroll
      for (int i = 0; i < order; ++i) {
        s[i] = 0;
        if (lane.step == last) g[i] += carry(i);
      }
      d = 0, cut = false;
    }
    template <bool gradients>
    STATEMIX_DEVICE void walk(const Row<norm, P, gradients>& row, const float (&g)[P], const Resets& resets, const Lane& lane) {
#pragma unroll
      for (int to = K - 1; to >= 0; --to) {
        if (to < K - 1) cut = resets.at(to + 1);
        float come[order];
#pragma unroll
        for (int i = 0; i < order; ++i) {
          come[i] = lane.at_step(i ? s[i - 1] : d, (to + 1) % K);
          if (cut) come[i] = 0;
        }
        float sum[2] = {};
#pragma unroll
        for (int i = order - 1; i >= 0; --i) {
          if (lane.step == to) s[i] = g[i] + come[i];
          sum[i % 2] = fmaf(row.p[i], s[i], sum[i % 2]);
        }
        d = (sum[0] + sum[1]) * row.scale();
      }
      cut = resets.at(0);
    }
    STATEMIX_DEVICE void gradients(const Row<norm, P, true>& row, float v, const Resets& resets, const Lane& lane, float (&dz)[P],
                                   float& dz_in, float& dv) const {
      const float scale = row.scale(), before = resets.at(lane.step) ? 0.0f : y;
      const float mean = fmaf(d, before, row.in * scale * s[0] * v);
#pragma unroll
      for (int j = 0; j < P; ++j) dz[j] = j < order ? row.gradient(j, scale, s[j < order ? j : 0] * before, mean) : 0.0f;
      dz_in = row.gradient_in(scale, s[0] * v, mean);
      dv = s[0] * row.in * scale;
    }
    template <class Store>
    STATEMIX_DEVICE void leave(const Resets&, const Lane& lane, Store store) const {
      if (lane.step != 0) return;
#pragma unroll
      for (int i = 0; i < P; ++i) store(i, cut || i >= order ? 0.0f : i ? s[i - 1] : d);
    }
  };
};

// The states; or the map of a chunk, a warp for each of its columns and one for its offset.
template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots, bool is_map>
struct LagsWalk {
  using Arguments = Scan<S>;
  using Walk = Kind<norm, order, has_reset, K>;
  static constexpr int P = Walk::P, kWidth = Walk::kWidth, kBlocks = 32 / K, kThreads = is_map ? 32 * (order + 1) : 32;
  static constexpr int kResident = 1;
  using Rows = LagsTile<S, P, K>;
  using Numbers = LagsNumbers<S, K, 2>;
  using States = LagsTile<S, kWidth, K>;

  struct Shared {
    struct {
      Rows gates;
      Numbers numbers;
    } ring[slots];
    States states;
  };

  static STATEMIX_DEVICE void meet() {
    if constexpr (is_map)
      __syncthreads();
    else
      __syncwarp();
  }

  static STATEMIX_DEVICE void run(const Scan<S>& scan, Shared& shared) {
    const Place place(scan);
    const LagsLane<K> lane(scan, place);
    const int column = is_map ? threadIdx.x / 32 : order;
    const uint8* reset = scan.reset + (int64)place.batch * scan.length;

    typename Rows::template Pieces<const S> gates(scan.gates, lane, 0, 1);
    const Array<const S> arrays[] = {scan.input_gates, scan.values};
    typename Numbers::Pieces numbers(arrays, lane, 0, 1, 0);
    typename States::Written states(scan.new_states, lane, 0, 1);
    const auto bring = [&](int c) {
      auto& slot = shared.ring[c % slots];
      if (!is_map || column == 0) {
        gates.bring(slot.gates, c, lane.index);
        numbers.bring(slot.numbers, c, lane.index);
      }
      commit();
    };
    float v;
    const auto prepare = [&](Row<norm, P, false>& weights, int c) {
      const auto& slot = shared.ring[c % slots];
      float z[P];
      slot.gates.get(lane.index, z);
      v = widen(slot.numbers.of[1][lane.index]);
      weigh<norm, order, 1>(weights, z, widen(slot.numbers.of[0][lane.index]), 0);
    };

    typename Walk::Forward walk;
    typename Walk::Resets resets;
    resets.ask(reset, place.first, scan.length);
#pragma unroll 1
    for (int c = 0; c < slots; ++c) bring(c);
    walk.begin(lane, [&](int i) { return is_map ? float(i == column) : place.entering(scan, lane.block, P, i); });
    wait<slots - 1>();
    meet();
    Row<norm, P, false> row, next;
    prepare(row, 0);
    bool any_cut = false;
    for (int c = 0; c < lane.groups; ++c) {
      const float value = column == order ? v : 0.0f;
      resets.take();
      any_cut |= resets.any();
      resets.ask(reset, place.first + (c + 1) * K, scan.length);
      wait<slots - 2>();
      meet();
      bring(c + slots);
      if constexpr (!is_map) prepare(next, c + 1);  // beside `walk`, which mostly waits
      walk.walk(row, value, resets, lane);
      if constexpr (is_map) prepare(next, c + 1);  // the other warps have work meanwhile, and all have few registers
      if constexpr (!is_map) {
        float h[kWidth];
        walk.states(h);
        states.write(c, lane.index, h, &shared.states);
      }
      row = next;
    }

    const int last = place.steps - 1 - (lane.groups - 1) * K;
    const int64 own = place.state + lane.block;
    float* out = is_map ? scan.offsets + own * P : scan.end + lane.state * P;
    if (column < order) out = scan.maps + own * P * P + column;
    const int stride = column < order ? P : 1;
    if (lane.inside && (is_map || place.chunk == scan.chunks - 1))
      walk.leave(last, resets, lane, [&](int i, float x) { out[i * stride] = column < order && any_cut ? 0.0f : x; });
    if constexpr (is_map) {
      if (lane.inside && column == order)
        for (int i = lane.step; i < P; i += K)
          for (int j = order; j < P; ++j) scan.maps[(own * P + i) * P + j] = 0.0f;
      if (has_reset && place.program == 0 && threadIdx.x == 0) scan.cuts[(int64)place.batch * scan.chunks + place.chunk] = any_cut;
    }
  }
};

template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots>
using LagsForward = LagsWalk<S, order, norm, has_reset, Kind, K, slots, false>;
template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots>
using LagsMap = LagsWalk<S, order, norm, has_reset, Kind, K, slots, true>;

// The way back, with all gradients; or, without, what a chunk alone hands back to the state that enters it.
template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots, bool gradients>
struct LagsReturn {
  using Arguments = Scan<S>;
  using Walk = Kind<norm, order, has_reset, K>;
  static constexpr int P = Walk::P, kWidth = Walk::kWidth, kBlocks = 32 / K, kThreads = 32, kResident = 1;
  static constexpr bool one = kWidth == 1;  // then states and their gradients come with the other arrays
  static constexpr int kValue = 1, kGrad = gradients ? 2 : 1, kEarlier = 3;
  static constexpr int kArrays = one ? (gradients ? 4 : 2) : (gradients ? 2 : 1);
  using Rows = LagsTile<S, P, K>;
  using Number = LagsTile<S, 1, K>;
  using Numbers = LagsNumbers<S, K, kArrays>;
  using States = LagsTile<S, kWidth, K>;

  struct Shared {
    struct {
      Rows gates;
      Numbers numbers;
      States grad_states;  // unless `one`
      uint32 earlier[32];  // unless `one`: the word with the number
    } ring[slots];
    Rows grad_gates;
  };

  static STATEMIX_DEVICE void run(const Scan<S>& scan, Shared& shared) {
    const Place place(scan);
    const LagsLane<K> lane(scan, place);
    const int start = lane.groups - 1;
    const uint8* reset = scan.reset + (int64)place.batch * scan.length;
    static_assert((slots & (slots - 1)) == 0);

    typename Rows::template Pieces<const S> gates(scan.gates, lane, start, -1);
    const Array<const S> arrays[] = {scan.input_gates, gradients ? scan.values : scan.grad_states, scan.grad_states, scan.states};
    constexpr int back = Walk::Backward::kBack;
    typename Numbers::Pieces numbers(arrays, lane, start, -1, one && gradients ? back : 0);
    typename States::template Pieces<const S> grad_states(scan.grad_states, lane, start, -1);
    LagsPiece<const S> earlier(scan.states, lane, start, -1, lane.step, (int64)lane.block * kWidth, lane.inside);
    earlier.at -= back * scan.states.time;
    if (place.first == 0 && lane.step < back) earlier.first = 1;
    const auto bring = [&](int c) {
      auto& slot = shared.ring[c & (slots - 1)];
      gates.bring(slot.gates, c, lane.index);
      numbers.bring(slot.numbers, c, lane.index);
      if constexpr (!one) grad_states.bring(slot.grad_states, c, lane.index);
      if constexpr (!one && gradients) earlier.template bring<4>(&slot.earlier[lane.index], c);
      commit();
    };
    float z[P], in, v, g[kWidth];
    const auto take = [&](int c) {
      const auto& slot = shared.ring[c & (slots - 1)];
      slot.gates.get(lane.index, z);
      in = widen(slot.numbers.of[0][lane.index]);
      if constexpr (gradients) v = widen(slot.numbers.of[kValue][lane.index]);
      if constexpr (one)
        g[0] = widen(slot.numbers.of[kGrad][lane.index]);
      else
        slot.grad_states.get(lane.index, g);
    };
    const auto initial = [&](int before) { return scan.initial[lane.state * P + before - 1]; };  // steps before step 0

    typename Walk::Backward walk;
    const auto take_earlier = [&](int c) {
      if constexpr (gradients) {
        const auto& slot = shared.ring[c & (slots - 1)];
        float h;
        if constexpr (one)
          h = widen(slot.numbers.of[kEarlier][lane.index]);
        else
          h = widen(*(const S*)&slot.earlier[lane.index]);
        const int before = back - (place.first + c * K + lane.step);
        if (0 < before && before <= order) h = initial(before);
        walk.take(h, lane);
      }
    };
    typename Walk::Resets resets;
    resets.ask(reset, place.first + start * K, scan.length);
#pragma unroll 1
    for (int s = 0; s < slots; ++s) bring(start - s);
    resets.take();
    wait<slots - 1>();
    __syncwarp();
    take(start);
    walk.begin(place.steps - 1 - start * K, resets, lane, g,
               [&](int i) { return gradients ? place.entering(scan, lane.block, P, i) : 0.0f; });
    if constexpr (gradients)
      walk.begin_earlier([&](int by) {
        const int t = place.first + start * K + lane.step - by;
        if (t >= place.first + place.steps || t < -order) return 0.0f;
        return t < 0 ? initial(-t) : widen(scan.states(place.batch, t)[lane.block]);
      });
    take_earlier(start);
    Row<norm, P, gradients> row;
    weigh<norm, order, 1>(row, z, in, 0);

    typename Rows::Written grad_gates(scan.grad_gates, lane, start, -1);
    typename Number::Written grad_input_gates(scan.grad_input_gates, lane, start, -1);
    typename Number::Written grad_values(scan.grad_values, lane, start, -1);
    for (int c = start; c >= 0; --c) {
      const float value = gradients ? v : 0.0f;
      float grad[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) grad[i] = g[i];
      resets.ask(reset, place.first + (c - 1) * K, scan.length);
      wait<slots - 2>();
      __syncwarp();
      bring(c - slots);
      take(c - 1);  // and weigh below: it waits for nothing that `walk` makes
      walk.walk(row, grad, resets, lane);
      if constexpr (gradients) {
        float dz[P], dz_in[1], dv[1];
        walk.gradients(row, value, resets, lane, dz, dz_in[0], dv[0]);
        grad_gates.write(c, lane.index, dz, &shared.grad_gates);
        grad_input_gates.write(c, lane.index, dz_in);
        grad_values.write(c, lane.index, dv);
      }
      take_earlier(c - 1);
      weigh<norm, order, 1>(row, z, in, 0);
      if (c > 0) resets.take();
    }

    if (!lane.inside || (gradients && place.chunk > 0)) return;
    float* const out = gradients ? scan.end + lane.state * P : scan.offsets + (place.state + lane.block) * P;
    walk.leave(resets, lane, [&](int i, float x) { out[i] = x; });
  }
};

template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots>
using LagsBackward = LagsReturn<S, order, norm, has_reset, Kind, K, slots, true>;
template <class S, int order, Normalization norm, bool has_reset, template <Normalization, int, bool, int> class Kind, int K,
          int slots>
using LagsAdjoint = LagsReturn<S, order, norm, has_reset, Kind, K, slots, false>;

}  // namespace statemix
