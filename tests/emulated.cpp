// Runs the kernels for tests/emulated.py, in a process of its own and perhaps for another processor: a call comes in on the
// standard input, with the memory that it points to, and what became of that memory goes out.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using Kernel = int64_t(int instruction_set, const void* call);
extern "C" {
Kernel statemix_scan_forward, statemix_scan_backward, statemix_layer_forward, statemix_layer_backward, statemix_layer_step,
    statemix_pair_step, statemix_model_step, statemix_gated;
int statemix_vector_bytes(int instruction_set);
}
// FUNCTIONS of statemix/kernels/library.py
static Kernel* const kKernels[] = {statemix_scan_forward, statemix_scan_backward, statemix_layer_forward, statemix_layer_backward,
                                   statemix_layer_step,   statemix_pair_step,     statemix_model_step,    statemix_gated};

static void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::exit(0);  // the other end has closed
}
static void write(const void* from, size_t bytes) {
  if (bytes && std::fwrite(from, bytes, 1, stdout) != 1) std::exit(1);
}
static int64_t number() {
  int64_t x;
  read(&x, sizeof x);
  return x;
}

int main() {
  const int64_t vector_bytes = statemix_vector_bytes(0);
  write(&vector_bytes, sizeof vector_bytes);
  for (;;) {
    std::fflush(stdout);
    const int64_t kernel = number(), call_bytes = number(), pointers = number(), memory_bytes = number();
    std::vector<char> call(call_bytes);
    read(call.data(), call.size());
    char* const memory = (char*)std::aligned_alloc(64, (memory_bytes + 64) / 64 * 64);
    for (int64_t i = 0; i < pointers; ++i) {
      const int64_t field = number(), place = number();
      char* const at = memory + place;
      std::memcpy(&call[field], &at, sizeof at);
    }
    read(memory, memory_bytes);
    const int64_t status = kKernels[kernel](0, call.data());
    write(&status, sizeof status);
    write(memory, memory_bytes);
    std::free(memory);
  }
}
