// Forward of the 1x1 convolution of a dense layer with so few outputs that their sums for two
// columns of pixels stay in registers: 48, as growth rate 12 has. Forward uses it, and backward for
// the layer that comes next; it is compiled once, in bottleneck_narrow.cpp.
#pragma once

#include "cpu/kernel_arguments.h"
#include "cpu/kernels/row_moments.h"
#include "cpu/parallel.h"
#include "pixel_columns.h"
#include "tile_products.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

// W as left operand: [pitch / 16, chunks, parts, 16, 16], rows are outputs.
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

// Merges the moments of b in columns first .. last with those of `count` rows, mean and behind it
// m2.
template <class S>
inline void add_moments(const BottleneckForward<S>& a, const PixelColumns& columns, int64_t first,
                        int64_t last, int64_t pitch, double& count, double* mean) {
  if (!a.mean) return;
  const int64_t row = columns.row(first), rows = columns.row(last) - row;
  add_row_moments<S>(a.bottleneck + row * pitch, rows, pitch, pitch, count, mean, mean + pitch);
  count += static_cast<double>(rows);
}

constexpr int64_t kNarrow = 3 * kSide;  // the most outputs
constexpr int64_t kNarrowColumns = 2;   // of a strip
inline bool is_narrow(int64_t width) { return width > 0 && width <= kNarrow; }

// Values of memory of a thread: z of two chunks and the sums of two strips.
template <class S>
constexpr int64_t kNarrowMemory = 2 * kNarrowColumns * (kParts<S> * kTilePairs + kNarrow * kSide);

// Strips begin .. end of these columns, with `memory` as memory; merges the moments of b in `count`
// rows, mean and behind it m2, with theirs.
template <class S>
void run_narrow_strips(const BottleneckForward<S>& a, const PixelColumns& columns,
                       const ForwardWeight<S>& weight, uint32_t* memory, int64_t begin, int64_t end,
                       double& count, double* mean);

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
