// Each kernel gets one of these structures, whatever its backend: plain pointers, sizes, strides.
//
// A backend B defines the layout of its maps and the type of gradients inside a stage:
//   B::Maps<E>      feature maps and buffers
//   B::OuterMaps<E> maps that come from outside a stage or go there
//   B::Gradient<S>  type of the gradients of feature maps of S
// S is the storage type of feature maps, T the type of everything else; types.h has the vocabulary.
#pragma once

#include "types.h"

namespace densenet_ext::arguments {

// features[:, offset : offset + x.channels] = x, with the moments of these channels
template <class B, class S>
struct Append {
  using T = Arithmetic<S>;
  typename B::template OuterMaps<const S> x;
  typename B::template Maps<S> features;
  int64_t offset;
  Moments<T> moments;
};

// out = the true gradient of the channels from `offset` on.
template <class B, class S>
struct FinishGradient {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  typename B::template Maps<const S> features;
  typename B::template Maps<const G> grad;
  Coefficients<T> coef;
  int64_t offset;
  typename B::template OuterMaps<S> out;
};

// Batch statistics become a scale and a shift; they are computed first, unless has_statistics.
template <class T>
struct FoldNorm {
  const T* mean;  // [rows, >= channels], rows `pitch` apart; not read if has_statistics
  const T* m2;
  int64_t rows, pitch, pixels;  // each moment is of `pixels` values
  int64_t channels;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [channels]
  const T* bias;
  double eps;
  bool has_statistics;  // batch_mean and batch_var are read; otherwise they are written
  T* batch_mean;        // [channels]
  T* batch_var;
  T* scale;  // [scale_rows, channels]
  T* shift;  // [shift_rows, channels]
  int64_t scale_rows, shift_rows;
};

// b = weight * relu(scale * x + shift), with the moments of b.
template <class B, class S>
struct BottleneckForward {
  using T = Arithmetic<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  const T* weight;  // [width, channels]
  int64_t channels, width;
  S* bottleneck;  // [M, round_up(width, kLanes)]
  T* mean;        // [width], over all M rows; null when not wanted
  T* m2;
};

template <class B, class S>
struct BottleneckBackward {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [width, channels]
  int64_t channels, width;
  const G* dv;         // [M, round_up(width, kLanes)]
  S* bottleneck;       // [M, round_up(width, kLanes)]; overwritten by the bottleneck of `previous`
  const T* db_affine;  // [3, width]: db = db_affine0 * dv + db_affine1 + db_affine2 * b
  Norm<T> norm;
  typename B::template Maps<const G> grad_in;  // data null: the gradient starts here
  typename B::template Maps<G> grad;
  Coefficients<T> coef;
  T* dweight;  // [width, channels]
  T* dnorm_weight;
  T* dnorm_bias;
  BottleneckForward<B, S> previous;  // the layer before this one; weight null: not wanted
};

// features[:, offset : offset + growth] = dropout(conv3x3(relu(scale * b + shift))), with the
// moments of these channels
template <class B, class S>
struct Conv3x3Forward {
  using T = Arithmetic<S>;
  const S* bottleneck;  // [M, round_up(width, kLanes)]
  ScaleShiftTable<T> scale_shift;
  const T* weight;  // [growth, width, 3, 3]
  int64_t growth, width;
  const bool* dropout_mask;  // [samples, growth, height, width]; null: nothing is dropped
  double dropout_scale;
  typename B::template Maps<S> features;
  int64_t offset;
  Moments<T> moments;
};

template <class B, class S>
struct Conv3x3Backward {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  const S* bottleneck;
  ScaleShiftTable<T> scale_shift;
  PerChannel<T> post_mask;  // data null: all ones
  const T* weight;
  int64_t growth, width;
  const bool* dropout_mask;
  double dropout_scale;
  typename B::template Maps<const S> features;
  typename B::template Maps<const G> grad;
  Coefficients<T> coef;
  int64_t offset;
  Norm<T> norm;
  G* dv;       // [M, round_up(width, kLanes)]
  T* dweight;  // [growth, width, 3, 3]
  T* dnorm_weight;
  T* dnorm_bias;
  T* db_affine;  // [3, width]
};

// Channels [offset, offset + growth) are multiplied by the gate in place, and so are their moments.
template <class B, class S>
struct SqueezeExciteForward {
  using T = Arithmetic<S>;
  typename B::template Maps<S> features;
  int64_t offset, growth, hidden_width;
  Moments<T> moments;
  const T* fc1_weight;  // [hidden_width, growth]
  const T* fc1_bias;
  const T* fc2_weight;  // [growth, hidden_width]
  const T* fc2_bias;
  T* pooled;  // [samples, growth]
  T* hidden;  // [samples, hidden_width]
  T* gate;    // [samples, growth]
};

template <class B, class S>
struct SqueezeExciteBackward {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  typename B::template Maps<const S> features;
  typename B::template Maps<const G> grad;
  int64_t offset, growth, hidden_width;
  const T *fc1_weight, *fc2_weight;
  const T *pooled, *hidden, *gate;
  Coefficients<T> coef;
  T *dfc1_weight, *dfc1_bias, *dfc2_weight, *dfc2_bias;
};

// out = avg_pool2x2(weight * relu(scale * x + shift))
template <class B, class S>
struct TransitionForward {
  using T = Arithmetic<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  const T* weight;  // [out.channels, features.channels]
  typename B::template OuterMaps<S> out;
};

template <class B, class S>
struct TransitionBackward {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  const T* weight;
  Norm<T> norm;
  typename B::template OuterMaps<const S> grad_out;
  typename B::template Maps<G> grad;
  Coefficients<T> coef;
  T* dweight;
  T* dnorm_weight;
  T* dnorm_bias;
};

// out = mean over the pixels of relu(scale * x + shift)
template <class B, class S>
struct HeadForward {
  using T = Arithmetic<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  S* out;  // [samples, channels]
};

template <class B, class S>
struct HeadBackward {
  using T = Arithmetic<S>;
  using G = typename B::template Gradient<S>;
  typename B::template Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  Norm<T> norm;
  const S* grad_out;  // [samples, channels]
  typename B::template Maps<G> grad;
  Coefficients<T> coef;
  T* dnorm_weight;
  T* dnorm_bias;
};

// out = max_pool3x3(relu(norm(x))), stride 2, padding 1; x and its gradient are channels last.
template <class B, class S>
struct StemForward {
  using T = Arithmetic<S>;
  typename B::template Maps<const S> x;
  const T *weight, *bias;  // the norm's
  double eps;
  bool has_statistics;  // batch_mean and batch_var are read; otherwise they are written
  T *batch_mean, *batch_var;
  typename B::template Maps<S> out;  // half the height and width, rounded up
};

template <class B, class S>
struct StemBackward {
  using T = Arithmetic<S>;
  typename B::template Maps<const S> x;
  const T* bias;
  Norm<T> norm;
  typename B::template Maps<const S> grad_out;
  typename B::template Maps<S> dx;  // data null: not wanted
  T *dnorm_weight, *dnorm_bias;
};

}  // namespace densenet_ext::arguments

// Calls X(function, Arguments) for each kernel and its argument structure, except fold_norm, which
// has no maps.
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
