// Squeeze-and-excitation on the channels a dense layer has just written, in place (Hu et al. 2018).
//
//   pooled = mean,  hidden = relu(W1 pooled + b1),  gate = sigmoid(W2 hidden + b2),  x *= gate
//
// and the moments follow: mean*gate, M2*gate^2. Backward, with g the gradient of the scaled x:
//
//   u = sum_p g*x = gate*dgate,  so the gradient of the sigmoid's argument is u*(1 - gate)
//
// without a division by the gate; the gradient of the unscaled x is again coef0*G + coef1 +
// coef2*x, which stands for gate*g + dpooled/P. Threads own samples; the two small products are
// plain loops.
#include <cmath>

#include "cpu/parallel.h"
#include "instantiate.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class S>
void squeeze_excite_forward(const SqueezeExciteForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, k = a.growth, r = a.hidden_width,
                pixels = a.features.pixels();
  parallel(samples, thread_count(samples), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* const mean = a.moments.mean + n * a.moments.channels + a.offset;
      T* const m2 = a.moments.m2 + n * a.moments.channels + a.offset;
      T* const pooled = a.pooled + n * k;
      T* const hidden = a.hidden + n * r;
      T* const gate = a.gate + n * k;
      for (int64_t j = 0; j < k; ++j) pooled[j] = mean[j];
      for (int64_t i = 0; i < r; ++i) {
        T sum = a.fc1_bias[i];
        for (int64_t j = 0; j < k; ++j) sum += a.fc1_weight[i * k + j] * pooled[j];
        hidden[i] = sum < T(0) ? T(0) : sum;
      }
      for (int64_t j = 0; j < k; ++j) {
        T sum = a.fc2_bias[j];
        for (int64_t i = 0; i < r; ++i) sum += a.fc2_weight[j * r + i] * hidden[i];
        gate[j] = T(1) / (T(1) + std::exp(-sum));
        mean[j] *= gate[j];
        m2[j] *= gate[j] * gate[j];
        const Vec<T> e = broadcast(gate[j]);
        S* const plane = a.features.plane(n, a.offset + j);
        for (int64_t p = 0; p < pixels; p += kVec<T>)
          store_first(plane + p, e * load_first(plane + p, pixels - p), pixels - p);
      }
    }
  });
}

template <class S>
void squeeze_excite_backward(const SqueezeExciteBackward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, k = a.growth, r = a.hidden_width,
                pixels = a.features.pixels();
  const Scratch scratch(sizeof(double) * (samples * (k + r) + 1));
  double* const dgate = scratch.as<double>();   // of the sigmoid's argument [samples, k]
  double* const dhidden = dgate + samples * k;  // of relu's argument [samples, r]
  parallel(samples, thread_count(samples), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* const gate = a.gate + n * k;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t c = a.offset + j;
        const Vec<T> c0 = broadcast(a.coef.at(0, n, c)), c1 = broadcast(a.coef.at(1, n, c)),
                     c2 = broadcast(a.coef.at(2, n, c));
        const T* const g = a.grad.plane(n, c);
        const S* const x = a.features.plane(n, c);
        Vec<T> sum = {};
        for (int64_t p = 0; p < pixels; p += kVec<T>) {
          const Vec<T> value =
              load_first(x + p, pixels - p);  // 0 beyond the map, and so is the product
          sum += value * (c0 * load_first(g + p, pixels - p) + (c1 + c2 * value));
        }
        dgate[n * k + j] =
            static_cast<double>(sum_lanes<T>(sum)) * (1.0 - static_cast<double>(gate[j]));
      }
      for (int64_t i = 0; i < r; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j)
          sum += static_cast<double>(a.fc2_weight[j * r + i]) * dgate[n * k + j];
        dhidden[n * r + i] = a.hidden[n * r + i] <= T(0) ? 0.0 : sum;
      }
      for (int64_t j = 0; j < k; ++j) {
        double dpooled = 0;
        for (int64_t i = 0; i < r; ++i)
          dpooled += static_cast<double>(a.fc1_weight[i * k + j]) * dhidden[n * r + i];
        const int64_t c = a.offset + j;
        a.coef.at(0, n, c) *= gate[j];
        a.coef.at(1, n, c) =
            a.coef.at(1, n, c) * gate[j] + static_cast<T>(dpooled / static_cast<double>(pixels));
        a.coef.at(2, n, c) *= gate[j];
      }
    }
  });
  for (int64_t j = 0; j < k; ++j) {
    double bias = 0;
    for (int64_t n = 0; n < samples; ++n) bias += dgate[n * k + j];
    a.dfc2_bias[j] = static_cast<T>(bias);
    for (int64_t i = 0; i < r; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n)
        sum += dgate[n * k + j] * static_cast<double>(a.hidden[n * r + i]);
      a.dfc2_weight[j * r + i] = static_cast<T>(sum);
    }
  }
  for (int64_t i = 0; i < r; ++i) {
    double bias = 0;
    for (int64_t n = 0; n < samples; ++n) bias += dhidden[n * r + i];
    a.dfc1_bias[i] = static_cast<T>(bias);
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n)
        sum += dhidden[n * r + i] * static_cast<double>(a.pooled[n * k + j]);
      a.dfc1_weight[i * k + j] = static_cast<T>(sum);
    }
  }
}

DENSENET_EXT_INSTANTIATE(squeeze_excite_forward, SqueezeExciteForward)
DENSENET_EXT_INSTANTIATE(squeeze_excite_backward, SqueezeExciteBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
