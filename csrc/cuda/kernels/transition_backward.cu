// The transition's backward starts the gradient buffer:
//
//   dzp[p', c] = sum_o dout[p', o] W[o, c],   dz = dzp/4 at each of the 4 pixels
//   dv = [scale*x + shift > 0] dz,   G = gamma*rstd*dv,   S1 = sum dv, S2 = sum dv*xhat
//   dW[o, c] = sum_p' dout[p', o] zp[p', c]
//
// Main launch: a block has 64 channels and a part of the pooled pixels, 128 of them at a time.
// Their dzp (gemm_tile.cuh) goes to shared memory; then threads take groups of channels of pooled
// pixels: x of the four pixels, G, both sums, and zp for the next launch, which makes dW in parts
// of the pooled pixels. Parts of dW, S1 and S2 are added in their order by two further launches.
// If a size is odd, the last row or column was not used: one launch clears its G. Bytes moved a
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
struct SpreadArguments {
  using T = Arithmetic<S>;
  Matrix<S> dout, weight;
  Maps<const S> features;
  Maps<S> grad;
  Windows windows;
  ScaleShiftTable<T> scale_shift;  // one row for all samples
  Norm<T> norm;
  int64_t tiles_per_block;
  S* pooled;  // [M', pitch]
  int64_t pitch;
  T* sums;  // [parts, 2, channels]
};

template <class Math>
KERNEL __launch_bounds__(PooledProduct<Math>::kThreads, sizeof(typename Math::T) == 8 ? 1 : 2)
    spread_kernel(SpreadArguments<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using P = PooledProduct<Math>;
  using S = typename P::S;
  using T = typename P::T;
  constexpr int V = kSummedVector<S>;
  DYNAMIC_SHARED(memory);
  const ThreadMap map = {P::kN / V, P::kThreads / (P::kN / V)};
  const int64_t channels = a.features.channels, part = blockIdx.y;
  const Group group = group_of<V>(map, blockIdx.x, channels);
  T* const dzp = reinterpret_cast<T*>(memory);
  T sums[2][V] = {};
  P product;
  for (int64_t tile = part * a.tiles_per_block; tile < (part + 1) * a.tiles_per_block; ++tile) {
    const TilePlace place = {tile * P::kM, static_cast<int64_t>(blockIdx.x) * P::kN, 0,
                             a.dout.columns};
    if (place.m >= a.dout.rows) break;
    product.compute(memory, a.dout, a.weight, place);
    product.store_shared(dzp);

    NormGroup<T, V> norm;
    load_scale_shift<V>(a.scale_shift, 0, group.first, group.valid, norm.scale, norm.shift);
    load_each<V>(a.norm.mean + group.first, group.valid, norm.mean);
    load_gains<V>(a.norm, group.first, group.valid, norm.gain);
    for (int row = map.line(); row < P::kM; row += map.lines) {
      const int64_t m = place.m + row;
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
struct WeightArguments {
  using T = Arithmetic<S>;
  Matrix<S> dout, pooled;
  int64_t pixels_per_part;  // of the pooled maps
  T* parts;                 // [parts, outputs, pitch]
  int64_t pitch;
};

template <class Math>
KERNEL __launch_bounds__(WeightProduct<Math>::kThreads, sizeof(typename Math::T) == 8 ? 1 : 2)
    weight_kernel(WeightArguments<typename Math::Storage> a) {
  wait_for_earlier_kernels();
  using P = WeightProduct<Math>;
  using T = typename P::T;
  DYNAMIC_SHARED(memory);
  const int64_t outputs = a.dout.columns, column_tiles = ceil_div(a.pooled.columns, P::kN),
                part = blockIdx.y, begin = part * a.pixels_per_part,
                end = begin + a.pixels_per_part;
  const TilePlace place = {blockIdx.x / column_tiles * P::kM, blockIdx.x % column_tiles * P::kN,
                           begin, end < a.dout.rows ? end : a.dout.rows};
  P product;
  product.compute(memory, a.dout, a.pooled, place);
  T* const result = a.parts + (part * outputs + place.m) * a.pitch + place.n;
  product.for_accumulators([&](int row, int column, T& value) {
    if (place.m + row < outputs && place.n + column < a.pitch)
      result[row * a.pitch + column] = value;
  });
}

template <class T>
struct SumArguments {
  const T* parts;  // [count, rows, pitch]
  int64_t count, rows, columns, pitch;
  T* out;  // [rows, columns]
};

template <class T>
KERNEL __launch_bounds__(kMaxThreads) sum_parts_kernel(SumArguments<T> a) {
  wait_for_earlier_kernels();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (i >= a.rows * a.columns) return;
  const T* const source = a.parts + i / a.columns * a.pitch + i % a.columns;
  T sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < a.count; ++part) sum += source[part * a.rows * a.pitch];
  a.out[i] = sum;
}

template <class S>
struct EdgeArguments {
  Maps<S> grad;
  Windows windows;
  PixelRanges ranges;  // the pixels in no window
  ThreadMap map;
};

// Clears first the last column, down to the windows' end, then the last row.
template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads) clear_edge_kernel(EdgeArguments<S> a) {
  wait_for_earlier_kernels();
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.grad.channels);
  if (group.valid == 0) return;
  const Windows& w = a.windows;
  const int64_t used = 2 * w.pooled_height, column = w.width % 2 == 0 ? 0 : used;
  for (int64_t i = range.begin + a.map.line(); i < range.end; i += a.map.lines) {
    const int64_t pixel = i < column ? i * w.width + w.width - 1 : used * w.width + i - column;
    const Arithmetic<S> zeros[V] = {};
    store_first<V>(a.grad.row(range.sample * a.grad.pixels() + pixel) + group.first, group.valid,
                   zeros);
  }
}

// Returns the gradient of the output as rows that start at multiples of 16 bytes, copied if need
// be.
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
  Append<S> f = {};
  f.x = m, f.features = {copy, m.samples, m.channels, m.height, m.width, pitch};
  append<S>(f, context);
  return {copy, rows, m.channels, pitch};
}

// Clears the gradient of the pixels in no window, where a size is odd.
template <class S>
void clear_edge(const Maps<S>& grad, const Windows& windows, Context& context) {
  constexpr int V = kVector<S>;
  const int64_t pixels = grad.pixels() - 4 * windows.pooled_pixels();
  if (pixels == 0) return;
  const Partition p = partition(grad.channels, V, grad.samples, pixels);
  EdgeArguments<S> a = {};
  a.grad = grad, a.windows = windows;
  launch(context, clear_edge_kernel<S, V>, p, 0, a);
}

// Makes G of the pixels in windows, and zp in scratch memory. Returns the parts of S1 and S2, and
// sets how many they are.
template <class Math, class S = typename Math::Storage>
const Arithmetic<S>* launch_spread(SpreadArguments<S>& a, int64_t& parts, Context& context) {
  using P = PooledProduct<Math>;
  const int64_t channels = a.features.channels, rows = a.dout.rows,
                chunks = ceil_div(channels, P::kN), tiles = ceil_div(rows, P::kM);
  a.pitch = round_up(channels, kLanes), a.pooled = context.scratch<S>(rows * a.pitch);
  a.tiles_per_block = ceil_div(tiles * chunks, wanted_blocks());
  parts = ceil_div(tiles, a.tiles_per_block);
  a.sums = context.scratch<Arithmetic<S>>(parts * 2 * channels);
  launch(context, spread_kernel<Math>, {chunks, parts}, P::kThreads, P::kBytes, a);
  return a.sums;
}

// Makes the parts of dW. Returns them, and sets how many they are.
template <class Math, class S = typename Math::Storage>
const Arithmetic<S>* launch_weight(const Matrix<S>& dout, const Matrix<S>& pooled, int64_t& parts,
                                   Context& context) {
  using P = WeightProduct<Math>;
  const int64_t tiles = ceil_div(dout.columns, P::kM) * ceil_div(pooled.columns, P::kN);
  // Two blocks for each multiprocessor, none with fewer than 512 pixels.
  const int64_t most_parts = std::max<int64_t>(1, 2 * multiprocessors() / tiles);
  WeightArguments<S> a = {};
  a.dout = dout, a.pooled = pooled, a.pitch = pooled.pitch;
  a.pixels_per_part = round_up(std::max<int64_t>(512, ceil_div(dout.rows, most_parts)), P::kK);
  parts = ceil_div(dout.rows, a.pixels_per_part);
  a.parts = context.scratch<Arithmetic<S>>(parts * dout.columns * a.pitch);
  launch(context, weight_kernel<Math>, {tiles, parts}, P::kThreads, P::kBytes, a);
  return a.parts;
}

}  // namespace

template <class S>
void transition_backward(const TransitionBackward<S>& f, Context& context) {
  using T = Arithmetic<S>;
  const Windows windows = Windows::of(f.features);
  const int64_t channels = f.features.channels, outputs = f.grad_out.channels,
                rows = f.features.samples * windows.pooled_pixels();
  clear_edge(f.grad, windows, context);
  const T* sums = nullptr;
  int64_t sum_parts = 0;
  SumArguments<T> weight = {};
  weight.rows = outputs, weight.columns = channels, weight.out = f.dweight;
  weight.pitch = round_up(channels, kLanes);
  if (rows > 0) {
    dispatch_math<S>(context, [&](auto math) {
      using Math = decltype(math);
      SpreadArguments<S> a = {};
      a.dout = gradient_rows<S>(f.grad_out, context);
      a.weight = packed_weight<Math>(f.weight, outputs, channels, context);
      a.features = f.features, a.grad = f.grad, a.windows = windows;
      a.scale_shift = f.scale_shift, a.norm = f.norm;
      sums = launch_spread<Math>(a, sum_parts, context);
      weight.parts =
          launch_weight<Math>(a.dout, {a.pooled, rows, channels, a.pitch}, weight.count, context);
    });
  }
  launch(context, sum_parts_kernel<T>, cover(outputs * channels), kMaxThreads, 0, weight);
  norm_backward(norm_backward_of<T>(f, f.coef, sums, sum_parts, channels, f.features.count()),
                context);
}

DENSENET_EXT_INSTANTIATE(transition_backward, TransitionBackward)

}  // namespace densenet_ext::cuda
