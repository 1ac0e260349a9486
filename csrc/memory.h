// Room for the kernels: buffers of a thread that outlive a call, and large pages for large results.
#pragma once
#include "interface.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace statemix {
namespace {

constexpr size_t kLargePage = size_t(1) << 21;

enum Slot { kScan, kWeights, kCarry, kProgress, kPacked, kChunk, kTable, kSums, kStep, kNormed, kSlots };

// A fresh tensor of many megabytes costs a page fault for every 4 KiB at its first touch; in pages of 2 MiB it does not.
inline void use_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = kLargePage;
  const uintptr_t begin = (uintptr_t(data) + page - 1) & ~(page - 1), end = (uintptr_t(data) + bytes) & ~(page - 1);
  if (data && begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
}

// Memory of this thread, at least `bytes`, aligned to 64: the same at every call until it must grow. Large pages, because
// the products walk down its columns, a page for every few steps. Throws NoMemory.
inline void* scratch(Slot slot, size_t bytes) {
  struct Held {
    void* data = nullptr;
    size_t size = 0;
    std::align_val_t align() const { return std::align_val_t(size < kLargePage / 8 ? 64 : kLargePage); }
    void release() { ::operator delete(data, align()); }
    ~Held() { release(); }
  };
  thread_local Held held[kSlots];
  Held& it = held[slot];
  if (it.size < bytes) {
    it.release();
    it.data = nullptr, it.size = 0;
    it.size = bytes < kLargePage / 8 ? bytes : (bytes + kLargePage - 1) / kLargePage * kLargePage;
    it.data = ::operator new(it.size, it.align(), std::nothrow);
    if (!it.data) it.size = 0;
    if (!it.data) throw NoMemory{bytes};
    use_large_pages(it.data, it.size);
  }
  return it.data;
}

constexpr size_t kLine = 64;  // of a cache: two threads that write to the same one wait for each other

inline size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Memory of this thread for each thread of a team, `bytes` and more.
class Rooms {
 public:
  Rooms(Slot slot, int64_t threads, size_t bytes) : size(whole_lines(bytes)), data((char*)scratch(slot, threads * size)) {}
  char* of(int64_t thread) const { return data + thread * size; }

 private:
  size_t size;
  char* data;
};

}  // namespace
}  // namespace statemix
