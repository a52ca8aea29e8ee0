// The kernels of machines with AMX: products on the tile unit, all the rest as AVX-512 has it.
#include "../../kernels.h"

namespace densenet_ext {
namespace amx {

#define DENSENET_EXT_TILE_KERNELS(X)         \
  X(bottleneck_forward, BottleneckForward)   \
  X(bottleneck_backward, BottleneckBackward) \
  X(conv3x3_forward, Conv3x3Forward)         \
  X(conv3x3_backward, Conv3x3Backward)

#define DENSENET_EXT_DECLARE(function, Arguments) \
  template <class S>                              \
  void function(const Arguments<S>&);
DENSENET_EXT_TILE_KERNELS(DENSENET_EXT_DECLARE)
#undef DENSENET_EXT_DECLARE

template <class S>
static Kernels<S> kernels(Kernels<S> others) {
#define DENSENET_EXT_REPLACE(function, Arguments) others.function = &function<S>;
  DENSENET_EXT_TILE_KERNELS(DENSENET_EXT_REPLACE)
#undef DENSENET_EXT_REPLACE
  return others;
}

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    const KernelTable& others = avx512::kernel_table();
    return KernelTable{kernels(others.float32), others.float64, kernels(others.bfloat16),
                       kernels(others.float16)};
  }();
  return table;
}

}  // namespace amx
}  // namespace densenet_ext
