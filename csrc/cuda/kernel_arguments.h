// The CUDA kernels as plain C++: the functions that launch them, and the layout of CUDA's maps.
//
// csrc/cuda/kernels/*.cu know nothing of torch; the kernel ops check tensors, fill the argument
// structures and call the functions. Scratch memory and the stream come in with a Context.
// Everything is queued on the stream: nothing waits for the device.
#pragma once

#include "kernel_ops/kernel_arguments.h"

namespace densenet_ext::cuda {

// Gives a kernel op the current stream, scratch memory, and the permission to compute float32
// products in TF32. Scratch lives until the op returns; on a device, until its stream gets there.
class Context {
 public:
  void* stream = nullptr;
  bool allow_tf32 = false;

  // Returns uninitialized memory, aligned to 16 bytes at least.
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
  virtual ~Context() = default;

 private:
  virtual void* allocate(int64_t bytes) = 0;
};

// Throws if the current device cannot run these kernels: they need compute capability 8.0.
void check_device();

// Channels-last maps [samples, channels, height, width]: channel c of row (n*H + y)*W + x is
// data[row * pitch + c]. In a feature buffer, data and pitch * sizeof(E) are multiples of 16.
template <class E>
struct Maps {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t pitch = 0;

  DENSENET_EXT_BOTH int64_t pixels() const { return height * width; }
  DENSENET_EXT_BOTH int64_t count() const { return samples * pixels(); }
  DENSENET_EXT_BOTH E* row(int64_t r) const { return data + r * pitch; }

  Maps<const E> read_only() const { return {data, samples, channels, height, width, pitch}; }
};

// Maps with any strides.
template <class E>
struct StridedMaps {
  E* data = nullptr;
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// CUDA as a backend of kernel_ops/kernel_arguments.h.
struct Cuda {
  template <class E>
  using Maps = cuda::Maps<E>;
  template <class E>
  using OuterMaps = cuda::StridedMaps<E>;
  template <class S>
  using Gradient = S;
};

// A launch function has the name of its kernel op. bottleneck_backward ends with the forward of
// arguments.previous, if there is one.
#define DENSENET_EXT_DECLARE(function, Arguments)  \
  template <class S>                               \
  using Arguments = arguments::Arguments<Cuda, S>; \
  template <class S>                               \
  void function(const Arguments<S>& arguments, Context& context);
DENSENET_EXT_KERNELS(DENSENET_EXT_DECLARE)
#undef DENSENET_EXT_DECLARE

using arguments::FoldNorm;
template <class T>
void fold_norm(const FoldNorm<T>& arguments, Context& context);

// Takes the moments of channels [offset, offset + channels), if they are wanted.
template <class S>
void slice_moments(const Maps<const S>& features, int64_t offset, int64_t channels,
                   const Moments<Arithmetic<S>>& moments, Context& context);

// True if conv3x3_forward or conv3x3_backward can compute this layer on the current device: they
// serve narrow layers, and in forward some wider ones of 16-bit types. Others go through a
// library's convolution, and the functions after these two do the steps around it. The caller takes
// the moments of the slice with slice_moments.
template <class S>
bool conv3x3_forward_fits(const Conv3x3Forward<S>& arguments, const Context& context);
template <class S>
bool conv3x3_backward_fits(const Conv3x3Backward<S>& arguments, const Context& context);

// Makes h [M, width] = relu(scale * b + shift).
template <class S>
void conv3x3_input(const S* bottleneck, const ScaleShiftTable<Arithmetic<S>>& scale_shift,
                   int64_t samples, int64_t pixels, int64_t width, S* h, Context& context);
// slice of the feature buffer = dropout(y [M, growth])
template <class S>
void conv3x3_output(const Conv3x3Forward<S>& arguments, const S* y, Context& context);
// Makes dy [M, growth], the true gradient of the slice through dropout.
template <class S>
void conv3x3_output_gradient(const Conv3x3Backward<S>& arguments, S* dy, Context& context);
// Writes all outputs of conv3x3_backward from the gradients of h and of the weight: dh [M, width]
// and dw.
template <class S>
void conv3x3_input_gradient(const Conv3x3Backward<S>& arguments, const S* dh,
                            const StridedMaps<const S>& dw, Context& context);

}  // namespace densenet_ext::cuda
