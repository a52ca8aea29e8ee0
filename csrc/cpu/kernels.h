// The CPU kernels as plain C++: argument structures and the table of one instruction set.
//
// csrc/cpu/kernels/ is compiled once per instruction set and knows nothing of torch; csrc/cpu/*.cpp
// checks tensors, fills these structures and calls the table that dispatch.cpp chose. Threads and
// scratch memory come in through parallel.h.
//
// Vocabulary: n sample, c channel, p pixel of a map of P = height*width pixels, M = N*P rows; k
// growth rate, K2 bottleneck width; S storage type of feature maps, T = Arithmetic<S> the type of
// everything else.
#pragma once

#include <cstdint>

namespace densenet_ext {

// Storage only: arithmetic is float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

// Bottleneck rows, packed weights and tiles are padded to whole groups of this many elements,
// whatever the vector length.
constexpr int64_t kLanes = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Planar feature maps [samples, channels, height, width]; the pixels of a plane are contiguous,
// planes and samples may be padded.
template <class E>
struct Maps {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t sample_stride = 0, plane_stride = 0;

  int64_t pixels() const { return height * width; }
  E* plane(int64_t n, int64_t c) const { return data + n * sample_stride + c * plane_stride; }
};

// Per-channel values [1 or samples, channels]: sample_stride is 0 where all samples share a row.
template <class T>
struct PerChannel {
  const T* data = nullptr;
  int64_t sample_stride = 0;

  const T* row(int64_t n) const { return data + n * sample_stride; }
};

// z = relu(scale * x + shift): batch normalization, the masks around it and ReLU.
template <class T>
struct NormTable {
  PerChannel<T> scale, shift;
};

// What the backward of batch normalization needs beside the table, C channels each.
template <class T>
struct Norm {
  const T* weight;
  const T* mean;
  const T* var;
  double eps;
  bool training;  // whether mean and var are the batch's own, so that gradients flow through them
};

// The true gradient of a channel is coef[0]*G + coef[1] + coef[2]*x; data [3, samples, channels].
template <class T>
struct Coefficients {
  T* data;
  int64_t samples, channels;

  T& at(int64_t i, int64_t n, int64_t c) const { return data[(i * samples + n) * channels + c]; }
};

// Moments [samples, channels] of a feature buffer; null when not wanted.
template <class T>
struct Moments {
  T* mean = nullptr;
  T* m2 = nullptr;
  int64_t channels = 0;  // row length
};

template <class S>
struct Append {
  using T = Arithmetic<S>;
  Maps<const S> x;
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
  Maps<S> out;
};

template <class S>
struct BottleneckForward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  NormTable<T> norm;
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
  NormTable<T> table;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [width, channels]
  int64_t channels, width;
  const T* dv;          // [M, round_up(width, kLanes)]
  const S* bottleneck;  // the same shape
  const T* db_table;    // [3, width]: db = t0*dv + t1 + t2*b
  Norm<T> norm;
  Maps<const T> grad_in;  // data null: the gradient starts here
  Maps<T> grad;
  Coefficients<T> coef;
  T* dweight;  // [width, channels]
  T* dnorm_weight;
  T* dnorm_bias;
};

template <class S>
struct Conv3x3Forward {
  using T = Arithmetic<S>;
  const S* bottleneck;
  NormTable<T> norm;
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
  NormTable<T> table;
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
  NormTable<T> norm;
  const T* weight;  // [out.channels, features.channels]
  Maps<S> out;
};

template <class S>
struct TransitionBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  NormTable<T> table;
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
  NormTable<T> norm;
  S* out;  // [samples, channels]
};

template <class S>
struct HeadBackward {
  using T = Arithmetic<S>;
  Maps<const S> features;
  NormTable<T> table;
  Norm<T> norm;
  const S* grad_out;
  Maps<T> grad;
  Coefficients<T> coef;
  T* dnorm_weight;
  T* dnorm_bias;
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
  X(head_backward, HeadBackward)

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

// One definition each, in kernels/table.cpp compiled with that instruction set's flags.
namespace baseline {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}

}  // namespace densenet_ext
