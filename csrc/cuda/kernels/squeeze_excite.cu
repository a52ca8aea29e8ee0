// Squeeze-and-excitation on the k channels that a dense layer has just written, in place (Hu et al.
// 2018), with a hidden width r:
//
//   pooled = mean,  hidden = relu(W1 pooled + b1),  gate = sigmoid(W2 hidden + b2),  x *= gate
//
// and the moments follow: mean*gate, M2*gate^2. Two launches: a block a sample for the two small
// products, then one pass over the slice. Backward, with g the gradient of the scaled x:
//
//   u = sum_p g*x = gate*dgate,  so the gradient of the sigmoid's argument is u*(1 - gate)
//
// without a division by the gate; the gradient of the unscaled x is again coef0*G + coef1 +
// coef2*x, which stands for gate*g + dpooled/P. Three launches: u (in pieces where a sample is cut,
// channel_loops.cuh), a block a sample for what hangs on it, and the gradients of the parameters,
// sums over samples. Bytes moved a pixel: forward k*e read and written, backward 2*k*e read.
#include "channel_loops.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
KERNEL __launch_bounds__(kMaxThreads) gate_kernel(SqueezeExciteForward<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  T* const pooled = reinterpret_cast<T*>(memory);
  T* const hidden = pooled + a.growth;
  const int64_t n = blockIdx.x, k = a.growth, r = a.hidden_width, step = blockDim.x;
  T* const mean = a.moments.mean + n * a.moments.channels + a.offset;
  T* const m2 = a.moments.m2 + n * a.moments.channels + a.offset;
  for (int64_t j = threadIdx.x; j < k; j += step) {
    const T value = mean[j];
    pooled[j] = value;
    a.pooled[n * k + j] = value;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r; i += step) {
    T sum = a.fc1_bias[i];
    for (int64_t j = 0; j < k; ++j) sum += a.fc1_weight[i * k + j] * pooled[j];
    hidden[i] = relu(sum);
    a.hidden[n * r + i] = relu(sum);
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < k; j += step) {
    T sum = a.fc2_bias[j];
    for (int64_t i = 0; i < r; ++i) sum += a.fc2_weight[j * r + i] * hidden[i];
    const T gate = T(1) / (T(1) + exp(-sum));
    a.gate[n * k + j] = gate;
    mean[j] = pooled[j] * gate;
    m2[j] *= gate * gate;
  }
}

template <class S>
struct ScaleArgs {
  using T = Arithmetic<S>;
  S* data;  // at the first channel
  int64_t pitch, channels;
  const T* gate;  // [samples, channels]
  Items items;
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) scale_kernel(ScaleArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  S* const data = a.data + run.sample * a.items.pixels * a.pitch + group.first;
  T gate[V];
  load_each<V>(a.gate + run.sample * a.channels + group.first, group.valid, gate);
  const S* const from[1] = {data};
  const int64_t pitch[1] = {a.pitch};
  for_pixels<V, 1>(run, a.map, group.valid, from, pitch, [&](int64_t p, T(&x)[1][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[0][v] *= gate[v];
    store_first<V>(data + p * a.pitch, group.valid, x[0]);
  });
}

template <class S>
struct DotArgs {
  using T = Arithmetic<S>;
  const S* x;  // at the first channel
  const S* grad;
  int64_t x_pitch, grad_pitch, channels, offset;
  Coefficients<T> coef;
  Items items;
  ThreadMap map;
  T* sums;  // [items, channels]: sum of g*x over the pixels of an item
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) dot_kernel(DotArgs<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  T coef[3][V], sums[V] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    load_each<V>(&a.coef.at(i, run.sample, a.offset + group.first), group.valid, coef[i]);
  const int64_t first = run.sample * a.items.pixels;
  const S* const from[2] = {a.grad + first * a.grad_pitch + group.first,
                            a.x + first * a.x_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.x_pitch};
  for_pixels<V, 2>(run, a.map, group.valid, from, pitch, [&](int64_t, T(&in)[2][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T g = affine(in[0][v], coef[0][v], affine(in[1][v], coef[2][v], coef[1][v]));
      sums[v] = affine(in[1][v], g, sums[v]);
    }
  });
  sum_rows(sums, reinterpret_cast<T*>(memory), a.map);
  if (a.map.row() != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < group.valid)
      a.sums[static_cast<int64_t>(blockIdx.x) * a.channels + group.first + v] = sums[v];
  }
}

template <class S>
struct SampleArgs {
  SqueezeExciteBackward<S> a;
  const Arithmetic<S>* sums;  // [samples, splits, growth]
  int64_t splits;
  Arithmetic<S>* dlogit;   // [samples, growth]: of the sigmoid's argument
  Arithmetic<S>* dhidden;  // [samples, hidden_width]: of relu's argument
};

template <class S>
KERNEL __launch_bounds__(kMaxThreads) sample_kernel(SampleArgs<S> args) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const SqueezeExciteBackward<S>& a = args.a;
  const ThreadMap map = narrow_map();
  const int64_t n = blockIdx.x, k = a.growth, r = a.hidden_width, step = blockDim.x;
  T* const reduction = reinterpret_cast<T*>(memory);
  T* const dlogit = reduction + kMaxThreads;
  T* const dhidden = dlogit + k;
  for (int64_t chunk = 0; chunk * map.lanes < k; ++chunk) {
    const Group group = group_of<1>(map, chunk, k);
    T sum[1] = {};
    if (group.valid > 0) {
      for (int64_t i = map.row(); i < args.splits; i += map.rows)
        sum[0] += args.sums[(n * args.splits + i) * k + group.first];
    }
    sum_rows(sum, reduction, map);
    if (map.row() == 0 && group.valid > 0) {
      const T value = sum[0] * (T(1) - a.gate[n * k + group.first]);
      dlogit[group.first] = value;
      args.dlogit[n * k + group.first] = value;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r; i += step) {
    T sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += a.fc2_weight[j * r + i] * dlogit[j];
    const T value = a.hidden[n * r + i] > T(0) ? sum : T(0);
    dhidden[i] = value;
    args.dhidden[n * r + i] = value;
  }
  __syncthreads();
  const T pixels = static_cast<T>(a.features.pixels());
  for (int64_t j = threadIdx.x; j < k; j += step) {
    T dpooled = 0;
    for (int64_t i = 0; i < r; ++i) dpooled += a.fc1_weight[i * k + j] * dhidden[i];
    const int64_t c = a.offset + j;
    const T gate = a.gate[n * k + j];
    a.coef.at(0, n, c) *= gate;
    a.coef.at(1, n, c) = a.coef.at(1, n, c) * gate + dpooled / pixels;
    a.coef.at(2, n, c) *= gate;
  }
}

// One of the outputs: the sum over samples of left[n] * right[n], or of left[n] alone.
template <class T>
struct Product {
  T* out;
  const T* left;
  const T* right;
  int64_t left_width, right_width;

  DEVICE T at(int64_t n) const {
    return right ? left[n * left_width] * right[n * right_width] : left[n * left_width];
  }
};

// The outputs one after the other: dW2 [k, r], dW1 [r, k], db2 [k], db1 [r].
template <class S>
DEVICE Product<Arithmetic<S>> product_of(const SampleArgs<S>& s, int64_t q) {
  const SqueezeExciteBackward<S>& a = s.a;
  const int64_t k = a.growth, r = a.hidden_width;
  if (q < k * r) return {a.dfc2_weight + q, s.dlogit + q / r, a.hidden + q % r, k, r};
  q -= k * r;
  if (q < k * r) return {a.dfc1_weight + q, s.dhidden + q / k, a.pooled + q % k, r, k};
  q -= k * r;
  if (q < k) return {a.dfc2_bias + q, s.dlogit + q, nullptr, k, 0};
  q -= k;
  return {a.dfc1_bias + q, s.dhidden + q, nullptr, r, 0};
}

template <class S>
KERNEL __launch_bounds__(kMaxThreads) parameter_kernel(SampleArgs<S> args) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = narrow_map();
  const int64_t k = args.a.growth, r = args.a.hidden_width;
  const Group group = group_of<1>(map, blockIdx.x, 2 * k * r + k + r);
  const Product<T> product = product_of(args, group.first);
  T sum[1] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t n = map.row(); n < args.a.features.samples; n += map.rows) sum[0] += product.at(n);
  }
  sum_rows(sum, reinterpret_cast<T*>(memory), map);
  if (map.row() == 0 && group.valid > 0) *product.out = sum[0];
}

// Threads for k or r values of a sample.
int few_threads(int64_t values) {
  return static_cast<int>(std::min<int64_t>(kMaxThreads, round_up(values, kWarp)));
}

}  // namespace

template <class S>
void squeeze_excite_forward(const SqueezeExciteForward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  if (a.growth == 0) return;
  launch(context, gate_kernel<S>, {a.features.samples},
         few_threads(std::max(a.growth, a.hidden_width)), (a.growth + a.hidden_width) * sizeof(T),
         a);
  with_vector<S>(spacing(a.features, a.offset), [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Plan p = plan(a.growth, V, a.features.samples, a.features.pixels());
    launch(context, scale_kernel<S, V>, p.grid(), p.threads, 0,
           ScaleArgs<S>{a.features.data + a.offset, a.features.pitch, a.growth, a.gate, p.items,
                        p.map});
  });
}

template <class S>
void squeeze_excite_backward(const SqueezeExciteBackward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  const int64_t samples = a.features.samples, k = a.growth, r = a.hidden_width;
  if (k == 0) return;
  SampleArgs<S> args = {a, nullptr, 0, context.scratch<T>(samples * k),
                        context.scratch<T>(samples * r)};
  with_vector<S>(spacing(a.features, a.offset) | spacing(a.grad, a.offset), [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const Plan p = plan(k, V, samples, a.features.pixels());
    T* const sums = context.scratch<T>(p.items.count() * k);
    launch(context, dot_kernel<S, V>, p.grid(), p.threads, V * p.threads * sizeof(T),
           DotArgs<S>{a.features.data + a.offset, a.grad.data + a.offset, a.features.pitch,
                      a.grad.pitch, k, a.offset, a.coef, p.items, p.map, sums});
    args.sums = sums, args.splits = p.items.splits;
  });
  launch(context, sample_kernel<S>, {samples}, kMaxThreads, (kMaxThreads + k + r) * sizeof(T),
         args);
  launch(context, parameter_kernel<S>, {narrow_blocks(2 * k * r + k + r)}, kMaxThreads,
         kMaxThreads * sizeof(T), args);
}

#define INSTANTIATE(S)                                                               \
  template void squeeze_excite_forward<S>(const SqueezeExciteForward<S>&, Context&); \
  template void squeeze_excite_backward<S>(const SqueezeExciteBackward<S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
