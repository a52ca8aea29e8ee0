// Types shared by the CPU and CUDA kernels: storage types, and per-sample, per-channel arrays.
//
// Vocabulary: n sample, c channel, p pixel of a map of P = height*width pixels, M = N*P rows; k
// growth rate, K2 bottleneck width; S storage type of feature maps, T = Arithmetic<S> the type of
// everything else.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DENSENET_EXT_BOTH __host__ __device__
#else
#define DENSENET_EXT_BOTH
#endif

namespace densenet_ext {

// These two types are for storage only; arithmetic on their values is in float.
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

// Bottleneck rows, packed weights and tiles are padded to whole groups of this many elements.
constexpr int64_t kLanes = 16;

DENSENET_EXT_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DENSENET_EXT_BOTH constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Per-channel values [1 or samples, channels]: sample_stride is 0 where all samples share a row.
template <class T>
struct PerChannel {
  const T* data = nullptr;
  int64_t sample_stride = 0;

  DENSENET_EXT_BOTH const T* row(int64_t n) const { return data + n * sample_stride; }
};

// Scale and shift of z = relu(scale * x + shift): batch normalization with the masks around it.
template <class T>
struct ScaleShiftTable {
  PerChannel<T> scale, shift;
};

// The arrays that backward of a batch normalization needs beside scale and shift, [channels] each.
template <class T>
struct Norm {
  const T* weight;
  const T* mean;
  const T* var;
  double eps;
  bool training;  // mean and var come from the batch, so that gradients flow through them
};

// The true gradient of a channel is coef[0]*G + coef[1] + coef[2]*x; data [3, samples, channels].
template <class T>
struct Coefficients {
  T* data;
  int64_t samples, channels;

  DENSENET_EXT_BOTH T& at(int64_t i, int64_t n, int64_t c) const {
    return data[(i * samples + n) * channels + c];
  }
};

// Moments [samples, channels] of a feature buffer; null if they are not wanted.
template <class T>
struct Moments {
  T* mean = nullptr;
  T* m2 = nullptr;
  int64_t channels = 0;  // row length
};

}  // namespace densenet_ext
