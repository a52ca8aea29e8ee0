// Copying channels into the feature buffer with their moments, and the gradient of channels out of
// the gradient buffer. One plane at a time; threads own contiguous planes. Bytes moved: append x
// and its copy once; finish_gradient G, x and out once.
#include "../parallel.h"
#include "instantiate.h"
#include "moments.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class S>
void append(const Append<S>& a) {
  using T = Arithmetic<S>;
  const int64_t planes = a.x.samples * a.x.channels, pixels = a.x.pixels();
  if (pixels == 0) return;
  parallel(planes, thread_count(planes), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.x.channels, c = i % a.x.channels;
      S* const plane = a.features.plane(n, a.offset + c);
      std::memcpy(plane, a.x.plane(n, c), sizeof(S) * pixels);
      if (a.moments.mean) {
        double mean, m2;
        run_moments(plane, pixels, mean, m2);
        a.moments.mean[n * a.moments.channels + a.offset + c] = static_cast<T>(mean);
        a.moments.m2[n * a.moments.channels + a.offset + c] = static_cast<T>(m2);
      }
    }
  });
}

template <class S>
void finish_gradient(const FinishGradient<S>& a) {
  using T = Arithmetic<S>;
  const int64_t planes = a.out.samples * a.out.channels, pixels = a.out.pixels();
  parallel(planes, thread_count(planes), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / a.out.channels, j = i % a.out.channels, c = a.offset + j;
      const Vec<T> c0 = broadcast(a.coef.at(0, n, c)), c1 = broadcast(a.coef.at(1, n, c)),
                   c2 = broadcast(a.coef.at(2, n, c));
      const T* const g = a.grad.plane(n, c);
      const S* const x = a.features.plane(n, c);
      S* const out = a.out.plane(n, j);
      for (int64_t p = 0; p < pixels; p += kVec<T>) {
        const int64_t left = pixels - p;
        store_first(out + p, c0 * load_first(g + p, left) + (c1 + c2 * load_first(x + p, left)),
                    left);
      }
    }
  });
}

DENSENET_EXT_INSTANTIATE(append, Append)
DENSENET_EXT_INSTANTIATE(finish_gradient, FinishGradient)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
