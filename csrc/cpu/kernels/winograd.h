// 3x3 convolutions with two thirds of the products: Winograd's F(2, 3) down the columns.
//
//   Two rows of the result from four rows d of the operand, one column of taps g:
//   t = (d0 - d2, d1 + d2, d2 - d1, d3 - d1),  u = (g0, (g0 + g1 + g2)/2, (g0 - g1 + g2)/2, g2)
//   m = t*u, summed over channels and the three columns;  y0 = m0 + m1 + m2,  y1 = m1 - m2 + m3
// and, for the gradient v of y,
//   du = sum t*(v0, v0 + v1, v0 - v1, v1),
//   dg = (du0 + e, (du1 - du2)/2, e + du3),  e = (du1 + du2)/2
//
// Factors are 1 and 1/2 alone, so rounding errors are those of a direct sum but for a small factor.
// A value that is not finite reaches the same pixels as there, at a border perhaps more taps of dg;
// of an infinite one comes NaN. The four terms of the rows of a padded plane lie in planes of their
// own, one pair of rows after another at the same pitch, W+1. The lower row of a pair may be
// outside, and is then ignored.
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.
#pragma once

#include "conv_units.h"
#include "pixel_tiles.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

constexpr int kWinogradPoints = 4;

// A column of a pair: where it is in a plane of terms, the number of its upper pixel in the unit,
// and how far from that the lower one is, 0 where it is outside.
struct PairColumn {
  int32_t plane, sample, pixel, lower;
};

struct WinogradPlanes {
  const Units& units;
  int64_t plane_size;

  explicit WinogradPlanes(const Units& units) : units(units) {
    const int64_t rows = units.maps_per_unit * ceil_div(units.rows_per_unit, 2);
    plane_size = padded_stride(round_up(kBase + rows * units.pitch, kLanes) + kSlack);
  }

  // Where pair r of the unit's s-th map starts in a plane of terms.
  int64_t position(const Unit& u, int64_t s, int64_t r) const {
    return kBase + (s * ceil_div(u.rows, 2) + r) * units.pitch;
  }
  // Positions from the first to the last, padding between them included.
  int64_t span(const Unit& u) const { return u.samples * ceil_div(u.rows, 2) * units.pitch - 1; }
  int64_t first() const { return kBase; }

  int64_t column_count(const Unit& u) const {
    return u.samples * ceil_div(u.rows, 2) * units.width;
  }
  int64_t columns_per_unit() const {
    return column_count({0, units.maps_per_unit, 0, units.rows_per_unit});
  }

  // The columns of a unit's pairs, one after another.
  void positions(const Unit& u, PairColumn* out) const {
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
  static constexpr int64_t kBase = kLanes;       // before it is the first pair's left padding
  static constexpr int64_t kSlack = 4 * kLanes;  // what a last register block may read or write
};

// The terms of a pair, `distance` from one to the next, from four rows of W values and a zero each.
// What is stored beyond that zero, the next pair overwrites.
template <class T>
DX_INLINE void transform_data(const T* d0, const T* d1, const T* d2, const T* d3, int64_t pitch,
                              T* terms, int64_t distance) {
  for (int64_t x = 0; x < pitch; x += kVec<T>) {
    const Vec<T> v1 = load(d1 + x), v2 = load(d2 + x);
    store(terms + x, load(d0 + x) - v2);
    store(terms + distance + x, v1 + v2);
    store(terms + 2 * distance + x, v2 - v1);
    store(terms + 3 * distance + x, load(d3 + x) - v1);
  }
}

// Of W [count, 3, 3] the terms u [count, 3], `step` from one of the count to the next, and
// `distance` from one term to the next.
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

// dg in the place of du, `count` values a term: dg0, dg1 and dg2 in that of du0, du1 and du3.
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
