// CUDA as a backend of the kernel ops: maps are channels last, kernels run on the current stream.
// If the device is simulated, tensors on the CPU stand for those on CUDA.
#pragma once

#include "kernel_arguments.h"
#include "kernel_ops/context.h"

#ifndef DENSENET_EXT_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace densenet_ext::kernel_ops {

// Keeps the device of a tensor and its current stream for as long as an op runs.
template <>
class Context<cuda::Cuda> final : public cuda::Context {
 public:
#ifdef DENSENET_EXT_SIMT
  explicit Context(const Tensor& like, bool tf32 = false) : like_(like) {
    allow_tf32 = tf32;
    cuda::check_device();
    simt::begin_operator();
  }
  ~Context() override { simt::end_operator(); }
#else
  explicit Context(const Tensor& like, bool tf32 = false)
      : like_(like), guard_(static_cast<int32_t>(like.get_device_index())) {
    allow_tf32 = tf32;
    cuda::check_device();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0,
                    "the device has no current stream");
  }
#endif

#define DENSENET_EXT_RUN(function, Arguments) \
  template <class S>                          \
  void run(const cuda::Arguments<S>& a) {     \
    cuda::function(a, *this);                 \
  }
  DENSENET_EXT_KERNELS(DENSENET_EXT_RUN)
#undef DENSENET_EXT_RUN
  template <class T>
  void run(const arguments::FoldNorm<T>& a) {
    cuda::fold_norm(a, *this);
  }
  // These choose between a kernel and a convolution of torch: conv3x3.cpp.
  template <class S>
  void run(const cuda::Conv3x3Forward<S>& a, const Tensor& weight);
  template <class S>
  void run(const cuda::Conv3x3Backward<S>& a, const Tensor& weight);

  template <class E>
  static cuda::Maps<E> maps(const char* name, const Tensor& t) {
    auto m = sized_maps<cuda::Maps<E>>(name, t);
    // Take the distance of two pixels from the last dimension that has two.
    m.pitch = m.width > 1     ? t.stride(3)
              : m.height > 1  ? t.stride(2)
              : m.samples > 1 ? t.stride(0)
                              : round_up(m.channels, kLanes);
    if (t.numel() == 0) return m;
    const bool dense = (m.channels == 1 || t.stride(1) == 1) && m.pitch >= m.channels &&
                       (m.width == 1 || t.stride(3) == m.pitch) &&
                       (m.height == 1 || t.stride(2) == m.width * m.pitch) &&
                       (m.samples == 1 || t.stride(0) == m.pixels() * m.pitch);
    STD_TORCH_CHECK(dense, name, " must be channels last, its pixels at one distance");
    region(name, m.data, (m.count() - 1) * m.pitch + m.channels);
    return m;
  }
  template <class E>
  static cuda::Maps<E> buffer(const char* name, const Tensor& t) {
    const cuda::Maps<E> m = maps<E>(name, t);
    const auto bytes = static_cast<int64_t>(sizeof(E));
    const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                         (m.count() == 1 || m.pitch * bytes % 16 == 0);
    STD_TORCH_CHECK(aligned || t.numel() == 0, name,
                    " must have pixels that start at multiples of 16 bytes");
    return m;
  }
  template <class E>
  static cuda::Maps<E> channels_last_maps(const char* name, const Tensor& t) {
    return maps<E>(name, t);
  }
  template <class E>
  static cuda::StridedMaps<E> outer_maps(const char* name, const Tensor& t) {
    auto m = sized_maps<cuda::StridedMaps<E>>(name, t);
    m.stride_n = t.stride(0), m.stride_c = t.stride(1);
    m.stride_h = t.stride(2), m.stride_w = t.stride(3);
    if (t.numel() > 0) {
      int64_t last = 0;
      for (int64_t d = 0; d < 4; ++d) last += (t.size(d) - 1) * t.stride(d);
      region(name, m.data, last + 1);
    }
    return m;
  }
  template <class E>
  static cuda::StridedMaps<E> copied_maps(const char* name, const Tensor& t) {
    return outer_maps<E>(name, t);
  }

 private:
  Tensor like_;
#ifndef DENSENET_EXT_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  std::vector<Tensor> scratch_;

  char* new_scratch(int64_t bytes) {
    scratch_.push_back(empty(like_, {bytes}, ScalarType::Byte));
    return static_cast<char*>(scratch_.back().data_ptr());
  }
#ifdef DENSENET_EXT_SIMT
  // Each request is a tensor of its own, so that the simulated device sees where it ends.
  void* allocate(int64_t bytes) override {
    void* const data = new_scratch(bytes);
    simt::scratch(data, bytes);
    return data;
  }
#else
  char* free_ = nullptr;  // the unused rest of the tensor that small requests share
  int64_t free_bytes_ = 0;

  void* allocate(int64_t bytes) override {
    constexpr int64_t kShared = 256 * 1024, kAlignment = 256;
    bytes = round_up(bytes, kAlignment);
    if (bytes > kShared / 2) return new_scratch(bytes);
    if (bytes > free_bytes_) free_ = new_scratch(kShared), free_bytes_ = kShared;
    free_ += bytes, free_bytes_ -= bytes;
    return free_ - bytes;
  }
#endif
};

}  // namespace densenet_ext::kernel_ops
