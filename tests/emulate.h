// Runs the kernels of csrc/gpu on a CPU: the names of csrc/gpu/device.cuh, and a program's lanes as fibers that take turns.
//
// A lane runs until it meets others: at a barrier, or in an exchange within its warp. Who runs next is drawn from a seed, and
// so is whether a copy to shared memory arrives at once or as late as its `wait` allows. A barrier or a wait that is missing
// then shows as a wrong result for some seed; lanes that meet in different places, or wait for one that has ended, are told.
// What is stronger here than on a GPU: an exchange is a barrier for the lanes of the warp, also for what lies in shared memory.
// A __syncwarp that is missing beside one gives no wrong result.
// With STATEMIX_RACES, and -fsanitize=thread,bounds, the emulator sees what lanes do in shared memory, whatever the order was:
// see `races`. An exchange is no barrier there.
#pragma once
#undef _FORTIFY_SOURCE  // it takes a jump from stack to stack for a mistake
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ucontext.h>

#include <vector>

using uint8 = uint8_t;
using uint16 = uint16_t;
using uint32 = uint32_t;
using int64 = long long;
inline int max(int x, int y) { return x > y ? x : y; }
inline int min(int x, int y) { return x < y ? x : y; }

struct uint2 { uint32 x, y; };
struct alignas(16) uint4 { uint32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32 x, uint32 y) { return {x, y}; }
inline uint4 make_uint4(uint32 x, uint32 y, uint32 z, uint32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define STATEMIX_DEVICE inline
#define __align__(bytes) alignas(bytes)

namespace emulated {

struct Index { int x = 0, y = 0, z = 0; };
struct Copy { void* to; const void* from; int bytes; bool there; };

struct Lane {
  Index thread;
  uint32 seed = 0;
  int exchanges = 0;
  std::vector<Copy> open;                  // copies since the last commit
  std::vector<std::vector<Copy>> groups;   // committed and not waited for, the oldest first
  uint32 random() {  // xorshift
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return seed;
  }
};

// What the lanes of a warp send each other. A lane cannot be two exchanges ahead of another, so two places are enough.
struct Exchange { uint32 sent[2][32]; };

constexpr size_t kMargin = 4096;  // bytes before and behind shared memory, which are nobody's

static Index block;
static std::vector<Exchange> exchanges;

constexpr size_t kStack = 256 << 10;

struct Fiber {
  char* stack = (char*)malloc(kStack);  // kept for the next program
  ucontext_t begin;
  jmp_buf at;
  bool started;
};
struct Meeting { int arrived = 0, place = 0, barriers = 0; };

static Lane* lane;
static std::vector<Fiber> fibers;
static std::vector<int> ready;            // lanes that may run
static std::vector<Meeting> meetings;     // of each warp, then of the program
static jmp_buf finished;
static int running;
static uint32 turns;
static const char* problem;
static std::vector<Lane>* all_lanes;
static void (*lane_main)();

// Goes on with some lane that may run; leaves the current one for good if it has ended.
__attribute__((noinline)) inline void give_turn(bool ended) {
  if (ready.empty()) {
    if (problem == nullptr && running > 0) problem = "lanes wait for others that never come";
    longjmp(finished, 1);
  }
  turns ^= turns << 13, turns ^= turns >> 17, turns ^= turns << 5;
  const size_t drawn = turns % ready.size();
  const int next = ready[drawn], from = lane ? lane->thread.x : -1;
  ready[drawn] = ready.back();
  ready.pop_back();
  if (next == from) return;
  if (!ended && from >= 0 && _setjmp(fibers[from].at)) return;
  lane = &(*all_lanes)[next];
  if (fibers[next].started) _longjmp(fibers[next].at, 1);
  fibers[next].started = true;
  setcontext(&fibers[next].begin);
}

inline void meet(int place, bool whole_program, bool is_barrier = true) {
  const int warp = lane->thread.x / 32, count = whole_program ? (int)fibers.size() : 32;
  Meeting& meeting = meetings[whole_program ? meetings.size() - 1 : warp];
  if (meeting.arrived++ == 0) meeting.place = place;
  if (meeting.place != place) problem = "the lanes of a warp meet in different places";
  if (problem != nullptr) _longjmp(finished, 1);
  if (meeting.arrived == count) {
    meeting.arrived = 0, meeting.barriers += is_barrier;
    for (int i = 0; i < count; ++i) ready.push_back(whole_program ? i : 32 * warp + i);
  }
  give_turn(false);
}

inline void begin_lane() {
  lane_main();
  --running;
  give_turn(true);
}

template <class Function>
const char* run_lanes(std::vector<Lane>& lanes, uint32 seed, Function function) {
  static Function* kept;
  kept = &function;
  lane_main = [] { (*kept)(); };
  all_lanes = &lanes, lane = nullptr, problem = nullptr, turns = seed, running = lanes.size();
  fibers.resize(lanes.size());
  meetings.assign(lanes.size() / 32 + 1, Meeting{});
  ready.clear();
  for (size_t i = 0; i < lanes.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = false;
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack;
    fiber.begin.uc_stack.ss_size = kStack;
    fiber.begin.uc_link = nullptr;
    makecontext(&fiber.begin, begin_lane, 0);
    ready.push_back(i);
  }
  if (!_setjmp(finished)) give_turn(true);
  return problem;
}

#ifdef STATEMIX_RACES
// Two lanes that touch the same byte of shared memory, one of them in writing, race unless both came to a barrier between: of
// their warp if they are of one, or of the program. A copy is in writing from where it begins until it was waited for, and then
// nobody may touch the byte. The compiler tells of each access by calling what the thread sanitizer would have.
namespace races {

struct Touch { int lane = -1, of_warp = 0, of_program = 0; };  // who, and how many barriers before
struct Byte { Touch written; std::vector<Touch> read; bool is_on_its_way = false; };

static char *shared, *first, *last;  // what is watched begins kMargin bytes before shared memory, and ends as much behind
static std::vector<Byte> bytes;
static char found[160];

inline Touch now() {
  return {lane->thread.x, meetings[lane->thread.x / 32].barriers, meetings.back().barriers};
}

inline bool in_order(const Touch& before, const Touch& now) {
  if (before.lane < 0 || before.lane == now.lane || before.of_program != now.of_program) return true;
  return before.lane / 32 == now.lane / 32 && before.of_warp != now.of_warp;
}

inline void begin(char* at, size_t size) {
  shared = at, first = at - kMargin, last = at + size + kMargin;
  bytes.assign(size, Byte{});
}

inline void tell(const char* what, int64 offset, int other) {
  if (problem != nullptr) return;
  const char* form = "lane %d %s byte %lld of shared memory, no barrier after lane %d";
  if (other < 0) form = "lane %d %s byte %lld of shared memory";
  snprintf(found, sizeof found, form, lane->thread.x, what, offset, other);
  problem = found;
}

inline void touch(const void* at, size_t size, bool writes) {
  const Touch now = races::now();
  const int64 from = (const char*)at - shared, to = from + size;
  if (from < 0 || to > (int64)bytes.size()) return tell("is outside, at", from, -1);
  for (int64 i = from; i < to; ++i) {
    Byte& byte = bytes[i];
    if (byte.is_on_its_way) tell("does not wait for a copy to", i, -1);
    if (!in_order(byte.written, now)) tell(writes ? "writes" : "reads", i, byte.written.lane);
    if (!writes) {
      byte.read.push_back(now);
      continue;
    }
    for (const Touch& read : byte.read)
      if (!in_order(read, now)) tell("overwrites", i, read.lane);
    byte.read.clear();
    byte.written = now;
  }
}

inline void copy(const Copy& c, bool begins) {
  if (begins) touch(c.to, c.bytes, true);
  if (problem != nullptr) return;
  for (int64 i = (char*)c.to - shared, end = i + c.bytes; i < end; ++i)
    bytes[i].is_on_its_way = begins, bytes[i].written = now();
}

}  // namespace races
#endif

inline void arrive(const Copy& c) {
#ifdef STATEMIX_RACES
  races::copy(c, false);
#endif
  memset(c.to, 0, c.bytes);
  if (c.there) memcpy(c.to, c.from, c.bytes);
}

// What each lane of the warp sends, by where in the source it was asked.
inline const uint32* exchange(uint32 sent, int place) {
  Exchange& with = exchanges[lane->thread.x / 32];
  uint32* of = with.sent[lane->exchanges++ % 2];
  of[lane->thread.x % 32] = sent;
  meet(place, false, false);
  return of;
}
template <class T>
T receive(T x, int from, int place) {
  static_assert(sizeof(T) == 4);
  uint32 bits;
  memcpy(&bits, &x, 4);
  bits = exchange(bits, place)[from];
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32 ballot(bool predicate, int place) {
  const uint32* sent = exchange(predicate, place);
  uint32 bits = 0;
  for (int i = 0; i < 32; ++i) bits |= sent[i] << i;
  return bits;
}
// Itself, or the lane so many further on where there is one.
inline int lane_index() { return lane->thread.x % 32; }
inline int lane_at(int further) {
  const int at = lane_index() + further;
  return at < 0 || at >= 32 ? lane_index() : at;
}

// Runs `programs` programs, one after the other; what is left in shared memory is no number. Null, or what went wrong.
template <class Program>
const char* run(const typename Program::Arguments& arguments, int programs, uint32 seed) {
  constexpr size_t size = sizeof(typename Program::Shared);
  char* memory = (char*)aligned_alloc(128, (size + 127) / 128 * 128 + 2 * kMargin);
  char* shared = memory + kMargin;
  const char* problem = nullptr;
  for (int p = 0; p < programs && problem == nullptr; ++p) {
    block = {p};
    memset(shared, 0xff, size);
#ifdef STATEMIX_RACES
    races::begin(shared, size);
#endif
    std::vector<Lane> lanes(Program::kThreads);
    exchanges.assign(lanes.size() / 32, Exchange{});
    for (size_t i = 0; i < lanes.size(); ++i) lanes[i].thread = {(int)i}, lanes[i].seed = 0x9e3779b9u * (seed + 1) + 77 * i + 1;
    const auto one = [&] { Program::run(arguments, *(typename Program::Shared*)shared); };
    problem = run_lanes(lanes, 0x85ebca6bu * (seed + 1) + p, one);
  }
  free(memory);
  return problem;
}

}  // namespace emulated

#define threadIdx (emulated::lane->thread)
#define blockIdx (emulated::block)
#define __syncwarp() emulated::meet(__LINE__, false)
#define __syncthreads() emulated::meet(__LINE__, true)
#define __shfl_sync(lanes, value, from) emulated::receive(value, from, __LINE__)
#define __shfl_xor_sync(lanes, value, mask) emulated::receive(value, emulated::lane_index() ^ (mask), __LINE__)
#define __shfl_up_sync(lanes, value, by) emulated::receive(value, emulated::lane_at(-(by)), __LINE__)
#define __shfl_down_sync(lanes, value, by) emulated::receive(value, emulated::lane_at(by), __LINE__)
#define __ballot_sync(lanes, predicate) emulated::ballot(predicate, __LINE__)

// arguments: a pointer to Program::Arguments; programs: of the whole grid. Returns null, or what went wrong.
#define STATEMIX_KERNEL(...)                                                              \
  using Program = __VA_ARGS__;                                                            \
  extern "C" const int numbers[] = {Program::kThreads, Program::kBlocks, sizeof(Program::Shared)}; \
  extern "C" const char* kernel(const void* arguments, int programs, uint32 seed) {       \
    return emulated::run<Program>(*(const Program::Arguments*)arguments, programs, seed); \
  }

inline float __uint_as_float(uint32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32 __float_as_uint(float x) {
  uint32 y;
  memcpy(&y, &x, 4);
  return y;
}

namespace statemix {

constexpr uint32 kAll = ~0u;

// What a GPU makes of numbers below the normal ones.
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
inline float exp2_fast(float x) { return flushed(exp2f(x)); }
inline float inverse_of_normal(float x) { return flushed(1.0f / x); }
inline float inverse(float x) { return 1.0f / x; }

inline float bfloat16_to_float(uint16 x) { return __uint_as_float(uint32(x) << 16); }
inline uint16 float_to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32 bits = __float_as_uint(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32 floats_to_bfloat16(float low, float high) { return float_to_bfloat16(low) | uint32(float_to_bfloat16(high)) << 16; }
inline float float16_to_float(uint16 x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return y;
}
inline uint16 float_to_float16(float x) {
  const _Float16 y = x;
  uint16 bits;
  memcpy(&bits, &y, 2);
  return bits;
}
inline uint32 floats_to_float16(float low, float high) { return float_to_float16(low) | uint32(float_to_float16(high)) << 16; }

template <int bytes>
void copy(void* to, const void* from, bool there) {
  const emulated::Copy one{to, from, bytes, there};
  if (reinterpret_cast<uintptr_t>(to) % bytes || (there && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fprintf(stderr, "a copy of %d bytes is not aligned\n", bytes);
    abort();
  }
#ifdef STATEMIX_RACES
  emulated::races::copy(one, true);
  const bool at_once = false;
#else
  const bool at_once = emulated::lane->random() % 2;
#endif
  if (at_once)
    emulated::arrive(one);
  else
    emulated::lane->open.push_back(one);
}
inline void commit() {
  emulated::lane->groups.push_back(emulated::lane->open);
  emulated::lane->open.clear();
}
template <int open>
void wait() {
  auto& groups = emulated::lane->groups;
  while ((int)groups.size() > open) {
    for (const emulated::Copy& one : groups.front()) emulated::arrive(one);
    groups.erase(groups.begin());
  }
}

}  // namespace statemix

#ifdef STATEMIX_RACES
// What the compiler calls at an access: of shared memory it is looked at. These alone are not watched themselves.
#define STATEMIX_UNWATCHED extern "C" __attribute__((no_sanitize_thread)) void
STATEMIX_UNWATCHED __tsan_init() {}
STATEMIX_UNWATCHED __tsan_func_entry(void*) {}
STATEMIX_UNWATCHED __tsan_func_exit() {}
STATEMIX_UNWATCHED __tsan_read_range(char* at, unsigned long bytes) {
  if (at >= emulated::races::first && at < emulated::races::last) emulated::races::touch(at, bytes, false);
}
STATEMIX_UNWATCHED __tsan_write_range(char* at, unsigned long bytes) {
  if (at >= emulated::races::first && at < emulated::races::last) emulated::races::touch(at, bytes, true);
}
#define STATEMIX_WATCHED(bytes)                                                            \
  STATEMIX_UNWATCHED __tsan_read##bytes(char* at) { __tsan_read_range(at, bytes); }        \
  STATEMIX_UNWATCHED __tsan_write##bytes(char* at) { __tsan_write_range(at, bytes); }
STATEMIX_UNWATCHED __ubsan_handle_out_of_bounds(void*, long index) {
  static char found[80];
  snprintf(found, sizeof found, "lane %d has an index outside of its array, %ld", emulated::lane->thread.x, index);
  if (emulated::problem == nullptr) emulated::problem = found;
}
STATEMIX_WATCHED(1)
STATEMIX_WATCHED(2)
STATEMIX_WATCHED(4)
STATEMIX_WATCHED(8)
STATEMIX_WATCHED(16)
#endif
