// The C entry points, and the choice of instruction set at run time.
#include "scan.h"

namespace statemix {

#define STATEMIX_DECLARE(name) extern const Scan forward_##name, backward_##name;
STATEMIX_DECLARE(baseline)
#if defined(STATEMIX_X86)
STATEMIX_DECLARE(avx2)
STATEMIX_DECLARE(avx512)
#endif

struct InstructionSet {
  const char* name;
  bool supported;
  const Scan& forward;  // references: the constants of another file may not be initialised yet
  const Scan& backward;
};

static const InstructionSet kInstructionSets[] = {
    {"baseline", true, forward_baseline, backward_baseline},
#if defined(STATEMIX_X86)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), forward_avx2, backward_avx2},
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw"),
     forward_avx512, backward_avx512},
#endif
};
constexpr int kCount = sizeof kInstructionSets / sizeof *kInstructionSets;

}  // namespace statemix

using statemix::kInstructionSets;

#define STATEMIX_EXPORT extern "C" __attribute__((visibility("default")))

// The name of instruction set `index`, slowest first; null past the end.
STATEMIX_EXPORT const char* statemix_instruction_set(int index) {
  return index < statemix::kCount ? kInstructionSets[index].name : nullptr;
}
STATEMIX_EXPORT int statemix_supported(int index) { return kInstructionSets[index].supported; }
STATEMIX_EXPORT int statemix_max_order() { return statemix::kMaxOrder; }
STATEMIX_EXPORT void statemix_forward(int index, const statemix::Problem* p) { kInstructionSets[index].forward(*p); }
STATEMIX_EXPORT void statemix_backward(int index, const statemix::Problem* p) { kInstructionSets[index].backward(*p); }
