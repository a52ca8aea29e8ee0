// The CUDA kernels as plain C++: argument structures, and the functions that launch them.
//
// csrc/cuda/kernels/*.cu know nothing of torch; csrc/cuda/*.cpp check tensors, fill these
// structures and call the functions. Scratch memory and the stream come in with a Context.
// Everything is queued on the stream: nothing waits for the device.
#pragma once

#include "types.h"

namespace densenet_ext::cuda {

// Where and with what a kernel op runs: the current stream, scratch memory until the op returns
// (or, on a device, until the stream has come so far), and whether float32 products may be TF32.
class Context {
 public:
  void* stream = nullptr;
  bool allow_tf32 = false;

  // Uninitialized, aligned to 16 bytes at least.
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
  virtual ~Context() = default;

 private:
  virtual void* allocate(int64_t bytes) = 0;
};

// Throws where the current device cannot run these kernels: they need compute capability 8.0.
void check_device();

// Channels-last maps [samples, channels, height, width]: channel c of row (n*H + y)*W + x is
// data[row * pitch + c]. Of a feature buffer, data and pitch * sizeof(E) are multiples of 16.
template <class E>
struct Rows {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t pitch = 0;

  DENSENET_EXT_BOTH int64_t pixels() const { return height * width; }
  DENSENET_EXT_BOTH int64_t count() const { return samples * pixels(); }
  DENSENET_EXT_BOTH E* row(int64_t r) const { return data + r * pitch; }
};

// Maps with any strides.
template <class E>
struct Strided {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

template <class S>
struct BottleneckForward {
  using T = Arithmetic<S>;
  Rows<const S> features;
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
  Rows<const S> features;
  ScaleShiftTable<T> table;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [width, channels]
  int64_t channels, width;
  const S* dv;          // [M, round_up(width, kLanes)]
  const S* bottleneck;  // the same shape
  const T* db_table;    // [3, width]: db = t0*dv + t1 + t2*b
  Norm<T> norm;
  Rows<const S> grad_in;  // data null: the gradient starts here
  Rows<S> grad;
  Coefficients<T> coef;
  T* dweight;  // [width, channels]
  T* dnorm_weight;
  T* dnorm_bias;
};

template <class S>
void bottleneck_forward(const BottleneckForward<S>& arguments, Context& context);
template <class S>
void bottleneck_backward(const BottleneckBackward<S>& arguments, Context& context);

template <class S>
struct Append {
  using T = Arithmetic<S>;
  Strided<const S> x;
  Rows<S> features;
  int64_t offset;
  Moments<T> moments;
};

template <class S>
struct FinishGradient {
  using T = Arithmetic<S>;
  Rows<const S> features;
  Rows<const S> grad;
  Coefficients<T> coef;
  int64_t offset;
  Strided<S> out;
};

template <class T>
struct FoldNorm {
  const T*
      mean;  // [rows, >= channels], rows `pitch` apart; not read where the statistics are given
  const T* m2;
  int64_t rows, pitch, pixels;  // `pixels` values behind each moment
  int64_t channels;
  PerChannel<T> pre_mask, post_mask;  // data null: all ones
  const T* weight;                    // [channels]
  const T* bias;
  double eps;
  bool use_given;
  T* batch_mean;  // [channels], read where given, else written
  T* batch_var;
  T* scale;  // [scale_rows, channels]
  T* shift;  // [shift_rows, channels]
  int64_t scale_rows, shift_rows;
};

template <class S>
struct SqueezeExciteForward {
  using T = Arithmetic<S>;
  Rows<S> features;
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

template <class S>
struct SqueezeExciteBackward {
  using T = Arithmetic<S>;
  Rows<const S> features;
  Rows<const S> grad;
  int64_t offset, growth, hidden_width;
  const T* fc1_weight;
  const T* fc2_weight;
  const T* pooled;
  const T* hidden;
  const T* gate;
  Coefficients<T> coef;
  T* dfc1_weight;
  T* dfc1_bias;
  T* dfc2_weight;
  T* dfc2_bias;
};

template <class S>
struct TransitionForward {
  using T = Arithmetic<S>;
  Rows<const S> features;
  ScaleShiftTable<T> norm;
  const T* weight;  // [out.channels, features.channels]
  Strided<S> out;
};

template <class S>
struct TransitionBackward {
  using T = Arithmetic<S>;
  Rows<const S> features;
  ScaleShiftTable<T> table;
  const T* weight;
  Norm<T> norm;
  Strided<const S> grad_out;
  Rows<S> grad;
  Coefficients<T> coef;
  T* dweight;
  T* dnorm_weight;
  T* dnorm_bias;
};

template <class S>
struct HeadForward {
  using T = Arithmetic<S>;
  Rows<const S> features;
  ScaleShiftTable<T> norm;
  S* out;  // [samples, channels]
};

template <class S>
struct HeadBackward {
  using T = Arithmetic<S>;
  Rows<const S> features;
  ScaleShiftTable<T> table;
  Norm<T> norm;
  const S* grad_out;  // [samples, channels]
  Rows<S> grad;
  Coefficients<T> coef;
  T* dnorm_weight;
  T* dnorm_bias;
};

// The statistics are read by backward, and by forward where they are given; else written.
template <class T>
struct StemNorm {
  const T* weight;
  const T* bias;
  T* mean;
  T* var;
  double eps;
};

template <class S>
struct StemForward {
  Rows<const S> x;
  StemNorm<Arithmetic<S>> norm;
  bool use_given;
  Rows<S> out;
};

template <class S>
struct StemBackward {
  using T = Arithmetic<S>;
  Rows<const S> x;
  StemNorm<T> norm;
  bool training;
  Rows<const S> grad_out;
  Rows<S> dx;  // data null: not wanted
  T* dnorm_weight;
  T* dnorm_bias;
};

// Moments of channels [offset, offset + channels) as they stand in the maps; nothing where they are
// not wanted.
template <class S>
void slice_moments(const Rows<const S>& features, int64_t offset, int64_t channels,
                   const Moments<Arithmetic<S>>& moments, Context& context);

template <class S>
void append(const Append<S>& arguments, Context& context);
template <class S>
void finish_gradient(const FinishGradient<S>& arguments, Context& context);
template <class T>
void fold_norm(const FoldNorm<T>& arguments, Context& context);
template <class S>
void squeeze_excite_forward(const SqueezeExciteForward<S>& arguments, Context& context);
template <class S>
void squeeze_excite_backward(const SqueezeExciteBackward<S>& arguments, Context& context);
template <class S>
void transition_forward(const TransitionForward<S>& arguments, Context& context);
template <class S>
void transition_backward(const TransitionBackward<S>& arguments, Context& context);
template <class S>
void head_forward(const HeadForward<S>& arguments, Context& context);
template <class S>
void head_backward(const HeadBackward<S>& arguments, Context& context);
template <class S>
void stem_forward(const StemForward<S>& arguments, Context& context);
template <class S>
void stem_backward(const StemBackward<S>& arguments, Context& context);

// relu(scale * b + shift) is what the 3x3 convolution reads.
template <class S>
struct Conv3x3Forward {
  using T = Arithmetic<S>;
  const S* bottleneck;  // [M, round_up(width, kLanes)]
  ScaleShiftTable<T> norm;
  const T* weight;  // [growth, width, 3, 3]
  int64_t growth, width;
  const bool* dropout_mask;  // [samples, growth, H, W]; null: nothing is dropped
  double dropout_scale;
  Rows<S> features;
  int64_t offset;
};

template <class S>
struct Conv3x3Backward {
  using T = Arithmetic<S>;
  const S* bottleneck;
  ScaleShiftTable<T> norm;
  PerChannel<T> post_mask;  // data null: all ones
  const T* weight;
  int64_t growth, width;
  const bool* dropout_mask;
  double dropout_scale;
  Rows<const S> features, grad;
  Coefficients<const T> coef;
  int64_t offset;
  Norm<T> norm2;
  S* dv;  // [M, round_up(width, kLanes)]
  T* dweight;
  T* dnorm_weight;
  T* dnorm_bias;
  T* table;  // [3, width]
};

// Whether the kernels below can do it on the current device: narrow layers only, and forward some
// wider ones of 16-bit types. Others go through a convolution of a library, and the functions after
// them do what is around it.
template <class S>
bool conv3x3_forward_fits(const Conv3x3Forward<S>& arguments, const Context& context);
template <class S>
bool conv3x3_backward_fits(const Conv3x3Backward<S>& arguments, const Context& context);
template <class S>
void conv3x3_forward(const Conv3x3Forward<S>& arguments, Context& context);
template <class S>
void conv3x3_backward(const Conv3x3Backward<S>& arguments, Context& context);

// h [M, width] = relu(scale * b + shift)
template <class S>
void conv3x3_input(const S* bottleneck, const ScaleShiftTable<Arithmetic<S>>& norm, int64_t samples,
                   int64_t pixels, int64_t width, S* h, Context& context);
// The slice = dropout(y [M, growth])
template <class S>
void conv3x3_output(const Conv3x3Forward<S>& arguments, const S* y, Context& context);
// dy [M, growth], the true gradient of the slice, after dropout
template <class S>
void conv3x3_output_gradient(const Conv3x3Backward<S>& arguments, S* dy, Context& context);
// From the gradients of h and of the weight, dh [M, width] and dw, to all that is written.
template <class S>
void conv3x3_input_gradient(const Conv3x3Backward<S>& arguments, const S* dh,
                            const Strided<const S>& dw, Context& context);

}  // namespace densenet_ext::cuda
