// All kernels of one instruction set: CMakeLists.txt compiles this file once for each.
#include "gated.h"
#include "layer.h"
#include "scans.h"
#include "step.h"

namespace statemix {

extern const Kernels STATEMIX_KERNELS = {
    STATEMIX_VECTOR_BYTES, scan_forward, scan_backward, layer_forward, layer_backward, layer_step, pair_step, model_step, gated};

}  // namespace statemix
