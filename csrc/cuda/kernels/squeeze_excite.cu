// Squeeze-and-excitation (Hu et al. 2018) works in place on the k channels that a dense layer has
// just written, with a hidden width r:
//
//   pooled = mean,  hidden = relu(W1 pooled + b1),  gate = sigmoid(W2 hidden + b2),  x *= gate
//
// and the moments follow: mean*gate, M2*gate^2. Two launches: a block for each sample's two small
// products, then one pass over the slice. Backward, with g the gradient of the scaled x:
//
//   u = sum_p g*x = gate*dgate,  so the gradient of the sigmoid's argument is u*(1 - gate)
//
// without a division by the gate; the gradient of the unscaled x is again coef0*G + coef1 +
// coef2*x, which stands for gate*g + dpooled/P. Three launches: u (in parts where a sample is
// split, channel_loops.cuh), a block for each sample's gradients through the gate, and the
// gradients of the weights and biases, sums over samples. Bytes moved a pixel: forward k*e read and
// written, backward 2*k*e read.
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
struct ScaleArguments {
  using T = Arithmetic<S>;
  S* data;  // at the first channel
  int64_t pitch, channels;
  const T* gate;  // [samples, channels]
  PixelRanges ranges;
  ThreadMap map;
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) scale_kernel(ScaleArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  S* const data = a.data + range.sample * a.ranges.pixels * a.pitch + group.first;
  T gate[V];
  load_each<V>(a.gate + range.sample * a.channels + group.first, group.valid, gate);
  const S* const source[1] = {data};
  const int64_t pitch[1] = {a.pitch};
  for_pixels<V, 1>(range, a.map, group.valid, source, pitch, [&](int64_t p, T(&x)[1][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[0][v] *= gate[v];
    store_first<V>(data + p * a.pitch, group.valid, x[0]);
  });
}

template <class S>
struct DotArguments {
  using T = Arithmetic<S>;
  const S* x;  // at the first channel
  const S* grad;
  int64_t x_pitch, grad_pitch, channels, offset;
  Coefficients<T> coef;
  PixelRanges ranges;
  ThreadMap map;
  T* sums;  // [ranges, channels]: sum of g*x over the pixels of a range
};

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 2) dot_kernel(DotArguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  T coef[3][V], sums[V] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    load_each<V>(&a.coef.at(i, range.sample, a.offset + group.first), group.valid, coef[i]);
  const int64_t first = range.sample * a.ranges.pixels;
  const S* const source[2] = {a.grad + first * a.grad_pitch + group.first,
                              a.x + first * a.x_pitch + group.first};
  const int64_t pitch[2] = {a.grad_pitch, a.x_pitch};
  for_pixels<V, 2>(range, a.map, group.valid, source, pitch, [&](int64_t, T(&in)[2][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T g = affine(in[0][v], coef[0][v], affine(in[1][v], coef[2][v], coef[1][v]));
      sums[v] = affine(in[1][v], g, sums[v]);
    }
  });
  sum_lines(sums, reinterpret_cast<T*>(memory), a.map);
  if (a.map.line() != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < group.valid)
      a.sums[static_cast<int64_t>(blockIdx.x) * a.channels + group.first + v] = sums[v];
  }
}

template <class S>
struct SampleArguments {
  SqueezeExciteBackward<S> op;
  const Arithmetic<S>* sums;  // [samples, splits, growth]
  int64_t splits;
  Arithmetic<S>* dlogit;   // [samples, growth]: of the sigmoid's argument
  Arithmetic<S>* dhidden;  // [samples, hidden_width]: of relu's argument
};

template <class S>
KERNEL __launch_bounds__(kMaxThreads) sample_kernel(SampleArguments<S> s) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const SqueezeExciteBackward<S>& a = s.op;
  const ThreadMap map = narrow_map();
  const int64_t n = blockIdx.x, k = a.growth, r = a.hidden_width, step = blockDim.x;
  T* const reduction = reinterpret_cast<T*>(memory);
  T* const dlogit = reduction + kMaxThreads;
  T* const dhidden = dlogit + k;
  for (int64_t chunk = 0; chunk * map.lanes < k; ++chunk) {
    const Group group = group_of<1>(map, chunk, k);
    T sum[1] = {};
    if (group.valid > 0) {
      for (int64_t i = map.line(); i < s.splits; i += map.lines)
        sum[0] += s.sums[(n * s.splits + i) * k + group.first];
    }
    sum_lines(sum, reduction, map);
    if (map.line() == 0 && group.valid > 0) {
      const T value = sum[0] * (T(1) - a.gate[n * k + group.first]);
      dlogit[group.first] = value;
      s.dlogit[n * k + group.first] = value;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r; i += step) {
    T sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += a.fc2_weight[j * r + i] * dlogit[j];
    const T value = a.hidden[n * r + i] > T(0) ? sum : T(0);
    dhidden[i] = value;
    s.dhidden[n * r + i] = value;
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

// The gradient of a weight is the sum over samples of gradient[n] * input[n], that of a bias the
// sum of gradient[n].
template <class T>
struct ParameterGradient {
  T* out;
  const T* gradient;
  const T* input;  // null: a bias
  int64_t gradient_pitch, input_pitch;

  DEVICE T term(int64_t n) const {
    const T g = gradient[n * gradient_pitch];
    return input ? g * input[n * input_pitch] : g;
  }
};

// The q-th of the parameters dW2 [k, r], dW1 [r, k], db2 [k], db1 [r], in this order.
template <class S>
DEVICE ParameterGradient<Arithmetic<S>> parameter_gradient(const SampleArguments<S>& s, int64_t q) {
  const SqueezeExciteBackward<S>& a = s.op;
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
KERNEL __launch_bounds__(kMaxThreads) parameter_kernel(SampleArguments<S> s) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = narrow_map();
  const int64_t k = s.op.growth, r = s.op.hidden_width;
  const Group group = group_of<1>(map, blockIdx.x, 2 * k * r + k + r);
  const ParameterGradient<T> parameter = parameter_gradient(s, group.first);
  T sum[1] = {};
  if (group.valid > 0) {
#pragma unroll 4
    for (int64_t n = map.line(); n < s.op.features.samples; n += map.lines)
      sum[0] += parameter.term(n);
  }
  sum_lines(sum, reinterpret_cast<T*>(memory), map);
  if (map.line() == 0 && group.valid > 0) *parameter.out = sum[0];
}

// Threads for k or r values of a sample.
int threads_for(int64_t values) {
  return static_cast<int>(std::min<int64_t>(kMaxThreads, round_up(values, kWarp)));
}

}  // namespace

template <class S>
void squeeze_excite_forward(const SqueezeExciteForward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  if (f.growth == 0) return;
  launch(context, gate_kernel<S>, {f.features.samples},
         threads_for(std::max(f.growth, f.hidden_width)), (f.growth + f.hidden_width) * sizeof(T),
         f);
  ScaleArguments<S> a = {};
  a.data = f.features.data + f.offset, a.pitch = f.features.pitch, a.channels = f.growth;
  a.gate = f.gate;
  with_partition<S>(spacing(f.features, f.offset), f.growth, f.features.samples,
                    f.features.pixels(),
                    [&](auto V, auto& p) { launch(context, scale_kernel<S, V>, p, 0, a); });
}

template <class S>
void squeeze_excite_backward(const SqueezeExciteBackward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  const int64_t samples = f.features.samples, k = f.growth, r = f.hidden_width;
  if (k == 0) return;
  SampleArguments<S> s = {};
  s.op = f;
  s.dlogit = context.scratch<T>(samples * k), s.dhidden = context.scratch<T>(samples * r);
  DotArguments<S> a = {};
  a.x = f.features.data + f.offset, a.x_pitch = f.features.pitch;
  a.grad = f.grad.data + f.offset, a.grad_pitch = f.grad.pitch;
  a.channels = k, a.offset = f.offset, a.coef = f.coef;
  const uint64_t distances = spacing(f.features, f.offset) | spacing(f.grad, f.offset);
  const int64_t pixels = f.features.pixels();
  with_partition<S>(distances, k, samples, pixels, [&](auto V, auto& p) {
    s.sums = a.sums = context.scratch<T>(p.ranges.count() * k), s.splits = p.ranges.splits;
    launch(context, dot_kernel<S, V>, p, V * p.threads * sizeof(T), a);
  });
  launch(context, sample_kernel<S>, {samples}, kMaxThreads, (kMaxThreads + k + r) * sizeof(T), s);
  launch(context, parameter_kernel<S>, {narrow_blocks(2 * k * r + k + r)}, kMaxThreads,
         kMaxThreads * sizeof(T), s);
}

DENSENET_EXT_INSTANTIATE(squeeze_excite_forward, SqueezeExciteForward)
DENSENET_EXT_INSTANTIATE(squeeze_excite_backward, SqueezeExciteBackward)

}  // namespace densenet_ext::cuda
