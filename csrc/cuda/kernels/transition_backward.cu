// Backward of the transition, which starts the gradient buffer:
//
//   dzp[p', c] = sum_o dout[p', o] W[o, c],   dz = dzp/4 at each of the 4 pixels
//   dv = [scale*x + shift > 0] dz,   G = gamma*rstd*dv,   S1 = sum dv, S2 = sum dv*xhat
//   dW[o, c] = sum_p' dout[p', o] zp[p', c]
//
// Main launch: a block has 64 channels and a part of the pooled pixels, 128 of them at a time.
// Their dzp (gemm_tile.cuh) goes to shared memory; then threads take groups of channels of pooled
// pixels: x of the four pixels, G, both sums, and zp for the next launch, which makes dW in parts
// of the pooled pixels. Parts of dW, S1 and S2 are added in their order by two further launches.
// Where a size is odd, the last row or column was not used: one launch clears its G. Bytes moved a
// pixel of the map: x and G once, C*e each; zp C/4*e written and read; dout O/4*e for every 64
// channels, from L2 but once.
#include "norm_backward.cuh"
#include "transition.cuh"

namespace densenet_ext::cuda {
namespace {

template <class Math>
using PooledProduct = TileProduct<Math, false, true>;  // dout W
template <class Math>
using WeightProduct = TileProduct<Math, true, true>;  // dout^T zp

template <class S>
struct SpreadArgs {
  using T = Arithmetic<S>;
  Matrix<S> dout, weight;
  Maps<const S> features;
  Maps<S> grad;
  Windows windows;
  ScaleShiftTable<T> scale_shift;  // one row for all samples
  Norm<T> norm;
  int64_t each;  // tiles of a block
  S* pooled;     // [M', pitch]
  int64_t pitch;
  T* sums;  // [parts, 2, channels]
};

template <class Math>
KERNEL __launch_bounds__(PooledProduct<Math>::kThreads, sizeof(typename Math::T) == 8 ? 1 : 2)
    spread_kernel(SpreadArgs<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using P = PooledProduct<Math>;
  using S = typename P::S;
  using T = typename P::T;
  constexpr int V = kFew<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = {P::kN / V, P::kThreads / (P::kN / V)};
  const int64_t channels = a.features.channels, part = blockIdx.y;
  const Group group = group_of<V>(map, blockIdx.x, channels);
  T* const dzp = reinterpret_cast<T*>(memory);
  T sums[2][V] = {};
  P product;
  for (int64_t tile = part * a.each; tile < (part + 1) * a.each; ++tile) {
    const TilePlace at = {tile * P::kM, static_cast<int64_t>(blockIdx.x) * P::kN, 0,
                          a.dout.columns};
    if (at.m >= a.dout.rows) break;
    product.run(memory, a.dout, a.weight, at);
    product.share(dzp);

    NormGroup<T, V> norm;
    load_each<V>(a.scale_shift.scale.data + group.first, group.valid, norm.scale);
    load_each<V>(a.scale_shift.shift.data + group.first, group.valid, norm.shift);
    load_each<V>(a.norm.mean + group.first, group.valid, norm.mean);
    load_steps<V>(a.norm, group.first, group.valid, norm.step);
    for (int row = map.row(); row < P::kM; row += map.rows) {
      const int64_t m = at.m + row;
      if (m >= a.dout.rows || group.valid == 0) break;
      const int64_t corner = a.windows.corner(static_cast<int>(m));
      T x[4][V], mean[V] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_first<V>(a.features.row(corner + a.windows.step(i)) + group.first, group.valid, x[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dz[v] = dzp[row * P::kPitchC + map.lane() * V + v] * T(0.25);
          mean[v] += relu(affine(x[i][v], norm.scale[v], norm.shift[v]));
        }
        norm.backward(x[i], dz, sums);
        store_first<V>(a.grad.row(corner + a.windows.step(i)) + group.first, group.valid, dz);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) mean[v] *= T(0.25);
      store_first<V>(a.pooled + m * a.pitch + group.first, group.valid, mean);
    }
    __syncthreads();
  }
  store_sums<V>(sums, dzp, map, group, a.sums + part * 2 * channels, channels);
}

template <class S>
struct WeightArgs {
  using T = Arithmetic<S>;
  Matrix<S> dout, pooled;
  int64_t each;  // pooled pixels of a part
  T* parts;      // [parts, outputs, pitch]
  int64_t pitch;
};

template <class Math>
KERNEL __launch_bounds__(WeightProduct<Math>::kThreads, sizeof(typename Math::T) == 8 ? 1 : 2)
    weight_kernel(WeightArgs<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using P = WeightProduct<Math>;
  using T = typename P::T;
  DYNAMIC_SHARED(memory);
  const int64_t outputs = a.dout.columns, across = ceil_div(a.pooled.columns, P::kN),
                part = blockIdx.y, begin = part * a.each, end = begin + a.each;
  const TilePlace at = {blockIdx.x / across * P::kM, blockIdx.x % across * P::kN, begin,
                        end < a.dout.rows ? end : a.dout.rows};
  P product;
  product.run(memory, a.dout, a.pooled, at);
  T* const result = a.parts + (part * outputs + at.m) * a.pitch + at.n;
  product.for_accumulators([&](int row, int column, T& value) {
    if (at.m + row < outputs && at.n + column < a.pitch) result[row * a.pitch + column] = value;
  });
}

template <class T>
struct SumArgs {
  const T* parts;  // [count, rows, pitch]
  int64_t count, rows, columns, pitch;
  T* out;  // [rows, columns]
};

template <class T>
KERNEL __launch_bounds__(kMaxThreads) sum_parts_kernel(SumArgs<T> a) {
  wait_for_earlier_kernels();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= a.rows * a.columns) return;
  const T* const from = a.parts + i / a.columns * a.pitch + i % a.columns;
  T sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < a.count; ++part) sum += from[part * a.rows * a.pitch];
  a.out[i] = sum;
}

template <class S>
struct EdgeArgs {
  Maps<S> grad;
  Windows windows;
  Items items;  // of the pixels in no window
  ThreadMap map;
};

// First the last column, down to the windows' end, then the last row.
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) clear_edge_kernel(EdgeArgs<S> a) {
  wait_for_earlier_kernels();
  const Run run = a.items[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.grad.channels);
  if (group.valid == 0) return;
  const Windows& w = a.windows;
  const int64_t used = 2 * w.pooled_height, column = w.width % 2 == 0 ? 0 : used;
  for (int64_t i = run.begin + a.map.row(); i < run.end; i += a.map.rows) {
    const int64_t pixel = i < column ? i * w.width + w.width - 1 : used * w.width + i - column;
    const Arithmetic<S> zeros[V] = {};
    store_first<V>(a.grad.row(run.sample * a.grad.pixels() + pixel) + group.first, group.valid,
                   zeros);
  }
}

// The gradient of the output as rows that start at multiples of 16 bytes: where it lies, or copied.
template <class S>
Matrix<S> gradient_rows(const StridedMaps<const S>& m, Context& context) {
  const int64_t rows = m.samples * m.height * m.width;
  const bool dense = (m.channels == 1 || m.stride_c == 1) &&
                     (m.height == 1 || m.stride_h == m.width * m.stride_w) &&
                     (m.samples == 1 || m.stride_n == m.height * m.width * m.stride_w);
  if (dense && m.width > 1 && m.stride_w >= m.channels && spacing(m) % 16 == 0)
    return {m.data, rows, m.channels, m.stride_w};
  const int64_t pitch = round_up(m.channels, kLanes);
  S* const copy = context.scratch<S>(rows * pitch);
  append<S>({m, {copy, m.samples, m.channels, m.height, m.width, pitch}, 0, {}}, context);
  return {copy, rows, m.channels, pitch};
}

}  // namespace

template <class S>
void transition_backward(const TransitionBackward<S>& a, Context& context) {
  using T = Arithmetic<S>;
  constexpr int V = 16 / sizeof(S);
  const Windows windows = Windows::of(a.features);
  const int64_t channels = a.features.channels, samples = a.features.samples,
                outputs = a.grad_out.channels, rows = samples * windows.pooled_pixels(),
                pitch = round_up(channels, kLanes), pixels = a.features.pixels();

  const int64_t edge = pixels - 4 * windows.pooled_pixels();
  if (edge > 0) {
    const Plan p = plan(channels, V, samples, edge);
    launch(context, clear_edge_kernel<S, V>, p.grid(), p.threads, 0,
           EdgeArgs<S>{a.grad, windows, p.items, p.map});
  }
  const T* sums = nullptr;
  const T* weight_parts = nullptr;
  int64_t parts = 0, weight_count = 0;
  if (rows > 0) {
    dispatch_math<S>(context, [&](auto math) {
      using Math = decltype(math);
      using P = PooledProduct<Math>;
      using W = WeightProduct<Math>;
      const Matrix<S> dout = gradient_rows<S>(a.grad_out, context);
      const Matrix<S> weight = packed_weight<Math>(a.weight, outputs, channels, context);
      S* const pooled = context.scratch<S>(rows * pitch);

      const int64_t chunks = ceil_div(channels, P::kN), tiles = ceil_div(rows, P::kM),
                    each = ceil_div(tiles * chunks, wanted_blocks());
      parts = ceil_div(tiles, each);
      T* const own_sums = context.scratch<T>(parts * 2 * channels);
      sums = own_sums;
      launch(context, spread_kernel<Math>, {chunks, parts}, P::kThreads, P::kBytes,
             SpreadArgs<S>{dout, weight, a.features, a.grad, windows, a.scale_shift, a.norm, each,
                           pooled, pitch, own_sums});

      // Two blocks for each multiprocessor, none with fewer than 512 pixels.
      const int64_t weight_tiles = ceil_div(outputs, W::kM) * ceil_div(channels, W::kN);
      const int64_t most = std::max<int64_t>(1, 2 * multiprocessors() / weight_tiles),
                    pixels_each = round_up(std::max<int64_t>(512, ceil_div(rows, most)), W::kK);
      weight_count = ceil_div(rows, pixels_each);
      T* const own_parts = context.scratch<T>(weight_count * outputs * pitch);
      weight_parts = own_parts;
      launch(context, weight_kernel<Math>, {weight_tiles, weight_count}, W::kThreads, W::kBytes,
             WeightArgs<S>{dout, {pooled, rows, channels, pitch}, pixels_each, own_parts, pitch});
    });
  }
  launch(context, sum_parts_kernel<T>, cover(outputs * channels, kMaxThreads), kMaxThreads, 0,
         SumArgs<T>{weight_parts, weight_count, outputs, channels, pitch, a.dweight});
  norm_backward<T>({a.norm, sums, parts, channels, static_cast<double>(samples * pixels), a.coef,
                    a.dnorm_weight, a.dnorm_bias},
                   context);
}

#define INSTANTIATE(S) template void transition_backward<S>(const TransitionBackward<S>&, Context&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
#undef INSTANTIATE

}  // namespace densenet_ext::cuda
