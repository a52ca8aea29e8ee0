// Divides pixels into tiles, for kernels that treat pixels as rows of a matrix. A tile is a
// sequence of pixels of one large map, or several whole small maps.
#pragma once

#include <algorithm>

#include "cpu/tuning.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct Tile {
  int64_t sample, samples;  // samples > 1 only with whole maps
  int64_t pixel, count;     // pixels of each sample
  int64_t pitch;            // positions of each sample: count, or count rounded up to kLanes

  int64_t positions() const { return round_up(samples * pitch, kLanes); }
  // They are contiguous rows of a [M, width] matrix, from sample * P + pixel on.
  int64_t pixels() const { return samples * count; }
};

// Returns the largest of the most even parts of `items` items, at most `limit` in each.
inline int64_t even_share(int64_t items, int64_t limit) {
  return items > 0 ? ceil_div(items, ceil_div(items, limit)) : 1;
}

struct Tiling {
  int64_t samples, pixels, alignment;
  int64_t tiles_per_map = 1, tile_pixels, maps_per_tile = 1, count;

  // Makes tiles of at most `capacity` positions (a multiple of kLanes). Each sample of a tile
  // starts at a multiple of `alignment`: kLanes if no vector may straddle two samples, or 1.
  Tiling(int64_t samples, int64_t pixels, int64_t capacity, int64_t alignment = kLanes)
      : samples(samples), pixels(pixels), alignment(alignment) {
    const int64_t pitch = round_up(std::max<int64_t>(pixels, 1), kLanes);
    tiles_per_map = ceil_div(pitch, capacity);
    tile_pixels = round_up(ceil_div(pitch, tiles_per_map), kLanes);
    tiles_per_map = ceil_div(pitch, tile_pixels);
    if (tiles_per_map == 1) {
      maps_per_tile =
          even_share(samples, capacity / round_up(std::max<int64_t>(pixels, 1), alignment));
    }
    count = pixels == 0         ? 0
            : tiles_per_map > 1 ? samples * tiles_per_map
                                : ceil_div(samples, maps_per_tile);
  }

  Tile operator[](int64_t i) const {
    Tile t;
    t.sample = i / tiles_per_map * maps_per_tile;
    t.samples = std::min(maps_per_tile, samples - t.sample);
    t.pixel = i % tiles_per_map * tile_pixels;
    t.count = std::min(tile_pixels, pixels - t.pixel);
    t.pitch = round_up(t.count, alignment);
    return t;
  }
};

// Sets out[0:count] = relu(scale*x + shift) and out[count:pitch] = 0.
template <class S, class T = Arithmetic<S>>
DX_INLINE void norm_relu(const S* x, int64_t count, int64_t pitch, T scale, T shift, T* out) {
  const Vec<T> s = broadcast(scale), t = broadcast(shift);
  int64_t i = 0;
  for (; i + kVec<T> <= count; i += kVec<T>) store(out + i, relu(s * load(x + i) + t));
  if (i < count) {
    store(out + i, keep_first<T>(relu(s * load_first(x + i, count - i) + t), count - i));
    i += kVec<T>;
  }
  for (; i < pitch; i += kVec<T>) store(out + i, Vec<T>{});
}

// Writes z[position] of one channel of a tile.
template <class S, class T = Arithmetic<S>>
DX_INLINE void norm_relu_tile(const Maps<const S>& features, const ScaleShiftTable<T>& scale_shift,
                              const Tile& tile, int64_t c, T* z) {
  for (int64_t i = 0; i < tile.samples; ++i) {
    const int64_t n = tile.sample + i;
    norm_relu(features.plane(n, c) + tile.pixel, tile.count, tile.pitch,
              scale_shift.scale.row(n)[c], scale_shift.shift.row(n)[c], z + i * tile.pitch);
  }
}

// Returns the positions of a tile, at most `limit`, so that `values_per_position` values of T for
// each of them stay in the second-level cache.
template <class T>
inline int64_t tile_capacity(int64_t values_per_position, int64_t limit) {
  const int64_t fit =
      kTileBytes / (std::max<int64_t>(1, values_per_position) * static_cast<int64_t>(sizeof(T)));
  return std::max<int64_t>(2 * kLanes, std::min(limit, fit / (2 * kLanes) * (2 * kLanes)));
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
