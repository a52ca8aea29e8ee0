// ThreadSanitizer's hooks: the compiler puts a call before every load and store of the kernels.
#include "block.h"
#include "shadow.h"

namespace {

// Local variables belong to one thread, and the host's code may access anything.
inline bool is_watched(const void* address) {
  return simt::state.current &&
         reinterpret_cast<uintptr_t>(address) - simt::state.stack >= simt::Fiber::kStack;
}

template <int64_t bytes, simt::Access kind, bool aligned>
inline void hook(const void* address, uintptr_t pc) {
  if (!is_watched(address)) return;
  simt::Thread& self = *simt::state.current;
  if (aligned) simt::require_aligned(self, address, bytes, pc);
  if (simt::kHooked &&
      simt::usual_access<bytes, kind>(self, reinterpret_cast<uintptr_t>(address), pc)) {
    return;
  }
  simt::access(self, address, bytes, kind, pc);
}
void hook_range(const void* address, unsigned long bytes, simt::Access kind, uintptr_t pc) {
  if (!is_watched(address) || bytes == 0) return;
  simt::access(*simt::state.current, address, static_cast<int64_t>(bytes), kind, pc);
}

}  // namespace

using simt::Access;

extern "C" {

#define SIMT_HOOKS(bytes)                                                                      \
  void __tsan_read##bytes(const void* a) { hook<bytes, Access::kRead, true>(a, SIMT_CALLER); } \
  void __tsan_write##bytes(const void* a) { hook<bytes, Access::kWrite, true>(a, SIMT_CALLER); }

// These serve types whose alignment is less than their size: a GPU takes such a value apart.
#define SIMT_UNALIGNED_HOOKS(bytes)                     \
  void __tsan_unaligned_read##bytes(const void* a) {    \
    hook<bytes, Access::kRead, false>(a, SIMT_CALLER);  \
  }                                                     \
  void __tsan_unaligned_write##bytes(const void* a) {   \
    hook<bytes, Access::kWrite, false>(a, SIMT_CALLER); \
  }

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_UNALIGNED_HOOKS(2)
SIMT_UNALIGNED_HOOKS(4)
SIMT_UNALIGNED_HOOKS(8)
SIMT_UNALIGNED_HOOKS(16)

void __tsan_read_range(const void* a, unsigned long bytes) {
  hook_range(a, bytes, Access::kRead, SIMT_CALLER);
}
void __tsan_write_range(const void* a, unsigned long bytes) {
  hook_range(a, bytes, Access::kWrite, SIMT_CALLER);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// The host's code in these files calls these two to guard its static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* a, int) {
  return __atomic_load_n(a, __ATOMIC_SEQ_CST);
}
void __tsan_atomic8_store(volatile unsigned char* a, unsigned char v, int) {
  __atomic_store_n(a, v, __ATOMIC_SEQ_CST);
}

}  // extern "C"
