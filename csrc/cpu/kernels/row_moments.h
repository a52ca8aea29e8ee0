// Moments of the columns of a matrix of rows, gathered by threads and merged in their order.
#pragma once

#include <algorithm>

#include "microkernel.h"
#include "moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Moments of NV vectors of columns; `remaining` columns there are at most.
template <int NV, class S, class T = Arithmetic<S>>
DX_INLINE void add_column_moments(const S* column, int64_t rows, int64_t remaining, int64_t pitch,
                                  double count, double* mean, double* m2) {
  Vec<T> sums[NV] = {}, squares[NV] = {};
  for (int64_t m = 0; m < rows; ++m) {
    DX_UNROLL
    for (int v = 0; v < NV; ++v) sums[v] += load_first(column + m * pitch + v * kVec<T>, remaining);
  }
  DX_UNROLL
  for (int v = 0; v < NV; ++v) sums[v] /= broadcast(static_cast<T>(rows));
  for (int64_t m = 0; m < rows; ++m) {
    DX_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> d = load_first(column + m * pitch + v * kVec<T>, remaining) - sums[v];
      squares[v] += d * d;
    }
  }
  for (int v = 0; v < NV; ++v) {
    T group_mean[kVec<T>], group_m2[kVec<T>];
    store(group_mean, sums[v]);
    store(group_m2, squares[v]);
    for (int64_t i = 0; i < std::min<int64_t>(remaining, kVec<T>); ++i) {
      const int64_t o = v * kVec<T> + i;
      merge_moments(count, mean[o], m2[o], static_cast<double>(rows), group_mean[i], group_m2[i]);
    }
  }
}

// Moments of `rows` rows of b, merged into the thread's running (count, mean, m2).
template <class S, class T = Arithmetic<S>>
void add_row_moments(const S* b, int64_t rows, int64_t columns, int64_t pitch, double count,
                     double* mean, double* m2) {
  const int64_t whole = columns / kVec<T>, o = whole * kVec<T>;
  for_vector_groups<kMaxVectors>(whole, [&](int64_t first, auto group) {
    const int64_t c = first * kVec<T>;
    add_column_moments<decltype(group)::value>(b + c, rows, kVec<T>, pitch, count, mean + c,
                                               m2 + c);
  });
  if (o < columns) add_column_moments<1>(b + o, rows, columns - o, pitch, count, mean + o, m2 + o);
}

// Of all threads: `counts` rows each, `sums` [threads, 2, pitch].
template <class T>
inline void finish_row_moments(const double* counts, const double* sums, int64_t threads,
                               int64_t pitch, int64_t width, T* mean_out, T* m2_out) {
  for (int64_t o = 0; o < width; ++o) {
    double count = 0, mean = 0, m2 = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const double* const part = sums + t * 2 * pitch;
      merge_moments(count, mean, m2, counts[t], part[o], part[pitch + o]);
      count += counts[t];
    }
    mean_out[o] = static_cast<T>(mean);
    m2_out[o] = static_cast<T>(m2);
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
