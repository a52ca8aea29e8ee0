// Computes the transition: batch normalization, ReLU, 1x1 convolution and 2x2 average pooling.
// Pooling and the convolution commute, so pooling comes first: a quarter of the products.
//
//   zp[c, p'] = mean of the 4 pixels of relu(scale*x + shift)
//   out[o, p'] = sum_c W[o, c] zp[c, p']
//
// A tile is whole rows of the pooled map, or several whole pooled maps; lanes are pooled pixels.
// The products of a tile fetch the next tile of x. Threads have contiguous tiles. Bytes moved: x
// once, out once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "pack.h"
#include "pooled_rows.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

namespace {

// Multiplies zp of one tile by each group of outputs. Meanwhile the products fetch the next tile of
// x, one cache line of all channels after another, `lines` in all.
template <class S>
struct TileProduct {
  using T = Arithmetic<S>;
  const T* zp;
  int64_t channels, stride, positions;
  const Maps<const S>& features;
  Tile next;
  int64_t lines, lines_per_map;

  TileProduct(const Maps<const S>& features, const T* zp, int64_t stride, const Tile& tile,
              const Tile& next)
      : zp(zp),
        channels(features.channels),
        stride(stride),
        positions(tile.positions()),
        features(features),
        next(next) {
    lines_per_map = ceil_div(4 * next.count * static_cast<int64_t>(sizeof(S)), 64);
    lines = std::min(next.samples * lines_per_map,
                     kPrefetchBytes / (64 * std::max<int64_t>(1, channels)));
  }

  // Multiplies the g-th group of outputs.
  DX_NOINLINE void multiply(int64_t g, const T* weight, T* out) const {
    const int64_t vectors = positions / kVec<T>, blocks = ceil_div(vectors, kPixelVectors);
    int64_t line = g * blocks;
    for_vector_groups<kPixelVectors>(vectors, [&](int64_t first, auto group) {
      constexpr int NV = decltype(group)::value;
      const bool fetch = line < lines;
      const S* const prefetch =
          fetch ? features.plane(next.sample + line / lines_per_map, 0) + 4 * next.pixel +
                      line % lines_per_map * static_cast<int64_t>(64 / sizeof(S))
                : features.data;
      ++line;
      Block<T, kBlockChannels, NV> block;
      block.product(channels, weight + g * kBlockChannels * channels, 1, kBlockChannels,
                    zp + first * kVec<T>, stride, prefetch, fetch ? features.plane_stride : 0);
      block.store_rows(out + first * kVec<T>, stride);
    });
  }
};

}  // namespace

template <class S>
void transition_forward(const TransitionForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.features.channels, outputs = a.out.channels;
  const PooledTiling tiling(a.features.samples, a.out.height, a.out.width,
                            pooled_capacity<T>(channels));
  const int64_t threads = thread_count(tiling.count),
                capacity = padded_stride(tiling.positions() + kPixelVectors * kLanes);
  const int64_t groups = ceil_div(outputs, kBlockChannels);
  const Scratch packed(sizeof(T) * (groups * kBlockChannels * channels + 1));
  pack_row_groups<kBlockChannels>(a.weight, outputs, channels, packed.as<T>());
  const int64_t thread_values = (channels + kBlockChannels) * capacity;
  const Scratch tiles(sizeof(T) * threads * thread_values);

  parallel(tiling.count, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    T* const zp = tiles.as<T>() + thread * thread_values;
    T* const products = zp + channels * capacity;
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = tiling[i];
      const TileProduct<S> product(a.features, zp, capacity, tile,
                                   tiling[std::min(i + 1, end - 1)]);
      for (int64_t c = 0; c < channels; ++c)
        pool_tile(a.features, a.scale_shift, tiling, tile, c, zp + c * capacity);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t valid = std::min<int64_t>(kBlockChannels, outputs - g * kBlockChannels);
        product.multiply(g, packed.as<T>(), products);
        for (int64_t r = 0; r < valid; ++r) {
          const T* sums = products + r * capacity;
          for (int64_t s = 0; s < tile.samples; ++s, sums += tile.pitch) {
            S* const out = a.out.plane(tile.sample + s, g * kBlockChannels + r) + tile.pixel;
            for (int64_t p = 0; p < tile.count; p += kVec<T>)
              store_first(out + p, load(sums + p), tile.count - p);
          }
        }
      }
    }
  });
}

DENSENET_EXT_INSTANTIATE(transition_forward, TransitionForward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
