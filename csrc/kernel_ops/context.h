// A kernel op is a function template of this folder: it checks its tensors, fills the argument
// structure of its kernel and runs it. Its formula is in the docstring of its twin in
// densenet_ext/reference. Its parameter B is the backend, Cpu or cuda::Cuda, which specializes
// Context. An object of that class lives as long as the op runs:
//
//   Context(like, allow_tf32)  enters the device of tensor `like`
//   run(arguments)             calls the kernel of these arguments
//   run(arguments, weight)     also takes the weight as a tensor, for a 3x3 convolution by torch
//
// Its static functions check the layout of maps, which differs between backends:
//
//   buffer<E>(name, t)              a feature or gradient buffer
//   maps<E>(name, t)                the stem's output and its gradient, which need not be aligned
//   channels_last_maps<E>(name, t)  channels-last maps without gaps; the caller has checked that
//   outer_maps<E>(name, t)          the transition's output and its gradient
//   copied_maps<E>(name, t)         maps that are only copied into a buffer or out of it
#pragma once

#include "kernel_arguments.h"
#include "tensors.h"

namespace densenet_ext::kernel_ops {

template <class B>
class Context;

template <class B, class E>
auto buffer(const char* name, const Tensor& t) {
  return Context<B>::template buffer<E>(name, t);
}
// Checks that the shape is that of `other`, too.
template <class B, class E, class M>
auto buffer_like(const char* name, const Tensor& t, const M& other) {
  check_shape(name, t, {other.samples, other.channels, other.height, other.width});
  return buffer<B, E>(name, t);
}

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

}  // namespace densenet_ext::kernel_ops
