// Coroutines with stacks of their own: a switch costs a few nanoseconds.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef SIMT_ASSEMBLY
#if defined(__x86_64__) && defined(__linux__)
#define SIMT_ASSEMBLY 1
#else
#define SIMT_ASSEMBLY 0
#endif
#endif
#if !SIMT_ASSEMBLY
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStack = 128 * 1024;

  // (Re)starts at entry(), which must never return; what ran here before is dropped.
  void start(void (*entry)());
  // Switches from the caller's own stack to this one, and back.
  void resume();
  void suspend();
  // Forgets what AddressSanitizer knows of a stack that was left in the middle.
  void abandon();

  uintptr_t stack() const { return reinterpret_cast<uintptr_t>(stack_); }

 private:
  char* stack_ = nullptr;
#if SIMT_ASSEMBLY
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace simt
