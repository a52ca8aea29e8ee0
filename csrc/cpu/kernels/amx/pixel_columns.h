// Pixels in columns of 16 for the tile unit: no column straddles two samples, the last one of a
// sample may be partly filled.
#pragma once

#include <algorithm>

#include "cpu/kernels/vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct Column {
  int64_t sample, pixel, count;  // count: pixels in it, 0 beyond the last column
};

struct Columns {
  int64_t samples, pixels, a_map, count, first = 0;

  Columns(int64_t samples, int64_t pixels)
      : samples(samples), pixels(pixels), a_map(ceil_div(pixels, kLanes)), count(samples * a_map) {}

  // Columns from .. to of these, counted from 0.
  Columns part(int64_t from, int64_t to) const {
    Columns part = *this;
    part.first = first + from;
    part.count = to - from;
    return part;
  }

  Column operator[](int64_t i) const {
    if (i >= count) return {0, 0, 0};
    i += first;
    const int64_t pixel = i % a_map * kLanes;
    return {i / a_map, pixel, std::min(kLanes, pixels - pixel)};
  }

  // The row of a [samples * pixels] matrix at which column i begins.
  int64_t row(int64_t i) const {
    i = first + std::min(i, count);
    return i / a_map * pixels + i % a_map * kLanes;
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
