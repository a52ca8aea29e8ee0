// From checked tensors to the CPU kernels' argument structures.
#pragma once

#include "dispatch.h"
#include "kernel_ops/arguments.h"

namespace densenet_ext {

// Calls body(S{}, kernels of S) for the storage type of `maps`.
template <class F>
void dispatch_storage(const char* name, const Tensor& maps, const F& body) {
  const KernelSet& set = cpu_kernels();
  switch (maps.scalar_type()) {
    case ScalarType::Float:
      return body(float{}, set.float32);
    case ScalarType::Double:
      return body(double{}, set.float64);
    case ScalarType::BFloat16:
      return body(BFloat16{}, set.bfloat16);
    case ScalarType::Half:
      return body(Float16{}, set.float16);
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(maps.scalar_type()));
  }
}

template <class E>
Maps<E> maps(const char* name, const Tensor& t) {
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  Maps<E> m;
  m.data = static_cast<E*>(t.data_ptr());
  m.samples = t.size(0), m.channels = t.size(1), m.height = t.size(2), m.width = t.size(3);
  m.sample_stride = t.stride(0), m.plane_stride = t.stride(1);
  const bool planar =
      (m.width <= 1 || t.stride(3) == 1) && (m.height <= 1 || t.stride(2) == m.width);
  STD_TORCH_CHECK(planar || t.numel() == 0, name, " must have contiguous planes");
  return m;
}
template <class E>
Maps<E> channels_last_maps(const char* name, const Tensor& t) {
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions, got ", t.dim());
  STD_TORCH_CHECK(is_dense_channels_last(t), name, " must be channels last without gaps");
  return {static_cast<E*>(t.data_ptr()), t.size(0), t.size(1), t.size(2), t.size(3), 0, 0, true};
}
// Channels last where that is how the tensor lies, else planar.
template <class E>
Maps<E> maps_of_either_layout(const char* name, const Tensor& t) {
  return t.dim() == 4 && is_dense_channels_last(t) && !t.is_contiguous()
             ? channels_last_maps<E>(name, t)
             : maps<E>(name, t);
}
template <class E, class F>
Maps<E> maps_like(const char* name, const Tensor& t, const Maps<F>& other) {
  const Maps<E> m = maps<E>(name, t);
  check_shape(name, t, {other.samples, other.channels, other.height, other.width});
  return m;
}
template <class E>
int64_t rows_of(const Maps<E>& m) {
  return m.samples * m.pixels();
}

}  // namespace densenet_ext
