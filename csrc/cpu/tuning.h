// Collects the constants of the CPU kernels that were tuned by measurement, mostly shares of a
// second-level cache of 1 to 2 MB.
#pragma once

#include <cstdint>

#include "types.h"

namespace densenet_ext {

// A thread is worth waking to copy or add this many values.
constexpr int64_t kWorthAThread = 16384;

// A tile of the 1x1 convolution or of the transition has at most this many pixels.
constexpr int64_t kForwardPixels = 256, kBackwardPixels = 512;

// The operands of a tile of pixels have about these bytes; the size made no difference in a wide
// range.
constexpr int64_t kTileBytes = 384 * 1024;

// A tile of the 1x1 convolution has these pixels at least: reading W costs more than z that spills.
constexpr int64_t kLeastBottleneckPixels = 64;

// A tile of the transition has at least this many pixels: with fewer, what is done once a tile
// costs more than a larger tile that spills.
constexpr int64_t kLeastPooledPixels = 128;

// The forward transition fetches this many bytes of the next tile ahead, which made it 1.2 times as
// fast on 32x32 maps (216 channels) and 1.05 times on 56x56.
constexpr int64_t kPrefetchBytes = 1024 * 1024;

// A unit of the 3x3 convolution has about this many values of b; in backward, half of that.
constexpr int64_t kUnitValues = 64 * 1024;

// On machines with AMX, whose second-level cache has 2 MB, the operands of a tile have these bytes.
constexpr int64_t kAmxTileBytes = 1200 * 1024;

// A unit of the 3x3 backward touches this many bytes there. Its maps have the second number at
// least, however much the weight takes.
constexpr int64_t kAmxUnitBytes = 1536 * 1024;
constexpr int64_t kAmxLeastMapBytes = 256 * 1024;

// Returns a distance between rows or planes that are used together: an odd multiple of 16 values.
// At a multiple of 4 KB they share cache sets, which costs 10 to 20 %.
constexpr int64_t padded_stride(int64_t values) {
  return values / kLanes % 2 ? values : values + kLanes;
}

}  // namespace densenet_ext
