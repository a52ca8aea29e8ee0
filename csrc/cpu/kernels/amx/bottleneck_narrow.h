// Computes the 1x1 convolution of a dense layer with so few outputs that their sums for two columns
// of pixels stay in registers: up to 48, which growth rate 12 has. The forward op uses it, and so
// does the backward op for the previous layer; it is compiled once, in bottleneck_narrow.cpp.
#pragma once

#include "cpu/kernel_arguments.h"
#include "cpu/kernels/row_moments.h"
#include "cpu/parallel.h"
#include "pixel_columns.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// Packs W as left operand [pitch / 16, chunks, parts, 16, 16]; rows are outputs.
template <class S>
struct ForwardWeight {
  static constexpr int64_t kChunk = kParts<S> * kTilePairs;
  const int64_t outputs, chunks;
  const Scratch packed;

  explicit ForwardWeight(const BottleneckForward<S>& a)
      : outputs(ceil_div(a.width, kSide)),
        chunks(std::max<int64_t>(1, ceil_div(a.channels, kDepth))),
        packed(4 * outputs * chunks * kChunk) {
    parallel(outputs, thread_count(outputs, kSide * a.channels),
             [&](int64_t, int64_t begin, int64_t end) {
               for (int64_t o = begin * kSide; o < end * kSide; ++o) {
                 uint32_t* const row =
                     packed.as<uint32_t>() + o / kSide * chunks * kChunk + o % kSide * kSide;
                 split_row<kParts<S>>(a.weight + o * a.channels, o < a.width ? a.channels : 0,
                                      chunks, row);
               }
             });
  }
  const uint32_t* data() const { return packed.as<uint32_t>(); }
};

// Merges the moments of b in columns first .. last, if they are wanted.
template <class S>
inline void add_moments(const BottleneckForward<S>& a, const PixelColumns& columns, int64_t first,
                        int64_t last, const RunningMoments& moments) {
  if (!a.mean) return;
  const int64_t row = columns.row(first), pitch = moments.pitch;
  moments.add_rows(a.bottleneck + row * pitch, columns.row(last) - row, pitch, pitch);
}

// Holds the pointers of one column of pixels.
template <class S>
struct ForwardColumn {
  const S *x, *prefetch;  // at channel 0; x of a later column
  const float *scale, *shift;
  S* b;
  int64_t count;  // pixels

  ForwardColumn() = default;
  ForwardColumn(const BottleneckForward<S>& a, const PixelColumns& columns, int64_t i,
                int64_t distance, int64_t pitch) {
    const PixelColumn column = columns[i],
                      later = columns[std::min(i + distance, columns.count - 1)];
    x = a.features.plane(column.sample, 0) + column.pixel;
    prefetch = a.features.plane(later.sample, 0) + later.pixel;
    scale = a.scale_shift.scale.row(column.sample);
    shift = a.scale_shift.shift.row(column.sample);
    b = a.bottleneck + (column.sample * a.features.pixels() + column.pixel) * pitch;
    count = column.count;
  }
};

constexpr int64_t kNarrow = 3 * kSide;  // the most outputs
constexpr int64_t kNarrowColumns = 2;   // of a strip
inline bool is_narrow(int64_t width) { return width > 0 && width <= kNarrow; }

// A thread needs memory for z of two chunks and the sums of two strips.
template <class S>
constexpr int64_t kNarrowMemory = 2 * kNarrowColumns * (kParts<S> * kTilePairs + kNarrow * kSide);

// Describes the strips begin .. end of pixel columns, for one thread.
template <class S>
struct NarrowStrips {
  const BottleneckForward<S>& a;
  const PixelColumns& columns;
  const ForwardWeight<S>& weight;
  uint32_t* memory;  // kNarrowMemory<S> values
  int64_t begin, end;
  RunningMoments moments;
};

template <class S>
void run_narrow(const NarrowStrips<S>&);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
