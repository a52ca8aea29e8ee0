#include "feature_buffer.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace densenet_ext {
namespace {

int64_t plane_pitch(int64_t pixels) {
  if (pixels < 256) return pixels;
  const int64_t groups = (pixels + 15) / 16;
  return 16 * (groups % 2 ? groups : groups + 1);
}

// Large tensors are mapped anew in every step: with pages of 2 MB their first touch costs a
// fraction. Advice only, and only for the pages that lie wholly inside the tensor.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  if (!t.is_cpu()) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last =
      (begin + static_cast<uintptr_t>(t.numel()) * t.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(t);
#endif
}

}  // namespace

Tensor contiguous_buffer(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Tensor t = empty(like, sizes, type);
  advise_huge_pages(t);
  return t;
}

Tensor feature_buffer(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                      int64_t width, ScalarType type) {
  const int64_t pixels = height * width, pitch = plane_pitch(pixels);
  if (pitch == pixels) return contiguous_buffer(like, {samples, channels, height, width}, type);
  Tensor padded = contiguous_buffer(like, {samples, channels, pitch}, type);
  return torch::stable::view(torch::stable::narrow(padded, 2, 0, pixels),
                             Sizes{samples, channels, height, width});
}

}  // namespace densenet_ext
