// The matrix kernels read weights, scale and shift as this file packs them: in the storage type,
// padded with zeros to whole tiles, so that no kernel has to ask where they end.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace densenet_ext::cuda {

template <class S>
struct Packing {
  using T = Arithmetic<S>;
  const T* weight;  // [rows, columns]
  int64_t rows, columns;
  S* packed;  // [packed_rows, packed_columns], of the weight or of its transpose
  int64_t packed_rows, packed_columns;
  bool transposed;
  ScaleShiftTable<T> table;
  ScaleShift<T>* scale_shift;  // [samples, packed_channels]; samples may be 0
  int64_t samples, channels, packed_channels;
};

// Each thread has an element: first those of the weight, then scale and shift.
template <class Math>
KERNEL __launch_bounds__(kMaxThreads) pack_kernel(Packing<typename Math::Storage> p) {
  wait_for_earlier_kernels();
  using T = typename Math::T;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  const int64_t weights = p.packed_rows * p.packed_columns;
  if (i < weights) {
    int64_t row = i / p.packed_columns, column = i % p.packed_columns;
    if (p.transposed) {
      const int64_t swap = row;
      row = column, column = swap;
    }
    const bool exists = row < p.rows && column < p.columns;
    p.packed[i] = Math::operand(exists ? p.weight[row * p.columns + column] : T(0));
  } else if (i - weights < p.samples * p.packed_channels) {
    const int64_t n = (i - weights) / p.packed_channels, c = (i - weights) % p.packed_channels;
    ScaleShift<T> pair = {T(0), T(0)};
    if (c < p.channels) pair = {p.table.scale.row(n)[c], p.table.shift.row(n)[c]};
    p.scale_shift[i - weights] = pair;
  }
}

template <class Math>
void launch_pack(const Packing<typename Math::Storage>& p, Context& context) {
  launch(context, pack_kernel<Math>,
         cover(p.packed_rows * p.packed_columns + p.samples * p.packed_channels), kMaxThreads, 0,
         p);
}

template <class T>
bool has_sample_stride(const ScaleShiftTable<T>& table) {
  return table.scale.sample_stride != 0 || table.shift.sample_stride != 0;
}

template <class S>
struct Packed {
  S* weight;
  PerChannel<ScaleShift<Arithmetic<S>>> scale_shift;
};

// Packs the weight [width, channels] of a layer's 1x1 convolution to packed_width rows, or columns
// if it is transposed, and packed_channels of the others; and scale and shift of its input.
template <class Math, class Layer>
Packed<typename Math::Storage> pack(const Layer& layer, int64_t packed_width,
                                    int64_t packed_channels, bool transposed, Context& context) {
  using S = typename Math::Storage;
  using T = typename Math::T;
  const bool per_sample = has_sample_stride(layer.scale_shift);
  Packing<S> p = {};
  p.weight = layer.weight, p.rows = layer.width, p.columns = layer.channels;
  p.packed = context.scratch<S>(packed_width * packed_channels), p.transposed = transposed;
  p.packed_rows = transposed ? packed_channels : packed_width;
  p.packed_columns = transposed ? packed_width : packed_channels;
  p.table = layer.scale_shift, p.samples = per_sample ? layer.features.samples : 1;
  p.scale_shift = context.scratch<ScaleShift<T>>(p.samples * packed_channels);
  p.channels = layer.channels, p.packed_channels = packed_channels;
  launch_pack<Math>(p, context);
  return {p.packed, {p.scale_shift, per_sample ? packed_channels : 0}};
}

// Calls body(Math{}) for the arithmetic of S.
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
