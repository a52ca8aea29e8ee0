// slice_moments takes the mean and the centered sum of squares of channels that were just written:
//
//   mean[n, c] = (1/P) sum_p x[n, p, c],   m2[n, c] = sum_p (x[n, p, c] - mean[n, c])^2
//
// A thread takes some pixels of V channels at a time: their own mean and squares around it, from
// registers, then Chan's merge into what it has; the threads of a block, and the blocks of a
// sample, are merged by  m2 = sum_i m2_i + count_i (mean_i - mean)^2.  So nothing cancels, and the
// channels are read once. Bytes moved: k*e a pixel. Where a sample is split, its partial moments go
// to scratch memory, and a second kernel merges them in order.
#include "channel_loops.cuh"

namespace densenet_ext::cuda {
namespace {

template <class S>
struct Arguments {
  using T = Arithmetic<S>;
  const S* data;  // at the first channel
  int64_t pitch, channels;
  PixelRanges ranges;
  ThreadMap map;
  T* mean;  // [ranges, channels], rows `out_pitch` apart
  T* m2;
  int64_t out_pitch;
};

// Joins each thread's moments of `count` pixels into those of all `total` pixels of the block.
template <int V, class T>
DEVICE void merge_lines(T (&mean)[V], T (&m2)[V], T count, T total, T* shared,
                        const ThreadMap& map) {
  T joined[V];
#pragma unroll
  for (int v = 0; v < V; ++v) joined[v] = count * mean[v];
  sum_lines(joined, shared, map);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    joined[v] = total > T(0) ? joined[v] / total : T(0);
    m2[v] += count * (mean[v] - joined[v]) * (mean[v] - joined[v]);
    mean[v] = joined[v];
  }
  sum_lines(m2, shared, map);
}

template <class S, int V>
KERNEL __launch_bounds__(kMaxThreads, 3) moments_kernel(Arguments<S> a) {
  wait_for_earlier_kernels();
  using T = Arithmetic<S>;
  DYNAMIC_SHARED(memory);
  constexpr int kInFlight = sizeof(T) == 8 ? 4 : 8;  // the registers have room for so many
  const PixelRange range = a.ranges[blockIdx.x];
  const Group group = group_of<V>(a.map, blockIdx.y, a.channels);
  const S* const source = a.data + range.sample * a.ranges.pixels * a.pitch + group.first;

  T mean[V] = {}, m2[V] = {};
  int64_t count = 0;
  if (group.valid > 0) {
    for (int64_t p = range.begin + a.map.line(); p < range.end; p += kInFlight * a.map.lines) {
      T x[kInFlight][V] = {};
      int loaded = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (p + i * a.map.lines < range.end) {
          load_first<V>(source + (p + i * a.map.lines) * a.pitch, group.valid, x[i]);
          loaded = i + 1;
        }
      }
      const T inverse = T(1) / T(loaded), fraction = T(loaded) / T(count + loaded),
              old_count = T(count);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) sum += x[i][v];
        const T center = sum * inverse, delta = center - mean[v];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const T d = i < loaded ? x[i][v] - center : T(0);
          squares += d * d;
        }
        mean[v] += delta * fraction;
        m2[v] += squares + delta * delta * old_count * fraction;
      }
      count += loaded;
    }
  }
  merge_lines(mean, m2, T(count), T(range.end - range.begin), reinterpret_cast<T*>(memory), a.map);
  if (a.map.line() != 0) return;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * a.out_pitch + group.first;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < group.valid) a.mean[target + v] = mean[v], a.m2[target + v] = m2[v];
  }
}

template <class T>
struct MergeArguments {
  const T* mean;  // [ranges, channels]
  const T* m2;
  int64_t channels;
  PixelRanges ranges;
  T* mean_out;  // [samples, channels], rows `out_pitch` apart
  T* m2_out;
  int64_t out_pitch;
};

template <class T>
KERNEL __launch_bounds__(kMaxThreads) merge_moments_kernel(MergeArguments<T> a) {
  wait_for_earlier_kernels();
  DYNAMIC_SHARED(memory);
  const int64_t n = blockIdx.x;
  const ThreadMap map = narrow_map();
  const Group group = group_of<1>(map, blockIdx.y, a.channels);
  T mean[1] = {}, m2[1] = {};
  int64_t count = 0;
  if (group.valid > 0) {
    for (int64_t i = map.line(); i < a.ranges.splits; i += map.lines) {
      const int64_t index = (n * a.ranges.splits + i) * a.channels + group.first;
      const int64_t size = a.ranges.size(i);
      const T fraction = T(size) / T(count + size), delta = a.mean[index] - mean[0];
      mean[0] += delta * fraction;
      m2[0] += a.m2[index] + delta * delta * T(count) * fraction;
      count += size;
    }
  }
  merge_lines(mean, m2, T(count), T(a.ranges.pixels), reinterpret_cast<T*>(memory), map);
  if (map.line() != 0 || group.valid == 0) return;
  a.mean_out[n * a.out_pitch + group.first] = mean[0];
  a.m2_out[n * a.out_pitch + group.first] = m2[0];
}

}  // namespace

template <class S>
void slice_moments(const Maps<const S>& features, int64_t offset, int64_t channels,
                   const Moments<Arithmetic<S>>& moments, Context& context) {
  using T = Arithmetic<S>;
  if (!moments.mean || channels == 0) return;
  const int64_t samples = features.samples, pixels = features.pixels();
  const uint64_t distances = spacing(features, offset);
  with_partition<S, kSummedVector<S>>(distances, channels, samples, pixels, [&](auto V, auto& p) {
    T* const mean = moments.mean + offset;
    T* const m2 = moments.m2 + offset;
    const bool is_split = p.ranges.splits > 1;
    Arguments<S> a = {};
    a.data = features.data + offset, a.pitch = features.pitch, a.channels = channels;
    a.mean = is_split ? context.scratch<T>(p.ranges.count() * channels) : mean;
    a.m2 = is_split ? context.scratch<T>(p.ranges.count() * channels) : m2;
    a.out_pitch = is_split ? channels : moments.channels;
    launch(context, moments_kernel<S, V>, p, V * p.threads * sizeof(T), a);
    if (!is_split) return;
    MergeArguments<T> merge = {};
    merge.mean = a.mean, merge.m2 = a.m2, merge.channels = channels, merge.ranges = p.ranges;
    merge.mean_out = mean, merge.m2_out = m2, merge.out_pitch = moments.channels;
    launch(context, merge_moments_kernel<T>, {samples, narrow_blocks(channels)}, kMaxThreads,
           kMaxThreads * sizeof(T), merge);
  });
}

#define INSTANTIATE(S)                                                   \
  template void slice_moments<S>(const Maps<const S>&, int64_t, int64_t, \
                                 const Moments<Arithmetic<S>>&, Context&);
DENSENET_EXT_STORAGE_TYPES(INSTANTIATE)

}  // namespace densenet_ext::cuda
