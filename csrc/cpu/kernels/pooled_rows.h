// Pools whole rows into tiles, for forward and backward of the transition.
#pragma once

#include "microkernel.h"
#include "pixel_tiles.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Divides the pooled map into tiles of whole rows, which `Tiling` would cut. The samples of a tile
// follow each other without a gap.
struct PooledTiling {
  int64_t samples, height, width;  // of the pooled map
  int64_t maps_per_tile = 1, rows_per_tile, tiles_per_map = 1, count;

  PooledTiling(int64_t samples, int64_t height, int64_t width, int64_t capacity)
      : samples(samples), height(height), width(width), rows_per_tile(height) {
    const int64_t pixels = std::max<int64_t>(1, height * width);
    if (pixels <= capacity) {
      maps_per_tile = even_share(samples, capacity / pixels);
      count = ceil_div(samples, maps_per_tile);
    } else {
      rows_per_tile = even_share(height, std::max<int64_t>(1, capacity / width));
      tiles_per_map = ceil_div(height, rows_per_tile);
      count = samples * tiles_per_map;
    }
    if (height * width == 0) count = 0;
  }
  int64_t positions() const {
    return round_up(std::max<int64_t>(1, maps_per_tile * rows_per_tile * width), kLanes);
  }

  Tile operator[](int64_t i) const {
    Tile t;
    t.sample = i / tiles_per_map * maps_per_tile;
    t.samples = std::min(maps_per_tile, samples - t.sample);
    const int64_t row = i % tiles_per_map * rows_per_tile;
    t.pixel = row * width;
    t.count = std::min(rows_per_tile, height - row) * width;
    t.pitch = t.count;
    return t;
  }
};

// Returns the positions of a tile, so that its values should lie in the second-level cache.
template <class T>
inline int64_t pooled_capacity(int64_t values_per_position) {
  return std::max(kLeastPooledPixels, tile_capacity<T>(values_per_position, kForwardPixels));
}

// Pools one channel of a tile into zp. Writes up to one vector beyond the tile's positions.
template <class S, class T = Arithmetic<S>>
DX_NOINLINE void pool_tile(const Maps<const S>& features, const ScaleShiftTable<T>& scale_shift,
                           const PooledTiling& tiling, const Tile& tile, int64_t c, T* zp) {
  const int64_t first = tile.pixel / tiling.width, last = (tile.pixel + tile.count) / tiling.width,
                input_width = 2 * tiling.width;
  T* out = zp;
  for (int64_t s = 0; s < tile.samples; ++s) {
    const int64_t n = tile.sample + s;
    const Vec<T> scale = broadcast(scale_shift.scale.row(n)[c]),
                 shift = broadcast(scale_shift.shift.row(n)[c]);
    for (int64_t y = first; y < last; ++y) {
      const S* const upper = features.plane(n, c) + 2 * y * features.width;
      const S* const lower = upper + features.width;
      const auto sum = [&](int64_t x) {
        const int64_t remaining = input_width - x;
        if (remaining <= 0) return Vec<T>{};
        return relu(scale * load_first(upper + x, remaining) + shift) +
               relu(scale * load_first(lower + x, remaining) + shift);
      };
      for (int64_t x = 0; x < input_width; x += 2 * kVec<T>)
        store(out + x / 2, add_pairs<T>(sum(x), sum(x + kVec<T>)) * broadcast(T(0.25)));
      out += tiling.width;
    }
  }
  for (; out < zp + tile.positions(); out += kVec<T>) store(out, Vec<T>{});
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
