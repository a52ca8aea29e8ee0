// The bottleneck of the previous layer, which a backward pass comes to next, is computed again tile
// by tile in the place of this layer's: x of a tile is still in the second-level cache and is read
// from memory once for both layers. That pays only if the layer is narrow: with more outputs the
// products take longer than reading x.
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

  // Computes a tile of it; `memory` has kNarrowMemory<S> values.
  void run(const Tile& tile, uint32_t* memory) const {
    const int64_t begin = tile.sample * columns.columns_per_map + tile.pixel / kSide,
                  count = tile.positions() / kSide;
    double rows = 0;
    run_narrow<S>({a, columns.part(begin, begin + count), *weight, memory, 0,
                   ceil_div(count, kNarrowColumns), RunningMoments{rows, nullptr, 0}});
  }

 private:
  const BottleneckForward<S>& a;
  const PixelColumns columns;
  std::optional<ForwardWeight<S>> weight;
};

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
