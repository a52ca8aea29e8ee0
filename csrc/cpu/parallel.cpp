#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <new>

#include "stage/workspace.h"

namespace densenet_ext {

constexpr std::align_val_t kCacheLine{64};

Scratch::Scratch(int64_t bytes) : data_(allocate_block(bytes)), in_arena_(data_) {
  if (!in_arena_) data_ = ::operator new(static_cast<size_t>(bytes), kCacheLine);
}

Scratch::~Scratch() {
  if (in_arena_) {
    free_block(data_);
  } else {
    ::operator delete(data_, kCacheLine);
  }
}

int64_t thread_count(int64_t items, int64_t values) {
  const int64_t worth = std::min(items, items * values / kWorthAThread);
  return std::max<int64_t>(1, std::min<int64_t>(worth, torch::stable::get_num_threads()));
}

void parallel_threads(int64_t items, int64_t threads, ThreadBody body, void* context) {
  if (items <= 0 || is_rehearsing()) return;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      body(context, t, items * t / threads, items * (t + 1) / threads);
  });
}

}  // namespace densenet_ext
