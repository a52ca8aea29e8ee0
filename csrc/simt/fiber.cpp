#include "fiber.h"

#include <sys/mman.h>

#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if SIMT_ASSEMBLY
extern "C" void simt_switch(void** save, void* load);
// Pushes the registers that a function must preserve, then exchanges the stacks.
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kGuard = 4096;

#if SIMT_ASSEMBLY
void* main_top;
#else
ucontext_t main_context;
#endif

// AddressSanitizer has to be told on which stack the program runs.
#ifdef __SANITIZE_ADDRESS__
const void* main_stack;
size_t main_size;
void* main_fake;
void leave_main(const void* stack) {
  __sanitizer_start_switch_fiber(&main_fake, stack, Fiber::kStack);
}
void back_in_main() { __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr); }
void in_fiber(void* fake) { __sanitizer_finish_switch_fiber(fake, &main_stack, &main_size); }
void leave_fiber(void** fake) { __sanitizer_start_switch_fiber(fake, main_stack, main_size); }
#else
void leave_main(const void*) {}
void back_in_main() {}
void in_fiber(void*) {}
void leave_fiber(void**) {}
#endif

void (*next_entry)();
void first() {
  in_fiber(nullptr);
  next_entry();
}

}  // namespace

void Fiber::start(void (*entry)()) {
  next_entry = entry;
  if (!stack_) {
    void* const memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    stack_ = static_cast<char*>(memory) + kGuard;
  }
#if SIMT_ASSEMBLY
  // The frame has six registers and a return address. At a function's entry the stack pointer has
  // to be 8 bytes off a multiple of 16.
  void** const frame = reinterpret_cast<void**>(stack_ + kStack - 16) - 6;
  frame[6] = reinterpret_cast<void*>(first);
  frame[7] = nullptr;
  top_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, first, 0);
#endif
}

void Fiber::resume() {
  leave_main(stack_);
#if SIMT_ASSEMBLY
  simt_switch(&main_top, top_);
#else
  swapcontext(&main_context, &context_);
#endif
  back_in_main();
}

void Fiber::suspend() {
  void* fake = nullptr;
  leave_fiber(&fake);
#if SIMT_ASSEMBLY
  simt_switch(&top_, main_top);
#else
  swapcontext(&context_, &main_context);
#endif
  in_fiber(fake);
}

void Fiber::abandon() {
#ifdef __SANITIZE_ADDRESS__
  if (stack_) __asan_unpoison_memory_region(stack_, kStack);
#endif
}

}  // namespace simt
