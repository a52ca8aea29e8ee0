// From checked tensors to the kernels' argument structures: what all devices share.
#pragma once

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "torch_stable.h"
#include "types.h"

#ifdef DENSENET_EXT_SIMT
#include "simt/regions.h"
#endif

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

// Where kernels run on a simulated device, it has to know the memory that they may read or write.
template <class E>
E* region(const char* name, E* data, int64_t elements) {
#ifdef DENSENET_EXT_SIMT
  simt::region(name, data, elements * static_cast<int64_t>(sizeof(E)), !std::is_const_v<E>);
#else
  (void)name, (void)elements;
#endif
  return data;
}

// A contiguous tensor of E of this shape.
template <class E>
E* pointer(const char* name, const Tensor& t, Shape sizes) {
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  check_shape(name, t, sizes);
  check_contiguous(name, t);
  return region(name, static_cast<E*>(t.data_ptr()), t.numel());
}
template <class E>
E* pointer(const char* name, const std::optional<Tensor>& t, Shape sizes) {
  return t.has_value() ? pointer<E>(name, *t, sizes) : nullptr;
}
// The same for weights of a 1x1 convolution, which may have two further dimensions of size 1.
template <class E>
E* matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 4 ? pointer<E>(name, t, {rows, columns, 1, 1})
                      : pointer<E>(name, t, {rows, columns});
}

template <class T>
PerChannel<T> per_channel(const char* name, const Tensor& t, int64_t samples, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == 1 || t.size(0) == samples), name,
                  " must have 1 or ", samples, " rows, got shape ", describe(t.sizes()));
  return {pointer<const T>(name, t, {t.size(0), channels}), t.size(0) == 1 ? 0 : channels};
}
template <class T>
PerChannel<T> per_channel(const char* name, const std::optional<Tensor>& t, int64_t samples,
                          int64_t channels) {
  return t.has_value() ? PerChannel<T>{pointer<const T>(name, *t, {samples, channels}), channels}
                       : PerChannel<T>{};
}
template <class T>
ScaleShiftTable<T> norm_table(const Tensor& scale, const Tensor& shift, int64_t samples,
                              int64_t channels) {
  return {per_channel<T>("scale", scale, samples, channels),
          per_channel<T>("shift", shift, samples, channels)};
}
template <class T>
Norm<T> norm(const Tensor& weight, const Tensor& mean, const Tensor& var, double eps, bool training,
             int64_t channels) {
  return {pointer<const T>("norm_weight", weight, {channels}),
          pointer<const T>("batch_mean", mean, {channels}),
          pointer<const T>("batch_var", var, {channels}), eps, training};
}
template <class T, class M>
Coefficients<T> coefficients(const Tensor& coef, const M& features) {
  return {pointer<T>("coef", coef, {3, features.samples, features.channels}), features.samples,
          features.channels};
}
template <class T, class M>
Moments<T> moments(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                   const M& features) {
  const Sizes sizes = {features.samples, features.channels};
  return {pointer<T>("mean", mean, sizes), pointer<T>("m2", m2, sizes), features.channels};
}
template <class M>
void check_range(const char* name, const M& m, int64_t offset, int64_t channels) {
  STD_TORCH_CHECK(offset >= 0 && channels >= 0 && offset + channels <= m.channels, name,
                  ": channels ", offset, " to ", offset + channels, " of ", m.channels);
}

}  // namespace densenet_ext
