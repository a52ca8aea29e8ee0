// Collects the kernels of machines with AMX: those of a dense layer use it for their products, the
// others are the AVX-512 kernels.
#include <type_traits>

#include "cpu/kernel_arguments.h"

namespace densenet_ext {
namespace amx {

template <class S>
void bottleneck_forward(const BottleneckForward<S>&);
template <class S>
void bottleneck_backward(const BottleneckBackward<S>&);
template <class S>
void conv3x3_forward(const Conv3x3Forward<S>&);
void conv3x3_backward(const Conv3x3Backward<BFloat16>&);

template <class S>
static Kernels<S> kernels(Kernels<S> others) {
  others.bottleneck_forward = &bottleneck_forward<S>;
  others.bottleneck_backward = &bottleneck_backward<S>;
  others.conv3x3_forward = &conv3x3_forward<S>;
  // With three parts, AMX would take longer than vectors do with two thirds of the products.
  if constexpr (std::is_same_v<S, BFloat16>) others.conv3x3_backward = &conv3x3_backward;
  return others;
}

const KernelSet& kernel_set() {
  static const KernelSet set = [] {
    const KernelSet& others = avx512::kernel_set();
    return KernelSet{kernels(others.float32), others.float64, kernels(others.bfloat16),
                     kernels(others.float16)};
  }();
  return set;
}

}  // namespace amx
}  // namespace densenet_ext
