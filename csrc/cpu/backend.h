// The CPU as a backend of the kernel ops: maps are planar, and kernels are those of the instruction
// set in use.
#pragma once

#include "dispatch.h"
#include "kernel_ops/context.h"

namespace densenet_ext {

template <class T>
void fold_norm(const arguments::FoldNorm<T>& arguments);

inline const Kernels<float>& kernels_of(float) { return cpu_kernels().float32; }
inline const Kernels<double>& kernels_of(double) { return cpu_kernels().float64; }
inline const Kernels<BFloat16>& kernels_of(BFloat16) { return cpu_kernels().bfloat16; }
inline const Kernels<Float16>& kernels_of(Float16) { return cpu_kernels().float16; }

namespace kernel_ops {

template <>
class Context<Cpu> {
 public:
  explicit Context(const Tensor& /*like*/, bool /*allow_tf32*/ = false) {}

#define DENSENET_EXT_RUN(function, Arguments) \
  template <class S>                          \
  void run(const Arguments<S>& a) {           \
    kernels_of(S{}).function(a);              \
  }
  DENSENET_EXT_KERNELS(DENSENET_EXT_RUN)
#undef DENSENET_EXT_RUN
  template <class T>
  void run(const arguments::FoldNorm<T>& a) {
    densenet_ext::fold_norm(a);
  }
  template <class A>
  void run(const A& a, const Tensor& /*weight*/) {
    run(a);
  }

  template <class E>
  static Maps<E> maps(const char* name, const Tensor& t) {
    Maps<E> m = sized_maps<Maps<E>>(name, t);
    m.sample_stride = t.stride(0), m.plane_stride = t.stride(1);
    const bool planar =
        (m.width <= 1 || t.stride(3) == 1) && (m.height <= 1 || t.stride(2) == m.width);
    STD_TORCH_CHECK(planar || t.numel() == 0, name, " must have contiguous planes");
    return m;
  }
  template <class E>
  static Maps<E> buffer(const char* name, const Tensor& t) {
    return maps<E>(name, t);
  }
  template <class E>
  static Maps<E> outer_maps(const char* name, const Tensor& t) {
    return maps<E>(name, t);
  }
  template <class E>
  static Maps<E> channels_last_maps(const char* name, const Tensor& t) {
    Maps<E> m = sized_maps<Maps<E>>(name, t);
    m.channels_last = true;
    return m;
  }
  template <class E>
  static Maps<E> copied_maps(const char* name, const Tensor& t) {
    const bool channels_last = t.dim() == 4 && is_dense_channels_last(t) && !t.is_contiguous();
    return channels_last ? channels_last_maps<E>(name, t) : maps<E>(name, t);
  }
};

}  // namespace kernel_ops
}  // namespace densenet_ext
