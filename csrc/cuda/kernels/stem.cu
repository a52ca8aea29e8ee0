// The stem ends with batch normalization, ReLU and a 3x3 max pool of stride 2.
//
//   out = relu(max of a window of v),   v = scale*x + shift
//   dv = dout at the maximum of each window where that is positive
//   S1 = sum dv,  S2 = sum dv*(x-mean)*rstd
//   dx = gamma*rstd*(dv - S1/M - (x-mean)*rstd*S2/M)
//
// ReLU cannot change which value of a window is the largest as long as one is positive, and where
// none is there is no gradient: so maxima are sought among v. As in PyTorch, the first of
// equals is the maximum, and a NaN is larger than all earlier values. Threads take groups of
// channels, blocks ranges of windows (channel_loops.cuh). Backward finds the maxima again, with the
// sums, and notes the position of each in its window; then a thread gathers dx of 2x2 pixels from
// the four windows that they are in. Bytes moved: x twice in forward, twice in backward, with dout
// and positions twice and dx once.
#include "norm_backward.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr uint16_t kNoPosition = 9;  // in a window, positions are 0 to 8, row by row

// The 3x3 windows of max pooling, one for each pixel of the pooled map.
struct Windows {
  int height, width;                // of x
  int pooled_height, pooled_width;  // half of them, rounded up
};

// True if v, which comes later in a window, is its new maximum.
template <class T>
DEVICE bool is_larger(T best, T v) {
  return v > best || v != v;
}

// The pixels of a window, row by row: one that does not exist is a copy of its neighbor in the
// window, so that all can be loaded at once.
template <int V, class S>
struct Window {
  S x[9][V];
  bool exists[9];

  DEVICE Window(const Windows& w, int window, const S* source, int64_t pitch, int valid) {
    const int top = window / w.pooled_width * 2 - 1, left = window % w.pooled_width * 2 - 1;
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
      load_raw<V>(source + (static_cast<int64_t>(y) * w.width + c) * pitch, valid, x[i]);
    }
  }
};

template <class S>
struct PoolArguments {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<S> out;
  Windows windows;
  const T* scale;
  const T* shift;
  PixelRanges ranges;
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) stem_pool_kernel(PoolArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  T scale[V], shift[V];
  load_each<V>(a.scale + group.first, group.valid, scale);
  load_each<V>(a.shift + group.first, group.valid, shift);
  const S* const source = a.x.row(range.sample * a.x.pixels()) + group.first;
  S* const target = a.out.row(range.sample * a.ranges.pixels) + group.first;
  for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines) {
    const Window<V, S> window(a.windows, static_cast<int>(p), source, a.x.pitch, group.valid);
    T best[V];
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = T(-INFINITY);
#pragma unroll
    for (int i = 0; i < 9; ++i) {  // copies change nothing
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T value = affine(widen(window.x[i][v]), scale[v], shift[v]);
        if (is_larger(best[v], value)) best[v] = value;
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = relu(best[v]);
    store_first<V>(target + p * a.out.pitch, group.valid, best);
  }
}

template <class S>
struct MaximaArguments {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<const S> grad_out;
  Windows windows;
  const T* scale;
  const T* shift;
  const T* mean;
  PixelRanges ranges;
  int64_t ranges_per_block;
  ThreadMap map;
  uint16_t* positions;  // [windows, places_pitch]; null: not wanted
  int64_t positions_pitch;
  T* sums;  // [blocks, 2, channels]: sum dv and sum dv*(x - mean)
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) stem_maxima_kernel(MaximaArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const int64_t channels = a.x.channels, block = blockIdx.x;
  const Group group = group_of<V>(a.map, blockIdx.y, channels);
  T scale[V], shift[V], mean[V], sums[2][V] = {};
  load_each<V>(a.scale + group.first, group.valid, scale);
  load_each<V>(a.shift + group.first, group.valid, shift);
  load_each<V>(a.mean + group.first, group.valid, mean);
  for (int64_t i = block * a.ranges_per_block;
       i < (block + 1) * a.ranges_per_block && i < a.ranges.count(); ++i) {
    if (group.valid == 0) break;
    const PixelRange range = a.ranges[i];
    const S* const source = a.x.row(range.sample * a.x.pixels()) + group.first;
    for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines) {
      const int64_t row = range.sample * a.ranges.pixels + p;
      const Window<V, S> window(a.windows, static_cast<int>(p), source, a.x.pitch, group.valid);
      T best[V], x_of_best[V], dv[V];
      uint16_t position[V];
      load_first<V>(a.grad_out.row(row) + group.first, group.valid, dv);
#pragma unroll
      for (int v = 0; v < V; ++v)
        best[v] = T(-INFINITY), x_of_best[v] = T(0), position[v] = kNoPosition;
#pragma unroll
      for (int i = 0; i < 9; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const T x = widen(window.x[i][v]), value = affine(x, scale[v], shift[v]);
          if (window.exists[i] && is_larger(best[v], value))
            best[v] = value, x_of_best[v] = x, position[v] = static_cast<uint16_t>(i);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (best[v] <= T(0)) dv[v] = T(0), position[v] = kNoPosition;
        sums[0][v] += dv[v];
        sums[1][v] = affine(dv[v], x_of_best[v] - mean[v], sums[1][v]);
      }
      if (a.positions != nullptr) {
        Word<2 * V> word;
        memcpy(&word, position, sizeof position);
        store_word<2 * V>(a.positions + row * a.positions_pitch + group.first, word);
      }
    }
  }
  store_sums<V>(sums, reinterpret_cast<T*>(memory), a.map, group, a.sums + block * 2 * channels,
                channels);
}

template <class S>
struct InputArguments {
  using T = Arithmetic<S>;
  Maps<const S> x;
  Maps<const S> grad_out;
  Maps<S> dx;
  Windows windows;
  Norm<T> norm;
  Coefficients<T> coef;  // one row for all samples
  PixelRanges ranges;
  ThreadMap map;
  const uint16_t* positions;
  int64_t positions_pitch;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) stem_input_kernel(InputArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  T gain[V], constant[V], factor[V];
  load_gains<V>(a.norm, group.first, group.valid, gain);
  load_each<V>(&a.coef.at(1, 0, group.first), group.valid, constant);
  load_each<V>(&a.coef.at(2, 0, group.first), group.valid, factor);
  const int width = a.windows.width, pooled_width = a.windows.pooled_width;
  const int64_t pixel0 = range.sample * a.x.pixels(), window0 = range.sample * a.ranges.pixels;
  for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines) {
    // Load this window and its neighbors to the right and below, where they exist; and the four
    // pixels from its middle on.
    const int top = static_cast<int>(p) / pooled_width, left = static_cast<int>(p) % pooled_width;
    S g[4][V], x[4][V];
    uint16_t position[4][V];
    int64_t pixel[4];
    bool is_pixel[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = top + i / 2 < a.windows.pooled_height && left + i % 2 < pooled_width;
      const int64_t window = window0 + p + (exists ? i / 2 * pooled_width + i % 2 : 0);
      load_raw<V>(a.grad_out.row(window) + group.first, group.valid, g[i]);
      const Word<2 * V> word =
          load_word<2 * V>(a.positions + window * a.positions_pitch + group.first);
      memcpy(position[i], &word, sizeof word);
#pragma unroll
      for (int v = 0; v < V; ++v) position[i][v] = exists ? position[i][v] : kNoPosition;
      const int y = 2 * top + i / 2, c = 2 * left + i % 2;
      is_pixel[i] = y < a.windows.height && c < width;
      pixel[i] = pixel0 + (is_pixel[i] ? static_cast<int64_t>(y) * width + c : 0);
      load_raw<V>(a.x.row(pixel[i]) + group.first, group.valid, x[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!is_pixel[i]) continue;
      T dv[V] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // the pixel's position in window j
        const int y = 1 + i / 2 - 2 * (j / 2), c = 1 + i % 2 - 2 * (j % 2);
        if (y < 0 || c < 0) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) dv[v] += position[j][v] == 3 * y + c ? widen(g[j][v]) : T(0);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dv[v] *= gain[v];
        // In inference a NaN in x must not reach dx through a factor of 0
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
void stem_forward(const StemForward<S>& f, Context& context) {
  const auto table = fold_stem<S>(f, context);
  PoolArguments<S> a = {};
  a.x = f.x, a.out = f.out, a.windows = windows_of(f.x, f.out);
  a.scale = table.scale.data, a.shift = table.shift.data;
  with_partition<S>(spacing(f.x) | spacing(f.out), f.x.channels, f.x.samples, f.out.pixels(),
                    [&](auto V, auto& p) { launch(context, stem_pool_kernel<S, V>, p, 0, a); });
}

template <class S>
void stem_backward(const StemBackward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  const int64_t channels = f.x.channels, samples = f.x.samples, pixels = f.grad_out.pixels();
  StemForward<S> forward = {};
  forward.x = f.x, forward.weight = f.norm.weight, forward.bias = f.bias, forward.eps = f.norm.eps;
  forward.has_statistics = true;  // they are only read
  forward.batch_mean = const_cast<T*>(f.norm.mean), forward.batch_var = const_cast<T*>(f.norm.var);
  const auto table = fold_stem<S>(forward, context);

  MaximaArguments<S> maxima = {};
  maxima.x = f.x, maxima.grad_out = f.grad_out, maxima.windows = windows_of(f.x, f.grad_out);
  maxima.scale = table.scale.data, maxima.shift = table.shift.data, maxima.mean = f.norm.mean;
  maxima.positions_pitch = round_up(channels, kLanes);
  if (f.dx.data)
    maxima.positions = context.scratch<uint16_t>(samples * pixels * maxima.positions_pitch);
  InputArguments<S> input = {};
  input.x = f.x, input.grad_out = f.grad_out, input.dx = f.dx, input.windows = maxima.windows;
  input.norm = f.norm, input.coef = {context.scratch<T>(3 * channels), 1, channels};
  input.positions = maxima.positions, input.positions_pitch = maxima.positions_pitch;

  const uint64_t distances =
      spacing(f.x) | spacing(f.grad_out) | (f.dx.data ? spacing(f.dx) : uint64_t{0});
  with_partition<S, kSummedVector<S>>(distances, channels, samples, pixels, [&](auto V, auto& p) {
    maxima.ranges = p.ranges, maxima.map = p.map;
    maxima.ranges_per_block = p.ranges_per_block();
    const int64_t blocks = ceil_div(p.ranges.count(), maxima.ranges_per_block);
    maxima.sums = context.scratch<T>(blocks * 2 * channels);
    launch(context, stem_maxima_kernel<S, V>, {blocks, p.chunks}, p.threads,
           V * p.threads * sizeof(T), maxima);
    norm_backward(
        norm_backward_of<T>(f, input.coef, maxima.sums, blocks, channels, samples * f.x.pixels()),
        context);
    if (f.dx.data) launch(context, stem_input_kernel<S, V>, p, 0, input);
  });
}

DENSENET_EXT_INSTANTIATE(stem_forward, StemForward)
DENSENET_EXT_INSTANTIATE(stem_backward, StemBackward)

}  // namespace densenet_ext::cuda
