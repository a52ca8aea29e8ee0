// Coroutines, each with its own stack. A switch takes a few nanoseconds.
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

  // Starts entry(), which must never return, and drops whatever ran on this stack.
  void start(void (*entry)());
  // resume() switches from the caller's stack to this one, suspend() back.
  void resume();
  void suspend();
  // Tells AddressSanitizer that this stack was left for good.
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
