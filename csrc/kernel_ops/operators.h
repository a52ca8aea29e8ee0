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

template <class B, class Library>
void register_operators(Library& library) {
#define DENSENET_EXT_REGISTER(function, Arguments) library.impl(#function, TORCH_BOX(&function<B>));
  DENSENET_EXT_KERNELS(DENSENET_EXT_REGISTER)
#undef DENSENET_EXT_REGISTER
  library.impl("fold_norm", TORCH_BOX(&fold_norm<B>));
}

}  // namespace densenet_ext::kernel_ops
