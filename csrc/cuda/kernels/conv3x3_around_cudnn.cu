// What is around the convolution where it is a library's: four maps over packed channels-last
// tensors, and the sums of norm2's backward.
//
//   h = relu(scale * b + shift)                                    reads K2, writes K2 a row
//   slice = dropout(y)                                             reads k, writes k
//   dy = dropout(coef0 G + coef1 + coef2 x)                        reads 2k, writes k
//   dv = dh mask [v > 0],  v = scale * b + shift,                  reads 2 K2, writes K2
//     S1 = sum_p dv,  S2 = sum_p dv (b - mean)
//
// Threads and blocks lie as in channel_loops.cuh: a thread has V channels of some pixels of one
// sample, so what belongs to a channel stays in registers. Sums go to scratch memory, a part for
// each block, and a last kernel adds them in order.
#include "conv3x3.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
int64_t bytes_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(S));
}

// ---- h -----------------------------------------------------------------------------------------

template <class S>
struct InputArgs {
  const S* bottleneck;
  int64_t pitch;
  ScaleShiftTable<Arithmetic<S>> norm;
  int64_t width;
  S* h;  // [M, width]
  Items items;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_input_kernel(InputArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.width);
  const int64_t first = run.sample * a.items.pixels;
  T scale[V], shift[V];
  load_each<V>(a.norm.scale.row(run.sample) + group.first, group.valid, scale);
  load_each<V>(a.norm.shift.row(run.sample) + group.first, group.valid, shift);
  const S* const from[1] = {a.bottleneck + first * a.pitch + group.first};
  const int64_t pitch[1] = {a.pitch};
  S* const to = a.h + first * a.width + group.first;
  for_pixels<V, 1>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&x)[1][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[0][i] = relu(affine(x[0][i], scale[i], shift[i]));
    store_first<V>(to + p * a.width, group.valid, x[0]);
  });
}

// ---- the slice ---------------------------------------------------------------------------------

template <class S>
struct OutputArgs {
  const S* y;  // [M, growth]
  int64_t growth;
  Dropout<Arithmetic<S>> dropout;
  S* slice;  // at its first channel
  int64_t pitch;
  Items items;
  ThreadMap map;
};
// The least number of blocks, here and below, is what keeps ptxas from spilling for sm_80.
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_output_kernel(OutputArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.growth);
  const int64_t first = run.sample * a.items.pixels;
  const S* const from[1] = {a.y + first * a.growth + group.first};
  const int64_t pitch[1] = {a.growth};
  S* const to = a.slice + first * a.pitch + group.first;
  for_pixels<V, 1>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&y)[1][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < group.valid)
        y[0][i] = a.dropout(y[0][i], run.sample, group.first + i, p, a.growth, a.items.pixels);
    }
    store_first<V>(to + p * a.pitch, group.valid, y[0]);
  });
}

// ---- dy ----------------------------------------------------------------------------------------

template <class S>
struct OutputGradientArgs {
  const S* features;  // both at the first channel of the slice
  const S* grad;
  int64_t features_pitch, grad_pitch;
  Coefficients<Arithmetic<S>> coef;
  int64_t offset, growth;
  Dropout<Arithmetic<S>> dropout;
  S* dy;  // [M, growth]
  Items items;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_output_gradient_kernel(OutputGradientArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.growth);
  const int64_t first = run.sample * a.items.pixels;
  T coef[3][V];
#pragma unroll
  for (int j = 0; j < 3; ++j)
    load_each<V>(&a.coef.at(j, run.sample, a.offset + group.first), group.valid, coef[j]);
  const S* const from[2] = {a.grad + first * a.grad_pitch + group.first,
                            a.features + first * a.features_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.features_pitch};
  S* const to = a.dy + first * a.growth + group.first;
  for_pixels<V, 2>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&x)[2][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[0][i] = affine(coef[0][i], x[0][i], affine(coef[2][i], x[1][i], coef[1][i]));
      if (i < group.valid)
        x[0][i] = a.dropout(x[0][i], run.sample, group.first + i, p, a.growth, a.items.pixels);
    }
    store_first<V>(to + p * a.growth, group.valid, x[0]);
  });
}

// ---- dv and the sums ---------------------------------------------------------------------------

template <class S>
struct InputGradientArgs {
  using T = Arithmetic<S>;
  const S* bottleneck;
  int64_t pitch;  // of bottleneck and dv
  ScaleShiftTable<T> norm;
  PerChannel<T> mask;
  const T* mean;
  int64_t width;
  const S* dh;  // [M, width]
  S* dv;
  T* parts;  // [items, 2, width]
  Items items;
  ThreadMap map;
};
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) conv3x3_input_gradient_kernel(InputGradientArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(shared);
  const Run run = a.items[blockIdx.x];
  // Channels up to the pitch: those beyond the width have no gradient, and are written as 0.
  const Group group = group_of<V>(a.map, blockIdx.y, a.pitch);
  const int64_t left = a.width - group.first;
  const int valid = left < group.valid ? left > 0 ? static_cast<int>(left) : 0 : group.valid;
  const int64_t first = run.sample * a.items.pixels;
  T scale[V], shift[V], mask[V], mean[V], sums[2 * V] = {};
  const int64_t column = valid > 0 ? group.first : 0;
  load_each<V>(a.norm.scale.row(run.sample) + column, valid, scale);
  load_each<V>(a.norm.shift.row(run.sample) + column, valid, shift);
  load_each<V>(a.mean + column, valid, mean);
#pragma unroll
  for (int i = 0; i < V; ++i) mask[i] = T(1);
  if (a.mask.data != nullptr) load_each<V>(a.mask.row(run.sample) + column, valid, mask);
  const S* const from[2] = {a.dh + first * a.width + column,
                            a.bottleneck + first * a.pitch + column};
  const int64_t pitch[2] = {a.width, a.pitch};
  S* const to = a.dv + first * a.pitch + group.first;
  for_pixels<V, 2>(run, a.map, valid, from, pitch, [&](int64_t p, T(&x)[2][V]) {
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
    store_first<V>(to + p * a.pitch, group.valid, x[0]);
  });
  if (valid == 0 && group.valid > 0) {
    const T nothing[V] = {};
    for (int64_t p = run.begin + a.map.row(); p < run.end; p += a.map.rows)
      store_first<V>(to + p * a.pitch, group.valid, nothing);
  }

  sum_rows(sums, reinterpret_cast<T*>(shared), a.map);
  T* const part = a.parts + static_cast<int64_t>(blockIdx.x) * 2 * a.width + group.first;
  if (a.map.row() == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < valid) part[i] = sums[i], part[a.width + i] = sums[V + i];
    }
  }
}

template <class S>
struct WideFinishArgs {
  using T = Arithmetic<S>;
  StridedMaps<const S> dw;  // [growth, width, 3, 3]; data null: there were no samples
  T* dweight;
  int64_t weight_blocks;
  NormSums<T> norm;
};
// A block has kFinishThreads weights, or some channels of norm2.
template <class S>
KERNEL __launch_bounds__(kFinishThreads, 4) conv3x3_wide_finish_kernel(WideFinishArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(shared);
  if (blockIdx.x < a.weight_blocks) {
    const unsigned i = blockIdx.x * kFinishThreads + threadIdx.x,
                   width = static_cast<unsigned>(a.dw.channels);
    const unsigned tap = i % kTaps, c = i / kTaps % width, o = i / kTaps / width;
    if (o < a.dw.samples) {
      const int64_t at =
          o * a.dw.stride_n + c * a.dw.stride_c + tap / 3 * a.dw.stride_h + tap % 3 * a.dw.stride_w;
      a.dweight[i] = a.dw.data != nullptr ? widen(a.dw.data[at]) : T(0);
    }
  } else {
    finish_norm(a.norm, blockIdx.x - a.weight_blocks, reinterpret_cast<double*>(shared));
  }
}

}  // namespace

template <class S>
void conv3x3_input(const S* bottleneck, const ScaleShiftTable<Arithmetic<S>>& norm, int64_t samples,
                   int64_t pixels, int64_t width, S* h, Context& context) {
  const int64_t pitch = round_up(width, kLanes);
  with_vector<S>(spacing(bottleneck, bytes_of<S>(pitch)) | spacing(h, bytes_of<S>(width)),
                 [&](auto vector) {
                   constexpr int V = decltype(vector)::value;
                   const Plan p = plan(width, V, samples, pixels);
                   launch(context, conv3x3_input_kernel<S, V>, p.grid(), p.threads, 0,
                          InputArgs<S>{bottleneck, pitch, norm, width, h, p.items, p.map});
                 });
}

template <class S>
void conv3x3_output(const Conv3x3Forward<S>& f, const S* y, Context& context) {
  with_vector<S, kFew<S>>(
      spacing(f.features, f.offset) | spacing(y, bytes_of<S>(f.growth)), [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const Plan p = plan(f.growth, V, f.features.samples, f.features.pixels());
        launch(context, conv3x3_output_kernel<S, V>, p.grid(), p.threads, 0,
               OutputArgs<S>{y,
                             f.growth,
                             {f.dropout_mask, static_cast<Arithmetic<S>>(f.dropout_scale)},
                             f.features.data + f.offset,
                             f.features.pitch,
                             p.items,
                             p.map});
      });
}

template <class S>
void conv3x3_output_gradient(const Conv3x3Backward<S>& f, S* dy, Context& context) {
  with_vector<S>(
      spacing(f.features, f.offset) | spacing(f.grad, f.offset) |
          spacing(dy, bytes_of<S>(f.growth)),
      [&](auto vector) {
        constexpr int V = decltype(vector)::value;
        const Plan p = plan(f.growth, V, f.features.samples, f.features.pixels());
        launch(context, conv3x3_output_gradient_kernel<S, V>, p.grid(), p.threads, 0,
               OutputGradientArgs<S>{f.features.data + f.offset,
                                     f.grad.data + f.offset,
                                     f.features.pitch,
                                     f.grad.pitch,
                                     f.coef,
                                     f.offset,
                                     f.growth,
                                     {f.dropout_mask, static_cast<Arithmetic<S>>(f.dropout_scale)},
                                     dy,
                                     p.items,
                                     p.map});
      });
}

template <class S>
void conv3x3_input_gradient(const Conv3x3Backward<S>& f, const S* dh,
                            const StridedMaps<const S>& dw, Context& context) {
  using T = Arithmetic<S>;
  const int64_t pitch = round_up(f.width, kLanes);
  NormSums<T> sums = {
      nullptr,      0,          2 * f.width, f.width, f.norm, f.features.count(), f.dnorm_weight,
      f.dnorm_bias, f.db_affine};
  with_vector<S>(spacing(f.bottleneck, bytes_of<S>(pitch)) | spacing(f.dv, 0) |
                     spacing(dh, bytes_of<S>(f.width)),
                 [&](auto vector) {
                   constexpr int V = decltype(vector)::value;
                   const Plan p = plan(pitch, V, f.features.samples, f.features.pixels());
                   sums.count = p.items.count();
                   T* const parts = context.scratch<T>(sums.count * sums.step);
                   sums.parts = parts;
                   launch(
                       context, conv3x3_input_gradient_kernel<S, V>, p.grid(), p.threads,
                       bytes_of<T>(2 * V * p.threads),
                       InputGradientArgs<S>{f.bottleneck, pitch, f.scale_shift, f.post_mask,
                                            f.norm.mean, f.width, dh, f.dv, parts, p.items, p.map});
                 });
  const int64_t weight_blocks = ceil_div(kTaps * f.growth * f.width, kFinishThreads);
  launch(context, conv3x3_wide_finish_kernel<S>, {weight_blocks + narrow_blocks(f.width)},
         kFinishThreads, kFinishShared, WideFinishArgs<S>{dw, f.dweight, weight_blocks, sums});
}

#define INSTANTIATE(S)                                                                           \
  template void conv3x3_input(const S*, const ScaleShiftTable<Arithmetic<S>>&, int64_t, int64_t, \
                              int64_t, S*, Context&);                                            \
  template void conv3x3_output(const Conv3x3Forward<S>&, const S*, Context&);                    \
  template void conv3x3_output_gradient(const Conv3x3Backward<S>&, S*, Context&);                \
  template void conv3x3_input_gradient(const Conv3x3Backward<S>&, const S*,                      \
                                       const StridedMaps<const S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
