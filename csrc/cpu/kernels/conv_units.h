// Divides the work of the 3x3 convolutions into units, which have zero-padded planes.
//
// A unit is several whole maps or a block of rows of one map, about 64K values of the bottleneck.
// In a padded plane rows follow each other at pitch W+1: the one zero column between them pads the
// one row on its right and the next row on its left, and one zero row does the same between maps.
// So a tap of the convolution is a constant offset, and vectors run over pixels without regard to
// rows.
#pragma once

#include <algorithm>

#include "cpu/tuning.h"
#include "true_gradient.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct Unit {
  int64_t sample, samples;  // samples > 1 only with whole maps
  int64_t row, rows;
};

struct Units {
  int64_t samples, height, width;
  int64_t maps_per_unit = 1, blocks_per_map = 1, rows_per_unit, count;
  // padded planes
  int64_t pitch, base, plane_size;
  int64_t offset[9];  // of the taps

  Units(int64_t samples, int64_t height, int64_t width, int64_t values_per_pixel, int64_t threads)
      : samples(samples), height(height), width(width), rows_per_unit(height) {
    const int64_t fit_rows =
        std::max<int64_t>(1, kUnitValues / std::max<int64_t>(1, values_per_pixel * width));
    if (fit_rows >= height) {
      const int64_t fit_maps = std::max<int64_t>(1, fit_rows / std::max<int64_t>(1, height));
      const int64_t units = round_up(ceil_div(samples, fit_maps), threads);
      maps_per_unit = std::max<int64_t>(1, ceil_div(samples, std::max<int64_t>(1, units)));
      count = ceil_div(samples, maps_per_unit);
    } else {
      // An even number of rows makes pairs of rows alike however a map is cut.
      rows_per_unit = round_up(ceil_div(height, ceil_div(height, fit_rows)), 2);
      blocks_per_map = ceil_div(height, rows_per_unit);
      count = samples * blocks_per_map;
    }
    if (height * width == 0) count = 0;
    pitch = width + 1;
    base = kLanes + pitch;
    const int64_t slack = 4 * kLanes;  // a last register block may read or write beyond the end
    plane_size = padded_stride(
        round_up(base + (maps_per_unit * (rows_per_unit + 1) + 1) * pitch + slack, kLanes));
    for (int64_t t = 0; t < 9; ++t) offset[t] = (t / 3 - 1) * pitch + (t % 3 - 1);
  }

  Unit operator[](int64_t i) const {
    Unit u;
    u.sample = i / blocks_per_map * maps_per_unit;
    u.samples = std::min(maps_per_unit, samples - u.sample);
    u.row = i % blocks_per_map * rows_per_unit;
    u.rows = std::min(rows_per_unit, height - u.row);
    return u;
  }

  int64_t block(const Unit& u) const { return u.row / std::max<int64_t>(1, rows_per_unit); }

  // Returns the start of row y (-1 .. rows) of the unit's s-th map in a padded plane.
  int64_t position(const Unit& u, int64_t s, int64_t y) const {
    return base + (s * (u.rows + 1) + y) * pitch;
  }

  // Counts the positions from the first pixel to the last, padding between them included.
  int64_t span(const Unit& u) const { return (u.samples * (u.rows + 1) - 1) * pitch - 1; }

  // Calls body(s, y) for the rows of the unit and its neighbors, as far as they lie in the image.
  template <class F>
  void for_rows_with_halo(const Unit& u, const F& body) const {
    for (int64_t s = 0; s < u.samples; ++s) {
      const int64_t first = u.row > 0 ? -1 : 0,
                    last = u.row + u.rows < height ? u.rows : u.rows - 1;
      for (int64_t y = first; y <= last; ++y) body(s, y);
    }
  }

  // Clears the rows above and below the unit that lie outside the image.
  template <class T>
  void clear_outside(const Unit& u, T* plane) const {
    if (u.row == 0) std::fill_n(plane + position(u, 0, -1) - 1, pitch + 1, T(0));
    if (u.row + u.rows == height)
      std::fill_n(plane + position(u, u.samples - 1, u.rows) - 1, pitch + 1, T(0));
  }
};

// Applies the dropout of output j to a row of the map of sample n that starts at pixel `first`.
template <class Arguments, class T>
inline void drop_out(const Arguments& a, int64_t n, int64_t j, int64_t first, T* row) {
  if (!a.dropout_mask) return;
  const bool* const mask = a.dropout_mask + (n * a.growth + j) * a.features.pixels() + first;
  const T factor = static_cast<T>(a.dropout_scale);
  for (int64_t x = 0; x < a.features.width; ++x) row[x] = mask[x] ? row[x] * factor : T(0);
}

// Writes dy of output j, its true gradient times the dropout, to a padded plane.
template <class S, class T = Arithmetic<S>>
inline void load_gradient_plane(const Conv3x3Backward<S>& a, const Units& units, const Unit& u,
                                int64_t j, T* plane) {
  units.clear_outside(u, plane);
  units.for_rows_with_halo(u, [&](int64_t s, int64_t y) {
    const int64_t n = u.sample + s, first = (u.row + y) * units.width;
    const TrueGradient<S> gradient(a, n, a.offset + j);
    T* const row = plane + units.position(u, s, y);
    for (int64_t x = 0; x < units.width; x += kVec<T>) {
      const int64_t remaining = units.width - x;
      store_first(row + x, gradient(first + x, remaining), remaining);
    }
    drop_out(a, n, j, first, row);
  });
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
