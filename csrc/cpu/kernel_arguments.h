// The CPU kernels as plain C++: argument structures and the table of one instruction set.
//
// csrc/cpu/kernels/ is compiled once per instruction set and knows nothing of torch; csrc/cpu/*.cpp
// checks tensors, fills these structures and calls the table that dispatch.cpp chose. Threads and
// scratch memory come in through parallel.h.
#pragma once

#include "types.h"

namespace densenet_ext {

// Feature maps [samples, channels, height, width], planar unless said otherwise: the pixels of a
// plane are contiguous, planes and samples may be padded. Of channels-last maps the channels of a
// pixel are contiguous, and nothing is padded.
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

template <class S>
struct Append {
  using T = Arithmetic<S>;
  Maps<const S> x;  // planar or channels last
  Maps<S> features;
  int64_t offset;
  Moments<T> moments;
};

template <class S>
struct FinishGradient {
  using T = Arithmetic<S>;
  Maps<const S> features;
  Maps<const T> grad;
  Coefficients<T> coef;
  int64_t offset;
  Maps<S> out;  // planar or channels last
};

template <class S>
struct BottleneckForward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> norm;
  const T* weight;  // [width, channels]
  int64_t channels, width;
  S* bottleneck;  // [M, round_up(width, kLanes)]
  T* mean;        // [width], over all M rows; null when not wanted
  T* m2;
};

template <class S>
struct BottleneckBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> table;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [width, channels]
  int64_t channels, width;
  const T* dv;        // [M, round_up(width, kLanes)]
  S* bottleneck;      // the same shape; at the end that of `earlier`
  const T* db_table;  // [3, width]: db = t0*dv + t1 + t2*b
  Norm<T> norm;
  Maps<const T> grad_in;  // data null: the gradient starts here
  Maps<T> grad;
  Coefficients<T> coef;
  T* dweight;  // [width, channels]
  T* dnorm_weight;
  T* dnorm_bias;
  BottleneckForward<S> earlier;  // weight null: none; without moments
};

template <class S>
struct Conv3x3Forward {
  using T = Arithmetic<S>;
  const S* bottleneck;
  ScaleShiftTable<T> norm;
  const T* weight;  // [growth, width, 3, 3]
  int64_t growth, width;
  const bool* dropout_mask;  // [samples, growth, height, width] or null
  double dropout_scale;
  Maps<S> features;
  int64_t offset;
  Moments<T> moments;
};

template <class S>
struct Conv3x3Backward {
  using T = Arithmetic<S>;
  const S* bottleneck;
  ScaleShiftTable<T> table;
  PerChannel<T> post_mask;
  const T* weight;
  int64_t growth, width;
  const bool* dropout_mask;
  double dropout_scale;
  Maps<const S> features;
  Maps<const T> grad;
  Coefficients<T> coef;
  int64_t offset;
  Norm<T> norm;
  T* dv;       // [M, round_up(width, kLanes)]
  T* dweight;  // [growth, width, 3, 3]
  T* dnorm_weight;
  T* dnorm_bias;
  T* db_table;  // [3, width]
};

template <class S>
struct SqueezeExciteForward {
  using T = Arithmetic<S>;
  Maps<S> features;
  int64_t offset, growth, hidden_width;
  Moments<T> moments;
  const T *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  T *pooled, *hidden, *gate;
};

template <class S>
struct SqueezeExciteBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  Maps<const T> grad;
  int64_t offset, growth, hidden_width;
  const T *fc1_weight, *fc2_weight;
  const T *pooled, *hidden, *gate;
  Coefficients<T> coef;
  T *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias;
};

template <class S>
struct TransitionForward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> norm;
  const T* weight;  // [out.channels, features.channels]
  Maps<S> out;
};

template <class S>
struct TransitionBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> table;
  const T* weight;
  Norm<T> norm;
  Maps<const S> grad_out;
  Maps<T> grad;
  Coefficients<T> coef;
  T* dweight;
  T* dnorm_weight;
  T* dnorm_bias;
};

template <class S>
struct HeadForward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> norm;
  S* out;  // [samples, channels]
};

template <class S>
struct HeadBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> table;
  Norm<T> norm;
  const S* grad_out;
  Maps<T> grad;
  Coefficients<T> coef;
  T* dnorm_weight;
  T* dnorm_bias;
};

template <class S>
struct StemForward {
  using T = Arithmetic<S>;
  Maps<const S> x;  // channels last
  const T *weight, *bias;
  double eps;
  bool use_given;
  T *mean, *var;  // [channels], written unless use_given
  Maps<S> out;    // of half the height and width, rounded up
};

template <class S>
struct StemBackward {
  using T = Arithmetic<S>;
  Maps<const S> x;  // channels last
  const T* bias;
  Norm<T> norm;
  Maps<const S> grad_out;
  Maps<S> dx;  // channels last; data null: not wanted
  T *dnorm_weight, *dnorm_bias;
};

// X(function, arguments)
#define DENSENET_EXT_KERNELS(X)                     \
  X(append, Append)                                 \
  X(finish_gradient, FinishGradient)                \
  X(bottleneck_forward, BottleneckForward)          \
  X(bottleneck_backward, BottleneckBackward)        \
  X(conv3x3_forward, Conv3x3Forward)                \
  X(conv3x3_backward, Conv3x3Backward)              \
  X(squeeze_excite_forward, SqueezeExciteForward)   \
  X(squeeze_excite_backward, SqueezeExciteBackward) \
  X(transition_forward, TransitionForward)          \
  X(transition_backward, TransitionBackward)        \
  X(head_forward, HeadForward)                      \
  X(head_backward, HeadBackward)                    \
  X(stem_forward, StemForward)                      \
  X(stem_backward, StemBackward)

// The kernels of one instruction set for one storage type.
template <class S>
struct Kernels {
#define DENSENET_EXT_FIELD(function, arguments) void (*function)(const arguments<S>&);
  DENSENET_EXT_KERNELS(DENSENET_EXT_FIELD)
#undef DENSENET_EXT_FIELD
};

struct KernelTable {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
};

// One definition each, in kernels/kernel_set.cpp compiled with that instruction set's flags.
namespace baseline {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
namespace amx {  // kernels/amx/kernel_set.cpp, where the compiler knows these instructions
const KernelTable& kernel_table();
}

}  // namespace densenet_ext
