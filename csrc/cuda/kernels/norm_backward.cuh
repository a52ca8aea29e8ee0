// The end of the backward of batch normalization of the feature maps:
//
//   S1 = sum dv = dbeta,   S2 = sum dv*xhat = dgamma,   xhat = (q*x - mean)*rstd
//   coef1 = -q*g (S1 - mean*rstd*S2)/M,  coef2 = -q^2*g*rstd*S2/M,  g = gamma*rstd
//
// Where the gradient buffer starts (transition, head) these are the coefficients, beside coef0 = 1;
// a layer adds its own to those that are there. They are 0 unless the statistics are the batch's
// own. The sums come in parts, added in their order. A block has 8 channels; its 32 lines of
// threads walk down the parts, then down the samples' rows of coefficients.
#pragma once

#include "channel_loops.cuh"

namespace densenet_ext::cuda {

template <class T>
struct NormBackward {
  Norm<T> norm;
  const T* sums;  // [parts, 2, channels]: sum dv and sum dv*(x - mean)
  int64_t parts, channels;
  double values;  // of each sum, over all parts
  Coefficients<T> coef;
  T* dweight;
  T* dbias;
  bool starts = true;       // whether the gradient buffer does
  PerChannel<T> mask = {};  // q; data null: 1
};
constexpr int64_t kNormBackwardBytes = 2 * kMaxThreads * sizeof(double);

// For the channels of one block, by kMaxThreads threads with kNormBackwardBytes of shared memory.
template <class T>
DEVICE void norm_backward_block(const NormBackward<T>& a, int64_t block, unsigned char* memory) {
  const ThreadMap map = narrow_map();
  const Group group = group_of<1>(map, block, a.channels);
  const int64_t c = group.first;
  T own[2] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t i = map.row(); i < a.parts; i += map.rows) {
      own[0] += a.sums[(2 * i) * a.channels + c];
      own[1] += a.sums[(2 * i + 1) * a.channels + c];
    }
  }
  double sums[2] = {static_cast<double>(own[0]), static_cast<double>(own[1])};
  sum_rows(sums, reinterpret_cast<double*>(memory), map);
  if (group.valid == 0) return;

  const double rstd = 1.0 / sqrt(static_cast<double>(a.norm.var[c]) + a.norm.eps);
  const double s1 = sums[0], s2 = sums[1] * rstd;
  if (map.row() == 0) {
    a.dbias[c] = static_cast<T>(s1);
    a.dweight[c] = static_cast<T>(s2);
  }
  double constant = 0, factor = 0;
  if (a.norm.training && a.values > 0) {
    const double g = static_cast<double>(a.norm.weight[c]) * rstd / a.values;
    constant = -g * (s1 - static_cast<double>(a.norm.mean[c]) * rstd * s2);
    factor = -g * rstd * s2;
  }
  if (a.starts) {
    for (int64_t n = map.row(); n < a.coef.samples; n += map.rows) {
      a.coef.at(0, n, c) = T(1);
      a.coef.at(1, n, c) = static_cast<T>(constant);
      a.coef.at(2, n, c) = static_cast<T>(factor);
    }
  } else if (a.norm.training) {
    constexpr int kAhead = 4;  // samples whose coefficients are on their way at a time
    for (int64_t first = map.row(); first < a.coef.samples; first += kAhead * map.rows) {
      T sum[kAhead][2] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t n = first + i * map.rows;
        if (n >= a.coef.samples) break;
        const double q = a.mask.data != nullptr ? static_cast<double>(a.mask.row(n)[c]) : 1.0;
        sum[i][0] = a.coef.at(1, n, c) + static_cast<T>(q * constant);
        sum[i][1] = a.coef.at(2, n, c) + static_cast<T>(q * q * factor);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t n = first + i * map.rows;
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

// gamma*rstd of V channels.
template <int V, class T>
DEVICE void load_steps(const Norm<T>& norm, int64_t c, int valid, T (&step)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    step[v] = v < valid
                  ? norm.weight[c + v] * (T(1) / sqrt(norm.var[c + v] + static_cast<T>(norm.eps)))
                  : T(0);
  }
}

// What a thread knows of V channels of batch normalization and ReLU in backward.
template <class T, int V>
struct NormGroup {
  T scale[V], shift[V], mean[V], step[V];

  // dv = [scale*x + shift > 0] dz into the sums; dz becomes gamma*rstd*dv, which is G.
  DEVICE void backward(const T (&x)[V], T (&dz)[V], T (&sums)[2][V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T dv = affine(x[v], scale[v], shift[v]) > T(0) ? dz[v] : T(0);
      sums[0][v] += dv;
      sums[1][v] = affine(dv, x[v] - mean[v], sums[1][v]);
      dz[v] = step[v] * dv;
    }
  }
};

// Sums of a block's threads into its part, `sums` at its first channel.
template <int V, class T>
DEVICE void store_sums(T (&own)[2][V], T* shared, const ThreadMap& map, const Group& group, T* sums,
                       int64_t channels) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum_rows(own[i], shared, map);
    if (map.row() == 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < group.valid) sums[i * channels + group.first + v] = own[i][v];
      }
    }
  }
}

}  // namespace densenet_ext::cuda
