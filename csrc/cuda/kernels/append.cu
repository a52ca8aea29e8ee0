// append copies channels into a feature buffer, finish_gradient gradients out of the gradient
// buffer:
//
//   features[n, p, offset + c] = x[n, c, p]
//   out[n, c, p] = coef0[n, c] G[n, p, offset + c] + coef1[n, c] + coef2[n, c] x[n, p, offset + c]
//
// The other side has any strides. Where its channels are neighbors too, threads take groups of
// channels of a pixel (channel_loops.cuh). Otherwise a block takes a tile of 32 channels by 64
// pixels through shared memory, so that both sides see contiguous accesses: it goes along pixels on
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

// The corner of a block's tile. Its threads go through it in kSteps steps, along pixels or
// channels.
struct Tile {
  static constexpr int kSteps = kTileChannels * kTilePixels / kMaxThreads;
  int64_t n, pixel, channel;

  DEVICE Tile(int64_t tiles_per_map)
      : n(blockIdx.x / tiles_per_map),
        pixel(blockIdx.x % tiles_per_map * kTilePixels),
        channel(static_cast<int64_t>(blockIdx.y) * kTileChannels) {}
};
struct Position {
  int pixel, channel;
};
DEVICE Position pixelwise(int step) {
  const int i = step * kMaxThreads + thread_id();
  return {i % kTilePixels, i / kTilePixels};
}
DEVICE Position channelwise(int step) {
  const int i = step * kMaxThreads + thread_id();
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
struct AppendArguments {
  StridedMaps<const S> x;
  S* data;  // at the first channel
  int64_t pitch, pixels;
  PixelRanges ranges;  // of append_rows_kernel
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) append_rows_kernel(AppendArguments<S> a) {
  wait_for_earlier_kernels();
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.x.channels);
  if (group.valid == 0) return;
  for (int64_t p = range.begin + a.map.line(); p < range.end; p += a.map.lines) {
    copy_first<V>(a.x.data + pixel_offset(a.x, range.sample, p) + group.first, group.valid,
                  a.data + (range.sample * a.pixels + p) * a.pitch + group.first);
  }
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) append_planes_kernel(AppendArguments<S> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  S* const shared = reinterpret_cast<S*>(memory);
  const Tile tile(ceil_div(a.pixels, kTilePixels));
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Position position = pixelwise(step);
    const int64_t p = tile.pixel + position.pixel, c = tile.channel + position.channel;
    if (p < a.pixels && c < a.x.channels) {
      shared[position.channel * kTilePitch<S> + position.pixel] =
          a.x.data[pixel_offset(a.x, tile.n, p) + c * a.x.stride_c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Position position = channelwise(step);
    const int64_t p = tile.pixel + position.pixel, c = tile.channel + position.channel;
    if (p < a.pixels && c < a.x.channels) {
      a.data[(tile.n * a.pixels + p) * a.pitch + c] =
          shared[position.channel * kTilePitch<S> + position.pixel];
    }
  }
}

template <class S>
struct FinishArguments {
  using T = Arithmetic<S>;
  const S* x;  // at the first channel
  const S* grad;
  int64_t x_pitch, grad_pitch, pixels, offset;
  Coefficients<T> coef;
  StridedMaps<S> out;
  PixelRanges ranges;  // of finish_rows_kernel
  ThreadMap map;

  DEVICE void coefficients(int64_t n, int64_t c, T (&values)[3]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) values[i] = coef.at(i, n, offset + c);
  }
};

template <class T>
DEVICE T true_gradient(const T (&coef)[3], T g, T x) {
  return affine(g, coef[0], affine(x, coef[2], coef[1]));
}

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) finish_rows_kernel(FinishArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.out.channels);
  T coef[3][V];
#pragma unroll
  for (int i = 0; i < 3; ++i)
    load_each<V>(&a.coef.at(i, range.sample, a.offset + group.first), group.valid, coef[i]);
  const int64_t first = range.sample * a.pixels;
  const S* const source[2] = {a.grad + first * a.grad_pitch + group.first,
                              a.x + first * a.x_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.x_pitch};
  for_pixels<V, 2>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&in)[2][V]) {
    T out[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      out[v] = true_gradient({coef[0][v], coef[1][v], coef[2][v]}, in[0][v], in[1][v]);
    store_first<V>(a.out.data + pixel_offset(a.out, range.sample, p) + group.first, group.valid,
                   out);
  });
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) finish_planes_kernel(FinishArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  S* const shared = reinterpret_cast<S*>(memory);
  const Tile tile(ceil_div(a.pixels, kTilePixels));
  const int64_t c = tile.channel + channelwise(0).channel;  // it is the same in every step
  T coef[3] = {};
  if (c < a.out.channels) a.coefficients(tile.n, c, coef);
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Position position = channelwise(step);
    const int64_t p = tile.pixel + position.pixel, row = tile.n * a.pixels + p;
    if (p < a.pixels && c < a.out.channels) {
      shared[position.channel * kTilePitch<S> + position.pixel] = store_as<S>(true_gradient(
          coef, widen(a.grad[row * a.grad_pitch + c]), widen(a.x[row * a.x_pitch + c])));
    }
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Position position = pixelwise(step);
    const int64_t p = tile.pixel + position.pixel, c = tile.channel + position.channel;
    if (p < a.pixels && c < a.out.channels) {
      a.out.data[pixel_offset(a.out, tile.n, p) + c * a.out.stride_c] =
          shared[position.channel * kTilePitch<S> + position.pixel];
    }
  }
}

}  // namespace

template <class S>
void append(const Append<S>& f, Context& context) {
  AppendArguments<S> a = {};
  a.x = f.x, a.data = f.features.data + f.offset;
  a.pitch = f.features.pitch, a.pixels = f.features.pixels();
  if (channels_are_neighbors(f.x)) {
    with_partition<S>(spacing(f.x) | spacing(f.features, f.offset), f.x.channels, f.x.samples,
                      a.pixels,
                      [&](auto V, auto& p) { launch(context, append_rows_kernel<S, V>, p, 0, a); });
  } else {
    launch(context, append_planes_kernel<S>, tile_grid(f.x), kMaxThreads, kTileBytes<S>, a);
  }
  slice_moments<S>(f.features.read_only(), f.offset, f.x.channels, f.moments, context);
}

template <class S>
void finish_gradient(const FinishGradient<S>& f, Context& context) {
  FinishArguments<S> a = {};
  a.x = f.features.data + f.offset, a.x_pitch = f.features.pitch;
  a.grad = f.grad.data + f.offset, a.grad_pitch = f.grad.pitch;
  a.pixels = f.features.pixels(), a.offset = f.offset, a.coef = f.coef, a.out = f.out;
  if (channels_are_neighbors(f.out)) {
    const uint64_t distances =
        spacing(f.features, f.offset) | spacing(f.grad, f.offset) | spacing(f.out);
    with_partition<S>(distances, f.out.channels, f.out.samples, a.pixels,
                      [&](auto V, auto& p) { launch(context, finish_rows_kernel<S, V>, p, 0, a); });
  } else {
    launch(context, finish_planes_kernel<S>, tile_grid(f.out), kMaxThreads, kTileBytes<S>, a);
  }
}

DENSENET_EXT_INSTANTIATE(append, Append)
DENSENET_EXT_INSTANTIATE(finish_gradient, FinishGradient)

}  // namespace densenet_ext::cuda
