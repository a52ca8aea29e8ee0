// Constants of the CPU kernels that were tuned by measurement, mostly shares of a second-level cache
// of 1 to 2 MB.
#pragma once

#include <cstdint>

#include "types.h"

namespace densenet_ext {

// A thread is worth waking to copy or add this many values.
constexpr int64_t kWorthAThread = 16384;

// Pixels of a tile of the 1x1 convolution and of the transition, at most.
constexpr int64_t kForwardPixels = 256, kBackwardPixels = 512;

// Bytes of the operands of a tile of pixels. Tile sizes within a wide range made no difference.
constexpr int64_t kTileBytes = 384 * 1024;

// Pixels of a tile of the 1x1 convolution, at least: with fewer, reading W costs more than a z that
// spills.
constexpr int64_t kLeastBottleneckPixels = 64;

// Pixels of a tile of the transition, at least: with fewer, what is done once a tile costs more than
// a larger tile that spills.
constexpr int64_t kLeastPooledPixels = 128;

// Bytes of the next tile that the transition fetches ahead. Fetching made the forward 1.2 times as
// fast on 32x32 maps (216 channels) and 1.05 times on 56x56.
constexpr int64_t kPrefetchBytes = 1024 * 1024;

// Values of b in a unit of the 3x3 convolution; half of that in backward, which reads dv, too.
constexpr int64_t kUnitValues = 64 * 1024;

// Bytes of the operands of a tile on machines with AMX, whose second-level cache has 2 MB.
constexpr int64_t kAmxTileBytes = 1200 * 1024;

// Bytes of all that a unit of the 3x3 backward touches there, and the least of them for its maps,
// however much the weight takes.
constexpr int64_t kAmxUnitBytes = 1536 * 1024;
constexpr int64_t kAmxLeastMapBytes = 256 * 1024;

// The distance between rows or planes that are used together: an odd multiple of 16 values. At a
// multiple of 4 KB they share cache sets, which costs 10 to 20 %.
constexpr int64_t padded_stride(int64_t values) {
  return values / kLanes % 2 ? values : values + kLanes;
}

}  // namespace densenet_ext
