// The transition is batch normalization, ReLU, 1x1 convolution and 2x2 average pooling. Pooling and
// the convolution commute, so pool first: a quarter of the products.
//
//   zp[p', c] = mean of the 4 pixels of relu(scale*x + shift)
//   out[p', o] = sum_c zp[p', c] W[o, c]
//
// Two launches after packing W: threads take groups of channels of pooled pixels
// (channel_loops.cuh) and write zp to scratch memory; blocks take tiles of 128 pooled pixels by 64
// outputs (gemm_tile.cuh). Bytes moved a pixel of the map: C*e read, C/4*e written and read again,
// O/4*e written.
#include "transition.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
struct PoolArguments {
  using T = Arithmetic<S>;
  Maps<const S> features;
  ScaleShiftTable<T> scale_shift;
  Windows windows;
  PixelRanges ranges;  // of the pooled map
  ThreadMap map;
  S* pooled;  // [samples*pixels, pitch]
  int64_t pitch;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) pool_kernel(PoolArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.features.channels);
  if (group.valid == 0) return;
  T scale[V], shift[V];
  load_scale_shift<V>(a.scale_shift, range.sample, group.first, group.valid, scale, shift);
  for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines) {
    const int64_t corner = a.windows.corner(range.sample, static_cast<int>(p));
    T x[4][V], mean[V];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_first<V>(a.features.row(corner + a.windows.step(i)) + group.first, group.valid, x[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) x[i][v] = relu(affine(x[i][v], scale[v], shift[v]));
    }
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] = (x[0][v] + x[1][v] + (x[2][v] + x[3][v])) * T(0.25);
    store_first<V>(a.pooled + (range.sample * a.ranges.pixels + p) * a.pitch + group.first,
                   group.valid, mean);
  }
}

template <class Math>
using Product = TileProduct<Math, false, false>;

template <class S>
struct OutArguments {
  Matrix<S> pooled, weight;
  StridedMaps<S> out;
  bool is_vectorized;  // out's channels are neighbors, their groups of 16 bytes aligned
};

template <class Math>
KERNEL __launch_bounds__(Product<Math>::kThreads, sizeof(typename Math::T) == 8 ? 1 : 2)
    out_kernel(OutArguments<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using P = Product<Math>;
  using S = typename P::S;
  using T = typename P::T;
  constexpr int V = kVector<S>;
  DYNAMIC_SHARED(memory);
  // Blocks next to each other share their rows of zp.
  const int64_t column_tiles = ceil_div(a.out.channels, P::kN);
  const TilePlace place = {blockIdx.x / column_tiles * P::kM, blockIdx.x % column_tiles * P::kN, 0,
                           a.pooled.columns};
  P product;
  product.compute(memory, a.pooled, a.weight, place);
  T* const result = reinterpret_cast<T*>(memory);
  product.store_shared(result);

  const StridedMaps<S>& out = a.out;
  const int64_t pixels = out.height * out.width;
  if (a.is_vectorized) {
    constexpr int groups = P::kN / V;
    for (int i = thread_id(); i < P::kM * groups; i += P::kThreads) {
      const int row = i / groups, column = i % groups * V;
      const int64_t m = place.m + row, o = place.n + column, remaining = out.channels - o;
      if (m >= a.pooled.rows || remaining <= 0) continue;
      T values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = result[row * P::kPitchC + column + v];
      store_first<V>(out.data + pixel_offset(out, m / pixels, m % pixels) + o,
                     remaining < V ? static_cast<int>(remaining) : V, values);
    }
    return;
  }
  // Neighboring threads have neighboring elements of `out`.
  const bool along_channels = out.stride_c == 1;
  for (int i = thread_id(); i < P::kM * P::kN; i += P::kThreads) {
    const int row = along_channels ? i / P::kN : i % P::kM,
              column = along_channels ? i % P::kN : i / P::kM;
    const int64_t m = place.m + row, o = place.n + column;
    if (m >= a.pooled.rows || o >= out.channels) continue;
    out.data[pixel_offset(out, m / pixels, m % pixels) + o * out.stride_c] =
        store_as<S>(result[row * P::kPitchC + column]);
  }
}

}  // namespace

template <class S>
void transition_forward(const TransitionForward<S>& f, Context& context) {
  constexpr int V = kVector<S>;
  const Windows windows = Windows::of(f.features);
  const int64_t channels = f.features.channels, samples = f.features.samples,
                rows = samples * windows.pooled_pixels(), pitch = round_up(channels, kLanes);
  if (rows == 0 || f.out.channels == 0) return;
  const Partition p = partition(channels, V, samples, windows.pooled_pixels());
  PoolArguments<S> pool = {};
  pool.features = f.features, pool.scale_shift = f.scale_shift, pool.windows = windows;
  pool.pooled = context.scratch<S>(rows * pitch), pool.pitch = pitch;
  launch(context, pool_kernel<S, V>, p, 0, pool);
  dispatch_math<S>(context, [&](auto math) {
    using Math = decltype(math);
    using P = Product<Math>;
    OutArguments<S> a = {};
    a.pooled = {pool.pooled, rows, channels, pitch};
    a.weight = packed_weight<Math>(f.weight, f.out.channels, channels, context);
    a.out = f.out, a.is_vectorized = f.out.stride_c == 1 && spacing(f.out) % 16 == 0;
    launch(context, out_kernel<Math>, {ceil_div(rows, P::kM) * ceil_div(f.out.channels, P::kN)},
           P::kThreads, P::kBytes, a);
  });
}

DENSENET_EXT_INSTANTIATE(transition_forward, TransitionForward)

}  // namespace densenet_ext::cuda
