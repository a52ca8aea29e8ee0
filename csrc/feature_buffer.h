// The feature buffer of a stage and its layout, which is the backend's: planar on CPU (channels
// last on CUDA).
#pragma once

#include "workspace.h"

namespace densenet_ext {

// Uninitialized maps [samples, channels, height, width] on the device of `like`. Large planes get a
// padded pitch: at a multiple of 4 KB the channels of one pixel would share a cache set.
inline Tensor feature_buffer(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                             int64_t width, ScalarType type) {
  const int64_t pixels = height * width, groups = (pixels + 15) / 16;
  const int64_t pitch = pixels < 256 ? pixels : 16 * (groups % 2 ? groups : groups + 1);
  if (pitch == pixels) return workspace(like, {samples, channels, height, width}, type);
  Tensor padded = workspace(like, {samples, channels, pitch}, type);
  return torch::stable::view(torch::stable::narrow(padded, 2, 0, pixels),
                             Sizes{samples, channels, height, width});
}

}  // namespace densenet_ext
