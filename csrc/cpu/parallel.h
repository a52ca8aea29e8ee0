// Threads and scratch memory for the kernels. The threads are torch's: its library has a
// parallel_for, so this one needs no OpenMP. Large scratch comes from the arena, because malloc
// would return it to the system after every call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tuning.h"
#include "types.h"

namespace densenet_ext {

// Owns uninitialized memory, 64-byte aligned, until the end of the scope.
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

// Hands out arrays from one block of memory, at multiples of 64 bytes; without one, counts bytes.
class Carver {
 public:
  explicit Carver(char* memory = nullptr) : memory_(memory) {}

  template <class E>
  E* take(int64_t count) {
    char* const array = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(array);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Makes copies of a worker, which runs a kernel on one thread and has take_memory(carver).
template <class W>
class Workers {
 public:
  Workers(const W& worker, int64_t threads)
      : worker_(worker), bytes_(count_bytes(worker)), memory_(threads * bytes_) {}

  W operator[](int64_t thread) const {
    W worker = worker_;
    Carver carver(memory_.as<char>() + thread * bytes_);
    worker.take_memory(carver);
    return worker;
  }

 private:
  static int64_t count_bytes(W worker) {
    Carver carver;
    worker.take_memory(carver);
    return carver.bytes();
  }

  W worker_;
  int64_t bytes_;  // of one worker
  Scratch memory_;
};

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

// Calls body(begin, end) likewise, for items of `values` values each.
template <class F>
void parallel_items(int64_t items, int64_t values, const F& body) {
  parallel(items, thread_count(items, values),
           [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace densenet_ext
