// Registers every kernel op for one backend.
#pragma once

#include "append.h"
#include "bottleneck.h"
#include "conv3x3.h"
#include "fold_norm.h"
#include "head.h"
#include "squeeze_excite.h"
#include "stem.h"
#include "transition.h"

namespace densenet_ext::kernel_ops {

inline void check_same_device(const Tensor& t, const Tensor*& first) {
  if (first == nullptr) first = &t;
  check_device("every tensor", t, *first);
}
inline void check_same_device(const std::optional<Tensor>& t, const Tensor*& first) {
  if (t.has_value()) check_same_device(*t, first);
}
template <class Number>
void check_same_device(const Number&, const Tensor*&) {}

// Runs a kernel op after a check that all tensors are on one device. The dispatcher calls the CUDA
// op as soon as one tensor is on a GPU.
template <auto op>
struct OnOneDevice;
template <class... A, void (*op)(A...)>
struct OnOneDevice<op> {
  static void run(A... arguments) {
    const Tensor* first = nullptr;
    (check_same_device(arguments, first), ...);
    op(arguments...);
  }
};

template <class B, class Library>
void register_operators(Library& library) {
#define DENSENET_EXT_REGISTER(function, Arguments) \
  library.impl(#function, TORCH_BOX(&OnOneDevice<&function<B>>::run));
  DENSENET_EXT_KERNELS(DENSENET_EXT_REGISTER)
#undef DENSENET_EXT_REGISTER
  library.impl("fold_norm", TORCH_BOX(&OnOneDevice<&fold_norm<B>>::run));
}

}  // namespace densenet_ext::kernel_ops
