// From checked tensors to the CUDA kernels' argument structures.
#pragma once

#include "kernel_arguments.h"
#include "kernel_ops/arguments.h"

#ifndef DENSENET_EXT_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// Registers the operators of one file; on a simulated device, tensors on the CPU take its part.
#ifdef DENSENET_EXT_SIMT
#define DENSENET_EXT_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m)
#else
#define DENSENET_EXT_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m)
#endif

namespace densenet_ext::cuda {

// The device and the current stream of a tensor, for as long as an operator runs.
class DeviceContext final : public Context {
 public:
#ifdef DENSENET_EXT_SIMT
  explicit DeviceContext(const Tensor& like, bool tf32 = false) : like_(like) {
    allow_tf32 = tf32;
    check_device();
    simt::begin_operator();
  }
  ~DeviceContext() override { simt::end_operator(); }
#else
  explicit DeviceContext(const Tensor& like, bool tf32 = false)
      : like_(like), guard_(static_cast<int32_t>(like.get_device_index())) {
    allow_tf32 = tf32;
    check_device();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0,
                    "the device has no current stream");
  }
#endif

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
  // Each request alone, so that the simulated device sees where it ends.
  void* allocate(int64_t bytes) override {
    void* const data = new_scratch(bytes);
    simt::scratch(data, bytes);
    return data;
  }
#else
  char* next_ = nullptr;  // what is left of the piece that small requests share
  int64_t left_ = 0;

  void* allocate(int64_t bytes) override {
    constexpr int64_t kShared = 256 * 1024, kAlignment = 256;
    bytes = round_up(bytes, kAlignment);
    if (bytes > kShared / 2) return new_scratch(bytes);
    if (bytes > left_) next_ = new_scratch(kShared), left_ = kShared;
    next_ += bytes, left_ -= bytes;
    return next_ - bytes;
  }
#endif
};

// Calls body(S{}) for the storage type of `maps`.
template <class F>
void dispatch_storage(const char* name, const Tensor& maps, const F& body) {
  switch (maps.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Float16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(maps.scalar_type()));
  }
}

// Channels-last maps; those of `aligned` rows start at multiples of 16 bytes.
template <class E>
Maps<E> rows(const char* name, const Tensor& t, bool aligned = true) {
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  Maps<E> m;
  m.data = static_cast<E*>(t.data_ptr());
  m.samples = t.size(0), m.channels = t.size(1), m.height = t.size(2), m.width = t.size(3);
  // The distance of two pixels, from whichever dimension has two of them.
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
  const auto bytes = static_cast<int64_t>(sizeof(E));
  STD_TORCH_CHECK(!aligned || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 &&
                               (m.count() == 1 || m.pitch * bytes % 16 == 0)),
                  name, " must have pixels that start at multiples of 16 bytes");
  region(name, m.data, (m.count() - 1) * m.pitch + m.channels);
  return m;
}
template <class E, class F>
Maps<E> rows_like(const char* name, const Tensor& t, const Maps<F>& other) {
  check_shape(name, t, {other.samples, other.channels, other.height, other.width});
  return rows<E>(name, t);
}

// Maps with any strides.
template <class E>
StridedMaps<E> strided(const char* name, const Tensor& t) {
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  StridedMaps<E> m = {static_cast<E*>(t.data_ptr()),
                      t.size(0),
                      t.size(1),
                      t.size(2),
                      t.size(3),
                      t.stride(0),
                      t.stride(1),
                      t.stride(2),
                      t.stride(3)};
  if (t.numel() > 0) {
    int64_t last = 0;
    for (int64_t d = 0; d < 4; ++d) last += (t.size(d) - 1) * t.stride(d);
    region(name, m.data, last + 1);
  }
  return m;
}

}  // namespace densenet_ext::cuda
