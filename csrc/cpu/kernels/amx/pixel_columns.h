// Divides pixels into columns of 16 for products with AMX. No column straddles two samples; the
// last one of a sample may be partly filled.
#pragma once

#include <algorithm>

#include "cpu/kernels/vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct PixelColumn {
  int64_t sample, pixel, count;  // count: pixels in it, 0 beyond the last column
};

struct PixelColumns {
  int64_t samples, pixels, columns_per_map, count, first = 0;

  PixelColumns(int64_t samples, int64_t pixels)
      : samples(samples),
        pixels(pixels),
        columns_per_map(ceil_div(pixels, kLanes)),
        count(samples * columns_per_map) {}

  // Returns the columns begin .. end of these, counted from 0.
  PixelColumns part(int64_t begin, int64_t end) const {
    PixelColumns part = *this;
    part.first = first + begin;
    part.count = end - begin;
    return part;
  }

  PixelColumn operator[](int64_t i) const {
    if (i >= count) return {0, 0, 0};
    i += first;
    const int64_t pixel = i % columns_per_map * kLanes;
    return {i / columns_per_map, pixel, std::min(kLanes, pixels - pixel)};
  }

  // Returns the first row of column i in a [samples * pixels] matrix.
  int64_t row(int64_t i) const {
    i = first + std::min(i, count);
    return i / columns_per_map * pixels + i % columns_per_map * kLanes;
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
