// Packs W for the 3x3 backward on AMX and merges the threads' sums of dW; sizes of the products.
#pragma once

#include "cpu/kernels/conv_units.h"
#include "cpu/parallel.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

struct ProductSizes {
  int64_t growth, pitch;
  int64_t couples, pairs, chunks;  // of outputs; of outputs and taps; in 32s
  int64_t rows, row_tiles, inner;  // of dW: 9*growth, in 16s; pitch in 16s

  ProductSizes(int64_t growth, int64_t width)
      : growth(growth),
        pitch(round_up(width, kLanes)),
        couples(ceil_div(growth, 2)),
        pairs(9 * couples),
        chunks(std::max<int64_t>(1, ceil_div(pairs, kSide))),
        rows(9 * growth),
        row_tiles(ceil_div(rows, kSide)),
        inner(pitch / kSide) {}

  int64_t weight_pairs() const { return inner * chunks * kTilePairs; }
  int64_t panel_pairs() const { return chunks * 4 * kTilePairs; }  // of a strip
  int64_t strip_sums() const { return inner * 4 * kTileSums; }

  // Returns what Units takes: it counts values of 4 bytes and has a fixed budget of them.
  int64_t values_per_pixel() const {
    const int64_t bytes = 4 * couples + 2 * growth + 2 * pitch + 2 * 2 * 2 * kSide;
    const int64_t fixed = 4 * (weight_pairs() + 2 * panel_pairs() + 2 * strip_sums());
    return ceil_div(bytes * kUnitValues, std::max(kAmxUnitBytes - fixed, kAmxLeastMapBytes));
  }
};

// Packs row tile r of the left operand of dh, [chunks, 16, 16]; lines is [2, chunks * 16 + 16].
inline void pack_weight(const float* weight, const ProductSizes& sizes, int64_t width, int64_t r,
                        float* lines, uint32_t* out) {
  const int64_t size = sizes.chunks * kSide + kSide;
  std::fill_n(lines, 2 * size, 0.f);
  for (int64_t i = 0; i < kSide; ++i) {
    const bool inside = r * kSide + i < width;
    for (int64_t j = 0; j < sizes.growth; ++j) {
      const float* const taps = weight + (j * width + r * kSide + i) * 9;
      store_first(lines + j % 2 * size + j / 2 * 9, inside ? load_first(taps, 9) : Vec<float>{}, 9);
    }
    for (int64_t k = 0; k < sizes.chunks; ++k)
      split<1>(load(lines + k * kSide), load(lines + size + k * kSide),
               out + k * kTilePairs + i * kSide);
  }
}

// Merges the threads' sums [threads, row_tiles, inner, 16, 16] into dW [growth, width, 3, 3].
inline void merge_dweight(const float* sums, int64_t threads, const ProductSizes& sizes,
                          int64_t width, float* dweight) {
  const int64_t thread_values = sizes.row_tiles * sizes.inner * kTileSums;
  parallel_items(sizes.growth, threads * 9 * sizes.pitch, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < width; i += kSide) {
        Vec<float> taps[kSide] = {};
        DX_UNROLL
        for (int t = 0; t < 9; ++t) {
          const int64_t r = j * 9 + t;
          const float* const row =
              sums + (r / kSide * sizes.inner + i / kSide) * kTileSums + r % kSide * kSide;
          for (int64_t thread = 0; thread < threads; ++thread)
            taps[t] += load(row + thread * thread_values);
        }
        transpose<float>(taps);
        float* const out = dweight + (j * width + i) * 9;
        DX_UNROLL
        for (int n = 0; n < kSide; ++n) {
          if (i + n < width) store_first(out + n * 9, taps[n], 9);
        }
      }
    }
  });
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
