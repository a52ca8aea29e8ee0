// What forward and backward of the transition share: tiles of whole rows of the pooled map, and
// pooling into them.
#pragma once

#include "microkernel.h"
#include "tile.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Rows of the pooled map as `Tiling` over pixels would not keep them whole.
struct Rows {
  int64_t samples, height, width;  // of the pooled map
  int64_t maps_per_tile = 1, rows_per_tile, tiles_per_map = 1, count;

  Rows(int64_t samples, int64_t height, int64_t width, int64_t capacity)
      : samples(samples), height(height), width(width), rows_per_tile(height) {
    const int64_t pitch = round_up(std::max<int64_t>(1, height * width), kLanes);
    if (pitch <= capacity) {
      maps_per_tile = capacity / pitch;
      count = ceil_div(samples, maps_per_tile);
    } else {
      rows_per_tile = std::max<int64_t>(1, capacity / round_up(width, kLanes));
      tiles_per_map = ceil_div(height, rows_per_tile);
      count = samples * tiles_per_map;
    }
    if (height * width == 0) count = 0;
  }
  int64_t positions() const {
    return maps_per_tile * round_up(std::max<int64_t>(1, rows_per_tile * width), kLanes);
  }

  Tile operator[](int64_t i) const {
    Tile t;
    t.sample = tiles_per_map > 1 ? i / tiles_per_map : i * maps_per_tile;
    t.samples = tiles_per_map > 1 ? 1 : std::min(maps_per_tile, samples - t.sample);
    const int64_t row = tiles_per_map > 1 ? (i % tiles_per_map) * rows_per_tile : 0;
    t.pixel = row * width;
    t.count = std::min(rows_per_tile, height - row) * width;
    t.pitch = round_up(t.count, kLanes);
    return t;
  }
};

// zp of one channel of a tile; `line` holds a row of the map, rounded up to whole vectors.
template <class S, class T = Arithmetic<S>>
inline void pool_tile(const Maps<const S>& features, const NormTable<T>& norm, const Rows& rows,
                      const Tile& tile, int64_t c, T* line, T* zp) {
  for (int64_t s = 0; s < tile.samples; ++s) {
    const int64_t n = tile.sample + s, used = 2 * rows.width;
    const Vec<T> scale = broadcast(norm.scale.row(n)[c]), shift = broadcast(norm.shift.row(n)[c]);
    T* out = zp + s * tile.pitch;
    for (int64_t y = tile.pixel / rows.width; y < (tile.pixel + tile.count) / rows.width; ++y) {
      const S* const upper = features.plane(n, c) + 2 * y * features.width;
      const S* const lower = upper + features.width;
      for (int64_t x = 0; x < used; x += kVec<T>) {
        store(line + x, relu(scale * load_first(upper + x, used - x) + shift) +
                            relu(scale * load_first(lower + x, used - x) + shift));
      }
      for (int64_t x = 0; x < rows.width; ++x) *out++ = (line[2 * x] + line[2 * x + 1]) * T(0.25);
    }
    std::fill_n(out, tile.pitch - tile.count, T(0));
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
