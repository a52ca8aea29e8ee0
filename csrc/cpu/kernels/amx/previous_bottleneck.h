// The bottleneck of the layer that a backward pass comes to next, computed again tile by tile in
// the place of the one that is done with: x of a tile is still in the second-level cache then, and
// is read from memory once for both layers.
//
// Only where the layer is narrow: with more outputs the products take longer than reading x does.
#pragma once

#include <optional>

#include "bottleneck_narrow.h"
#include "cpu/kernels/pixel_tiles.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class S>
class PreviousBottleneck {
 public:
  explicit PreviousBottleneck(const BottleneckForward<S>& a)
      : a(a), columns(a.features.samples, a.features.pixels()) {
    if (a.weight && is_narrow(a.width)) weight.emplace(a);
  }
  explicit operator bool() const { return weight.has_value(); }

  // `memory`: memory of one thread, kNarrowMemory<S> values.
  void run(const Tile& tile, uint32_t* memory) const {
    const int64_t begin = tile.sample * columns.columns_per_map + tile.pixel / kSide,
                  count = tile.positions() / kSide;
    double rows = 0;
    run_narrow_strips(a, columns.part(begin, begin + count), *weight, memory, 0,
                      ceil_div(count, kNarrowColumns), rows, nullptr);
  }

 private:
  const BottleneckForward<S>& a;
  const PixelColumns columns;
  std::optional<ForwardWeight<S>> weight;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
