// Copies between the layouts of tensors and those of register blocks. Transposed copies go through
// squares of kVec x kVec in registers.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Sets out[c, r] = in[r, c], and 0 for r = rows .. padded.
template <class In, class Out, class T = Arithmetic<In>>
inline void copy_transposed(const In* in, int64_t in_pitch, int64_t rows, int64_t columns, Out* out,
                            int64_t out_pitch, int64_t padded) {
  for (int64_t c = 0; c < columns; c += kVec<T>) {
    for (int64_t r = 0; r < padded; r += kVec<T>) {
      Vec<T> square[kVec<T>];
      DX_UNROLL
      for (int i = 0; i < kVec<T>; ++i)
        square[i] = r + i < rows ? load_first(in + (r + i) * in_pitch + c, columns - c) : Vec<T>{};
      transpose<T>(square);
      DX_UNROLL
      for (int i = 0; i < kVec<T>; ++i) {
        if (c + i < columns) store_first(out + (c + i) * out_pitch + r, square[i], padded - r);
      }
    }
  }
}

// Packs W [rows, columns] as [columns, pitch], zeros beyond rows.
template <class T>
void pack_transposed(const T* w, int64_t rows, int64_t columns, int64_t pitch, T* out) {
  parallel_items(ceil_div(columns, kLanes), kLanes * rows, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = std::min(end * kLanes, columns);
    copy_transposed(w + first, columns, rows, last - first, out + first * pitch, pitch, pitch);
  });
}

// Packs W [rows, columns] as groups of R rows, transposed: [groups, columns, R], zeros beyond rows.
template <int R, class T>
void pack_row_groups(const T* w, int64_t rows, int64_t columns, T* out) {
  parallel_items(ceil_div(rows, R), R * columns, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      copy_transposed(w + g * R * columns, columns, std::min<int64_t>(R, rows - g * R), columns,
                      out + g * R * columns, R, R);
    }
  });
}

// Packs W [rows, columns] as groups of R columns: [groups, rows, R], zeros beyond columns.
template <int R, class T>
void pack_column_groups(const T* w, int64_t rows, int64_t columns, T* out) {
  parallel_items(ceil_div(columns, R), R * rows, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * R, valid = std::min<int64_t>(R, columns - first);
      T* target = out + first * rows;
      for (int64_t i = 0; i < rows; ++i, target += R) {
        const T* const source = w + i * columns + first;
        if (valid == R) {
          std::copy_n(source, R, target);
        } else {
          std::fill(std::copy_n(source, valid, target), target + R, T(0));
        }
      }
    }
  });
}

// Adds the partial sums of the other threads, `distance` apart, to `total` in the order of threads.
template <class T>
inline void add_partials(T* total, int64_t threads, int64_t distance, int64_t count) {
  for (int64_t t = 1; t < threads; ++t) {
    const T* const part = total + t * distance;
    for (int64_t i = 0; i < count; ++i) total[i] += part[i];
  }
}

// Merges the threads' sums of the transpose of dW, [columns, pitch] each and `distance` apart, and
// writes dW [rows, columns].
template <class T>
void merge_transposed(T* partials, int64_t threads, int64_t distance, int64_t pitch, int64_t rows,
                      int64_t columns, T* out) {
  parallel_items(
      ceil_div(columns, kLanes), threads * kLanes * pitch, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin * kLanes; c < std::min(end * kLanes, columns); c += kLanes) {
          const int64_t valid = std::min<int64_t>(kLanes, columns - c);
          add_partials(partials + c * pitch, threads, distance, valid * pitch);
          copy_transposed(partials + c * pitch, pitch, valid, rows, out + c, columns, valid);
        }
      });
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
