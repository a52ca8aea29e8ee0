// These kernels surround the convolution where a library does it: four passes over packed
// channels-last tensors, and the sums of norm2's backward.
//
//   h = relu(scale * b + shift)                                    reads K2, writes K2 a row
//   slice = dropout(y)                                             reads k, writes k
//   dy = dropout(coef0 G + coef1 + coef2 x)                        reads 2k, writes k
//   dv = dh mask [v > 0],  v = scale * b + shift,                  reads 2 K2, writes K2
//     S1 = sum_p dv,  S2 = sum_p dv (b - mean)
//
// Threads and blocks lie as in channel_loops.cuh: a thread has V channels of some pixels of one
// sample, so the values of a channel stay in registers. Sums go to scratch memory, a part for
// each block, and a last kernel adds them in order.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
constexpr int64_t kBytes = sizeof(S);

// ---- h -----------------------------------------------------------------------------------------

template <class S>
struct InputArguments {
  const S* bottleneck;
  int64_t pitch;
  ScaleShiftTable<Arithmetic<S>> scale_shift;
  int64_t width;
  S* h;  // [M, width]
  PixelRanges ranges;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_input_kernel(InputArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.width);
  const int64_t first = range.sample * a.ranges.pixels;
  T scale[V], shift[V];
  load_scale_shift<V>(a.scale_shift, range.sample, group.first, group.valid, scale, shift);
  const S* const source[1] = {a.bottleneck + first * a.pitch + group.first};
  const int64_t pitch[1] = {a.pitch};
  S* const target = a.h + first * a.width + group.first;
  for_pixels<V, 1>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&x)[1][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[0][i] = relu(affine(x[0][i], scale[i], shift[i]));
    store_first<V>(target + p * a.width, group.valid, x[0]);
  });
}

// ---- the slice ---------------------------------------------------------------------------------

template <class S>
struct OutputArguments {
  const S* y;  // [M, growth]
  int64_t growth;
  Dropout<Arithmetic<S>> dropout;
  S* slice;  // at its first channel
  int64_t pitch;
  PixelRanges ranges;
  ThreadMap map;
};
// The least number of blocks, of this kernel and those below, keeps ptxas from spilling for sm_80.
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_output_kernel(OutputArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.growth);
  const int64_t first = range.sample * a.ranges.pixels;
  const S* const source[1] = {a.y + first * a.growth + group.first};
  const int64_t pitch[1] = {a.growth};
  S* const target = a.slice + first * a.pitch + group.first;
  for_pixels<V, 1>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&y)[1][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < group.valid)
        y[0][i] = a.dropout(y[0][i], range.sample, group.first + i, p, a.growth, a.ranges.pixels);
    }
    store_first<V>(target + p * a.pitch, group.valid, y[0]);
  });
}

// ---- dy ----------------------------------------------------------------------------------------

template <class S>
struct OutputGradientArguments {
  const S* features;  // both at the first channel of the slice
  const S* grad;
  int64_t features_pitch, grad_pitch;
  Coefficients<Arithmetic<S>> coef;
  int64_t offset, growth;
  Dropout<Arithmetic<S>> dropout;
  S* dy;  // [M, growth]
  PixelRanges ranges;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2)
    conv3x3_output_gradient_kernel(OutputGradientArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.growth);
  const int64_t first = range.sample * a.ranges.pixels;
  T coef[3][V];
#pragma unroll
  for (int j = 0; j < 3; ++j)
    load_each<V>(&a.coef.at(j, range.sample, a.offset + group.first), group.valid, coef[j]);
  const S* const source[2] = {a.grad + first * a.grad_pitch + group.first,
                              a.features + first * a.features_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.features_pitch};
  S* const target = a.dy + first * a.growth + group.first;
  for_pixels<V, 2>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&x)[2][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[0][i] = affine(coef[0][i], x[0][i], affine(coef[2][i], x[1][i], coef[1][i]));
      if (i < group.valid)
        x[0][i] = a.dropout(x[0][i], range.sample, group.first + i, p, a.growth, a.ranges.pixels);
    }
    store_first<V>(target + p * a.growth, group.valid, x[0]);
  });
}

// ---- dv and the sums ---------------------------------------------------------------------------

template <class S>
struct InputGradientArguments {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int64_t pitch;  // of bottleneck and dv
  ScaleShiftTable<T> scale_shift;
  PerChannel<T> mask;
  const T* mean;
  int64_t width;
  const S* dh;  // [M, width]
  S* dv;
  T* parts;  // [ranges, 2, width]
  PixelRanges ranges;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2)
    conv3x3_input_gradient_kernel(InputGradientArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(shared);
  const PixelRange range = a.ranges[blockIdx.x];
  // The groups reach up to the pitch: channels beyond the width have no gradient, and are written
  // as 0.
  const Group group = group_of<V>(a.map, blockIdx.y, a.pitch);
  const int64_t remaining = a.width - group.first;
  const int valid =
      remaining < group.valid ? remaining > 0 ? static_cast<int>(remaining) : 0 : group.valid;
  const int64_t first = range.sample * a.ranges.pixels;
  T scale[V], shift[V], mask[V], mean[V], sums[2 * V] = {};
  const int64_t column = valid > 0 ? group.first : 0;
  load_scale_shift<V>(a.scale_shift, range.sample, column, valid, scale, shift);
  load_each<V>(a.mean + column, valid, mean);
#pragma unroll
  for (int i = 0; i < V; ++i) mask[i] = T(1);
  if (a.mask.data != nullptr) load_each<V>(a.mask.row(range.sample) + column, valid, mask);
  const S* const source[2] = {a.dh + first * a.width + column,
                              a.bottleneck + first * a.pitch + column};
  const int64_t pitch[2] = {a.width, a.pitch};
  S* const target = a.dv + first * a.pitch + group.first;
  for_pixels<V, 2>(range, a.map, valid, source, pitch, [&](int64_t p, T(&x)[2][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T v = affine(x[1][i], scale[i], shift[i]);
      x[0][i] = v > T(0) ? x[0][i] * mask[i] : T(0);
    }
    // The sums are those of what is stored: in norm2's gradient they have to cancel.
    round_values<S>(x[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[i] += x[0][i];
      sums[V + i] += x[0][i] * (x[1][i] - mean[i]);
    }
    store_first<V>(target + p * a.pitch, group.valid, x[0]);
  });
  if (valid == 0 && group.valid > 0) {
    const T zeros[V] = {};
    for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines)
      store_first<V>(target + p * a.pitch, group.valid, zeros);
  }

  sum_lines(sums, reinterpret_cast<T*>(shared), a.map);
  T* const part = a.parts + static_cast<int64_t>(blockIdx.x) * 2 * a.width + group.first;
  if (a.map.line() == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < valid) part[i] = sums[i], part[a.width + i] = sums[V + i];
    }
  }
}

template <class S>
struct WeightArguments {
  using T = Arithmetic<S>;
  StridedMaps<const S> dw;  // [growth, width, 3, 3]; data null: there were no samples
  T* dweight;
  int64_t weight_blocks;
  BottleneckNormBackward<T> norm;
};
// A block has kMaxThreads weights, or some channels of norm2.
template <class S>
KERNEL __launch_bounds__(kMaxThreads, 4) conv3x3_weight_kernel(WeightArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(shared);
  if (blockIdx.x < a.weight_blocks) {
    const unsigned i = blockIdx.x * kMaxThreads + threadIdx.x,
                   width = static_cast<unsigned>(a.dw.channels);
    const unsigned tap = i % kTaps, c = i / kTaps % width, o = i / kTaps / width;
    if (o < a.dw.samples) {
      const int64_t index =
          o * a.dw.stride_n + c * a.dw.stride_c + tap / 3 * a.dw.stride_h + tap % 3 * a.dw.stride_w;
      a.dweight[i] = a.dw.data != nullptr ? widen(a.dw.data[index]) : T(0);
    }
  } else {
    norm_backward_block(a.norm, blockIdx.x - a.weight_blocks, reinterpret_cast<double*>(shared));
  }
}

}  // namespace

template <class S>
void conv3x3_input(const S* bottleneck, const ScaleShiftTable<Arithmetic<S>>& scale_shift,
                   int64_t samples, int64_t pixels, int64_t width, S* h, Context& context) {
  InputArguments<S> a = {};
  a.bottleneck = bottleneck, a.pitch = round_up(width, kLanes), a.scale_shift = scale_shift;
  a.width = width, a.h = h;
  const uint64_t distances =
      spacing(bottleneck, a.pitch * kBytes<S>) | spacing(h, width * kBytes<S>);
  with_partition<S>(distances, width, samples, pixels,
                    [&](auto V, auto& p) { launch(context, conv3x3_input_kernel<S, V>, p, 0, a); });
}

template <class S>
void conv3x3_output(const Conv3x3Forward<S>& f, const S* y, Context& context) {
  OutputArguments<S> a = {};
  a.y = y, a.growth = f.growth, a.dropout = dropout_of(f);
  a.slice = f.features.data + f.offset, a.pitch = f.features.pitch;
  const uint64_t distances = spacing(f.features, f.offset) | spacing(y, f.growth * kBytes<S>);
  with_partition<S, kSummedVector<S>>(
      distances, f.growth, f.features.samples, f.features.pixels(),
      [&](auto V, auto& p) { launch(context, conv3x3_output_kernel<S, V>, p, 0, a); });
}

template <class S>
void conv3x3_output_gradient(const Conv3x3Backward<S>& f, S* dy, Context& context) {
  OutputGradientArguments<S> a = {};
  a.features = f.features.data + f.offset, a.features_pitch = f.features.pitch;
  a.grad = f.grad.data + f.offset, a.grad_pitch = f.grad.pitch;
  a.coef = f.coef, a.offset = f.offset, a.growth = f.growth;
  a.dropout = dropout_of(f), a.dy = dy;
  const uint64_t distances =
      spacing(f.features, f.offset) | spacing(f.grad, f.offset) | spacing(dy, f.growth * kBytes<S>);
  with_partition<S>(
      distances, f.growth, f.features.samples, f.features.pixels(),
      [&](auto V, auto& p) { launch(context, conv3x3_output_gradient_kernel<S, V>, p, 0, a); });
}

template <class S>
void conv3x3_input_gradient(const Conv3x3Backward<S>& f, const S* dh,
                            const StridedMaps<const S>& dw, Context& context) {
  using T = Arithmetic<S>;
  InputGradientArguments<S> a = {};
  a.bottleneck = f.bottleneck, a.pitch = round_up(f.width, kLanes), a.scale_shift = f.scale_shift;
  a.mask = f.post_mask, a.mean = f.norm.mean, a.width = f.width, a.dh = dh, a.dv = f.dv;
  WeightArguments<S> weight = {};
  weight.dw = dw, weight.dweight = f.dweight, weight.norm = norm_backward_of(f);
  weight.weight_blocks = ceil_div(kTaps * f.growth * f.width, kMaxThreads);
  const uint64_t distances = spacing(f.bottleneck, a.pitch * kBytes<S>) | spacing(f.dv, 0) |
                             spacing(dh, f.width * kBytes<S>);
  const int64_t samples = f.features.samples, pixels = f.features.pixels();
  with_partition<S>(distances, a.pitch, samples, pixels, [&](auto V, auto& p) {
    weight.norm.count = p.ranges.count(), weight.norm.step = 2 * f.width;
    weight.norm.parts = a.parts = context.scratch<T>(weight.norm.count * weight.norm.step);
    launch(context, conv3x3_input_gradient_kernel<S, V>, p, 2 * V * p.threads * kBytes<T>, a);
  });
  launch(context, conv3x3_weight_kernel<S>, {weight.weight_blocks + narrow_blocks(f.width)},
         kMaxThreads, kSumBytes, weight);
}

#define INSTANTIATE(S)                                                                           \
  template void conv3x3_input(const S*, const ScaleShiftTable<Arithmetic<S>>&, int64_t, int64_t, \
                              int64_t, S*, Context&);                                            \
  template void conv3x3_output(const Conv3x3Forward<S>&, const S*, Context&);                    \
  template void conv3x3_output_gradient(const Conv3x3Backward<S>&, S*, Context&);                \
  template void conv3x3_input_gradient(const Conv3x3Backward<S>&, const S*,                      \
                                       const StridedMaps<const S>&, Context&);
DENSENET_EXT_STORAGE_TYPES(INSTANTIATE)

}  // namespace densenet_ext::cuda
