#include "parallel.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../workspace.h"

namespace densenet_ext {

using torch::stable::Tensor;

Scratch::Scratch(int64_t bytes) : data_(allocate_block(bytes)) {
  if (data_) return;
  constexpr int64_t alignment = 64;  // torch's CPU allocator gives at least this
  auto* tensor =
      new Tensor(torch::stable::empty({bytes + alignment}, torch::headeronly::ScalarType::Byte));
  tensor_ = tensor;
  const auto address = reinterpret_cast<uintptr_t>(tensor->mutable_data_ptr());
  data_ = reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
}

Scratch::~Scratch() {
  if (tensor_) {
    delete static_cast<Tensor*>(tensor_);
  } else {
    free_block(data_);
  }
}

int64_t thread_count(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(items, torch::stable::get_num_threads()));
}

void parallel_threads(int64_t items, int64_t threads, ThreadBody body, void* context) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      body(context, t, items * t / threads, items * (t + 1) / threads);
  });
}

}  // namespace densenet_ext
