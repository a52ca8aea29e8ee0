// The layout of a stage's tensors in memory, which depends on the device: planar maps on CPU,
// channels last on CUDA. Sizes of maps are [N, C, spatial...].
#pragma once

#include "workspace.h"

namespace densenet_ext {

// True if a stage on this tensor's device has channels-last maps. On a simulated CUDA device,
// tensors on the CPU stand for those on CUDA.
inline bool is_channels_last(const Tensor& like) {
#ifdef DENSENET_EXT_SIMT
  (void)like;
  return true;
#else
  return like.is_cuda();
#endif
}

inline int64_t pixels_of(const Sizes& spatial) {
  int64_t pixels = 1;
  for (const int64_t size : spatial) pixels *= size;
  return pixels;
}
inline Sizes maps_sizes(int64_t samples, int64_t channels, const Sizes& spatial) {
  Sizes sizes = {samples, channels};
  sizes.insert(sizes.end(), spatial.begin(), spatial.end());
  return sizes;
}
inline Sizes spatial_of(const Sizes& maps) { return {maps.begin() + 2, maps.end()}; }

// Uninitialized channels-last maps, pixels `pitch` elements apart. They are not a view of a larger
// tensor, because an op may return them and its callers may write to them.
inline Tensor channels_last_maps(const Tensor& like, const Sizes& sizes, int64_t pitch,
                                 ScalarType type) {
  Sizes strides(sizes.size(), 1);
  int64_t stride = pitch;
  for (size_t dim = sizes.size(); dim-- > 2; stride *= sizes[dim]) strides[dim] = stride;
  strides[0] = stride;
  return empty_strided(like, sizes, strides, type);
}

// Uninitialized channels-last maps without gaps, from the workspace: they are freed within a step.
inline Tensor channels_last_workspace(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Sizes pixels_first = sizes;
  pixels_first.erase(pixels_first.begin() + 1);
  pixels_first.push_back(sizes[1]);
  Tensor maps = workspace(like, pixels_first, type);
  for (auto dim = static_cast<int64_t>(sizes.size()) - 1; dim > 1; --dim)
    maps = torch::stable::transpose(maps, dim - 1, dim);
  return maps;
}

// The feature buffer of a stage: uninitialized maps on the device of `like`, with gaps. On CPU
// large planes get a padded pitch: at a multiple of 4 KB the channels of one pixel would share a
// cache set. On CUDA pixels start at multiples of 32 bytes, a sector of its memory.
inline Tensor feature_buffer(const Tensor& like, const Sizes& sizes, ScalarType type) {
  if (is_channels_last(like)) {
    const int64_t sector = 32 / element_size(type);
    return channels_last_maps(like, sizes, (sizes[1] + sector - 1) / sector * sector, type);
  }
  const int64_t pixels = pixels_of(spatial_of(sizes)), groups = (pixels + 15) / 16;
  const int64_t pitch = pixels < 256 ? pixels : 16 * (groups % 2 ? groups : groups + 1);
  if (pitch == pixels) return workspace(like, sizes, type, Use::kBuffer);
  Tensor padded = workspace(like, {sizes[0], sizes[1], pitch}, type, Use::kBuffer);
  return torch::stable::view(torch::stable::narrow(padded, 2, 0, pixels), sizes);
}

// Uninitialized maps without gaps, which leave the stage.
inline Tensor output_maps(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return is_channels_last(like) ? channels_last_maps(like, sizes, sizes[1], type)
                                : empty(like, sizes, type);
}

// Uninitialized maps without gaps that the next stage reads; on CPU from the workspace.
inline Tensor stage_maps(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return is_channels_last(like) ? output_maps(like, sizes, type) : workspace(like, sizes, type);
}

// Uninitialized maps for the gradient of the previous stage's output. While this gradient is held,
// that stage allocates its gradient buffer, which is as large as its feature buffer but perhaps of
// another type. leaving: tensors of this stage, `like` among them, that are freed by then.
inline Tensor gradient_maps(const Tensor& like, const Sizes& sizes, ScalarType type,
                            const Tensors& leaving) {
  if (is_channels_last(like)) return output_maps(like, sizes, type);
  const int64_t times = element_size(arithmetic_type(type)) / element_size(type);
  return workspace_aside(like, sizes, type, times, leaving);
}

// Maps from outside the stage in a layout that kernels can read: on CUDA with any strides.
inline Tensor readable(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x);
}
// Maps from outside the stage in a layout that can be appended: on CPU channels last, too.
inline Tensor appendable(const Tensor& x) { return is_dense_channels_last(x) ? x : readable(x); }

// The type of the gradient buffer and of the gradients inside a layer. On CUDA, where bytes are
// time, it is the maps' type, as in a graph of PyTorch's own operators.
inline ScalarType gradient_type(const Tensor& like, ScalarType storage) {
  return is_channels_last(like) ? storage : arithmetic_type(storage);
}

}  // namespace densenet_ext
