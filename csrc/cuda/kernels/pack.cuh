// Weights and tables as the matrix kernels read them: in the storage type, padded with zeros to
// whole tiles, so that no kernel has to ask where they end.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace densenet_ext::cuda {

template <class T>
struct Table {
  const ScaleShift<T>* data;
  int64_t sample_stride;  // 0 where all samples share a row

  DEVICE const ScaleShift<T>* row(int64_t n) const { return data + n * sample_stride; }
};

template <class S>
struct Packing {
  using T = Arithmetic<S>;
  const T* weight;  // [rows, columns]
  int64_t rows, columns;
  S* packed;  // [packed_rows, packed_columns], or transposed
  int64_t packed_rows, packed_columns;
  bool transposed;
  ScaleShiftTable<T> norm;
  ScaleShift<T>* table;  // [samples, table_columns]
  int64_t samples, channels, table_columns;
};

// A thread an element: first the weights, then the table.
template <class Math>
KERNEL __launch_bounds__(256) pack_kernel(Packing<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using T = typename Math::T;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t weights = p.packed_rows * p.packed_columns;
  if (i < weights) {
    int64_t row = i / p.packed_columns, column = i % p.packed_columns;
    if (p.transposed) {
      const int64_t swap = row;
      row = column, column = swap;
    }
    const bool inside = row < p.rows && column < p.columns;
    p.packed[i] = Math::operand(inside ? p.weight[row * p.columns + column] : T(0));
  } else if (i - weights < p.samples * p.table_columns) {
    const int64_t n = (i - weights) / p.table_columns, c = (i - weights) % p.table_columns;
    ScaleShift<T> entry = {T(0), T(0)};
    if (c < p.channels) entry = {p.norm.scale.row(n)[c], p.norm.shift.row(n)[c]};
    p.table[i - weights] = entry;
  }
}

// What packing leaves behind.
template <class S>
struct Packed {
  S* weight;
  Table<Arithmetic<S>> table;
};

// weight [rows, columns] padded to [packed_rows, packed_columns], transposed before that if so
// asked, and the table of `channels` channels padded to table_columns.
template <class Math>
Packed<typename Math::Storage> pack(const typename Math::T* weight, int64_t rows, int64_t columns,
                                    int64_t packed_rows, int64_t packed_columns, bool transposed,
                                    const ScaleShiftTable<typename Math::T>& norm, int64_t samples,
                                    int64_t channels, int64_t table_columns, Context& context) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  const bool per_sample = norm.scale.sample_stride != 0 || norm.shift.sample_stride != 0;
  const int64_t table_rows = per_sample ? samples : 1;
  S* const packed = context.scratch<S>(packed_rows * packed_columns);
  ScaleShift<T>* const table = context.scratch<ScaleShift<T>>(table_rows * table_columns);
  const Packing<S> p = {weight,     rows, columns, packed,     packed_rows, packed_columns,
                        transposed, norm, table,   table_rows, channels,    table_columns};
  launch(context, pack_kernel<Math>,
         cover(packed_rows * packed_columns + table_rows * table_columns, 256), 256, 0, p);
  return {packed, {table, per_sample ? table_columns : 0}};
}

// Calls body.template operator()<Math>() for the arithmetic of S.
template <class S, class F>
void dispatch_math(const Context& context, const F& body) {
  if constexpr (sizeof(S) == 2) {
    body(Half<S>{});
  } else if constexpr (sizeof(S) == 4) {
    if (context.allow_tf32) {
      body(Tf32{});
    } else {
      body(Exact<S>{});
    }
  } else {
    body(Exact<S>{});
  }
}

}  // namespace densenet_ext::cuda
