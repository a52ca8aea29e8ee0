// Computes mean and centered sum of squares (M2) in two passes over values that are still in cache,
// and merges two groups by Chan's formula in double.
#pragma once

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Computes the moments of `count` contiguous values.
template <class S, class T = Arithmetic<S>>
DX_INLINE void contiguous_moments(const S* x, int64_t count, double& mean, double& m2) {
  constexpr int64_t step = 4 * kVec<T>;
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    DX_UNROLL
    for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kVec<T>);
  }
  for (; i < count; i += kVec<T>) sums[0] += load_first(x + i, count - i);
  mean = static_cast<double>(sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]))) /
         static_cast<double>(count);

  const Vec<T> center = broadcast(static_cast<T>(mean));
  Vec<T> squares[4] = {};
  for (i = 0; i + step <= count; i += step) {
    DX_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vec<T> d = load(x + i + j * kVec<T>) - center;
      squares[j] += d * d;
    }
  }
  for (; i + kVec<T> <= count; i += kVec<T>) {
    const Vec<T> d = load(x + i) - center;
    squares[0] += d * d;
  }
  m2 = static_cast<double>(sum_lanes<T>((squares[0] + squares[1]) + (squares[2] + squares[3])));
  if (i < count) {
    T lanes[kVec<T>];
    store(lanes, load_first(x + i, count - i));
    for (int64_t j = 0; j < count - i; ++j) {
      const double d = static_cast<double>(lanes[j]) - static_cast<double>(static_cast<T>(mean));
      m2 += d * d;
    }
  }
  // Corrects for the center, which was rounded to T.
  const double rounding = mean - static_cast<double>(static_cast<T>(mean));
  m2 -= static_cast<double>(count) * rounding * rounding;
  if (m2 < 0) m2 = 0;
}

// Merges the moments of another group into (count, mean, m2); the caller adds the counts.
DX_INLINE void merge_moments(double count, double& mean, double& m2, double other_count,
                             double other_mean, double other_m2) {
  const double total = count + other_count;
  if (total == 0) return;
  const double delta = other_mean - mean;
  mean += delta * other_count / total;
  m2 += other_m2 + delta * delta * count * other_count / total;
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
