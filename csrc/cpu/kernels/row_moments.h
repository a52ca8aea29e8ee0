// Moments of the columns of a matrix of rows, gathered by threads and merged in their order.
#pragma once

#include "microkernel.h"
#include "moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Moments of `rows` rows of b, merged into the thread's running (count, mean, m2).
template <class S, class T = Arithmetic<S>>
void add_row_moments(const S* b, int64_t rows, int64_t pitch, double count, double* mean,
                     double* m2) {
  for_vector_groups<kMaxVectors>(pitch / kVec<T>, [&](int64_t first, auto group) {
    constexpr int NV = decltype(group)::value;
    Vec<T> sums[NV] = {}, squares[NV] = {};
    const S* column = b + first * kVec<T>;
    for (int64_t m = 0; m < rows; ++m) {
      DX_UNROLL
      for (int v = 0; v < NV; ++v) sums[v] += load(column + m * pitch + v * kVec<T>);
    }
    DX_UNROLL
    for (int v = 0; v < NV; ++v) sums[v] /= broadcast(static_cast<T>(rows));
    for (int64_t m = 0; m < rows; ++m) {
      DX_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> d = load(column + m * pitch + v * kVec<T>) - sums[v];
        squares[v] += d * d;
      }
    }
    for (int v = 0; v < NV; ++v) {
      T group_mean[kVec<T>], group_m2[kVec<T>];
      store(group_mean, sums[v]);
      store(group_m2, squares[v]);
      for (int i = 0; i < kVec<T>; ++i) {
        const int64_t o = (first + v) * kVec<T> + i;
        merge_moments(count, mean[o], m2[o], static_cast<double>(rows), group_mean[i], group_m2[i]);
      }
    }
  });
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
