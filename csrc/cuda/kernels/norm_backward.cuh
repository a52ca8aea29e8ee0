// The backward of batch normalization of the feature maps ends here, with the sums over all pixels:
//
//   S1 = sum dv = dbeta,   S2 = sum dv*xhat = dgamma,   xhat = (q*x - mean)*rstd
//   coef1 = -q*g (S1 - mean*rstd*S2)/M,  coef2 = -q^2*g*rstd*S2/M,  g = gamma*rstd
//
// The transition and the head, which start the gradient buffer, set these coefficients, beside
// coef0 = 1; a layer adds them to the coefficients so far. They are 0 unless the statistics are
// those of the batch. The sums come in parts, added in their order. A block has 8 channels; its 32
// lines of threads walk down the parts, then down the samples' rows of coefficients.
#pragma once

#include "channel_loops.cuh"

namespace densenet_ext::cuda {

template <class T>
struct NormBackward {
  Norm<T> norm;
  const T* sums;  // [parts, 2, channels]: sum dv and sum dv*(x - mean)
  int64_t parts, channels;
  double values;  // that each sum is of, over all parts
  Coefficients<T> coef;
  T* dweight;
  T* dbias;
  bool starts_gradient;  // false: the gradient buffer has coefficients already
  PerChannel<T> mask;    // q; data null: 1
};
// The arguments for the op f, where the gradient buffer starts.
template <class T, class Backward>
NormBackward<T> norm_backward_of(const Backward& f, const Coefficients<T>& coef, const T* sums,
                                 int64_t parts, int64_t channels, int64_t values) {
  NormBackward<T> a = {};
  a.norm = f.norm, a.dweight = f.dnorm_weight, a.dbias = f.dnorm_bias, a.coef = coef;
  a.sums = sums, a.parts = parts, a.channels = channels, a.values = static_cast<double>(values);
  a.starts_gradient = true;
  return a;
}
constexpr int64_t kNormBackwardBytes = 2 * kMaxThreads * sizeof(double);

// Ends the backward of the channels of one block: kMaxThreads threads, with kNormBackwardBytes of
// shared memory.
template <class T>
DEVICE void norm_backward_block(const NormBackward<T>& a, int64_t block, unsigned char* memory) {
  const ThreadMap map = narrow_map();
  const Group group = group_of<1>(map, block, a.channels);
  const int64_t c = group.first;
  T thread_sums[2] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t i = map.line(); i < a.parts; i += map.lines) {
      thread_sums[0] += a.sums[(2 * i) * a.channels + c];
      thread_sums[1] += a.sums[(2 * i + 1) * a.channels + c];
    }
  }
  double sums[2] = {static_cast<double>(thread_sums[0]), static_cast<double>(thread_sums[1])};
  sum_lines(sums, reinterpret_cast<double*>(memory), map);
  if (group.valid == 0) return;

  const double rstd = 1.0 / sqrt(static_cast<double>(a.norm.var[c]) + a.norm.eps);
  const double s1 = sums[0], s2 = sums[1] * rstd;
  if (map.line() == 0) {
    a.dbias[c] = static_cast<T>(s1);
    a.dweight[c] = static_cast<T>(s2);
  }
  double constant = 0, factor = 0;
  if (a.norm.training && a.values > 0) {
    const double g = static_cast<double>(a.norm.weight[c]) * rstd / a.values;
    constant = -g * (s1 - static_cast<double>(a.norm.mean[c]) * rstd * s2);
    factor = -g * rstd * s2;
  }
  if (a.starts_gradient) {
    for (int64_t n = map.line(); n < a.coef.samples; n += map.lines) {
      a.coef.at(0, n, c) = T(1);
      a.coef.at(1, n, c) = static_cast<T>(constant);
      a.coef.at(2, n, c) = static_cast<T>(factor);
    }
  } else if (a.norm.training) {
    constexpr int kInFlight = 4;  // samples, whose coefficients are loaded at a time
    for (int64_t first = map.line(); first < a.coef.samples; first += kInFlight * map.lines) {
      T sum[kInFlight][2] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t n = first + i * map.lines;
        if (n >= a.coef.samples) break;
        const double q = a.mask.data != nullptr ? static_cast<double>(a.mask.row(n)[c]) : 1.0;
        sum[i][0] = a.coef.at(1, n, c) + static_cast<T>(q * constant);
        sum[i][1] = a.coef.at(2, n, c) + static_cast<T>(q * q * factor);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t n = first + i * map.lines;
        if (n >= a.coef.samples) break;
        a.coef.at(1, n, c) = sum[i][0];
        a.coef.at(2, n, c) = sum[i][1];
      }
    }
  }
}

template <class T>
KERNEL __launch_bounds__(kMaxThreads) norm_backward_kernel(NormBackward<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  norm_backward_block(a, blockIdx.x, memory);
}

template <class T>
void norm_backward(const NormBackward<T>& a, Context& context) {
  launch(context, norm_backward_kernel<T>, {narrow_blocks(a.channels)}, kMaxThreads,
         kNormBackwardBytes, a);
}

// Computes gamma*rstd of V channels.
template <int V, class T>
DEVICE void load_gains(const Norm<T>& norm, int64_t c, int valid, T (&gain)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    gain[v] = v < valid
                  ? norm.weight[c + v] * (T(1) / sqrt(norm.var[c + v] + static_cast<T>(norm.eps)))
                  : T(0);
  }
}

// Batch normalization and ReLU of the V channels of a thread, in backward.
template <class T, int V>
struct NormGroup {
  T scale[V], shift[V], mean[V], gain[V];

  // Adds dv = [scale*x + shift > 0] dz to the sums; dz becomes gamma*rstd*dv, which is G.
  DEVICE void backward(const T (&x)[V], T (&dz)[V], T (&sums)[2][V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T dv = affine(x[v], scale[v], shift[v]) > T(0) ? dz[v] : T(0);
      sums[0][v] += dv;
      sums[1][v] = affine(dv, x[v] - mean[v], sums[1][v]);
      dz[v] = gain[v] * dv;
    }
  }
};

// Adds the sums of a block's threads and stores them in its part, `sums` at its first channel.
template <int V, class T>
DEVICE void store_sums(T (&block_sums)[2][V], T* shared, const ThreadMap& map, const Group& group,
                       T* sums, int64_t channels) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum_lines(block_sums[i], shared, map);
    if (map.line() == 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < group.valid) sums[i * channels + group.first + v] = block_sums[i][v];
      }
    }
  }
}

}  // namespace densenet_ext::cuda
