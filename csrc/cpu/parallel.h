// Threads and scratch memory for the kernels. The threads are torch's: its library has a
// parallel_for, so this one needs no OpenMP. Large scratch comes from the arena, because malloc
// would return it to the system after every call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace densenet_ext {

// Uninitialized memory, 64-byte aligned, freed at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class E>
  E* as() const {
    return static_cast<E*>(data_);
  }

 private:
  void* data_;
  bool in_arena_;
};

// Waking a thread to copy or add values is worth it from this number of values on.
constexpr int64_t kWorthAThread = 16384;

// The number of threads worth using for `items` items of work of at least `values` values each.
int64_t thread_count(int64_t items, int64_t values = kWorthAThread);

using ThreadBody = void (*)(void* context, int64_t thread, int64_t begin, int64_t end);
void parallel_threads(int64_t items, int64_t threads, ThreadBody body, void* context);

// Calls body(thread, begin, end) on `threads` threads. Each thread gets one contiguous range of the
// items, the same at every call: sums that are kept per thread and merged in order are bit-equal
// from run to run.
template <class F>
void parallel(int64_t items, int64_t threads, const F& body) {
  parallel_threads(
      items, threads,
      [](void* context, int64_t thread, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(thread, begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace densenet_ext
