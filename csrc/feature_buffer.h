// The feature buffer of a stage and its layout, which is the backend's: planar on CPU (channels
// last on CUDA).
#pragma once

#include "tensor.h"

namespace densenet_ext {

// Uninitialized maps [samples, channels, height, width] on the device of `like`. Large planes get a
// padded pitch: at a multiple of 4 KB the channels of one pixel would share a cache set.
Tensor feature_buffer(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                      int64_t width, ScalarType type);

// The same without padding, where a user sees the tensor.
Tensor contiguous_buffer(const Tensor& like, const Sizes& sizes, ScalarType type);

}  // namespace densenet_ext
