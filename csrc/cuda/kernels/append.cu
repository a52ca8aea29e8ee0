// Channels into a feature buffer, and gradients of channels out of the gradient buffer:
//
//   features[n, p, offset + c] = x[n, c, p]
//   out[n, c, p] = coef0[n, c] G[n, p, offset + c] + coef1[n, c] + coef2[n, c] x[n, p, offset + c]
//
// The other side has any strides. Where its channels are neighbors too, threads take groups of
// channels of a pixel (channel_loops.cuh). Elsewhere a block takes a tile of 32 channels by 64
// pixels through shared memory, so that both sides see runs of neighbors: it goes along pixels on
// the side of the planes and along channels on the side of the buffer. Bytes moved: append x and
// its copy once, and the copy again for its moments; finish_gradient G, x and out once.
#include "channel_loops.cuh"

namespace densenet_ext::cuda {
namespace {

constexpr int kTileChannels = 32, kTilePixels = 64;
// Rows of a tile are an odd number of words apart: no two channels of a pixel share a bank.
template <class S>
constexpr int kTilePitch = kTilePixels + (sizeof(S) == 2 ? 2 : 1);
template <class S>
constexpr int64_t kTileBytes = kTileChannels * kTilePitch<S> * sizeof(S);

// A tile's corner, and the place of a thread in it, step by step: along pixels, and along channels.
struct Tile {
  static constexpr int kSteps = kTileChannels * kTilePixels / kMaxThreads;
  int64_t n, pixel, channel;

  DEVICE Tile(int64_t tiles_per_map)
      : n(blockIdx.x / tiles_per_map),
        pixel(blockIdx.x % tiles_per_map * kTilePixels),
        channel(static_cast<int64_t>(blockIdx.y) * kTileChannels) {}
};
struct Place {
  int pixel, channel;
};
DEVICE Place along_pixels(int step) {
  const int i = step * kMaxThreads + static_cast<int>(threadIdx.x);
  return {i % kTilePixels, i / kTilePixels};
}
DEVICE Place along_channels(int step) {
  const int i = step * kMaxThreads + static_cast<int>(threadIdx.x);
  return {i / kTileChannels, i % kTileChannels};
}

template <class E>
Grid tile_grid(const StridedMaps<E>& maps) {
  return {maps.samples * ceil_div(maps.height * maps.width, kTilePixels),
          ceil_div(maps.channels, kTileChannels)};
}

template <class E>
bool channels_are_neighbors(const StridedMaps<E>& maps) {
  return maps.stride_c == 1 || maps.channels == 1;
}
template <class S>
struct AppendArgs {
  StridedMaps<const S> x;
  S* data;  // at the first channel
  int64_t pitch, pixels;
  Items items;  // of append_rows_kernel
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) append_rows_kernel(AppendArgs<S> a) {
  wait_for_earlier_kernels();
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  for (int64_t p = run.begin + a.map.row(); p < run.end; p += a.map.rows) {
    copy_first<V>(a.x.data + pixel_offset(a.x, run.sample, p) + group.first, group.valid,
                  a.data + (run.sample * a.pixels + p) * a.pitch + group.first);
  }
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) append_planes_kernel(AppendArgs<S> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  S* const shared = reinterpret_cast<S*>(memory);
  const Tile tile(ceil_div(a.pixels, kTilePixels));
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Place at = along_pixels(step);
    const int64_t p = tile.pixel + at.pixel, c = tile.channel + at.channel;
    if (p < a.pixels && c < a.x.channels) {
      shared[at.channel * kTilePitch<S> + at.pixel] =
          a.x.data[pixel_offset(a.x, tile.n, p) + c * a.x.stride_c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Place at = along_channels(step);
    const int64_t p = tile.pixel + at.pixel, c = tile.channel + at.channel;
    if (p < a.pixels && c < a.x.channels) {
      a.data[(tile.n * a.pixels + p) * a.pitch + c] = shared[at.channel * kTilePitch<S> + at.pixel];
    }
  }
}

template <class S>
struct FinishArgs {
  using T = Arithmetic<S>;
  const S* x;  // at the first channel
  const S* grad;
  int64_t x_pitch, grad_pitch, pixels, offset;
  Coefficients<T> coef;
  StridedMaps<S> out;
  Items items;  // of finish_rows_kernel
  ThreadMap map;

  DEVICE void coefficients(int64_t n, int64_t c, T (&values)[3]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) values[i] = coef.at(i, n, offset + c);
  }
};

template <class T>
DEVICE T true_gradient(T factor, T constant, T slope, T g, T x) {
  return affine(g, factor, affine(x, slope, constant));
}

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) finish_rows_kernel(FinishArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.out.channels);
  T coef[3][V];
#pragma unroll
  for (int i = 0; i < 3; ++i)
    load_each<V>(&a.coef.at(i, run.sample, a.offset + group.first), group.valid, coef[i]);
  const int64_t first = run.sample * a.pixels;
  const S* const from[2] = {a.grad + first * a.grad_pitch + group.first,
                            a.x + first * a.x_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.x_pitch};
  for_pixels<V, 2>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&in)[2][V]) {
    T out[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      out[v] = true_gradient(coef[0][v], coef[1][v], coef[2][v], in[0][v], in[1][v]);
    store_first<V>(a.out.data + pixel_offset(a.out, run.sample, p) + group.first, group.valid, out);
  });
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) finish_planes_kernel(FinishArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  S* const shared = reinterpret_cast<S*>(memory);
  const Tile tile(ceil_div(a.pixels, kTilePixels));
  const int64_t own = tile.channel + along_channels(0).channel;  // the same in every step
  T coef[3] = {};
  if (own < a.out.channels) a.coefficients(tile.n, own, coef);
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Place at = along_channels(step);
    const int64_t p = tile.pixel + at.pixel, row = tile.n * a.pixels + p;
    if (p < a.pixels && own < a.out.channels) {
      shared[at.channel * kTilePitch<S> + at.pixel] = store_as<S>(
          true_gradient(coef[0], coef[1], coef[2], widen(a.grad[row * a.grad_pitch + own]),
                        widen(a.x[row * a.x_pitch + own])));
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Place at = along_pixels(step);
    const int64_t p = tile.pixel + at.pixel, c = tile.channel + at.channel;
    if (p < a.pixels && c < a.out.channels) {
      a.out.data[pixel_offset(a.out, tile.n, p) + c * a.out.stride_c] =
          shared[at.channel * kTilePitch<S> + at.pixel];
    }
  }
}

}  // namespace

template <class S>
void append(const Append<S>& a, Context& context) {
  const int64_t pixels = a.features.pixels();
  AppendArgs<S> args = {a.x, a.features.data + a.offset, a.features.pitch, pixels, {}, {}};
  if (channels_are_neighbors(a.x)) {
    with_vector<S>(spacing(a.x) | spacing(a.features, a.offset), [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const Plan p = plan(a.x.channels, V, a.x.samples, pixels);
      args.items = p.items, args.map = p.map;
      launch(context, append_rows_kernel<S, V>, p.grid(), p.threads, 0, args);
    });
  } else {
    launch(context, append_planes_kernel<S>, tile_grid(a.x), kMaxThreads, kTileBytes<S>, args);
  }
  slice_moments<S>(a.features.read_only(), a.offset, a.x.channels, a.moments, context);
}

template <class S>
void finish_gradient(const FinishGradient<S>& a, Context& context) {
  const int64_t pixels = a.features.pixels();
  FinishArgs<S> args = {a.features.data + a.offset,
                        a.grad.data + a.offset,
                        a.features.pitch,
                        a.grad.pitch,
                        pixels,
                        a.offset,
                        a.coef,
                        a.out,
                        {},
                        {}};
  if (channels_are_neighbors(a.out)) {
    const uint64_t distances =
        spacing(a.features, a.offset) | spacing(a.grad, a.offset) | spacing(a.out);
    with_vector<S>(distances, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const Plan p = plan(a.out.channels, V, a.out.samples, pixels);
      args.items = p.items, args.map = p.map;
      launch(context, finish_rows_kernel<S, V>, p.grid(), p.threads, 0, args);
    });
  } else {
    launch(context, finish_planes_kernel<S>, tile_grid(a.out), kMaxThreads, kTileBytes<S>, args);
  }
}

#define INSTANTIATE(S)                                 \
  template void append<S>(const Append<S>&, Context&); \
  template void finish_gradient<S>(const FinishGradient<S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
