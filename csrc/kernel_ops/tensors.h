// From tensors to the arguments of kernels: each function checks a tensor, names it in the error if
// it is wrong, and returns pointers and sizes.
#pragma once

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

// Tells a simulated device that its kernels may read, or write, this memory.
template <class E>
E* region(const char* name, E* data, int64_t elements) {
#ifdef DENSENET_EXT_SIMT
  simt::region(name, data, elements * static_cast<int64_t>(sizeof(E)), !std::is_const_v<E>);
#else
  (void)name, (void)elements;
#endif
  return data;
}

// Checks that the tensor is contiguous, of type E and of this shape.
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

inline void check_dimensions(const char* name, const Tensor& t, int64_t dimensions) {
  STD_TORCH_CHECK(t.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ",
                  t.dim());
}

// A matrix may be the weight of a 1x1 convolution, with two further dimensions of size 1.
inline void check_matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 4, name, " must have 2 or 4 dimensions, got ",
                  t.dim());
}
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
ScaleShiftTable<T> scale_shift_table(const Tensor& scale, const Tensor& shift, int64_t samples,
                                     int64_t channels) {
  return {per_channel<T>("scale", scale, samples, channels),
          per_channel<T>("shift", shift, samples, channels)};
}
// No mask precedes or follows the norm, so all samples share one row.
template <class T>
ScaleShiftTable<T> shared_scale_shift(const Tensor& scale, const Tensor& shift, int64_t channels) {
  return {{pointer<const T>("scale", scale, {1, channels}), 0},
          {pointer<const T>("shift", shift, {1, channels}), 0}};
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

// Checks that both moments are wanted or neither.
inline void check_moments(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2) {
  STD_TORCH_CHECK(mean.has_value() == m2.has_value(),
                  "mean and m2 must both be tensors or both be None");
}
template <class T, class M>
Moments<T> moments(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                   const M& features) {
  check_moments(mean, m2);
  const Sizes sizes = {features.samples, features.channels};
  return {pointer<T>("mean", mean, sizes), pointer<T>("m2", m2, sizes), features.channels};
}

template <class M>
void check_range(const char* name, const M& m, int64_t offset, int64_t channels) {
  STD_TORCH_CHECK(offset >= 0 && channels >= 0 && offset + channels <= m.channels, name,
                  ": channels ", offset, " to ", offset + channels, " of ", m.channels);
}

template <class M>
int64_t rows_of(const M& m) {
  return m.samples * m.height * m.width;
}

// Fills in all fields but the strides, which differ from backend to backend.
template <class M>
M sized_maps(const char* name, const Tensor& t) {
  using E = std::remove_pointer_t<decltype(M::data)>;
  check_type(name, t, scalar_type_of<std::remove_const_t<E>>());
  check_dimensions(name, t, 4);
  M m;
  m.data = static_cast<E*>(t.data_ptr());
  m.samples = t.size(0), m.channels = t.size(1), m.height = t.size(2), m.width = t.size(3);
  return m;
}

}  // namespace densenet_ext
