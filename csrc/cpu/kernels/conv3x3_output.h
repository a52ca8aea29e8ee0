// Finishes a 3x3 convolution: dropout, the channel of the feature buffer, its moments.
#pragma once

#include "conv_units.h"
#include "moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Writes the rows of output j to its channel; row_of(s, y) is that of the unit's s-th map. Moments
// of the unit's part of each map go to `parts` [growth, blocks, samples, 2], if they are wanted.
template <class S, class F>
void write_channel(const Conv3x3Forward<S>& a, const Units& units, const Unit& u, int64_t j,
                   const F& row_of, double* parts) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples;
  for (int64_t s = 0; s < u.samples; ++s) {
    const int64_t n = u.sample + s, first = u.row * units.width;
    S* const channel = a.features.plane(n, a.offset + j) + first;
    for (int64_t y = 0; y < u.rows; ++y) {
      T* const row = row_of(s, y);
      drop_out(a, n, j, first + y * units.width, row);
      for (int64_t x = 0; x < units.width; x += kVec<T>)
        store_first(channel + y * units.width + x, load(row + x), units.width - x);
    }
    if (!a.moments.mean) continue;
    double* const part = parts + 2 * ((j * units.blocks_per_map + units.block(u)) * samples + n);
    contiguous_moments(channel, u.rows * units.width, part[0], part[1]);
  }
}

// Merges the moments of the blocks of each map.
template <class S>
void merge_block_moments(const Conv3x3Forward<S>& a, const Units& units, const double* parts) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples;
  if (!a.moments.mean || units.count == 0) return;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t j = 0; j < a.growth; ++j) {
      double count = 0, mean = 0, m2 = 0;
      for (int64_t k = 0; k < units.blocks_per_map; ++k) {
        const double* const part = parts + 2 * ((j * units.blocks_per_map + k) * samples + n);
        const double pixels = static_cast<double>(
            std::min(units.rows_per_unit, units.height - k * units.rows_per_unit) * units.width);
        merge_moments(count, mean, m2, pixels, part[0], part[1]);
        count += pixels;
      }
      a.moments.mean[n * a.moments.channels + a.offset + j] = static_cast<T>(mean);
      a.moments.m2[n * a.moments.channels + a.offset + j] = static_cast<T>(m2);
    }
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
