// Collects the kernels of this instruction set.
#include "cpu/kernel_arguments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

#define DENSENET_EXT_DECLARE(function, Arguments) \
  template <class S>                              \
  void function(const Arguments<S>&);
DENSENET_EXT_KERNELS(DENSENET_EXT_DECLARE)
#undef DENSENET_EXT_DECLARE

template <class S>
constexpr Kernels<S> kernels() {
  return {
#define DENSENET_EXT_ENTRY(function, Arguments) &function<S>,
      DENSENET_EXT_KERNELS(DENSENET_EXT_ENTRY)
#undef DENSENET_EXT_ENTRY
  };
}

const KernelSet& kernel_set() {
  static constexpr KernelSet set = {kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                                    kernels<Float16>()};
  return set;
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
