// The head is batch normalization, ReLU and the mean over pixels; its backward starts the gradient
// buffer.
//
//   out[n, c] = (1/P) sum_p relu(scale*x + shift)
//   dv = [scale*x + shift > 0] dout/P,   G = gamma*rstd*dv,   S1 = sum dv, S2 = sum dv*xhat
//
// Threads take groups of channels, blocks ranges of pixels (channel_loops.cuh). Forward: where a
// sample is split, partial sums and a second launch. Backward: a block goes through several ranges
// and leaves one part of S1 and S2, which a second launch adds up (norm_backward.cuh). Bytes moved
// a pixel: C*e, backward 2*C*e.
#include "norm_backward.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
struct ForwardArguments {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  PixelRanges ranges;
  ThreadMap map;
  T* sums;  // [ranges, channels], where samples are split
  S* out;   // [samples, channels], where they are not
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) head_forward_kernel(ForwardArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const PixelRange range = a.ranges[blockIdx.x];
  const int64_t channels = a.features.channels;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  T scale[V], shift[V], sums[V] = {};
  load_scale_shift<V>(a.scale_shift, range.sample, group.first, group.valid, scale, shift);
  const S* const source[1] = {a.features.row(range.sample * a.ranges.pixels) + group.first};
  const int64_t pitch[1] = {a.features.pitch};
  for_pixels<V, 1>(range, a.map, group.valid, source, pitch, [&](int64_t, T(&x)[1][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += relu(affine(x[0][v], scale[v], shift[v]));
  });
  sum_lines(sums, reinterpret_cast<T*>(memory), a.map);
  if (a.map.line() != 0) return;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * channels + group.first;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v >= group.valid) continue;
    if (a.sums) {
      a.sums[target + v] = sums[v];
    } else {
      a.out[target + v] = store_as<S>(sums[v] / static_cast<T>(a.ranges.pixels));
    }
  }
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) head_mean_kernel(ForwardArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = narrow_map();
  const int64_t n = blockIdx.x, channels = a.features.channels;
  const Group group = group_of<1>(map, blockIdx.y, channels);
  T sum[1] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t i = map.line(); i < a.ranges.splits; i += map.lines)
      sum[0] += a.sums[(n * a.ranges.splits + i) * channels + group.first];
  }
  sum_lines(sum, reinterpret_cast<T*>(memory), map);
  if (map.line() == 0 && group.valid > 0)
    a.out[n * channels + group.first] = store_as<S>(sum[0] / static_cast<T>(a.ranges.pixels));
}

template <class S>
struct BackwardArguments {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  Norm<T> norm;
  const S* grad_out;
  Maps<S> grad;
  PixelRanges ranges;
  int64_t ranges_per_block;
  ThreadMap map;
  T* sums;  // [blocks, 2, channels]
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) head_backward_kernel(BackwardArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const int64_t channels = a.features.channels, block = blockIdx.x;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  NormGroup<T, V> norm;
  load_each<V>(a.norm.mean + group.first, group.valid, norm.mean);
  load_gains<V>(a.norm, group.first, group.valid, norm.gain);
  T sums[2][V] = {};
  for (int64_t i = block * a.ranges_per_block;
       i < (block + 1) * a.ranges_per_block && i < a.ranges.count(); ++i) {
    const PixelRange range = a.ranges[i];
    load_scale_shift<V>(a.scale_shift, range.sample, group.first, group.valid, norm.scale,
                        norm.shift);
    T dz_of_sample[V];
    load_each<V>(a.grad_out + range.sample * channels + group.first, group.valid, dz_of_sample);
#pragma unroll
    for (int v = 0; v < V; ++v) dz_of_sample[v] /= static_cast<T>(a.ranges.pixels);
    const int64_t first = range.sample * a.ranges.pixels;
    const S* const source[1] = {a.features.row(first) + group.first};
    const int64_t pitch[1] = {a.features.pitch};
    S* const target = a.grad.row(first) + group.first;
    for_pixels<V, 1>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&x)[1][V]) {
      T dz[V];
#pragma unroll
      for (int v = 0; v < V; ++v) dz[v] = dz_of_sample[v];
      norm.backward(x[0], dz, sums);
      store_first<V>(target + p * a.grad.pitch, group.valid, dz);
    });
  }
  store_sums<V>(sums, reinterpret_cast<T*>(memory), a.map, group, a.sums + block * 2 * channels,
                channels);
}

}  // namespace

template <class S>
void head_forward(const HeadForward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  constexpr int V = kVector<S>;
  const int64_t channels = f.features.channels;
  const Partition p = partition(channels, V, f.features.samples, f.features.pixels());
  const bool is_split = p.ranges.splits > 1;
  ForwardArguments<S> a = {};
  a.features = f.features, a.scale_shift = f.scale_shift, a.out = f.out;
  a.ranges = p.ranges;
  if (is_split) a.sums = context.scratch<T>(p.ranges.count() * channels);
  launch(context, head_forward_kernel<S, V>, p, V * p.threads * sizeof(T), a);
  if (is_split) {
    launch(context, head_mean_kernel<S>, {f.features.samples, narrow_blocks(channels)}, kMaxThreads,
           kMaxThreads * sizeof(T), a);
  }
}

template <class S>
void head_backward(const HeadBackward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  constexpr int V = kSummedVector<S>;
  const int64_t channels = f.features.channels, samples = f.features.samples,
                pixels = f.features.pixels();
  const Partition p = partition(channels, V, samples, pixels);
  BackwardArguments<S> a = {};
  a.features = f.features, a.scale_shift = f.scale_shift, a.norm = f.norm;
  a.grad_out = f.grad_out, a.grad = f.grad;
  a.ranges = p.ranges, a.ranges_per_block = p.ranges_per_block(), a.map = p.map;
  const int64_t blocks = ceil_div(p.ranges.count(), a.ranges_per_block);
  a.sums = context.scratch<T>(blocks * 2 * channels);
  launch(context, head_backward_kernel<S, V>, {blocks, p.chunks}, p.threads,
         V * p.threads * sizeof(T), a);
  norm_backward(norm_backward_of<T>(f, f.coef, a.sums, blocks, channels, samples * pixels),
                context);
}

DENSENET_EXT_INSTANTIATE(head_forward, HeadForward)
DENSENET_EXT_INSTANTIATE(head_backward, HeadBackward)

}  // namespace densenet_ext::cuda
