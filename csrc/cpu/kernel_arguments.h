// Defines the CPU kernels as plain C++: their feature maps, and the set of kernels of one
// instruction set.
//
// csrc/cpu/kernels/ is compiled once per instruction set and knows nothing of torch: the kernel ops
// check tensors, fill the structures of kernel_ops/kernel_arguments.h and call the set that
// dispatch.cpp chose. Threads and scratch memory come in through parallel.h.
#pragma once

#include "kernel_ops/kernel_arguments.h"

namespace densenet_ext {

// Feature maps [samples, channels, height, width]. Planar maps have contiguous planes; planes and
// samples may be padded. In channels-last maps the channels of a pixel are contiguous, and nothing
// is padded.
template <class E>
struct Maps {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t sample_stride = 0, plane_stride = 0;
  bool channels_last = false;

  int64_t pixels() const { return height * width; }
  E* plane(int64_t n, int64_t c) const { return data + n * sample_stride + c * plane_stride; }
  E* pixel(int64_t n, int64_t p) const { return data + (n * pixels() + p) * channels; }
};

// The backend of the argument structures. Maps inside and outside a stage are of the same kind.
struct Cpu {
  template <class E>
  using Maps = densenet_ext::Maps<E>;
  template <class E>
  using OuterMaps = densenet_ext::Maps<E>;
  template <class S>
  using Gradient = Arithmetic<S>;
};

#define DENSENET_EXT_ALIAS(function, Arguments) \
  template <class S>                            \
  using Arguments = arguments::Arguments<Cpu, S>;
DENSENET_EXT_KERNELS(DENSENET_EXT_ALIAS)
#undef DENSENET_EXT_ALIAS

// Holds the kernels of one instruction set for one storage type.
template <class S>
struct Kernels {
#define DENSENET_EXT_FIELD(function, Arguments) void (*function)(const Arguments<S>&);
  DENSENET_EXT_KERNELS(DENSENET_EXT_FIELD)
#undef DENSENET_EXT_FIELD
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
};

// kernels/kernel_set.cpp defines each of these, compiled with the flags of that instruction set.
namespace baseline {
const KernelSet& kernel_set();
}
namespace avx2 {
const KernelSet& kernel_set();
}
namespace avx512 {
const KernelSet& kernel_set();
}
namespace amx {  // defined in kernels/amx/kernel_set.cpp, if the compiler knows AMX
const KernelSet& kernel_set();
}

}  // namespace densenet_ext
