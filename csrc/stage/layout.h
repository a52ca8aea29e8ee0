// Where the pixels and channels of a stage's maps lie, which is the backend's choice: planar on
// CPU, channels last on CUDA.
#pragma once

#include "workspace.h"

namespace densenet_ext {

// On a simulated CUDA device, tensors on the CPU take CUDA's part.
inline bool is_channels_last(const Tensor& like) {
#ifdef DENSENET_EXT_SIMT
  (void)like;
  return true;
#else
  return like.is_cuda();
#endif
}

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Uninitialized maps, pixels `pitch` elements apart. Not a view of a larger tensor: what an
// operator returns may be changed in place by others.
inline Tensor channels_last_maps(const Tensor& like, int64_t samples, int64_t channels,
                                 int64_t height, int64_t width, int64_t pitch, ScalarType type) {
  return empty_strided(like, {samples, channels, height, width},
                       {height * width * pitch, 1, width * pitch, pitch}, type);
}

// The same without gaps and from the workspace, for what lives within a step.
inline Tensor channels_last_workspace(const Tensor& like, int64_t samples, int64_t channels,
                                      int64_t height, int64_t width, ScalarType type) {
  const Tensor pixels = workspace(like, {samples, height, width, channels}, type);
  return torch::stable::transpose(torch::stable::transpose(pixels, 1, 3), 2, 3);
}

// The feature buffer of a stage: uninitialized maps on the device of `like`, with gaps. On CPU
// large planes get a padded pitch: at a multiple of 4 KB the channels of one pixel would share a
// cache set. On CUDA pixels start at multiples of 32 bytes, a sector of its memory.
inline Tensor feature_buffer(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                             int64_t width, ScalarType type) {
  if (is_channels_last(like)) {
    const int64_t sector = 32 / element_size(type),
                  pitch = (channels + sector - 1) / sector * sector;
    return channels_last_maps(like, samples, channels, height, width, pitch, type);
  }
  const int64_t pixels = height * width, groups = (pixels + 15) / 16;
  const int64_t pitch = pixels < 256 ? pixels : 16 * (groups % 2 ? groups : groups + 1);
  if (pitch == pixels)
    return workspace(like, {samples, channels, height, width}, type, Use::kBuffer);
  Tensor padded = workspace(like, {samples, channels, pitch}, type, Use::kBuffer);
  return torch::stable::view(torch::stable::narrow(padded, 2, 0, pixels),
                             Sizes{samples, channels, height, width});
}

// Uninitialized maps for the outside, without gaps.
inline Tensor output_maps(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                          int64_t width, ScalarType type) {
  return is_channels_last(like)
             ? channels_last_maps(like, samples, channels, height, width, channels, type)
             : empty(like, {samples, channels, height, width}, type);
}

// The same for what the next stage reads, from the workspace where there is one.
inline Tensor stage_maps(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                         int64_t width, ScalarType type) {
  return is_channels_last(like) ? output_maps(like, samples, channels, height, width, type)
                                : workspace(like, {samples, channels, height, width}, type);
}

// The same for the gradient of what the stage before has returned, which is held while that stage's
// gradient buffer is allocated: as large as its feature buffer, but maybe of another type.
// leaving: the tensors of this stage, `like` with them.
inline Tensor gradient_maps(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                            int64_t width, ScalarType type, const std::vector<Tensor>& leaving) {
  if (is_channels_last(like)) return output_maps(like, samples, channels, height, width, type);
  const int64_t times = element_size(arithmetic_type(type)) / element_size(type);
  return workspace_aside(like, {samples, channels, height, width}, type, times, leaving);
}

// Maps from the outside, as the kernels can read them: on CUDA they take any strides.
inline Tensor readable(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x);
}
// The same for what is copied into the feature buffer: on CPU channels-last maps may stay so.
inline Tensor appendable(const Tensor& x) { return is_dense_channels_last(x) ? x : readable(x); }

// The type of the gradient buffer and of the gradients inside a layer: on CUDA, where bytes are
// time, that of the maps, as it would be in a graph of PyTorch's own operators.
inline ScalarType gradient_type(const Tensor& like, ScalarType storage) {
  return is_channels_last(like) ? storage : arithmetic_type(storage);
}

}  // namespace densenet_ext
