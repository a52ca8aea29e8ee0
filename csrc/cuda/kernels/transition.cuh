// What forward and backward of the transition share.
#pragma once

#include "gemm_tile.cuh"
#include "pack.cuh"

namespace densenet_ext::cuda {

// Where a pixel of the pooled map comes from: the first of its four rows of the map.
struct Windows {
  int height, width;                // of the map
  int pooled_height, pooled_width;  // height/2, width/2

  template <class E>
  DENSENET_EXT_BOTH static Windows of(const Maps<E>& maps) {
    const int height = static_cast<int>(maps.height), width = static_cast<int>(maps.width);
    return {height, width, height / 2, width / 2};
  }
  DENSENET_EXT_BOTH int pooled_pixels() const { return pooled_height * pooled_width; }
  DENSENET_EXT_BOTH int64_t corner(int64_t n, int p) const {
    return (n * height + p / pooled_width * 2) * width + p % pooled_width * 2;
  }
  // Of pixel m of all samples' pooled maps.
  DENSENET_EXT_BOTH int64_t corner(int m) const {
    return corner(m / pooled_pixels(), m % pooled_pixels());
  }
  // Rows from the first to the i-th of the four.
  DENSENET_EXT_BOTH int step(int i) const { return i / 2 * width + i % 2; }
};

// The weight [rows, columns] in the storage type, rows at multiples of 16 bytes.
template <class Math>
Matrix<typename Math::Storage> packed_weight(const typename Math::T* weight, int64_t rows,
                                             int64_t columns, Context& context) {
  using S = typename Math::Storage;
  const int64_t pitch = round_up(columns, kLanes);
  S* const packed = context.scratch<S>(rows * pitch);
  const Packing<S> p = {weight, rows, columns, packed, rows, pitch, false, {}, nullptr, 0, 0, 0};
  launch(context, pack_kernel<Math>, cover(rows * pitch, 256), 256, 0, p);
  return {packed, rows, columns, pitch};
}

}  // namespace densenet_ext::cuda
