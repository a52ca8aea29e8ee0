// The history of every byte that kernels may touch, and the checks of every access.
#pragma once

#include "history.h"

namespace simt {

enum class Space { kAny, kShared, kGlobal };

// Checks one access by `thread` and remembers it. Does not return if the access must not happen.
void access(Thread& thread, const void* address, int64_t bytes, Access kind, uintptr_t pc);
[[noreturn]] void misaligned(Thread& thread, const void* address, int64_t bytes, uintptr_t pc);
// Checks an access that has to be aligned to its size.
inline void require_aligned(Thread& thread, const void* address, int64_t bytes, uintptr_t pc) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0) return;
  misaligned(thread, address, bytes, pc);
}
// Checks an access of 16 bytes in a certain memory.
void require(Thread& thread, const void* address, Space space, uintptr_t pc);

// Record that a cp.async has been issued, and that it has been waited for.
void copy_begins(Thread& thread, const Copy& copy);
void copy_ends(Thread& thread, const Copy& copy, uintptr_t wait_pc);

// Advance the clock: accesses after this call come after all earlier ones of the block's threads.
void next_barrier();
void next_block();
void begin_launch();

}  // namespace simt
