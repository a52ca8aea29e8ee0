// Batch normalization, ReLU and the 3x3 max pool of stride 2 of the stem, forward and backward.
//
//   out = relu(max of a window of v),   v = scale*x + shift
//   dv = dout at the maximum of each window where that is positive
//   S1 = sum dv,  S2 = sum dv*(x-mean)*rstd
//   dx = gamma*rstd*(dv - S1/M - (x-mean)*rstd*S2/M)
//
// A rectifier cannot change which value of a window is the largest as long as one is positive, and
// where none is there is no gradient: so maxima are sought among v. As in PyTorch, the first of
// equals is the maximum, and a NaN is larger than whatever came before. Threads take groups of
// channels, blocks runs of windows (channel_loops.cuh). Backward finds the maxima again, with the
// sums, and notes the place of each in its window; then a thread gathers dx of 2x2 pixels from the
// four windows that they are in. Bytes moved: x twice in forward, twice in backward, with dout and
// places twice and dx once.
#include "norm_backward.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr uint16_t kNowhere = 9;  // places are counted row by row from 0 to 8

struct Windows {
  int height, width;          // of x
  int out_height, out_width;  // of what is pooled
};

// Whether the maximum so far gives way to a value that comes after it.
template <class T>
DEVICE bool gives_way(T best, T v) {
  return v > best || v != v;
}

// The pixels of a window, row by row: what does not exist is a copy of its neighbor in the window,
// so that all can be loaded at once.
template <int V, class S>
struct Window {
  S x[9][V];
  bool exists[9];

  DEVICE Window(const Windows& w, int window, const S* from, int64_t pitch, int valid) {
    const int top = window / w.out_width * 2 - 1, left = window % w.out_width * 2 - 1;
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const int row = top + i / 3, column = left + i % 3;
      const int y = row < 0          ? 0
                    : row < w.height ? row
                                     : w.height - 1,
                c = column < 0         ? 0
                    : column < w.width ? column
                                       : w.width - 1;
      exists[i] = y == row && c == column;
      load_raw<V>(from + (static_cast<int64_t>(y) * w.width + c) * pitch, valid, x[i]);
    }
  }
};

template <class S>
struct PoolArgs {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<S> out;
  Windows windows;
  const T* scale;
  const T* shift;
  Items items;
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) stem_pool_kernel(PoolArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  T scale[V], shift[V];
  load_each<V>(a.scale + group.first, group.valid, scale);
  load_each<V>(a.shift + group.first, group.valid, shift);
  const S* const from = a.x.row(run.sample * a.x.pixels()) + group.first;
  S* const to = a.out.row(run.sample * a.items.pixels) + group.first;
  for (int64_t p = run.begin + a.map.row(); p < run.end; p += a.map.rows) {
    const Window<V, S> window(a.windows, static_cast<int>(p), from, a.x.pitch, group.valid);
    T best[V];
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = T(-INFINITY);
#pragma unroll
    for (int i = 0; i < 9; ++i) {  // copies change nothing
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T value = affine(widen(window.x[i][v]), scale[v], shift[v]);
        if (gives_way(best[v], value)) best[v] = value;
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = relu(best[v]);
    store_first<V>(to + p * a.out.pitch, group.valid, best);
  }
}

template <class S>
struct MaximaArgs {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<const S> grad_out;
  Windows windows;
  const T* scale;
  const T* shift;
  const T* mean;
  Items items;
  int64_t each;  // items of a block
  ThreadMap map;
  uint16_t* places;  // [windows, places_pitch]; null: not wanted
  int64_t places_pitch;
  T* sums;  // [blocks, 2, channels]: sum dv and sum dv*(x - mean)
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) stem_maxima_kernel(MaximaArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const int64_t channels = a.x.channels, block = blockIdx.x;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  T scale[V], shift[V], mean[V], sums[2][V] = {};
  load_each<V>(a.scale + group.first, group.valid, scale);
  load_each<V>(a.shift + group.first, group.valid, shift);
  load_each<V>(a.mean + group.first, group.valid, mean);
  for (int64_t i = block * a.each; i < (block + 1) * a.each && i < a.items.count(); ++i) {
    if (group.valid == 0) break;
    const Run run = a.items[i];
    const S* const from = a.x.row(run.sample * a.x.pixels()) + group.first;
    for (int64_t p = run.begin + a.map.row(); p < run.end; p += a.map.rows) {
      const int64_t row = run.sample * a.items.pixels + p;
      const Window<V, S> window(a.windows, static_cast<int>(p), from, a.x.pitch, group.valid);
      T best[V], at_best[V], dv[V];
      uint16_t place[V];
      load_first<V>(a.grad_out.row(row) + group.first, group.valid, dv);
#pragma unroll
      for (int v = 0; v < V; ++v) best[v] = T(-INFINITY), at_best[v] = T(0), place[v] = kNowhere;
#pragma unroll
      for (int i = 0; i < 9; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T x = widen(window.x[i][v]), value = affine(x, scale[v], shift[v]);
          if (window.exists[i] && gives_way(best[v], value))
            best[v] = value, at_best[v] = x, place[v] = static_cast<uint16_t>(i);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (best[v] <= T(0)) dv[v] = T(0), place[v] = kNowhere;
        sums[0][v] += dv[v];
        sums[1][v] = affine(dv[v], at_best[v] - mean[v], sums[1][v]);
      }
      if (a.places != nullptr) {
        Word<2 * V> word;
        memcpy(&word, place, sizeof place);
        store_word<2 * V>(a.places + row * a.places_pitch + group.first, word);
      }
    }
  }
  store_sums<V>(sums, reinterpret_cast<T*>(memory), a.map, group, a.sums + block * 2 * channels,
                channels);
}

template <class S>
struct InputArgs {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<const S> grad_out;
  Maps<S> dx;
  Windows windows;
  Norm<T> norm;
  Coefficients<T> coef;  // of one row for all samples
  Items items;
  ThreadMap map;
  const uint16_t* places;
  int64_t places_pitch;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) stem_input_kernel(InputArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  T step[V], constant[V], factor[V];
  load_steps<V>(a.norm, group.first, group.valid, step);
  load_each<V>(&a.coef.at(1, 0, group.first), group.valid, constant);
  load_each<V>(&a.coef.at(2, 0, group.first), group.valid, factor);
  const int width = a.windows.width, across = a.windows.out_width;
  const int64_t pixel0 = run.sample * a.x.pixels(), window0 = run.sample * a.items.pixels;
  for (int64_t p = run.begin + a.map.row(); p < run.end; p += a.map.rows) {
    // This window and those after it to the right and below, where they exist; and the pixels from
    // its middle on.
    const int top = static_cast<int>(p) / across, left = static_cast<int>(p) % across;
    S g[4][V], x[4][V];
    uint16_t place[4][V];
    int64_t pixel[4];
    bool inside[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = top + i / 2 < a.windows.out_height && left + i % 2 < across;
      const int64_t window = window0 + p + (exists ? i / 2 * across + i % 2 : 0);
      load_raw<V>(a.grad_out.row(window) + group.first, group.valid, g[i]);
      const Word<2 * V> word = load_word<2 * V>(a.places + window * a.places_pitch + group.first);
      memcpy(place[i], &word, sizeof word);
#pragma unroll
      for (int v = 0; v < V; ++v) place[i][v] = exists ? place[i][v] : kNowhere;
      const int y = 2 * top + i / 2, c = 2 * left + i % 2;
      inside[i] = y < a.windows.height && c < width;
      pixel[i] = pixel0 + (inside[i] ? static_cast<int64_t>(y) * width + c : 0);
      load_raw<V>(a.x.row(pixel[i]) + group.first, group.valid, x[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!inside[i]) continue;
      T dv[V] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // the pixel's place in window j
        const int y = 1 + i / 2 - 2 * (j / 2), c = 1 + i % 2 - 2 * (j % 2);
        if (y < 0 || c < 0) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) dv[v] += place[j][v] == 3 * y + c ? widen(g[j][v]) : T(0);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dv[v] *= step[v];
        // otherwise only neighbors have to do with each other, even where x is NaN
        if (a.norm.training) dv[v] += affine(widen(x[i][v]), factor[v], constant[v]);
      }
      store_first<V>(a.dx.row(pixel[i]) + group.first, group.valid, dv);
    }
  }
}

template <class S, class E>
Windows windows_of(const Maps<S>& x, const Maps<E>& pooled) {
  return {static_cast<int>(x.height), static_cast<int>(x.width), static_cast<int>(pooled.height),
          static_cast<int>(pooled.width)};
}

// Makes scale and shift of all channels, and the statistics unless a has them.
template <class S>
ScaleShiftTable<Arithmetic<S>> fold_stem(const StemForward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, samples = a.x.samples;
  FoldNorm<T> fold = {};
  if (!a.has_statistics) {
    T* const mean = context.scratch<T>(samples * channels);
    T* const m2 = context.scratch<T>(samples * channels);
    slice_moments<S>(a.x, 0, channels, {mean, m2, channels}, context);
    fold.mean = mean, fold.m2 = m2;
  }
  fold.rows = samples, fold.pitch = fold.channels = channels, fold.pixels = a.x.pixels();
  fold.weight = a.weight, fold.bias = a.bias, fold.eps = a.eps;
  fold.has_statistics = a.has_statistics;
  fold.batch_mean = a.batch_mean, fold.batch_var = a.batch_var;
  fold.scale = context.scratch<T>(channels), fold.shift = context.scratch<T>(channels);
  fold.scale_rows = fold.shift_rows = 1;
  fold_norm<T>(fold, context);
  return {{fold.scale, 0}, {fold.shift, 0}};
}

}  // namespace

template <class S>
void stem_forward(const StemForward<S>& a, Context& context) {
  const auto scale_shift = fold_stem<S>(a, context);
  with_vector<S>(spacing(a.x) | spacing(a.out), [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Plan p = plan(a.x.channels, V, a.x.samples, a.out.pixels());
    launch(context, stem_pool_kernel<S, V>, p.grid(), p.threads, 0,
           PoolArgs<S>{a.x, a.out, windows_of(a.x, a.out), scale_shift.scale.data,
                       scale_shift.shift.data, p.items, p.map});
  });
}

template <class S>
void stem_backward(const StemBackward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  const int64_t channels = a.x.channels, samples = a.x.samples, pixels = a.grad_out.pixels();
  StemForward<S> forward = {};
  forward.x = a.x, forward.weight = a.norm.weight, forward.bias = a.bias, forward.eps = a.norm.eps;
  forward.has_statistics = true;  // they are only read
  forward.batch_mean = const_cast<T*>(a.norm.mean), forward.batch_var = const_cast<T*>(a.norm.var);
  const auto scale_shift = fold_stem<S>(forward, context);
  const Windows windows = windows_of(a.x, a.grad_out);
  const int64_t pitch = round_up(channels, kLanes);
  uint16_t* const places =
      a.dx.data ? context.scratch<uint16_t>(samples * pixels * pitch) : nullptr;
  const uint64_t distances =
      spacing(a.x) | spacing(a.grad_out) | (a.dx.data ? spacing(a.dx) : uint64_t{0});
  T* const coef = context.scratch<T>(3 * channels);
  with_vector<S, kFew<S>>(distances, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Plan p = plan(channels, V, samples, pixels);
    const int64_t each = p.each(), blocks = ceil_div(p.items.count(), each);
    T* const sums = context.scratch<T>(blocks * 2 * channels);
    launch(context, stem_maxima_kernel<S, V>, {blocks, p.chunks}, p.threads,
           V * p.threads * sizeof(T),
           MaximaArgs<S>{a.x, a.grad_out, windows, scale_shift.scale.data, scale_shift.shift.data,
                         a.norm.mean, p.items, each, p.map, places, pitch, sums});
    norm_backward<T>({a.norm,
                      sums,
                      blocks,
                      channels,
                      static_cast<double>(samples * a.x.pixels()),
                      {coef, 1, channels},
                      a.dnorm_weight,
                      a.dnorm_bias},
                     context);
    if (!a.dx.data) return;
    launch(context, stem_input_kernel<S, V>, p.grid(), p.threads, 0,
           InputArgs<S>{a.x,
                        a.grad_out,
                        a.dx,
                        windows,
                        a.norm,
                        {coef, 1, channels},
                        p.items,
                        p.map,
                        places,
                        pitch});
  });
}

#define INSTANTIATE(S)                                            \
  template void stem_forward<S>(const StemForward<S>&, Context&); \
  template void stem_backward<S>(const StemBackward<S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
