// The head: batch normalization, ReLU and the mean over pixels, forward and backward; the backward
// starts the gradient buffer.
//
//   out[n, c] = (1/P) sum_p relu(scale*x + shift)
//   dv = [scale*x + shift > 0] dout/P,   G = gamma*rstd*dv,   S1 = sum dv, S2 = sum dv*xhat
//
// Threads take groups of channels, blocks runs of pixels (channel_loops.cuh). Forward: where a
// sample is cut, partial sums and a second launch. Backward: a block goes through several runs and
// leaves one part of S1 and S2, which a second launch adds up (norm_backward.cuh). Bytes moved a
// pixel: C*e, backward 2*C*e.
#include "norm_backward.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
struct ForwardArgs {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  Items items;
  ThreadMap map;
  T* sums;  // [items, channels], where samples are cut
  S* out;   // [samples, channels], where they are not
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) head_forward_kernel(ForwardArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const Run run = a.items[blockIdx.x];
  const int64_t channels = a.features.channels;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  T scale[V], shift[V], sums[V] = {};
  load_each<V>(a.scale_shift.scale.row(run.sample) + group.first, group.valid, scale);
  load_each<V>(a.scale_shift.shift.row(run.sample) + group.first, group.valid, shift);
  const S* const from[1] = {a.features.row(run.sample * a.items.pixels) + group.first};
  const int64_t pitch[1] = {a.features.pitch};
  for_pixels<V, 1>(run, a.map, group.valid, from, pitch, [&](int64_t, T(&x)[1][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += relu(affine(x[0][v], scale[v], shift[v]));
  });
  sum_rows(sums, reinterpret_cast<T*>(memory), a.map);
  if (a.map.row() != 0) return;
  const int64_t to = static_cast<int64_t>(blockIdx.x) * channels + group.first;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v >= group.valid) continue;
    if (a.sums) {
      a.sums[to + v] = sums[v];
    } else {
      a.out[to + v] = store_as<S>(sums[v] / static_cast<T>(a.items.pixels));
    }
  }
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) head_mean_kernel(ForwardArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = narrow_map();
  const int64_t n = blockIdx.x, channels = a.features.channels;
  const Group group = group_of<1>(map, blockIdx.y, channels);
  T sum[1] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t i = map.row(); i < a.items.splits; i += map.rows)
      sum[0] += a.sums[(n * a.items.splits + i) * channels + group.first];
  }
  sum_rows(sum, reinterpret_cast<T*>(memory), map);
  if (map.row() == 0 && group.valid > 0)
    a.out[n * channels + group.first] = store_as<S>(sum[0] / static_cast<T>(a.items.pixels));
}

template <class S>
struct BackwardArgs {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  Norm<T> norm;
  const S* grad_out;
  Maps<S> grad;
  Items items;
  int64_t each;  // items of a block
  ThreadMap map;
  T* sums;  // [blocks, 2, channels]
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) head_backward_kernel(BackwardArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const int64_t channels = a.features.channels, block = blockIdx.x;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  NormGroup<T, V> norm;
  load_each<V>(a.norm.mean + group.first, group.valid, norm.mean);
  load_steps<V>(a.norm, group.first, group.valid, norm.step);
  T sums[2][V] = {};
  for (int64_t i = block * a.each; i < (block + 1) * a.each && i < a.items.count(); ++i) {
    const Run run = a.items[i];
    load_each<V>(a.scale_shift.scale.row(run.sample) + group.first, group.valid, norm.scale);
    load_each<V>(a.scale_shift.shift.row(run.sample) + group.first, group.valid, norm.shift);
    T each[V];
    load_each<V>(a.grad_out + run.sample * channels + group.first, group.valid, each);
#pragma unroll
    for (int v = 0; v < V; ++v) each[v] /= static_cast<T>(a.items.pixels);
    const int64_t first = run.sample * a.items.pixels;
    const S* const from[1] = {a.features.row(first) + group.first};
    const int64_t pitch[1] = {a.features.pitch};
    S* const to = a.grad.row(first) + group.first;
    for_pixels<V, 1>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&x)[1][V]) {
      T dz[V];
#pragma unroll
      for (int v = 0; v < V; ++v) dz[v] = each[v];
      norm.backward(x[0], dz, sums);
      store_first<V>(to + p * a.grad.pitch, group.valid, dz);
    });
  }
  store_sums<V>(sums, reinterpret_cast<T*>(memory), a.map, group, a.sums + block * 2 * channels,
                channels);
}

}  // namespace

template <class S>
void head_forward(const HeadForward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  constexpr int V = 16 / sizeof(S);
  const int64_t channels = a.features.channels;
  const Plan p = plan(channels, V, a.features.samples, a.features.pixels());
  const bool cut = p.items.splits > 1;
  const ForwardArgs<S> args = {a.features,
                               a.scale_shift,
                               p.items,
                               p.map,
                               cut ? context.scratch<T>(p.items.count() * channels) : nullptr,
                               a.out};
  launch(context, head_forward_kernel<S, V>, p.grid(), p.threads, V * p.threads * sizeof(T), args);
  if (cut) {
    launch(context, head_mean_kernel<S>, {a.features.samples, narrow_blocks(channels)}, kMaxThreads,
           kMaxThreads * sizeof(T), args);
  }
}

template <class S>
void head_backward(const HeadBackward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  constexpr int V = kFew<S>;
  const int64_t channels = a.features.channels, samples = a.features.samples,
                pixels = a.features.pixels();
  const Plan p = plan(channels, V, samples, pixels);
  const int64_t each = p.each(), blocks = ceil_div(p.items.count(), each);
  T* const sums = context.scratch<T>(blocks * 2 * channels);
  launch(context, head_backward_kernel<S, V>, {blocks, p.chunks}, p.threads,
         V * p.threads * sizeof(T),
         BackwardArgs<S>{a.features, a.scale_shift, a.norm, a.grad_out, a.grad, p.items, each,
                         p.map, sums});
  norm_backward<T>({a.norm, sums, blocks, channels, static_cast<double>(samples * pixels), a.coef,
                    a.dnorm_weight, a.dnorm_bias},
                   context);
}

#define INSTANTIATE(S)                                            \
  template void head_forward<S>(const HeadForward<S>&, Context&); \
  template void head_backward<S>(const HeadBackward<S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
