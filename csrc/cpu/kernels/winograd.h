// Transforms operands of 3x3 convolutions for two thirds of the products: Winograd's F(2, 3) down
// the columns.
//
//   Two rows of the result from four rows d of the data and one column of the filter g:
//   t = (d0 - d2, d1 + d2, d2 - d1, d3 - d1),  u = (g0, (g0 + g1 + g2)/2, (g0 - g1 + g2)/2, g2)
//   m = t*u, summed over channels and the three columns;  y0 = m0 + m1 + m2,  y1 = m1 - m2 + m3
// and, for the gradient v of y,
//   du = sum t*(v0, v0 + v1, v0 - v1, v1),
//   dg = (du0 + e, (du1 - du2)/2, e + du3),  e = (du1 + du2)/2
//
// All factors are 1 or 1/2, so rounding errors are those of a direct sum but for a small factor.
// NaN and infinity spread to the same output pixels as in a direct convolution (at a border perhaps
// to more taps of dg); an infinity becomes NaN. The four rows of t lie in four planes of
// transformed data, in which one pair of result rows follows another at the pitch of a padded
// plane, W+1. The lower row of a pair may lie outside the map and is then ignored.
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.
#pragma once

#include "conv_units.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

constexpr int kWinogradPoints = 4;  // of t, u and m

// Describes a column of a pair of rows: its position in a transformed plane, its sample in the
// unit, the number of its upper pixel in the unit, and the distance from that to the lower one (0
// if outside).
struct PairColumn {
  int32_t position, sample, pixel, lower;
};

struct WinogradPlanes {
  const Units& units;
  int64_t plane_size;

  explicit WinogradPlanes(const Units& units) : units(units) {
    const int64_t rows = units.maps_per_unit * ceil_div(units.rows_per_unit, 2);
    plane_size = padded_stride(round_up(kBase + rows * units.pitch, kLanes) + kSlack);
  }

  // Returns the start of pair r of the unit's s-th map in a transformed plane.
  int64_t position(const Unit& u, int64_t s, int64_t r) const {
    return kBase + (s * ceil_div(u.rows, 2) + r) * units.pitch;
  }
  // Positions begin at first(); span() counts them, padding between them included.
  int64_t first() const { return kBase; }
  int64_t span(const Unit& u) const { return u.samples * ceil_div(u.rows, 2) * units.pitch - 1; }

  int64_t column_count(const Unit& u) const {
    return u.samples * ceil_div(u.rows, 2) * units.width;
  }
  int64_t columns_per_unit() const {
    return column_count({0, units.maps_per_unit, 0, units.rows_per_unit});
  }

  // Lists the columns of a unit's pairs one after another.
  void list_columns(const Unit& u, PairColumn* out) const {
    for (int64_t s = 0; s < u.samples; ++s) {
      for (int64_t y = 0; y < u.rows; y += 2) {
        for (int64_t x = 0; x < units.width; ++x) {
          *out++ = {static_cast<int32_t>(position(u, s, y / 2) + x), static_cast<int32_t>(s),
                    static_cast<int32_t>((s * u.rows + y) * units.width + x),
                    static_cast<int32_t>(y + 1 < u.rows ? units.width : 0)};
        }
      }
    }
  }

 private:
  static constexpr int64_t kBase = kLanes;       // the first pair's padding on the left precedes it
  static constexpr int64_t kSlack = 4 * kLanes;  // a last register block may read or write it
};

// Transforms four rows of W values and a zero each into t, planes of t `distance` apart. Values
// that are stored beyond that zero are overwritten by the next pair.
template <class T>
DX_INLINE void transform_data(const T* d0, const T* d1, const T* d2, const T* d3, int64_t pitch,
                              T* out, int64_t distance) {
  for (int64_t x = 0; x < pitch; x += kVec<T>) {
    const Vec<T> v1 = load(d1 + x), v2 = load(d2 + x);
    store(out + x, load(d0 + x) - v2);
    store(out + distance + x, v1 + v2);
    store(out + 2 * distance + x, v2 - v1);
    store(out + 3 * distance + x, load(d3 + x) - v1);
  }
}

// Transforms `count` filters w [count, 3, 3] into u [count, 3], `step` from one filter to the next,
// points of u `distance` apart.
template <class T>
inline void transform_weight(const T* w, int64_t count, T* u, int64_t step, int64_t distance) {
  for (int64_t i = 0; i < count; ++i, w += 9, u += step) {
    for (int64_t t = 0; t < 3; ++t) {
      const T sum = (w[t] + w[6 + t]) / 2, middle = w[3 + t] / 2;
      u[t] = w[t];
      u[distance + t] = sum + middle;
      u[2 * distance + t] = sum - middle;
      u[3 * distance + t] = w[6 + t];
    }
  }
}

// Replaces du, `count` values a point, by dg: dg0, dg1 and dg2 take the places of du0, du1 and du3.
template <class T>
inline void collect_weight_gradient(T* du, int64_t distance, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T* const d = du + i;
    const T u1 = d[distance], u2 = d[2 * distance], e = (u1 + u2) / 2;
    d[0] += e;
    d[distance] = (u1 - u2) / 2;
    d[3 * distance] += e;
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
