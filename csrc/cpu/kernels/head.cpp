// Computes forward and backward of the head: batch normalization, ReLU and the mean over pixels.
// The backward starts the gradient buffer.
//
//   out[n, c] = (1/P) sum_p relu(scale*x + shift)
//   G = gamma*rstd * [scale*x + shift > 0] * dout/P,  S1, S2 on the way
//
// Lanes are the pixels of one plane; threads have contiguous planes. Bytes moved: x once (and G
// once).
#include "cpu/parallel.h"
#include "instantiate.h"
#include "norm_backward.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {
namespace {

template <class S, class T>
void store_scalar(S* p, T value) {
  store_first(p, broadcast(value), 1);
}
template <class S>
DX_INLINE Arithmetic<S> load_scalar(const S* p) {
  return load_first(p, 1)[0];
}

}  // namespace

template <class S>
void head_forward(const HeadForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.features.channels, planes = a.features.samples * channels,
                pixels = a.features.pixels();
  parallel(planes, thread_count(planes), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      const T scale = a.scale_shift.scale.row(n)[c], shift = a.scale_shift.shift.row(n)[c];
      const Vec<T> s = broadcast(scale), t = broadcast(shift);
      const S* const x = a.features.plane(n, c);
      Vec<T> sum = {};
      int64_t p = 0;
      for (; p + kVec<T> <= pixels; p += kVec<T>) sum += relu(s * load(x + p) + t);
      T total = sum_lanes<T>(sum);
      if (p < pixels) {
        const Vec<T> last = relu(s * load_first(x + p, pixels - p) + t);
        for (int64_t j = 0; j < pixels - p; ++j) total += last[j];
      }
      store_scalar(a.out + i, total / static_cast<T>(pixels));
    }
  });
}

template <class S>
void head_backward(const HeadBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t channels = a.features.channels, samples = a.features.samples,
                planes = samples * channels, pixels = a.features.pixels();
  const Scratch plane_sums(sizeof(double) * (2 * planes + 1)), sums(sizeof(double) * 2 * channels);
  parallel(planes, thread_count(planes), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      const Vec<T> s = broadcast(a.scale_shift.scale.row(n)[c]),
                   t = broadcast(a.scale_shift.shift.row(n)[c]), mean = broadcast(a.norm.mean[c]);
      const T dz_value = load_scalar(a.grad_out + i) / static_cast<T>(pixels);
      const Vec<T> dz = broadcast(dz_value), step = broadcast(norm_gain(a.norm, c));
      const S* const x = a.features.plane(n, c);
      T* const g = a.grad.plane(n, c);
      Vec<T> s1 = {}, s2 = {};
      for (int64_t p = 0; p < pixels; p += kVec<T>) {
        const int64_t remaining = pixels - p;
        const Vec<T> value = load_first(x + p, remaining);
        Vec<T> d = relu_gradient(s * value + t, dz);
        if (remaining < kVec<T>) d = keep_first<T>(d, remaining);
        s1 += d;
        s2 += d * (value - mean);
        store_first(g + p, step * d, remaining);
      }
      plane_sums.as<double>()[2 * i] = static_cast<double>(sum_lanes<T>(s1));
      plane_sums.as<double>()[2 * i + 1] = static_cast<double>(sum_lanes<T>(s2));
    }
  });
  std::fill_n(sums.as<double>(), 2 * channels, 0.0);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < 2 * channels; ++i)
      sums.as<double>()[i] += plane_sums.as<double>()[2 * n * channels + i];
  }
  finish_norm_backward(a.norm, sums.as<double>(), channels, static_cast<double>(samples * pixels),
                       PerChannel<T>{}, a.coef, false, a.dnorm_weight, a.dnorm_bias);
}

DENSENET_EXT_INSTANTIATE(head_forward, HeadForward)
DENSENET_EXT_INSTANTIATE(head_backward, HeadBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
