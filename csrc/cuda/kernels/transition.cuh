// Forward and backward of the transition share the pooling windows and the packed weight.
#pragma once

#include "gemm_tile.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {

// The 2x2 windows of average pooling: which rows of the maps a pooled pixel comes from.
struct Windows {
  int height, width;                // of a map
  int pooled_height, pooled_width;  // height/2, width/2

  template <class E>
  DENSENET_EXT_BOTH static Windows of(const Maps<E>& maps) {
    const int height = static_cast<int>(maps.height), width = static_cast<int>(maps.width);
    return {height, width, height / 2, width / 2};
  }
  DENSENET_EXT_BOTH int pooled_pixels() const { return pooled_height * pooled_width; }
  // The first of the four rows of pixel p of sample n's pooled map.
  DENSENET_EXT_BOTH int64_t corner(int64_t n, int p) const {
    return (n * height + p / pooled_width * 2) * width + p % pooled_width * 2;
  }
  // The first row of pixel m of all samples' pooled maps.
  DENSENET_EXT_BOTH int64_t corner(int m) const {
    return corner(m / pooled_pixels(), m % pooled_pixels());
  }
  // The distance of the i-th of the four rows from the first.
  DENSENET_EXT_BOTH int step(int i) const { return i / 2 * width + i % 2; }
};

// Packs the weight [rows, columns] in the storage type, its rows at multiples of 16 bytes.
template <class Math>
Matrix<typename Math::Storage> packed_weight(const typename Math::T* weight, int64_t rows,
                                             int64_t columns, Context& context) {
  using S = typename Math::Storage;
  const int64_t pitch = round_up(columns, kLanes);
  Packing<S> p = {};
  p.weight = weight, p.rows = p.packed_rows = rows;
  p.columns = columns, p.packed_columns = pitch;
  p.packed = context.scratch<S>(rows * pitch);
  launch_pack<Math>(p, context);
  return {p.packed, rows, columns, pitch};
}

}  // namespace densenet_ext::cuda
