// Lists the columns of a tile of the 1x1 backward: 16 pixels of one sample, with the pointers that
// the steps of the backward need.
#pragma once

#include "cpu/kernels/pixel_tiles.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

constexpr int64_t kMaxColumns = kBackwardPixels / kSide, kMaxChunks = kBackwardPixels / kDepth;
constexpr int64_t kGroup = 32;                               // channels at a time
constexpr int64_t kChannelStride = kBackwardPixels + kSide;  // from one channel of dz to the next

template <class S>
struct TileColumns {
  struct Column {
    const S* x;  // at channel 0, as are grad_in and grad
    const float* grad_in;
    float* grad;
    const float *scale, *shift, *pre_mask, *post_mask;
    int64_t row, count;  // its first row of db; pixels in it, 0 beyond the last column
  };
  Column list[kMaxColumns + 4];
  int64_t count, chunks, strips;  // columns, pairs of columns, fours of columns
  bool whole[kMaxColumns / 4];    // true for strips of 64 pixels of one sample

  // `ones` [channels] stands for masks that are not there.
  DX_NOINLINE void assign(const BottleneckBackward<S>& a, const Tile& tile, const float* ones) {
    count = tile.positions() / kSide;
    chunks = ceil_div(count, 2);
    strips = ceil_div(count, 4);
    int64_t i = 0;
    for (int64_t n = tile.sample; n < tile.sample + tile.samples; ++n) {
      for (int64_t p = 0; p < tile.count; p += kSide) {
        const int64_t pixel = tile.pixel + p;
        list[i++] = {a.features.plane(n, 0) + pixel,
                     a.grad_in.data ? a.grad_in.plane(n, 0) + pixel : nullptr,
                     a.grad.plane(n, 0) + pixel,
                     a.scale_shift.scale.row(n),
                     a.scale_shift.shift.row(n),
                     a.pre_mask.data ? a.pre_mask.row(n) : ones,
                     a.post_mask.data ? a.post_mask.row(n) : ones,
                     n * a.features.pixels() + pixel,
                     std::min(kSide, tile.count - p)};
      }
    }
    for (; i < strips * 4; ++i) {
      list[i] = list[0];
      list[i].count = 0;
    }
    for (i = 0; i < strips; ++i) {
      const Column &first = list[4 * i], &last = list[4 * i + 3];
      whole[i] =
          last.count == kSide && last.row == first.row + 3 * kSide && last.x == first.x + 3 * kSide;
    }
  }
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
