// Computes the 1x1 convolution of a dense layer, with batch normalization and ReLU in its load, and
// the moments of b over all rows:
//
//   b[m, o] = sum_c relu(scale[c]*x[m, c] + shift[c]) * W[o, c]
//
// A tile of up to 256 pixels of all input channels is normalized and rectified into z [C,
// positions] in the second-level cache. A register block of 8 pixels by 3 vectors of outputs then
// runs over a chunk of channels and meanwhile fetches the next tile of x; b holds the sums from
// chunk to chunk. Threads have contiguous tiles. Bytes moved: x once, b once.
#include <type_traits>

#include "cpu/parallel.h"
#include "instantiate.h"
#include "microkernel.h"
#include "pack.h"
#include "pixel_tiles.h"
#include "row_moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

constexpr int64_t kChunk = 96;  // channels whose z and W fit the first-level cache

template <class S, class T = Arithmetic<S>>
void bottleneck_tile(const BottleneckForward<S>& a, const Tile& tile, const Tile& next,
                     const T* weight, int64_t pitch, T* z, int64_t stride) {
  for (int64_t c = 0; c < a.channels; ++c)
    norm_relu_tile(a.features, a.scale_shift, tile, c, z + c * stride);
  S* const rows = a.bottleneck + (tile.sample * a.features.pixels() + tile.pixel) * pitch;
  // There is only one chunk if b would round its sums.
  const int64_t chunk = std::is_same_v<S, T> ? kChunk : a.channels;
  for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
    constexpr int NV = decltype(group)::value;
    const T* const panel = weight + first * kVec<T> * a.channels;
    for (int64_t c = 0; c < a.channels; c += chunk) {
      for (int64_t m = 0; m < tile.pixels(); m += kBlockPixels) {
        const S* const prefetch =
            a.features.plane(next.sample + m / tile.count, c) + next.pixel + m % tile.count;
        const bool fetch = first == 0 && m * sizeof(S) % 64 == 0;
        S* const out = rows + m * pitch + first * kVec<T>;
        const int64_t valid = std::min<int64_t>(kBlockPixels, tile.pixels() - m);
        Block<T, kBlockPixels, NV> block;
        if (c > 0) block.load_rows(out, pitch, valid);
        block.product(std::min(chunk, a.channels - c), z + c * stride + m, 1, stride,
                      panel + c * NV * kVec<T>, NV * kVec<T>, prefetch,
                      fetch ? a.features.plane_stride : 0);
        block.store_rows(out, pitch, valid);
      }
    }
  });
}

}  // namespace

template <class S>
void bottleneck_forward(const BottleneckForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t pitch = round_up(a.width, kLanes);
  const int64_t capacity =
      std::max(kLeastBottleneckPixels, tile_capacity<T>(a.channels, kForwardPixels));
  const Tiling tiling(a.features.samples, a.features.pixels(), capacity, 1);
  const int64_t threads = thread_count(tiling.count);

  const Scratch packed(sizeof(T) * a.channels * pitch);
  T* const weight = packed.as<T>();
  for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
    constexpr int64_t columns = decltype(group)::value * kVec<T>;
    const int64_t o = first * kVec<T>;
    pack_transposed(a.weight + o * a.channels, std::min(columns, a.width - o), a.channels, columns,
                    weight + o * a.channels);
  });
  const int64_t stride = padded_stride(capacity), tile_values = a.channels * stride;
  const Scratch tiles(sizeof(T) * threads * tile_values);
  const RowMoments moments(threads, pitch);

  parallel(tiling.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const z = tiles.as<T>() + thread * tile_values;
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = tiling[i], next = tiling[std::min(i + 1, end - 1)];
      bottleneck_tile<S>(a, tile, next, weight, pitch, z, stride);
      if (!a.mean) continue;
      const S* const b = a.bottleneck + (tile.sample * a.features.pixels() + tile.pixel) * pitch;
      moments[thread].add_rows(b, tile.pixels(), pitch, pitch);
    }
  });
  if (a.mean) moments.finish(a.width, a.mean, a.m2);
}

DENSENET_EXT_INSTANTIATE(bottleneck_forward, BottleneckForward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
