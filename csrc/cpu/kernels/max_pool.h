// Reads the windows of a 3x3 max pool of stride 2 and padding 1 on channels-last maps, for forward
// and backward of the stem.
//
// Window (i, j) has the rows 2i-1 to 2i+1 and the columns 2j-1 to 2j+1, as far as they lie in the
// map; its middle always does. Lanes are channels.
#pragma once

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Returns true if v replaces the maximum of the values that precede it in its window. torch's
// max_pool2d keeps the first of equal values, but takes every NaN.
template <class V>
DX_INLINE auto exceeds(V v, V maximum) {
  return (v > maximum) | (v != v);
}

// Reads the windows (i, 0), (i, 1), ... of sample n.
template <class S>
class WindowRow {
  using T = Arithmetic<S>;

 public:
  WindowRow(const Maps<const S>& x, int64_t n, int64_t i)
      : channels_(x.channels),
        width_(x.width),
        middle_(x.pixel(n, 2 * i * x.width)),
        first_(i > 0 ? 0 : 1),
        last_(2 * i + 1 < x.height ? 2 : 1) {}

  // Rows and columns of windows run from first to last as far as they lie in the map.
  int first_row() const { return first_; }
  int last_row() const { return last_; }
  int first_column(int64_t j) const { return j > 0 ? 0 : 1; }
  int last_column(int64_t j) const { return 2 * j + 1 < width_ ? 2 : 1; }

  // Returns true if window j as a whole lies in the map.
  bool is_inside(int64_t j) const {
    return first_ == 0 && last_ == 2 && first_column(j) == 0 && last_column(j) == 2;
  }

  // Loads channels from c on in row r and column k of window j.
  DX_INLINE Vec<T> load(int r, int64_t j, int k, int64_t c) const {
    const int64_t p = (r - 1) * width_ + 2 * j + k - 1;
    return load_first(middle_ + p * channels_ + c, channels_ - c);
  }

 private:
  int64_t channels_, width_;
  const S* middle_;
  int first_, last_;
};

// Folds batch normalization into scale*x + shift.
template <class T>
struct ScaleShift {
  T scale, shift;

  ScaleShift(T weight, T bias, T mean, T var, double eps) {
    const double gain = static_cast<double>(weight) / std::sqrt(static_cast<double>(var) + eps);
    scale = static_cast<T>(gain);
    shift = static_cast<T>(static_cast<double>(bias) - gain * static_cast<double>(mean));
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
