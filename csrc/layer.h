// The fused layer: products, gates, scan and read-out chunk of time by chunk of time.
//
// A chunk's raw gates and values are one product, which lands in cache, where the scan eats it. In the backward the gradient of the
// raw gates is consumed by its own products before it leaves the cache. Threads share chunks as in scans.h.
//
// Where x is a table of its rows, the raw gates, values and weights are made once for each of these and read from there at every
// step; the gradients of all steps of a row are added up before they go through the products.
//
// Inside, blocks come in tiles of one vector, padded with blocks of zero weights. Per step, per tile:
//   gates   [(row, gate)..., value of each row][lane]          `columns` numbers per step
//   states  [shown component][lane]                            `kept` numbers per step
// The states of all steps are one array with the initial state in front: `margin` steps of it, the companion's lags with
// the oldest first. So the companion's read-out of M lags at step t is one row of M * kept neighbouring numbers, which
// overlaps the next step's row, and the gradient's window over the next M outputs likewise: no lag is ever copied, but where
// a reset cuts a window.
#pragma once
#include "memory.h"
#include "products.h"
#include "recurrence.h"
#include "scans.h"
#include "threads.h"

#include <algorithm>

namespace statemix {
namespace {

constexpr int64_t kChunkBytes = 384 << 10;  // of raw gates: what stays in a second-level cache beside the weights
constexpr int64_t kLeastRows = 96, kMostRows = 240;

template <class T>
struct Shape {
  static constexpr int64_t lanes = STATEMIX_VECTOR_BYTES / sizeof(T), line = 64 / sizeof(T);
  int64_t batch, length, width, order, blocks, table, rows, gates, shown, slots, tiles, columns, kept, margin, depth, padded_width;
  int64_t pitch, row_pitch;  // between rows of a chunk in scratch: an odd number of cache lines, so that a column meets all sets
  bool companion;

  explicit Shape(const LayerCall& p)
      : batch(p.batch), length(p.length), width(p.width), order(p.order), blocks(p.blocks), table(p.places ? p.table_rows : 0),
        companion(p.kind == kCompanion) {
    rows = p.kind == kBlock ? order : 1, gates = order + 1, shown = companion ? 1 : order;
    slots = rows * gates + rows;
    tiles = (blocks + lanes - 1) / lanes;
    columns = tiles * slots * lanes;
    kept = tiles * shown * lanes;
    margin = companion ? order : 1;
    depth = companion ? order * kept : kept;  // of the read-out
    padded_width = (width + lanes - 1) / lanes * lanes;
    pitch = ((columns + line - 1) / line | 1) * line;
    row_pitch = companion ? padded_width : ((padded_width + line - 1) / line | 1) * line;  // the companion's windows are contiguous
  }
  // Row of gate_weight for a column, or -1 - the row of value_weight, or `none`: padding.
  static constexpr int64_t none = INT64_MAX;
  int64_t source(int64_t column) const {
    const int64_t slot = column / lanes % slots, n = column / (lanes * slots) * lanes + column % lanes;
    if (n >= blocks) return none;
    return slot < rows * gates ? slot * blocks + n : -1 - ((slot - rows * gates) * blocks + n);
  }
  // Column of output_weight for number k of the read-out, or `none`.
  int64_t output_column(int64_t k) const {
    const int64_t i = companion ? order - 1 - k / kept : k / lanes % order;
    const int64_t n = companion ? k % kept : k / (lanes * order) * lanes + k % lanes;
    return n < blocks ? i * blocks + n : none;
  }
};

// Packs B[k][c] = at(k, c) into panels: this thread's share.
template <class T, class At>
void pack(T* to, int64_t depth, int64_t columns, int64_t thread, int64_t threads, const At& at) {
  const int64_t panels = (columns + kPanel<T> - 1) / kPanel<T>;
  for (int64_t panel = share(panels, thread, threads); panel < share(panels, thread + 1, threads); ++panel)
    for (int64_t c = 0; c < kPanel<T>; ++c) {
      const int64_t column = panel * kPanel<T> + c;
      T* out = to + panel * depth * kPanel<T> + c;
      for (int64_t k = 0; k < depth; ++k) out[k * kPanel<T>] = column < columns ? at(k, column) : T(0);
    }
}
template <class T>
int64_t packed_size(int64_t depth, int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T> * kPanel<T> * depth;
}

// The weights as the products want them; null where a direction has no use for one.
template <class T>
struct Packed {
  T *bias, *in, *out, *out_back, *in_back;

  Packed(const Shape<T>& s, bool projects, bool is_backward) {
    const int64_t bias_size = (s.columns + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
    const int64_t in_size = packed_size<T>(s.width, s.columns), out_size = packed_size<T>(s.depth, s.padded_width);
    const int64_t out_back_size = packed_size<T>(back_depth(s), s.kept);
    const int64_t in_back_size = packed_size<T>(s.columns, s.padded_width);
    T* at = (T*)scratch(kPacked, (bias_size + in_size + (is_backward ? out_back_size + in_back_size : out_size)) * sizeof(T));
    bias = at, in = projects ? at + bias_size : nullptr, at += bias_size + in_size;
    out = is_backward ? nullptr : at;
    out_back = is_backward ? at : nullptr, in_back = is_backward ? at + out_back_size : nullptr;
  }
  static int64_t back_depth(const Shape<T>& s) { return s.companion ? s.order * s.padded_width : s.width; }

  void fill(const LayerCall& p, const Shape<T>& s, int64_t thread, int64_t threads) {
    const T *gate = (const T*)p.gate_weight, *value = (const T*)p.value_weight, *output = (const T*)p.output_weight;
    const auto row = [&](int64_t column) -> const T* {
      const int64_t source = s.source(column);
      return source == s.none ? nullptr : source >= 0 ? gate + source * s.width : value + (-1 - source) * s.width;
    };
    const int64_t panels = (s.columns + kPanel<T> - 1) / kPanel<T>;
    for (int64_t c = share(panels, thread, threads) * kPanel<T>; c < share(panels, thread + 1, threads) * kPanel<T>; ++c) {
      const int64_t source = c < s.columns ? s.source(c) : s.none;
      bias[c] = source != s.none && source >= 0 ? ((const T*)p.gate_bias)[source] : T(0);
      if (!in) continue;
      T* to = in + c / kPanel<T> * s.width * kPanel<T> + c % kPanel<T>;
      const T* from = c < s.columns ? row(c) : nullptr;
      for (int64_t k = 0; k < s.width; ++k) to[k * kPanel<T>] = from ? from[k] : T(0);
    }
    if (out)
      pack(out, s.depth, s.padded_width, thread, threads, [&](int64_t k, int64_t d) {
        const int64_t column = s.output_column(k);
        return d < s.width && column != s.none ? output[d * s.order * s.blocks + column] : T(0);
      });
    if (out_back)  // companion: depth is (lag, d)
      pack(out_back, back_depth(s), s.kept, thread, threads, [&](int64_t k, int64_t c) {
        const int64_t lag = s.companion ? k / s.padded_width : 0, d = s.companion ? k % s.padded_width : k;
        const int64_t column = s.output_column(s.companion ? (s.order - 1 - lag) * s.kept + c : c);
        return d < s.width && column != s.none ? output[d * s.order * s.blocks + column] : T(0);
      });
    if (in_back)
      for (int64_t c = share(s.columns, thread, threads); c < share(s.columns, thread + 1, threads); ++c) {
        const T* from = row(c);
        for (int64_t d = 0; d < packed_size<T>(1, s.padded_width); ++d)
          in_back[(d / kPanel<T> * s.columns + c) * kPanel<T> + d % kPanel<T>] = from && d < s.width ? from[d] : T(0);
      }
  }
};

template <class T>
int64_t chunk_rows(const Shape<T>& s) {
  const int64_t numbers = s.table ? s.kept : s.columns;  // a table's raw gates are no part of a chunk
  const int64_t fits = std::clamp(kChunkBytes / int64_t(numbers * sizeof(T)), kLeastRows, kMostRows);
  const int64_t chunks = (s.length + fits - 1) / fits, even = (s.length + chunks - 1) / chunks;
  return std::max<int64_t>((even + kTileRows - 1) / kTileRows * kTileRows, 1);
}

// What the threads of a call share, and how one chunk is done.
template <class T>
struct Pass {
  const LayerCall& p;
  const Shape<T> s;
  const Recurrence<T> recur;
  Packed<T> packed;
  const bool is_backward;
  const bool in_place;  // the weights overwrite the raw gates, also those kept: all that softmax needs to return
  const int64_t chunk, chunks, at_once, per_step;
  V<T>* carries;
  std::atomic<int64_t>* progress;
  T* sums = nullptr;   // backward: per thread, the gradients of the weights in the inside layout
  T* table = nullptr;  // raw gates and values of each row of the table, `pitch` apart

  Pass(const LayerCall& p, bool is_backward)
      : p(p), s(p), recur(recurrence<T>(p.kind, p.order, p.normalization)), packed(s, !is_backward || !p.kept, is_backward),
        is_backward(is_backward), in_place(p.normalization == kSoftmax), chunk(chunk_rows(s)),
        chunks((s.length + chunk - 1) / chunk), at_once(steps_at_once(s.rows * s.gates)), per_step(s.rows * s.gates) {
    carries = (V<T>*)scratch(kCarry, s.batch * s.tiles * 2 * s.order * sizeof(V<T>));
    progress = (std::atomic<int64_t>*)scratch(kProgress, s.batch * s.tiles * sizeof(std::atomic<int64_t>));
    for (int64_t i = 0; i < s.batch * s.tiles; ++i) new (&progress[i]) std::atomic<int64_t>(0);
    if (s.table) table = (T*)scratch(kTable, s.table * (s.pitch + 2 * s.row_pitch) * sizeof(T) + s.tiles * table_bytes());
  }

  // ---- a table in place of x: its rows, padded rows of x and of its gradient, weights

  size_t table_bytes() const { return in_place ? 0 : weights_size<T>(s.table, per_step, is_backward) * sizeof(T); }
  T* table_x() const { return table + s.table * s.pitch; }
  T* table_grad_x() const { return table_x() + s.table * s.row_pitch; }
  Weights<T> table_weights(int64_t v) const {
    T* const q = table + v * s.slots * s.lanes;
    if (in_place) return {q, q, q, s.pitch};
    char* const room = (char*)(table_grad_x() + s.table * s.row_pitch);
    return weights_in<T>(room + v * table_bytes(), s.table, per_step, is_backward);
  }
  const int64_t* places(int64_t b, int64_t t) const { return p.places + b * s.length + t; }

  // This thread's share of what all steps read.
  void fill_table(int64_t thread, int64_t threads) const {
    const int64_t first = share(s.table, thread, threads), end = share(s.table, thread + 1, threads);
    project((const T*)p.x + first * s.width, end - first, table + first * s.pitch, s.pitch);
    barrier(threads);
    for (int64_t v = share(s.tiles, thread, threads); v < share(s.tiles, thread + 1, threads); ++v) {
      Steps<T> steps{};
      steps.count = int(s.table), steps.order = int(s.order), steps.normalization = p.normalization;
      steps.gates = {table + v * s.slots * s.lanes, s.pitch, s.lanes};
      (is_backward ? recur.weigh_to_return : recur.weigh)(steps, int(s.rows), table_weights(v));
    }
    barrier(threads);
  }

  // What came of a tile's steps to the sums of their rows, while it is in the cache.
  void add_to_table(const Steps<T>& steps, int64_t v, T* sum) const {
    T* const grads = sum + sums_size() - s.table * s.columns + v * s.slots * s.lanes;
    for (int t = 0; t < steps.count; ++t) {
      T* const to = grads + steps.row(t) * s.columns;
      const T* const from = steps.grad_gates(t, 0);
      for (int64_t i = 0; i < s.slots * s.lanes; i += s.lanes) store(to + i, load(to + i) + load(from + i));
    }
  }

  // This thread's share of the way from the gradients of the table's raw gates and values to those of weights and x.
  void through_table(int64_t thread, int64_t threads) const {
    T *const grads = sums + sums_size() - s.table * s.columns, *const grad_bias = grads - s.columns;
    for (int64_t i = share(s.table * s.columns, thread, threads); i < share(s.table * s.columns, thread + 1, threads); ++i)
      for (int64_t other = 1; other < threads; ++other) grads[i] += grads[i + other * sums_size()];
    const int64_t row = share(s.table, thread, threads), rows = share(s.table, thread + 1, threads) - row;
    read_rows((const T*)p.x + row * s.width, rows, table_x() + row * s.row_pitch);
    barrier(threads);
    const int64_t column = share(s.columns, thread, threads), columns = share(s.columns, thread + 1, threads) - column;
    T* const grad_in = sums + column * s.padded_width;
    product<T, true>({columns, s.padded_width, s.table, grads + column, s.columns, table_x(), s.row_pitch, kPanel<T>, nullptr, 0,
                      grad_in, s.padded_width},
                     true);
    for (int64_t r = 0; r < s.table; ++r)
      for (int64_t c = column; c < column + columns; ++c) grad_bias[c] += grads[r * s.columns + c];
    through_input(grads + row * s.columns, s.columns, rows, table_grad_x() + row * s.row_pitch, (T*)p.grad_x + row * s.width);
    barrier(threads);
  }

  // Row t of the states of sequence b; t may be down to -margin.
  T* states(int64_t b, int64_t t) const { return (T*)p.states + (b * (s.margin + s.length) + s.margin + t) * s.kept; }
  const uint8_t* reset(int64_t b) const { return p.reset ? p.reset + b * s.length : nullptr; }
  // Whether a reset lies in steps (begin, end] of sequence b.
  bool cut(int64_t b, int64_t begin, int64_t end) const {
    if (!p.reset) return false;
    bool any = false;
    for (int64_t t = std::max<int64_t>(begin + 1, 0); t <= std::min(end, s.length - 1); ++t) any = any || reset(b)[t];
    return any;
  }
  void read_state(const void* from, int64_t b, int64_t v, V<T>* to) const {
    for (int64_t i = 0; i < s.order; ++i)
      for (int64_t l = 0; l < width<T>; ++l) {
        const int64_t n = v * width<T> + l;
        ((T*)&to[i])[l] = from && n < s.blocks ? ((const T*)from)[(b * s.order + i) * s.blocks + n] : T(0);
      }
  }
  void write_state(const V<T>* from, int64_t b, int64_t v, void* to) const {
    for (int64_t i = 0; i < s.order; ++i)
      for (int64_t l = 0; l < width<T>; ++l)
        if (const int64_t n = v * width<T> + l; n < s.blocks) ((T*)to)[(b * s.order + i) * s.blocks + n] = ((const T*)&from[i])[l];
  }

  Steps<T> steps_of(int64_t b, int64_t t, int64_t count, int64_t v, T* gates, int64_t stride) const {
    Steps<T> steps{};
    steps.count = int(count), steps.order = int(s.order), steps.normalization = p.normalization;
    steps.reset = p.reset ? reset(b) + t : nullptr;
    steps.places = s.table ? places(b, t) : nullptr;
    steps.gates = {gates + v * s.slots * s.lanes, stride, s.lanes};
    steps.values = {steps.gates.at + per_step * s.lanes, stride, s.lanes};
    steps.states = {states(b, t) + v * s.shown * s.lanes, s.kept, s.lanes};
    return steps;
  }

  // Raw gates and values of `count` rows of x.
  void project(const T* x, int64_t count, T* to, int64_t stride) const {
    product<T, false>(
        {count, s.columns, s.width, x, s.width, packed.in, kPanel<T>, s.width * kPanel<T>, packed.bias, 0, to, stride}, false);
  }

  // Rows of x that vectors may read to their end.
  void read_rows(const T* from, int64_t count, T* to) const {
    for (; count > 0; --count, from += s.width, to += s.row_pitch)
      for (int64_t d = 0; d < s.padded_width; ++d) to[d] = d < s.width ? from[d] : T(0);
  }

  // Gradients of `count` rows of raw gates and values to those of x; `room` is for rows with padding.
  void through_input(const T* grads, int64_t pitch, int64_t count, T* room, T* grad_x) const {
    const bool narrow = s.width == s.padded_width;
    product<T, false>({count, s.padded_width, s.columns, grads, pitch, packed.in_back, kPanel<T>, s.columns * kPanel<T>, nullptr, 0,
                       narrow ? grad_x : room, narrow ? s.padded_width : s.row_pitch},
                      true);
    if (!narrow)
      for (int64_t r = 0; r < count; ++r) std::copy(room + r * s.row_pitch, room + r * s.row_pitch + s.width, grad_x + r * s.width);
  }

  // Rows of states, or of gradients of them, times the visibility of their blocks: `numbers` of each, `stride` apart.
  void show(int64_t b, int64_t count, int64_t numbers, const T* from, int64_t stride, T* to) const {
    const T* const visibility = (const T*)p.visibility + b * s.blocks;
    for (int64_t v = 0; v < s.tiles; ++v) {
      const int64_t n = v * s.lanes, end = (v + 1) * s.shown * s.lanes;
      const V<T> seen = load_lanes(visibility + n, int(std::min(s.blocks - n, s.lanes)));
      for (int64_t r = 0; r < count; ++r)
        for (int64_t lag = 0; lag < numbers; lag += s.kept)
          for (int64_t k = lag + v * s.shown * s.lanes; k < lag + end; k += s.lanes)
            store(to + r * numbers + k, load(from + r * stride + k) * seen);
    }
  }

  // The rows that the read-out of `count` steps sees: in place, or a copy in `buffer`.
  const T* seen(int64_t b, int64_t t0, int64_t count, T* buffer, int64_t& stride) const {
    const T* const all = lags(b, t0, count, buffer, stride);
    if (!p.visibility) return all;
    show(b, count, s.depth, all, stride, buffer);
    stride = s.depth;
    return buffer;
  }

  // As `seen`, where all blocks are visible: a copy only where a reset cuts the companion's lags.
  const T* lags(int64_t b, int64_t t0, int64_t count, T* buffer, int64_t& stride) const {
    stride = s.kept;
    if (!s.companion) return states(b, t0);
    if (!cut(b, t0 - s.order, t0 + count - 1)) return states(b, t0 - s.order + 1);
    stride = s.depth;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t lag = 0; lag < s.order; ++lag) {
        const int64_t made = t0 + r - lag;
        T* to = buffer + r * s.depth + (s.order - 1 - lag) * s.kept;
        if (cut(b, made, t0 + r))
          std::fill(to, to + s.kept, T(0));
        else
          std::copy(states(b, made), states(b, made) + s.kept, to);
      }
    return buffer;
  }

  void forward_chunk(int64_t b, int64_t turn, T* buffer, Weights<T> buffer_weights) const {
    const int64_t t0 = turn * chunk, count = std::min(chunk, s.length - t0);
    const bool narrow = s.width == s.padded_width;  // then y can be written where it belongs
    T* const lag_buffer = buffer + gates_size();
    T* const gates = p.kept ? (T*)p.kept + (b * s.length + t0) * s.columns : buffer;
    const int64_t pitch = p.kept ? s.columns : s.pitch;
    if (!s.table) project((const T*)p.x + (b * s.length + t0) * s.width, count, gates, pitch);

    for (int64_t v = 0; v < s.tiles; ++v) {
      V<T>* const carry = carries + (b * s.tiles + v) * 2 * s.order;
      std::atomic<int64_t>& done = progress[b * s.tiles + v];
      for (int64_t t = 0; t < count; t += at_once) {
        const Steps<T> steps = steps_of(b, t0 + t, std::min(at_once, count - t), v, s.table ? table : gates + t * pitch, pitch);
        T* const q = steps.gates.at;
        const Weights<T> w = s.table ? table_weights(v) : in_place ? Weights<T>{q, q, q, pitch} : buffer_weights;
        if (!s.table) recur.weigh(steps, int(s.rows), w);
        if (t == 0) wait_for(done, turn);
        if (t == 0 && turn == 0) start(b, v, carry);
        recur.forward(steps, w, carry);
      }
      if (turn == chunks - 1) write_state(carry, b, v, p.final_state);
      done.store(turn + 1, std::memory_order_release);
    }

    int64_t stride;
    const T* const shown = seen(b, t0, count, lag_buffer, stride);
    T* const y = (T*)p.y + (b * s.length + t0) * s.width;
    T* const to = narrow ? y : lag_buffer + chunk * s.depth;
    product<T, false>(
        {count, s.padded_width, s.depth, shown, stride, packed.out, kPanel<T>, s.depth * kPanel<T>, nullptr, 0, to, s.padded_width},
        false);
    if (!narrow)
      for (int64_t r = 0; r < count; ++r) std::copy(to + r * s.padded_width, to + r * s.padded_width + s.width, y + r * s.width);
  }

  // The carry of step 0 and the initial state in front of the states.
  void start(int64_t b, int64_t v, V<T>* carry) const {
    for (int64_t i = 0; i < 2 * s.order; ++i) carry[i] = V<T>{};
    read_state(p.initial_state, b, v, carry);
    const int64_t at = v * s.shown * s.lanes;
    for (int64_t i = 0; i < s.order; ++i) store(s.companion ? states(b, -1 - i) + at : states(b, -1) + at + i * s.lanes, carry[i]);
  }

  // dL/dy of steps t0 .. t0 + count - 1 as rows of padded_width, with order - 1 more rows for the companion; zero beyond T.
  void read_grad_y(int64_t b, int64_t t0, int64_t count, T* to) const {
    for (int64_t t = t0; t < t0 + count; ++t, to += s.row_pitch) {
      const bool inside = t >= 0 && t < s.length;
      const T* from = (const T*)p.grad_y + (b * s.length + t) * s.width;
      for (int64_t d = 0; d < s.padded_width; ++d) to[d] = inside && d < s.width ? from[d] : T(0);
    }
  }

  // dL/dstates of steps t0 .. t0 + count - 1, from grad_y (read_grad_y) into `to`.
  void through_output(int64_t b, int64_t t0, int64_t count, const T* grad_y, T* window, T* to) const {
    const T* seen = grad_y;
    int64_t stride = s.row_pitch;
    if (s.companion && cut(b, t0, t0 + count + s.order - 2)) {
      stride = s.order * s.padded_width, seen = window;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t lag = 0; lag < s.order; ++lag) {
          const T* from = grad_y + (r + lag) * s.padded_width;
          T* const at = window + r * stride + lag * s.padded_width;
          if (cut(b, t0 + r, t0 + r + lag))
            std::fill(at, at + s.padded_width, T(0));
          else
            std::copy(from, from + s.padded_width, at);
        }
    }
    const int64_t depth = Packed<T>::back_depth(s);
    product<T, false>({count, s.kept, depth, seen, stride, packed.out_back, kPanel<T>, depth * kPanel<T>, nullptr, 0, to, s.kept},
                      false);
    if (p.visibility) show(b, count, s.kept, to, s.kept, to);
  }

  // Per thread: columns x padded_width for the input weights, width x depth for the output's, columns for the bias, the table's.
  int64_t sums_size() const { return s.columns * s.padded_width + s.width * s.depth + s.columns + s.table * s.columns; }

  // Raw gates and values of a chunk, or gradients of them; where a table has the former, the latter of a tile's next few steps.
  int64_t gates_size() const { return s.table ? at_once * s.slots * s.lanes : chunk * s.pitch; }

  // Numbers of what a chunk works on: as forward_chunk and backward_chunk lay them out.
  int64_t chunk_size() const {
    if (!is_backward) return gates_size() + chunk * (s.depth + s.padded_width);
    const int64_t rows = std::max(chunk, s.margin), window = s.companion ? s.order - 1 : 0;
    return gates_size() + rows * s.kept + 2 * (rows + window) * s.row_pitch + rows * std::max(s.depth, s.order * s.padded_width);
  }

  void backward_chunk(int64_t b, int64_t turn, T* gates, Weights<T> buffer_weights, T* sum) const {
    const int64_t t0 = (chunks - 1 - turn) * chunk, count = std::min(chunk, s.length - t0), window = s.companion ? s.order - 1 : 0;
    const int64_t rows = std::max(chunk, s.margin);
    T* const grad_states = gates + gates_size();
    T* const grad_y = grad_states + rows * s.kept;
    T* const x = grad_y + (rows + window) * s.row_pitch;
    T* const cut_rows = x + (rows + window) * s.row_pitch;
    V<T> before[kMaxOrder];

    read_grad_y(b, t0, count + window, grad_y);
    through_output(b, t0, count, grad_y, cut_rows, grad_states);
    const T* const x_rows = (const T*)p.x + (b * s.length + t0) * s.width;
    const T* const raw = p.kept ? (const T*)p.kept + (b * s.length + t0) * s.columns : gates;
    const int64_t raw_pitch = p.kept ? s.columns : s.pitch;
    if (!p.kept && !s.table) project(x_rows, count, gates, s.pitch);

    for (int64_t v = 0; v < s.tiles; ++v) {
      V<T>* const carry = carries + (b * s.tiles + v) * 2 * s.order;
      std::atomic<int64_t>& done = progress[b * s.tiles + v];
      const int64_t state_at = v * s.shown * s.lanes;
      for (int64_t pieces = (count + at_once - 1) / at_once, piece = pieces - 1; piece >= 0; --piece) {
        const int64_t t = piece * at_once;
        T* const made = s.table ? table : const_cast<T*>(raw) + t * raw_pitch;
        Steps<T> steps = steps_of(b, t0 + t, std::min(at_once, count - t), v, made, raw_pitch);
        steps.before = before;
        steps.grad_states = {grad_states + t * s.kept + state_at, s.kept, s.lanes};
        if (s.table)
          steps.grad_gates = {gates, s.slots * s.lanes, s.lanes};
        else
          steps.grad_gates = {gates + t * s.pitch + v * s.slots * s.lanes, s.pitch, s.lanes};
        steps.grad_values = {steps.grad_gates.at + per_step * s.lanes, steps.grad_gates.step, s.lanes};
        T* const q = steps.gates.at;
        const Weights<T> w = s.table ? table_weights(v) : in_place ? Weights<T>{q, q, q, raw_pitch} : buffer_weights;
        if (!s.table && (!in_place || !p.kept)) recur.weigh_to_return(steps, int(s.rows), w);
        for (int64_t i = 0; i < s.order; ++i)
          if (s.companion)
            before[i] = cut(b, t0 + t - 1 - i, t0 + t - 1) ? V<T>{} : load(states(b, t0 + t - 1 - i) + state_at);
          else
            before[i] = load(states(b, t0 + t - 1) + state_at + i * s.lanes);
        if (piece == pieces - 1) wait_for(done, turn);
        if (piece == pieces - 1 && turn == 0) {
          for (int64_t i = 0; i < 2 * s.order; ++i) carry[i] = V<T>{};
          read_state(p.grad_final_state, b, v, carry);
        }
        recur.backward(steps, w, carry);
        if (s.table) add_to_table(steps, v, sum);
      }
      if (turn == chunks - 1 && !s.companion) write_state(carry, b, v, p.grad_initial_state);
      done.store(turn + 1, std::memory_order_release);
    }

    T* const grad_out = sum + s.columns * s.padded_width;
    int64_t stride;
    const T* const shown = seen(b, t0, count, cut_rows, stride);
    product<T, true>({s.width, s.depth, count, grad_y, s.row_pitch, shown, stride, kPanel<T>, grad_out, s.depth, grad_out, s.depth},
                     true);
    T* const grad_bias = grad_out + s.width * s.depth;
    if (!s.table) {
      read_rows(x_rows, count, x);
      product<T, true>(
          {s.columns, s.padded_width, count, gates, s.pitch, x, s.row_pitch, kPanel<T>, sum, s.padded_width, sum, s.padded_width},
          true);
      constexpr int64_t few = 8;
      for (int64_t r = 0; r < count; r += few)
        for (int64_t c = 0; c < s.columns; c += width<T>) {
          V<T> total = load(grad_bias + c);
          for (int64_t i = r; i < std::min(r + few, count); ++i) total += load(gates + i * s.pitch + c);
          store(grad_bias + c, total);
        }
      through_input(gates, s.pitch, count, x, (T*)p.grad_x + (b * s.length + t0) * s.width);
    }

    if (turn == chunks - 1 && s.companion) {  // the read-out saw the initial lags too
      read_grad_y(b, -s.order, s.order + window, grad_y);
      through_output(b, -s.order, s.order, grad_y, cut_rows, grad_states);
      for (int64_t v = 0; v < s.tiles; ++v) {
        V<T>* const carry = carries + (b * s.tiles + v) * 2 * s.order;
        for (int64_t i = 0; i < s.order; ++i) carry[i] += load(grad_states + (s.order - 1 - i) * s.kept + v * s.shown * s.lanes);
        write_state(carry, b, v, p.grad_initial_state);
      }
    }
  }

  // Sums over threads, into the tensors of the weights: this thread's share.
  void write_sums(int64_t thread, int64_t threads) const {
    const int64_t size = sums_size();
    const auto total = [&](int64_t at) {
      T sum = sums[at];
      for (int64_t i = 1; i < threads; ++i) sum += sums[i * size + at];
      return sum;
    };
    for (int64_t c = share(s.columns, thread, threads); c < share(s.columns, thread + 1, threads); ++c) {
      const int64_t source = s.source(c);
      if (source == s.none) continue;
      T* const to = source >= 0 ? (T*)p.grad_gate_weight + source * s.width : (T*)p.grad_value_weight + (-1 - source) * s.width;
      for (int64_t d = 0; d < s.width; ++d) to[d] = total(c * s.padded_width + d);
      if (source >= 0) ((T*)p.grad_gate_bias)[source] = total(s.columns * s.padded_width + s.width * s.depth + c);
    }
    for (int64_t d = share(s.width, thread, threads); d < share(s.width, thread + 1, threads); ++d)
      for (int64_t k = 0; k < s.depth; ++k)
        if (const int64_t column = s.output_column(k); column != s.none)
          ((T*)p.grad_output_weight)[d * s.order * s.blocks + column] = total(s.columns * s.padded_width + d * s.depth + k);
  }

  void run() {
    const int64_t items = s.batch * chunks, wanted = std::min<int64_t>(p.threads, items);
    const Rooms chunk_rooms(kChunk, wanted, chunk_size() * sizeof(T));
    const Rooms weight_rooms(kWeights, wanted, weights_size<T>(at_once, per_step, is_backward) * sizeof(T));
    if (is_backward) sums = (T*)scratch(kSums, wanted * sums_size() * sizeof(T));
    in_parallel(wanted, [&](int64_t thread, int64_t threads) {
      T* const room = (T*)chunk_rooms.of(thread);
      const Weights<T> weights = weights_in<T>(weight_rooms.of(thread), at_once, per_step, is_backward);
      packed.fill(p, s, thread, threads);
      T* const sum = is_backward ? sums + thread * sums_size() : nullptr;
      if (is_backward) std::fill(sum, sum + sums_size(), T(0));
      barrier(threads);
      if (s.table) fill_table(thread, threads);
      for (int64_t item = thread; item < items; item += threads)
        if (is_backward)
          backward_chunk(item % s.batch, item / s.batch, room, weights, sum);
        else
          forward_chunk(item % s.batch, item / s.batch, room, weights);
      barrier(threads);
      if (is_backward && s.table) through_table(thread, threads);
      if (is_backward) write_sums(thread, threads);
    });
  }
};

template <class T>
void advise(const LayerCall& p, bool is_backward) {
  const Shape<T> s(p);
  const size_t x_bytes = size_t(s.batch * s.length * s.width) * sizeof(T);
  if (is_backward) return use_large_pages(p.grad_x, s.table ? 0 : x_bytes);
  use_large_pages(p.y, x_bytes);
  use_large_pages(p.states, size_t(s.batch * (s.margin + s.length) * s.kept) * sizeof(T));
  use_large_pages(p.kept, size_t(s.batch * s.length * s.columns) * sizeof(T));
}

void layer_forward(const LayerCall& p) {
  p.storage == kDouble ? advise<double>(p, false) : advise<float>(p, false);
  p.storage == kDouble ? Pass<double>(p, false).run() : Pass<float>(p, false).run();
}
void layer_backward(const LayerCall& p) {
  p.storage == kDouble ? advise<double>(p, true) : advise<float>(p, true);
  p.storage == kDouble ? Pass<double>(p, true).run() : Pass<float>(p, true).run();
}

}  // namespace
}  // namespace statemix
