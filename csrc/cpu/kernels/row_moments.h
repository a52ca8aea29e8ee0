// Computes moments of the columns of a matrix whose rows the threads share, merged in order.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "microkernel.h"
#include "moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Merges the moments of NV vectors of columns, of which `remaining` exist.
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

// Holds the moments of the rows that one thread has seen: `mean` [pitch], followed by M2.
struct RunningMoments {
  double& count;
  double* mean;
  int64_t pitch;

  // Merges those of `rows` rows of `columns` values, `row_pitch` apart.
  template <class S>
  void add_rows(const S* b, int64_t rows, int64_t columns, int64_t row_pitch) const {
    using T = Arithmetic<S>;
    const int64_t whole = columns / kVec<T>, o = whole * kVec<T>;
    double* const m2 = mean + pitch;
    for_vector_groups<kMaxVectors>(whole, [&](int64_t first, auto group) {
      const int64_t c = first * kVec<T>;
      add_column_moments<decltype(group)::value>(b + c, rows, kVec<T>, row_pitch, count, mean + c,
                                                 m2 + c);
    });
    if (o < columns)
      add_column_moments<1>(b + o, rows, columns - o, row_pitch, count, mean + o, m2 + o);
    count += static_cast<double>(rows);
  }
};

// Holds the moments of all threads.
class RowMoments {
 public:
  RowMoments(int64_t threads, int64_t pitch)
      : threads_(threads), pitch_(pitch), memory_(sizeof(double) * threads * (2 * pitch + 1)) {
    std::fill_n(memory_.as<double>(), threads * (2 * pitch + 1), 0.0);
  }

  RunningMoments operator[](int64_t thread) const {
    double* const values = memory_.as<double>() + thread * (2 * pitch_ + 1);
    return {values[2 * pitch_], values, pitch_};
  }

  // Merges them in the order of threads.
  template <class T>
  void finish(int64_t width, T* mean_out, T* m2_out) const {
    for (int64_t o = 0; o < width; ++o) {
      double count = 0, mean = 0, m2 = 0;
      for (int64_t t = 0; t < threads_; ++t) {
        const RunningMoments part = (*this)[t];
        merge_moments(count, mean, m2, part.count, part.mean[o], part.mean[pitch_ + o]);
        count += part.count;
      }
      mean_out[o] = static_cast<T>(mean);
      m2_out[o] = static_cast<T>(m2);
    }
  }

 private:
  int64_t threads_, pitch_;
  Scratch memory_;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
