// Append copies channels into the feature buffer and takes their moments; finish_gradient writes
// the true gradient of channels. Planar maps go one plane at a time, and threads have contiguous
// planes. In channels-last maps, squares of pixels by channels are transposed in registers: append
// copies kLanes planes of a sample and takes their moments while they are in cache; finish_gradient
// writes all channels of a block of pixels. Bytes moved: append x and its copy once;
// finish_gradient G, x and out once.
#include "cpu/parallel.h"
#include "instantiate.h"
#include "moments.h"
#include "pack.h"
#include "true_gradient.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

namespace {

template <class S>
void measure_plane(const Append<S>& a, int64_t n, int64_t c) {
  using T = Arithmetic<S>;
  if (!a.moments.mean) return;
  double mean, m2;
  contiguous_moments(a.features.plane(n, a.offset + c), a.x.pixels(), mean, m2);
  a.moments.mean[n * a.moments.channels + a.offset + c] = static_cast<T>(mean);
  a.moments.m2[n * a.moments.channels + a.offset + c] = static_cast<T>(m2);
}

template <class S>
void append_planes(const Append<S>& a) {
  parallel_items(a.x.samples * a.x.channels, a.x.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.x.channels, c = i % a.x.channels;
      std::memcpy(a.features.plane(n, a.offset + c), a.x.plane(n, c), sizeof(S) * a.x.pixels());
      measure_plane(a, n, c);
    }
  });
}

template <class S>
void append_pixels(const Append<S>& a) {
  const int64_t groups = ceil_div(a.x.channels, kLanes), pixels = a.x.pixels();
  parallel_items(a.x.samples * groups, kLanes * a.x.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, first = i % groups * kLanes,
                    count = std::min(kLanes, a.x.channels - first);
      copy_transposed(a.x.pixel(n, 0) + first, a.x.channels, pixels, count,
                      a.features.plane(n, a.offset + first), a.features.plane_stride, pixels);
      for (int64_t c = first; c < first + count; ++c) measure_plane(a, n, c);
    }
  });
}

template <class S>
void finish_planes(const FinishGradient<S>& a) {
  using T = Arithmetic<S>;
  const int64_t pixels = a.out.pixels();
  parallel_items(a.out.samples * a.out.channels, a.out.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.out.channels, c = i % a.out.channels;
      const TrueGradient<S> gradient(a, n, a.offset + c);
      S* const out = a.out.plane(n, c);
      for (int64_t p = 0; p < pixels; p += kVec<T>)
        store_first(out + p, gradient(p, pixels - p), pixels - p);
    }
  });
}

// Writes the channels from `first` on, at most a vector of them, of the pixels begin .. end.
template <class S>
void finish_group(const FinishGradient<S>& a, int64_t n, int64_t first, int64_t begin,
                  int64_t end) {
  using T = Arithmetic<S>;
  const int64_t channels = a.out.channels - first;
  for (int64_t p = begin; p < end; p += kVec<T>) {
    Vec<T> square[kVec<T>];
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i) {
      square[i] = i < channels ? TrueGradient<S>(a, n, a.offset + first + i)(p, end - p) : Vec<T>{};
    }
    transpose<T>(square);
    DX_UNROLL
    for (int i = 0; i < kVec<T>; ++i) {
      if (p + i < end) store_first(a.out.pixel(n, p + i) + first, square[i], channels);
    }
  }
}

template <class S>
void finish_pixels(const FinishGradient<S>& a) {
  constexpr int64_t kBlock = 256;
  const int64_t pixels = a.out.pixels(), blocks = ceil_div(pixels, kBlock);
  parallel_items(a.out.samples * blocks, kBlock * a.out.channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, p = i % blocks * kBlock;
      for (int64_t c = 0; c < a.out.channels; c += kVec<Arithmetic<S>>)
        finish_group(a, n, c, p, std::min(p + kBlock, pixels));
    }
  });
}

}  // namespace

template <class S>
void append(const Append<S>& a) {
  if (a.x.pixels() == 0) return;
  a.x.channels_last ? append_pixels(a) : append_planes(a);
}

template <class S>
void finish_gradient(const FinishGradient<S>& a) {
  a.out.channels_last ? finish_pixels(a) : finish_planes(a);
}

DENSENET_EXT_INSTANTIATE(append, Append)
DENSENET_EXT_INSTANTIATE(finish_gradient, FinishGradient)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
