// Computes squeeze-and-excitation (Hu et al. 2018) in place, on the channels that a dense layer has
// just written.
//
//   pooled = mean,  hidden = relu(W1 pooled + b1),  gate = sigmoid(W2 hidden + b2),  x *= gate
//
// and the moments follow: mean*gate, M2*gate^2. Backward, with g the gradient of the scaled x:
//
//   u = sum_p g*x = gate*dgate,  so the gradient of the sigmoid's argument is u*(1 - gate)
//
// without a division by the gate. The gradient of the unscaled x is gate*g + dpooled/P, which is
// again affine in G and x: the coefficients of the channels change. Threads have contiguous
// samples; the two small products are plain loops.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "instantiate.h"
#include "true_gradient.h"
#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

namespace {

// Computes hidden and gate of one sample from its pooled channels.
template <class S, class T = Arithmetic<S>>
void excite(const SqueezeExciteForward<S>& a, const T* pooled, T* hidden, T* gate) {
  const int64_t k = a.growth, r = a.hidden_width;
  for (int64_t i = 0; i < r; ++i) {
    T sum = a.fc1_bias[i];
    for (int64_t j = 0; j < k; ++j) sum += a.fc1_weight[i * k + j] * pooled[j];
    hidden[i] = sum < T(0) ? T(0) : sum;
  }
  for (int64_t j = 0; j < k; ++j) {
    T sum = a.fc2_bias[j];
    for (int64_t i = 0; i < r; ++i) sum += a.fc2_weight[j * r + i] * hidden[i];
    gate[j] = T(1) / (T(1) + std::exp(-sum));
  }
}

// Returns the gradient of the sigmoid's argument in channel j of sample n.
template <class S>
double argument_gradient(const SqueezeExciteBackward<S>& a, int64_t n, int64_t j) {
  using T = Arithmetic<S>;
  const int64_t pixels = a.features.pixels();
  const TrueGradient<S> gradient(a, n, a.offset + j);
  const S* const x = a.features.plane(n, a.offset + j);
  Vec<T> sum = {};
  for (int64_t p = 0; p < pixels; p += kVec<T>)  // x is 0 beyond the map, and so is the product
    sum += load_first(x + p, pixels - p) * gradient(p, pixels - p);
  return static_cast<double>(sum_lanes<T>(sum)) *
         (1.0 - static_cast<double>(a.gate[n * a.growth + j]));
}

// Writes the gradients of the weight [rows, columns] and the bias of a linear layer from its input
// [samples, columns] and the gradient [samples, rows] of its output.
template <class T>
void linear_backward(int64_t samples, int64_t rows, int64_t columns, const double* grad,
                     const T* input, T* dweight, T* dbias) {
  for (int64_t i = 0; i < rows; ++i) {
    double bias = 0;
    for (int64_t n = 0; n < samples; ++n) bias += grad[n * rows + i];
    dbias[i] = static_cast<T>(bias);
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n)
        sum += grad[n * rows + i] * static_cast<double>(input[n * columns + j]);
      dweight[i * columns + j] = static_cast<T>(sum);
    }
  }
}

}  // namespace

template <class S>
void squeeze_excite_forward(const SqueezeExciteForward<S>& a) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, k = a.growth, pixels = a.features.pixels();
  parallel_items(samples, kWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* const mean = a.moments.mean + n * a.moments.channels + a.offset;
      T* const m2 = a.moments.m2 + n * a.moments.channels + a.offset;
      T* const gate = a.gate + n * k;
      std::copy_n(mean, k, a.pooled + n * k);
      excite(a, a.pooled + n * k, a.hidden + n * a.hidden_width, gate);
      for (int64_t j = 0; j < k; ++j) {
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
  const int64_t samples = a.features.samples, k = a.growth, r = a.hidden_width;
  const double pixels = static_cast<double>(a.features.pixels());
  const Scratch scratch(sizeof(double) * samples * (k + r));
  double* const dgate = scratch.as<double>();   // of the sigmoid's argument [samples, k]
  double* const dhidden = dgate + samples * k;  // of relu's argument [samples, r]
  parallel_items(samples, kWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = 0; j < k; ++j) dgate[n * k + j] = argument_gradient(a, n, j);
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
        const T gate = a.gate[n * k + j];
        a.coef.at(0, n, c) *= gate;
        a.coef.at(1, n, c) = a.coef.at(1, n, c) * gate + static_cast<T>(dpooled / pixels);
        a.coef.at(2, n, c) *= gate;
      }
    }
  });
  linear_backward(samples, k, r, dgate, a.hidden, a.dfc2_weight, a.dfc2_bias);
  linear_backward(samples, r, k, dhidden, a.pooled, a.dfc1_weight, a.dfc1_bias);
}

DENSENET_EXT_INSTANTIATE(squeeze_excite_forward, SqueezeExciteForward)
DENSENET_EXT_INSTANTIATE(squeeze_excite_backward, SqueezeExciteBackward)

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
