// The C entry points, and the choice of instruction set at run time.
#include "interface.h"
#include "threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace statemix {

std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] static const int kAtFork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

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

}  // namespace statemix

using namespace statemix;

#define STATEMIX_EXPORT extern "C" __attribute__((visibility("default")))

// The name of instruction set `index`, slowest first; null past the end.
STATEMIX_EXPORT const char* statemix_instruction_set(int index) { return index < kCount ? kInstructionSets[index].name : nullptr; }
STATEMIX_EXPORT int statemix_supported(int index) { return kInstructionSets[index].supported; }
STATEMIX_EXPORT int statemix_vector_bytes(int index) { return kInstructionSets[index].kernels.vector_bytes; }
STATEMIX_EXPORT int statemix_interface() { return kInterface; }
STATEMIX_EXPORT void statemix_scan_forward(int index, const Scan* p) { kInstructionSets[index].kernels.scan_forward(*p); }
STATEMIX_EXPORT void statemix_scan_backward(int index, const Scan* p) { kInstructionSets[index].kernels.scan_backward(*p); }
STATEMIX_EXPORT void statemix_layer_forward(int index, const Layer* p) { kInstructionSets[index].kernels.layer_forward(*p); }
STATEMIX_EXPORT void statemix_layer_backward(int index, const Layer* p) { kInstructionSets[index].kernels.layer_backward(*p); }
STATEMIX_EXPORT void statemix_layer_step(int index, const Layer* p) { kInstructionSets[index].kernels.layer_step(*p); }
STATEMIX_EXPORT void statemix_pair_step(int index, const Pair* p) { kInstructionSets[index].kernels.pair_step(*p); }
// -1, or a row whose token is outside the vocabulary: then nothing was done.
STATEMIX_EXPORT int64_t statemix_model_step(int index, const Model* p) {
  for (int64_t b = 0; b < p->readout.batch; ++b)
    if (p->tokens[b] < 0 || p->tokens[b] >= p->vocabulary) return b;
  kInstructionSets[index].kernels.model_step(*p);
  return -1;
}
STATEMIX_EXPORT void statemix_gated(int index, const Gated* p) { kInstructionSets[index].kernels.gated(*p); }
