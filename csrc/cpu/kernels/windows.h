// The windows of a 3x3 max pool of stride 2 and padding 1, kVec of them at a time.
//
// Window (i, j) has the rows 2i-1 to 2i+1 and the columns 2j-1 to 2j+1. A row is split into its
// even and its odd columns, so that lane by lane its three columns of the windows from j on are
// odd[j-1...], even[j...], odd[j...]. Values outside the image are -infinity: never a maximum,
// since the middle of every window is inside.
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class T>
struct SplitRow {
  T *odd, *even;  // round_up(windows, kVec) each, and odd[-1]
};

// Whether v takes the place of the maximum so far of what comes before it in its window: torch's
// max_pool2d keeps the first of equal values, but takes every NaN.
template <class V>
DX_INLINE auto exceeds(V v, V maximum) {
  return (v > maximum) | (v != v);
}

// The rows that one thread needs at a time.
template <class T>
class WindowRows {
 public:
  static constexpr int64_t kRows = 4;

  static int64_t row_elements(int64_t windows) { return 2 * round_up(windows, kVec<T>) + kVec<T>; }
  static int64_t elements(int64_t windows) { return kRows * row_elements(windows); }

  WindowRows(T* memory, int64_t windows) : windows_(windows) {
    std::fill_n(memory, elements(windows), -std::numeric_limits<T>::infinity());
    for (int64_t r = 0; r < kRows; ++r) {
      T* const odd = memory + r * row_elements(windows) + kVec<T>;
      rows_[r] = {odd, odd + round_up(windows, kVec<T>)};
    }
  }

  // Row 2i, the odd row 2i+1 (which the next window row reads too) and no row.
  const SplitRow<T>& even_row() const { return rows_[2]; }
  const SplitRow<T>& odd_row(int64_t i) const { return rows_[i & 1]; }
  const SplitRow<T>& outside() const { return rows_[3]; }

  // scale*x + shift of the `width` values at x.
  template <class S>
  void split(const S* x, int64_t width, T scale, T shift, const SplitRow<T>& row) const {
    const Vec<T> s = broadcast(scale), t = broadcast(shift);
    for (int64_t j = 0; j < windows_; j += kVec<T>) {
      const int64_t left = width - 2 * j;
      Vec<T> even, odd;
      separate<T>(load_first(x + 2 * j, left),
                  load_first(x + 2 * j + kVec<T>, std::max<int64_t>(0, left - kVec<T>)), even, odd);
      store(row.even + j, s * even + t);
      store(row.odd + j, s * odd + t);
    }
    const int64_t end = round_up(windows_, kVec<T>);
    for (int64_t j = ceil_div(width, 2); j < end; ++j)
      row.even[j] = -std::numeric_limits<T>::infinity();
    for (int64_t j = width / 2; j < end; ++j) row.odd[j] = -std::numeric_limits<T>::infinity();
  }

  // The same for the rows of window row i, as far as they were not read for the one before. Returns
  // them from top to bottom.
  template <class S>
  std::array<SplitRow<T>, 3> read(const S* plane, int64_t height, int64_t width, int64_t i, T scale,
                                  T shift) const {
    split(plane + 2 * i * width, width, scale, shift, even_row());
    const bool below = 2 * i + 1 < height;
    if (below) split(plane + (2 * i + 1) * width, width, scale, shift, odd_row(i));
    return {i > 0 ? odd_row(i - 1) : outside(), even_row(), below ? odd_row(i) : outside()};
  }

 private:
  int64_t windows_;
  SplitRow<T> rows_[kRows];
};

// The values at one of the nine places of the windows from j on; places are counted row by row.
template <class T>
DX_INLINE Vec<T> load_place(const std::array<SplitRow<T>, 3>& rows, int64_t j, int place) {
  const SplitRow<T>& row = rows[place / 3];
  return load(place % 3 == 1 ? row.even + j : row.odd + j - (place % 3 == 0));
}

// Calls take(values, place) for the nine of them in turn.
template <class T, class F>
DX_INLINE void for_window(const std::array<SplitRow<T>, 3>& rows, int64_t j, const F& take) {
  DX_UNROLL
  for (int place = 0; place < 9; ++place) take(load_place(rows, j, place), place);
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
