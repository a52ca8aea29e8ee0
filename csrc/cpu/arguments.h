// From checked tensors to the kernels' argument structures.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../tensor.h"
#include "dispatch.h"

namespace densenet_ext {

template <class E>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type_of<BFloat16>() {
  return ScalarType::BFloat16;
}
template <>
constexpr ScalarType scalar_type_of<Float16>() {
  return ScalarType::Half;
}
template <>
constexpr ScalarType scalar_type_of<bool>() {
  return ScalarType::Bool;
}

// Calls body(S{}, kernels of S) for the storage type of `maps`.
template <class F>
void dispatch_storage(const char* name, const Tensor& maps, const F& body) {
  const KernelTable& table = cpu_kernels();
  switch (maps.scalar_type()) {
    case ScalarType::Float:
      return body(float{}, table.float32);
    case ScalarType::Double:
      return body(double{}, table.float64);
    case ScalarType::BFloat16:
      return body(BFloat16{}, table.bfloat16);
    case ScalarType::Half:
      return body(Float16{}, table.float16);
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(maps.scalar_type()));
  }
}

// A contiguous tensor of E of this shape.
template <class E>
E* pointer(const char* name, const Tensor& t, const Sizes& sizes) {
  check_type(name, t, scalar_type_of<E>());
  check_shape(name, t, sizes);
  check_contiguous(name, t);
  return static_cast<E*>(t.data_ptr());
}
template <class E>
E* pointer(const char* name, const std::optional<Tensor>& t, const Sizes& sizes) {
  return t.has_value() ? pointer<E>(name, *t, sizes) : nullptr;
}
// The same for weights of a 1x1 convolution, which may have two further dimensions of size 1.
template <class E>
const E* matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 4 ? pointer<E>(name, t, {rows, columns, 1, 1})
                      : pointer<E>(name, t, {rows, columns});
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
template <class E, class F>
Maps<E> maps_like(const char* name, const Tensor& t, const Maps<F>& other) {
  const Maps<E> m = maps<E>(name, t);
  check_shape(name, t, {other.samples, other.channels, other.height, other.width});
  return m;
}
template <class E>
void check_range(const char* name, const Maps<E>& m, int64_t offset, int64_t channels) {
  STD_TORCH_CHECK(offset >= 0 && channels >= 0 && offset + channels <= m.channels, name,
                  ": channels ", offset, " to ", offset + channels, " of ", m.channels);
}

template <class T>
PerChannel<T> per_channel(const char* name, const Tensor& t, int64_t samples, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == 1 || t.size(0) == samples), name,
                  " must have 1 or ", samples, " rows, got shape ", describe(sizes_of(t)));
  return {pointer<T>(name, t, {t.size(0), channels}), t.size(0) == 1 ? 0 : channels};
}
template <class T>
PerChannel<T> per_channel(const char* name, const std::optional<Tensor>& t, int64_t samples,
                          int64_t channels) {
  return t.has_value() ? PerChannel<T>{pointer<T>(name, *t, {samples, channels}), channels}
                       : PerChannel<T>{};
}
template <class T>
NormTable<T> norm_table(const Tensor& scale, const Tensor& shift, int64_t samples,
                        int64_t channels) {
  return {per_channel<T>("scale", scale, samples, channels),
          per_channel<T>("shift", shift, samples, channels)};
}
template <class T>
Norm<T> norm(const Tensor& weight, const Tensor& mean, const Tensor& var, double eps, bool training,
             int64_t channels) {
  return {pointer<T>("norm_weight", weight, {channels}), pointer<T>("batch_mean", mean, {channels}),
          pointer<T>("batch_var", var, {channels}), eps, training};
}
template <class T, class E>
Coefficients<T> coefficients(const Tensor& coef, const Maps<E>& features) {
  return {pointer<T>("coef", coef, {3, features.samples, features.channels}), features.samples,
          features.channels};
}
template <class T, class E>
Moments<T> moments(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                   const Maps<E>& features) {
  const Sizes sizes = {features.samples, features.channels};
  return {pointer<T>("mean", mean, sizes), pointer<T>("m2", m2, sizes), features.channels};
}
template <class E>
int64_t rows_of(const Maps<E>& m) {
  return m.samples * m.pixels();
}

}  // namespace densenet_ext
