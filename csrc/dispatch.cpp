// The C entry points, and the choice of instruction set at run time.
#include "interface.h"
#include "snapshot.h"
#include "threads.h"

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace statemix {

std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] static const int kAtFork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// They are started where OpenMP does not have them yet, which keeps those of the last call from this thread and no others.
int64_t startable(int64_t wanted) {
  thread_local int64_t kept = 1;
  if (wanted <= kept) return kept = wanted;
  std::vector<std::thread> started;
  std::mutex gate;
  gate.lock();  // all at the same time
  try {
    started.reserve(wanted - kept);
    while (int64_t(started.size()) < wanted - kept) started.emplace_back([&gate] { gate.lock(), gate.unlock(); });
  } catch (const std::exception&) {  // no thread or no memory: the arithmetic is the same on fewer threads
  }
  gate.unlock();
  for (std::thread& thread : started) thread.join();
  return kept += int64_t(started.size());
}

#define STATEMIX_DECLARE(name) extern const Kernels kernels_##name;
STATEMIX_DECLARE(baseline)
#if defined(STATEMIX_X86)
STATEMIX_DECLARE(avx2)
STATEMIX_DECLARE(avx512)
#endif

struct InstructionSet {
  const char* name;
  bool supported;
  const Kernels& kernels;  // a reference: the constants of another file may not be initialised yet
};

static const InstructionSet kInstructionSets[] = {
    {"baseline", true, kernels_baseline},
#if defined(STATEMIX_X86)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2},
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw"),
     kernels_avx512},
#endif
};
constexpr int kCount = sizeof kInstructionSets / sizeof *kInstructionSets;

template <class Problem>
static int64_t run(void (*Kernels::*kernel)(const Problem&), int index, const Problem& problem) {
  try {
    (kInstructionSets[index].kernels.*kernel)(problem);
    return 0;
  } catch (const NoMemory& wanted) {
    return -int64_t(wanted.bytes);
  }
}

}  // namespace statemix

using namespace statemix;

#define STATEMIX_EXPORT extern "C" __attribute__((visibility("default")))

// The name of instruction set `index`, slowest first; null past the end.
STATEMIX_EXPORT const char* statemix_instruction_set(int index) { return index < kCount ? kInstructionSets[index].name : nullptr; }
STATEMIX_EXPORT int statemix_supported(int index) { return kInstructionSets[index].supported; }
STATEMIX_EXPORT int statemix_vector_bytes(int index) { return kInstructionSets[index].kernels.vector_bytes; }
STATEMIX_EXPORT int statemix_as_it_was(const SnapshotCall* call) { return all_as_they_were(*call); }
STATEMIX_EXPORT int statemix_interface() { return kInterface; }

// The first number that is outside [0, end), counted from 1; 0 if there is none.
static int64_t first_outside(const int64_t* numbers, int64_t count, int64_t end) {
  for (int64_t i = 0; numbers && i < count; ++i)
    if (numbers[i] < 0 || numbers[i] >= end) return i + 1;
  return 0;
}

// Each kernel returns 0, or -n where it found no memory for n bytes: then nothing was done.
STATEMIX_EXPORT int64_t statemix_scan_forward(int index, const ScanCall* p) { return run(&Kernels::scan_forward, index, *p); }
STATEMIX_EXPORT int64_t statemix_scan_backward(int index, const ScanCall* p) { return run(&Kernels::scan_backward, index, *p); }
STATEMIX_EXPORT int64_t statemix_layer_step(int index, const LayerCall* p) { return run(&Kernels::layer_step, index, *p); }
STATEMIX_EXPORT int64_t statemix_pair_step(int index, const PairCall* p) { return run(&Kernels::pair_step, index, *p); }
STATEMIX_EXPORT int64_t statemix_gated(int index, const GatedCall* p) { return run(&Kernels::gated, index, *p); }
// Or which token, counted from 1, is outside the vocabulary, and which place outside the table: then too nothing was done.
STATEMIX_EXPORT int64_t statemix_model_step(int index, const ModelCall* p) {
  const int64_t outside = first_outside(p->tokens, p->readout.batch, p->vocabulary);
  return outside ? outside : run(&Kernels::model_step, index, *p);
}
static int64_t run_layer(void (*Kernels::*kernel)(const LayerCall&), int index, const LayerCall& p) {
  const int64_t outside = first_outside(p.places, p.batch * p.length, p.table_rows);
  return outside ? outside : run(kernel, index, p);
}
STATEMIX_EXPORT int64_t statemix_layer_forward(int index, const LayerCall* p) {
  return run_layer(&Kernels::layer_forward, index, *p);
}
STATEMIX_EXPORT int64_t statemix_layer_backward(int index, const LayerCall* p) {
  return run_layer(&Kernels::layer_backward, index, *p);
}
